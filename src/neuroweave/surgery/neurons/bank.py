"""A bank of neurons in one safetensors file: directions, what is known of each neuron, and where it came from.

N neurons of hidden size d. Neuron i is `(gate[i], up[i], down[i])`: at input x it adds
`down[i] * act(gate[i].x) * (up[i].x)` to the residual stream.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from neuroweave import __version__
from neuroweave.checkpoint.header import TensorSpec, build_header, parse_json, read_header
from neuroweave.checkpoint.manifest import sha256_of
from neuroweave.surgery.neurons.neuron_record import check_record
from neuroweave.surgery.neurons.plain_values import echo

FORMAT_VERSION = 1
DEFAULT_BANK_FILE = "default_bank.safetensors"
SOURCE, DERIVATIVE = "source", "derivative"
_KEY = "neuroweave_bank"
_MATRICES = ("gate", "up", "down")


@dataclass(frozen=True)
class Neuron:
    """What is known of one neuron of a bank, beside its three directions.

    `kind`: `source` or `derivative`. `origin` says where it comes from: for a neuron of a model `{"layer", "index"}`;
    for a defined one `{"spec": name of the file}`; for a derivative `{"parent": name, "operation": "mirrored" |
    "scaled" | "moved", ...}`. `behaviour`: the odd piecewise-linear function of `gate.x` that a defined neuron stands
    for (`{"knots": [...], "slopes": [...], "range": R, "tolerance": t}`), else None.

    `statistics`: numbers by name, such as norms and activation moments. `response`: the measured curve, `{"input":
    [...], "mean": [...], "deviation": [...], "count": [...]}` with one number per bin of `gate.x`. `fired`: the
    strongest moments in the text, `{"text", "token", "start", "end", "value", "document"}` each, where characters
    `start:end` of the text are the token.
    """

    name: str
    kind: str
    origin: dict[str, Any] = field(default_factory=dict)
    behaviour: dict[str, Any] | None = None
    statistics: dict[str, float] = field(default_factory=dict)
    response: dict[str, list[float]] | None = None
    fired: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Bank:
    """`gate`, `up`, `down`: float32 `[N, d]`. `provenance`: reference model, file hashes, activation, seed, version.

    `sha256` is that of the file that it was read from, or "" for one that was not saved yet.
    """

    gate: np.ndarray
    up: np.ndarray
    down: np.ndarray
    neurons: list[Neuron]
    provenance: dict[str, Any]
    sha256: str = ""

    def __post_init__(self) -> None:
        shape = self.gate.shape
        if (
            len(shape) != 2
            or not shape[1]
            or self.up.shape != shape
            or self.down.shape != shape
            or len(self.neurons) != shape[0]
        ):
            raise ValueError(
                f"a bank of {len(self.neurons)} neurons needs gate, up and down of one shape [N, d]; got "
                f"{', '.join(str(list(getattr(self, name).shape)) for name in _MATRICES)}"
            )
        names = [neuron.name for neuron in self.neurons]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the bank names {twice!r} twice")
        for name in _MATRICES:
            bad = ~np.isfinite(getattr(self, name)).all(axis=1)
            if bad.any():
                raise ValueError(f"neuron {names[int(bad.argmax())]!r}: its {name} direction is not finite")

    @property
    def hidden_size(self) -> int:
        return self.gate.shape[1]

    def __len__(self) -> int:
        return len(self.neurons)


def check_bank_output(
    path: str | os.PathLike[str], *, overwrite: bool = False, sources: Iterable[str | os.PathLike[str]] = ()
) -> Path:
    """The path of a bank that may be written. Raises ValueError when it may not: ask before a long computation.

    `sources`: see `check_no_source`.
    """
    path = check_no_source(path, sources)
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"{path}: not the name of a file in a folder that exists")
    if path.exists() and not overwrite:
        raise ValueError(f"{path}: exists already; choose another name, or add --overwrite")
    return path


def check_no_source(path: str | os.PathLike[str], sources: Iterable[str | os.PathLike[str]]) -> Path:
    """The path of an output that replaces none of the files, and no file in any of the folders, that a job reads.

    Raises ValueError for one that is such a file, also by a symbolic or hard link.
    """
    path = Path(path)
    if path.is_file():
        for source in map(Path, sources):
            files = source.rglob("*") if source.is_dir() else [source]
            for file in files:
                if file.is_file() and os.path.samefile(file, path):
                    raise ValueError(f"{path}: the output is {file}, which is read; choose another name")
    return path


def save_bank(
    bank: Bank,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    sources: Iterable[str | os.PathLike[str]] = (),
) -> Bank:
    """Write a bank and return it with its hash. Equal banks give equal bytes. The file appears whole or not at all.

    `sources`: what the bank was made from, which the output must not be.
    """
    path = check_bank_output(path, overwrite=overwrite, sources=sources)
    about = {"format": FORMAT_VERSION, **bank.provenance, "neurons": [asdict(neuron) for neuron in bank.neurons]}
    text = json.dumps(about, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    specs = [TensorSpec(name, "F32", bank.gate.shape) for name in _MATRICES]
    raw, _ = build_header(specs, {"format": "np", _KEY: text})
    data = [np.ascontiguousarray(getattr(bank, name), dtype="<f4").tobytes() for name in _MATRICES]
    digest = hashlib.sha256(raw)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "xb") as file:
            file.write(raw)
            for part in data:
                digest.update(part)
                file.write(part)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return replace(bank, sha256=digest.hexdigest())


def load_bank(path: str | os.PathLike[str]) -> Bank:
    """Read a bank. Raises ValueError, naming the file, for anything that is not a whole and sound bank."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a neuron bank (.safetensors)")
    header = read_header(path)
    if _KEY not in header.metadata or set(header.tensors) != set(_MATRICES):
        raise ValueError(f"{path}: a safetensors file, but not a neuron bank; `neuroweave neurons` makes one")
    about = parse_json(header.metadata[_KEY].encode(), file=str(path), what="bank's description")
    if about.pop("format", None) != FORMAT_VERSION:
        raise ValueError(f"{path}: a bank of another format; this version reads format {FORMAT_VERSION}")
    mapped = np.memmap(path, dtype="u1", mode="r").view(np.ndarray)
    matrices = {}
    for name in _MATRICES:
        entry = header.tensors[name]
        if entry.dtype != "F32" or len(entry.shape) != 2:
            raise ValueError(f"{path}: {name} is {entry.dtype} of shape {list(entry.shape)}, expected F32 [N, d]")
        data = mapped[header.data_start + entry.begin : header.data_start + entry.end]
        matrices[name] = data.view("<f4").reshape(entry.shape)
    try:
        records = about.pop("neurons", None)
        if not isinstance(records, list):
            raise ValueError(f"the bank's description of its neurons is damaged: {echo(records)} is no list")
        for number, record in enumerate(records):
            check_record(record, number)
        neurons = [Neuron(**record) for record in records]
        return Bank(**matrices, neurons=neurons, provenance=about, sha256=sha256_of(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def join_banks(banks: Sequence[Bank]) -> Bank:
    """All neurons of several banks, in order; `provenance["banks"]` keeps those of the parts.

    The activation that every part agrees on (parts that state none agree with all) becomes the whole's.
    Raises ValueError for another hidden size, another activation, or a name that occurs twice.
    """
    if not banks:
        raise ValueError("no banks to join; give at least one")
    first = banks[0]
    activation = next((bank.provenance["activation"] for bank in banks if bank.provenance.get("activation")), None)
    for bank in banks:
        if bank.hidden_size != first.hidden_size:
            raise ValueError(f"banks of hidden size {first.hidden_size} and {bank.hidden_size} cannot be joined")
        other = bank.provenance.get("activation") or activation
        if other != activation:
            raise ValueError(f"banks for {activation} and for {other} cannot be joined: one bank has one activation")
    provenance: dict[str, Any] = {"neuroweave": __version__, "operation": "join", "activation": activation}
    provenance |= {"banks": [{"neurons": len(bank), **bank.provenance} for bank in banks]}
    gate, up, down = (np.concatenate([getattr(bank, name) for bank in banks]) for name in _MATRICES)
    return Bank(gate, up, down, [neuron for bank in banks for neuron in bank.neurons], provenance)


def default_bank_path() -> Path:
    """The file of the bank that comes with the package."""
    return Path(__file__).with_name(DEFAULT_BANK_FILE)


def default_bank() -> Bank:
    """The bank that comes with the package: neurons of SmolLM2-135M-Instruct and some defined behaviours, d = 576.

    Built by `benchmarks/build_bank.py`.
    """
    return load_bank(default_bank_path())
