/* Experts on few tokens: the weights are read once, as fast as memory gives them.
 *
 * With a handful of tokens every weight meets one or two numbers, so all time is reading. Each thread owns whole
 * experts, or where they do not come out even a contiguous part of the rows of every matrix, and walks through them
 * front to back, asking early for the first bytes of what comes next. Results do not depend on the number of threads: a
 * row's dot product is the same whichever thread takes it, and outputs are summed in the order of the choices.
 */
#ifndef MOESTRO_FEW_H
#define MOESTRO_FEW_H

#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "dots.h"

/* x [T, D]; expert, weight [T, K], ids outside 0..E-1 add nothing; first [E, F or 2F, D], the gate's rows first; down
 * [E, D, F]. */
typedef struct {
    const float *x;
    const int64_t *expert;
    const float *weight;
    matrix first, down;
    int64_t T, K, E, D, F;
    int activation, gated;
} few_problem;

/* choice: the `count` places in [T, K] that have an expert. hidden [count, 2, whole F], x [T, whole D], part [count, D]. */
typedef struct {
    int64_t count, *choice;
    const float *x;
    float *hidden, *part;
} few_scratch;

INLINE int64_t whole(int64_t n) { return blocks_of(n) * BLOCK; }

/* What one thread does: choices i0..i1, hidden values f0..f1, outputs d0..d1. */
typedef struct {
    int64_t i0, i1, f0, f1, d0, d1;
} few_part;

/* Rows f0.. of the first matrix of the i-th choice's expert; beyond the last choice, what is read after them all. */
INLINE matrix few_first(int kind, const few_problem *p, const few_scratch *s, int64_t i, few_part a)
{
    if (i == a.i1)
        return rows_from(kind, p->down, p->expert[s->choice[a.i0]] * p->D + a.d0, p->F);
    return rows_from(kind, p->first, p->expert[s->choice[i]] * (p->gated ? 2 : 1) * p->F + a.f0, p->D);
}

/* The part's hidden values. */
INLINE void few_hidden(int kind, const few_problem *p, const few_scratch *s, few_part a)
{
    const int64_t wide = whole(p->F), n = a.f1 - a.f0;
    if (a.i0 < a.i1)
        begin(kind, few_first(kind, p, s, a.i0, a));
    for (int64_t i = a.i0; i < a.i1; i++) {
        const float *x = s->x + s->choice[i] / p->K * (kind >= KIND_INT8 ? whole(p->D) : p->D);
        float *g = s->hidden + i * 2 * wide + a.f0, *u = g + wide;
        matrix gate = few_first(kind, p, s, i, a), up = rows_from(kind, gate, p->F, p->D);
        const matrix next = few_first(kind, p, s, i + 1, a);
        dots(kind, gate, n, p->D, x, g, p->gated ? up : next);
        if (p->gated)
            dots(kind, up, n, p->D, x, u, next);
        for (int64_t j = 0; j < n; j += VW) {
            int64_t m = n - j < VW ? n - j : VW;
            vf h = v_activate(v_load_n(g + j, m), p->activation);
            v_store_n(g + j, p->gated ? h * v_load_n(u + j, m) : h, m);
        }
    }
}

/* The part's outputs, one choice apart from the other. */
INLINE void few_output(int kind, const few_problem *p, const few_scratch *s, few_part a)
{
    for (int64_t i = a.i0; i < a.i1; i++) {
        const int64_t after = i + 1 < a.i1 ? i + 1 : i;
        const matrix m = rows_from(kind, p->down, p->expert[s->choice[i]] * p->D + a.d0, p->F);
        const matrix next = rows_from(kind, p->down, p->expert[s->choice[after]] * p->D + a.d0, p->F);
        dots(kind, m, a.d1 - a.d0, p->F, s->hidden + i * 2 * whole(p->F), s->part + i * p->D + a.d0, next);
    }
}

/* y [T, D]: the sum over each token's choices, in order. So little work that sharing it would cost more. */
INLINE void few_sum(const few_problem *p, const few_scratch *s, float *y)
{
    memset(y, 0, (size_t)(4 * p->T * p->D));
    for (int64_t i = 0; i < s->count; i++) {
        float *out = y + s->choice[i] / p->K * p->D, weight = p->weight[s->choice[i]];
        for (int64_t d = 0; d < p->D; d++)
            out[d] = __builtin_fmaf(weight, s->part[i * p->D + d], out[d]);
    }
}

/* y [T, D]. Returns 0, or 1 where there is no memory for what lies between. */
INLINE int few(int kind, const few_problem *p, float *y, int threads)
{
    const int64_t T = p->T, D = p->D, F = p->F, choices = T * p->K, wide = whole(F);
    const int padded = kind >= KIND_INT8 && whole(D) != D;
    const int64_t floats = choices * (2 * wide + D) + (padded ? T * whole(D) : 0);
    char *memory = aligned_alloc(64, (size_t)(4 * floats + 8 * choices + 127) / 64 * 64);
    if (!memory)
        return 1;
    few_scratch s = {.hidden = (float *)memory, .x = p->x};
    s.part = s.hidden + choices * 2 * wide;
    s.choice = (int64_t *)(memory + (4 * floats + 7) / 8 * 8);
    for (int64_t c = 0; c < choices; c++)
        if (p->expert[c] >= 0 && p->expert[c] < p->E)
            s.choice[s.count++] = c;
    if (wide != F) /* what pads a block must be a number, since it is multiplied */
        memset(s.hidden, 0, (size_t)(4 * s.count * 2 * wide));
    if (padded) {
        float *copy = s.part + choices * D;
        memset(copy, 0, (size_t)(4 * T * whole(D)));
        for (int64_t t = 0; t < T; t++)
            memcpy(copy + t * whole(D), p->x + t * D, (size_t)(4 * D));
        s.x = copy;
    }
#pragma omp parallel num_threads(threads)
    {
        const int64_t j = omp_get_thread_num(), n = omp_get_num_threads();
        if (s.count % n == 0) { /* whole experts each: longer stretches of memory, and nobody waits between */
            const few_part own = {s.count * j / n, s.count * (j + 1) / n, 0, F, 0, D};
            few_hidden(kind, p, &s, own);
            few_output(kind, p, &s, own);
        } else {
            const few_part own = {0, s.count, F * j / n, F * (j + 1) / n, D * j / n, D * (j + 1) / n};
            few_hidden(kind, p, &s, own);
#pragma omp barrier
            few_output(kind, p, &s, own);
        }
    }
    few_sum(p, &s, y);
    free(memory);
    return 0;
}

#endif
