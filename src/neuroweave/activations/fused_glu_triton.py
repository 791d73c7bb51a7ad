"""The fused GLU on GPUs: Triton kernels made from the formulas' expressions. float32, float16, bfloat16.

Arithmetic is in float32. Each group of `ROWS_OF_A_SUM` rows leaves one row of partial sums of the gradients of weights
and beta, in an order that is always the same; PyTorch adds those up. Letters: n neurons, K members.
"""

from __future__ import annotations

import functools
import hashlib
import linecache
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from neuroweave.activations.expressions import Expression, statements
from neuroweave.activations.fused_glu_native import rows_of
from neuroweave.activations.native import Kernel, gradient_results, has_beta, members_expressions, whole
from neuroweave.activations.neuron_functions import NeuronSegment

ROWS, COLUMNS = 4, 256  # of a tile; 1,024 elements for 128 threads
ROWS_OF_A_SUM = 128

FUNCTIONS = """
import triton
import triton.language as tl

@triton.jit
def f_sigmoid(x):
    t = tl.exp(-tl.abs(x))
    return tl.where(x < 0, t, 1.0) / (1.0 + t)

@triton.jit
def f_tanh(x):
    a = tl.abs(x)
    t = tl.exp(-2.0 * a)
    y = a * a
    small = -5.70498872745e-3 * y + 2.06390887954e-2
    small = small * y - 5.37397155531e-2
    small = small * y + 1.33314422036e-1
    small = (small * y - 3.33332819422e-1) * y * a + a
    size = tl.where(a < 0.625, small, (1.0 - t) / (1.0 + t))
    return tl.where(x < 0, -size, size)

@triton.jit
def f_normal_cdf(x):
    return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)

@triton.jit
def f_normal_pdf(x):
    return tl.exp(-0.5 * x * x) * 0.3989422804014327

@triton.jit
def f_sin(x):
    return tl.sin(x)

@triton.jit
def f_cos(x):
    return tl.cos(x)

@triton.jit
def f_relu(x):
    return tl.where(x <= 0, 0.0, x)

@triton.jit
def f_step(x):
    return tl.where(x > 0, 1.0, 0.0)
"""

PLACES = """
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < stop - start
"""
LOADS = """
        row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mask = (row < rows) & inside[None, :]
        x = tl.load(gate + row * gate_step + (start + column)[None, :], mask=mask, other=0.0).to(tl.float32)
        u = tl.load(up + row * up_step + (start + column)[None, :], mask=mask, other=0.0).to(tl.float32)
        at = row * n + (start + column)[None, :]
"""


def triton_source(kernel: Kernel) -> str:
    """A module with the functions `forward` and `backward` of one kernel, on the columns start to stop."""
    members = len(kernel[0]) if kernel[1] else 0
    sums = [f"w{k}" for k in range(members)] + ["beta"] * has_beta(kernel)
    fixed = "start, stop, rows, n, gate_step, up_step"
    sizes = "ROWS: tl.constexpr, COLUMNS: tl.constexpr"
    arguments = f"weights, beta_values, {fixed}"
    learned = "".join(
        f"    {name} = tl.load({place}, mask=inside, other=0.0)[None, :]\n"
        for name, place in [(f"w{k}", f"weights + {k} * (stop - start) + column") for k in range(members)]
        + [("beta", "beta_values + column")] * has_beta(kernel)
    )
    value = [("found", whole(kernel, members_expressions(kernel)))]
    names = {f"m{k}": f"w{k}" for k in range(members)} | {"dbeta": "beta"}
    gradient = [(f"out_{names.get(name, name)}", expression) for name, expression in gradient_results(kernel)]
    zeros = "".join(f"    sum_{name} = tl.zeros([COLUMNS], tl.float32)\n" for name in sums)
    added = "".join(f"        sum_{name} += tl.sum(tl.where(mask, g * out_{name}, 0.0), axis=0)\n" for name in sums)
    kept = "".join(
        f"    tl.store(partial + (tl.program_id(0) * {len(sums)} + {k}) * (stop - start) + column, sum_{name}, "
        f"mask=inside)\n"
        for k, name in enumerate(sums)
    )
    return f"""{FUNCTIONS}
@triton.jit
def forward(gate, up, out, {arguments}, {sizes}):{PLACES}{learned}
    first = tl.program_id(0) * ROWS
    if True:{LOADS}{lines(value)}
        tl.store(out + at, (found * u).to(out.dtype.element_ty), mask=mask)

@triton.jit
def backward(dout, gate, up, dgate, dup, partial, {arguments}, dout_step, {sizes}, COUNT: tl.constexpr):
{PLACES}{learned}
{zeros}
    for done in range(0, COUNT, ROWS):
        first = tl.program_id(0) * COUNT + done{LOADS}
        d = tl.load(dout + row * dout_step + (start + column)[None, :], mask=mask, other=0.0).to(tl.float32)
{lines(gradient)}
        g = d * u
        tl.store(dup + at, (d * out_y).to(dup.dtype.element_ty), mask=mask)
        tl.store(dgate + at, (g * out_dx).to(dgate.dtype.element_ty), mask=mask)
{added}{kept}
"""


