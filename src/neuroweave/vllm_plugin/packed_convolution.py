"""The causal dilated convolution of `neuroblast/convolution.py` over a packed batch, each sequence with its own past.

vLLM runs the new tokens of many sequences side by side: one token of each that is being continued, a chunk of each
whose prompt is being read. What a tap meets before a sequence's new tokens is in that sequence's state: its last
columns. Nothing here needs vLLM. Letters: T new tokens of all sequences, R sequences, S columns of a state, C channels
in, D channels out, K taps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Columns:
    """Where columns are found in [R * S columns of the states | T new columns].

    `met`: what each tap meets at each token. `kept`: the last S columns of each sequence, its new state.
    """

    met: Int[Tensor, "T K"]
    kept: Int[Tensor, "R S"]


def find_columns(starts: Int[Tensor, " R1"], tokens: int, taps: int, dilation: int) -> Columns:
    """`starts` [R + 1]: the number of each sequence's first new token, and at last `tokens`, all of them.

    A sequence may have no new token (it keeps its state), and S is the reach of the taps, (taps - 1) * dilation.
    """
    reach, sequences = (taps - 1) * dilation, starts.shape[0] - 1
    token_T = torch.arange(tokens, device=starts.device)
    sequence_T = torch.searchsorted(starts[1:].contiguous(), token_T.to(starts.dtype), right=True)
    distance_K = torch.arange(taps - 1, -1, -1, device=starts.device) * dilation
    sequence_R = torch.arange(sequences, device=starts.device)
    behind_S = torch.arange(reach, 0, -1, device=starts.device)

    def place(column: Tensor, sequence: Tensor) -> Tensor:
        """Of a column counted through the new ones, one that belongs to `sequence`: before its start, in its state."""
        first = starts[sequence].long()
        before = sequence * reach + reach + (column - first)
        return torch.where(column < first, before, sequences * reach + column)

    return Columns(
        met=place(token_T[:, None] - distance_K, sequence_T[:, None].expand(-1, taps)),
        kept=place(starts[1:, None].long() - behind_S, sequence_R[:, None].expand(-1, reach)),
    )


def convolve(
    x_TC: Float[Tensor, "T C"],
    weight_DKC: Float[Tensor, "D K C"],
    columns: Columns,
    states_RSC: Float[Tensor, "R S C"],
) -> tuple[Float[Tensor, "T D"], Float[Tensor, "R S C"]]:
    """(outputs, new states); zeros are the state of a sequence that begins."""
    known_NC = torch.cat((states_RSC.flatten(0, 1), x_TC))
    y_TD = functional.linear(known_NC[columns.met].flatten(1), weight_DKC.flatten(1))
    return y_TD, known_NC[columns.kept]
