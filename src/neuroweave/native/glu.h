// act(gate) * up and its gradients, one pass over the rows: what the generated kernels of a fused GLU run in.
// A source that includes this defines `struct Kernel<number>` (MEMBERS weights, BETA 0 or 1, `value`, `gradient`) and
// `run_segment`, which picks one. Letters: n neurons (columns), K members.
//
// Sums over rows are the same bits whoever computes them: a unit of work owns its columns and takes all rows in order.
#pragma once
#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>
#include "vectors.h"
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

// ------------------------------------------------------------------------------------------------------- functions
// Those of vectors.h, so written that the compiler finds what several of them share: exp(-|x|) of sigmoid and tanh,
// exp(-x^2 / 2) of both normal ones. Errors against float64: 2e-7 absolute, for tanh relative. Where there is AVX-512,
// no division: an estimate, and one step of Newton's.

#if defined(__AVX512F__)
typedef __mmask16 where;
static inline where negative(vec x) { return _mm512_cmp_ps_mask((__m512)x, _mm512_setzero_ps(), _CMP_LT_OQ); }
static inline vec choose(where w, vec yes, vec no) { return (vec)_mm512_mask_blend_ps(w, (__m512)no, (__m512)yes); }
static inline vec at_least(vec x, float low) { return (vec)_mm512_max_ps((__m512)all(low), (__m512)x); }  // NaN stays
static inline vec at_most(vec x, float high) { return (vec)_mm512_min_ps((__m512)all(high), (__m512)x); }
static inline vec inverse(vec d) {  // of a finite d
    vec r = (vec)_mm512_rcp14_ps((__m512)d);
    return r * (2.0f - d * r);
}
static inline vec load_first(const float *p, int n) { return (vec)_mm512_maskz_loadu_ps((1u << n) - 1, p); }
static inline void store_first(float *p, vec v, int n) { _mm512_mask_storeu_ps(p, (1u << n) - 1, (__m512)v); }
static inline void stream(float *p, vec v) { _mm512_stream_ps(p, (__m512)v); }
#else
typedef ivec where;
static inline where negative(vec x) { return x < 0.0f; }
static inline vec choose(where w, vec yes, vec no) { return pick(w, yes, no); }
static inline vec at_least(vec x, float low) { return pick(x < low, all(low), x); }
static inline vec at_most(vec x, float high) { return pick(x > high, all(high), x); }
static inline vec inverse(vec d) { return 1.0f / d; }
static inline vec load_first(const float *p, int n) { return load_part(p, n); }
static inline void store_first(float *p, vec v, int n) { store_part(p, v, n); }
static inline void stream(float *p, vec v) { store(p, v); }
#endif

struct Power { vec value, less_one; };  // less_one: exact to a few bits of itself, not of 1
static inline Power two_to(vec y) {      // y <= 0; below -126 as at -126
    y = at_least(y, -126.0f);
    const float magic = 12582912.0f + 127.0f;  // added, it leaves the exponent of 2^k in the last bits
    vec k = y + magic, f = y - (k - magic), s = (vec)(bits(k) << 23);
    vec p = all(1.5469735024e-04f);  // of (2^f - 1) / f, |f| <= 1/2, to 7e-9
    p = p * f + 1.3390866998e-03f;
    p = p * f + 9.6180307711e-03f;
    p = p * f + 5.5503571052e-02f;
    p = p * f + 2.4022651084e-01f;
    p = p * f + 6.9314718803e-01f;
    p = p * f;
    return {p * s + s, p * s + (s - 1.0f)};
}
static inline Power exp_of_minus_size(vec x) { return two_to(absolute(x) * -1.44269504f); }
static inline vec bell(vec x) { return two_to(x * x * -0.72134752f).value; }

