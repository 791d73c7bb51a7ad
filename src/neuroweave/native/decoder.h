// Runs a program of operations on one token at a time: what a decoder is made of, by a team of threads.
// Each operation reads and writes buffers of float32; weights are float32, int8 or 4-bit rows. A source that includes
// this file defines `activate(kind, ...)`, made from the activations of the model at hand.
#pragma once
#include "vectors.h"
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

enum Format { FLOAT32 = 0, INT8 = 1, INT4 = 2 };
enum Kind { EMBED, NORM, LINEAR, ROTATE, ATTEND, GLU, ACTIVATE, ADD, GATHER, SOFTMAX_GATE, SPARSE_GLU, MERGE, MULTIPLY };
constexpr int BLOCK = 64;  // inputs that share one scale when they are rounded to int8
// How far ahead of their use weights are asked for, in bytes. Rows are short, and the hardware starts anew at each: without
// this int8 decodes SmolLM2 at two thirds of the rate (2 threads of an Intel Xeon, 29 November 2026; 1 to 16 KB tried).
constexpr int AHEAD = 6144, AHEAD_FLOATS = 1024;

struct Segment { int32_t kind, start, stop, stride; const float *weights, *beta; };
void activate(int kind, const float *x, float *y, int n, const float *weights, int stride, const float *beta);

struct Matrix {
    const void *data;       // rows of float; of int8, 128 added; of two 4-bit numbers a byte, 8 added
    const void *scales;     // int8: float, one a row; 4-bit: half, one for 32 inputs
    const float *bias;
    int32_t rows, columns, format, padding;
};
struct Op {
    int32_t kind, n, m, k;          // see each operation
    int32_t flags, heads, groups, window;
    float a, b;
    const float *in, *in2;
    float *out;
    const float *weight, *weight2;
    float *keys, *values;
    const Matrix *matrix, *matrix2, *matrix3;
    const Segment *segments;
    int64_t segment_count;
};

// An input vector as two int8 a number, x = scale * (value + fine / FINE): one alone would cost more than the weights'
// own rounding does. `excess`: what every block's product has too much, since weights are stored with 128 or 8 added.
constexpr float FINE = 254.0f;
struct Rounded {
    std::vector<int8_t> values, fine;
    std::vector<float> scales;            // of a block, over FINE
    std::vector<int32_t> excess, excess_fine;  // 16 numbers a block: -(128 or 8) times the sums of 4 inputs
};

static void round_input(Rounded &r, const float *input, int n, int format) {
    int blocks = (n + BLOCK - 1) / BLOCK;
    r.values.resize((size_t)blocks * BLOCK);
    r.fine.resize((size_t)blocks * BLOCK);
    if (n % BLOCK) { memset(&r.values[(blocks - 1) * BLOCK], 0, BLOCK); memset(&r.fine[(blocks - 1) * BLOCK], 0, BLOCK); }
    r.scales.resize(blocks);
    r.excess.resize((size_t)blocks * 16);
    r.excess_fine.resize((size_t)blocks * 16);
    int b = 0;
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
    const __m512i added = _mm512_set1_epi8(format == INT8 ? (char)128 : 8);
    for (; (b + 1) * BLOCK <= n; b++) {
        __m512 x[4], most = _mm512_setzero_ps();
        for (int i = 0; i < 4; i++) {
            x[i] = _mm512_loadu_ps(input + b * BLOCK + 16 * i);
            most = _mm512_max_ps(most, _mm512_abs_ps(x[i]));
        }
        float largest = _mm512_reduce_max_ps(most);
        __m512 inverse = _mm512_set1_ps(largest > 1e-30f ? 127.0f / largest : 0.0f);
        for (int i = 0; i < 4; i++) {
            __m512 scaled = _mm512_mul_ps(x[i], inverse);
            __m512i whole = _mm512_cvtps_epi32(scaled);
            __m512 rest = _mm512_mul_ps(_mm512_sub_ps(scaled, _mm512_cvtepi32_ps(whole)), _mm512_set1_ps(FINE));
            _mm_storeu_si128((__m128i *)(r.values.data() + b * BLOCK + 16 * i), _mm512_cvtepi32_epi8(whole));
            _mm_storeu_si128((__m128i *)(r.fine.data() + b * BLOCK + 16 * i), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(rest)));
        }
        r.scales[b] = largest / 127.0f / FINE;
        __m512i zero = _mm512_setzero_si512();
        __m512i much = _mm512_dpbusd_epi32(zero, added, _mm512_loadu_si512(r.values.data() + 64 * b));
        __m512i much_fine = _mm512_dpbusd_epi32(zero, added, _mm512_loadu_si512(r.fine.data() + 64 * b));
        _mm512_storeu_si512(r.excess.data() + 16 * b, _mm512_sub_epi32(zero, much));
        _mm512_storeu_si512(r.excess_fine.data() + 16 * b, _mm512_sub_epi32(zero, much_fine));
    }
