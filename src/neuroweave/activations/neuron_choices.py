"""How the neurons of a model's mixtures chose, and how undecided they are.

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
from neuroweave.activations.torch import Activation


@dataclass(frozen=True)
class NeuronChoices:
    """Of one mixture. `neurons`: activation -> how many neurons run it (of a learned mixture: give it most weight).
    `weights`: activation -> mean weight. `entropy`: of a neuron's weights, mean over neurons, nats, from 0 to ln K.
    Both are None where nothing is learned."""

    path: str
    neurons: dict[str, int]
    weights: dict[str, float] | None = None
    entropy: float | None = None


def neuron_choices(model: nn.Module) -> list[NeuronChoices]:
    """Of every learned mixture of the model, and of every segment mixture of uneven sizes, in the model's order."""
    return [of_mixture(path, mixture) for path, mixture in mixtures(model)]


@torch.no_grad()
def of_mixture(path: str, mixture: NeuronMixture | SegmentMixture) -> NeuronChoices:
    names = member_names(mixture)
    if isinstance(mixture, SegmentMixture):
        return NeuronChoices(path, dict(zip(names, mixture.sizes or (), strict=True)))
    soft_nK = whole(mixture.soft_weights())
    counts = torch.bincount(soft_nK.argmax(dim=-1), minlength=len(names)).tolist()
    means = soft_nK.mean(0).tolist()
    return NeuronChoices(
        path,
        dict(zip(names, counts, strict=True)),
        {name: round(mean, 6) for name, mean in zip(names, means, strict=True)},
        float(entropies(soft_nK).mean()),
    )


def gate_entropy(model: nn.Module) -> Float[Tensor, ""]:
    """Mean over all neurons of all learned mixtures of the entropy of their weights, nats; with its gradient.

    As a term of a loss it makes neurons decide: 0 where each runs one activation alone, ln K at even weights.
    Raises ValueError for a model without learned mixtures.
    """
    found = [entropies(mixture.soft_weights()) for _, mixture in mixtures(model) if isinstance(mixture, NeuronMixture)]
    if not found:
        raise ValueError("the model has no learned mixture, so there is no gate entropy")
    return torch.cat(found).mean()


def entropies(weights_nK: Float[Tensor, "n K"]) -> Float[Tensor, " n"]:
    return -torch.xlogy(weights_nK, weights_nK).sum(dim=-1)


def mixtures(model: nn.Module) -> Iterator[tuple[str, NeuronMixture | SegmentMixture]]:
    for path, module in model.named_modules():
        if isinstance(module, NeuronMixture) or (isinstance(module, SegmentMixture) and module.sizes):
            yield path, module


def member_names(mixture: NeuronMixture | SegmentMixture) -> list[str]:
    """A name for each member, no two alike: the formula's, or `original` for a model's own activation."""
    names: list[str] = []
    for k, member in enumerate(mixture.members):
        name = member.extra_repr() if isinstance(member, Activation) else "original"
        names.append(name if name not in names else f"{name} ({k})")
    return names


def whole(tensor: Any) -> Tensor:
    """All of a tensor that is sharded over processes (a collective call); any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
