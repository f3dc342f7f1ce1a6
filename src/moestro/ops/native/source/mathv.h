/* Vectors of floats and the functions of them that activations need.
 *
 * vf is as wide as the instruction set: 16 floats with AVX-512, 8 with AVX2. Relative errors are below 2e-7, of the
 * normal and complementary error functions 5e-7, where neither the result nor e^|x| leaves the normal numbers; NaN
 * stays NaN. Polynomials are minimax fits made for the ranges used here.
 */
#ifndef MOESTRO_MATHV_H
#define MOESTRO_MATHV_H

#include <immintrin.h>
#include <stdint.h>

#ifdef __AVX512F__
#define VW 16
#else
#define VW 8
#endif

typedef float vf __attribute__((vector_size(4 * VW)));
typedef int32_t vi __attribute__((vector_size(4 * VW)));

#ifdef __AVX512F__

static inline vf v_set(float x) { return (vf)_mm512_set1_ps(x); }
static inline vf v_load(const float *p) { return (vf)_mm512_loadu_ps(p); }
static inline void v_store(float *p, vf x) { _mm512_storeu_ps(p, (__m512)x); }
static inline vf v_fma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
/* Of a NaN and a number both return the second operand. */
static inline vf v_min(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
static inline vf v_max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
static inline vf v_round(vf x) { return (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT); }
static inline vf v_scale2(vf x, vf n) { return (vf)_mm512_scalef_ps((__m512)x, (__m512)n); }
/* a where m, else b; m is a comparison's result. */
static inline vf v_pick(vi m, vf a, vf b)
{
    return (vf)_mm512_mask_blend_ps(_mm512_movepi32_mask((__m512i)m), (__m512)b, (__m512)a);
}
/* The first n floats, zeros after them; nothing behind them is touched. 0 <= n <= VW. */
static inline vf v_load_n(const float *p, int64_t n)
{
    return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
}
static inline void v_store_n(float *p, vf x, int64_t n)
{
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)x);
}
static inline float v_sum(vf x)
{
    __m256 a = _mm256_add_ps(_mm512_castps512_ps256((__m512)x),
                             _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)x), 1)));
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}

#else

