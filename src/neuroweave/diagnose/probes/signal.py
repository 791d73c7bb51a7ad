"""Norms and sparsity by layer, from the forward passes of another measurement: hooks that look and change nothing.

Nothing is kept per token: what one window yields goes into sums per unit of text, in float64. The last position of a
window predicts nothing in it and is left out everywhere. Norms keep the first position apart; the shares and neurons of
`Activations` count it as any other.

Dimensions: units (passages of text), places (where norms are taken), layers (that have a down projection), neurons.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuroweave.diagnose.bootstrap import Bootstrap
from neuroweave.diagnose.probes.anatomy import Anatomy, find_anatomy
from neuroweave.diagnose.results.signal import Activations, Norms, Signal, SignalDifference

NEAR_ZERO = 0.01  # of the root mean square


@dataclass(frozen=True, eq=False)
class Place:
    """Where norms are taken: at the input of `module`, or at its output. A place keeps no module in memory."""

    name: str
    layer: int | None
    module: weakref.ref[nn.Module]
    output: bool = False


@dataclass(frozen=True, eq=False)
class Activity:
    """What one down projection was given in one window, reduced on the device."""

    norms: Tensor  # [tokens]
    zeros: Tensor  # numbers that are exactly zero
    near_zeros: Tensor
    largest: Tensor  # [neurons], of the absolute value


@dataclass(eq=False)
class Seen:
    """What the hooks saw in the pass that runs or ran last. None: not readable as one row per token, or seen twice."""

    tokens: int = 0  # of the window, its last position included
    batch: int = 0
    norms: dict[int, Tensor | None] = field(default_factory=dict)
    activities: dict[int, Activity | None] = field(default_factory=dict)


class SignalTally:
    """Sums of one model's signal over windows of `units` units of text.

    `with tally.attached(): ...` around the forward passes, one window [1, T] each, and `tally.add(unit)` after each of
    them. What cannot be read is left out of the result; `notes` say so.
    """

    def __init__(self, model: nn.Module, *, units: int) -> None:
        anatomy = find_anatomy(model)
        # The tally outlives its model, whose weights would stay with any module that is kept here.
        self.embedding = None if anatomy.embedding is None else weakref.ref(anatomy.embedding)
        self.layers, self.unfound = len(anatomy.layers), anatomy.notes
        self.places = find_places(anatomy)
        self.downs = {
            number: weakref.ref(layer.down) for number, layer in enumerate(anatomy.layers) if layer.down is not None
        }
        self.seen = Seen()
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {
            "tokens": ((units,), np.int64),  # positions but the first
            "windows": ((units,), np.int64),  # first positions
            "norm_sums": ((units, len(self.places)), np.float64),
            "norm_squares": ((len(self.places),), np.float64),
            "first_sums": ((len(self.places),), np.float64),
            "unread_places": ((len(self.places),), np.bool_),
            "zeros": ((units, len(self.downs)), np.int64),
            "near_zeros": ((units, len(self.downs)), np.int64),
            "squares": ((len(self.downs),), np.float64),  # of all numbers that a down projection was given
            "unread_downs": ((len(self.downs),), np.bool_),
        }
        self.sums = {name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}
        self.largest: dict[int, np.ndarray] = {}  # by layer: [neurons]

    @property
    def units(self) -> int:
        return len(self.sums["tokens"])

    @property
    def notes(self) -> list[str]:
        """What the result leaves out, and why."""
        notes = list(self.unfound)
        unread = [place for place, bad in zip(self.places, self.sums["unread_places"], strict=True) if bad]
        names = sorted({place.name for place in unread})
        if names:
            notes.append(f"norms that did not come as one vector per token and pass are left out: {', '.join(names)}")
        layers = [str(layer) for layer, bad in zip(self.downs, self.sums["unread_downs"], strict=True) if bad]
        if layers:
            notes.append(
                f"down projections that were not called once per pass are left out: layers {', '.join(layers)}"
            )
        if self.places and self.sums["windows"].any() and not self.sums["tokens"].any():
            notes.append("norms are left out: no window is longer than its first prediction")
        return notes

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks on the model inside; none is left afterwards, whatever happened."""
        with ExitStack() as stack:
            if self.places and self.embedding is not None:
                stack.callback(living(self.embedding).register_forward_pre_hook(self._open).remove)
            for index, place in enumerate(self.places):
                if place.output:
                    handle = living(place.module).register_forward_hook(functools.partial(self._see_output, index))
                else:
                    see = functools.partial(self._see_input, index)
                    handle = living(place.module).register_forward_pre_hook(see, with_kwargs=True)
                stack.callback(handle.remove)
            for index, down in enumerate(self.downs.values()):
                handle = living(down).register_forward_pre_hook(
                    functools.partial(self._see_down, index), with_kwargs=True
                )
                stack.callback(handle.remove)
            yield

    def _open(self, module: nn.Module, args: Any) -> None:
        """Token ids [batch, tokens] go into the embedding: a pass begins."""
        batch, tokens = args[0].shape[:2]
        self.seen = Seen(tokens, batch)

    def _see_input(self, index: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._see_norms(index, given_states(args, kwargs))

    def _see_output(self, index: int, module: nn.Module, args: Any, output: Any) -> None:
        self._see_norms(index, first_tensor(output))

    def _see_norms(self, index: int, states: Tensor | None) -> None:
        once(self.seen.norms, index, token_norms(predicting(states, self.seen.tokens)))

    def _see_down(self, index: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        rows = predicting(given_states(args, kwargs), self.seen.tokens)
        once(self.seen.activities, index, None if rows is None else activity(rows))

    def add(self, unit: int) -> None:
        """Fold the last pass, one window of `unit`, into the sums. Raises ValueError if it was no window [1, T]."""
        if not self.places:
            return
        seen, self.seen = self.seen, Seen()
        if seen.batch != 1 or seen.tokens < 2:
            raise ValueError(
                "expected one forward pass of one window of two tokens or more before add(), got a batch of "
                f"{seen.batch} with {seen.tokens} tokens; run the windows one by one, inside attached()"
            )
        sums = self.sums
        sums["windows"][unit] += 1
        sums["tokens"][unit] += seen.tokens - 2
        for index in range(len(self.places)):
            norms = seen.norms.get(index)
            if norms is None:
                sums["unread_places"][index] = True
                continue
            values = norms.float().cpu().numpy().astype(np.float64)
            sums["first_sums"][index] += values[0]
            sums["norm_sums"][unit, index] += values[1:].sum()
            sums["norm_squares"][index] += (values[1:] ** 2).sum()
        for index, layer in enumerate(self.downs):
            self._add_activity(unit, index, layer, seen.activities.get(index))

    def _add_activity(self, unit: int, index: int, layer: int, seen: Activity | None) -> None:
        if seen is None:
            self.sums["unread_downs"][index] = True
            return
        self.sums["zeros"][unit, index] += int(seen.zeros)
        self.sums["near_zeros"][unit, index] += int(seen.near_zeros)
        self.sums["squares"][index] += (seen.norms.float().cpu().numpy().astype(np.float64) ** 2).sum()
        largest = seen.largest.float().cpu().numpy().astype(np.float64)
        self.largest[layer] = np.maximum(self.largest.get(layer, 0.0), largest)

    def arrays(self) -> dict[str, np.ndarray]:
        """The complete state, to be given to `restore`; copies."""
        largest = {f"largest.{layer}": values for layer, values in self.largest.items()}
        return {name: values.copy() for name, values in (self.sums | largest).items()}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Go on from the state of another run on the same model and text. Raises ValueError where it is of another."""
        for name, values in self.sums.items():
            if name not in arrays or arrays[name].shape != values.shape:
                got = arrays[name].shape if name in arrays else "nothing"
                raise ValueError(
                    f"the stored signal is of another model or text: {name!r} is {got}, expected {values.shape}; "
                    "measure again from the start"
                )
        self.sums = {name: np.array(arrays[name], dtype=values.dtype) for name, values in self.sums.items()}
        prefix = "largest."
        self.largest = {
            int(name.removeprefix(prefix)): np.array(values)
            for name, values in arrays.items()
            if name.startswith(prefix)
        }

    def result(self, bootstrap: Bootstrap) -> Signal:
        """The model's signal with intervals over units."""
        depths = self.depths
        norms = self._norms(bootstrap)
        growth = bootstrap.statistic(mean_growth, *self.mean_norms) if depths else []
        after = self.layers + 1
        return Signal(
            inputs=[norms[index] for index in depths],
            growth=growth,
            norms=[found for index, found in norms.items() if index >= after],
            activations=self._activations(bootstrap),
        )

    @property
    def depths(self) -> list[int]:
        """Indices of the places before each layer and after the last; empty where one of them could not be read."""
        indices = list(range(self.layers + 1)) if self.places else []
        return [] if self.sums["unread_places"][: len(indices)].any() or not self.sums["tokens"].any() else indices

    @property
    def mean_norms(self) -> tuple[np.ndarray, np.ndarray]:
        """(sums [units, depths], counts [units, 1]) of the norms between layers, for the bootstrap."""
        return self.sums["norm_sums"][:, self.depths], self.sums["tokens"].astype(np.float64)[:, None]

    @property
    def active(self) -> list[int]:
        """Indices, in `downs`, of the layers that were read."""
        unread = self.sums["unread_downs"]
        return [index for index, layer in enumerate(self.downs) if layer in self.largest and not unread[index]]

    @property
    def active_layers(self) -> dict[int, int]:
        """Layer to number of neurons, of the layers that were read."""
        layers = list(self.downs)
        return {layers[index]: len(self.largest[layers[index]]) for index in self.active}

    def shares(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(sums [units, active layers], counts) of `zeros` or `near_zeros`, for the bootstrap."""
        positions = self.sums["tokens"] + self.sums["windows"]
        neurons = np.array(list(self.active_layers.values()), dtype=np.float64)
        return self.sums[name][:, self.active].astype(np.float64), positions[:, None] * neurons

    def _norms(self, bootstrap: Bootstrap) -> dict[int, Norms]:
        """By index in `places`, without those that could not be read."""
        tokens, windows = self.sums["tokens"].astype(np.float64), self.sums["windows"]
        total = tokens.sum()
        if not total:
            return {}
        means = bootstrap.statistic(np.divide, self.sums["norm_sums"], tokens[:, None])
        variances = self.sums["norm_squares"] / total - (self.sums["norm_sums"].sum(0) / total) ** 2
        deviations = np.sqrt(np.maximum(variances, 0.0))
        firsts = self.sums["first_sums"] / windows.sum()
        return {
            index: Norms(
                place=place.name,
                layer=place.layer,
                mean=means[index],
                deviation=float(deviations[index]),
                first=float(firsts[index]),
            )
            for index, place in enumerate(self.places)
            if not self.sums["unread_places"][index]
        }

    def _activations(self, bootstrap: Bootstrap) -> list[Activations]:
        if not self.active:
            return []
        zero, near_zero = (bootstrap.statistic(np.divide, *self.shares(name)) for name in ("zeros", "near_zeros"))
        mean_squares = self.sums["squares"][self.active] / self.shares("zeros")[1].sum(0)
        limits = NEAR_ZERO * np.sqrt(mean_squares)
        found = []
        for column, (layer, neurons) in enumerate(self.active_layers.items()):
            largest = self.largest[layer]
            found.append(
                Activations(
                    layer=layer,
                    neurons=neurons,
                    zero=zero[column],
                    near_zero=near_zero[column],
                    dead=int((largest == 0).sum()),
                    nearly_dead=int(((largest < limits[column]) | (largest == 0)).sum()),
                )
            )
        return found


def signal_difference(base: SignalTally, other: SignalTally, bootstrap: Bootstrap) -> SignalDifference:
    """Other against base on the same text. Raises ValueError if they have not counted the same."""
    for name in ("tokens", "windows"):
        if base.places and other.places and not np.array_equal(base.sums[name], other.sums[name]):
            raise ValueError("the signals are of different texts; measure both models on the same windows")
    ratio, zero, near_zero = [], [], []
    if len(base.depths) == len(other.depths) > 0:
        ratio = bootstrap.statistic(mean_ratio, *other.mean_norms, *base.mean_norms)
    if base.active and list(base.active_layers) == list(other.active_layers):
        zero, near_zero = (
            bootstrap.statistic(mean_difference, *other.shares(name), *base.shares(name))
            for name in ("zeros", "near_zeros")
        )
    return SignalDifference(input_ratio=ratio, zero=zero, near_zero=near_zero)


def quotient(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    """over / under; equal numbers give 1, two zeros too."""
    equal = over == under
    return np.where(equal, 1.0, over / np.where(equal, 1.0, under))


# Functions of totals over units, for the bootstrap: sums, then the counts that go with them.


def mean_growth(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    means = sums / counts
    return quotient(means[:, 1:], means[:, :-1])


def mean_ratio(sums: np.ndarray, counts: np.ndarray, base_sums: np.ndarray, base_counts: np.ndarray) -> np.ndarray:
    return quotient(sums / counts, base_sums / base_counts)


def mean_difference(sums: np.ndarray, counts: np.ndarray, base_sums: np.ndarray, base_counts: np.ndarray) -> np.ndarray:
    return sums / counts - base_sums / base_counts


# ------------------------------------------------------------------------------------------------- reading one pass


def living(module: weakref.ref[nn.Module]) -> nn.Module:
    found = module()
    if found is None:
        raise ValueError("the model of this signal was let go; count on a model that is in memory")
    return found


def find_places(anatomy: Anatomy) -> list[Place]:
    """Before each layer, after the last, before each norm of each layer, before the final norm."""
    layers = anatomy.layers
    if not layers:
        return []
    places = [Place("layer input", number, weakref.ref(layer.module)) for number, layer in enumerate(layers)]
    places.append(Place("layer input", None, weakref.ref(layers[-1].module), output=True))
    places += [
        Place(name, number, weakref.ref(norm))
        for number, layer in enumerate(layers)
        for name, norm in layer.norms.items()
    ]
    if anatomy.final_norm is not None:
        places.append(Place("final norm", None, weakref.ref(anatomy.final_norm)))
    return places


def given_states(args: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
    """The hidden states that a module is called with."""
    states = first_tensor(args)
    return first_tensor([kwargs.get("hidden_states"), *kwargs.values()]) if states is None else states


def first_tensor(value: Any) -> Tensor | None:
    """The first floating point tensor of a module's inputs or outputs: the hidden states."""
    if isinstance(value, Tensor):
        return value.detach() if value.is_floating_point() else None
    if isinstance(value, tuple | list):
        return next((found for each in value if (found := first_tensor(each)) is not None), None)
    return None


def predicting(states: Tensor | None, tokens: int) -> Tensor | None:
    """The positions that predict [tokens - 1, width] of [1, tokens, width] or [tokens, width]; None of other shapes."""
    if states is None or tokens < 2 or states.ndim < 2 or states.shape.numel() != tokens * states.shape[-1]:
        return None
    return states.reshape(tokens, states.shape[-1])[:-1]


def once(seen: dict[int, Any], index: int, value: Any) -> None:
    """Note what was seen at a place; a second time in one pass makes it unreadable."""
    seen[index] = None if index in seen else value


def token_norms(rows: Tensor | None) -> Tensor | None:
    """Euclidean norm of each row [tokens], in float32 at least."""
    if rows is None:
        return None
    return torch.linalg.vector_norm(rows, dim=-1, dtype=torch.promote_types(rows.dtype, torch.float32))


def activity(rows: Float[Tensor, "tokens neurons"]) -> Activity:
    """Counts and sizes of what a down projection was given.

    Near zero: below 1 % of the root mean square of the same token's neurons, exact zeros included (so that a token
    whose neurons are all zero counts as both).
    """
    norms = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.promote_types(rows.dtype, torch.float32))
    magnitudes = rows.abs()
    limits = (norms * (NEAR_ZERO / rows.shape[-1] ** 0.5)).clamp_min(torch.finfo(norms.dtype).tiny)
    return Activity(
        norms=norms,
        zeros=rows.numel() - torch.count_nonzero(magnitudes),
        near_zeros=torch.count_nonzero(magnitudes < limits[:, None]),
        largest=magnitudes.amax(0),
    )
