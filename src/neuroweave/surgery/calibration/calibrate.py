"""Bring a patched model back to its teacher, layer by layer: in closed form, and further by gradient where asked.

In each layer, in this order: the MLP's neurons are matched (and, for a segment mixture, ordered by what each loses),
then the attention's output projection and the MLP's down projection are solved again by ridge least squares, so that
the patched layer lands on the teacher's residual stream; with `refine`, all of the MLP is then trained towards it. The
patched layer reads what the layers before it now give, so an error made earlier is corrected later. Letters: B windows,
T tokens, C hidden size, M neurons.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from neuroweave.activations.mixtures import NeuronMixture, SegmentMixture
from neuroweave.surgery.calibration.landing import Landing, find_landing
from neuroweave.surgery.calibration.neurons import Function, assign, match
from neuroweave.surgery.calibration.projections import scale_projections
from neuroweave.surgery.calibration.refine import refine
from neuroweave.surgery.calibration.ridge import RidgeSums
from neuroweave.surgery.calibration.stream import LayerStream, listening, silenced
from neuroweave.surgery.mlp_parts import MlpParts, find_mlp, is_linear
from neuroweave.surgery.sites import layer_places

Progress = Callable[[int, int, str], None]
SAMPLE = 4096  # tokens on which neurons are matched and errors are told
RIDGE = 1e-3


@dataclass(frozen=True)
class CalibrationOptions:
    """`ridge`: pull towards the present weights, relative to the Gram matrix's mean diagonal. `match`: scale neurons,
    and the outputs of projections that got an activation; `order`: choose which neurons run which segment; `attention`:
    solve the attention's output projection as well; `refine`: passes over the text in which all weights of each MLP are
    trained on its own error."""

    ridge: float = RIDGE
    match: bool = True
    order: bool = True
    attention: bool = True
    refine: int = 0

    def __post_init__(self) -> None:
        if not self.ridge >= 0:
            raise ValueError(f"ridge must not be negative, got {self.ridge}")
        if self.refine < 0:
            raise ValueError(f"refine must not be negative, got {self.refine}")


@dataclass
class CalibratedLayer:
    """What happened in one layer. Errors are |patched - teacher|^2 / |teacher's change in this layer|^2 of the stream
    behind it, before and after, on the first `SAMPLE` tokens; `scaled`: neurons whose scales are not 1; `moved`:
    neurons in another segment; `scaled_outputs`: the same of projections with an activation, by name; `refined`:
    whether training its MLP brought it closer on windows that were held out of that."""

    layer: int
    error_before: float = 0.0
    error_after: float = 0.0
    scaled: int = 0
    moved: int = 0
    scaled_outputs: dict[str, int] = field(default_factory=dict)
    refined: bool = False
    solved: list[str] = field(default_factory=list)
    left_out: str = ""


@dataclass(frozen=True)
class Calibration:
    layers: list[CalibratedLayer]
    tokens: int
    options: CalibrationOptions

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def calibrate(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    windows_NT: Tensor,
    *,
    folder: Path,
    options: CalibrationOptions | None = None,
    weights: Path | None = None,
    batch: int = 4,
    progress: Progress | None = None,
) -> Calibration:
    """Change the weights of `student`, in place, so that it comes closer to `teacher` on the windows of token ids.

    Both have the same layers. `folder`: where hidden states lie meanwhile (at most 16 bytes x tokens x hidden size).
    `weights`: a folder for the student's finished layers, mapped from there from then on: it must outlive the student,
    and of weights, memory holds one layer at a time. Beside them it holds hidden states of one layer: 8 bytes x tokens
    x hidden size, and as much again while an MLP is refined.
    Raises ValueError for models of different shapes and for windows that are too few.
    """
    options = options or CalibrationOptions()
    check_enough(windows_NT, options)
    layers: list[CalibratedLayer] = []
    with (
        LayerStream(teacher, windows_NT, folder=folder, batch=batch) as wanted,
        LayerStream(student, windows_NT, folder=folder, batch=batch) as given,
    ):
        check_alike(student, teacher, given, wanted)
        for number in range(len(given.layers)):
            if progress is not None:
                progress(number, len(given.layers), given.paths[number])
            layers.append(calibrate_layer(given, wanted, options, weights=weights))
    if progress is not None:
        progress(len(layers), len(layers), "")
    return Calibration(layers, windows_NT.numel(), options)


def check_enough(windows_NT: Tensor, options: CalibrationOptions) -> None:
    """Refuse to refine on one window: another one is needed to see whether it helped."""
    if options.refine and len(windows_NT) < 2:
        raise ValueError("refine needs at least two windows of text, one of them to be held out; give more tokens")


def check_alike(student: PreTrainedModel, teacher: PreTrainedModel, given: LayerStream, wanted: LayerStream) -> None:
    """Refuse a student that is not the teacher with other activations."""
    if len(given.layers) != len(wanted.layers):
        raise ValueError(f"the student has {len(given.layers)} layers, the teacher {len(wanted.layers)}")
    shapes = {name: tuple(parameter.shape) for name, parameter in teacher.named_parameters()}
    for name, parameter in student.named_parameters():
        if name in shapes and tuple(parameter.shape) != shapes[name]:
            raise ValueError(f"{name}: the student's is {list(parameter.shape)}, the teacher's {list(shapes[name])}")
        if name not in shapes and not re.search(r"gating_logits$|beta$", name):
            raise ValueError(f"{name}: the student has it and the teacher has not; is this the patched model's base?")


# ------------------------------------------------------------------------------------------------------- one layer


def calibrate_layer(
    given: LayerStream, wanted: LayerStream, options: CalibrationOptions, *, weights: Path | None = None
) -> CalibratedLayer:
    """Calibrate the present layer of the student; both streams go on to the next one."""
    done = CalibratedLayer(given.at)
    parts, teacher_parts = find_parts(given), find_parts(wanted)
    targets: dict[int, Tensor] = {}
    middles: dict[int, Tensor] = {}
    sample = [rows for rows in given.batches() if rows.start * given.windows_NT.shape[1] < SAMPLE]
    change = 0.0
    for rows in wanted.batches():
        with listening([teacher_parts.middle] if teacher_parts.middle is not None else []) as seen:
            targets[rows.start] = wanted.run(rows)
        if teacher_parts.middle is not None:
            middles[rows.start] = seen[teacher_parts.middle][0]
        if rows in sample:
            change += squares(targets[rows.start] - wanted.entered)
    before = sum(squares(given.run(rows) - targets[rows.start]) for rows in sample)
    if options.match:
        done.scaled_outputs = scale_projections(given, sample=SAMPLE)
    if parts.mlp is not None and teacher_parts.mlp is not None and (options.match or options.order):
        match_neurons(given, parts.mlp, teacher_parts.mlp, options, done)
    if options.attention and parts.attention is not None and parts.middle is not None and middles:
        solve(given, parts.attention, parts.attention_landing, parts.middle, middles, options.ridge)
        done.solved.append("attention.o")
    if parts.mlp is not None:
        solve(given, parts.mlp.down, parts.down_landing, None, targets, options.ridge)
        done.solved.append("mlp.down")
        if options.refine and parts.down_landing is not None:
            done.refined = refine(given, parts.mlp, parts.down_landing, targets, passes=options.refine, seed=given.at)
    else:
        done.left_out = parts.reason
    store_weights(given, weights)
    given.advance()
    wanted.advance(lambda rows: targets[rows.start])
    after = sum(squares(given.stored(rows) - targets[rows.start]) for rows in sample)
    done.error_before, done.error_after = (error / max(change, 1e-30) for error in (before, after))
    return done


def squares(x: Tensor) -> float:
    return float(x.pow(2).sum())


@torch.no_grad()
def store_weights(stream: LayerStream, folder: Path | None) -> None:
    """Write the working copy's weights into the model's own layer, in its dtype; with `folder`, into a file there that
    is mapped in place of the layer's memory, so that a finished layer takes none."""
    original, working = stream.layers[stream.at], stream.layer
    for number, (name, parameter) in enumerate(working.named_parameters()):
        own, solved = original.get_parameter(name), parameter.data
        if folder is not None:
            path = str(folder / f"{stream.at}-{number}")
            own.data = torch.from_file(path, shared=True, size=own.numel(), dtype=own.dtype).view(own.shape)
        if own.data is not solved:
            own.copy_(solved)


