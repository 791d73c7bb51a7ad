"""Fit one MLP further by gradient descent, so that it lands on the teacher's residual stream: no other layer is run.

Least squares can only move the matrix that is linear in the error; here all of the MLP's weights move, on the inputs
that the calibrated layers before it give. After block-wise training of quantized models (Chen et al., EfficientQAT,
arXiv:2407.11062). Letters: N tokens, C hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from neuroweave.checkpoint.loading import cpu_multiplies_bfloat16
from neuroweave.surgery.calibration.landing import Landing
from neuroweave.surgery.calibration.stream import LayerStream, listening
from neuroweave.surgery.mlp_parts import MlpParts

BATCH = 1024  # tokens of a step
WARMUP = 20  # steps
HELD_OUT = 16  # every so many windows, one is not trained on
# Adam's rate relative to the root mean square of each matrix: SmolLM2's layer 3, four passes over 262k tokens, came to
# a relative error of 0.163 on other text with 0.015, to 0.167 with 0.005 and 0.179 with 0.0015 (0.213 before)
RATE = 0.015
LONG = 16.0  # tokens whose target is longer than so many medians (squared) count by their own length


@dataclass(frozen=True)
class Pairs:
    """What one MLP is fitted to: its inputs and what is to be added to the stream [N, C], and how much a token
    counts [N]."""

    inputs: Float[Tensor, "N C"]
    wanted: Float[Tensor, "N C"]
    weight: Float[Tensor, " N"]


def refine(
    stream: LayerStream, mlp: MlpParts, landing: Landing, targets: dict[int, Tensor], *, passes: int, seed: int = 0
) -> bool:
    """Train the MLP of the present layer; whether it came closer on windows that were held out (else it is as it was).

    `targets`: the teacher's stream behind the layer, by the first window of each batch.
    """
    training, held_out = gather(stream, mlp, landing, targets)
    parameters = [parameter for parameter in mlp.block.parameters() if parameter.is_floating_point()]
    before = [parameter.detach().clone() for parameter in parameters]
    flags = [parameter.requires_grad for parameter in parameters]
    error = error_on(mlp, landing, held_out)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        descend(mlp, landing, training, parameters, passes=passes, seed=seed)
    finally:
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)
            parameter.grad = None
    if error_on(mlp, landing, held_out) < error:
        return True
    with torch.no_grad():
        for parameter, old in zip(parameters, before, strict=True):
            parameter.copy_(old)
    return False


@torch.no_grad()
def gather(stream: LayerStream, mlp: MlpParts, landing: Landing, targets: dict[int, Tensor]) -> tuple[Pairs, Pairs]:
    """(pairs to train on, pairs that are held out: every 16th window, and the last one), views of the same memory."""
    windows = len(stream.windows_NT)
    kept = [number for number in range(windows - 1) if number % HELD_OUT != HELD_OUT - 1]
    place = {number: at for at, number in enumerate(kept + [n for n in range(windows) if n not in set(kept)])}
    inputs: Any = None
    for rows in stream.batches():
        with listening([mlp.block, mlp.down]) as seen:
            reached = stream.run(rows)
        x, lacks = seen[mlp.block][0], targets[rows.start] - (reached - landing.added(seen[mlp.down][1]))
        if inputs is None:
            inputs, wanted = (torch.empty(windows, *x.shape[1:]) for _ in range(2))
        where = [place[number] for number in range(rows.start, rows.stop)]
        inputs[where], wanted[where] = x, lacks
    square = wanted.pow(2).sum(-1)
    usual = square.median().clamp(min=1e-30)
    weight = 1 / torch.where(square > LONG * usual, square, usual)  # else a few huge tokens were all that counts
    parts = (slice(0, len(kept)), slice(len(kept), windows))
    training, held_out = (
        Pairs(inputs[part].flatten(0, 1), wanted[part].flatten(0, 1), weight[part].flatten()) for part in parts
    )
    return training, held_out


def descend(mlp: MlpParts, landing: Landing, pairs: Pairs, parameters: list[Any], *, passes: int, seed: int) -> None:
    """AdamW over shuffled tokens, its rate rising in `WARMUP` steps and falling to 0."""
    groups = [{"params": [each], "size": float(each.detach().pow(2).mean().sqrt()) or 1.0} for each in parameters]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    draw = torch.Generator().manual_seed(seed)
    batch = min(BATCH, len(pairs.inputs))
    steps = passes * (len(pairs.inputs) // batch)
    step = 0
    for _ in range(passes):
        order = torch.randperm(len(pairs.inputs), generator=draw)
        for rows in order[: len(order) // batch * batch].split(batch):
            share = min(1.0, (step + 1) / WARMUP) * (1 - step / steps)
            for group in optimizer.param_groups:
                group["lr"] = RATE * group["size"] * share
            found = torch.autograd.grad(losses(mlp, landing, pairs, rows).mean(), parameters)
            for parameter, gradient in zip(parameters, found, strict=True):  # of these alone: a norm may follow
                parameter.grad = gradient
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            step += 1


def losses(mlp: MlpParts, landing: Landing, pairs: Pairs, rows: Any) -> Float[Tensor, " N"]:
    """|what the MLP adds - what is wanted|^2 of some tokens, relative."""
    with torch.autocast("cpu", torch.bfloat16, enabled=cpu_multiplies_bfloat16()):
        y: Any = mlp.block(pairs.inputs[rows])
    y = y[0] if isinstance(y, tuple) else y
    return (landing.added(y.float()) - pairs.wanted[rows]).pow(2).sum(-1) * pairs.weight[rows]


@torch.no_grad()
def error_on(mlp: MlpParts, landing: Landing, pairs: Pairs) -> float:
    parts = [losses(mlp, landing, pairs, slice(at, at + BATCH)) for at in range(0, len(pairs.inputs), BATCH)]
    return float(torch.cat(parts).double().mean())
