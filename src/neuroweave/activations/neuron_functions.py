"""What the neurons of a module compute, as data that kernels can be made from: segments of them, each with its members.

Letters: n neurons, K members.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuroweave.activations.mixtures import NeuronMixture, SegmentMixture
from neuroweave.activations.torch import Activation, activation_name

Member = tuple[str, float | str | None]  # (formula, its beta: a number, "beta" for one per neuron, None)


@dataclass(frozen=True)
class NeuronSegment:
    """Neurons `start:stop` run `members`: one, or a sum of K with `weights` [K, n]. `beta` [n]: of a Swish member."""

    start: int
    stop: int
    members: tuple[Member, ...]
    weights: Float[Tensor, "K n"] | None = None
    beta: Float[Tensor, " n"] | None = None

    @property
    def kernel(self) -> tuple[tuple[Member, ...], bool]:
        """What its code depends on."""
        return self.members, self.weights is not None


def neuron_segments(module: Any, neurons: int) -> list[NeuronSegment]:
    """What a module computes on `neurons` neurons, in their order.

    Raises ValueError for one that is not made of known formulas.
    """
    return list(segments_of(module, 0, neurons))


@torch.no_grad()
def segments_of(module: Any, start: int, stop: int) -> Iterator[NeuronSegment]:
    if isinstance(module, SegmentMixture):
        for member, size in zip(module.members, module.segment_sizes(stop - start), strict=True):
            if size:
                yield from segments_of(member, start, start + size)
            start += size
    elif isinstance(module, NeuronMixture):
        members = tuple(
            ("swish_beta", "beta") if k == module.swish else member_of(each) for k, each in enumerate(module.members)
        )
        weights = module.weights().float().T.contiguous()
        if weights.shape[1] != stop - start:
            raise ValueError(f"a mixture of {weights.shape[1]} neurons stands where there are {stop - start}")
        beta = None if module.beta is None else module.beta.detach().float().contiguous()
        yield NeuronSegment(start, stop, members, weights, beta)
    else:
        yield NeuronSegment(start, stop, (member_of(module),))


def member_of(module: Any) -> Member:
    if isinstance(module, Activation):
        return module.name, module.beta
    if isinstance(module, nn.Identity):
        return "identity", None
    inner = getattr(module, "function", module)  # a plain function that a model keeps as its activation
    if name := activation_name(inner):
        return name, None
    raise ValueError(f"{type(module).__name__} is no activation that is known here")
