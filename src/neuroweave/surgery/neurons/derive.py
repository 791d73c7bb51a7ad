"""Derivative neurons: what a source neuron gives when it is mirrored, scaled, or moved to another direction.

With a source neuron (g, u, o), lengths |g|, |u|, |o| and gain a:

    mirrored  (-g, -u, -o)                       the other half of a sign-symmetric pair
    scaled    (a g, a u, o)                      the same direction, met earlier (a > 1) or later on the activation
    moved     (a |g| f_j, a |u| (cos f_j + sin f_k), |o| e_j)

f is an orthonormal frame around g and e one around o (`frames.py`), j and k > 0 two of its vectors, cos the cosine of
the angle between g and u. Gate and up read the same thing, the normed residual stream, so both are moved by one
orthogonal map: the angle between them stays, and with it the distribution of act(g.x) * (u.x) over inputs without a
preferred direction. Down writes somewhere else, into the stream before norm and norm weight, where reading coordinates
mean nothing; it has a frame of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from neuroweave import __version__
from neuroweave.surgery.neurons.bank import DERIVATIVE, SOURCE, Bank, Neuron
from neuroweave.surgery.neurons.frames import Frames, cosines, unit_directions
from neuroweave.surgery.neurons.randomness import permutation

PER_SOURCE = 8
GAINS = (0.5, 1.0, 2.0)

_Made = tuple[Neuron, np.ndarray, np.ndarray, np.ndarray]


def derive_bank(
    bank: Bank, *, seed: int = 42, per_source: int = PER_SOURCE, gains: Sequence[float | int] = GAINS
) -> Bank:
    """The source neurons of `bank`, each followed by `per_source` derivatives of it.

    In this order: one mirrored, one scaled for each of `gains` that is not 1, then moved ones, whose gains go round
    `gains`. A derivative carries its parent's statistics, marked `"statistics": "inherited"` in its origin; measured
    curves and moments stay with the parent. The same seed gives the same bytes.
    Raises ValueError for a bank that holds derivatives already, and for numbers that mean nothing.
    """
    if per_source < 0:
        raise ValueError(f"per_source {per_source}: expected 0 or more derivatives for each source neuron")
    if not gains or not all(math.isfinite(gain) and gain > 0 for gain in gains):
        raise ValueError(f"gains {list(gains)}: expected numbers above 0, one at least")
    for neuron in bank.neurons:
        if neuron.kind != SOURCE:
            raise ValueError(f"neuron {neuron.name!r} is a derivative already; derive from the bank of source neurons")
    if not len(bank):
        raise ValueError("the bank has no neurons; there is nothing to derive from")
    if bank.hidden_size < 3:
        raise ValueError(f"hidden size {bank.hidden_size}: there is nowhere to move to; expected 3 or more")
    _check_lengths(bank, gains)
    made: list[_Made] = [each for index in range(len(bank)) for each in _family(bank, index, seed, per_source, gains)]
    provenance = {
        "neuroweave": __version__,
        "operation": "derive",
        "activation": bank.provenance.get("activation"),
        "hidden_size": bank.hidden_size,
        "seed": seed,
        "per_source": per_source,
        "gains": list(gains),
        "sources": {"sha256": bank.sha256, "neurons": len(bank), **bank.provenance},
    }
    neurons, gate, up, down = zip(*made, strict=True)
    return Bank(np.stack(gate), np.stack(up), np.stack(down), list(neurons), provenance)


def _check_lengths(bank: Bank, gains: Sequence[float | int]) -> None:
    """Raise ValueError for a gain with which a direction, or the gain itself, leaves what float32 holds in full."""
    limits = np.finfo("f4")
    smallest, largest = float(limits.tiny), float(limits.max)
    for gain in gains:
        if not smallest <= gain <= largest:
            raise ValueError(f"gain {gain:g}: expected {smallest:.2g} to {largest:.2g}, which float32 holds")
    for matrix, scales in (("gate", gains), ("up", gains), ("down", (1.0,))):
        wide = getattr(bank, matrix).astype("f8")
        peaks, lengths = np.abs(wide).max(axis=1), np.linalg.norm(wide, axis=1)
        for gain in scales:
            bad = (peaks > 0) & ((peaks * gain < smallest) | (lengths * gain > largest))
            if bad.any():
                name, length = bank.neurons[int(bad.argmax())].name, lengths[bad.argmax()]
                raise ValueError(
                    f"neuron {name!r}: its {matrix} direction has length {length:.3g}, which gain {gain:g} takes out "
                    "of float32; take another gain"
                )


def _family(bank: Bank, index: int, seed: int, per_source: int, gains: Sequence[float | int]) -> Iterator[_Made]:
    """A source neuron and its derivatives."""
    source, gate, up, down = bank.neurons[index], bank.gate[index], bank.up[index], bank.down[index]
    yield source, gate, up, down
    steps = [("mirrored", 1.0), *(("scaled", float(gain)) for gain in gains if gain != 1)][:per_source]
    for operation, gain in steps:
        sign = np.float32(-1 if operation == "mirrored" else 1)
        scale = sign * np.float32(gain)
        yield _child(source, operation, gain), scale * gate, scale * up, sign * down
    moved = per_source - len(steps)
    if moved:
        yield from _moved(bank, index, seed, [float(gains[count % len(gains)]) for count in range(moved)])


def _moved(bank: Bank, index: int, seed: int, gains: Sequence[float | int]) -> Iterator[_Made]:
    source = bank.neurons[index]
    try:
        g, u, o = (unit_directions(matrix[[index]]) for matrix in (bank.gate, bank.up, bank.down))
    except ValueError as error:
        raise ValueError(f"neuron {source.name!r}: one of its directions is zero; it cannot be moved") from error
    lengths = [_length(matrix[index]) for matrix in (bank.gate, bank.up, bank.down)]
    cosine = float(cosines(g, u)[0])
    sine = math.sqrt(1 - cosine * cosine)
    others = 1 + permutation(seed, "derive", source.name, "rows", count=bank.hidden_size - 1)
    turns = np.arange(len(gains) + 1) % len(others)
    read = Frames(g, seed, "derive", source.name, "read").vectors(0, others[turns])
    write = Frames(o, seed, "derive", source.name, "write").vectors(0, others[turns[:-1]])
    for count, gain in enumerate(gains):
        row = int(others[turns[count]])
        up = np.float32(cosine) * read[count] + np.float32(sine) * read[count + 1]
        yield (
            _child(source, "moved", gain, number=count + 1, frame_vector=row),
            np.float32(gain * lengths[0]) * read[count],
            np.float32(gain * lengths[1]) * up,
            np.float32(lengths[2]) * write[count],
        )


def _child(source: Neuron, operation: str, gain: float, number: int = 0, **more: int) -> Neuron:
    suffix = {"mirrored": "mirrored", "scaled": f"scaled-{gain:g}"}.get(operation, f"moved-{number}")
    origin = {"parent": source.name, "operation": operation, "gain": gain, **more, "statistics": "inherited"}
    return Neuron(f"{source.name}/{suffix}", DERIVATIVE, origin, source.behaviour, source.statistics)


def _length(vector: np.ndarray) -> float:
    """Euclidean length, with every product and the sum rounded once: the same on every machine."""
    return math.sqrt(math.fsum((vector.astype("f8") ** 2).tolist()))
