"""What a decoder is made of, as a list of operations on named buffers of float32.

The same list runs twice: compiled, a token at a time (`compiled.py`, `native/decoder.h`), and in PyTorch, many tokens
at once (`reference.py`), which reads prompts and stands in where there is no compiler. Letters: n width of a buffer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neuroweave.activations.neuron_functions import NeuronSegment
from neuroweave.runtime.weights import PackedMatrix


@dataclass(frozen=True)
class Place:
    """Channels `start` to `start + size` of a buffer."""

    buffer: str
    start: int
    size: int

    def part(self, start: int, size: int) -> Place:
        return Place(self.buffer, self.start + start, size)


@dataclass(frozen=True, eq=False)
class Embed:
    """out = scale * row of the token."""

    out: Place
    matrix: PackedMatrix
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class Norm:
    """Each `size` numbers by themselves: (x - mean if `centred`) / sqrt(mean square + eps) * weight + bias."""

    source: Place
    out: Place
    size: int
    eps: float
    weight: Tensor | None = None
    bias: Tensor | None = None
    centred: bool = False


@dataclass(frozen=True, eq=False)
class Linear:
    """out = scale * (W x + b), or added to out; `cap`: c tanh(y / c)."""

    source: Place
    out: Place
    matrix: PackedMatrix
    scale: float = 1.0
    accumulate: bool = False
    cap: float = 0.0


@dataclass(frozen=True, eq=False)
class Rotate:
    """Heads of `size` channels, of which channel i and i + turned / 2 are a pair; tables [positions, turned]."""

    out: Place
    size: int
    cosines: Tensor
    sines: Tensor


@dataclass(frozen=True, eq=False)
class Attend:
    """Softmax attention of each head over its group's keys; the new keys and values join the cache [G, S, size]."""

    query: Place
    key: Place
    value: Place
    out: Place
    size: int
    scale: float
    window: int = 0
    cap: float = 0.0

    @property
    def heads(self) -> int:
        return self.query.size // self.size

    @property
    def groups(self) -> int:
        return self.key.size // self.size


@dataclass(frozen=True, eq=False)
class Glu:
    """out = act(gate x) * (up x); without `up`: act(gate x)."""

    source: Place
    out: Place
    gate: PackedMatrix
    up: PackedMatrix | None
    segments: list[NeuronSegment]


@dataclass(frozen=True, eq=False)
class SparseGlu:
    """out += scale * down(act(gate x) * (up x)), but for neurons whose |act(gate x)| is at most their threshold:
    nothing of up and down is read for those. `down`: a row a neuron."""

    source: Place
    out: Place
    gate: PackedMatrix
    up: PackedMatrix
    down: PackedMatrix
    segments: list[NeuronSegment]
    thresholds: Tensor | None = None
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class Activate:
    """out = act(x), neuron by neuron."""

    source: Place
    out: Place
    segments: list[NeuronSegment]


@dataclass(frozen=True, eq=False)
class Add:
    """out = a x + b y."""

    source: Place
    out: Place
    a: float = 1.0
    other: Place | None = None
    b: float = 1.0


@dataclass(frozen=True, eq=False)
class Multiply:
    """out = x * y."""

    source: Place
    other: Place
    out: Place


@dataclass(frozen=True, eq=False)
class Gather:
    """out: the inputs of now and of `dilation`, 2 `dilation`, ... tokens ago, the oldest first, `taps` of them."""

    source: Place
    out: Place
    taps: int
    dilation: int

    @property
    def places(self) -> int:
        return (self.taps - 1) * self.dilation + 1


@dataclass(frozen=True, eq=False)
class SoftmaxGate:
    """out = second half of x * softmax(first half)."""

    source: Place
    out: Place


Operation = Embed | Norm | Linear | Rotate | Attend | Glu | SparseGlu | Activate | Add | Multiply | Gather | SoftmaxGate


@dataclass(eq=False)
class Program:
    """`buffers`: their widths. `logits`: where the logits come out. `positions`: the longest text. `head`: the first
    operation of those that only logits need: the final norm and what follows."""

    operations: list[Operation]
    buffers: dict[str, int]
    logits: Place
    positions: int
    head: int = 0

    def matrices(self) -> list[PackedMatrix]:
        """Every matrix once that a token's step multiplies with."""
        found: dict[int, PackedMatrix] = {}
        for operation in self.operations:
            if isinstance(operation, Embed):
                continue
            for matrix in vars(operation).values():
                if isinstance(matrix, PackedMatrix):
                    found[id(matrix)] = matrix
        return list(found.values())

    @property
    def bytes_a_token(self) -> int:
        """Of weights that one token's step reads, sparsity left aside."""
        return sum(matrix.bytes for matrix in self.matrices())


Caches = dict[int, tuple[Tensor, ...]]  # by the operation's place: keys and values [G, S, size], or a ring [places, n]


def empty_caches(program: Program, positions: int) -> Caches:
    """What a text of so many positions leaves behind for the tokens to come."""
    found: Caches = {}
    for place, op in enumerate(program.operations):
        if isinstance(op, Attend):
            shape = (op.groups, positions, op.size)
            found[place] = torch.zeros(shape), torch.zeros(shape)
        elif isinstance(op, Gather):
            found[place] = (torch.zeros(op.places, op.source.size),)
    return found
