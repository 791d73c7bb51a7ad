// Vectors of floats on any CPU that g++ or clang++ know, and the functions that activations are made of.
// Errors against float64: 2e-7 relative for exp, 1.5e-7 absolute for the others.
#pragma once
#include <cstdint>
#include <cstring>
#include <cmath>

#if defined(__AVX512F__)
#define WIDTH 16
#else
#define WIDTH 8
#endif
typedef float vec __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * WIDTH), aligned(4)));

static inline vec all(float x) { return x - vec{}; }
static inline vec load(const float *p) { return *(const vec *)p; }  // memcpy would go by the stack
static inline void store(float *p, vec v) { *(vec *)p = v; }
static inline vec load_part(const float *p, int n) { vec v{}; memcpy(&v, p, 4 * n); return v; }
static inline void store_part(float *p, vec v, int n) { memcpy(p, &v, 4 * n); }
static inline ivec bits(vec v) { return (ivec)v; }
static inline vec pick(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }
static inline vec largest(vec a, vec b) { return pick(a > b, a, b); }
static inline vec smallest(vec a, vec b) { return pick(a < b, a, b); }
static inline vec absolute(vec x) { return (vec)(bits(x) & 0x7fffffff); }
static inline float sum(vec v) {
    typedef float half __attribute__((vector_size(2 * WIDTH)));
    typedef float quarter __attribute__((vector_size(WIDTH)));
    half h[2]; memcpy(h, &v, sizeof v);
    h[0] += h[1];
    quarter q[2]; memcpy(q, h, sizeof(half));
    q[0] += q[1];
    float s = 0;
    for (int i = 0; i < WIDTH / 4; i++) s += q[0][i];
    return s;
}
static inline ivec nearest(vec x) {  // for |x| < 2^22
    const vec magic = all(12582912.0f);
    return bits(x + magic) - bits(magic);
}

static inline vec f_exp(vec x) {
    const ivec bad = ~(x == x);
    vec z = smallest(largest(x, all(-87.3f)), all(88.3f));
    ivec n = nearest(z * 1.44269504f);
    vec k = __builtin_convertvector(n, vec);
    z = z - k * 0.693359375f + k * 2.12194440e-4f;
    vec p = all(1.9875691500e-4f);
    p = p * z + 1.3981999507e-3f;
    p = p * z + 8.3334519073e-3f;
    p = p * z + 4.1665795894e-2f;
    p = p * z + 1.6666665459e-1f;
    p = p * z + 5.0000001201e-1f;
    p = p * z * z + z + 1.0f;
    vec y = p * (vec)((n + 127) << 23);
    return pick(bad, x, y);
}
static inline vec f_sigmoid(vec x) {
    vec t = f_exp((vec)(bits(x) | (int32_t)0x80000000));  // exp(-|x|)
    vec s = 1.0f / (1.0f + t);
    return pick(x < 0.0f, t * s, s);
}
static inline vec f_tanh(vec x) {
    vec a = absolute(x);
    vec t = f_exp(a * -2.0f);
    vec big = (1.0f - t) / (1.0f + t), y = a * a;
    vec small = all(-5.70498872745e-3f);  // Cephes, below 0.625
    small = small * y + 2.06390887954e-2f;
    small = small * y - 5.37397155531e-2f;
    small = small * y + 1.33314422036e-1f;
    small = small * y - 3.33332819422e-1f;
    small = small * y * a + a;
    vec r = pick(a < 0.625f, small, big);
    return (vec)(bits(r) | (bits(x) & (int32_t)0x80000000));
}
static inline vec f_normal_pdf(vec x) { return f_exp(x * x * -0.5f) * 0.3989422804f; }
static inline vec f_normal_cdf(vec x) {  // Abramowitz and Stegun 7.1.26
    vec z = absolute(x) * 0.70710678118f;
    vec t = 1.0f / (1.0f + 0.3275911f * z);
    vec p = all(1.061405429f);
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    vec tail = 0.5f * p * t * f_exp(-z * z);
    return pick(x < 0.0f, tail, 1.0f - tail);
}
static inline vec sine(vec x, float turn) {  // sin(x + turn * pi / 2), turn 0 or 1; exact for |x| < 8192
    ivec n = nearest(x * 0.318309886f + 0.5f * turn);
    vec k = __builtin_convertvector(n, vec) - 0.5f * turn;
    vec r = ((x - k * 3.140625f) - k * 9.67502593994140625e-4f) - k * 1.509957990978376432e-7f;
    vec y = r * r;
    vec p = all(-2.4781230e-8f);
    p = p * y + 2.7557312e-6f;
    p = p * y - 1.9841270e-4f;
    p = p * y + 8.3333333e-3f;
    p = p * y - 1.6666667e-1f;
    p = p * y * r + r;
    return (vec)(bits(p) ^ (n << 31));
}
static inline vec f_sin(vec x) {
    vec y = sine(x, 0.0f);
    ivec far = ~(absolute(x) < 8192.0f);
    bool any = false;
    for (int i = 0; i < WIDTH; i++) any |= far[i] != 0;
    if (__builtin_expect(any, 0)) for (int i = 0; i < WIDTH; i++) if (far[i]) y[i] = sinf(x[i]);
    return y;
}
static inline vec f_cos(vec x) {
    vec y = sine(x, 1.0f);
    ivec far = ~(absolute(x) < 8192.0f);
    bool any = false;
    for (int i = 0; i < WIDTH; i++) any |= far[i] != 0;
    if (__builtin_expect(any, 0)) for (int i = 0; i < WIDTH; i++) if (far[i]) y[i] = cosf(x[i]);
    return y;
}
static inline vec f_relu(vec x) { return pick(~(x <= 0.0f), x, all(0.0f)); }
static inline vec f_step(vec x) { return pick(x > 0.0f, all(1.0f), all(0.0f)); }
