/* What a decoded token meets besides experts, fp32: products with few rows, norms, attention of one query.
 *
 * With one token every weight meets one number, so the time of a product is that of reading its matrix; the library's
 * own product of one row reaches a third of that speed. Everything else is small, and a call of C costs less than the
 * dozen tensor operations that it stands for. No result depends on the number of threads.
 */
#include <math.h>
#include <omp.h>

#include "dots.h"
#include "gemm.h"

#define BYTES 4096       /* bytes asked for ahead of the row that is worked on */
#define WORTH 65536      /* floats to be read from which a second thread is worth waking */

/* y [T, all] = x [T, I] w^T + b for the rows first .. last of w [all, I], one token: a row after the other, with those
 * of `next` asked for behind the end of w. */
static void one_token(float *y, const float *x, const float *w, const float *b, int64_t I, int64_t all, int64_t first,
                      int64_t last, const char *next)
{
    const float *row = w + first * I;
    const char *end = (const char *)(w + all * I);
    for (int64_t r = first; r < last; r++, row += I) {
        const char *ahead = (const char *)row + BYTES;
        if (ahead >= end)
            ahead = (next ? next : end) + (ahead - end);
        y[r] = dot_f32(row, x, I, ahead) + (b ? b[r] : 0.0f);
    }
}

/* The same of some tokens: they come in equal groups, so that the sums of each fit the registers, and meet some rows of
 * w at a time, so that w comes from memory once. */
static void some_tokens(float *y, const float *x, const float *w, const float *b, int64_t T, int64_t I, int64_t all,
                        int64_t first, int64_t last)
{
    int64_t groups = (T + FEW - 1) / FEW, each = (T + groups - 1) / groups;
    for (int64_t r = first; r < last; r += NR) {
        int64_t n = least(NR, last - r);
        for (int64_t t = 0; t < T; t += each)
            few_rows(y + t * all + r, all, x + t * I, I, w + r * I, I, least(each, T - t), n, I);
        if (b)
            for (int64_t t = 0; t < T; t++)
                for (int64_t i = r; i < r + n; i++)
                    y[t * all + i] += b[i];
    }
}

/* y_i [T, rows_i] = x [T, I] w_i^T + b_i for up to three matrices w_i [rows_i, I]; b_i may be NULL. */
void moestro_linears(const float *x, int64_t T, int64_t I, float *y0, const float *w0, const float *b0, int64_t rows0,
                     float *y1, const float *w1, const float *b1, int64_t rows1, float *y2, const float *w2,
                     const float *b2, int64_t rows2, int threads)
{
    float *y[3] = {y0, y1, y2};
    const float *w[3] = {w0, w1, w2}, *b[3] = {b0, b1, b2};
    int64_t rows[3] = {rows0, rows1, rows2}, all = rows0 + rows1 + rows2;
#pragma omp parallel num_threads(threads) if (all * I >= WORTH)
    {
        int64_t j = omp_get_thread_num(), n = omp_get_num_threads();
        int64_t from = all * j / n, to = all * (j + 1) / n;
        for (int m = 0; m < 3; m++) {
            int64_t first = most(from, 0), last = least(to, rows[m]);
            if (T == 1)
                one_token(y[m], x, w[m], b[m], I, rows[m], first, last, m < 2 ? (const char *)w[m + 1] : NULL);
            else
                some_tokens(y[m], x, w[m], b[m], T, I, rows[m], first, last);
            from -= rows[m];
            to -= rows[m];
        }
    }
}

/* y [D] = x / sqrt(mean(x^2) + eps) * weight */
static void normed(float *y, const float *x, const float *weight, int64_t D, float eps)
{
    vf scale = v_set(1.0f / sqrtf(dot_f32(x, x, D, (const char *)x) / (float)D + eps));
    for (int64_t i = 0; i < D; i += VW) {
        int64_t m = D - i < VW ? D - i : VW;
        v_store_n(y + i, v_load_n(x + i, m) * scale * v_load_n(weight + i, m), m);
    }
}

