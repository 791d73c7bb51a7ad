"""The fused GLU on CPUs: C++ made from the formulas' expressions, run by `native/glu.h`. float32.

Letters: R rows, n neurons, K members.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from neuroweave.activations.expressions import Expression, statements
from neuroweave.activations.native import Kernel, gradient_results, has_beta, members_expressions, whole
from neuroweave.activations.neuron_functions import NeuronSegment
from neuroweave.native.build import SWITCH, NativeUnavailableError, library

BLOCK = 4096  # columns of a unit of work at most, as in glu.h
UNIT = 1 << 16  # elements of a unit whose rows may be divided
SINGLE = 1 << 15  # elements that one thread is enough for
STREAMED = 1 << 24  # bytes of a result from which on it goes past the caches


class Segment(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("kernel", "start", "stop")] + [
        (name, ctypes.c_void_p) for name in ("weights", "beta", "dweights", "dbeta")
    ]


class Call(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("rows", "columns", "segments", "gate_step", "up_step", "dout_step", "block", "row_block", "stream")
    ] + [(name, ctypes.c_void_p) for name in ("segment", "gate", "up", "dout", "out", "dgate", "dup")]


def cpp_source(kernels: Sequence[Kernel]) -> str:
    """A source for these kernels, numbered in their order."""
    parts = ['#include "glu.h"', *(kernel_source(number, kernel) for number, kernel in enumerate(kernels))]
    cases = [f"    case {number}: run_kernel<Kernel{number}>(call, s, unit); break;" for number in range(len(kernels))]
    head = "static void run_segment(const Call &call, const Segment &s, const Unit &unit) {\n    switch (s.kernel) {\n"
    return "\n".join([*parts, head + "\n".join(cases), "    }\n}\n"])


def kernel_source(number: int, kernel: Kernel) -> str:
    members = len(kernel[0]) if kernel[1] else 0
    weights = " ".join(f"vec w{k} = w[{k}];" for k in range(members))
    value = cpp_statements([("found", whole(kernel, members_expressions(kernel)))])
    gradient = [(f"out_{name}", expression) for name, expression in gradient_results(kernel)]
    given = {"out_y": "y", "out_dx": "dx", "out_dbeta": "db"} | {f"out_m{k}": f"m[{k}]" for k in range(members)}
    results = " ".join(f"{given[name]} = {name};" for name, _ in gradient)
    return (
        f"struct Kernel{number} {{\n    enum {{ MEMBERS = {members}, BETA = {int(has_beta(kernel))} }};\n"
        f"    static inline vec value(vec x, const vec *w, vec beta) {{ {weights} {value} return found; }}\n"
        "    static inline void gradient(vec x, const vec *w, vec beta, vec &y, vec &dx, vec *m, vec &db) {\n"
        f"        {weights} {cpp_statements(gradient)} {results}\n    }}\n}};"
    )


def cpp_statements(results: Sequence[tuple[str, Expression]]) -> str:
    number: Callable[[float], str] = lambda value: f"all({value!r}f)"  # noqa: E731
    return " ".join(statements(results, number=number, function=lambda f: f"g_{f}", declare="vec ", end=";"))


@functools.lru_cache(maxsize=256)
def compiled(kernels: tuple[Kernel, ...]) -> ctypes.CDLL | None:
    """The library of these kernels; None, from then on, where it cannot be had."""
    try:
        made = library(cpp_source(kernels))
    except NativeUnavailableError:
        return None
    made.glu_run.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    made.glu_run.restype = None
    return made


@functools.cache
def thread_team() -> int | None:
    """The address of `GOMP_parallel` in the OpenMP library that PyTorch has loaded: its threads wait already."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, OSError, TypeError):
        return None


def supports(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu"


def forward(gate: Tensor, up: Tensor, segments: Sequence[NeuronSegment]) -> Tensor | None:
    """act(gate) * up, shaped as gate `[..., n]`; None where nothing can be compiled."""
    out = torch.empty(gate.shape)
    return out if run(gate, up, None, segments, out=out) else None


def backward(
    dout: Tensor, gate: Tensor, up: Tensor, segments: Sequence[NeuronSegment]
) -> tuple[Tensor, Tensor, list[Tensor | None], list[Tensor | None]] | None:
    """Gradients of gate and up `[..., n]`, and for each segment of its weights [K, n] and beta [n]."""
    dgate, dup = torch.empty(gate.shape), torch.empty(gate.shape)
    made = torch.empty_like if gate.numel() else torch.zeros_like  # zeros would wake all threads for nothing
    dweights = [None if each.weights is None else made(each.weights) for each in segments]
    dbeta = [None if each.beta is None else made(each.beta) for each in segments]
    done = run(gate, up, dout, segments, dgate=dgate, dup=dup, dweights=dweights, dbeta=dbeta)
    return (dgate, dup, dweights, dbeta) if done else None


def run(gate: Tensor, up: Tensor, dout: Tensor | None, segments: Sequence[NeuronSegment], *,
        out: Tensor | None = None, dgate: Tensor | None = None, dup: Tensor | None = None,
        dweights: Sequence[Tensor | None] = (), dbeta: Sequence[Tensor | None] = ()) -> bool:  # fmt: skip
    """Fill the results; whether there was a library to do so."""
    kernels = tuple(dict.fromkeys(each.kernel for each in segments))
    made = compiled(kernels) if os.environ.get(SWITCH) != "0" else None
    if made is None:
        return False
    if gate.numel() == 0:
        return True
    n = gate.shape[-1]
    gate, up = rows_of(gate), rows_of(up)
    dout = None if dout is None else rows_of(dout)
    R = len(gate)
    table = (Segment * len(segments))()
    for place, each in enumerate(segments):
        gradients = (dweights[place], dbeta[place]) if dweights else (None, None)
        tensors = (each.weights, each.beta, *gradients)
        table[place] = Segment(kernels.index(each.kernel), each.start, each.stop, *map(address, tensors))
    threads = 1 if gate.numel() < SINGLE else torch.get_num_threads()
    share = -(-n // (2 * threads) // 64) * 64  # of columns whose rows must stay together: two units for each thread
    block = min(BLOCK, max(64, share)) if any(each is not None for each in (*dweights, *dbeta)) else BLOCK
    steps = (gate.stride(0), up.stride(0), 0 if dout is None else dout.stride(0))
    streams = streaming([out, dgate, dup], segments, n)
    call = Call(R, n, len(segments), *steps, block, max(4, UNIT // block), streams,
                ctypes.addressof(table), *map(address, (gate, up, dout, out, dgate, dup)))  # fmt: skip
    made.glu_run(ctypes.addressof(call), threads, thread_team())
    return True


def streaming(results: Sequence[Tensor | None], segments: Sequence[NeuronSegment], n: int) -> bool:
    """Whether large results are stored past the caches: not read first. Vectors must be aligned for that."""
    made = [each for each in results if each is not None]
    places = [n, *(each.start for each in segments)]
    aligned = all(4 * place % 64 == 0 for place in places) and all(each.data_ptr() % 64 == 0 for each in made)
    return aligned and 4 * made[0].numel() >= STREAMED


def rows_of(tensor: Tensor) -> Tensor:
    """[..., n] as [R, n] whose rows are contiguous: a view where that is possible."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
