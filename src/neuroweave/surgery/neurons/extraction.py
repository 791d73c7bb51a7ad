"""Take source neurons out of a model: run it on text, measure every neuron, keep those that a criterion puts first.

Neuron i of a layer is `(gate[i], up[i], down[:, i])`; at the MLP's input x, which is what comes out of the layer's norm
with the norm's own weight in it, `s = gate[i].x`, `h = act(s) * (up[i].x)`, and `h * down[:, i]` is what it adds.
The text is read twice: for the statistics of all neurons, then for curves and strongest moments of the chosen ones.

The first 8 positions of every window are read, but left out of all statistics. Models park attention on a token there,
which then has activations hundreds of times larger than all others and would decide every maximum and most means. In
SmolLM2-135M the residual stream is 60 to 210 times longer at such a token than elsewhere: in the 123 windows of the
shipped calibration text it is the first token of each, the second of two, the fifth of one, and none from there to the
40th.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.activations import ACT2FN

from neuroweave import __version__
from neuroweave.activations.torch import activation_name as activation_formula
from neuroweave.checkpoint.describe import activation_name, text_config
from neuroweave.checkpoint.header import TensorSpec
from neuroweave.checkpoint.layers import find_projections
from neuroweave.checkpoint.manifest import file_entry
from neuroweave.checkpoint.reader import INDEX_FILE, Checkpoint
from neuroweave.checkpoint.sealed import KEY
from neuroweave.surgery.neurons.bank import SOURCE, Bank, Neuron
from neuroweave.surgery.neurons.neuron_statistics import ChosenStatistics, LayerStatistics, rounded
from neuroweave.surgery.neurons.selection import SELECTIONS, best, shares
from neuroweave.surgery.neurons.text_windows import SETTLED, Window, draw_windows, text_record
from neuroweave.surgery.sites import text_decoder
from neuroweave.text.tokens import NamedText

WINDOW, TOKENS, BINS, MOMENTS = 512, 32_768, 24, 8
Progress = Callable[[int, int], None]
Receive = Callable[["Block", np.ndarray, np.ndarray], None]


@dataclass(frozen=True, eq=False)
class Block:
    """A layer's dense gated MLP in the loaded model; `path` is its module, m neurons of hidden size d."""

    layer: int
    path: str
    module: nn.Module

    def weight(self, role: str) -> Tensor:
        """`gate_proj` and `up_proj`: `[m, d]`; `down_proj`: `[d, m]`."""
        return self.module.get_submodule(role).get_parameter("weight").detach()

    @property
    def neurons(self) -> int:
        return self.weight("gate_proj").shape[0]

    def down_norms(self) -> Float64[np.ndarray, " m"]:
        return torch.linalg.vector_norm(self.weight("down_proj").double(), dim=0).cpu().numpy()


