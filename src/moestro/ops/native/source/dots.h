/* Dot products of rows of weights, in fp32 or in fewer bits, with fp32 numbers and sums.
 *
 * A row is summed in the same order wherever it stands and whoever sums it. Formats (moestro/ops/packed/format.py):
 * bf16 is the upper half of an fp32; int8 and int4 have blocks of 32 weights with one fp16 scale each, an int4 block
 * being 16 bytes whose low halves are the weights 0..15 and whose high halves are the weights 16..31.
 */
#ifndef MOESTRO_DOTS_H
#define MOESTRO_DOTS_H

#include "mathv.h"

#define INLINE static inline __attribute__((always_inline))

enum { KIND_F32 = 0, KIND_BF16 = 1, KIND_INT8 = 2, KIND_INT4 = 3 };
enum { BLOCK = 32 };

/* One matrix, or a part of its rows. scale is NULL where the kind has none. */
typedef struct {
    const char *data;
    const uint16_t *scale;
} matrix;

INLINE int64_t blocks_of(int64_t n) { return (n + BLOCK - 1) / BLOCK; }

/* Bytes of a row of n weights, without its scales. */
INLINE int64_t row_bytes(int kind, int64_t n)
{
    return kind == KIND_F32 ? 4 * n : kind == KIND_BF16 ? 2 * n : blocks_of(n) * (kind == KIND_INT8 ? 32 : 16);
}

INLINE matrix rows_from(int kind, matrix m, int64_t row, int64_t n)
{
    m.data += row * row_bytes(kind, n);
    if (kind >= KIND_INT8)
        m.scale += row * blocks_of(n);
    return m;
}

/* VW bf16 numbers, and the first m of them. */
INLINE vf bf16_load(const uint16_t *p)
{
#ifdef __AVX512F__
    const __m512i v = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return (vf)_mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
#else
    const __m256i v = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return (vf)_mm256_castsi256_ps(_mm256_slli_epi32(v, 16));
#endif
}

INLINE vf bf16_load_n(const uint16_t *p, int64_t m)
{
    uint16_t whole[VW] = {0};
    for (int64_t i = 0; i < m; i++)
        whole[i] = p[i];
    return bf16_load(whole);
}

/* Sixteen scales at most, as floats. */
INLINE void scales(const uint16_t *p, int64_t m, float *out)
{
    uint16_t part[16] = {0};
    if (m < 16) {
        for (int64_t i = 0; i < m; i++)
            part[i] = p[i];
        p = part;
    }
    for (int i = 0; i < 16; i += 8)
        _mm256_store_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + i))));
}

INLINE float dot_f32(const float *w, const float *x, int64_t n, const char *ahead)
{
    vf s0 = v_set(0.0f), s1 = s0, s2 = s0, s3 = s0;
    int64_t i = 0;
    for (; i + 4 * VW <= n; i += 4 * VW) {
        for (int b = 0; b < 16 * VW; b += 64)
            _mm_prefetch(ahead + 4 * i + b, _MM_HINT_T0);
        s0 = v_fma(v_load(w + i), v_load(x + i), s0);
        s1 = v_fma(v_load(w + i + VW), v_load(x + i + VW), s1);
        s2 = v_fma(v_load(w + i + 2 * VW), v_load(x + i + 2 * VW), s2);
        s3 = v_fma(v_load(w + i + 3 * VW), v_load(x + i + 3 * VW), s3);
    }
    for (; i < n; i += VW) {
        int64_t m = n - i < VW ? n - i : VW;
        _mm_prefetch(ahead + 4 * i, _MM_HINT_T0);
        s0 = v_fma(v_load_n(w + i, m), v_load_n(x + i, m), s0);
    }
    return v_sum((s0 + s1) + (s2 + s3));
}

INLINE float dot_bf16(const uint16_t *w, const float *x, int64_t n, const char *ahead)
{
    vf s0 = v_set(0.0f), s1 = s0, s2 = s0, s3 = s0;
    int64_t i = 0;
    for (; i + 4 * VW <= n; i += 4 * VW) {
        for (int b = 0; b < 8 * VW; b += 64)
            _mm_prefetch(ahead + 2 * i + b, _MM_HINT_T0);
        s0 = v_fma(bf16_load(w + i), v_load(x + i), s0);
        s1 = v_fma(bf16_load(w + i + VW), v_load(x + i + VW), s1);
        s2 = v_fma(bf16_load(w + i + 2 * VW), v_load(x + i + 2 * VW), s2);
        s3 = v_fma(bf16_load(w + i + 3 * VW), v_load(x + i + 3 * VW), s3);
    }
    for (; i < n; i += VW) {
        int64_t m = n - i < VW ? n - i : VW;
        s0 = v_fma(bf16_load_n(w + i, m), v_load_n(x + i, m), s0);
    }
    return v_sum((s0 + s1) + (s2 + s3));
}

/* One block of 32 int8 weights times x, times the scale, added to sum. */
INLINE void block_int8(const char *w, const float *x, float scale, vf sum[2])
{
    vf p[2];
    for (int h = 0; h < 2; h++) { /* either half of the block has its own sum */
        const char *v = w + 16 * h;
        const float *u = x + 16 * h;
#ifdef __AVX512F__
        p[h] = (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)v))) * v_load(u);
#else
        vf a = (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)v)));
        vf b = (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(v + 8))));
        p[h] = v_fma(a, v_load(u), b * v_load(u + 8));
#endif
        sum[h] = v_fma(p[h], v_set(scale), sum[h]);
    }
}

