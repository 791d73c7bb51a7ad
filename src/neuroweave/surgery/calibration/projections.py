"""Scale the outputs of projections that got an activation, so that it stands for none: c * act(s * y) for y.

s folds into the projection's own rows. c folds into the columns of the matrix that reads the output, where one does so
feature by feature: the attention's output projection reads the values, the down projection what the up projection
gives. Where a norm reads it (queries and keys of Gemma and Qwen) a common c does not matter. Elsewhere c is 1.

Letters: T tokens, n outputs of the projection.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from neuroweave.activations.mixtures import NeuronMixture
from neuroweave.surgery.apply import ActivatedProjection, ProjectionPart
from neuroweave.surgery.calibration.neurons import match
from neuroweave.surgery.calibration.stream import LayerStream, bypassed, listening
from neuroweave.surgery.sites import layer_places, linear_sizes

READERS = {"attention.v": "attention.o", "mlp.up": "mlp.down"}
TOLERANCE = 1e-3  # relative, of a layer's output when a factor moves from one matrix to the next


@dataclass(frozen=True, eq=False)
class Activated:
    """An activation on the outputs `start:stop` of a projection. `reader`: the matrix that reads them one by one, and
    which of them each of its columns reads; None where there is none."""

    name: str
    module: ActivatedProjection
    activation: nn.Module
    start: int
    stop: int
    reader: tuple[nn.Module, Int[Tensor, " columns"]] | None = None


@torch.no_grad()
def scale_projections(stream: LayerStream, *, sample: int) -> dict[str, int]:
    """Scale every activated projection of the present layer on the first `sample` tokens; returns how many outputs of
    each got other scales than 1. Learned mixtures stay as they are: they are for training."""
    scaled: dict[str, int] = {}
    for each in activated_projections(stream):
        y_Tn = bare_outputs(stream, each, sample)
        free = each.reader is not None or length_is_free(stream, each)
        s, c, _ = match(nn.Identity(), each.activation, y_Tn, torch.ones_like(y_Tn), free=free)
        multiply_rows(each, s)
        if each.reader is not None:
            module, read = each.reader
            weight: Any = module.weight
            weight.mul_(c[read])
        scaled[each.name] = scaled.get(each.name, 0) + int(((s != 1) | (c != 1)).sum())
    return scaled


def bare_outputs(stream: LayerStream, each: Activated, sample: int) -> Tensor:
    """The first `sample` outputs [T, n] before the activation."""
    projection, found, count = each.module.__dict__["projection"], [], 0
    for rows in stream.batches():
        with listening([projection]) as seen:
            stream.run(rows)
        found.append(seen[projection][1][..., each.start : each.stop].flatten(0, -2))
        count += len(found[-1])
        if count >= sample:
            break
    return torch.cat(found)[:sample]


def multiply_rows(each: Activated, s: Tensor) -> None:
    for tensor in (each.module.weight, getattr(each.module, "bias", None)):
        if isinstance(tensor, Tensor):
            rows = tensor[each.start : each.stop]
            rows.mul_(s[:, None] if tensor.ndim == 2 else s)


def activated_projections(stream: LayerStream) -> Iterator[Activated]:
    """Those of the present layer with one plain activation, or one a part, behind a plain matrix."""
    for name, module in stream.layer.named_modules():
        if not isinstance(module, ActivatedProjection) or "activation_before" in module._modules:
            continue
        sizes = linear_sizes(module.__dict__["projection"])
        weight: Any = module.weight
        if sizes is None or weight.ndim != 2 or weight.shape[0] != sizes[1]:
            continue
        behind = list(module.activation_after)
        if any(isinstance(part, NeuronMixture) for each in behind for part in each.modules()):
            continue
        parts = [each for each in behind if isinstance(each, ProjectionPart)]
        if not parts and len(behind) == 1:
            yield with_reader(stream, Activated(name, module, behind[0], 0, sizes[1]))
        elif len(parts) == len(behind):
            for part in parts:
                yield with_reader(stream, Activated(name, module, part.activation, part.start, part.stop))


def with_reader(stream: LayerStream, each: Activated) -> Activated:
    """The same with the matrix that reads it feature by feature, if trying shows that a factor can move there."""
    places = [place for place in layer_places(stream.model, stream.layer, 0, "") if place.op == "projection"]
    here = (each.start, each.stop)
    for place in places:
        if place.path.strip(".") != each.name or place.site not in READERS or (place.part or here) != here:
            continue
        for reader in places:
            if reader.site == READERS[place.site]:
                found = replace(each, reader=read_by(stream, stream.layer.get_submodule(reader.path.strip(".")), each))
                return found if found.reader is not None and factor_moves(stream, found) else each
    return each


def read_by(stream: LayerStream, module: nn.Module, each: Activated) -> tuple[nn.Module, Tensor] | None:
    """Which output each column reads: its own, or that of its group's head where several queries share a value."""
    weight: Any = module.weight
    outputs, columns = each.stop - each.start, weight.shape[1]
    if weight.ndim != 2 or columns % outputs:
        return None
    config = stream.model.config.get_text_config(decoder=True)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    column = torch.arange(columns)
    return module, column // head // (columns // outputs) * head + column % head


def length_is_free(stream: LayerStream, each: Activated) -> bool:
    """Whether, without the activation, twice the outputs give the same: a norm reads them."""
    rows = next(stream.batches())
    twice = torch.full((each.stop - each.start,), 2.0)
    with bypassed(each.activation):
        before = stream.run(rows)
        multiply_rows(each, twice)
        after = stream.run(rows)
        multiply_rows(each, 1 / twice)  # exact
    return close(after, before, stream.entered)


def factor_moves(stream: LayerStream, each: Activated) -> bool:
    """Whether, without the activation, factors on the outputs and their inverses on the columns cancel."""
    assert each.reader is not None
    module, read = each.reader
    weight: Any = module.weight
    rows = next(stream.batches())
    factor = torch.linspace(0.5, 2.0, each.stop - each.start)
    kept = [(tensor, tensor.clone()) for tensor in (*each.module.parameters(recurse=False), weight)]
    with bypassed(each.activation):
        before = stream.run(rows)
        multiply_rows(each, factor)
        weight.mul_(1 / factor[read])
        after = stream.run(rows)
    for tensor, old in kept:
        tensor.copy_(old)
    return close(after, before, stream.entered)


def close(after: Tensor, before: Tensor, entered: Tensor) -> bool:
    """Whether a layer does the same to its input up to rounding."""
    return bool((after - before).norm() <= TOLERANCE * (before - entered).norm())