#endif
    for (; b < blocks; b++) {
        int count = n - b * BLOCK < BLOCK ? n - b * BLOCK : BLOCK;
        const float *p = input + b * BLOCK;
        float most = 0;
        for (int i = 0; i < count; i++) most = fmaxf(most, fabsf(p[i]));
        float inverse = most > 1e-30f ? 127.0f / most : 0.0f;
        int8_t *q = r.values.data() + b * BLOCK, *f = r.fine.data() + b * BLOCK;
        for (int i = 0; i < count; i++) {
            float x = p[i] * inverse;
            int whole = (int)(x + (x < 0 ? -0.5f : 0.5f));
            float rest = (x - whole) * FINE;
            q[i] = (int8_t)whole;
            f[i] = (int8_t)(int)(rest + (rest < 0 ? -0.5f : 0.5f));
        }
        r.scales[b] = most / 127.0f / FINE;
        int offset = format == INT8 ? -128 : -8;
        for (int lane = 0; lane < 16; lane++) {
            int total = 0, fine = 0;
            for (int j = 0; j < 4; j++) { total += q[4 * lane + j]; fine += f[4 * lane + j]; }
            r.excess[b * 16 + lane] = offset * total;
            r.excess_fine[b * 16 + lane] = offset * fine;
        }
    }
}

static inline float dot_float(const float *w, const float *x, int n, const float *next = nullptr) {  // next: the row after it
    vec a{}, b{}, c{}, d{};
    int i = 0;
    for (; i + 4 * WIDTH <= n; i += 4 * WIDTH) {
        const float *ahead = !next || i + AHEAD_FLOATS < n ? w + i + AHEAD_FLOATS : next + (i + AHEAD_FLOATS - n);
        for (int line = 0; line < 4 * WIDTH; line += 16) __builtin_prefetch(ahead + line);
        a += load(w + i) * load(x + i);
        b += load(w + i + WIDTH) * load(x + i + WIDTH);
        c += load(w + i + 2 * WIDTH) * load(x + i + 2 * WIDTH);
        d += load(w + i + 3 * WIDTH) * load(x + i + 3 * WIDTH);
    }
    for (; i + WIDTH <= n; i += WIDTH) a += load(w + i) * load(x + i);
    float s = sum((a + b) + (c + d));
    for (; i < n; i++) s += w[i] * x[i];
    return s;
}

