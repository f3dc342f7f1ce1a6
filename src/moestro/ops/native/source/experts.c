/* Routed experts, forward and backward, fp32: gather, first product, activation, second product, weighted combine.
 *
 * Rows are sorted by expert. Work is cut into tasks (some rows of one expert; some columns of one expert's gradient)
 * that threads take one after the other. What a task computes does not depend on who takes it.
 */
#include "experts.h"
#include "gemm.h"

/* How long a problem is, so that whoever fills one can be checked. */
int64_t moestro_experts_problem(void) { return sizeof(problem_t); }

/* Room that a call needs: floats of scratch per thread, and numbers of tasks. */
void moestro_experts_sizes(const problem_t *p, int backward, int64_t *sizes)
{
    int64_t G = p->gated ? 2 : 1, D = p->D, F = p->F, wide = most(D, G * F);
    int64_t carried = BLOCK * (G * F + most(D, F)) + wide * NR, summed = INNER * (least(wide, WIDE) + MR + NR);
    int64_t most_tasks = p->E + p->R / BLOCK + 1;
    if (backward) {
        carried = BLOCK * (F + D) + wide * NR;
        most_tasks += p->E * (2 + (G * F + most(D, F)) / (4 * MR));
    }
    sizes[0] = (backward ? most(carried, summed) : carried) + 32;
    sizes[1] = 4 * most_tasks;
}

/* The rows r .. r+m of x or of the gradient: as they lie, or gathered into `to`. */
static const float *gathered(const float *from, const int64_t *unit, int64_t r, int64_t m, int64_t D, float *to)
{
    if (!unit)
        return from + r * D;
    for (int64_t i = 0; i < m; i++)
        memcpy(to + i * D, from + unit[r + i] * D, D * sizeof(float));
    return to;
}

static void add_bias(float *rows, int64_t ld, const float *bias, int64_t m, int64_t n)
{
    if (bias)
        for (int64_t i = 0; i < m; i++)
            for (int64_t j = 0; j < n; j++)
                rows[i * ld + j] += bias[j];
}

INLINE void activate_rows(const int activation, const int gated, float *h, const float *pre, int64_t ld, int64_t m,
                          int64_t F)
{
    for (int64_t i = 0; i < m; i++)
        for (int64_t f = 0; f < F; f += VW) {
            int64_t n = least(VW, F - f);
            vf a = v_activate(v_load_n(pre + i * ld + f, n), activation);
            if (gated)
                a *= v_load_n(pre + i * ld + F + f, n);
            v_store_n(h + i * F + f, a, n);
        }
}

static void activate(int activation, int gated, float *h, const float *pre, int64_t ld, int64_t m, int64_t F)
{
#define CASE(A)                                                                                                        \
    case A:                                                                                                            \
        if (gated)                                                                                                     \
            activate_rows(A, 1, h, pre, ld, m, F);                                                                     \
        else                                                                                                           \
            activate_rows(A, 0, h, pre, ld, m, F);                                                                     \
        break;
    switch (activation) {
        CASE(ACT_SILU)
        CASE(ACT_GELU)
        CASE(ACT_GELU_TANH)
        CASE(ACT_RELU)
        CASE(ACT_RELU2)
        CASE(ACT_LEAKY_RELU)
    }
#undef CASE
}

/* Rows r .. r+m of one expert: from x to `out`, keeping the values before the activation if they are wanted. */
static void forward_task(const problem_t *p, int64_t e, int64_t r, int64_t m, float *scratch)
{
    expert_t w = expert(p, e);
    int64_t G = p->gated ? 2 : 1, D = p->D, F = w.F, ld = G * p->F;
    float *pre = scratch, *x = pre + BLOCK * ld, *h = x, *column = x + BLOCK * most(D, F);
    for (int64_t i = 0; i < m; i += BLOCK) {
        int64_t n = least(BLOCK, m - i);
        const float *in = gathered(p->x, p->unit, r + i, n, D, x);
        float *to = p->hidden ? p->hidden + (r + i) * ld : pre;
        product(to, ld, in, D, w.first, D, 1, n, G * F, D, p->ordered, column);
        add_bias(to, ld, w.first_bias, n, F);
        activate(p->activation, p->gated, h, to, ld, n, F);
        product(p->out + (r + i) * D, D, h, F, w.down, w.down_ld, w.turned, n, D, F, p->ordered, column);
        add_bias(p->out + (r + i) * D, D, w.down_bias, n, D);
    }
}

