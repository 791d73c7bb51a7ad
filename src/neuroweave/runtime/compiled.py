"""A program compiled for this machine: one call runs a token through all of its operations (`native/decoder.h`)."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neuroweave.activations.native import Kernel, activate_source
from neuroweave.activations.neuron_functions import NeuronSegment
from neuroweave.native.build import library
from neuroweave.runtime import operations as of
from neuroweave.runtime.weights import FORMATS, PackedMatrix

SAME_INPUT = 2  # a flag
KINDS = ("embed", "norm", "linear", "rotate", "attend", "glu", "activate", "add", "gather", "softmax_gate",
         "sparse_glu", "merge", "multiply")  # fmt: skip


class NativeSegment(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("kind", "start", "stop", "stride")] + [
        ("weights", ctypes.c_void_p),
        ("beta", ctypes.c_void_p),
    ]


class NativeMatrix(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("data", "scales", "bias")] + [
        (name, ctypes.c_int32) for name in ("rows", "columns", "format", "padding")
    ]


class NativeOp(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_int32) for name in ("kind", "n", "m", "k", "flags", "heads", "groups", "window")],
        *[(name, ctypes.c_float) for name in ("a", "b")],
        *[(name, ctypes.c_void_p) for name in ("in_", "in2", "out", "weight", "weight2", "keys", "values")],
        *[(name, ctypes.c_void_p) for name in ("matrix", "matrix2", "matrix3", "segments")],
        ("segment_count", ctypes.c_int64),
    ]


class CompiledProgram:
    """`step` runs one token. `buffers` [n] hold what it leaves; `caches` are written to.

    Raises NativeUnavailableError where nothing can be compiled.
    """

    def __init__(self, program: of.Program, caches: of.Caches, threads: int) -> None:
        self.kept: list[Any] = []  # what the structures point to
        self.kernels: list[Kernel] = []
        self.buffers = {name: torch.zeros(width) for name, width in program.buffers.items()}
        ops = [
            op
            for place, operation in enumerate(program.operations)
            for op in self.native(operation, *caches.get(place, ()))
        ]
        for before, after in itertools.pairwise(ops):
            after.flags |= SAME_INPUT * self.same_input(before, after)
        self.ops = (NativeOp * len(ops))(*ops)
        self.library = decoder_library(self.kernels)
        self.team = self.library.neuroweave_team(threads)

    def step(self, token: int, position: int) -> None:
        self.library.neuroweave_run(self.team, self.ops, len(self.ops), token, position)

    def close(self) -> None:
        """End its threads."""
        if getattr(self, "team", None):
            self.library.neuroweave_end(self.team)
            self.team = None

    __del__ = close

    # ------------------------------------------------------------------------------------------------- structures

    def native(self, op: of.Operation, *cache: Tensor) -> list[NativeOp]:
        at, to = self.place, self.tensor
        match op:
            case of.Embed():
                return [made("embed", out=at(op.out), matrix=self.matrix(op.matrix), a=op.scale)]
            case of.Norm():
                return [
                    made(
                        "norm", n=op.size, m=op.source.size // op.size, flags=int(op.centred), a=op.eps,
                        in_=at(op.source), out=at(op.out), weight=to(op.weight), weight2=to(op.bias),
                    )
                ]  # fmt: skip
            case of.Linear():
                return [
                    made(
                        "linear", in_=at(op.source), out=at(op.out), matrix=self.matrix(op.matrix), a=op.scale,
                        b=op.cap, flags=int(op.accumulate),
                    )
                ]  # fmt: skip
            case of.Rotate():
                turned = op.cosines.shape[1]
                return [
                    made(
                        "rotate", n=op.size, m=turned, k=turned, heads=op.out.size // op.size, out=at(op.out),
                        weight=to(op.cosines), weight2=to(op.sines),
                    )
                ]  # fmt: skip
            case of.Attend():
                return [
                    made(
                        "attend", n=op.size, m=cache[0].shape[1], heads=op.heads, groups=op.groups, window=op.window,
                        a=op.scale, b=op.cap, in_=at(op.query), in2=at(op.key), weight=at(op.value), out=at(op.out),
                        keys=to(cache[0]), values=to(cache[1]),
                    )
                ]  # fmt: skip
            case of.Glu():
                up = None if op.up is None else self.matrix(op.up)
                return [
                    made(
                        "glu", in_=at(op.source), out=at(op.out), matrix=self.matrix(op.gate), matrix2=up,
                        **self.segments(op.segments),
                    )
                ]  # fmt: skip
            case of.SparseGlu():
                return [
                    made(
                        "sparse_glu", in_=at(op.source), matrix=self.matrix(op.gate), matrix2=self.matrix(op.up),
                        matrix3=self.matrix(op.down), weight=to(op.thresholds), **self.segments(op.segments),
                    ),
                    made("merge", n=op.out.size, a=op.scale, out=at(op.out)),
                ]  # fmt: skip
            case of.Activate():
                where = {"in_": at(op.source), "out": at(op.out)}
                return [made("activate", n=op.out.size, **where, **self.segments(op.segments))]
            case of.Add():
                other = None if op.other is None else at(op.other)
                return [made("add", n=op.out.size, in_=at(op.source), in2=other, out=at(op.out), a=op.a, b=op.b)]
            case of.Multiply():
                places = {"in_": at(op.source), "in2": at(op.other), "out": at(op.out)}
                return [made("multiply", n=op.out.size, **places)]
            case of.Gather():
                return [
                    made(
                        "gather", n=op.source.size, m=op.places, k=op.dilation, heads=op.taps, in_=at(op.source),
                        out=at(op.out), keys=to(cache[0]),
                    )
                ]  # fmt: skip
            case of.SoftmaxGate():
                return [made("softmax_gate", n=op.out.size, in_=at(op.source), out=at(op.out))]

    def same_input(self, before: NativeOp, after: NativeOp) -> bool:
        """Whether both are linear in the same input, rounded alike, so that it need not be rounded again."""
        linear = KINDS.index("linear")
        if not before.kind == after.kind == linear or before.in_ != after.in_:
            return False
        formats = [ctypes.cast(op.matrix, ctypes.POINTER(NativeMatrix)).contents.format for op in (before, after)]
        return formats[0] == formats[1]

    def place(self, place: of.Place) -> int:
        return self.buffers[place.buffer].data_ptr() + 4 * place.start

    def tensor(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        assert tensor.is_contiguous()
        assert tensor.dtype == torch.float32
        self.kept.append(tensor)
        return tensor.data_ptr()

    def matrix(self, matrix: PackedMatrix) -> int:
        assert all(each is None or each.is_contiguous() for each in (matrix.data, matrix.scales))
        native = NativeMatrix(
            data=matrix.data.data_ptr(),
            scales=None if matrix.scales is None else matrix.scales.data_ptr(),
            bias=self.tensor(matrix.bias),
            rows=matrix.rows,
            columns=matrix.columns,
            format=FORMATS.index(matrix.format),
        )
        self.kept += [matrix, native]
        return ctypes.addressof(native)

    def segments(self, segments: Sequence[NeuronSegment]) -> dict[str, int]:
        found = []
        for each in segments:
            if each.kernel not in self.kernels:
                self.kernels.append(each.kernel)
            found.append(
                NativeSegment(
                    kind=self.kernels.index(each.kernel),
                    start=each.start,
                    stop=each.stop,
                    stride=0 if each.weights is None else each.weights.shape[1],
                    weights=self.tensor(each.weights),
                    beta=self.tensor(each.beta),
                )
            )
        array = (NativeSegment * len(found))(*found)
        self.kept.append(array)
        return {"segments": ctypes.addressof(array), "segment_count": len(found)}


def made(kind: str, **fields: Any) -> NativeOp:
    return NativeOp(kind=KINDS.index(kind), **fields)


def decoder_library(kernels: Sequence[Kernel]) -> ctypes.CDLL:
    """The decoder with these activations. Raises NativeUnavailableError where it cannot be compiled."""
    found = library('#include "decoder.h"\n' + activate_source(kernels))
    found.neuroweave_team.restype = ctypes.c_void_p
    found.neuroweave_team.argtypes = [ctypes.c_int]
    found.neuroweave_end.argtypes = [ctypes.c_void_p]
    found.neuroweave_run.argtypes = [
        ctypes.c_void_p,
        ctypes.POINTER(NativeOp),
        ctypes.c_int,
        ctypes.c_int64,
        ctypes.c_int64,
    ]
    sizes = [found.neuroweave_sizes(which) for which in range(3)]
    assert sizes == [ctypes.sizeof(kind) for kind in (NativeOp, NativeMatrix, NativeSegment)], sizes
    return found
