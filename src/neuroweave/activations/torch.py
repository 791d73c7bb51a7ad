"""The formulas as PyTorch modules.

Shapes: every module maps `[..., n]` to `[..., n]`, n neurons; dtype and device are kept.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from torch import Tensor, nn
from transformers.activations import ACT2CLS

from neuroweave.activations.formulas import FORMULAS, Primitives


class TorchPrimitives:
    """What `formulas` is written in, for PyTorch: one fused kernel each, the ones that transformers calls."""

    relu = staticmethod(F.relu)
    silu = staticmethod(F.silu)
    gelu = staticmethod(F.gelu)
    gelu_tanh = staticmethod(functools.partial(F.gelu, approximate="tanh"))
    tanh = staticmethod(torch.tanh)
    sigmoid = staticmethod(torch.sigmoid)
    sin = staticmethod(torch.sin)


PRIMITIVES = cast(Primitives, TorchPrimitives)


class Activation(nn.Module):
    """The formula called `name`, elementwise. `beta` is for `swish_beta` alone: one fixed number."""

    def __init__(self, name: str, *, beta: float | None = None) -> None:
        super().__init__()
        if name not in FORMULAS:
            raise ValueError(f"activation {name!r} is not known; known: {', '.join(FORMULAS)}")
        if beta is not None and name != "swish_beta":
            raise ValueError(f"activation {name!r} takes no beta; only swish_beta does")
        self.name = name
        self.beta = beta

    def forward(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
        if self.beta is None:
            return FORMULAS[self.name](x, PRIMITIVES)
        return FORMULAS[self.name](x, PRIMITIVES, beta=self.beta)

    def extra_repr(self) -> str:
        return self.name if self.beta is None else f"{self.name}, beta={self.beta}"


def activation_name(activation: Any) -> str:
    """Our name of an activation that computes exactly one of our formulas, else an empty string."""
    if isinstance(activation, nn.Module) and getattr(activation, "name", None) in FORMULAS:
        return str(activation.name)
    for name, theirs in TRANSFORMERS_NAMES.items():
        entry = ACT2CLS[theirs]
        cls, settings = entry if isinstance(entry, tuple) else (entry, {})
        if type(activation) is cls and not settings:
            return name
    kinds = {nn.ReLU: "relu", nn.SiLU: "silu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid"}
    return kinds.get(type(activation), "")


TRANSFORMERS_NAMES = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "identity": "linear",
}