# ------------------------------------------------------------------------------------------------------- its parts


@dataclass
class Parts:
    """The modules of a layer that matter here. `middle`: the norm that the residual stream enters between attention
    and MLP; `reason`: why there is no `mlp`."""

    layer: nn.Module
    mlp: MlpParts | None = None
    attention: nn.Module | None = None
    middle: nn.Module | None = None
    down_landing: Landing | None = None
    attention_landing: Landing | None = None
    reason: str = ""


def find_parts(stream: LayerStream) -> Parts:
    """Name the parts of the present layer, and try where the projections' outputs land."""
    parts, layer = Parts(stream.layer), stream.layer
    try:
        parts.mlp = find_mlp(stream.model, layer)
    except ValueError as error:
        parts.reason = str(error)
        return parts
    places = [place for place in layer_places(stream.model, layer, 0, "") if place.op]
    attention = next((place.path.strip(".") for place in places if place.site == "attention.o"), None)
    if attention is not None and is_linear(layer.get_submodule(attention)):
        parts.attention = layer.get_submodule(attention)
    try_landings(stream, parts, parts.mlp)
    return parts


def try_landings(stream: LayerStream, parts: Parts, mlp: MlpParts) -> None:
    """Run one window as it is and with each projection's output zeroed, and see what that does."""
    rows = slice(0, 1)
    norms = [module for module in parts.layer.modules() if "norm" in type(module).__name__.lower()]
    watched = [*norms, mlp.down, mlp.block, *([parts.attention] if parts.attention is not None else [])]
    with listening(watched) as seen:
        landing = stream.run(rows)
    passed = {norm: seen[norm] for norm in norms if norm in seen}
    entered_block = seen[mlp.block][0]
    parts.middle = next((norm for norm, (_, left) in passed.items() if left is entered_block), None)
    with silenced(mlp.down):
        without = stream.run(rows)
    try:
        parts.down_landing = find_landing(seen[mlp.down][1], landing, without, passed)
    except ValueError as error:
        parts.reason, parts.mlp, parts.attention = str(error), None, None
        return
    if parts.attention is None or parts.middle is None or parts.attention not in seen:
        parts.attention = None
        return
    with silenced(parts.attention), listening([parts.middle]) as silent:
        stream.run(rows)
    try:
        y, at = seen[parts.attention][1], seen[parts.middle][0]
        parts.attention_landing = find_landing(y, at, silent[parts.middle][0], passed)
    except ValueError:
        parts.attention = None


