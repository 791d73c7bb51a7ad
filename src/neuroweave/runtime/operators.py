"""Linear layers with rounded weights as PyTorch modules, for any transformers model: an operator that compilers see.

Few tokens go through the compiled product (`native/decoder.h`), many through PyTorch on the whole matrix, as does
everything where there is no compiler. For inference: there is no gradient.
"""

from __future__ import annotations

import ctypes
import functools

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from torch import Tensor, nn

from neuroweave.native.build import NativeUnavailableError
from neuroweave.runtime.compiled import NativeMatrix, NativeOp, decoder_library, made
from neuroweave.runtime.weights import FORMATS, PackedMatrix, pack

SCHEMA = "(Tensor x, Tensor data, Tensor scales, Tensor? bias, str format, int columns) -> Tensor"
FEW = 8  # tokens, from which on the whole matrix in float32 is worth making


@torch.library.custom_op("neuroweave::rounded_linear", mutates_args=(), schema=SCHEMA)
def rounded_linear(x: Tensor, data: Tensor, scales: Tensor, bias: Tensor | None, format: str, columns: int) -> Tensor:
    """x W^T + b; the tensors of a `PackedMatrix`."""
    matrix = PackedMatrix(format, len(data), columns, data, scales, bias)
    rows = x.reshape(-1, columns).float().contiguous()
    if len(rows) <= FEW and x.device.type == "cpu":
        try:
            return few_rows(rows, matrix).to(x.dtype).view(*x.shape[:-1], matrix.rows)
        except NativeUnavailableError:
            pass
    whole = matrix.whole().to(x.dtype)
    return F.linear(x, whole, None if bias is None else bias.to(x.dtype))


@rounded_linear.register_fake
def _(x: Tensor, data: Tensor, scales: Tensor, bias: Tensor | None, format: str, columns: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], data.shape[0])


def few_rows(rows: Float[Tensor, "T C"], matrix: PackedMatrix) -> Float[Tensor, "T D"]:
    """Raises NativeUnavailableError where nothing can be compiled."""
    library, team = shared_team(torch.get_num_threads())
    out = torch.empty(len(rows), matrix.rows)
    native = NativeMatrix(
        data=matrix.data.data_ptr(),
        scales=None if matrix.scales is None else matrix.scales.data_ptr(),
        bias=None if matrix.bias is None else matrix.bias.data_ptr(),
        rows=matrix.rows,
        columns=matrix.columns,
        format=FORMATS.index(matrix.format),
    )
    places = [
        (rows.data_ptr() + 4 * i * matrix.columns, out.data_ptr() + 4 * i * matrix.rows) for i in range(len(rows))
    ]
    ops = [made("linear", in_=source, out=target, matrix=ctypes.addressof(native), a=1.0) for source, target in places]
    library.neuroweave_run(team, (NativeOp * len(ops))(*ops), len(ops), 0, 0)
    return out


@functools.cache
def shared_team(threads: int) -> tuple[ctypes.CDLL, int]:
    library = decoder_library([])
    return library, library.neuroweave_team(threads)


class RoundedLinear(nn.Module):
    """A linear layer whose weights are int8 or 4-bit numbers."""

    data: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, format: str) -> None:
        super().__init__()
        matrix = pack(linear.weight, format, linear.bias)
        if matrix.scales is None:
            raise ValueError(f"format {format!r} rounds nothing; give int8 or int4")
        self.format, self.in_features, self.out_features = format, linear.in_features, linear.out_features
        self.register_buffer("data", matrix.data)
        self.register_buffer("scales", matrix.scales)
        self.register_buffer("bias", matrix.bias)

    def forward(self, x: Float[Tensor, "... C"]) -> Float[Tensor, "... D"]:
        found: Tensor = torch.ops.neuroweave.rounded_linear(
            x, self.data, self.scales, self.bias, self.format, self.in_features
        )
        return found

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, format={self.format}"


def round_linears(model: nn.Module, format: str, *, leave: tuple[str, ...] = ("lm_head",)) -> int:
    """Put a `RoundedLinear` in the place of each plain linear layer but those whose names end in `leave`; their number.

    A projection with activations around it keeps its own: what is rounded is only `nn.Linear` itself.
    """
    found = [
        (parent, name, child)
        for path, parent in list(model.named_modules())
        for name, child in list(parent.named_children())
        if type(child) is nn.Linear and not f"{path}.{name}".endswith(leave)
    ]
    for parent, name, child in found:
        setattr(parent, name, RoundedLinear(child, format))
    return len(found)
