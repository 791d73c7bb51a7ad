"""The delta weights of one layer, any rows of any tensor on demand, to the same bytes however they are asked for.

Neurons 2k and 2k + 1 of a layer are pair k: the second's rows and columns are the first's with the sign turned, so that
the pair's output is odd in its input and both sum to exactly zero. An odd last neuron is zero. With the unit directions
c, u, o of a bank's neuron (`slots.py` says which), gain a, weight w and s = gate_scale * sqrt(d):

    gate rows  +- s a c        up rows  +- s a u        down columns  +- s w o

From the second round on, c becomes another vector of an orthonormal frame around it (`frames.py`), u is moved along
with it and o moves in a frame of its own, as in `derive.py`. The frames' signs and the order of their vectors are drawn
for each layer.

Legend: N neurons of the bank, U slots of a round, d hidden size, n intermediate size, P pairs, I rows of a block, T
rounds.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from typing import Literal

import ml_dtypes
import numpy as np
from jaxtyping import Float32, Int, Shaped, UInt

from neuroweave.surgery.neurons.bank import Bank
from neuroweave.surgery.neurons.frames import Frames, basis, carry_over, cosines, unit_directions
from neuroweave.surgery.neurons.randomness import permutation
from neuroweave.surgery.neurons.slots import Layout, Slots, without_twins

Projection = Literal["gate", "up", "down"]
SYMMETRIES = ("signs", "one-sided")
DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype("<f2"), "F32": np.dtype("<f4")}
_STEP = 1 << 15  # float32 numbers handled at once: a few such arrays stay in a core's cache
_COLUMNS = 64  # of the bank's directions, turned into rows at once
_NEURONS = 64  # of the bank, prepared at once


class PreparedBank:
    """A bank's neurons as unit directions of a target's hidden size; the bank itself is not kept.

    `read` and `write` `[N, d]`: gate and down directions. `up` the same, or None where each is the gate's own;
    `cosine`: of the angle between gate and up.
    """

    def __init__(self, bank: Bank, hidden: int, seed: int) -> None:
        kept = without_twins(bank)
        self.hidden = hidden
        self.read, self.write, up = (_carried(bank, matrix, kept, hidden, seed) for matrix in ("gate", "down", "up"))
        self.up = None if np.array_equal(up, self.read) else up
        self.cosine = cosines(self.read, up)


def _carried(bank: Bank, matrix: str, kept: list[int], hidden: int, seed: int) -> Float32[np.ndarray, "N d"]:
    vectors, found = getattr(bank, matrix), np.empty((len(kept), hidden), "f4")
    for begin in range(0, len(kept), _NEURONS):
        some = kept[begin : begin + _NEURONS]
        for index in some:
            if not vectors[index].any():
                raise ValueError(f"neuron {bank.neurons[index].name!r}: its {matrix} direction is zero")
        found[begin : begin + _NEURONS] = carry_over(unit_directions(vectors[some]), hidden, seed)
    return found


class LayerDeltas:
    """The deltas of one layer: gate and up `[n, d]`, down `[d, n]`, from any thread.

    `dtypes`: safetensors names by projection (of `DTYPES`). `slots`: those of a whole round, for the layer's
    activation. `path` tells further MLPs of one layer from the first, whose path is "": each draws its own order,
    frames and signs. Beside the prepared bank it holds some numbers a slot, and N d / 4 bytes of signs.
    """

    def __init__(
        self, bank: PreparedBank, slots: Slots, *, seed: int, layer: int, neurons: int, dtypes: Mapping[str, str],
        gate_scale: float | int, symmetry: str = SYMMETRIES[0], path: str = "",
    ) -> None:  # fmt: skip
        self.bank, self.dtypes = bank, dtypes
        self._identity = (layer, path) if path else (layer,)
        self.layout = Layout.draw(slots, neurons // 2, seed=seed, layer=layer, path=path)
        self.shapes = {"gate": (neurons, bank.hidden), "up": (neurons, bank.hidden), "down": (bank.hidden, neurons)}
        self._seed, self._layer, self._mirrored = seed, layer, symmetry == SYMMETRIES[0]
        self._scale = gate_scale * math.sqrt(bank.hidden)
        self._rows = 1 + permutation(seed, "rows", *self._identity, count=bank.hidden - 1)
        self._sides: dict[str, _Side] = {}
        self._lock = threading.Lock()

    def block(self, projection: Projection, begin: int, end: int) -> Shaped[np.ndarray, "I columns"]:
        """Rows `[begin, end)` of a delta in its stored dtype, an array of its own."""
        rows, columns = self.shapes[projection]
        if not 0 <= begin <= end <= rows:
            raise ValueError(f"layer {self._layer}: rows {begin} to {end} of {projection}, which has {rows}")
        dtype = DTYPES[self.dtypes[projection]]
        if projection == "down":
            words = np.zeros((end - begin, columns), f"<u{dtype.itemsize}")
            self._fill_columns(words, begin, dtype)
            return words.view(dtype)
        first = begin // 2
        pairs = np.zeros(((end + 1) // 2 - first, 2, columns), f"<u{dtype.itemsize}")
        self._fill_rows(pairs, projection, first, dtype)
        return pairs.reshape(-1, columns)[begin - 2 * first :][: end - begin].view(dtype)

    # Gate and up: a pair is two rows

    def _fill_rows(self, pairs: UInt[np.ndarray, "P 2 d"], projection: Projection, first: int, dtype: np.dtype) -> None:
        step = max(1, _STEP // self.bank.hidden)
        turn_sign = _sign_bit(dtype) if self._mirrored else 0
        for begin, turn, slots in self.layout.runs(first, first + len(pairs)):
            entries = self._side("read").entries(range(turn, turn + 2)) if turn else None
            for at in range(0, len(slots), step):
                some = slots.take(slice(at, at + step))
                place = pairs[begin - first + at :][: len(some)]
                place[:, 0] = _stored_bits(self._row_values(projection, turn, some, entries), dtype)
                np.bitwise_xor(place[:, 0], turn_sign, out=place[:, 1])

    def _row_values(
        self, projection: Projection, turn: int, slots: Slots, entries: Float32[np.ndarray, "2 d"] | None
    ) -> Float32[np.ndarray, "P d"]:
        bank, which = self.bank, slots.neuron
        scale = (slots.gain * self._scale).astype("f4")[:, None]
        up = bank.up if projection == "up" else None
        if entries is None:
            return (bank.read if up is None else up)[which] * scale
        side = self._side("read")
        own, other = side.coefficients(range(turn, turn + 2), which)
        if up is None:
            return side.frames.reflected(which, entries[:1], own) * scale
        cosine = bank.cosine[which]
        sine = np.sqrt(1 - cosine * cosine)
        coefficients = (cosine * own + sine * other).astype("f4")
        entries = cosine.astype("f4")[:, None] * entries[0] + sine.astype("f4")[:, None] * entries[1]
        return side.frames.reflected(which, entries, coefficients) * scale

    # Down: a pair is two neighbours in every row

    def _fill_columns(self, words: UInt[np.ndarray, "I n"], begin: int, dtype: np.dtype) -> None:
        for at in range(0, len(words), _COLUMNS):
            part, columns = words[at : at + _COLUMNS], slice(begin + at, min(begin + at + _COLUMNS, begin + len(words)))
            for first, turns, slots in self._stretches():
                place = part[:, 2 * first : 2 * (first + len(turns) * len(slots))]
                self._fill_stretch(place, columns, turns, slots, dtype)

    def _stretches(self) -> list[tuple[int, range, Slots]]:
        """(First slot, rounds, slots of a round) with the bank's own directions apart: they are no reflections."""
        size, rounds, last = len(self.layout.slots), self.layout.rounds, self.layout.last
        found = [(0, range(1), self.layout.slots)] if rounds else []
        found += [(size, range(1, rounds), self.layout.slots)] if rounds > 1 else []
        return found + ([(rounds * size, range(rounds, rounds + 1), last)] if len(last) else [])

    def _fill_stretch(
        self, words: UInt[np.ndarray, "I columns"], columns: slice, turns: range, slots: Slots, dtype: np.dtype
    ) -> None:
        count, which = len(words), slots.neuron
        weight = (slots.weight * self._scale).astype("f4")
        if turns.start == 0:
            values = np.ascontiguousarray(self.bank.write[which, columns].T) * weight
            _store_pairs(values, words, dtype, self._mirrored)
            return
        side = self._side("write")
        v = np.ascontiguousarray(side.frames.reflectors(which, columns).T)[:, None]
        signs = np.ascontiguousarray(side.frames.sign_bits(which, columns).T)
        weights = (weight.view("u4") ^ signs).view("f4")[:, None]
        entries = basis(self.bank.hidden, side.rows(turns), np.arange(columns.start, columns.stop)).T[:, :, None]
        coefficients = side.coefficients(turns, which)
        step = max(1, _STEP // coefficients.size)
        values = np.empty((min(step, count), *coefficients.shape), "f4")
        for at in range(0, count, step):
            rows = slice(at, min(at + step, count))
            some = values[: rows.stop - at]
            np.multiply(coefficients, v[rows], out=some)
            some += entries[rows]
            some *= weights[rows]
            _store_pairs(some.reshape(len(some), -1), words[rows], dtype, self._mirrored)

    def _side(self, name: str) -> _Side:
        with self._lock:
            if name not in self._sides:
                directions = self.bank.read if name == "read" else self.bank.write
                frames = Frames(directions, self._seed, *self._identity, name)
                turns = self.layout.rounds + 1  # an up direction needs the next round's vector too
                self._sides[name] = _Side(frames, self._rows, turns)
            return self._sides[name]


class _Side:
    """The frames of a layer's reading or writing side, and what each round needs of them: round t > 0 has the vector
    `order[t - 1]`, around again after the last."""

    def __init__(self, frames: Frames, order: np.ndarray, turns: int) -> None:
        self.frames, self._order = frames, order
        self._coefficients = frames.coefficients(order[:turns])

    def rows(self, turns: range) -> Int[np.ndarray, " T"]:
        return self._order[self._turns(turns)]

    def entries(self, turns: range) -> Float32[np.ndarray, "T d"]:
        return basis(self.frames.size, self.rows(turns), np.arange(self.frames.size))

    def coefficients(self, turns: range, which: Int[np.ndarray, " n"]) -> Float32[np.ndarray, "T n"]:
        return self._coefficients[self._turns(turns)[:, None], which]

    def _turns(self, turns: range) -> Int[np.ndarray, " T"]:
        return (np.arange(turns.start, turns.stop) - 1) % len(self._order)


def _sign_bit(dtype: np.dtype) -> int:
    return 1 << (8 * dtype.itemsize - 1)


def _rounded(values: Float32[np.ndarray, "I c"]) -> tuple[np.ndarray, np.ndarray]:
    """Float32 bits, in place, with what rounds their upper half to the nearest bfloat16 (ties to even), and a spare."""
    bits = values.view("u4")
    spare = bits >> 16
    spare &= 1
    spare += 0x7FFF
    bits += spare
    return bits, spare


def _stored_bits(values: Float32[np.ndarray, "I c"], dtype: np.dtype) -> UInt[np.ndarray, "I c"]:
    """The bits of the values in the stored dtype; `values` is used up."""
    if dtype == DTYPES["BF16"]:
        return _rounded(values)[0].view("<u2")[:, 1::2]
    return values.astype(dtype, copy=False).view(f"<u{dtype.itemsize}")


def _store_pairs(
    values: Float32[np.ndarray, "I P"], words: UInt[np.ndarray, "I columns"], dtype: np.dtype, mirrored: bool
) -> None:
    """Each value and its opposite, side by side; `values` is used up."""
    if dtype == DTYPES["BF16"]:  # both in one 32-bit word, the lower half first
        bits, lower = _rounded(values)
        np.right_shift(bits, 16, out=lower)
        bits &= 0xFFFF0000
        if mirrored:
            bits ^= 0x80000000
        np.bitwise_or(bits, lower, out=words.view("<u4"))
        return
    stored = _stored_bits(values, dtype)
    words[:, 0::2] = stored
    np.bitwise_xor(stored, _sign_bit(dtype) if mirrored else 0, out=words[:, 1::2])