/* The same of the rows of x [T, D]. */
void moestro_rms_norm(float *y, const float *x, const float *weight, int64_t T, int64_t D, float eps)
{
    for (int64_t t = 0; t < T; t++)
        normed(y + t * D, x + t * D, weight, D, eps);
}

/* The first 2 * half of d numbers, turned in pairs (i, i + half), or (2i, 2i + 1) where interleaved; the rest as is. */
static void turned(float *out, const float *x, const float *cosine, const float *sine, int64_t d, int64_t half,
                   int interleaved)
{
    int64_t step = interleaved ? 2 : 1, other = interleaved ? 1 : half;
    for (int64_t i = 0; i < half; i++) {
        float a = x[i * step], b = x[i * step + other];
        out[i * step] = a * cosine[i] - b * sine[i];
        out[i * step + other] = b * cosine[i] + a * sine[i];
    }
    for (int64_t i = 2 * half; i < d; i++)
        out[i] = x[i];
}

/* One head of one query: y [d] = softmax(scale q K^T) V over keys, values [n, d]. score holds n floats. */
static void attend(float *y, const float *q, const float *key, const float *value, int64_t n, int64_t d, float scale,
                   float *score)
{
    float most = -INFINITY, sum = 0.0f;
    for (int64_t i = 0; i < n; i++) {
        score[i] = scale * dot_f32(q, key + i * d, d, (const char *)(key + (i + 4) * d));
        most = score[i] > most ? score[i] : most;
    }
    for (int64_t i = 0; i < n; i += VW) {
        int64_t m = n - i < VW ? n - i : VW;
        v_store_n(score + i, v_exp(v_load_n(score + i, m) - v_set(most)), m);
    }
    for (int64_t i = 0; i < n; i++)
        sum += score[i];
    for (int64_t c = 0; c < d; c += 4 * VW) {
        vf part[4];
        int64_t left = d - c;
        for (int a = 0; a < 4; a++)
            part[a] = v_set(0.0f);
        if (left >= 4 * VW) {
            for (int64_t i = 0; i < n; i++)
                for (int a = 0; a < 4; a++)
                    part[a] = v_fma(v_set(score[i]), v_load(value + i * d + c + a * VW), part[a]);
        } else {
            for (int64_t i = 0; i < n; i++)
                for (int a = 0; a * VW < left; a++) {
                    int64_t m = left - a * VW < VW ? left - a * VW : VW;
                    part[a] = v_fma(v_set(score[i]), v_load_n(value + i * d + c + a * VW, m), part[a]);
                }
        }
        for (int a = 0; a < 4 && a * VW < left; a++)
            v_store_n(y + c + a * VW, part[a] / v_set(sum), left - a * VW < VW ? left - a * VW : VW);
    }
}

/* One token per sequence: norms the heads of q [B, H, d] and k [B, G, d] where weights [d] are given, turns them,
 * writes k and v to place `held` of the caches [B, G, size, d], and attends from place `from` to it. frequency [half]
 * or NULL (no rotation). Needs scratch for B * H * (d + held + 1) + 2 * half + d floats. */