static inline vec g_sigmoid(vec x) {
    vec t = exp_of_minus_size(x).value, r = inverse(1.0f + t);
    return choose(negative(x), t * r, r);
}
static inline vec g_tanh(vec x) {  // (1 - t^2) / (1 + t^2) of t = exp(-|x|)
    Power t = exp_of_minus_size(x);
    vec size = t.less_one * (1.0f + t.value) * inverse(1.0f + t.value * t.value);
    return (vec)((bits(size) & 0x7fffffff) | (bits(x) & (int32_t)0x80000000));
}
static inline vec g_normal_pdf(vec x) { return bell(x) * 0.3989422804f; }
static inline vec g_normal_cdf(vec x) {  // Abramowitz and Stegun 7.1.26
    vec t = inverse(1.0f + 0.23164190f * at_most(absolute(x), 1e4f));
    vec p = all(0.5307027145f);
    p = p * t - 0.7265760135f;
    p = p * t + 0.7107068705f;
    p = p * t - 0.142248368f;
    p = p * t + 0.127414796f;
    vec tail = p * t * bell(x);
    return choose(negative(x), tail, 1.0f - tail);
}
static inline vec g_sin(vec x) { return f_sin(x); }
static inline vec g_cos(vec x) { return f_cos(x); }
static inline vec g_relu(vec x) { return at_least(x, 0.0f); }
static inline vec g_step(vec x) { return pick(x > 0.0f, all(1.0f), all(0.0f)); }

// ------------------------------------------------------------------------------------------------------------ work

struct Segment {  // columns start to stop; weights [K, stop - start]
    int64_t kernel, start, stop;
    const float *weights, *beta;
    float *dweights, *dbeta;
};
struct Call {  // rows of gate, up and dout are `step` apart; out, dgate and dup are contiguous
    int64_t rows, columns, segments, gate_step, up_step, dout_step, block, row_block, streaming;
    const Segment *segment;
    const float *gate, *up, *dout;
    float *out, *dgate, *dup;
};
struct Unit { int segment; int64_t from, to, row, row_end; };

const int TOGETHER = 2;       // rows whose sums are added up in registers; of 1, 2, 4 and 8 the fastest
const int64_t EXACT = 256;    // rows after which sums go over into doubles
const int64_t BLOCK = 4096;   // most columns of a unit: long runs for the processor to fetch ahead, sums in the second cache

template <bool STREAM> static inline void put(float *p, vec v, int n) {
    if (n < WIDTH) store_first(p, v, n);
    else if (STREAM) stream(p, v);
    else store(p, v);
}
static inline vec take(const float *p, int n) { return n < WIDTH ? load_first(p, n) : load(p); }
static inline void soon(const float *p) { __builtin_prefetch(p, 0, 3); }

// One vector of columns at c, `count` rows from r on. `sums`: BLOCK floats for each weight, then for beta.
template <class F, bool BACK, bool STREAM>
static inline void column(const Call &call, const Segment &s, int64_t r, int count, int64_t c, int n, float *sums) {
    vec w[F::MEMBERS + 1], beta{};
    for (int k = 0; k < F::MEMBERS; k++) w[k] = take(s.weights + k * (s.stop - s.start) + c - s.start, n);
    if (F::BETA) beta = take(s.beta + c - s.start, n);
    vec dw[F::MEMBERS + 1] = {}, dbeta{};
    const int64_t gate_step = call.gate_step, up_step = call.up_step, dout_step = call.dout_step, step = call.columns;
    const float *gate = call.gate + r * gate_step + c, *up = call.up + r * up_step + c;
    const float *dout = BACK ? call.dout + r * dout_step + c : nullptr;
    const int64_t at = r * step + c;
    float *out = BACK ? call.dup + at : call.out + at, *dgate = BACK ? call.dgate + at : nullptr;
#pragma GCC unroll 1
    for (int i = 0; i < count; i++, gate += gate_step, up += up_step, out += step) {
        vec x = take(gate, n), u = take(up, n);
        soon(gate + TOGETHER * gate_step); soon(up + TOGETHER * up_step);
        if (!BACK) { put<STREAM>(out, F::value(x, w, beta) * u, n); continue; }
        vec d = take(dout, n), y, dx, m[F::MEMBERS + 1], db;
        soon(dout + TOGETHER * dout_step);
        F::gradient(x, w, beta, y, dx, m, db);
        vec g = d * u;
        put<STREAM>(out, d * y, n);
        put<STREAM>(dgate, g * dx, n);
        dout += dout_step; dgate += step;
        for (int k = 0; k < F::MEMBERS; k++) dw[k] += g * m[k];
        if (F::BETA) dbeta += g * db;
    }
    if (!BACK) return;
    for (int k = 0; k < F::MEMBERS; k++, sums += BLOCK) store(sums, load(sums) + dw[k]);
    if (F::BETA) store(sums, load(sums) + dbeta);
}

