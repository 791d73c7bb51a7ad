"""Several activations in one layer: by contiguous segments of neurons, or learned for every neuron.

Letters: n neurons, K members.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from neuroweave.activations.formulas import swish_beta
from neuroweave.activations.torch import PRIMITIVES, Activation

START_LOGIT = 8.0


class SegmentMixture(nn.Module):
    """Activation k on the k-th of K contiguous segments of the neurons (AutoMixedActivation, first form).

    The split runs over the last dimension, for a 4-D image tensor `[B, C, H, W]` over C. `sizes`: neurons of each
    segment, n in all. Without them the segments are even: where K does not divide n, the first have ceil(n/K) neurons
    and the last what is left, as `torch.chunk` does. Each neuron is covered once.
    """

    def __init__(self, members: Sequence[nn.Module], *, sizes: Sequence[int] | None = None) -> None:
        super().__init__()
        if len(members) < 2:
            raise ValueError(f"a segment mixture needs at least two activations, got {len(members)}")
        if sizes is not None and (len(sizes) != len(members) or min(sizes) < 1):
            raise ValueError(f"sizes {list(sizes)}: give one of at least 1 for each of {len(members)} segments")
        self.members = nn.ModuleList(members)
        self.sizes = None if sizes is None else list(sizes)

    def forward(self, x: Tensor) -> Tensor:
        dim = 1 if x.ndim == 4 else -1
        segments = torch.split(x, self.segment_sizes(x.shape[dim]), dim=dim)
        return torch.cat([member(part) for member, part in zip(self.members, segments, strict=True)], dim=dim)

    def segment_sizes(self, neurons: int) -> list[int]:
        """How many of the neurons each member gets. Raises ValueError where `sizes` are those of another width."""
        if self.sizes is None:
            most = -(-neurons // len(self.members))
            return [min(most, max(0, neurons - most * k)) for k in range(len(self.members))]
        if sum(self.sizes) != neurons:
            raise ValueError(f"segments of {self.sizes} neurons are {sum(self.sizes)} in all, but there are {neurons}")
        return self.sizes

    def extra_repr(self) -> str:
        return "" if self.sizes is None else f"sizes={self.sizes}"


class NeuronMixture(nn.Module):
    """sum_k softmax(gating_logits)[i, k] * act_k(x_i): every neuron i learns which activation it wants.

    Parameters: `gating_logits [n, K]`; `beta [n]` where a member is `swish_beta`, which then uses beta_i. At the start
    the member that equals the original activation has logit `start_logit`, the others 0: its weight is
    1 / (1 + (K-1) exp(-start_logit)), so the model starts as the original up to that temperature, and the logits of
    the others still get a gradient. `hard`: each neuron runs the activation of its largest logit alone, with a
    straight-through gradient; at the start that is exactly the original.
    """

    def __init__(
        self,
        members: Sequence[nn.Module],
        *,
        neurons: int,
        neutral: int,
        start_logit: float = START_LOGIT,
        hard: bool = False,
    ) -> None:
        super().__init__()
        if len(members) < 2:
            raise ValueError(f"a neuron mixture needs at least two activations, got {len(members)}")
        if not 0 <= neutral < len(members):
            raise ValueError(f"the neutral member has index {neutral}, but there are {len(members)} members")
        self.members = nn.ModuleList(members)
        self.neutral, self.start_logit, self.hard = neutral, start_logit, hard
        self.gating_logits = nn.Parameter(torch.empty(neurons, len(members)))
        self.swish = next(
            (k for k, m in enumerate(members) if isinstance(m, Activation) and m.name == "swish_beta"), -1
        )
        self.beta = nn.Parameter(torch.empty(neurons)) if self.swish >= 0 else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All weight on the neutral member, up to `start_logit`; beta 1 (or the member's own number)."""
        with torch.no_grad():
            self.gating_logits.zero_()
            self.gating_logits[:, self.neutral] = self.start_logit
            if self.beta is not None:
                number: Any = self.members[self.swish].beta
                self.beta.fill_(1.0 if number is None else number)

    def soft_weights(self) -> Float[Tensor, "n K"]:
        """softmax(gating_logits), in float32 at least."""
        logits = self.gating_logits
        return torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)

    def choices(self) -> Int[Tensor, " n"]:
        """The member that each neuron gives most weight to."""
        return self.gating_logits.argmax(dim=-1)

    def weights(self) -> Float[Tensor, "n K"]:
        """How much of each member every neuron runs; rows sum to 1. In float32 at least."""
        soft = self.soft_weights()
        if not self.hard:
            return soft
        chosen = torch.nn.functional.one_hot(soft.argmax(dim=-1), len(self.members)).to(soft.dtype)
        return chosen + (soft - soft.detach())

    def forward(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
        columns = self.weights().to(x.dtype).unbind(dim=-1)
        return sum(column * self.member(k, x) for k, column in enumerate(columns))  # type: ignore[return-value]

    def member(self, k: int, x: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
        """Activation k of x; the Swish member uses one beta per neuron."""
        if k == self.swish and self.beta is not None:
            return swish_beta(x, PRIMITIVES, beta=self.beta.to(x.dtype))
        return self.members[k](x)

    def extra_repr(self) -> str:
        return f"neurons={self.gating_logits.shape[0]}, hard={self.hard}"


ActivationSpec = str | dict[str, Any]


def build_activation(
    spec: ActivationSpec, *, original: nn.Module | None = None, neurons: int | None = None
) -> nn.Module:
    """The module that a recipe's `activation` describes.

    `original`: the model's own activation at this place, which the name `original` stands for. `neurons`: n, needed by
    a neuron mixture. Forms: a name; `{"swish_beta": {"beta": 1.7}}`; `{"segments": [...]}`;
    `{"segments": {"members": [...], "sizes": [...]}}`;
    `{"mixture": {"members": [...], "neutral": k, "start_logit": 8.0, "hard": false}}`.
    Raises ValueError for what it does not know.
    """
    if isinstance(spec, str):
        if spec != "original":
            return Activation(spec)
        if original is None:
            raise ValueError("activation 'original' is for places where the model has an activation of its own")
        return original
    if not isinstance(spec, dict) or len(spec) != 1:
        raise ValueError(f"an activation is a name or a mapping with one key, got {spec!r}")
    [(kind, settings)] = spec.items()
    if kind == "swish_beta":
        return Activation("swish_beta", beta=float(settings["beta"]))
    if kind == "segments":
        sizes = settings["sizes"] if isinstance(settings, dict) else None
        named = settings["members"] if isinstance(settings, dict) else settings
        return SegmentMixture([build_activation(member, original=original) for member in named], sizes=sizes)
    if kind == "mixture":
        if neurons is None:
            raise ValueError("a neuron mixture needs the number of neurons of its layer")
        members = [build_activation(member, original=original) for member in settings["members"]]
        return NeuronMixture(
            members,
            neurons=neurons,
            neutral=settings["neutral"],
            start_logit=settings.get("start_logit", START_LOGIT),
            hard=settings.get("hard", False),
        )
    raise ValueError(f"activation kind {kind!r} is not known; known: swish_beta, segments, mixture")
