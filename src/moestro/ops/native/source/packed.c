/* Weights in bf16, or in blocks of int8 or int4: experts on few tokens, one product of few rows, and the way back to
 * fp32. Numbers and sums are fp32. A result that is not 0 means: no memory (1), or not a kind (-1). */
#include "few.h"

/* As moestro_few_f32, with a kind (dots.h) and the scales of both matrices, NULL for bf16. */
int moestro_packed_few(int kind, float *y, const float *x, const int64_t *expert, const float *weight,
                       const void *first, const uint16_t *first_scale, const void *down, const uint16_t *down_scale,
                       int64_t T, int64_t K, int64_t E, int64_t D, int64_t F, int activation, int gated, int threads)
{
    few_problem p = {x, expert, weight, {first, first_scale}, {down, down_scale}, T, K, E, D, F, activation, gated};
    switch (kind) {
    case KIND_BF16:
        return few(KIND_BF16, &p, y, threads);
    case KIND_INT8:
        return few(KIND_INT8, &p, y, threads);
    case KIND_INT4:
        return few(KIND_INT4, &p, y, threads);
    default:
        return -1;
    }
}

/* Rows from..to of m times every row of x [T, stride] -> y [T, O]. Eight rows at a time: the tokens after the first
 * find them in the cache. */
INLINE void product(int kind, float *y, const float *x, int64_t stride, matrix m, int64_t T, int64_t O, int64_t I,
                    int64_t from, int64_t to)
{
    for (int64_t o = from; o < to; o += 8) {
        const int64_t n = to - o < 8 ? to - o : 8;
        const matrix part = rows_from(kind, m, o, I);
        const matrix next = o + n < to ? rows_from(kind, part, n, I) : part;
        for (int64_t t = 0; t < T; t++)
            dots(kind, part, n, I, x + t * stride, y + t * O + o, t ? part : next);
    }
}

/* y [T, O] = x [T, I] w^T, w [O, I]. */
int moestro_packed_product(int kind, float *y, const float *x, const void *data, const uint16_t *scale, int64_t T,
                           int64_t O, int64_t I, int threads)
{
    if (kind < KIND_BF16 || kind > KIND_INT4)
        return -1;
    float *copy = NULL;
    int64_t stride = I;
    if (kind >= KIND_INT8 && whole(I) != I) {
        stride = whole(I);
        if (!(copy = calloc((size_t)(T * stride + 1), sizeof(float))))
            return 1;
        for (int64_t t = 0; t < T; t++)
            memcpy(copy + t * stride, x + t * I, (size_t)(4 * I));
        x = copy;
    }
    const matrix m = {data, scale};
#pragma omp parallel num_threads(threads)
    {
        const int64_t j = omp_get_thread_num(), n = omp_get_num_threads(), from = O * j / n, to = O * (j + 1) / n;
        if (kind == KIND_BF16)
            product(KIND_BF16, y, x, stride, m, T, O, I, from, to);
        else if (kind == KIND_INT8)
            product(KIND_INT8, y, x, stride, m, T, O, I, from, to);
        else
            product(KIND_INT4, y, x, stride, m, T, O, I, from, to);
    }
    free(copy);
    return 0;
}

/* w [rows, I]: exactly what the packed weights stand for. */
int moestro_unpack(int kind, float *w, const void *data, const uint16_t *scale, int64_t rows, int64_t I, int threads)
{
    if (kind < KIND_BF16 || kind > KIND_INT4)
        return -1;
    const int64_t blocks = blocks_of(I);
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < rows; r++) {
        float *out = w + r * I;
        if (kind == KIND_BF16) {
            const uint16_t *v = (const uint16_t *)data + r * I;
            for (int64_t i = 0; i < I; i += VW) {
                const int64_t m = I - i < VW ? I - i : VW;
                v_store_n(out + i, m < VW ? bf16_load_n(v + i, m) : bf16_load(v + i), m);
            }
            continue;
        }
        for (int64_t b = 0; b < blocks; b++) {
            const int8_t *v = (const int8_t *)data + (r * blocks + b) * (kind == KIND_INT8 ? 32 : 16);
            const float s = _cvtsh_ss(scale[r * blocks + b]);
            const int64_t m = I - b * BLOCK < BLOCK ? I - b * BLOCK : BLOCK;
            float block[BLOCK];
            if (kind == KIND_INT8)
                for (int i = 0; i < BLOCK; i++)
                    block[i] = (float)v[i] * s;
            else
                for (int i = 0; i < 16; i++) {
                    block[i] = (float)((int8_t)(v[i] << 4) >> 4) * s;
                    block[i + 16] = (float)(v[i] >> 4) * s;
                }
            memcpy(out + b * BLOCK, block, (size_t)(4 * m));
        }
    }
    return 0;
}