/* y[t] = sum over k of weight[t, k] rows[inverse[t, k]], in this order; weight 0 = 1. */
static void combine_unit(const problem_t *p, float *y, const float *rows, const float *weight, int64_t t)
{
    int64_t D = p->D;
    y += t * D;
    for (int64_t d = 0; d < D; d += 4 * VW) {
        vf sum[4] = {v_set(0), v_set(0), v_set(0), v_set(0)};
        int64_t left = D - d;
        for (int64_t k = 0; k < p->K; k++) {
            int64_t r = p->inverse[t * p->K + k];
            if (r < 0)
                continue;
            vf w = v_set(weight ? weight[t * p->K + k] : 1.0f);
            const float *from = rows + r * D + d;
            if (left >= 4 * VW)
                for (int i = 0; i < 4; i++)
                    sum[i] = v_fma(w, v_load(from + i * VW), sum[i]);
            else
                for (int i = 0; i * VW < left; i++)
                    sum[i] = v_fma(w, v_load_n(from + i * VW, least(VW, left - i * VW)), sum[i]);
        }
        for (int i = 0; i < 4 && i * VW < left; i++)
            v_store_n(y + d + i * VW, sum[i], least(VW, left - i * VW));
    }
}

/* Rows of all experts in pieces, whole pieces first, so that the last ones to be taken are small. */
static int64_t row_tasks(const problem_t *p)
{
    int64_t size = p->R / (4 * p->threads) / BLOCK * BLOCK, n = 0, *to = p->tasks;
    size = most(BLOCK, least(CHUNK, size));
    for (int whole = 1; whole >= 0; whole--)
        for (int64_t e = 0; e < p->E; e++) {
            int64_t start = p->offsets[e], end = p->offsets[e + 1], full = start + (end - start) / size * size;
            int64_t r = whole ? start : full, stop = whole ? full : end;
            for (; r < stop; r += size, n++, to += 4)
                to[0] = e, to[1] = r, to[2] = least(size, stop - r), to[3] = 0;
        }
    return n;
}

/* Columns of all gradients in pieces of about equal work. */
static int64_t column_tasks(const problem_t *p, int64_t *to)
{
    int64_t G = p->gated ? 2 : 1, n = 0;
    double all = 0;
    for (int64_t e = 0; e < p->E; e++)
        all += (double)(p->offsets[e + 1] - p->offsets[e] + 8) * p->F * p->D * (G + 1);
    for (int64_t e = 0; e < p->E; e++) {
        expert_t w = expert(p, e);
        if (w.place < 0)
            continue;
        for (int kind = 1; kind <= 2; kind++) {
            if (kind == 1 ? !p->d_first && !p->d_first_bias : !p->d_down && !p->d_down_bias)
                continue;
            int64_t N = kind == 1 || !w.turned ? p->D : w.F, M = kind == 1 ? G * w.F : w.turned ? p->D : w.F;
            double each = (double)(p->offsets[e + 1] - p->offsets[e] + 8) * N;
            int64_t size = (int64_t)(all / (4 * p->threads) / each) / MR * MR;
            size = most(4 * MR, least(WIDE / MR * MR, size));
            for (int64_t c = 0; c < M; c += size, n++, to += 4)
                to[0] = e, to[1] = c, to[2] = least(size, M - c), to[3] = kind;
        }
    }
    return n;
}

int omp_get_thread_num(void);

void moestro_experts_forward(const problem_t *p)
{
    int64_t num_tasks = row_tasks(p);
#pragma omp parallel num_threads(p->threads)
    {
        float *scratch = p->scratch + omp_get_thread_num() * p->scratch_size;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < num_tasks; i++)
            forward_task(p, p->tasks[4 * i], p->tasks[4 * i + 1], p->tasks[4 * i + 2], scratch);
        if (p->y) {
#pragma omp for schedule(static)
            for (int64_t t = 0; t < p->T; t++)
                combine_unit(p, p->y, p->out, p->weight, t);
        }
    }
}

