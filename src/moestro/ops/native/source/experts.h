/* What a call of the routed experts' kernels is given, and where the parameters of one expert lie in it. */
#ifndef MOESTRO_EXPERTS_H
#define MOESTRO_EXPERTS_H

#include <stdint.h>

typedef struct {
    /* activations: x [T, D]; unit [R] or 0 (then x is the rows); offsets [E+1] */
    const float *x;
    const int64_t *unit, *offsets;
    /* combine: weight, inverse [T, K], or 0 */
    const float *weight;
    const int64_t *inverse, *slot;
    /* parameters; widths [E] or 0. Equal widths: first [E, G F, D], down [E, D, F], G = 2 if gated, else 1.
       Unequal: blocks one after the other, first [sum G F_e, D], down turned: [sum F_e, D]. */
    const float *first, *down, *first_bias, *down_bias;
    const int64_t *widths;
    int64_t T, R, K, E, D, F;
    int activation, gated, ordered, threads; /* ordered: no row depends on the others to the last bit */
    /* results, 0 = not wanted. out [R, D] (scratch for a mixture), y [T, D], hidden [R, G F] */
    float *out, *y, *hidden;
    /* backward: grad [T, D], d_hidden [R, G F] and kept [R, F] are scratch, dots [R] too */
    const float *grad;
    float *d_hidden, *kept, *dots;
    float *d_x, *d_weight, *d_first, *d_down, *d_first_bias, *d_down_bias;
    /* scratch of every thread, floats */
    float *scratch;
    int64_t scratch_size;
    /* room for tasks, see `moestro_experts_sizes` */
    int64_t *tasks;
    /* where the gradient of expert e is written: at place[e] of d_first and the others; 0 = at e. Experts whose place
       is negative get none. */
    const int64_t *place;
} problem_t;

#define BLOCK 96   /* rows that are carried through all products together */
#define CHUNK 1024 /* most rows of one task */
#define WIDE 256   /* most columns of a gradient in one task: their strips stay in the second cache */

typedef struct {
    const float *first, *down, *first_bias, *down_bias;
    int64_t F, down_ld, before, place; /* before: widths of all experts before; place: of its gradient */
    int turned; /* how `down` lies as the matrix [F, D] of the second product: turned = as [D, F] */
} expert_t;

static expert_t expert(const problem_t *p, int64_t e)
{
    expert_t x = {.F = p->F, .turned = 1, .down_ld = p->F, .place = p->place ? p->place[e] : e};
    int64_t before = e * p->F, G = p->gated ? 2 : 1;
    if (p->widths) {
        before = 0;
        for (int64_t i = 0; i < e; i++)
            before += p->widths[i];
        x.F = p->widths[e];
        x.turned = 0;
        x.down_ld = p->D;
    }
    x.before = p->widths ? before : x.place * p->F;
    x.first = p->first + G * before * p->D;
    x.down = p->down + before * p->D;
    x.first_bias = p->first_bias ? p->first_bias + e * p->F : 0;
    x.down_bias = p->down_bias ? p->down_bias + e * p->D : 0;
    return x;
}

#endif
