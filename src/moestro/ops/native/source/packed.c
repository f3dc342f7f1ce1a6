/* Experts on few tokens with weights in bf16, or in blocks of int8 or int4; numbers and sums are fp32. */
#include "few.h"

/* As moestro_few_f32, with a kind (dots.h) and the scales of both matrices, NULL for bf16. -1: not a kind. */
int moestro_packed_few(int kind, float *y, const float *x, const int64_t *expert, const float *weight, const void *first,
                       const uint16_t *first_scale, const void *down, const uint16_t *down_scale, int64_t T, int64_t K,
                       int64_t E, int64_t D, int64_t F, int activation, int gated, int threads)
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