/* One block of 32 int4 weights, likewise. */
INLINE void block_int4(const char *w, const float *x, float scale, vf sum[2])
{
#ifdef __AVX512F__
    /* The sixteen values that a weight of this block can have, looked up by the low four bits of each lane. */
    const vf value = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};
    __m512 scaled = (__m512)(value * v_set(scale));
    __m512i v = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)w));
    sum[0] = v_fma((vf)_mm512_permutexvar_ps(v, scaled), v_load(x), sum[0]);
    sum[1] = v_fma((vf)_mm512_permutexvar_ps(_mm512_srli_epi32(v, 4), scaled), v_load(x + 16), sum[1]);
#else
    __m256i a = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)w));
    __m256i b = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(w + 8)));
    vf a0 = (vf)_mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(a, 28), 28));
    vf b0 = (vf)_mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(b, 28), 28));
    vf a1 = (vf)_mm256_cvtepi32_ps(_mm256_srai_epi32(a, 4));
    vf b1 = (vf)_mm256_cvtepi32_ps(_mm256_srai_epi32(b, 4));
    sum[0] = v_fma(v_fma(a0, v_load(x), b0 * v_load(x + 8)), v_set(scale), sum[0]);
    sum[1] = v_fma(v_fma(a1, v_load(x + 16), b1 * v_load(x + 24)), v_set(scale), sum[1]);
#endif
}

/* `count` rows at once (a constant), which share the reading of x; x has whole blocks. `early` is asked for. */
INLINE void dots_blocks(int kind, int count, const char *w, const uint16_t *scale, int64_t n, const float *x,
                        float *out, matrix early)
{
    int64_t blocks = blocks_of(n), bytes = row_bytes(kind, n), each = kind == KIND_INT8 ? 32 : 16;
    vf sum[4][2];
    float s[4][16] __attribute__((aligned(64)));
#pragma GCC unroll 4
    for (int r = 0; r < count; r++)
        sum[r][0] = sum[r][1] = v_set(0.0f);
    for (int64_t b = 0; b < count * bytes; b += 64)
        _mm_prefetch(early.data + b, _MM_HINT_T0);
    for (int64_t b = 0; b < count * blocks; b += 32)
        _mm_prefetch((const char *)(early.scale + b), _MM_HINT_T0);
    for (int64_t g = 0; g < blocks; g += 16) {
        int64_t m = blocks - g < 16 ? blocks - g : 16;
#pragma GCC unroll 4
        for (int r = 0; r < count; r++)
            scales(scale + r * blocks + g, m, s[r]);
        for (int64_t b = 0; b < m; b++)
#pragma GCC unroll 4
            for (int r = 0; r < count; r++) {
                const char *v = w + r * bytes + (g + b) * each;
                if (kind == KIND_INT8)
                    block_int8(v, x + (g + b) * BLOCK, s[r][b], sum[r]);
                else
                    block_int4(v, x + (g + b) * BLOCK, s[r][b], sum[r]);
            }
    }
#pragma GCC unroll 4
    for (int r = 0; r < count; r++)
        out[r] = v_sum(sum[r][0] + sum[r][1]);
}

enum { AHEAD_OF_ROW = 8192 }; /* bytes that are asked for before the row that is worked on */

/* The place AHEAD_OF_ROW bytes after w; where the part ends before it, as far into the next part. */
INLINE const char *early_data(const char *w, const char *end, const char *next)
{
    return w + AHEAD_OF_ROW < end ? w + AHEAD_OF_ROW : next + (w + AHEAD_OF_ROW - end);
}

/* The scales of that place. */
INLINE const uint16_t *early_scale(int kind, const uint16_t *s, const uint16_t *end, const uint16_t *next)
{
    const int64_t ahead = AHEAD_OF_ROW / (kind == KIND_INT8 ? 32 : 16);
    return s + ahead < end ? s + ahead : next + (s + ahead - end);
}

/* out[r] = row r of m times x, r < rows; n weights in a row. What is read after these rows begins at `next`. */
INLINE void dots(int kind, matrix m, int64_t rows, int64_t n, const float *x, float *out, matrix next)
{
    const int64_t bytes = row_bytes(kind, n), blocks = blocks_of(n);
    const char *w = m.data, *end = w + rows * bytes;
    if (kind < KIND_INT8) {
        for (int64_t r = 0; r < rows; r++, w += bytes) {
            const char *early = early_data(w, end, next.data);
            if (kind == KIND_F32)
                out[r] = dot_f32((const float *)w, x, n, early);
            else
                out[r] = dot_bf16((const uint16_t *)w, x, n, early);
        }
        return;
    }
    const uint16_t *s = m.scale, *last = s + rows * blocks;
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4, w += 4 * bytes, s += 4 * blocks) {
        const matrix early = {early_data(w, end, next.data), early_scale(kind, s, last, next.scale)};
        dots_blocks(kind, 4, w, s, n, x, out + r, early);
    }
    for (; r < rows; r++, w += bytes, s += blocks) {
        const matrix early = {early_data(w, end, next.data), early_scale(kind, s, last, next.scale)};
        dots_blocks(kind, 1, w, s, n, x, out + r, early);
    }
}

/* Ask for the beginning of a part that is about to be read, as `dots` asks for the rest of it. */
INLINE void begin(int kind, matrix m)
{
    for (int64_t b = 0; b < AHEAD_OF_ROW; b += 64)
        _mm_prefetch(m.data + b, _MM_HINT_T0);
    if (kind >= KIND_INT8)
        for (int64_t b = 0; b < AHEAD_OF_ROW / (kind == KIND_INT8 ? 32 : 16); b += 32)
            _mm_prefetch((const char *)(m.scale + b), _MM_HINT_T0);
}

#endif