// Where to ask ahead for bytes of rows that lie one after the other, or of which `next` is the one after this
static inline const uint8_t *ahead_of(const uint8_t *w, const uint8_t *next, int at, int length) {
    return !next || at + AHEAD < length ? w + at + AHEAD : next + (at + AHEAD - length < length ? at + AHEAD - length : at);
}
static inline float half_to_float(uint16_t h) {
    uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
    if (exponent == 0) { float v = mantissa * 5.9604644775390625e-8f; return sign ? -v : v; }
    uint32_t b = sign | ((exponent + 112) << 23) | (mantissa << 13);
    float v; memcpy(&v, &b, 4); return v;
}

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
static inline __m512 block_product(__m512i weights, const Rounded &r, int b) {  // 16 sums of 4 products, times FINE
    __m512i q = _mm512_dpbusd_epi32(_mm512_loadu_si512(r.excess.data() + 16 * b), weights, _mm512_loadu_si512(r.values.data() + 64 * b));
    __m512i f = _mm512_dpbusd_epi32(_mm512_loadu_si512(r.excess_fine.data() + 16 * b), weights, _mm512_loadu_si512(r.fine.data() + 64 * b));
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(q), _mm512_set1_ps(FINE), _mm512_cvtepi32_ps(f));
}
static inline float dot_int8(const uint8_t *w, const Rounded &r, int blocks, const uint8_t *next = nullptr) {
    __m512 total = _mm512_setzero_ps();
    for (int b = 0; b < blocks; b++) {
        __builtin_prefetch(ahead_of(w, next, 64 * b, 64 * blocks));
        total = _mm512_fmadd_ps(block_product(_mm512_loadu_si512(w + 64 * b), r, b), _mm512_set1_ps(r.scales[b]), total);
    }
    return _mm512_reduce_add_ps(total);
}
static inline float dot_int4(const uint8_t *w, const uint16_t *scales, const Rounded &r, int blocks) {
    __m512 total = _mm512_setzero_ps();
    const __m256i low = _mm256_set1_epi8(15);
    const __m512i halves = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    for (int b = 0; b < blocks; b++) {
        __builtin_prefetch(w + 32 * b + AHEAD);
        __m256i packed = _mm256_loadu_si256((const __m256i *)(w + 32 * b));
        __m256i high = _mm256_and_si256(_mm256_srli_epi16(packed, 4), low);
        __m512i unpacked = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_and_si256(packed, low)), high, 1);
        int32_t two;
        memcpy(&two, scales + 2 * b, 4);
        __m128 pair = _mm_mul_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(two)), _mm_set1_ps(r.scales[b]));
        __m512 scale = _mm512_permutexvar_ps(halves, _mm512_castps128_ps512(pair));
        total = _mm512_fmadd_ps(block_product(unpacked, r, b), scale, total);
    }
    return _mm512_reduce_add_ps(total);
}
#elif defined(__AVX2__)
static inline __m256i products(__m256i u, const int8_t *p) {  // 8 sums of 4 products: u8 times s8, without saturation
    __m256i s = _mm256_loadu_si256((const __m256i *)p);
    __m256i even = _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm256_castsi256_si128(u)), _mm256_cvtepi8_epi16(_mm256_castsi256_si128(s)));
    __m256i odd = _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm256_extracti128_si256(u, 1)), _mm256_cvtepi8_epi16(_mm256_extracti128_si256(s, 1)));
    return _mm256_add_epi32(even, odd);
}
static inline float total8(__m256 v) { float t[8], s = 0; _mm256_storeu_ps(t, v); for (int i = 0; i < 8; i++) s += t[i]; return s; }
static inline __m256 half_product(__m256i u, const Rounded &r, int b, int half) {  // of 32 inputs, times FINE
    __m256i q = _mm256_add_epi32(products(u, r.values.data() + 64 * b + 32 * half), _mm256_loadu_si256((const __m256i *)(r.excess.data() + 16 * b + 8 * half)));
    __m256i f = _mm256_add_epi32(products(u, r.fine.data() + 64 * b + 32 * half), _mm256_loadu_si256((const __m256i *)(r.excess_fine.data() + 16 * b + 8 * half)));
    return _mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(q), _mm256_set1_ps(FINE)), _mm256_cvtepi32_ps(f));
}
static inline float dot_int8(const uint8_t *w, const Rounded &r, int blocks, const uint8_t *next = nullptr) {
    __m256 total = _mm256_setzero_ps();
    for (int b = 0; b < blocks; b++) {
        __builtin_prefetch(ahead_of(w, next, 64 * b, 64 * blocks));
        const __m256i *u = (const __m256i *)(w + 64 * b);
        __m256 both = _mm256_add_ps(half_product(_mm256_loadu_si256(u), r, b, 0), half_product(_mm256_loadu_si256(u + 1), r, b, 1));
        total = _mm256_add_ps(total, _mm256_mul_ps(both, _mm256_set1_ps(r.scales[b])));
    }
    return total8(total);
}
static inline float dot_int4(const uint8_t *w, const uint16_t *scales, const Rounded &r, int blocks) {
    __m256 total = _mm256_setzero_ps();
    const __m256i low = _mm256_set1_epi8(15);
    for (int b = 0; b < blocks; b++) {
        __builtin_prefetch(w + 32 * b + AHEAD);
        __m256i packed = _mm256_loadu_si256((const __m256i *)(w + 32 * b));
        __m256 first = half_product(_mm256_and_si256(packed, low), r, b, 0);
        __m256 second = half_product(_mm256_and_si256(_mm256_srli_epi16(packed, 4), low), r, b, 1);
        total = _mm256_add_ps(total, _mm256_mul_ps(first, _mm256_set1_ps(half_to_float(scales[2 * b]) * r.scales[b])));
        total = _mm256_add_ps(total, _mm256_mul_ps(second, _mm256_set1_ps(half_to_float(scales[2 * b + 1]) * r.scales[b])));
    }
    return total8(total);
}
#else
static inline float dot_int8(const uint8_t *w, const Rounded &r, int blocks, const uint8_t * = nullptr) {
    float total = 0;
    for (int b = 0; b < blocks; b++) {
        int32_t q = 0, f = 0;
        for (int i = 64 * b; i < 64 * b + 64; i++) { q += ((int)w[i] - 128) * r.values[i]; f += ((int)w[i] - 128) * r.fine[i]; }
        total += (q * FINE + f) * r.scales[b];
    }
    return total;
}
static inline float dot_int4(const uint8_t *w, const uint16_t *scales, const Rounded &r, int blocks) {
    float total = 0;
    for (int b = 0; b < blocks; b++)
        for (int half = 0; half < 2; half++) {
            int32_t q = 0, f = 0;
            for (int i = 0; i < 32; i++) {
                int u = (half ? w[32 * b + i] >> 4 : w[32 * b + i] & 15) - 8, at = 64 * b + 32 * half + i;
                q += u * r.values[at];
                f += u * r.fine[at];
            }
            total += (q * FINE + f) * r.scales[b] * half_to_float(scales[2 * b + half]);
        }
    return total;
}
#endif

static inline int blocks_of(const Matrix &m) { return (m.columns + BLOCK - 1) / BLOCK; }

