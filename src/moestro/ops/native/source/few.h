/* Experts on few tokens: the weights are read once, as fast as memory gives them.
 *
 * With a handful of tokens every weight meets one or two numbers, so all time is reading. Each thread owns a contiguous
 * part of the rows of every matrix and walks through it front to back, asking early for the first bytes of the part
 * that comes next. Results do not depend on the number of threads: a row's dot product is the same whichever thread
 * takes it, and outputs are summed in the order of the choices.
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

/* choice: the `count` places in [T, K] that have an expert. hidden [count, 2, whole F], x [T, whole D], part [D]. */
typedef struct {
    int64_t count, *choice;
    const float *x;
    float *hidden, *part;
} few_scratch;

INLINE int64_t whole(int64_t n) { return blocks_of(n) * BLOCK; }

/* Rows f0.. of the first matrix of the i-th choice's expert; beyond the last choice, what is read after them all. */
INLINE matrix few_first(int kind, const few_problem *p, const few_scratch *s, int64_t i, int64_t f0, int64_t d0)
{
    if (i == s->count)
        return rows_from(kind, p->down, p->expert[s->choice[0]] * p->D + d0, p->F);
    return rows_from(kind, p->first, p->expert[s->choice[i]] * (p->gated ? 2 : 1) * p->F + f0, p->D);
}

/* Hidden values f0..f1 of all choices. */
INLINE void few_hidden(int kind, const few_problem *p, const few_scratch *s, int64_t f0, int64_t f1, int64_t d0)
{
    const int64_t wide = whole(p->F), n = f1 - f0;
    if (s->count)
        begin(kind, few_first(kind, p, s, 0, f0, d0));
    for (int64_t i = 0; i < s->count; i++) {
        const float *x = s->x + s->choice[i] / p->K * (kind >= KIND_INT8 ? whole(p->D) : p->D);
        float *g = s->hidden + i * 2 * wide + f0, *u = g + wide;
        matrix gate = few_first(kind, p, s, i, f0, d0), up = rows_from(kind, gate, p->F, p->D);
        const matrix next = few_first(kind, p, s, i + 1, f0, d0);
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

/* Outputs d0..d1 of all tokens. */
INLINE void few_output(int kind, const few_problem *p, const few_scratch *s, float *y, int64_t d0, int64_t d1)
{
    const int64_t wide = whole(p->F), n = d1 - d0;
    for (int64_t t = 0; t < p->T; t++)
        for (int64_t d = d0; d < d1; d++)
            y[t * p->D + d] = 0.0f;
    for (int64_t i = 0; i < s->count; i++) {
        const int64_t c = s->choice[i], last = i + 1 == s->count;
        matrix m = rows_from(kind, p->down, p->expert[c] * p->D + d0, p->F);
        const matrix next = rows_from(kind, p->down, p->expert[s->choice[i + !last]] * p->D + d0, p->F);
        float *out = y + c / p->K * p->D + d0, *part = s->part + d0;
        dots(kind, m, n, p->F, s->hidden + i * 2 * wide, part, next);
        for (int64_t d = 0; d < n; d++)
            out[d] = __builtin_fmaf(p->weight[c], part[d], out[d]);
    }
}

/* y [T, D]. Returns 0, or 1 where there is no memory for what lies between. */
INLINE int few(int kind, const few_problem *p, float *y, int threads)
{
    const int64_t T = p->T, D = p->D, F = p->F, choices = T * p->K, wide = whole(F);
    const int padded = kind >= KIND_INT8 && whole(D) != D;
    const int64_t floats = choices * 2 * wide + D + (padded ? T * whole(D) : 0);
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
        float *copy = s.part + D;
        memset(copy, 0, (size_t)(4 * T * whole(D)));
        for (int64_t t = 0; t < T; t++)
            memcpy(copy + t * whole(D), p->x + t * D, (size_t)(4 * D));
        s.x = copy;
    }
#pragma omp parallel num_threads(threads)
    {
        const int64_t j = omp_get_thread_num(), n = omp_get_num_threads();
        const int64_t d0 = D * j / n, d1 = D * (j + 1) / n;
        few_hidden(kind, p, &s, F * j / n, F * (j + 1) / n, d0);
#pragma omp barrier
        few_output(kind, p, &s, y, d0, d1);
    }
    free(memory);
    return 0;
}

#endif
