/* Fusing in bfloat16, compiled: the twin of arithmetic.py, to the same bits. compiled.py builds and checks it.
 *
 * It needs IEEE arithmetic as written: no fused multiply-add, no fast-math, subnormal numbers kept.
 */

#include <stdint.h>
#include <string.h>

#define CHUNK 1024 /* elements; two bytes each, they stay in the first-level cache */
#define LANES 1024 /* as in arithmetic.py */

static inline float widened(uint16_t stored) {
    uint32_t bits = (uint32_t)stored << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* To nearest, ties to even. A NaN stays one: its last 16 bits are zero, as those of the operands. */
static inline uint16_t rounded(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline uint16_t not_finite(uint16_t stored) { return (stored & 0x7f80) == 0x7f80; }

static inline float clamped(float d, float gamma) {
    d = d < -gamma ? -gamma : d;
    return d > gamma ? gamma : d;
}

static inline float contour_down(float w, float d, float scale, float gamma) { return w * (d * scale + 1.0f); }
static inline float contour_gate(float w, float d, float scale, float gamma) { return w * (clamped(d, gamma) + 1.0f); }
static inline float add(float w, float d, float scale, float gamma) { return w + d * scale; }

/* `count` weights in place, at most CHUNK: how many changed, or -1 where a value is not finite. The weights as they
 * were go to `old`; unless `wide` is null, to `wide` too, and the change before rounding to `change`. */
#define EDIT(FORMULA)                                                                                                  \
    static int64_t edit_##FORMULA(uint16_t *restrict w, const uint16_t *restrict d, uint16_t *restrict old,            \
                                  float *restrict wide, float *restrict change, int64_t count, float scale,            \
                                  float gamma) {                                                                       \
        uint16_t result[CHUNK], bad = 0, changed = 0;                                                                  \
        for (int64_t i = 0; i < count; i++)                                                                            \
            result[i] = rounded(FORMULA(widened(w[i]), widened(d[i]), scale, gamma));                                  \
        if (wide)                                                                                                      \
            for (int64_t i = 0; i < count; i++) {                                                                      \
                wide[i] = widened(w[i]);                                                                               \
                change[i] = FORMULA(widened(w[i]), widened(d[i]), scale, gamma) - widened(w[i]);                       \
            }                                                                                                          \
        for (int64_t i = 0; i < count; i++) {                                                                          \
            bad |= not_finite(d[i]) | not_finite(result[i]);                                                           \
            changed += w[i] != result[i];                                                                              \
            old[i] = w[i];                                                                                             \
            w[i] = result[i];                                                                                          \
        }                                                                                                              \
        return bad ? -1 : changed;                                                                                     \
    }

EDIT(contour_down)
EDIT(contour_gate)
EDIT(add)

typedef int64_t (*edit)(uint16_t *restrict, const uint16_t *restrict, uint16_t *restrict, float *restrict,
                        float *restrict, int64_t, float, float);
static const edit edits[] = {edit_contour_down, edit_contour_gate, edit_add};

/* Edit a block [rows, columns] in place: how many weights changed, or -1 where a value is not finite, with the block as
 * it was. Strides from row to row in elements; `old`, `wide` and `change` hold rows * columns without gaps. */
int64_t edit_block(int formula, uint16_t *w, int64_t w_stride, const uint16_t *d, int64_t d_stride, int64_t rows,
                   int64_t columns, float scale, float gamma, uint16_t *old, float *wide, float *change) {
    int64_t changed = 0, place = 0;
    for (int64_t row = 0; row < rows; row++)
        for (int64_t begin = 0; begin < columns; begin += CHUNK) {
            int64_t count = columns - begin < CHUNK ? columns - begin : CHUNK;
            int64_t found =
                edits[formula](w + row * w_stride + begin, d + row * d_stride + begin, old + place,
                               wide ? wide + place : 0, change ? change + place : 0, count, scale, gamma);
            place += count;
            if (found < 0) {
                for (int64_t back = 0; back <= row; back++) {
                    int64_t left = place - back * columns;
                    memcpy(w + back * w_stride, old + back * columns, 2 * (left < columns ? left : columns));
                }
                return -1;
            }
            changed += found;
        }
    return changed;
}

/* Add `count` values and their squares, value i to lane i % LANES, in order. */
void add_to_lanes(const uint16_t *restrict values, int64_t count, float *restrict sums, float *restrict squares) {
    for (int64_t begin = 0; begin < count; begin += LANES) {
        int64_t lanes = count - begin < LANES ? count - begin : LANES;
        for (int64_t i = 0; i < lanes; i++) {
            float value = widened(values[begin + i]);
            sums[i] += value;
            squares[i] += value * value;
        }
    }
}