void moestro_attend_one(float *y, const float *q, const float *k, const float *v, float *key, float *value, int64_t B,
                        int64_t H, int64_t G, int64_t d, int64_t size, int64_t held, int64_t from,
                        const float *q_norm, const float *k_norm, float eps, const float *frequency, int64_t half,
                        float factor, int64_t position, int interleaved, float scale, float *scratch, int threads)
{
    float *cosine = scratch, *sine = scratch + half, *head = sine + half, *own = head + d;
    int64_t n = held + 1 - from, room = d + held + 1;
    if (!frequency)
        half = 0;
    for (int64_t i = 0; i < half; i++) {
        float angle = (float)position * frequency[i];
        cosine[i] = cosf(angle) * factor;
        sine[i] = sinf(angle) * factor;
    }
    for (int64_t g = 0; g < B * G; g++) {
        const float *plain = k + g * d;
        if (k_norm) {
            normed(head, plain, k_norm, d, eps);
            plain = head;
        }
        turned(key + (g * size + held) * d, plain, cosine, sine, d, half, interleaved);
        for (int64_t i = 0; i < d; i++)
            value[(g * size + held) * d + i] = v[g * d + i];
    }
#pragma omp parallel for num_threads(threads) if (B * G * n * d * 2 >= WORTH)
    for (int64_t h = 0; h < B * H; h++) {
        int64_t g = h / H * G + h % H / (H / G);
        float *turn = own + h * room;
        const float *plain = q + h * d;
        if (q_norm) { /* into the output, which is written last */
            normed(y + h * d, plain, q_norm, d, eps);
            plain = y + h * d;
        }
        turned(turn, plain, cosine, sine, d, half, interleaved);
        attend(y + h * d, turn, key + (g * size + from) * d, value + (g * size + from) * d, n, d, scale, turn + d);
    }
}

/* activation and weights, as callers pass them */
enum { SOFTMAX = 0, SIGMOID = 1, IDENTITY = 2 };
enum { RAW = 0, RENORMALISED = 1, KEPT = 2 };

/* to [n] = softmax of from [n]; they may be the same. */
static void softmax(float *to, const float *from, int64_t n)
{
    float most = -INFINITY, sum = 0.0f;
    for (int64_t i = 0; i < n; i++)
        most = from[i] > most ? from[i] : most;
    for (int64_t i = 0; i < n; i += VW) {
        int64_t m = n - i < VW ? n - i : VW;
        v_store_n(to + i, v_exp(v_load_n(from + i, m) - v_set(most)), m);
    }
    for (int64_t i = 0; i < n; i++)
        sum += to[i];
    for (int64_t i = 0; i < n; i++)
        to[i] /= sum;
}

/* A linear router on few tokens x [T, D]: logits, probs [T, E] of w [E, D] and b [E] or NULL; expert, weight [T, K] of
 * the K highest probs, equal ones by lower index. Returns 1 where a prob is NaN, and then choices mean nothing. */
int moestro_route(const float *x, const float *w, const float *b, float *logits, float *probs, int64_t *expert,
                  float *weight, int64_t T, int64_t D, int64_t E, int64_t K, int activation, int weigh, float scale)
{
    for (int64_t t = 0; t < T; t++, x += D, logits += E, probs += E, expert += K, weight += K) {
        for (int64_t e = 0; e < E; e++)
            logits[e] = dot_f32(w + e * D, x, D, (const char *)(w + e * D) + BYTES) + (b ? b[e] : 0.0f);
        if (activation == SOFTMAX)
            softmax(probs, logits, E);
        else
            for (int64_t e = 0; e < E; e += VW) {
                int64_t m = E - e < VW ? E - e : VW;
                vf l = v_load_n(logits + e, m);
                v_store_n(probs + e, activation == SIGMOID ? v_sigmoid(l) : l, m);
            }
        float last = INFINITY, sum = 0.0f;
        int64_t place = -1;
        for (int64_t e = 0; e < E; e++)
            if (probs[e] != probs[e])
                return 1;
        for (int64_t k = 0; k < K; k++) {
            int64_t best = -1; /* the highest of those that come after the last one taken */
            for (int64_t e = 0; e < E; e++)
                if ((probs[e] < last || (probs[e] == last && e > place)) && (best < 0 || probs[e] > probs[best]))
                    best = e;
            expert[k] = place = best;
            last = probs[best];
            weight[k] = weigh == KEPT ? logits[best] : last;
            sum += weight[k];
        }
        if (weigh == KEPT)
            softmax(weight, weight, K);
        sum = sum > 1.17549435e-38f ? sum : 1.17549435e-38f; /* the least normal number */
        for (int64_t k = 0; k < K; k++)
            weight[k] = (weigh == RENORMALISED ? weight[k] / sum : weight[k]) * scale;
    }
    return 0;
}
