/* Products of row-major matrices in fp32, made of one register tile: MR rows times NR columns.
 *
 * Every entry of a result is one chain of fused multiply-adds over the inner axis, from its first entry to its last,
 * whatever the other rows, columns and threads are: results do not depend, to the last bit, on what else is computed.
 * (An inner axis in chunks continues the chain in memory.) The exception is `few_rows`, which sums lane by lane.
 */
#ifndef MOESTRO_GEMM_H
#define MOESTRO_GEMM_H

#include "mathv.h"
#include <string.h>

#ifdef __AVX512F__
#define MR 12
#else
#define MR 6
#endif
#define NR (2 * VW)
#define FEW 8      /* rows whose dot products are taken together */
#define AHEAD 12    /* columns that are asked for before they are needed */
#define TURNING 16 /* rows up to which turning a matrix costs more than it saves */
#define INLINE static inline __attribute__((always_inline))

/* c[M, NR] = or += a b over K. a[i, k] = a[i * ars + k * acs], b[k, j] = b[k * NR + j]; c has rows of ldc.
 * `rows`, where given, holds the addresses of the M rows of a instead. M is a constant where this is inlined. */
INLINE void tile_rows(const int M, int64_t K, const float *a, int64_t ars, int64_t acs, const float *b, int64_t ldb,
                      float *c, int64_t ldc, int add)
{
    vf acc[MR][2];
#pragma GCC unroll 16
    for (int i = 0; i < M; i++) {
        acc[i][0] = add ? v_load(c + i * ldc) : v_set(0);
        acc[i][1] = add ? v_load(c + i * ldc + VW) : v_set(0);
    }
    for (int64_t k = 0; k < K; k++) {
        vf b0 = v_load(b), b1 = v_load(b + VW);
#pragma GCC unroll 16
        for (int i = 0; i < M; i++) {
            vf x = v_set(a[i * ars]);
            acc[i][0] = v_fma(x, b0, acc[i][0]);
            acc[i][1] = v_fma(x, b1, acc[i][1]);
        }
        a += acs;
        b += ldb;
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; i++) {
        v_store(c + i * ldc, acc[i][0]);
        v_store(c + i * ldc + VW, acc[i][1]);
    }
}

#define TILE(M)                                                                                                        \
    static __attribute__((noinline)) void tile_##M(int64_t K, const float *a, int64_t ars, int64_t acs,                \
                                                   const float *b, int64_t ldb, float *c, int64_t ldc, int add)        \
    {                                                                                                                  \
        if (acs == 1)                                                                                                  \
            tile_rows(M, K, a, ars, 1, b, ldb, c, ldc, add);                                                           \
        else                                                                                                           \
            tile_rows(M, K, a, 1, acs, b, ldb, c, ldc, add);                                                           \
    }
typedef void tile_fn(int64_t, const float *, int64_t, int64_t, const float *, int64_t, float *, int64_t, int);
TILE(1)
TILE(2)
TILE(3)
TILE(4)
TILE(5)
TILE(6)
#ifdef __AVX512F__
TILE(7)
TILE(8)
TILE(9)
TILE(10)
TILE(11)
TILE(12)
static tile_fn *const TILES[] = {0, tile_1, tile_2, tile_3, tile_4, tile_5, tile_6,
                                 tile_7, tile_8, tile_9, tile_10, tile_11, tile_12};
#else
static tile_fn *const TILES[] = {0, tile_1, tile_2, tile_3, tile_4, tile_5, tile_6};
#endif

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* One tile of any size up to MR x NR: partial columns go through a buffer. Either ars or acs is 1. */
static void tile(int64_t m, int64_t n, int64_t K, const float *a, int64_t ars, int64_t acs, const float *b,
                 int64_t ldb, float *c, int64_t ldc, int add)
{
    if (n == NR) {
        TILES[m](K, a, ars, acs, b, ldb, c, ldc, add);
        return;
    }
    float buffer[MR * NR] __attribute__((aligned(64)));
    if (add)
        for (int64_t i = 0; i < m; i++)
            memcpy(buffer + i * NR, c + i * ldc, n * sizeof(float));
    TILES[m](K, a, ars, acs, b, ldb, buffer, NR, add);
    for (int64_t i = 0; i < m; i++)
        memcpy(c + i * ldc, buffer + i * NR, n * sizeof(float));
}

