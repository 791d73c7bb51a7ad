"""A program in PyTorch, on many tokens at once: the twin of the compiled one, step by step in the open.

Letters: T tokens, n width, H heads, G groups of heads that share keys, D size of a head, S positions of the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from torch import Tensor

from neuroweave.activations.formulas import FORMULAS
from neuroweave.activations.neuron_functions import NeuronSegment
from neuroweave.activations.torch import PRIMITIVES
from neuroweave.runtime import operations as of
from neuroweave.runtime.weights import PackedMatrix

State = dict[str, Tensor]


@torch.no_grad()
def run_reference(program: of.Program, caches: of.Caches, tokens: list[int], position: int) -> State:
    """The buffers [1, n] after the last of the tokens at `position` and on; caches hold all of them."""
    state = {name: torch.zeros(len(tokens), n) for name, n in program.buffers.items() if name != program.logits.buffer}
    ids = torch.tensor(tokens)
    for place, operation in enumerate(program.operations):
        if place == program.head:  # of the head, only the last token's is asked for: a vocabulary is wide
            state = {name: values[-1:] for name, values in state.items()}
            state[program.logits.buffer] = torch.zeros(1, program.logits.size)
        if isinstance(operation, of.Embed):
            write(state, operation.out, operation.matrix.rows_at(ids) * operation.scale)
        elif isinstance(operation, of.Attend):
            attend(operation, state, position, *caches[place])
        elif isinstance(operation, of.Rotate):
            rotate(operation, state, position)
        elif isinstance(operation, of.Gather):
            gather(operation, state, position, *caches[place])
        else:
            STEPS[type(operation)](operation, state)
    return state


def read(state: State, place: of.Place) -> Tensor:
    return state[place.buffer][:, place.start : place.start + place.size]


def write(state: State, place: of.Place, value: Tensor) -> None:
    read(state, place).copy_(value)


def product(x: Tensor, matrix: PackedMatrix) -> Tensor:
    return F.linear(x, matrix.whole(), matrix.bias)


def activate(x: Float[Tensor, "T n"], segments: list[NeuronSegment]) -> Float[Tensor, "T n"]:
    return torch.cat([one_segment(x[:, each.start : each.stop], each) for each in segments], dim=1)


def one_segment(x: Tensor, segment: NeuronSegment) -> Tensor:
    found = []
    for name, beta in segment.members:
        given = {} if beta is None else {"beta": segment.beta if isinstance(beta, str) else beta}
        found.append(FORMULAS[name](x, PRIMITIVES, **given))
    if segment.weights is None:
        return found[0]
    return sum(weight * part for weight, part in zip(segment.weights, found, strict=True))


def norm(op: of.Norm, state: State) -> None:
    x = read(state, op.source)
    x = x.reshape(len(x), -1, op.size)
    if op.centred:
        x = x - x.mean(-1, keepdim=True)
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + op.eps)
    y = y if op.weight is None else y * op.weight
    write(state, op.out, (y if op.bias is None else y + op.bias).flatten(1))


def linear(op: of.Linear, state: State) -> None:
    y = product(read(state, op.source), op.matrix)
    y = op.scale * (op.cap * torch.tanh(y / op.cap) if op.cap else y)
    write(state, op.out, read(state, op.out) + y if op.accumulate else y)


def rotate(op: of.Rotate, state: State, position: int) -> None:
    x = read(state, op.out)
    heads = x.reshape(len(x), -1, op.size)
    turned = op.cosines.shape[1]
    rows = slice(position, position + len(x))
    cos, sin = op.cosines[rows, None], op.sines[rows, None]
    first, second = heads[..., :turned].chunk(2, dim=-1)
    y = heads[..., :turned] * cos + torch.cat((-second, first), dim=-1) * sin
    write(state, op.out, torch.cat((y, heads[..., turned:]), dim=-1).flatten(1))


def attend(op: of.Attend, state: State, position: int, keys: Tensor, values: Tensor) -> None:
    query, key, value = (read(state, place) for place in (op.query, op.key, op.value))
    T = len(query)
    stop = position + T
    for cache, new in ((keys, key), (values, value)):
        cache[:, position:stop] = new.reshape(T, op.groups, op.size).transpose(0, 1)
    q = query.reshape(T, op.groups, -1, op.size).permute(1, 2, 0, 3)  # [G, H / G, T, D]
    scores = q @ keys[:, None, :stop].transpose(-1, -2) * op.scale
    if op.cap:
        scores = op.cap * torch.tanh(scores / op.cap)
    ages = torch.arange(position, stop)[:, None] - torch.arange(stop)
    seen = (ages >= 0) & (ages < op.window) if op.window else ages >= 0
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    write(state, op.out, (weights @ values[:, None, :stop]).permute(2, 0, 1, 3).reshape(T, -1))


def glu(op: of.Glu, state: State) -> None:
    x = read(state, op.source)
    y = activate(product(x, op.gate), op.segments)
    write(state, op.out, y if op.up is None else y * product(x, op.up))


def sparse_glu(op: of.SparseGlu, state: State) -> None:
    x = read(state, op.source)
    acted = activate(product(x, op.gate), op.segments)
    least = torch.zeros(()) if op.thresholds is None else op.thresholds
    acted = torch.where(acted.abs() <= least, 0, acted)  # NaN stays
    y = (acted * product(x, op.up)) @ op.down.whole()
    write(state, op.out, read(state, op.out) + op.scale * y)


def activation(op: of.Activate, state: State) -> None:
    write(state, op.out, activate(read(state, op.source), op.segments))


def add(op: of.Add, state: State) -> None:
    y = op.a * read(state, op.source)
    write(state, op.out, y if op.other is None else y + op.b * read(state, op.other))


def multiply(op: of.Multiply, state: State) -> None:
    write(state, op.out, read(state, op.source) * read(state, op.other))


def gather(op: of.Gather, state: State, position: int, ring: Tensor) -> None:
    """The ring holds what came before; the inputs of long ago are zeros."""
    x = read(state, op.source)
    before = torch.arange(position - op.places, position)
    past = torch.where((before >= 0)[:, None], ring[before % op.places], 0)
    line = torch.cat((past, x))
    reach = op.places - 1
    taps = [line[op.places - reach + t * op.dilation :][: len(x)] for t in range(op.taps)]
    write(state, op.out, torch.cat(taps, dim=1))
    kept = torch.arange(max(0, position + len(x) - op.places), position + len(x))
    ring[kept % op.places] = line[op.places - position + kept]


def softmax_gate(op: of.SoftmaxGate, state: State) -> None:
    gate, value = read(state, op.source).chunk(2, dim=1)
    write(state, op.out, value * gate.softmax(-1))


STEPS: dict[type, Callable[[Any, State], None]] = {
    of.Norm: norm,
    of.Linear: linear,
    of.Glu: glu,
    of.SparseGlu: sparse_glu,
    of.Activate: activation,
    of.Add: add,
    of.Multiply: multiply,
    of.SoftmaxGate: softmax_gate,
}