def lines(results: Sequence[tuple[str, Expression]]) -> str:
    """Assignments; a result that is a bare number gets the shape of x."""
    number: Callable[[float], str] = repr
    made = statements(results, number=number, function=lambda f: f"f_{f}", declare="", end="")
    flat = {f"{name} = {expression.value!r}" for name, expression in results if expression.operation == "number"}
    return "".join(f"        {line} + tl.zeros_like(x)\n" if line in flat else f"        {line}\n" for line in made)


@functools.lru_cache(maxsize=256)
def compiled(kernel: Kernel) -> Any:
    """The module of a kernel. Triton reads a function's source: `linecache` holds it, there is no file."""
    source = triton_source(kernel)
    name = f"<neuroweave glu {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    names: dict[str, Any] = {"__name__": "neuroweave_glu"}
    exec(compile(source, name, "exec"), names)  # our own source
    return names


def forward(gate: Tensor, up: Tensor, segments: Sequence[NeuronSegment]) -> Tensor:
    """act(gate) * up, shaped as gate `[..., n]`."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    x, u = rows_of(gate), rows_of(up)
    if not x.numel():
        return out
    rows, n = x.shape
    for each in segments:
        learned = (given(each.weights, out), given(each.beta, out))
        grid = (-(-rows // ROWS), -(-(each.stop - each.start) // COLUMNS))
        with torch.cuda.device_of(gate):
            compiled(each.kernel)["forward"][grid](
                x, u, out, *learned, each.start, each.stop, rows, n, x.stride(0), u.stride(0),
                ROWS=ROWS, COLUMNS=COLUMNS,
            )  # fmt: skip
    return out


def backward(
    dout: Tensor, gate: Tensor, up: Tensor, segments: Sequence[NeuronSegment]
) -> tuple[Tensor, Tensor, list[Tensor | None], list[Tensor | None]]:
    """Gradients of gate and up `[..., n]`, and for each segment of its weights [K, n] and beta [n]."""
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    d, x, u = rows_of(dout), rows_of(gate), rows_of(up)
    rows, n = x.shape
    dweights: list[Tensor | None] = []
    dbeta: list[Tensor | None] = []
    for each in segments:
        K = 0 if each.weights is None else len(each.weights)
        many = K + (each.beta is not None)
        count = ROWS_OF_A_SUM if many else ROWS
        size = each.stop - each.start
        groups = -(-rows // count)
        partial = x.new_empty((groups, many, size), dtype=torch.float32) if many else given(None, dgate)
        learned = (given(each.weights, dgate), given(each.beta, dgate))
        if x.numel():
            with torch.cuda.device_of(gate):
                compiled(each.kernel)["backward"][(groups, -(-size // COLUMNS))](
                    d, x, u, dgate, dup, partial, *learned, each.start, each.stop, rows, n, x.stride(0), u.stride(0),
                    d.stride(0), ROWS=ROWS, COLUMNS=COLUMNS, COUNT=count,
                )  # fmt: skip
        sums = partial.sum(0) if many else partial
        dweights.append(None if each.weights is None else sums[:K])
        dbeta.append(None if each.beta is None else sums[K])
    return dgate, dup, dweights, dbeta


def given(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A pointer for the kernel; where there is no tensor it is not read."""
    return other if tensor is None else tensor
