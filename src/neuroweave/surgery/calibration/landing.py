"""Where in the residual stream a projection's output lands, found by trying: plainly added, or behind a norm.

plain:  landing = rest + k * y               (Llama, Qwen, Mistral; k is 1, or Granite's multiplier)
normed: landing = rest + gain * y / rms(y)   (Gemma, OLMo 2; rms(y)^2 = mean(y^2) + eps)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

TOLERANCE = 1e-3  # relative, of what float32 leaves when large hidden states are subtracted


@dataclass(frozen=True, eq=False)
class Landing:
    """How y becomes part of the landing: `scale` k of a plain one; `norm`, its `gain` and `eps` of a normed one."""

    scale: float
    norm: nn.Module | None
    gain: Tensor | None
    eps: float = 0.0

    def added(self, y: Tensor) -> Tensor:
        """What y adds to the residual stream."""
        return self.scale * y if self.norm is None else self.norm(y)

    def wanted(self, difference: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """(y*, weight): the output whose addition is `difference`, and how much an error in it counts, by token.

        Behind a norm the length of y does not matter: it keeps the one that it has, and an error counts relative to it.
        """
        if self.gain is None:
            return difference / self.scale, torch.ones_like(y[..., :1])
        rms = root_mean_square(y, self.eps)
        wanted = torch.where(self.gain == 0, y, difference / torch.where(self.gain == 0, 1.0, self.gain) * rms)
        return wanted, rms.pow(-2)

    def caution(self) -> Tensor | None:
        """How much more each output is to be pulled towards what it is, in powers of 4; None: all of them alike.

        Behind a norm, an output of small gain adds little to the stream, but counts in the length that all are divided
        by: what it lacks, divided by its gain, would make it outgrow the others (Gemma 3's gains go from 0 to 1,657).
        """
        if self.gain is None:
            return None
        square = self.gain.flatten().double().pow(2)
        return (square.mean() / square.clamp(min=1e-300)).log2().div(2).round().clamp(0, 99).long()


def find_landing(y: Tensor, landing: Tensor, without: Tensor, norms: dict[nn.Module, tuple[Tensor, Tensor]]) -> Landing:
    """From one pass with `y`, what it landed in, and the landing of a pass in which y was zero.

    `norms`: the norms of the layer with their (input, output) in the first pass. Raises ValueError for other forms.
    """
    change = landing - without
    size = change.abs().max().clamp(min=1e-30)
    k = float((change * y).sum() / y.pow(2).sum())
    if (change - k * y).abs().max() <= TOLERANCE * size and k != 0:
        return Landing(k, None, None)
    for norm, (entered, left) in norms.items():
        if entered.shape == y.shape and torch.equal(entered, y) and (change - left).abs().max() <= TOLERANCE * size:
            gain, eps = norm(torch.ones_like(y[..., :1, :])), epsilon(norm)
            if (left - gain * y / root_mean_square(y, eps)).abs().max() <= TOLERANCE * size:
                return Landing(1.0, norm, gain, eps)
    raise ValueError("the projection's output is neither added to the residual stream nor normed by a root mean square")


def root_mean_square(y: Tensor, eps: float) -> Tensor:
    return (y.pow(2).mean(-1, keepdim=True) + eps).sqrt().clamp(min=1e-12)


def epsilon(norm: nn.Module) -> float:
    """What the norm adds to the mean square: it matters, since Gemma 3's MLPs give outputs as small as its root."""
    found = getattr(norm, "eps", getattr(norm, "variance_epsilon", 0.0))
    return float(found) if isinstance(found, float | int) else 0.0
