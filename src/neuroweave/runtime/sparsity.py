"""Which neurons a token can do without: thresholds on |act(gate)|, found on text, with no training.

A neuron is skipped before its up projection is known, by what it can be expected to add to the residual stream:
|act(gate)| * rms(up) * ||down column||. CATS (Lee et al., arXiv:2404.08763) compares |act(gate)| alone with one
threshold a layer; TEAL (Liu et al., arXiv:2408.14690) compares what enters each matrix. Letters: M neurons, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from neuroweave.runtime.lowering import UnsupportedModelError, decoder_layers
from neuroweave.runtime.operations import Program, SparseGlu
from neuroweave.text.documents import documents
from neuroweave.text.passages import PASSAGE
from neuroweave.text.sample import draw_sample

BREAK_EVEN = 0.12  # of the neurons have to be skipped, before the list of those that live pays


@dataclass(frozen=True, eq=False)
class Skipping:
    """Thresholds [M] of each layer's neurons, and which share of them fell below on the text."""

    thresholds: dict[int, Float[Tensor, " M"]]
    shares: dict[int, float]

    @property
    def mean_share(self) -> float:
        return sum(self.shares.values()) / max(1, len(self.shares))

    def skipped_bytes(self, program: Program) -> int:
        """Of weights that a token's step leaves unread, on the mean of the text."""
        layers = sorted(self.worth_it())
        sparse = [each for each in program.operations if isinstance(each, SparseGlu)]
        if len(layers) != len(sparse):
            return 0  # some of them run dense after all
        return round(sum(self.shares[n] * (op.up.bytes + op.down.bytes) for n, op in zip(layers, sparse, strict=True)))

    def worth_it(self) -> dict[int, Tensor]:
        """The layers in which so many are skipped that it pays; all others run dense."""
        return {layer: self.thresholds[layer] for layer, share in self.shares.items() if share > BREAK_EVEN}


CALIBRATION_TOKENS = 2048


def thresholds_on_prose(model: Any, tokenizer: PreTrainedTokenizerBase, share: float) -> Skipping:
    """`find_thresholds` on shipped prose."""
    sample = draw_sample(documents("calibration"), tokenizer, tokens=CALIBRATION_TOKENS, window=256, passage=PASSAGE)
    return find_thresholds(model, [window.token_ids for window in sample.windows], share)


@torch.no_grad()
def find_thresholds(model: Any, windows: Iterable[Sequence[int]], share: float) -> Skipping:
    """Thresholds that skip about `share` of each layer's neurons on this text; 0: those that are exactly zero alone.

    Raises UnsupportedModelError for MLPs without gate, up and down projection, and ValueError for another share.
    """
    if not 0 <= share < 1:
        raise ValueError(f"a share of {share} of the neurons: expected 0 to below 1")
    acted: dict[int, list[Tensor]] = {}
    squares: dict[int, Tensor] = {}
    hooks = []
    for number, layer in enumerate(decoder_layers(model)):
        mlp: Any = getattr(layer, "mlp", None)
        if mlp is None:
            continue
        if not all(hasattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
            raise UnsupportedModelError(f"layer {number}: {type(mlp).__name__} has no gate, up and down projection")

        def see_gate(_: Any, __: Any, out: Tensor, number: int = number, mlp: Any = mlp) -> None:
            acted.setdefault(number, []).append(mlp.act_fn(out).flatten(0, -2).abs().float())

        def see_up(_: Any, __: Any, out: Tensor, number: int = number) -> None:
            squares[number] = squares.get(number, 0) + out.flatten(0, -2).float().square().sum(0)

        hooks += [mlp.gate_proj.register_forward_hook(see_gate), mlp.up_proj.register_forward_hook(see_up)]
    try:
        for window in windows:
            model(torch.tensor([list(window)], device=model.device))
    finally:
        for hook in hooks:
            hook.remove()
    thresholds, shares = {}, {}
    for number, parts in acted.items():
        values = torch.cat(parts)
        down = decoder_layers(model)[number].mlp.down_proj.weight.float()
        expected = (squares[number] / len(values)).sqrt() * down.norm(dim=0)
        thresholds[number] = layer_thresholds(values, expected, share).cpu()
        shares[number] = float((values <= thresholds[number].to(values.device)).float().mean())
    return Skipping(thresholds, shares)


def layer_thresholds(acted_TM: Tensor, expected_M: Tensor, share: float) -> Float[Tensor, " M"]:
    """One cut through |act(gate)| * expected, as a threshold for each neuron."""
    if share == 0:
        return torch.zeros_like(expected_M)
    adds = (acted_TM * expected_M).flatten()
    cut = adds.kthvalue(max(1, round(share * adds.numel()))).values
    return torch.where(expected_M > 0, cut / expected_M, torch.inf)