// next: the row that is wanted after this one
static inline float row_product(const Matrix &m, int row, const float *x, const Rounded &r, int next) {
    float y;
    if (m.format == FLOAT32) {
        const float *d = (const float *)m.data;
        y = dot_float(d + (size_t)row * m.columns, x, m.columns, d + (size_t)next * m.columns);
    } else if (m.format == INT8) {
        size_t stride = (size_t)blocks_of(m) * 64;
        const uint8_t *d = (const uint8_t *)m.data;
        y = dot_int8(d + row * stride, r, blocks_of(m), d + next * stride) * ((const float *)m.scales)[row];
    }
    else {
        size_t blocks = blocks_of(m);
        y = dot_int4((const uint8_t *)m.data + row * blocks * 32, (const uint16_t *)m.scales + row * blocks * 2, r, (int)blocks);
    }
    return m.bias ? y + m.bias[row] : y;
}

// y[i] of `count` rows one after the other: four at a time share what is read of the input
static void rows_products(const Matrix &m, int start, int count, const float *x, const Rounded &r, float *y) {
    int i = 0;
    if (m.format == FLOAT32) {
        size_t n = m.columns;
        for (; i + 4 <= count; i += 4) {
            const float *w0 = (const float *)m.data + (size_t)(start + i) * n, *w1 = w0 + n, *w2 = w1 + n, *w3 = w2 + n;
            vec a{}, b{}, c{}, d{};
            size_t at = 0;
            for (; at + WIDTH <= n; at += WIDTH) {
                vec v = load(x + at);
                __builtin_prefetch(w0 + at + AHEAD_FLOATS); __builtin_prefetch(w1 + at + AHEAD_FLOATS);
                __builtin_prefetch(w2 + at + AHEAD_FLOATS); __builtin_prefetch(w3 + at + AHEAD_FLOATS);
                a += load(w0 + at) * v; b += load(w1 + at) * v; c += load(w2 + at) * v; d += load(w3 + at) * v;
            }
            float s[4] = {sum(a), sum(b), sum(c), sum(d)};
            for (; at < n; at++) { s[0] += w0[at] * x[at]; s[1] += w1[at] * x[at]; s[2] += w2[at] * x[at]; s[3] += w3[at] * x[at]; }
            for (int k = 0; k < 4; k++) y[i + k] = m.bias ? s[k] + m.bias[start + i + k] : s[k];
        }
    }
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
    int blocks = blocks_of(m);
    const __m512 fine = _mm512_set1_ps(FINE);
    if (m.format == INT8) {
        const float *scales = (const float *)m.scales + start;
        size_t stride = (size_t)blocks * 64;
        for (; i + 4 <= count; i += 4) {
            const uint8_t *w = (const uint8_t *)m.data + (size_t)(start + i) * stride;
            __m512 total[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
            for (int b = 0; b < blocks; b++) {
                __m512i v = _mm512_loadu_si512(r.values.data() + 64 * b), f = _mm512_loadu_si512(r.fine.data() + 64 * b);
                __m512i much = _mm512_loadu_si512(r.excess.data() + 16 * b), much_fine = _mm512_loadu_si512(r.excess_fine.data() + 16 * b);
                __m512 scale = _mm512_set1_ps(r.scales[b]);
                for (int k = 0; k < 4; k++) {
                    __builtin_prefetch(w + k * stride + 64 * b + AHEAD);
                    __m512i u = _mm512_loadu_si512(w + k * stride + 64 * b);
                    __m512 q = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(much, u, v));
                    __m512 g = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(much_fine, u, f));
                    total[k] = _mm512_fmadd_ps(_mm512_fmadd_ps(q, fine, g), scale, total[k]);
                }
            }
            for (int k = 0; k < 4; k++) y[i + k] = _mm512_reduce_add_ps(total[k]) * scales[i + k] + (m.bias ? m.bias[start + i + k] : 0.0f);
        }
    } else if (m.format == INT4) {
        const __m256i low = _mm256_set1_epi8(15);
        const __m512i halves = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
        size_t stride = (size_t)blocks * 32;
        for (; i + 4 <= count; i += 4) {
            const uint8_t *w = (const uint8_t *)m.data + (size_t)(start + i) * stride;
            const uint16_t *scales = (const uint16_t *)m.scales + (size_t)(start + i) * blocks * 2;
            __m512 total[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
            for (int b = 0; b < blocks; b++) {
                __m512i v = _mm512_loadu_si512(r.values.data() + 64 * b), f = _mm512_loadu_si512(r.fine.data() + 64 * b);
                __m512i much = _mm512_loadu_si512(r.excess.data() + 16 * b), much_fine = _mm512_loadu_si512(r.excess_fine.data() + 16 * b);
                __m128 scale = _mm_set1_ps(r.scales[b]);
                for (int k = 0; k < 4; k++) {
                    __builtin_prefetch(w + k * stride + 32 * b + AHEAD);
                    __m256i packed = _mm256_loadu_si256((const __m256i *)(w + k * stride + 32 * b));
                    __m256i high = _mm256_and_si256(_mm256_srli_epi16(packed, 4), low);
                    __m512i u = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_and_si256(packed, low)), high, 1);
                    __m512 q = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(much, u, v));
                    __m512 g = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(much_fine, u, f));
                    int32_t two;
                    memcpy(&two, scales + (size_t)k * blocks * 2 + 2 * b, 4);
                    __m128 pair = _mm_mul_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(two)), scale);
                    __m512 own = _mm512_permutexvar_ps(halves, _mm512_castps128_ps512(pair));
                    total[k] = _mm512_fmadd_ps(_mm512_fmadd_ps(q, fine, g), own, total[k]);
                }
            }
            for (int k = 0; k < 4; k++) y[i + k] = _mm512_reduce_add_ps(total[k]) + (m.bias ? m.bias[start + i + k] : 0.0f);
        }
    }
