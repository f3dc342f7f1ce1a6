/* Products of rows, sorted by expert, with one matrix per expert, and the gradients of such stacks of matrices, fp32. */
#include "gemm.h"

#define CHUNK 384 /* most rows of one task */
#define WIDE 252  /* most columns of a gradient in one task: a multiple of MR, its strips stay in the second cache */

int omp_get_thread_num(void);

/* Room that a call needs: floats of scratch per thread, and numbers of tasks, for R rows, E experts, K x N matrices. */
void moestro_grouped_sizes(int64_t R, int64_t E, int64_t K, int64_t N, int64_t *sizes)
{
    sizes[0] = most(K * NR, INNER * (least(K, WIDE) + MR + NR)) + 32;
    sizes[1] = 3 * most(E + R / (4 * MR) + 1, E * (K / (4 * MR) + 2));
}

/* out[r, N] = rows[r, K] b[e] + bias[e] for offsets[e] <= r < offsets[e+1]; b[e] is [K, N], or [N, K] if turned. */
void moestro_grouped(float *out, const float *rows, const float *b, int turned, const float *bias,
                     const int64_t *offsets, int64_t E, int64_t K, int64_t N, float *scratch, int64_t scratch_size,
                     int64_t *tasks, int threads)
{
    int64_t n = 0, size = (offsets[E] - offsets[0]) / (4 * threads) / MR * MR;
    size = most(4 * MR, least(CHUNK, size));
    for (int64_t e = 0; e < E; e++)
        for (int64_t r = offsets[e]; r < offsets[e + 1]; r += size, n++) {
            int64_t *to = tasks + 3 * n;
            to[0] = e, to[1] = r, to[2] = least(size, offsets[e + 1] - r);
        }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t i = 0; i < n; i++) {
        int64_t e = tasks[3 * i], r = tasks[3 * i + 1], m = tasks[3 * i + 2];
        float *own = scratch + omp_get_thread_num() * scratch_size, *to = out + r * N;
        product(to, N, rows + r * K, K, b + e * K * N, turned ? K : N, turned, m, N, K, 0, own);
        if (bias)
            for (int64_t k = 0; k < m; k++)
                for (int64_t j = 0; j < N; j++)
                    to[k * N + j] += bias[e * N + j];
    }
}

/* out[e, M, N] = sum over the rows of e of a[r, M]^T b[r, N]; zeros for experts without rows. */
void moestro_grouped_outer(float *out, const float *a, const float *b, const int64_t *offsets, int64_t E, int64_t M,
                           int64_t N, float *scratch, int64_t scratch_size, int64_t *tasks, int threads)
{
    int64_t n = 0, size = E * M / (4 * threads) / MR * MR;
    size = most(4 * MR, least(WIDE / MR * MR, size));
    for (int64_t e = 0; e < E; e++)
        for (int64_t c = 0; c < M; c += size, n++) {
            int64_t *to = tasks + 3 * n;
            to[0] = e, to[1] = c, to[2] = least(size, M - c);
        }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t i = 0; i < n; i++) {
        int64_t e = tasks[3 * i], c = tasks[3 * i + 1], m = tasks[3 * i + 2], r = offsets[e];
        rows_t left = {a + r * M, 0, M}, right = {b + r * N, 0, N};
        outer(out + (e * M + c) * N, N, left, c, m, right, N, offsets[e + 1] - r,
              scratch + omp_get_thread_num() * scratch_size);
    }
}