/* VW x VW floats from rows of `from` (stride ldf) to columns of `to` (stride ldt). */
#ifdef __AVX512F__
INLINE void turn(const float *from, int64_t ldf, float *to, int64_t ldt)
{
    __m512 r[16], s[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
        r[i] = _mm512_loadu_ps(from + i * ldf);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        s[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        s[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_shuffle_ps(s[i], s[i + 2], 0x44);
        r[i + 1] = _mm512_shuffle_ps(s[i], s[i + 2], 0xee);
        r[i + 2] = _mm512_shuffle_ps(s[i + 1], s[i + 3], 0x44);
        r[i + 3] = _mm512_shuffle_ps(s[i + 1], s[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        s[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
        s[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
        s[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
        s[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        _mm512_storeu_ps(to + i * ldt, _mm512_shuffle_f32x4(s[i], s[i + 8], 0x88));
        _mm512_storeu_ps(to + (i + 4) * ldt, _mm512_shuffle_f32x4(s[i + 4], s[i + 12], 0x88));
        _mm512_storeu_ps(to + (i + 8) * ldt, _mm512_shuffle_f32x4(s[i], s[i + 8], 0xdd));
        _mm512_storeu_ps(to + (i + 12) * ldt, _mm512_shuffle_f32x4(s[i + 4], s[i + 12], 0xdd));
    }
}
#else
INLINE void turn(const float *from, int64_t ldf, float *to, int64_t ldt)
{
    __m256 r[8], s[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        r[i] = _mm256_loadu_ps(from + i * ldf);
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        s[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        s[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(s[i], s[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(s[i], s[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(to + i * ldt, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
        _mm256_storeu_ps(to + (i + 4) * ldt, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
}
#endif

/* Columns j .. j+n (n <= NR) of b as a strip [K, NR], zeros behind them. b is [K, N] with rows of ldb, or, if turned,
 * stored as its transpose [N, K] with rows of ldb. */
static void strip(float *to, const float *b, int64_t ldb, int turned, int64_t K, int64_t j, int64_t n)
{
    if (!turned) {
        b += j;
        if (n == NR) {
            for (int64_t k = 0; k < K; k++, b += ldb, to += NR) {
                v_store(to, v_load(b));
                v_store(to + VW, v_load(b + VW));
            }
            return;
        }
        for (int64_t k = 0; k < K; k++, b += ldb, to += NR) {
            v_store(to, v_load_n(b, least(n, VW)));
            v_store(to + VW, v_load_n(b + VW, most(n - VW, 0)));
        }
        return;
    }
    b += j * ldb;
    if (n == NR) {
        int64_t k = 0;
        for (; k + VW <= K; k += VW) {
            turn(b + k, ldb, to + k * NR, NR);
            turn(b + VW * ldb + k, ldb, to + k * NR + VW, NR);
        }
        for (; k < K; k++)
            for (int i = 0; i < NR; i++)
                to[k * NR + i] = b[i * ldb + k];
        return;
    }
    for (int64_t k = 0; k < K; k++)
        for (int i = 0; i < NR; i++)
            to[k * NR + i] = i < n ? b[i * ldb + k] : 0.0f;
}

/* c[M, n] = a[M, K] b[n, K]^T by dot products along K: b is read once, in its order, and not turned. */
INLINE void dot_tile(const int M, const int n, int64_t K, const float *a, int64_t lda, const float *b, int64_t ldb,
                 float *c, int64_t ldc)
{
    vf acc[FEW][4];
#pragma GCC unroll 8
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int j = 0; j < n; j++)
            acc[i][j] = v_set(0);
    int64_t k = 0;
    for (; k + VW <= K; k += VW) {
        vf x[4];
#pragma GCC unroll 4
        for (int j = 0; j < n; j++) {
            x[j] = v_load(b + j * ldb + k);
            __builtin_prefetch(b + (j + AHEAD) * ldb + k);
        }
#pragma GCC unroll 8
        for (int i = 0; i < M; i++) {
            vf y = v_load(a + i * lda + k);
#pragma GCC unroll 4
            for (int j = 0; j < n; j++)
                acc[i][j] = v_fma(y, x[j], acc[i][j]);
        }
    }
    if (k < K)
        for (int i = 0; i < M; i++)
            for (int j = 0; j < n; j++)
                acc[i][j] = v_fma(v_load_n(a + i * lda + k, K - k), v_load_n(b + j * ldb + k, K - k), acc[i][j]);
    for (int i = 0; i < M; i++)
        for (int j = 0; j < n; j++)
            c[i * ldc + j] = v_sum(acc[i][j]);
}

#ifdef __AVX512F__
#define BESIDE(M) ((M) > 6 ? 3 : 4) /* columns at once: so many sums fit the registers */
#else
#define BESIDE(M) ((M) > 4 ? 1 : (M) > 2 ? 2 : 4)
#endif
#define DOTS(M)                                                                                                        \
    case M:                                                                                                            \
        for (; j + BESIDE(M) <= N; j += BESIDE(M))                                                                     \
            dot_tile(M, BESIDE(M), K, a, lda, b + j * ldb, ldb, c + j, ldc);                                               \
        for (; j < N; j++)                                                                                             \
            dot_tile(M, 1, K, a, lda, b + j * ldb, ldb, c + j, ldc);                                                       \
        break;

/* c[m, N] = a[m, K] b[N, K]^T for at most FEW rows: bound by reading b. */
static void few_rows(float *c, int64_t ldc, const float *a, int64_t lda, const float *b, int64_t ldb, int64_t m,
                     int64_t N, int64_t K)
{
    int64_t j = 0;
    switch (m) {
        DOTS(1)
        DOTS(2)
        DOTS(3)
        DOTS(4)
        DOTS(5)
        DOTS(6)
        DOTS(7)
        DOTS(8)
    }
}

/* c[m, N] = a[m, K] b[K, N]; a and c have rows of lda and ldc; b as in `strip`. scratch: K * NR floats.
 * ordered: not by `few_rows`, however few there are. */
static void product(float *c, int64_t ldc, const float *a, int64_t lda, const float *b, int64_t ldb, int turned,
                    int64_t m, int64_t N, int64_t K, int ordered, float *scratch)
{
    if (turned && m <= TURNING && !ordered) { /* some columns at a time, so that b comes from memory once */
        int64_t parts = (m + FEW - 1) / FEW, each = (m + parts - 1) / parts;
        for (int64_t j = 0; j < N; j += NR)
            for (int64_t i = 0; i < m; i += each)
                few_rows(c + i * ldc + j, ldc, a + i * lda, lda, b + j * ldb, ldb, least(each, m - i),
                         least(NR, N - j), K);
        return;
    }
    for (int64_t j = 0; j < N; j += NR) {
        int64_t n = least(NR, N - j), ld = NR;
        const float *block = scratch;
        if (!turned && n == NR && m <= MR) { /* met once: as it lies */
            block = b + j;
            ld = ldb;
        } else
            strip(scratch, b, ldb, turned, K, j, n);
        for (int64_t i = 0; i < m; i += MR)
            tile(least(MR, m - i), n, K, a + i * lda, lda, 1, block, ld, c + i * ldc + j, ldc, 0);
    }
}

/* Rows of a matrix, the r-th at base + index[r] * ld; index 0 = r itself. */
typedef struct {
    const float *base;
    const int64_t *index;
    int64_t ld;
} rows_t;

INLINE const float *row(rows_t m, int64_t r) { return m.base + (m.index ? m.index[r] : r) * m.ld; }

#define INNER 512 /* rows of one chunk of an outer product: its strips stay in the second cache */

/* c[M, N] = a^T b for the n rows of a [n, M] and b [n, N]; columns from a0 of a. Zeros if there are no rows.
 * scratch: INNER * (M + MR + NR) floats, at most. */
static void outer(float *c, int64_t ldc, rows_t a, int64_t a0, int64_t M, rows_t b, int64_t N, int64_t n,
                  float *scratch)
{
    if (n == 0)
        for (int64_t i = 0; i < M; i++)
            memset(c + i * ldc, 0, N * sizeof(float));
    float *left = scratch, *right = scratch + INNER * (M + MR);
    for (int64_t r0 = 0; r0 < n; r0 += INNER) {
        int64_t K = least(INNER, n - r0);
        for (int64_t k = 0; k < K; k++) { /* strips [K, MR] of a, one after the other */
            const float *from = row(a, r0 + k) + a0;
            float *to = left + k * MR;
            int64_t i = 0;
            for (; i + MR <= M; i += MR, to += K * MR)
                memcpy(to, from + i, MR * sizeof(float));
            if (i < M)
                memcpy(to, from + i, (M - i) * sizeof(float));
        }
        for (int64_t j = 0; j < N; j += NR) {
            int64_t w = least(NR, N - j);
            float *to = right;
            for (int64_t k = 0; k < K; k++, to += NR) {
                const float *from = row(b, r0 + k) + j;
                if (w == NR) {
                    v_store(to, v_load(from));
                    v_store(to + VW, v_load(from + VW));
                } else {
                    v_store(to, v_load_n(from, least(w, VW)));
                    v_store(to + VW, v_load_n(from + VW, most(w - VW, 0)));
                }
            }
            for (int64_t i = 0; i < M; i += MR)
                tile(least(MR, M - i), w, K, left + i * K, 1, MR, right, NR, c + i * ldc + j, ldc, r0 > 0);
        }
    }
}

#endif
