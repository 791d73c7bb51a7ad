"""Which pair of a layer's neurons holds which neuron of a bank.

A layer of m neurons has m // 2 slots, one for a sign-symmetric pair each. Every neuron of the bank (a mirrored twin
does not count) takes one slot, a defined neuron as many as its function needs, in an order drawn for the layer: a
round. When all have been placed the next round begins, in which the neurons point elsewhere (`layer_deltas.py`). A
group that no longer fits into the last round gives way to smaller ones; slots that nothing fits are zero.

Legend: U slots of a round.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float32, Int

from neuroweave.surgery.neurons.bank import Bank, Neuron
from neuroweave.surgery.neurons.pair_fit import PairFit, PiecewiseLinear, fit_pairs
from neuroweave.surgery.neurons.randomness import permutation

_LARGEST = float(np.finfo("f4").max)


@dataclass(frozen=True)
class Slots:
    """Slot i is the pair of `neuron[i]` at `gain[i]`, its down columns times `weight[i]`."""

    neuron: Int[np.ndarray, " U"]
    gain: Float32[np.ndarray, " U"]
    weight: Float32[np.ndarray, " U"]

    def take(self, which: slice | Int[np.ndarray, " n"]) -> Slots:
        return Slots(self.neuron[which], self.gain[which], self.weight[which])

    def __len__(self) -> int:
        return len(self.neuron)


@dataclass(frozen=True)
class Realised:
    """How a behaviour is realised with an activation. `name`: the first neuron that has it; `neurons`: how many do."""

    name: str
    neurons: int
    activation: str
    fit: PairFit
    tolerance: float


def without_twins(bank: Bank) -> list[int]:
    """The neurons that take slots: all but those whose mirrored twin is in the bank too."""
    names = {neuron.name for neuron in bank.neurons}
    return [
        index
        for index, neuron in enumerate(bank.neurons)
        if neuron.origin.get("operation") != "mirrored" or neuron.origin.get("parent") not in names
    ]


def expand(neurons: Sequence[Neuron], activation: str) -> tuple[Slots, list[Realised]]:
    """The slots of a round, in the order of the neurons, and how each of their behaviours is realised.

    Raises ValueError, with the neuron's name, for a behaviour that misses its tolerance.
    """
    rows: list[tuple[int, float, float]] = []
    realised: dict[PiecewiseLinear, Realised] = {}
    for index, neuron in enumerate(neurons):
        gain = float(neuron.origin.get("gain", 1.0))
        if neuron.behaviour is None:
            rows.append((index, gain, 1.0))
            continue
        try:
            behaviour = PiecewiseLinear.from_dict(neuron.behaviour)
            fit = fit_pairs(behaviour, activation)
        except ValueError as error:
            raise ValueError(f"neuron {neuron.name!r}: {error}") from error
        first = realised.get(behaviour, Realised(neuron.name, 0, activation, fit, behaviour.tolerance))
        realised[behaviour] = replace(first, neurons=first.neurons + 1)
        rows += [(index, gain * own, weight) for own, weight in zip(fit.gains, fit.weights, strict=True)]
    for index, *factors in rows:
        if not max(map(abs, factors)) <= _LARGEST:
            raise ValueError(
                f"neuron {neurons[index].name!r}: gain {factors[0]:g} or weight {factors[1]:g} is no float32"
            )
    neuron_of, gains, weights = zip(*rows, strict=True)
    return Slots(np.array(neuron_of), np.array(gains, "f4"), np.array(weights, "f4")), list(realised.values())


@dataclass(frozen=True)
class Layout:
    """A layer's slots: `rounds` whole rounds of `slots`, then `last`, then zeros."""

    slots: Slots
    rounds: int
    last: Slots

    @property
    def pairs(self) -> int:
        """How many slots are filled."""
        return self.rounds * len(self.slots) + len(self.last)

    @classmethod
    def draw(cls, slots: Slots, pairs: int, *, seed: int, layer: int, path: str = "") -> Layout:
        """The layout of a layer's MLP with room for `pairs` pairs. `path`: "" for the first MLP of the layer."""
        count = int(slots.neuron.max()) + 1
        place = np.empty(count, "i8")
        identity = (layer, path) if path else (layer,)
        place[permutation(seed, "slots", *identity, count=count)] = np.arange(count)
        ordered = slots.take(np.argsort(place[slots.neuron], kind="stable"))
        rounds, room = divmod(pairs, len(ordered))
        firsts = [*np.flatnonzero(np.diff(ordered.neuron, prepend=-1)).tolist(), len(ordered)]
        last: list[int] = []
        for first, end in itertools.pairwise(firsts):
            if end - first <= room - len(last):
                last += range(first, end)
        return cls(ordered, rounds, ordered.take(np.array(last, "i8")))

    def runs(self, begin: int, end: int) -> list[tuple[int, int, Slots]]:
        """The filled slots of `[begin, end)` as (number of the first, round, slots), each run of one round."""
        whole, found = self.rounds * len(self.slots), []
        end = min(end, self.pairs)
        while begin < end:
            turn = min(begin // len(self.slots), self.rounds)
            slots, start = (self.slots, turn * len(self.slots)) if begin < whole else (self.last, whole)
            stop = min(end, start + len(slots))
            found.append((begin, turn, slots.take(slice(begin - start, stop - start))))
            begin = stop
        return found
