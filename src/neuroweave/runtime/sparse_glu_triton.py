"""A gated MLP on one token with skipped neurons unread: y = down(act(gate x) * up x), as Triton kernels. For inference.

A neuron with |act(gate x)| at most its threshold counts for nothing, and its rows of up and of the neuron-major down
are not read: their loads are masked. `hidden`: one program a neuron, its gate and, if it lives, its up product.
`part`: sums of down's rows over up to `SPLITS` groups of neurons; `total` adds those up, in an order that is always the
same. Nothing is copied to the host, so a CUDA graph can hold it. Arithmetic is in float32. Run under Triton's
interpreter and compiled for sm_90; it has NEVER RUN ON A GPU, and the sizes of tiles are reasoned, not tuned. So each
machine's kernels are tried first (`kernels_agree`), and PyTorch takes over where they fail.
Letters: C inputs, n neurons, D outputs, K members, S splits.
"""

from __future__ import annotations

import functools
import hashlib
import linecache
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from neuroweave.activations.fused_glu import CLOSE, member_sum, read_plan, segments_of
from neuroweave.activations.fused_glu_triton import FUNCTIONS, given, lines
from neuroweave.activations.native import Kernel, has_beta, members_expressions, whole
from neuroweave.activations.neuron_functions import NeuronSegment

ROWS = 1  # neurons of a program of `hidden`: a dead one costs no instructions then
TILES = (4096, 2048, 1024)  # inputs at once; 32 for each thread
NEURONS, WIDE = 64, 256  # of a tile of down
SPLITS, NARROW = 128, 32  # groups of neurons at most, and outputs, of the tile that adds them up

HIDDEN = """
@triton.jit
def hidden(x_row, gate, up, out, thresholds, weights, beta_values, start, stop, gate_step, gate_stride, up_step,
           up_stride, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = column < stop - start
    neuron = (start + column).to(tl.int64)
    x = product(x_row, gate + neuron * gate_step, gate_stride, inside, C, ROWS, COLUMNS)
LEARNED
FORMULA
    least = tl.load(thresholds + neuron, mask=inside, other=0.0).to(tl.float32)
    live = inside & ((tl.abs(found) <= least) == 0)  # what is not a number lives
    u = tl.zeros([ROWS], tl.float32)
    if tl.max(live.to(tl.int32), axis=0) > 0:
        u = product(x_row, up + neuron * up_step, up_stride, live, C, ROWS, COLUMNS)
    tl.store(out + neuron, tl.where(live, found * u, 0.0), mask=inside)
"""
PRODUCT = """
@triton.jit
def product(x_row, rows, stride, read, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for done in range(0, C, COLUMNS):
        at = done + tl.arange(0, COLUMNS)
        values = tl.load(x_row + at, mask=at < C, other=0.0).to(tl.float32)
        mask = read[:, None] & (at < C)[None, :]
        part = tl.load(rows[:, None] + (at.to(tl.int64) * stride)[None, :], mask=mask, other=0.0).to(tl.float32)
        total += part * values[None, :]
    return tl.sum(total, axis=1)
"""
SUMS = """
import triton
import triton.language as tl

@triton.jit
def part(hidden, down, parts, n, D, down_step, down_stride, COUNT: tl.constexpr, NEURONS: tl.constexpr,
         WIDE: tl.constexpr):
    column = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    total = tl.zeros([WIDE], tl.float32)
    for done in range(0, COUNT, NEURONS):
        neuron = tl.program_id(1) * COUNT + done + tl.arange(0, NEURONS)
        value = tl.load(hidden + neuron, mask=neuron < n, other=0.0)
        read = (value != 0)[:, None] & (column < D)[None, :]
        place = (neuron.to(tl.int64) * down_step)[:, None] + (column.to(tl.int64) * down_stride)[None, :]
        row = tl.load(down + place, mask=read, other=0.0).to(tl.float32)
        total += tl.sum(value[:, None] * row, axis=0)
    tl.store(parts + tl.program_id(1) * D + column, total, mask=column < D)

@triton.jit
def total(parts, out, S, D, SPLITS: tl.constexpr, NARROW: tl.constexpr):
    column = tl.program_id(0) * NARROW + tl.arange(0, NARROW)
    split = tl.arange(0, SPLITS)
    mask = (split < S)[:, None] & (column < D)[None, :]
    found = tl.sum(tl.load(parts + split[:, None] * D + column[None, :], mask=mask, other=0.0), axis=0)
    tl.store(out + column, found.to(out.dtype.element_ty), mask=column < D)
"""


def triton_source(kernel: Kernel) -> str:
    """A module with the function `hidden` of one kernel, on the neurons start to stop."""
    members = len(kernel[0]) if kernel[1] else 0
    places = {f"w{k}": f"weights + {k} * (stop - start) + column" for k in range(members)}
    places |= {"beta": "beta_values + column"} if has_beta(kernel) else {}
    learned = [
        f"    {name} = tl.load({place}, mask=inside, other=0.0).to(tl.float32)" for name, place in places.items()
    ]
    formula = lines([("found", whole(kernel, members_expressions(kernel)))]).replace("        ", "    ")
    hidden = HIDDEN.replace("LEARNED\n", "".join(f"{line}\n" for line in learned)).replace("FORMULA\n", formula)
    return f"{FUNCTIONS}{PRODUCT}{hidden}"


@functools.lru_cache(maxsize=256)
def compiled(source: str) -> Any:
    """The names in a module of kernels. Triton reads a function's source: `linecache` holds it, there is no file."""
    name = f"<neuroweave sparse glu {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    names: dict[str, Any] = {"__name__": "neuroweave_sparse_glu"}
    exec(compile(source, name, "exec"), names)  # our own source
    return names


