"""NeuroBLAST as published, where it differs in cost: written again from its description, for comparison only.

The convolution is two-dimensional, a K x K kernel on a height of 1. Time is padded before it; the zero rows above and
below are the convolution's own padding, so that a library may skip them (`rows_first`: written out before it, so that
it cannot). Attention is written out: products and a softmax. The correct way to generate is the whole sequence for
every token, because the published cache has no state for convolutions. Letters as in the convolution module.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from neuroweave.neuroblast.convolution import CausalConvolution
from neuroweave.neuroblast.modeling import NeuroBlastConvolutionLayer, NeuroBlastForCausalLM


class PublishedConvolution(nn.Module):
    """The same outputs as `convolution`, in its place; rows of the kernel that never meet data are random."""

    def __init__(self, convolution: CausalConvolution, *, rows_first: bool = False) -> None:
        super().__init__()
        out_channels, channels, taps = convolution.weight.shape
        self.reach, self.dilation, self.rows_first = convolution.reach, convolution.dilation, rows_first
        bound = (channels * taps * taps) ** -0.5
        self.weight = nn.Parameter(torch.empty(out_channels, channels, taps, taps).uniform_(-bound, bound))
        self.weight.data[:, :, taps // 2] = convolution.weight.data

    def forward(self, x_BCS: Tensor, tokens: int, sequences_BT: Tensor | None = None) -> Tensor:
        assert sequences_BT is None
        rows = self.weight.shape[-1] // 2
        outside, inside = (rows, 0) if self.rows_first else (0, rows)
        missing = tokens + self.reach - x_BCS.shape[-1]
        x_BCHS = functional.pad(x_BCS[:, :, None], (missing, 0, outside, outside))
        y_BDHT = functional.conv2d(x_BCHS, self.weight, padding=(inside, 0), dilation=(1, self.dilation))
        return y_BDHT[:, :, 0].transpose(1, 2)


def published_twin(model: NeuroBlastForCausalLM, *, attention: bool = True) -> NeuroBlastForCausalLM:
    """A copy of a model with its convolutions, and `attention`, as published; it computes the same function."""
    twin = copy.deepcopy(model)
    if attention:
        twin.set_attn_implementation("eager")
    for layer in twin.modules():
        if isinstance(layer, NeuroBlastConvolutionLayer):
            layer.conv = PublishedConvolution(layer.conv)
    return twin


@torch.no_grad()
def decode_without_cache(
    model: NeuroBlastForCausalLM, ids_BT: Tensor, count: int, *, all_logits: bool = False
) -> Tensor:
    """`count` tokens, greedily, with one pass over the whole sequence for each; `all_logits`: of every position."""
    for _ in range(count):
        logits_BTV = model(ids_BT, use_cache=False, logits_to_keep=0 if all_logits else 1).logits
        ids_BT = torch.cat((ids_BT, logits_BTV[:, -1:].argmax(-1)), dim=1)
    return ids_BT