#endif
    for (; i < count; i++) y[i] = row_product(m, start + i, x, r, start + i + (start + i + 1 < m.rows));
}

static void activate_segments(const Op &op, const float *x, float *y, int start, int count) {
    for (int64_t i = 0; i < op.segment_count; i++) {
        const Segment &s = op.segments[i];
        int from = s.start > start ? s.start : start, to = s.stop < start + count ? s.stop : start + count;
        if (from >= to) continue;
        int skip = from - s.start;
        activate(s.kind, x + (from - start), y + (from - start), to - from, s.weights ? s.weights + skip : nullptr, s.stride,
                 s.beta ? s.beta + skip : nullptr);
    }
}

struct Member {  // what a thread of the team owns
    Rounded rounded;
    std::vector<float> scratch, partial;
    int64_t meetings = 0;
};

class Team {
  public:
    explicit Team(int count) : count(count), members(count) {
        for (int i = 1; i < count; i++) threads.emplace_back([this, i] { serve(i); });
    }
    ~Team() {
        { std::lock_guard<std::mutex> hold(lock); ending = true; }
        wake.notify_all();
        for (auto &thread : threads) thread.join();
    }
    void run(const Op *given, int number, int64_t token, int64_t position) {
        ops = given; op_count = number; this->token = token; this->position = position;
        if ((int)counters.size() < number) { counters = std::vector<std::atomic<int>>(number); }
        for (int i = 0; i < number; i++) counters[i].store(0, std::memory_order_relaxed);
        { std::lock_guard<std::mutex> hold(lock); epoch.fetch_add(1); }
        if (count > 1) wake.notify_all();
        work(0);
    }
    int size() const { return count; }

  private:
    int count;
    std::vector<Member> members;
    std::vector<std::thread> threads;
    std::mutex lock;
    std::condition_variable wake;
    std::atomic<int> epoch{0};
    std::atomic<int64_t> arrived{0};
    std::vector<std::atomic<int>> counters;
    bool ending = false;
    const Op *ops = nullptr;
    int op_count = 0;
    int64_t token = 0, position = 0;

    void serve(int id) {
        int seen = 0;
        while (true) {
            for (int spin = 0; spin < 20000 && epoch.load(std::memory_order_acquire) == seen; spin++) pause();
            if (epoch.load() == seen) {
                std::unique_lock<std::mutex> hold(lock);
                wake.wait(hold, [&] { return ending || epoch.load() != seen; });
                if (ending) return;
            }
            seen++;
            work(id);
        }
    }
    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
    void meet(Member &me) {  // every thread waits here for the others
        if (count == 1) return;
        int64_t all = ++me.meetings * count;
        arrived.fetch_add(1, std::memory_order_acq_rel);
        for (int spin = 0; arrived.load(std::memory_order_acquire) < all; spin++) {
            if (spin < 2000) pause(); else std::this_thread::yield();
        }
    }
    void work(int id) {
        Member &me = members[id];
        for (int i = 0; i < op_count; i++) {
            run_op(ops[i], i, id, me);
            meet(me);
        }
    }
    template <class F> void share(int op, int total, int chunk, F &&body) {  // chunks, as threads have time
        for (int at; (at = counters[op].fetch_add(chunk, std::memory_order_relaxed)) < total;)
            body(at, at + chunk < total ? at + chunk : total);
    }
    void run_op(const Op &op, int number, int id, Member &me);
};

static void round_for(Member &me, const Op &op) {  // flags 2: the operation before had the same input, in the same format
    const Matrix &m = *op.matrix;
    if (m.format != FLOAT32 && !(op.flags & 2)) round_input(me.rounded, op.in, m.columns, m.format);
}
static int chunk_of(int rows, int columns, int threads) {
    int chunk = (1 << 15) / (columns > 0 ? columns : 1);  // of a few microseconds
    chunk = chunk < 16 ? 16 : chunk;
    int most = (rows + threads - 1) / threads;
    chunk = chunk > most ? most : chunk;
    return (chunk + WIDTH - 1) / WIDTH * WIDTH;
}