def extract_neurons(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[NamedText],
    *,
    count: int,
    layers: Sequence[int] | None = None,
    window: int = WINDOW,
    tokens: int | None = TOKENS,
    select: str = "contribution",
    seed: int = 0,
    bins: int = BINS,
    source: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Bank:
    """A bank of `count` source neurons of `model`, ordered by layer and index.

    Each layer (all with a dense gated MLP, or those in `layers`) gives as many neurons as any other, within one: the
    residual stream grows with depth, so one ranking of the whole model would take the last layers only. Within its
    layer a neuron is ranked by `select`, a name in `SELECTIONS`.

    `tokens`: how much of the text to read, None for all; which part of it follows from `seed`. `bins` of equal width
    make a response curve. `source`: what provenance says of the model, see `model_record`. `progress` is called with
    (windows done, windows in all). Statistics are in the units of the model, in which `s` and `h` are computed.
    Raises ValueError, before the text is read, for a model without dense gated MLPs and for settings out of range.
    """
    if select not in SELECTIONS:
        raise ValueError(f"select {select!r} is not known; choose from {', '.join(SELECTIONS)}")
    blocks, activation = find_blocks(model, layers)
    available = sum(block.neurons for block in blocks)
    if not 1 <= count <= available:
        raise ValueError(f"{count} neurons asked for; the {len(blocks)} layers have {available}: give 1 to {available}")
    if bins < 1:
        raise ValueError(f"a response curve of {bins} bins; expected 1 or more")
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if isinstance(context, int) and window > context:
        raise ValueError(f"a window of {window} tokens; this model reads {context} at most")
    windows = draw_windows(documents, tokenizer, window=window, tokens=tokens, seed=seed)
    check_gating(model, blocks, activation, windows[0])
    report = progress or (lambda done, total: None)
    statistics = measure_all(model, blocks, windows, report)
    scores = [SELECTIONS[select](statistics[block.layer], block.down_norms()) for block in blocks]
    chosen = {
        block.layer: best(score, share)
        for block, score, share in zip(blocks, scores, shares(count, scores), strict=True)
    }
    details = measure_chosen(model, blocks, chosen, statistics, windows, bins, report)
    provenance = {
        "neuroweave": __version__,
        "operation": "extract",
        "model": {**(source or {}), "model_type": model.config.model_type},
        "hidden_size": blocks[0].weight("gate_proj").shape[1],
        "activation": activation_formula(ACT2FN[activation]) or activation,
        "input": "of the MLP, after the layer's norm",
        "text": {**text_record(windows), "window": window, "positions_left_out_of_each": SETTLED},
        "select": select,
        "layers": [block.layer for block in blocks],
        "seed": seed,
    }
    parts = [part for block in blocks for part in take(block, chosen[block.layer], statistics, details, windows)]
    gate, up, down = (np.stack([directions[at] for _, directions in parts]) for at in range(3))
    return Bank(gate, up, down, [neuron for neuron, _ in parts], provenance)


# ------------------------------------------------------------------------------------------------ what to measure


def find_blocks(model: PreTrainedModel, layers: Sequence[int] | None) -> tuple[list[Block], str]:
    """The dense gated MLPs in the layers asked for, one a layer, and the configuration's name of their activation.

    Raises ValueError with the reason for a layer, or a model, whose neurons are not `act(gate.x) * (up.x)`.
    """
    if getattr(model.config, KEY, None) is not None:
        raise ValueError(f"{type(model).__name__} was patched; take the neurons from the original model")
    specs = [TensorSpec(name, "F32", tuple(weight.shape)) for name, weight in model.named_parameters()]
    found, others = find_projections(specs)
    if not found:
        reasons = "; ".join(sorted(set(others.values()))) or "no decoder layers could be found"
        raise ValueError(f"{type(model).__name__} has no dense gated MLP to take neurons from: {reasons}")
    activation = activation_name(text_config(model.config.to_dict()))
    if activation not in ACT2FN:
        raise ValueError(f"{type(model).__name__}: its configuration states no activation that is known ({activation})")
    by_layer: dict[int, Block] = {}
    for projections in found:
        path = projections.gate.name.removesuffix(".gate_proj.weight")
        by_layer.setdefault(projections.layer, Block(projections.layer, path, model.get_submodule(path)))
    for layer in layers if layers is not None else ():
        if layer not in by_layer:
            reason = others.get(layer, f"the model has layers {min(by_layer)} to {max(by_layer)}")
            raise ValueError(f"layer {layer} has no dense gated MLP: {reason}")
    blocks = [by_layer[layer] for layer in sorted(by_layer if layers is None else set(layers))]
    if not blocks:
        raise ValueError("no layers were given; name at least one, or leave the choice out")
    for block in blocks:
        for role in ("gate_proj", "up_proj", "down_proj"):
            if getattr(block.module.get_submodule(role), "bias", None) is not None:
                raise ValueError(f"{block.path}.{role} has a bias, which a bank of directions cannot hold")
    return blocks, str(activation)


@contextmanager
def listening(blocks: Sequence[Block], receive: Receive) -> Iterator[None]:
    """Within the block, `receive(block, s, h)` is called whenever an MLP runs: `[T, m]` each, in float32."""
    handles = []
    for block in blocks:
        held: list[np.ndarray] = []

        def keep(_: nn.Module, __: Any, output: Tensor, held: list[np.ndarray] = held) -> None:
            held.append(as_rows(output))

        def deliver(_: nn.Module, inputs: Any, held: list[np.ndarray] = held, block: Block = block) -> None:
            receive(block, held.pop(), as_rows(inputs[0]))

        handles.append(block.module.get_submodule("gate_proj").register_forward_hook(keep))
        handles.append(block.module.get_submodule("down_proj").register_forward_pre_hook(deliver))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def as_rows(x: Tensor) -> np.ndarray:
    return x.detach().reshape(-1, x.shape[-1]).float().cpu().numpy()


def read(model: PreTrainedModel, token_ids: Sequence[int]) -> None:
    """One forward pass of the decoder, without the output head."""
    ids = torch.tensor([list(token_ids)], device=model.device)
    with torch.no_grad():
        text_decoder(model)(input_ids=ids, use_cache=False)


def check_gating(model: PreTrainedModel, blocks: Sequence[Block], activation: str, window: Window) -> None:
    """Raise ValueError unless every block computes `act(gate.x) * (up.x)`, once per position."""
    ups: dict[int, np.ndarray] = {}
    wrong: list[str] = []

    def check(block: Block, s: np.ndarray, h: np.ndarray) -> None:
        expected = ACT2FN[activation](torch.from_numpy(s)).numpy() * ups.pop(block.layer)
        # the first values may be so large that any difference elsewhere would pass beside them
        if len(h) != len(ids) or np.abs(h - expected)[SETTLED:].max() > 1e-2 * np.abs(expected)[SETTLED:].max():
            wrong.append(block.path)

    ids = window.token_ids[: 2 * SETTLED]
    handles = [
        block.module.get_submodule("up_proj").register_forward_hook(
            lambda _, __, output, layer=block.layer: ups.__setitem__(layer, as_rows(output))
        )
        for block in blocks
    ]
    try:
        with listening(blocks, check):
            read(model, ids)
    finally:
        for handle in handles:
            handle.remove()
    if wrong:
        raise ValueError(
            f"{wrong[0]} does not compute {activation}(gate.x) * (up.x), so it has no neurons of that form"
        )


# ------------------------------------------------------------------------------------------------- the two passes


def measure_all(
    model: PreTrainedModel, blocks: Sequence[Block], windows: Sequence[Window], report: Progress
) -> dict[int, LayerStatistics]:
    """First pass, by layer."""
    statistics = {block.layer: LayerStatistics(block.neurons) for block in blocks}
    with listening(blocks, lambda block, s, h: statistics[block.layer].add(s[SETTLED:], h[SETTLED:])):
        for number, window in enumerate(windows):
            read(model, window.token_ids)
            report(number + 1, 2 * len(windows))
    return statistics


def measure_chosen(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    chosen: Mapping[int, np.ndarray],
    statistics: Mapping[int, LayerStatistics],
    windows: Sequence[Window],
    bins: int,
    report: Progress,
) -> dict[int, ChosenStatistics]:
    """Second pass, by layer; neuron `chosen[layer][k]` is number k."""
    details = {}
    for layer, indices in chosen.items():
        of = statistics[layer]
        limits = (of.low[indices], of.high[indices], of.peak[indices])
        details[layer] = ChosenStatistics(*limits, bins=bins, moments=MOMENTS)
    number = 0

    def receive(block: Block, s: np.ndarray, h: np.ndarray) -> None:
        columns = chosen[block.layer]
        details[block.layer].add(s[SETTLED:, columns], h[SETTLED:, columns], window=number, first=SETTLED)

    with listening([block for block in blocks if len(chosen[block.layer])], receive):
        for number, window in enumerate(windows):  # `receive` reads the number
            read(model, window.token_ids)
            report(len(windows) + number + 1, 2 * len(windows))
    return details


def take(
    block: Block,
    indices: Int[np.ndarray, " K"],
    statistics: Mapping[int, LayerStatistics],
    details: Mapping[int, ChosenStatistics],
    windows: Sequence[Window],
) -> Iterator[tuple[Neuron, tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """The chosen neurons of a block with their directions, the checkpoint's own numbers as float32 `[d]`."""
    for at, index in enumerate(indices.tolist()):
        weights = (
            block.weight("gate_proj")[index],
            block.weight("up_proj")[index],
            block.weight("down_proj")[:, index],
        )
        directions = tuple(weight.float().cpu().numpy() for weight in weights)
        norms = [float(np.linalg.norm(direction.astype(np.float64))) for direction in directions]
        numbers = statistics[block.layer].of(index) | details[block.layer].quantiles(at)
        numbers |= dict(zip(("gate_norm", "up_norm", "down_norm"), norms, strict=True))
        numbers["contribution"] = numbers["mean_absolute"] * norms[2]
        neuron = Neuron(
            f"layer{block.layer}.{index}",
            SOURCE,
            {"layer": block.layer, "index": index, "module": block.path},
            statistics={name: rounded(number) for name, number in numbers.items()},
            response={
                name: [rounded(number) for number in curve] for name, curve in details[block.layer].response(at).items()
            },
            fired=[
                {"value": rounded(peak.value), **windows[peak.window].moment(peak.position)}
                for peak in details[block.layer].peaks(at)
            ],
        )
        yield neuron, (directions[0], directions[1], directions[2])


def model_record(folder: str | Path, *, name: str | None = None, **more: Any) -> dict[str, Any]:
    """What a bank's provenance says of a model: its name and the size and SHA-256 of its configuration and weights."""
    folder = Path(folder)
    with Checkpoint(folder, allow_orphans=True) as checkpoint:
        files = ["config.json", *([INDEX_FILE] if checkpoint.index is not None else []), *checkpoint.shards]
    return {"name": name or folder.resolve().name, **more, "files": {file: file_entry(folder / file) for file in files}}