/* a = act(x), slope = act'(x) */
INLINE void act_and_slope(const int activation, vf x, vf *a, vf *slope)
{
    vf one = v_set(1);
    switch (activation) {
    case ACT_SILU: {
        vf s = v_sigmoid(x);
        *a = x * s;
        *slope = s * v_fma(x, one - s, one);
        break;
    }
    case ACT_GELU: {
        vf cdf = v_normal(x);
        *a = x * cdf;
        *slope = v_fma(x * v_set(0.398942280f), v_exp(v_set(-0.5f) * x * x), cdf);
        break;
    }
    case ACT_GELU_TANH: { /* x s(v), v = 2 sqrt(2 / pi) (x + 0.044715 x^3) */
        vf z = x * x, v = x * v_fma(z, v_set(0.0713548163f), v_set(1.59576912f)), s = v_sigmoid(v);
        *a = x * s;
        *slope = v_fma(s * (one - s), x * v_fma(z, v_set(0.214064449f), v_set(1.59576912f)), s);
        break;
    }
    case ACT_RELU:
        *a = v_max(v_set(0), x);
        *slope = v_pick(x > 0.0f, one, v_set(0));
        break;
    case ACT_RELU2:
        x = v_max(v_set(0), x);
        *a = x * x;
        *slope = x + x;
        break;
    default:
        *a = v_max(v_set(LEAK) * x, x);
        *slope = v_pick(x > 0.0f, one, v_set(LEAK));
    }
}

/* One row: dh [F], the gradient of the hidden values without the combine weight, becomes d_pre [G F]; kept [F] = weight
 * times the hidden values; returns <dh, h>, the gradient of the weight. */
INLINE float back_row(const int activation, const int gated, const float *dh, const float *pre, float *d_pre,
                      float *kept, float weight, int64_t F)
{
    vf dot = v_set(0), w = v_set(weight);
    for (int64_t f = 0; f < F; f += VW) {
        int64_t n = least(VW, F - f);
        vf g = v_load_n(dh + f, n), a, slope;
        act_and_slope(activation, v_load_n(pre + f, n), &a, &slope);
        if (gated) {
            vf up = v_load_n(pre + F + f, n), h = a * up;
            dot = v_fma(g, h, dot);
            g *= w;
            v_store_n(kept + f, w * h, n);
            v_store_n(d_pre + F + f, g * a, n);
            v_store_n(d_pre + f, g * up * slope, n);
        } else {
            dot = v_fma(g, a, dot);
            g *= w;
            v_store_n(kept + f, w * a, n);
            v_store_n(d_pre + f, g * slope, n);
        }
    }
    return v_sum(dot);
}

static float back(int activation, int gated, const float *dh, const float *pre, float *d_pre, float *kept,
                  float weight, int64_t F)
{
#define CASE(A)                                                                                                        \
    case A:                                                                                                            \
        return gated ? back_row(A, 1, dh, pre, d_pre, kept, weight, F)                                                 \
                     : back_row(A, 0, dh, pre, d_pre, kept, weight, F);
    switch (activation) {
        CASE(ACT_SILU)
        CASE(ACT_GELU)
        CASE(ACT_GELU_TANH)
        CASE(ACT_RELU)
        CASE(ACT_RELU2)
        CASE(ACT_LEAKY_RELU)
    }
#undef CASE
    return 0;
}

static float dot(const float *a, const float *b, int64_t n)
{
    vf sum = v_set(0);
    for (int64_t i = 0; i < n; i += VW)
        sum = v_fma(v_load_n(a + i, least(VW, n - i)), v_load_n(b + i, least(VW, n - i)), sum);
    return v_sum(sum);
}

