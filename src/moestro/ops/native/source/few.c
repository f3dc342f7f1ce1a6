/* Experts on few tokens in fp32, and the plain reading of memory that they are measured against. */
#include "few.h"

/* x [T, D], expert and weight [T, K], first [E, F or 2F, D], down [E, D, F] -> y [T, D]. Not 0: no memory. */
int moestro_few_f32(float *y, const float *x, const int64_t *expert, const float *weight, const float *first,
                    const float *down, int64_t T, int64_t K, int64_t E, int64_t D, int64_t F, int activation, int gated,
                    int threads)
{
    few_problem p = {x, expert, weight, {(const char *)first, NULL}, {(const char *)down, NULL}, T, K, E, D, F,
                     activation, gated};
    return few(KIND_F32, &p, y, threads);
}

/* Reads `count` pieces of memory once, each thread its contiguous part of every piece, and returns the sum of their
 * floats: no use of those bytes takes less time. bytes[i] is a multiple of 4. */
double moestro_read(const float *const *piece, const int64_t *bytes, int64_t count, int threads)
{
    double total = 0.0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    {
        const int64_t j = omp_get_thread_num(), n = omp_get_num_threads();
        vf sum[8];
        for (int a = 0; a < 8; a++)
            sum[a] = v_set(0.0f);
        for (int64_t c = 0; c < count; c++) {
            const int64_t size = bytes[c] / 4, stop = size * (j + 1) / n;
            const float *w = piece[c];
            int64_t i = size * j / n;
            for (; i + 8 * VW <= stop; i += 8 * VW)
                for (int a = 0; a < 8; a++) {
                    _mm_prefetch((const char *)(w + i + a * VW) + 4096, _MM_HINT_T0);
                    sum[a] += v_load(w + i + a * VW);
                }
            for (; i < stop; i += VW)
                sum[0] += v_load_n(w + i, stop - i < VW ? stop - i : VW);
        }
        for (int a = 0; a < 8; a++)
            total += v_sum(sum[a]);
    }
    return total;
}
