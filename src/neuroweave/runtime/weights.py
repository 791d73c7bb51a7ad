"""Matrices for decoding: rows of float32, of int8 with a scale each, or of 4-bit numbers with a scale for 32 inputs.

The layouts are those of `native/decoder.h`: int8 holds 128 + q, a byte of 4-bit numbers holds inputs i and i + 32 of a
block of 64, 8 added to each. Letters: D outputs, C inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

FORMATS = ("float32", "int8", "int4")
# A group's scale is tried as its largest number over each of these: whole steps find the grid of rounded weights again.
STEPS = (
    -8.4,
    -8.0,
    -7.6,
    -7.2,
    7.0,
    -7.0,
    -6.6,
    -6.2,
    6.0,
    -6.0,
    5.0,
    -5.0,
    4.0,
    -4.0,
    3.0,
    -3.0,
    2.0,
    -2.0,
    1.0,
    -1.0,
)
BLOCK = 64  # inputs; rows are filled up with zeros to a multiple of it
GROUP = 32  # inputs that share a scale, of 4-bit numbers


def layer_format(format: str, projection: str, *, last: bool) -> str:
    """The format of a layer's matrix in a model of `format`: with int4, keys and values and the last layer are int8.

    SmolLM2-135M's perplexity, each alone in 4 bits by GPTQ: values +14 % (most heads look at the first token, of which
    the inputs' squares know little), the last layer +1 %; all seven of another layer 0.0 to 0.6 %.
    """
    return "int8" if format == "int4" and (last or projection in ("k_proj", "v_proj")) else format


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """`data`: float32 [D, C], uint8 [D, C'] or [D, C' / 2], C' the filled-up C. `scales`: float32 [D] or float16
    [D, C' / 32]. `bias`: [D]."""

    format: str
    rows: int
    columns: int
    data: Tensor
    scales: Tensor | None = None
    bias: Tensor | None = None

    @property
    def bytes(self) -> int:
        """Of what is read to multiply with it."""
        return sum(
            each.numel() * each.element_size() for each in (self.data, self.scales, self.bias) if each is not None
        )

    def whole(self) -> Float[Tensor, "D C"]:
        """The matrix that the numbers stand for, in float32."""
        if self.scales is None:
            return self.data
        if self.format == "int8":
            return ((self.data.float() - 128) * self.scales[:, None])[:, : self.columns]
        blocks = self.data.view(self.rows, -1, GROUP)
        numbers = torch.stack((blocks & 15, blocks >> 4), dim=2).float() - 8
        return (numbers * self.scales.float().view(self.rows, -1, 2, 1)).view(self.rows, -1)[:, : self.columns]

    def rows_at(self, ids: Tensor) -> Float[Tensor, "T C"]:
        """Some of its rows."""
        scales = None if self.scales is None else self.scales[ids]
        return PackedMatrix(self.format, len(ids), self.columns, self.data[ids], scales).whole()


@torch.no_grad()
def pack(weight: Float[Tensor, "D C"], format: str, bias: Tensor | None = None) -> PackedMatrix:
    """The matrix in one of `FORMATS`. Raises ValueError for another, and for weights that are not finite."""
    weight = weight.detach().float().contiguous()
    bias = None if bias is None else bias.detach().float().contiguous()
    rows, columns = weight.shape
    if format == "float32":
        return PackedMatrix(format, rows, columns, weight, None, bias)
    if not torch.isfinite(weight).all():
        raise ValueError(f"weights that are not finite cannot be rounded to {format}; look at them with verify")
    filled = torch.nn.functional.pad(weight, (0, -columns % BLOCK))
    if format == "int8":
        scales = (filled.abs().amax(dim=1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        numbers = (filled / scales[:, None]).round_().add_(128).to(torch.uint8)
        return PackedMatrix(format, rows, columns, numbers, scales, bias)
    if format == "int4":
        groups = filled.view(rows, -1, GROUP)
        scales = four_bit_scales(groups)
        numbers = rounded(groups, scales).add_(8).to(torch.uint8).view(rows, -1, 2, GROUP)
        return PackedMatrix(
            format, rows, columns, (numbers[:, :, 0] | numbers[:, :, 1] << 4).view(rows, -1), scales, bias
        )
    raise ValueError(f"weight format {format!r} is not known; known: {', '.join(FORMATS)}")


def rounded(groups: Float[Tensor, "D N G"], scales: Float[Tensor, "D N"]) -> Tensor:
    inverse = torch.where(scales != 0, 1 / scales.float(), 0)
    return (groups * inverse[..., None]).round_().clamp_(-8, 7)


def four_bit_scales(groups: Float[Tensor, "D N 32"]) -> Float[Tensor, "D N"]:
    """The float16 scale, of a few tried, that leaves each group the least squared error; its sign gives -8 to the
    largest number."""
    place = groups.abs().argmax(dim=-1, keepdim=True)
    largest = groups.gather(-1, place).squeeze(-1)
    best = (largest / -8).half()
    least = torch.full_like(largest, torch.inf)
    for steps in STEPS:
        scales = (largest / steps).half()
        error = (rounded(groups, scales) * scales.float()[..., None] - groups).square_().sum(-1)
        better = error < least
        best, least = torch.where(better, scales, best), torch.where(better, error, least)
    return best