/* Rows r .. r+m of one expert: gradients of the values before the activation, of the rows and of the weights. */
static void rows_task(const problem_t *p, int64_t e, int64_t r, int64_t m, float *scratch)
{
    expert_t w = expert(p, e);
    int64_t G = p->gated ? 2 : 1, D = p->D, F = w.F, ld = G * p->F;
    float *dh = scratch, *g = dh + BLOCK * p->F, *column = g + BLOCK * D;
    for (int64_t i = 0; i < m; i += BLOCK) {
        int64_t n = least(BLOCK, m - i);
        const float *grad = gathered(p->grad, p->unit, r + i, n, D, g);
        float *d_pre = p->d_hidden + (r + i) * ld;
        product(dh, F, grad, D, w.down, w.down_ld, !w.turned, n, F, D, p->ordered, column);
        for (int64_t j = 0; j < n; j++) {
            int64_t at = r + i + j;
            float weight = p->weight ? p->weight[p->unit[at] * p->K + p->slot[at]] : 1.0f;
            float found = back(p->activation, p->gated, dh + j * F, p->hidden + at * ld, d_pre + j * ld,
                               p->kept + at * p->F, weight, F);
            if (p->d_weight)
                p->dots[at] = found + (w.down_bias ? dot(grad + j * D, w.down_bias, D) : 0.0f);
        }
        if (p->out)
            product(p->out + (r + i) * D, D, d_pre, ld, w.first, D, 0, n, D, G * F, p->ordered, column);
    }
}

/* Columns c .. c+m of the gradient of one expert's first (kind 1) or second (kind 2) matrix, and of its bias. */
static void columns_task(const problem_t *p, int64_t e, int64_t c, int64_t m, int64_t kind, float *scratch)
{
    expert_t w = expert(p, e);
    int64_t G = p->gated ? 2 : 1, D = p->D, F = w.F, ld = G * p->F, r = p->offsets[e], n = p->offsets[e + 1] - r;
    const int64_t *unit = p->unit ? p->unit + r : 0;
    rows_t x = {p->unit ? p->x : p->x + r * D, unit, D}, grad = {p->unit ? p->grad : p->grad + r * D, unit, D};
    rows_t pre = {p->d_hidden + r * ld, 0, ld}, kept = {p->kept + r * p->F, 0, p->F};
    if (kind == 1) {
        if (p->d_first)
            outer(p->d_first + (G * w.before + c) * D, D, pre, c, m, x, D, n, scratch);
        if (p->d_first_bias)
            for (int64_t i = 0; i < n; i++)
                for (int64_t j = c; j < c + m; j++) {
                    float *to = p->d_first_bias + w.place * F + j;
                    *to = (i ? *to : 0.0f) + pre.base[i * ld + j];
                }
        if (p->d_first_bias && !n)
            memset(p->d_first_bias + w.place * F + c, 0, m * sizeof(float));
        return;
    }
    if (!p->d_down)
        ;
    else if (w.turned)
        outer(p->d_down + w.before * D + c * F, F, grad, c, m, kept, F, n, scratch);
    else
        outer(p->d_down + (w.before + c) * D, D, kept, c, m, grad, D, n, scratch);
    if (p->d_down_bias) {
        float *to = p->d_down_bias + w.place * D;
        memset(to + c, 0, m * sizeof(float));
        for (int64_t i = 0; i < n; i++) {
            float weight = p->weight ? p->weight[unit[i] * p->K + p->slot[r + i]] : 1.0f;
            const float *from = row(grad, i);
            for (int64_t j = c; j < c + m; j++)
                to[j] += weight * from[j];
        }
    }
}

void moestro_experts_backward(const problem_t *p)
{
    int64_t num_rows = row_tasks(p), *columns = p->tasks + 4 * num_rows, num_columns = column_tasks(p, columns);
#pragma omp parallel num_threads(p->threads)
    {
        float *scratch = p->scratch + omp_get_thread_num() * p->scratch_size;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < num_rows; i++)
            rows_task(p, p->tasks[4 * i], p->tasks[4 * i + 1], p->tasks[4 * i + 2], scratch);
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t i = 0; i < num_columns; i++)
            columns_task(p, columns[4 * i], columns[4 * i + 1], columns[4 * i + 2], columns[4 * i + 3], scratch);
        if (p->d_x && p->unit) {
#pragma omp for schedule(static) nowait
            for (int64_t t = 0; t < p->T; t++)
                combine_unit(p, p->d_x, p->out, 0, t);
        }
        if (p->d_weight) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < p->T * p->K; i++)
                p->d_weight[i] = p->inverse[i] < 0 ? 0.0f : p->dots[p->inverse[i]];
        }
    }
}
