"""How far two models share their weights, tensor by tensor; a tensor of each is in memory at a time.

Tensors are read from the checkpoints' files where both models came from folders, else from the models. The values are
compared by `neuroweave.checkpoint.tensor_difference`, as `neuroweave diff` does; a model in memory is read as if it
were a checkpoint. Numbers of one dtype count as equal when their bits are (so 0 and -0 differ), else when their values
are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuroweave.checkpoint.reader import INDEX_FILE, SINGLE_FILE, Checkpoint, StoredTensor
from neuroweave.checkpoint.tensor_difference import compare_tensor
from neuroweave.checkpoint.writer import dtype_code
from neuroweave.diagnose.probes.anatomy import layers_and_families
from neuroweave.diagnose.results.weights import TensorChange, Weights
from neuroweave.diagnose.subject import Subject

SINGULAR_VALUES = 4
_GRAM_SIDE = 1024  # up to here a Gram matrix is quicker than a Krylov space
_KRYLOV_WIDTH, _KRYLOV_STEPS = 4, 32
_BLOCK_ELEMENTS = 1 << 22
_PLACES = itertools.count(-1, -1)


class HeldTensors(Checkpoint):
    """The tensors of a model in memory, to be read as a checkpoint's; tied ones once, under their first name.

    Raises ValueError for weights that are not there (offloaded) or that have no plain values (a packed format).
    """

    def __init__(self, name: str, state: Mapping[str, Any]) -> None:
        self.folder = Path(name)
        self._descriptors: dict[str, int] = {}
        self._state: dict[str, Tensor] = {}
        self._read: tuple[str, memoryview] | None = None
        self.tensors: dict[str, StoredTensor] = {}
        seen = set()
        for key, tensor in state.items():
            if not isinstance(tensor, Tensor):
                continue  # what a module keeps beside its weights
            if tensor.is_meta or tensor.is_sparse or type(tensor) not in (Tensor, torch.nn.Parameter):
                where = "not in memory" if tensor.is_meta else f"kept as {type(tensor).__name__}"
                raise ValueError(f"{name}: {key} is {where}; compare the weights of checkpoint folders instead")
            place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if tensor.numel() and place in seen:
                continue
            seen.add(place)
            try:
                code = dtype_code(tensor.dtype)
            except ValueError as error:
                raise ValueError(f"{name}: {key} cannot be compared: {error}") from error
            # a place of its own: `same_bytes` takes equal places for one file
            self.tensors[key] = StoredTensor(key, code, tuple(tensor.shape), "", next(_PLACES))
            self._state[key] = tensor

    def read_into(self, name: str, view: memoryview, begin: int = 0) -> None:
        """As `Checkpoint.read_into`. The tensor that was read last stays, in the memory of the CPU."""
        if self._read is None or self._read[0] != name:
            tensor = self._state[self[name].name].detach().cpu().contiguous()
            self._read = name, tensor.reshape(-1).view(torch.uint8).numpy().data
        view[:] = self._read[1][begin : begin + view.nbytes]


def compare_weights(base: Subject, other: Subject, *, after_tensor: Callable[[], object] = lambda: None) -> Weights:
    """Every tensor of `base` against the one of the same name in `other`.

    `after_tensor` is called after each tensor that both have in one shape. Raises ValueError for weights that cannot
    be read.
    """
    with ExitStack() as stack:
        source, first, second = open_pair(base, other, stack)
        common = [name for name in first if name in second]
        names = [name for name in common if first[name].shape == second[name].shape]
        places = layers_and_families(names)
        changes, equal_values = [], 0
        for name in names:
            change, equal = compare_one(first, second, name, *places[name])
            changes.append(change)
            equal_values += equal
            after_tensor()
        return Weights(
            source=source,
            parameters=first.parameters,
            equal_bytes=sum(first[change.name].parameters for change in changes if change.equal_bytes),
            equal_values=equal_values,
            tensors=changes,
            only_base=[name for name in first if name not in second],
            only_other=[name for name in second if name not in first],
            other_shape=[name for name in common if first[name].shape != second[name].shape],
        )


def open_pair(base: Subject, other: Subject, stack: ExitStack) -> tuple[str, Checkpoint, Checkpoint]:
    """Where the tensors are read (`files` or `memory`) and both sides, to be closed by `stack`.

    Files that share no name at all (one convention against another) say nothing; then the models are read.
    """
    if all(is_checkpoint(subject.source) for subject in (base, other)):
        first, second = (
            stack.enter_context(Checkpoint(subject.source, allow_orphans=True)) for subject in (base, other)
        )
        if not first.keys().isdisjoint(second):
            return "files", first, second
    first, second = (
        stack.enter_context(HeldTensors(subject.name, subject.model.state_dict())) for subject in (base, other)
    )
    return "memory", first, second


def is_checkpoint(source: str) -> bool:
    """Whether `source` is a folder on this machine with a config and safetensors files."""
    folder = Path(source)
    weights = any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE))
    return bool(source) and weights and (folder / "config.json").is_file()


def compare_one(
    first: Checkpoint, second: Checkpoint, name: str, layer: int | None, family: str
) -> tuple[TensorChange, int]:
    """One tensor of the same shape on both sides, and how many of its numbers are equal."""
    difference = compare_tensor(first, second, name)
    size = first[name].parameters
    equal = difference is None or difference.differing == 0
    directed, singular = read_facts(first, name)
    if equal:
        relative, cosine = 0.0, 1.0 if directed else None
    elif difference is None or difference.not_finite:
        relative, cosine = None, None
    else:
        relative, cosine = difference.relative, difference.cosine
    change = TensorChange(
        name=name,
        layer=layer,
        family=family,
        shape=list(first[name].shape),
        dtypes=[first[name].dtype, second[name].dtype],
        equal_bytes=difference is None,
        equal_values=equal,
        cosine=cosine,
        relative_change=relative,
        singular_base=singular,
        singular_other=singular if equal else read_facts(second, name)[1],
    )
    if difference is None:
        return change, size
    return change, 0 if difference.differing is None else size - difference.differing


def read_facts(checkpoint: Checkpoint, name: str) -> tuple[bool, list[float]]:
    """Whether the tensor has a direction (finite and not 0), and its largest singular values if it is a matrix of
    floating-point numbers. Those of integers and of 8-bit floats are codes, which mean nothing without their scales."""
    try:
        tensor = checkpoint.read_torch(name)
    except ValueError:  # a packed type, of which only the bytes are compared
        return False, []
    coded = tensor.dtype.itemsize == 1 or not tensor.is_floating_point()
    wide = torch.view_as_real(tensor) if tensor.is_complex() else tensor.double() if coded else tensor
    largest = max(map(abs, map(float, wide.aminmax()))) if wide.numel() else 0.0
    if not math.isfinite(largest) or not wide.numel():
        return False, []
    return largest > 0, [] if coded or tensor.ndim != 2 else largest_singular_values(tensor, largest)


def largest_singular_values(matrix: Tensor, largest: float) -> list[float]:
    """The largest singular values of a finite matrix [m, n], in falling order: `SINGULAR_VALUES`, or min(m, n).

    `largest`: of the absolute numbers in it. From the Gram matrix in float64: relative error below 1e-8 for values
    above a thousandth of the first. Of a large matrix from a Krylov space in float32: 1e-5 too low for
    2048 x 4096 normal numbers, as flat a spectrum as there is. Takes nothing from torch's random state.
    """
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    if largest == 0:
        return [0.0] * min(SINGULAR_VALUES, tall.shape[1])
    if tall.shape[1] <= _GRAM_SIDE:
        gram = gram_matrix(tall, largest)
    else:
        scaled = tall.float() / largest
        image = (scaled @ krylov_space(scaled)).double()
        gram = image.T @ image
    values = torch.linalg.eigvalsh(gram).flip(0)[:SINGULAR_VALUES].clamp_min(0).sqrt()
    return [largest * value for value in values.tolist()]


def gram_matrix(tall: Tensor, scale: float) -> Tensor:
    """A^T A [n, n] of A = `tall` / `scale` [m, n], in float64, without a whole copy of A."""
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64)
    for rows in tall.split(max(1, _BLOCK_ELEMENTS // tall.shape[1])):
        block = rows.double() / scale
        gram.addmm_(block.T, block)
    return gram


def krylov_space(tall: Tensor) -> Tensor:
    """An orthonormal basis [n, k] of X, (A^T A) X, (A^T A)^2 X, ... for A = `tall` [m, n] and a fixed X: it holds the
    leading right singular vectors very nearly (Musco and Musco 2015, arXiv 1504.05477)."""
    block = torch.randn(tall.shape[1], _KRYLOV_WIDTH, generator=torch.Generator().manual_seed(0))
    basis = torch.empty(tall.shape[1], 0)
    for step in range(_KRYLOV_STEPS + 1):
        if step:
            block = tall.T @ (tall @ block)
        for _ in range(2):  # once leaves what rounding lost
            block = block - basis @ (basis.T @ block)
        block = torch.linalg.qr(block).Q
        basis = torch.cat([basis, block], dim=1)
    # a matrix of low rank runs out of directions, and then the last blocks are not orthogonal to the first
    return torch.linalg.qr(basis).Q
