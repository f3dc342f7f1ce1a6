/* One product whose rows do not depend on each other to the last bit. */
#include "gemm.h"

#define BLOCK 96

int omp_get_thread_num(void);

/* c[m, N] = a[m, K] b, b as [N, K] if turned, else as [K, N]. scratch: threads * K * NR floats, see the size below. */
void moestro_ordered(float *c, const float *a, const float *b, int turned, int64_t m, int64_t N, int64_t K,
                     float *scratch, int threads)
{
#pragma omp parallel num_threads(threads)
    {
        float *own = scratch + omp_get_thread_num() * K * NR;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < m; i += BLOCK)
            product(c + i * N, N, a + i * K, K, b, turned ? K : N, turned, least(BLOCK, m - i), N, K, 1, own);
    }
}

int64_t moestro_ordered_scratch(int64_t K) { return K * NR; }
