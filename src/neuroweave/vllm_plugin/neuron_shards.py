"""An activation on the neurons of one rank, where tensor parallelism gives each rank an equal run of them.

Elementwise activations are the same everywhere; a mixture by segments, or one learned per neuron, is cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neuroweave.activations.mixtures import NeuronMixture, SegmentMixture
from neuroweave.activations.torch import Activation


@dataclass(frozen=True)
class Shard:
    """Part number `index` of `parts` equal ones."""

    index: int = 0
    parts: int = 1


WHOLE = Shard()


def on_shard(activation: nn.Module, neurons: int | None, shard: Shard) -> nn.Module:
    """`activation`, made for `neurons` in all, on those of the shard alone; what it is given may be reused.

    A learned mixture keeps the names of its parameters, which take the shard's rows of what is loaded. Segments get
    their sizes, so that they refuse another width. Raises ValueError where the neurons are not known or do not divide.
    """
    if shard.parts == 1 and not (neurons and isinstance(activation, SegmentMixture)):
        return activation
    if isinstance(activation, Activation):
        return activation
    if isinstance(activation, NeuronMixture):
        neurons = len(activation.gating_logits)
    elif not isinstance(activation, SegmentMixture):
        raise ValueError(f"{type(activation).__name__} cannot be cut into {shard.parts} parts")
    if neurons is None or neurons % shard.parts:
        raise ValueError(f"{neurons or 'an unknown number of'} neurons cannot be cut into {shard.parts} equal parts")
    size = neurons // shard.parts
    if isinstance(activation, SegmentMixture):
        return cut_segments(activation, neurons, shard.index * size, size)
    return cut_mixture(activation, size, shard)


def cut_segments(activation: SegmentMixture, neurons: int, start: int, size: int) -> nn.Module:
    """The segments that neurons `start` to `start + size` lie in; a single one is its member."""
    members, sizes, at = [], [], 0
    for member, length in zip(activation.members, activation.segment_sizes(neurons), strict=True):
        inside = min(at + length, start + size) - max(at, start)
        if inside > 0:
            members.append(member)
            sizes.append(inside)
        at += length
    return members[0] if len(members) == 1 else SegmentMixture(members, sizes=sizes)


def cut_mixture(activation: NeuronMixture, size: int, shard: Shard) -> NeuronMixture:
    cut = NeuronMixture(
        list(activation.members),
        neurons=size,
        neutral=activation.neutral,
        start_logit=activation.start_logit,
        hard=activation.hard,
    )
    for parameter in cut.parameters(recurse=False):
        load: Any = RowsLoader(shard.index * size, size)
        parameter.weight_loader = load  # type: ignore[attr-defined]  # vLLM asks a parameter how it is loaded
    return cut


@dataclass(frozen=True)
class RowsLoader:
    """Puts rows `start` to `start + size` of a stored tensor into a parameter."""

    start: int
    size: int

    def __call__(self, parameter: Tensor, stored: Tensor) -> None:
        with torch.no_grad():
            parameter.data.copy_(stored[self.start : self.start + self.size])