def columns_for(inputs: int) -> int:
    """The widest tile of which those that a row needs are at most an eighth empty, else the narrowest."""
    return next((each for each in TILES if -inputs % each <= inputs // 7), TILES[-1])


def splits_for(neurons: int) -> tuple[int, int]:
    """(S, neurons of each), at most `SPLITS`."""
    count = NEURONS * -(-neurons // (NEURONS * SPLITS))
    return -(-neurons // count), count


def run_kernels(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, thresholds: Tensor, segments: Sequence[NeuronSegment]
) -> Tensor:
    """y, shaped as x but for its last dimension, of an x `[..., C]` that is one row."""
    (n, C), D = gate.shape, down.shape[0]
    row, least = x.reshape(-1).contiguous(), thresholds.contiguous()
    acted = x.new_empty(n, dtype=torch.float32)
    S, count = splits_for(n)
    parts = x.new_empty(S, D, dtype=torch.float32)
    out = x.new_empty(*x.shape[:-1], D)
    columns = columns_for(C)
    with torch.cuda.device_of(x):
        for each in segments:
            learned = [given(t if t is None else t.contiguous(), acted) for t in (each.weights, each.beta)]
            compiled(triton_source(each.kernel))["hidden"][(-(-(each.stop - each.start) // ROWS),)](
                row, gate, up, acted, least, *learned, each.start, each.stop, *gate.stride(), *up.stride(),
                C=C, ROWS=ROWS, COLUMNS=columns, num_warps=max(1, ROWS * columns // 1024),
            )  # fmt: skip
        sums = compiled(SUMS)
        sums["part"][(-(-D // WIDE), S)](
            acted, down, parts, n, D, down.stride(1), down.stride(0), COUNT=count, NEURONS=NEURONS, WIDE=WIDE
        )
        sums["total"][(-(-D // NARROW),)](parts, out, S, D, SPLITS=SPLITS, NARROW=NARROW)
    return out


def twin(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, thresholds: Tensor, segments: Sequence[NeuronSegment]
) -> Tensor:
    """The same in PyTorch, of any number of rows; products are rounded to x's dtype, what is between is in float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    made = F.linear(x, gate).to(wide)
    acted = torch.cat([member_sum(made[..., each.start : each.stop], each) for each in segments], dim=-1)
    y = torch.where(acted.abs() <= thresholds, 0, acted * F.linear(x, up).to(wide))
    return F.linear(y.to(x.dtype), down)


# --------------------------------------------------------------------------------------------------------- operation

SCHEMA = (
    "(Tensor x, Tensor gate, Tensor up, Tensor down, Tensor thresholds, Tensor[] weights, Tensor[] beta, str plan) "
    "-> Tensor"
)


@torch.library.custom_op("neuroweave::sparse_glu", mutates_args=(), schema=SCHEMA)
def sparse_glu(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, thresholds: Tensor, weights: list[Tensor], beta: list[Tensor],
    plan: str,
) -> Tensor:  # fmt: skip
    """down(act(gate x) * up x) of x `[..., C]` without the neurons that act to `thresholds` [n] at most.

    gate, up [n, C]; down [D, n], which should lie neuron by neuron (`down.T` contiguous), or reading it is slow.
    weights, beta, plan: of the activation, as in `activations.fused_glu`. One row on a GPU goes through the kernels.
    """
    segments = segments_of(plan, weights, beta)
    inputs = (x, gate, up, down, thresholds)
    one_row = x.numel() == x.shape[-1] and all(each.dtype == x.dtype for each in (gate, up, down))
    if one_row and x.device.type == "cuda" and kernels_agree(plan, x.dtype, x.device):
        return run_kernels(*inputs, segments)
    return twin(*inputs, segments)


@sparse_glu.register_fake
def _(x: Any, gate: Any, up: Any, down: Any, thresholds: Any, weights: Any, beta: Any, plan: Any) -> Any:
    return x.new_empty(*x.shape[:-1], down.shape[0])


@functools.lru_cache(maxsize=256)
def kernels_agree(plan: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this machine's kernels of a plan give what the twin gives in float64, tried once; a warning if not.

    Thresholds are half and twice what each other neuron acts to, so that rounding decides nothing.
    """
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return (2 * torch.rand(shape, generator=generator) - 1).to(device)

    segments = [
        replace(
            each,
            weights=drawn(len(each.members), each.stop - each.start) if w >= 0 else None,
            beta=drawn(each.stop - each.start) + 1.5 if b >= 0 else None,
        )
        for each, w, b in read_plan(plan)
    ]
    n, C, D = segments[-1].stop, 272, 144
    x, gate, up, down = (each.to(dtype) for each in (drawn(1, C), drawn(n, C) * 6 / C**0.5, drawn(n, C), drawn(n, D).T))
    wide = [each.double() for each in (x, gate, up, down)]
    exact = [
        replace(each, **{name: t.double() for name in ("weights", "beta") if (t := getattr(each, name)) is not None})
        for each in segments
    ]
    made = F.linear(wide[0], wide[1])[0]
    acted = torch.cat([member_sum(made[each.start : each.stop], each) for each in exact])
    least = acted.abs() * torch.where(torch.arange(n, device=device) % 2 == 0, 0.5, 2.0)
    try:
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"there are none of {dtype}")
        found = run_kernels(x, gate, up, down, least.float(), segments)
        wanted = twin(wide[0], wide[1], wide[2], wide[3], least, exact)
        off = float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
        if not off <= CLOSE.get(dtype, 3e-2):
            raise ValueError(f"they are {off:.2g} of the largest value off")
    except Exception as error:  # whatever a compiler or driver says, decoding goes on without it
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        warnings.warn(f"the sparse Triton kernels of {plan!r} are not used on {device}: {reason}", stacklevel=2)
        return False
    return True