static void embed(const Op &op, int64_t token) {
    const Matrix &m = *op.matrix;
    size_t blocks = blocks_of(m);
    for (int i = 0; i < m.columns; i++) {
        float v;
        if (m.format == FLOAT32) v = ((const float *)m.data)[token * m.columns + i];
        else if (m.format == INT8)
            v = (((const uint8_t *)m.data)[token * blocks * 64 + i] - 128) * ((const float *)m.scales)[token];
        else {
            int b = i / 64, j = i % 64;
            uint8_t byte = ((const uint8_t *)m.data)[token * blocks * 32 + 32 * b + j % 32];
            int q = j < 32 ? byte & 15 : byte >> 4;
            uint16_t h = ((const uint16_t *)m.scales)[token * blocks * 2 + 2 * b + (j >= 32)];
            v = (q - 8) * half_to_float(h);
        }
        op.out[i] = v * op.a;
    }
}
static void norm(const Op &op) {  // n numbers each, m of them; flags 1: the mean is taken away, 2: weight is missing
    for (int g = 0; g < op.m; g++) {
        const float *x = op.in + (size_t)g * op.n;
        float *y = op.out + (size_t)g * op.n;
        double mean = 0;
        if (op.flags & 1) { for (int i = 0; i < op.n; i++) mean += x[i]; mean /= op.n; }
        float centre = (float)mean;
        vec squares{};
        int i = 0;
        for (; i + WIDTH <= op.n; i += WIDTH) { vec d = load(x + i) - centre; squares += d * d; }
        float total = sum(squares);
        for (; i < op.n; i++) total += (x[i] - centre) * (x[i] - centre);
        float scale = 1.0f / sqrtf(total / op.n + op.a);
        for (i = 0; i < op.n; i++) {
            float v = (x[i] - centre) * scale;
            if (op.weight) v *= op.weight[i];
            y[i] = op.weight2 ? v + op.weight2[i] : v;
        }
    }
}
static void rotate(const Op &op, int64_t position) {  // heads of n channels, of which the first m turn; k: row of the table
    const float *cos = op.weight + position * op.k, *sin = op.weight2 + position * op.k;
    int half = op.m / 2;
    for (int h = 0; h < op.heads; h++) {
        float *x = op.out + (size_t)h * op.n;
        for (int i = 0; i < half; i++) {
            float first = x[i], second = x[i + half];
            x[i] = first * cos[i] - second * sin[i];
            x[i + half] = second * cos[i + half] + first * sin[i + half];
        }
    }
}
// n channels a head, m positions in the cache; in: queries, in2: new keys, weight: new values; window 0: all; a: scale; b: soft cap
static void attend(const Op &op, int head, int64_t position, Member &me) {
    int group = head / (op.heads / op.groups), n = op.n;
    const float *keys = op.keys + (size_t)group * op.m * n, *values = op.values + (size_t)group * op.m * n;
    int64_t from = op.window && position - op.window + 1 > 0 ? position - op.window + 1 : 0;
    int count = (int)(position - from + 1);
    if ((int)me.scratch.size() < count + 2 * WIDTH) me.scratch.resize(count + 1024);
    float *scores = me.scratch.data();
    const float *q = op.in + (size_t)head * n;
    vec top = all(-INFINITY);
    for (int i = 0; i < count; i++) scores[i] = dot_float(keys + (from + i) * n, q, n) * op.a;
    if (op.b > 0) for (int i = 0; i < count; i += WIDTH) store(scores + i, f_tanh(load(scores + i) / op.b) * op.b);
    int whole = count / WIDTH * WIDTH;
    for (int i = 0; i < whole; i += WIDTH) top = largest(top, load(scores + i));
    float most = -INFINITY;
    for (int i = 0; i < WIDTH; i++) most = fmaxf(most, top[i]);
    for (int i = whole; i < count; i++) most = fmaxf(most, scores[i]);
    for (int i = count; i < whole + WIDTH; i++) scores[i] = -INFINITY;
    vec total{};
    for (int i = 0; i < count; i += WIDTH) {
        vec s = load(scores + i), e = f_exp(s - most);
        e = pick(s == -INFINITY, all(0.0f), e);
        store(scores + i, e);
        total += e;
    }
    float inverse = 1.0f / sum(total);
    float *out = op.out + (size_t)head * n;
    int c = 0;
    for (; c + 4 * WIDTH <= n; c += 4 * WIDTH) {
        vec s0{}, s1{}, s2{}, s3{};
        for (int i = 0; i < count; i++) {
            const float *v = values + (from + i) * n + c;
            float w = scores[i];
            s0 += load(v) * w; s1 += load(v + WIDTH) * w; s2 += load(v + 2 * WIDTH) * w; s3 += load(v + 3 * WIDTH) * w;
        }
        store(out + c, s0 * inverse); store(out + c + WIDTH, s1 * inverse);
        store(out + c + 2 * WIDTH, s2 * inverse); store(out + c + 3 * WIDTH, s3 * inverse);
    }
    for (; c < n; c++) {
        float s = 0;
        for (int i = 0; i < count; i++) s += scores[i] * values[(from + i) * n + c];
        out[c] = s * inverse;
    }
}