static inline vf v_set(float x) { return (vf)_mm256_set1_ps(x); }
static inline vf v_load(const float *p) { return (vf)_mm256_loadu_ps(p); }
static inline void v_store(float *p, vf x) { _mm256_storeu_ps(p, (__m256)x); }
static inline vf v_fma(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
static inline vf v_min(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
static inline vf v_max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
static inline vf v_round(vf x)
{
    return (vf)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
/* x * 2^n for |n| <= 252: 2^n in two factors, neither of which leaves the normal numbers. */
static inline vf v_scale2(vf x, vf n)
{
    __m256i i = _mm256_cvtps_epi32((__m256)n), h = _mm256_srai_epi32(i, 1);
    __m256i a = _mm256_slli_epi32(_mm256_add_epi32(h, _mm256_set1_epi32(127)), 23);
    __m256i b = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(i, h), _mm256_set1_epi32(127)), 23);
    return x * (vf)_mm256_castsi256_ps(a) * (vf)_mm256_castsi256_ps(b);
}
static inline vf v_pick(vi m, vf a, vf b)
{
    return (vf)_mm256_blendv_ps((__m256)b, (__m256)a, _mm256_castsi256_ps((__m256i)m));
}
static inline __m256i v_first(int64_t n)
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline vf v_load_n(const float *p, int64_t n) { return (vf)_mm256_maskload_ps(p, v_first(n)); }
static inline void v_store_n(float *p, vf x, int64_t n) { _mm256_maskstore_ps(p, v_first(n), (__m256)x); }
static inline float v_sum(vf x)
{
    __m128 b = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}

#endif

static inline vf v_abs(vf x) { return (vf)((vi)x & 0x7fffffff); }
/* |x| with the sign of s. */
static inline vf v_signed(vf x, vf s) { return (vf)(((vi)x & 0x7fffffff) | ((vi)s & (vi)v_set(-0.0f))); }

/* e^x: x = n ln 2 + r with |r| <= ln 2 / 2, then 1 + r + r^2 p(r). */
static inline vf v_exp(vf x)
{
    x = v_max(v_set(-104.0f), v_min(v_set(89.0f), x));
    vf n = v_round(x * v_set(1.44269504f));
    vf r = v_fma(n, v_set(-0.693145752f), x);
    r = v_fma(n, v_set(-1.42860677e-6f), r);
    vf p = v_fma(v_set(1.390128346e-03f), r, v_set(8.363146339e-03f));
    p = v_fma(p, r, v_set(4.166685347e-02f));
    p = v_fma(p, r, v_set(1.666657728e-01f));
    p = v_fma(p, r, v_set(0.5f));
    return v_scale2(v_fma(p, r * r, r) + v_set(1.0f), n);
}

/* 1 / (1 + e^-x) */
static inline vf v_sigmoid(vf x) { return v_set(1.0f) / (v_set(1.0f) + v_exp(-x)); }

/* Small x: x + x^3 p(x^2), which keeps all digits; else 1 - 2 / (e^2|x| + 1). */
static inline vf v_tanh(vf x)
{
    vf a = v_abs(x), z = x * x;
    vf p = v_fma(v_set(-6.269308313e-03f), z, v_set(2.111109481e-02f));
    p = v_fma(p, z, v_set(-5.387397933e-02f));
    p = v_fma(p, z, v_set(1.333291558e-01f));
    p = v_fma(p, z, v_set(-3.333333033e-01f));
    vf large = v_set(1.0f) - v_set(2.0f) / (v_exp(a + a) + v_set(1.0f));
    return v_pick(a < 0.6f, v_fma(p * z, x, x), v_signed(large, x));
}

/* erfc(a) e^a^2 for a >= 0: t p(t) with t = 1 / (1 + 0.4 a). */
static inline vf v_erfcx(vf a)
{
    vf t = v_set(1.0f) / v_fma(v_set(0.4f), a, v_set(1.0f));
    vf p = v_fma(v_set(-2.737107658e-02f), t, v_set(1.860077888e-01f));
    p = v_fma(p, t, v_set(-4.707653905e-01f));
    p = v_fma(p, t, v_set(5.103143603e-01f));
    p = v_fma(p, t, v_set(-2.537594496e-01f));
    p = v_fma(p, t, v_set(2.558007555e-01f));
    p = v_fma(p, t, v_set(1.352381846e-01f));
    p = v_fma(p, t, v_set(2.137436098e-01f));
    p = v_fma(p, t, v_set(2.250913654e-01f));
    p = v_fma(p, t, v_set(2.256998631e-01f));
    return p * t;
}

/* e^-(c a^2), the rounding error of a^2 put back. |a| <= 16 */
static inline vf v_bell(vf a, float c)
{
    vf s = a * a, lost = v_fma(a, a, -s), e = v_exp(s * v_set(-c));
    return v_fma(-e, lost * v_set(c), e);
}

/* erfc(a) for a >= 0 */
static inline vf v_erfc(vf a)
{
    a = v_min(v_set(11.0f), a);
    return v_bell(a, 1.0f) * v_erfcx(a);
}

/* |x| < 1: x + x p(x^2); else 1 - erfc. */
static inline vf v_erf(vf x)
{
    vf a = v_abs(x), z = x * x;
    vf p = v_fma(v_set(7.964416692e-05f), z, v_set(-8.037583386e-04f));
    p = v_fma(p, z, v_set(5.190598135e-03f));
    p = v_fma(p, z, v_set(-2.685444946e-02f));
    p = v_fma(p, z, v_set(1.128358324e-01f));
    p = v_fma(p, z, v_set(-3.761262364e-01f));
    p = v_fma(p, z, v_set(1.283791650e-01f));
    return v_pick(a < 1.0f, v_fma(p, x, x), v_signed(v_set(1.0f) - v_erfc(a), x));
}

/* The normal distribution function, with all digits in its lower tail too. */
static inline vf v_normal(vf x)
{
    vf a = v_min(v_set(16.0f), v_abs(x));
    vf half = v_set(0.5f) * v_bell(a, 0.5f) * v_erfcx(a * v_set(0.707106781f));
    return v_pick(x > 0.0f, v_set(1.0f) - half, half);
}

/* Numbers of the activations, as callers pass them. */
enum { ACT_SILU = 0, ACT_GELU = 1, ACT_GELU_TANH = 2, ACT_RELU = 3, ACT_RELU2 = 4, ACT_LEAKY_RELU = 5 };
#define LEAK 0.01f

/* The activation of x. A NaN stays one. */
static inline vf v_activate(vf x, int activation)
{
    switch (activation) {
    case ACT_SILU:
        return x / (v_set(1.0f) + v_exp(-x));
    case ACT_GELU:
        return x * v_normal(x);
    case ACT_GELU_TANH: /* x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3), which is x (1 + tanh u) / 2 */
        return x / (v_set(1.0f) + v_exp(x * v_fma(x * x, v_set(-0.0713548163f), v_set(-1.59576912f))));
    case ACT_RELU:
        return v_max(v_set(0.0f), x);
    case ACT_RELU2:
        x = v_max(v_set(0.0f), x);
        return x * x;
    default:
        return v_max(v_set(LEAK) * x, x);
    }
}

#endif
