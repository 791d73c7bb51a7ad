"""Source neurons from piecewise-linear functions that a person wrote down, in YAML.

    hidden_size: 576
    neurons:
      - name: soft-threshold
        knots: [0, 1]          # 0 up to 1, then rising; the negative half follows
        slopes: [0, 1]
        direction: {random: 1}
        output: {random: 2}

Such a neuron stands for `output * f(direction.x)` with f odd; the generator realises it by a group of sign-symmetric
pairs (`pair_fit.py`, which also says why f must be odd).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from jaxtyping import Float32
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from neuroweave import __version__
from neuroweave.checkpoint.manifest import sha256_of
from neuroweave.surgery.neurons.bank import SOURCE, Bank, Neuron, load_bank
from neuroweave.surgery.neurons.frames import LARGEST, unit_directions
from neuroweave.surgery.neurons.pair_fit import (
    DEFAULT_RANGE,
    DEFAULT_TOLERANCE,
    SYMMETRIC,
    PiecewiseLinear,
    fit_pairs,
    piecewise_linear,
)
from neuroweave.surgery.neurons.plain_values import echo, shorten
from neuroweave.surgery.neurons.randomness import random_bits
from neuroweave.surgery.recipe import nearest


class DirectionSpec(BaseModel):
    """A direction of the residual stream, in one of three forms; its length does not matter."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    random: int | None = Field(
        default=None,
        description="number of a random direction; the same number is the same one",
        ge=-(2**63),
        lt=2**63,
    )
    values: list[float] | None = Field(default=None, description="hidden_size numbers")
    bank: str | None = Field(
        default=None, description="a bank's file, relative to the specification", min_length=1, max_length=4096
    )
    neuron: str | None = Field(
        default=None, description="with bank: whose gate (as direction) or down (as output) direction to take"
    )

    @model_validator(mode="after")
    def _one_form(self) -> DirectionSpec:
        given = [name for name in ("random", "values", "bank") if getattr(self, name) is not None]
        if len(given) != 1 or (self.neuron is not None) != (given == ["bank"]):
            raise ValueError("a direction is {random: NUMBER}, {values: [..]} or {bank: FILE, neuron: NAME}")
        return self


class NeuronSpec(BaseModel):
    """One behaviour."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(description="what the neuron is called in the bank", min_length=1)
    knots: list[float] = Field(description="ascending positions on s = direction.x; f is 0 from 0 to a first knot > 0")
    slopes: list[float] = Field(description="slopes[k] holds after knots[k]")
    range: float = Field(default=DEFAULT_RANGE, description="f is fitted and verified on [-range, range]")
    tolerance: float = Field(default=DEFAULT_TOLERANCE, description="largest error, as a share of max |f| on the range")
    direction: DirectionSpec = Field(description="what the neuron reads")
    output: DirectionSpec = Field(description="what the neuron writes")


class BehaviourSpec(BaseModel):
    """The whole file. Strict: neither true nor "1" is a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    hidden_size: int = Field(description="of the model whose residual stream the directions live in", ge=3, le=LARGEST)
    activation: Literal["silu", "gelu", "gelu_tanh"] | None = Field(
        default=None, description="what the fits are checked with now; default: all three. Deltas use the target's"
    )
    neurons: list[NeuronSpec] = Field(description="the neurons, in the bank's order", min_length=1)


# What PyYAML lets through for a scalar that it cannot turn into a number, a date or a text
_SCALARS = (ValueError, ArithmeticError, LookupError, AttributeError, TypeError)
_PARTS: dict[Any, type[BaseModel]] = {"neurons": NeuronSpec, "direction": DirectionSpec, "output": DirectionSpec}


def define_neurons(spec_path: str | Path, *, seed: int = 42) -> Bank:
    """The bank of source neurons that a file of behaviours describes: gate and up are the direction, down the output.

    `seed` draws the random directions. Raises ValueError, naming the file and the neuron, for anything not understood,
    a function that is not odd, and one that no group of pairs realises within its tolerance.
    """
    path = Path(spec_path)
    spec = read_spec(path)
    banks: dict[str, Bank] = {}
    reads, writes, neurons = [], [], []
    for item in spec.neurons:
        try:
            behaviour = piecewise_linear(item.knots, item.slopes, item.range, item.tolerance)
            statistics = _checked_fits(behaviour, spec.activation)
            reads.append(_direction(item.direction, "gate", spec.hidden_size, seed, path.parent, banks))
            writes.append(_direction(item.output, "down", spec.hidden_size, seed, path.parent, banks))
        except ValueError as error:
            raise ValueError(f"{path}: neuron {echo(item.name)}: {error}") from error
        origin = {"spec": path.name, "direction": _short(item.direction), "output": _short(item.output)}
        neurons.append(Neuron(item.name, SOURCE, origin, behaviour.to_dict(), statistics))
    provenance: dict[str, Any] = {"neuroweave": __version__, "operation": "define", "activation": spec.activation}
    provenance |= {"hidden_size": spec.hidden_size, "seed": seed}
    provenance |= {"spec": {"name": path.name, "sha256": sha256_of(path)}}
    provenance |= {"banks": {name: bank.sha256 for name, bank in banks.items()}} if banks else {}
    read, write = np.concatenate(reads), np.concatenate(writes)
    try:
        return Bank(read, read.copy(), write, neurons, provenance)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def input_files(spec_path: str | Path) -> list[Path]:
    """The files that `define_neurons` reads: that of the behaviours and the banks in it. Raises as `read_spec` does."""
    path = Path(spec_path)
    directions = [part for neuron in read_spec(path).neurons for part in (neuron.direction, neuron.output)]
    return [path, *(path.parent / bank for bank in {part.bank: None for part in directions if part.bank})]


