"""A causal dilated convolution over time: y[t] = sum_j W[:, :, j] x[t - (K - 1 - j) * dilation], zeros before it.

The published model computes it as a 2-D convolution on a height of 1, of whose K x K kernel only the middle row ever
meets data; that row is W here. Letters: B batch, T time, S time with the earlier columns that the taps reach, C
channels in, D channels out, K taps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

# Up to here one product over all taps beats a convolution on a CPU (twice as fast for a few tokens); see FASTEST.
FEW_TOKENS = 64


def by_conv1d(x_BCS: Tensor, weight_DCK: Tensor, dilation: int) -> Tensor:
    """[B, T, D] by the framework's convolution."""
    return functional.conv1d(x_BCS, weight_DCK, dilation=dilation).transpose(1, 2)


def by_unfolding(x_BCS: Tensor, weight_DCK: Tensor, dilation: int) -> Tensor:
    """[B, T, D] by one matrix product with the columns that the taps meet, side by side (K inputs of memory)."""
    D, C, K = weight_DCK.shape
    x_BTCK = torch.stack(shifted_inputs(x_BCS, K, dilation), dim=-1)
    return functional.linear(x_BTCK.flatten(2), weight_DCK.reshape(D, C * K))


def by_shifting(x_BCS: Tensor, weight_DCK: Tensor, dilation: int) -> Tensor:
    """[B, T, D] by a matrix product for each tap, on the input shifted to it."""
    weight_KDC = weight_DCK.permute(2, 0, 1).contiguous()  # a product with a strided weight copies it, too, and slower
    first, *others = shifted_inputs(x_BCS, weight_DCK.shape[-1], dilation)
    y_BTD = functional.linear(first, weight_KDC[0])
    for x_BTC, weight_DC in zip(others, weight_KDC[1:], strict=True):
        y_BTD = y_BTD + functional.linear(x_BTC, weight_DC)
    return y_BTD


def shifted_inputs(x_BCS: Tensor, taps: int, dilation: int) -> list[Tensor]:
    """For each tap the columns [B, T, C] that it meets."""
    tokens = x_BCS.shape[-1] - (taps - 1) * dilation
    x_BSC = x_BCS.transpose(1, 2)
    return [x_BSC[:, tap * dilation : tap * dilation + tokens] for tap in range(taps)]


METHODS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "conv1d": by_conv1d,
    "unfolding": by_unfolding,
    "shifting": by_shifting,
}
# The fastest for whole sequences, by `benchmarks/neuroblast_convolution.py`; on devices not listed, one large product.
FASTEST = {"cpu": "conv1d"}


def fastest_method(device: str, tokens: int, taps: int) -> str:
    """The name in `METHODS` that was measured to be fastest."""
    if torch.compiler.is_exporting():  # one graph for all lengths
        return "conv1d"
    if taps == 1:  # one product, of the input as it is
        return "shifting"
    return "unfolding" if tokens <= FEW_TOKENS else FASTEST.get(device, "unfolding")


class CausalConvolution(nn.Module):
    """The weight [D, C, K] of a causal dilated convolution without bias."""

    def __init__(self, channels: int, out_channels: int, kernel_size: int, dilation: int) -> None:
        super().__init__()
        self.kernel_size, self.dilation = kernel_size, dilation
        self.weight = nn.Parameter(torch.empty(out_channels, channels, kernel_size))

    @property
    def reach(self) -> int:
        """How many earlier columns an output depends on."""
        return (self.kernel_size - 1) * self.dilation

    def forward(
        self, x_BCS: Float[Tensor, "B C S"], tokens: int, sequences_BT: Int[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T D"]:
        """The outputs [B, T, D] of the last `tokens` columns; columns that lack before the first one are zeros.

        `sequences_BT`: the number of the sequence that each token belongs to, where several are packed into a row; a
        tap that lies in another one meets zeros.
        """
        missing = tokens + self.reach - x_BCS.shape[-1]
        if missing > 0:
            x_BCS = functional.pad(x_BCS, (missing, 0))
        elif missing < 0:
            x_BCS = x_BCS[..., -missing:]
        if sequences_BT is not None:
            return self._packed(x_BCS, tokens, sequences_BT)
        method = METHODS[fastest_method(x_BCS.device.type, tokens, self.kernel_size)]
        return method(x_BCS, self.weight, self.dilation)

    def _packed(self, x_BCS: Tensor, tokens: int, sequences_BT: Tensor) -> Tensor:
        numbers_BS = functional.pad(sequences_BT, (self.reach, 0), value=-1)
        x_BSC, outputs = x_BCS.transpose(1, 2), []
        for tap in range(self.kernel_size):
            first = tap * self.dilation
            same_BT = numbers_BS[:, first : first + tokens] == sequences_BT
            x_BTC = x_BSC[:, first : first + tokens].masked_fill(~same_BT[..., None], 0)
            outputs.append(functional.linear(x_BTC, self.weight[..., tap]))
        return torch.stack(outputs).sum(0)

    def extra_repr(self) -> str:
        out_channels, channels, taps = self.weight.shape
        return f"{channels}, {out_channels}, taps={taps}, dilation={self.dilation}"