template <class F, bool BACK, bool STREAM> static void run_unit(const Call &call, const Segment &s, const Unit &unit) {
    const int many = F::MEMBERS + F::BETA;
    const bool summed = BACK && many;
    std::vector<float> sums(summed ? many * BLOCK + WIDTH : 0);
    std::vector<double> totals(summed ? many * BLOCK : 0);
    for (int64_t r = unit.row; r < unit.row_end; r += TOGETHER) {
        int count = (int)std::min<int64_t>(TOGETHER, unit.row_end - r);
        int64_t c = unit.from;
        float *place = sums.data();
        for (; c + WIDTH <= unit.to; c += WIDTH, place += summed * WIDTH)
            column<F, BACK, STREAM>(call, s, r, count, c, WIDTH, place);
        if (c < unit.to) column<F, BACK, STREAM>(call, s, r, count, c, (int)(unit.to - c), place);
        if (summed && ((r + TOGETHER) % EXACT == 0 || r + TOGETHER >= unit.row_end))
            for (int i = 0; i < many * BLOCK; i++) { totals[i] += sums[i]; sums[i] = 0; }
    }
    if (STREAM) __builtin_ia32_sfence();
    if (!summed) return;
    for (int k = 0; k < F::MEMBERS; k++)
        for (int64_t c = unit.from; c < unit.to; c++)
            s.dweights[k * (s.stop - s.start) + c - s.start] = (float)totals[k * BLOCK + c - unit.from];
    if (F::BETA) for (int64_t c = unit.from; c < unit.to; c++) s.dbeta[c - s.start] = (float)totals[F::MEMBERS * BLOCK + c - unit.from];
}

template <class F> static void run_kernel(const Call &call, const Segment &s, const Unit &unit) {
    if (call.dout) call.streaming ? run_unit<F, true, true>(call, s, unit) : run_unit<F, true, false>(call, s, unit);
    else call.streaming ? run_unit<F, false, true>(call, s, unit) : run_unit<F, false, false>(call, s, unit);
}
static void run_segment(const Call &call, const Segment &s, const Unit &unit);  // generated

struct Work {
    const Call *call;
    std::vector<Unit> units;
    std::atomic<size_t> next{0};
    static void take_units(void *all) {
        Work &work = *(Work *)all;
        for (size_t i; (i = work.next++) < work.units.size();)
            run_segment(*work.call, work.call->segment[work.units[i].segment], work.units[i]);
    }
};

// Fresh memory comes in pages of 4 KiB, each a trap into the kernel; ask for large ones before it is touched.
static void large_pages(float *p, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t page = 1 << 21;
    if (bytes < 2 * page) return;
    uintptr_t from = ((uintptr_t)p + page - 1) / page * page, to = ((uintptr_t)p + bytes) / page * page;
    if (p && from < to) madvise((void *)from, to - from, MADV_HUGEPAGE);
#endif
}

// GOMP_parallel, or null: threads are made for this call alone
typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);

extern "C" void glu_run(const Call *call, int64_t threads, Parallel parallel) {
    Work work;
    work.call = call;
    for (float *each : {call->out, call->dgate, call->dup}) large_pages(each, 4 * call->rows * call->columns);
    for (int s = 0; s < call->segments; s++) {
        const Segment &segment = call->segment[s];
        int64_t high = call->dout && (segment.dweights || segment.dbeta) ? call->rows : call->row_block;
        for (int64_t r = 0; r < call->rows; r += high)
            for (int64_t c = segment.start; c < segment.stop; c += call->block)
                work.units.push_back({s, c, std::min(c + call->block, segment.stop), r, std::min(r + high, call->rows)});
    }
    threads = std::min<int64_t>(threads, work.units.size());
    if (threads < 2) Work::take_units(&work);
    else if (parallel) parallel(Work::take_units, &work, (unsigned)threads, 0);
    else {
        std::vector<std::thread> team;
        for (int64_t i = 1; i < threads; i++) team.emplace_back(Work::take_units, (void *)&work);
        Work::take_units(&work);
        for (auto &each : team) each.join();
    }
}