// out[i] of rows start to stop of a product
static void linear(const Op &op, int start, int stop, Member &me) {
    float found[64];
    for (int from = start; from < stop; from += 64) {
        int count = stop - from < 64 ? stop - from : 64;
        rows_products(*op.matrix, from, count, op.in, me.rounded, found);
        for (int i = 0; i < count; i++) {
            float y = found[i];
            if (op.b > 0) y = op.b * tanhf(y / op.b);  // a soft cap, of logits
            op.out[from + i] = op.flags & 1 ? op.out[from + i] + op.a * y : op.a * y;
        }
    }
}
// act(gate) * up of neurons start to stop
static void gated(const Op &op, int start, int stop, Member &me) {
    float gate[64], up[64], acted[64];
    for (int from = start; from < stop; from += 64) {
        int count = stop - from < 64 ? stop - from : 64;
        rows_products(*op.matrix, from, count, op.in, me.rounded, gate);
        activate_segments(op, gate, acted, from, count);
        if (op.matrix2) {
            rows_products(*op.matrix2, from, count, op.in, me.rounded, up);
            for (int i = 0; i < count; i++) acted[i] *= up[i];
        }
        memcpy(op.out + from, acted, 4 * count);
    }
}

#if defined(__AVX512F__)
static inline vec bytes_to_floats(const uint8_t *p) {
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
#elif defined(__AVX2__)
static inline vec bytes_to_floats(const uint8_t *p) {
    return (vec)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
#else
static inline vec bytes_to_floats(const uint8_t *p) {
    typedef uint8_t narrow __attribute__((vector_size(WIDTH), aligned(1), may_alias));
    return __builtin_convertvector(*(const narrow *)p, vec);
}
#endif
// partial += sum of factors[i] * row rows[i] of a matrix of a row a neuron
static void add_rows(const Matrix &m, const int *rows, const float *factors, int count, float *partial) {
    int n = m.columns;
    for (int at = 0; at < count; at += 4) {
        int of = count - at < 4 ? count - at : 4;
        float f[4] = {0, 0, 0, 0};
        size_t r[4], later[4];  // these rows and those after them
        for (int i = 0; i < 4; i++) {
            r[i] = rows[at + (i < of ? i : 0)];
            later[i] = at + 4 + i < count ? rows[at + 4 + i] : r[i];
            if (i < of) f[i] = factors[at + i];
        }
        int c = 0;
        if (m.format == FLOAT32) {
            const float *d = (const float *)m.data, *p0 = d + r[0] * n, *p1 = d + r[1] * n, *p2 = d + r[2] * n, *p3 = d + r[3] * n;
            for (; c + WIDTH <= n; c += WIDTH) {
                for (int i = 0; i < 4; i++)
                    __builtin_prefetch(c + 512 < n ? d + r[i] * n + c + 512 : d + later[i] * n + (c + 512 - n));
                vec s = load(partial + c);
                s += load(p0 + c) * f[0]; s += load(p1 + c) * f[1]; s += load(p2 + c) * f[2]; s += load(p3 + c) * f[3];
                store(partial + c, s);
            }
            for (; c < n; c++) partial[c] += p0[c] * f[0] + p1[c] * f[1] + p2[c] * f[2] + p3[c] * f[3];
        } else {  // int8: 128 was added to each
            size_t stride = (size_t)blocks_of(m) * 64;
            const uint8_t *d = (const uint8_t *)m.data, *p0 = d + r[0] * stride, *p1 = d + r[1] * stride, *p2 = d + r[2] * stride, *p3 = d + r[3] * stride;
            const float *scales = (const float *)m.scales;
            for (int i = 0; i < 4; i++) f[i] *= scales[r[i]];
            float excess = -128.0f * (f[0] + f[1] + f[2] + f[3]);
            for (; c + WIDTH <= n; c += WIDTH) {
                if (c % 64 == 0)
                    for (int i = 0; i < 4; i++)
                        __builtin_prefetch(c + 2048 < n ? d + r[i] * stride + c + 2048 : d + later[i] * stride + (c + 2048 - n));
                vec s = load(partial + c) + excess;
                s += bytes_to_floats(p0 + c) * f[0]; s += bytes_to_floats(p1 + c) * f[1];
                s += bytes_to_floats(p2 + c) * f[2]; s += bytes_to_floats(p3 + c) * f[3];
                store(partial + c, s);
            }
            for (; c < n; c++) partial[c] += p0[c] * f[0] + p1[c] * f[1] + p2[c] * f[2] + p3[c] * f[3] + excess;
        }
    }
}
// partial += down(act(gate) * up) of neurons start to stop, of which those whose |act(gate)| is at most the neuron's
// threshold (weight; none: 0) count for nothing: their rows of up and down are not read
static void sparse(const Op &op, int start, int stop, Member &me) {
    float gate[64], acted[64], factors[64];
    int rows[64];
    for (int from = start; from < stop; from += 64) {
        int count = stop - from < 64 ? stop - from : 64, live = 0;
        rows_products(*op.matrix, from, count, op.in, me.rounded, gate);
        activate_segments(op, gate, acted, from, count);
        for (int i = 0; i < count; i++)
            if (!(fabsf(acted[i]) <= (op.weight ? op.weight[from + i] : 0.0f))) { rows[live] = from + i; factors[live++] = acted[i]; }
        for (int i = 0; i < live; i++) factors[i] *= row_product(*op.matrix2, rows[i], op.in, me.rounded, rows[i + (i + 1 < live)]);
        add_rows(*op.matrix3, rows, factors, live, me.partial.data());
    }
}

inline void Team::run_op(const Op &op, int number, int id, Member &me) {
    switch (op.kind) {
    case EMBED: if (id == 0) embed(op, token); break;
    case NORM: if (id == 0) norm(op); break;
    case ROTATE:
        if (id == 0) rotate(op, position);
        break;
    case LINEAR:
        round_for(me, op);
        share(number, op.matrix->rows, chunk_of(op.matrix->rows, op.matrix->columns, count), [&](int a, int b) { linear(op, a, b, me); });
        break;
    case GLU:
        round_for(me, op);
        share(number, op.matrix->rows, chunk_of(op.matrix->rows, 2 * op.matrix->columns, count), [&](int a, int b) { gated(op, a, b, me); });
        break;
    case SPARSE_GLU:
        round_for(me, op);
        me.partial.assign(op.matrix3->columns, 0.0f);
        share(number, op.matrix->rows, 64, [&](int a, int b) { sparse(op, a, b, me); });
        break;
    case MERGE:
        share(number, op.n, 256, [&](int a, int b) {
            for (auto &member : members) for (int i = a; i < b; i++) op.out[i] += op.a * member.partial[i];
        });
        break;
    case ATTEND: {
        int n = op.n;  // the new keys and values are put down by whoever comes first to a group
        if (id == 0) for (int g = 0; g < op.groups; g++) {
            memcpy(op.keys + ((size_t)g * op.m + position) * n, op.in2 + (size_t)g * n, 4 * n);
            memcpy(op.values + ((size_t)g * op.m + position) * n, op.weight + (size_t)g * n, 4 * n);
        }
        meet(me);
        share(number, op.heads, 1, [&](int a, int b) { for (int h = a; h < b; h++) attend(op, h, position, me); });
        break;
    }
    case ACTIVATE:
        share(number, op.n, chunk_of(op.n, 256, count), [&](int a, int b) { activate_segments(op, op.in + a, op.out + a, a, b - a); });
        break;
    case ADD:
        if (id == 0) for (int i = 0; i < op.n; i++) op.out[i] = op.a * op.in[i] + (op.in2 ? op.b * op.in2[i] : 0.0f);
        break;
    case MULTIPLY:
        if (id == 0) for (int i = 0; i < op.n; i++) op.out[i] = op.in[i] * op.in2[i];
        break;
    case GATHER:  // a ring of n channels and m places, of which every k-th counts, `heads` of them; the newest is put in
        if (id == 0) {
            float *ring = op.keys;
            memcpy(ring + (size_t)(position % op.m) * op.n, op.in, 4 * op.n);
            for (int t = 0; t < op.heads; t++) {
                int64_t at = position - (int64_t)(op.heads - 1 - t) * op.k;
                if (at < 0) memset(op.out + (size_t)t * op.n, 0, 4 * op.n);
                else memcpy(op.out + (size_t)t * op.n, ring + (size_t)(at % op.m) * op.n, 4 * op.n);
            }
        }
        break;
    case SOFTMAX_GATE:  // out = second half * softmax(first half), of n each
        if (id == 0) {
            float most = -INFINITY, total = 0;
            for (int i = 0; i < op.n; i++) most = fmaxf(most, op.in[i]);
            for (int i = 0; i < op.n; i++) total += op.out[i] = expf(op.in[i] - most);
            for (int i = 0; i < op.n; i++) op.out[i] *= op.in[op.n + i] / total;
        }
        break;
    }
}

extern "C" {
void *neuroweave_team(int threads) { return new Team(threads < 1 ? 1 : threads); }
void neuroweave_end(void *team) { delete (Team *)team; }
void neuroweave_run(void *team, const Op *ops, int count, int64_t token, int64_t position) {
    ((Team *)team)->run(ops, count, token, position);
}
void neuroweave_activate(int kind, const float *x, float *y, int64_t n, const float *weights, int64_t stride, const float *beta) {
    activate(kind, x, y, (int)n, weights, (int)stride, beta);
}
int neuroweave_sizes(int which) { return which == 0 ? sizeof(Op) : which == 1 ? sizeof(Matrix) : sizeof(Segment); }
}