# ------------------------------------------------------------------------------------------------- solving, matching


def solve(
    stream: LayerStream, projection: nn.Module, landing: Landing | None, at: nn.Module | None,
    targets: dict[int, Tensor], ridge: float,
) -> None:  # fmt: skip
    """Solve the projection's weight so that the stream (behind the layer, or entering `at`) lands on the targets."""
    assert landing is not None
    weight: Any = projection.weight
    sums = RidgeSums(weight.shape[1], weight.shape[0])
    for rows in stream.batches():
        with listening([projection, *([at] if at is not None else [])]) as seen:
            out = stream.run(rows, until=at)
        a, y = seen[projection]
        reached = out if at is None else seen[at][0]
        rest = reached - landing.added(y)
        aim, importance = landing.wanted(targets[rows.start] - rest, y)
        sums.add(a.flatten(0, 1), (aim - y).flatten(0, 1), importance.flatten(0, 1))
    with torch.no_grad():
        weight.add_(sums.correction(ridge, landing.caution()).to(weight.dtype))


def match_neurons(
    stream: LayerStream, mlp: MlpParts, teacher: MlpParts, options: CalibrationOptions, done: CalibratedLayer
) -> None:
    """Scale and order the neurons of the present layer, from a sample of its tokens."""
    old, new = teacher.activation, mlp.activation
    if mlp.gate is None or isinstance(new, NeuronMixture):
        return
    gates, ups, sampled = [], [], 0
    for rows in stream.batches():
        with listening([module for module in (mlp.gate, mlp.up) if module is not None]) as seen:
            stream.run(rows)
        gate = seen[mlp.gate][1].flatten(0, 1)
        if mlp.fused:
            gate, up = gate.chunk(2, dim=-1)
        else:
            up = seen[mlp.up][1].flatten(0, 1) if mlp.up is not None else torch.ones_like(gate)
        gates.append(gate)
        ups.append(up)
        sampled += len(gate)
        if sampled >= SAMPLE:
            break
    with torch.no_grad():
        gate, up = torch.cat(gates)[:SAMPLE], torch.cat(ups)[:SAMPLE]
        if options.order and isinstance(new, SegmentMixture):
            gate, up = order_neurons(mlp, new, old, gate, up, options.match, done)
        if options.match:
            s, c, _ = match(old, new, gate, up)
            mlp.scale(s, c)
            done.scaled = int(((s != 1) | (c != 1)).sum())


@torch.no_grad()
def order_neurons(
    mlp: MlpParts, new: SegmentMixture, old: Function, gate: Tensor, up: Tensor, scaled: bool, done: CalibratedLayer
) -> tuple[Tensor, Tensor]:
    """Permute the neurons so that each segment gets those that lose least by its activation."""
    down: Any = mlp.down.weight
    lengths = down.pow(2).sum(0)
    errors = []
    for member in new.members:
        plain = ((member(gate) - old(gate)) * up).pow(2).sum(0)
        errors.append((match(old, member, gate, up)[2] if scaled else plain) * lengths)
    sizes = new.segment_sizes(gate.shape[1])
    order = assign(torch.stack(errors, dim=1), sizes)
    done.moved = moved(order, sizes)
    mlp.reorder(order)
    return gate[:, order], up[:, order]


def moved(order: Tensor, sizes: list[int]) -> int:
    """How many neurons are in another segment than before."""
    segments = torch.cat([torch.full((size,), k) for k, size in enumerate(sizes)])
    return int((segments[order] != segments).sum())