def read_spec(path: Path) -> BehaviourSpec:
    """The content of a file of behaviours. Raises ValueError that says where, what came, and what is known."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected behaviours in YAML")
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path}: the YAML is nested too deeply") from None
    except (yaml.YAMLError, *_SCALARS) as error:
        raise ValueError(f"{path}: not YAML: {shorten(str(error), 240)}") from None
    if not isinstance(value, dict):
        raise ValueError(
            f"{path}: expected a mapping with the keys {', '.join(BehaviourSpec.model_fields)}; got {echo(value)}"
        )
    try:
        return BehaviourSpec.model_validate(value)
    except ValidationError as error:
        raise ValueError(f"{path}: {_explain(error, value)}") from None


def _explain(error: ValidationError, value: dict[str, Any]) -> str:
    """The first thing wrong, in one sentence; a neuron is called by its name."""
    problems = error.errors()
    problem = next((each for each in problems if each["type"] == "extra_forbidden"), problems[0])
    place: list[Any] = list(problem["loc"])
    words: list[str] = []
    model: type[BaseModel] = BehaviourSpec
    for part in place[:-1] if problem["type"] in ("extra_forbidden", "missing") else place:
        model = _PARTS.get(part, model)
        if words[-1:] == ["neurons"] and isinstance(part, int):
            item = value["neurons"][part]
            words[-1] = (
                f"neuron {echo(item['name'])}" if isinstance(item, dict) and "name" in item else f"neuron {part}"
            )
        else:
            words.append(shorten(str(part)))
    where = f"{', '.join(words)}: " if words else ""
    if problem["type"] == "extra_forbidden":
        known = model.model_fields
        near = nearest(shorten(str(place[-1])), known)
        return f"{where}key {echo(place[-1])} is not known{near}; known: {', '.join(known)}"
    if problem["type"] == "missing":
        return f"{where}{place[-1]!r} is missing: {model.model_fields[place[-1]].description}"
    said = where + problem["msg"].removeprefix("Value error, ")
    if problem["type"] in ("float_type", "int_type"):
        # PyYAML follows YAML 1.1, to which 1e3 is a text
        hint = (
            "; a number has no quotes, and an exponent a point and a sign: 1.0e+3"
            if isinstance(problem["input"], str)
            else ""
        )
        said += f", got {echo(problem['input'])}{hint}"
    return said


def _checked_fits(behaviour: PiecewiseLinear, activation: str | None) -> dict[str, float]:
    """Pairs and error with each activation that is asked for. Raises ValueError where the tolerance is missed."""
    found: dict[str, float] = {}
    for name in [activation] if activation else SYMMETRIC:
        fit = fit_pairs(behaviour, name)
        found |= {f"pairs ({name})": float(len(fit.gains)), f"fit error ({name})": fit.error}
    return found


def _direction(
    spec: DirectionSpec, matrix: str, size: int, seed: int, folder: Path, banks: dict[str, Bank]
) -> Float32[np.ndarray, "1 d"]:
    if spec.random is not None:
        # sums of four 16-bit numbers: close to normal, and exact
        parts = random_bits(seed, "direction", spec.random, count=size).astype("<u8").view("<u2").reshape(size, 4)
        return unit_directions(parts.sum(axis=1, dtype="f8")[None] - 2 * 65535)
    if spec.values is not None:
        if len(spec.values) != size:
            raise ValueError(f"a direction has {len(spec.values)} values; hidden_size is {size}")
        return unit_directions(np.array([spec.values], "f8"))
    assert spec.bank is not None
    if spec.bank not in banks:
        banks[spec.bank] = load_bank(folder / spec.bank)
    bank = banks[spec.bank]
    names = [neuron.name for neuron in bank.neurons]
    if spec.neuron not in names:
        raise ValueError(f"{spec.bank} has no neuron {echo(spec.neuron)}{nearest(shorten(str(spec.neuron)), names)}")
    if bank.hidden_size != size:
        raise ValueError(f"{spec.bank} has hidden size {bank.hidden_size}; hidden_size is {size}")
    return unit_directions(getattr(bank, matrix)[[names.index(spec.neuron)]])


def _short(spec: DirectionSpec) -> dict[str, Any]:
    """How a direction was given; its numbers are in the bank itself."""
    about = spec.model_dump(exclude_none=True)
    return {"values": len(about["values"])} if "values" in about else about
