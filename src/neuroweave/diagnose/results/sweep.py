"""Many changes of one model, each measured against it: the points, and the file that they are appended to.

The file is JSON lines: a heading that says on what the points were measured, then a point a line, each written whole
before the next is begun. Every point of a file is of the same model, text and plan; a file of others is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from neuroweave.diagnose.results.comparison import Environment, TextUsed
from neuroweave.diagnose.results.plan import Plan
from neuroweave.diagnose.results.records import Estimate, Record
from neuroweave.diagnose.results.signal import Activations

SCHEMA_VERSION: Literal[1] = 1
BASE = "base"
Kind = Literal["sweep", "sensitivity"]


class ModelUsed(Record):
    """The unchanged model."""

    name: str
    source: str = Field(description="folder or hub id, as it was given")
    sha256: str = Field(description="of the names and hashes of config.json and the files of weights")
    dtype: str = Field(description="of the computation")
    device: str = Field(description="cpu or cuda")


class Heading(Record):
    """The first line: on what every point of the file was measured."""

    kind: Kind
    schema_version: Literal[1] = SCHEMA_VERSION
    model: ModelUsed
    plan: Plan
    text: TextUsed
    predictions: list[int] = Field(description="tokens predicted and scored in each unit of text")
    environment: Environment = Field(description="where the file was begun")

    def difference(self, other: Heading) -> str | None:
        """The first thing because of which points of `self` and `other` cannot stand together; None: they can."""
        if self.model.sha256 != other.model.sha256:
            return (
                f"model {self.model.name} ({self.model.sha256[:8]}), not {other.model.name} ({other.model.sha256[:8]})"
            )
        pairs: list[tuple[str, Any, Any]] = [("command", self.kind, other.kind)]
        pairs += [(name, getattr(self.model, name), getattr(other.model, name)) for name in ("dtype", "device")]
        pairs += [(name, getattr(self.plan, name), getattr(other.plan, name)) for name in Plan.model_fields]
        ours, theirs = (f"of {each.text.units} units ({each.text.sha256[:8]})" for each in (self, other))
        pairs.append(("text", ours, theirs))
        return next((f"{name} {mine}, not {its}" for name, mine, its in pairs if mine != its), None)


class Outcome(Record):
    """What a change did, on the same tokens as the unchanged model; intervals are paired over units of text."""

    perplexity: Estimate
    perplexity_ratio: Estimate = Field(description="changed over unchanged")
    kl: Estimate = Field(description="KL(unchanged || changed), nats per token")
    kl_sums: list[float] = Field(
        description="KL summed over the predictions of each unit of text: two points are compared unit by unit"
    )
    logit_cosine: Estimate
    top1_agreement: Estimate = Field(description="share of predictions with the same top token")
    zero: Estimate | None = Field(None, description="share of exact zeros among all MLP activations; null: not counted")
    near_zero: Estimate | None = Field(None, description="share below 1 % of their token's root mean square, zeros too")
    activations: list[Activations] = Field([], description="the same by layer")


class Point(Record):
    """One change and what came of it: an outcome, or why there is none."""

    key: str = Field(description=f"sixteen digits of `change`; `{BASE}` for the unchanged model")
    name: str
    settings: dict[str, str | int | float] = Field(description="what was varied; empty for the unchanged model")
    change: dict[str, Any] = Field({}, description="the whole change: everything that it takes to make it again")
    outcome: Outcome | None = None
    failure: str | None = None
    seconds: float = Field(description="wall-clock time of the measurement")


class RankedLayer(Record):
    """One layer's place among all layers that were measured, the most sensitive first."""

    layer: int
    rank: int
    first: int | None = Field(description="the best rank that is within noise; null: no intervals")
    last: int | None = Field(description="the worst rank that is within noise")
    kl: Estimate


class Sensitivity(Record):
    """All layers, each changed alone."""

    heading: Heading
    points: list[Point]
    ranking: list[RankedLayer]


def change_key(change: Mapping[str, Any]) -> str:
    """Sixteen digits that differ where the change does."""
    text = json.dumps(change, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class PointsFile:
    """The points of a file, by key in their order, and the way to append more.

    Nothing is written before the first `append`. A last line that was cut short (the machine was switched off) is
    passed over and written over. Raises ValueError for a file of another heading, and for anything that is not one.
    """

    def __init__(self, path: Path, heading: Heading, *, overwrite: bool = False) -> None:
        self.path, self.heading = path, heading
        self.points: dict[str, Point] = {}
        self._sound: int | None = None  # bytes of whole lines; None: the file is to be begun
        if path.is_dir():
            raise ValueError(f"{path}: a folder; name a file")
        self._size = size_of(path)
        if path.is_file() and path.stat().st_size and not overwrite:
            self._read()

    def _read(self) -> None:
        data = self.path.read_bytes()
        first, *lines = data.split(b"\n")
        try:
            kept = Heading.model_validate_json(first)
        except ValidationError as error:
            raise ValueError(
                f"{self.path}: not a file of points of schema version {SCHEMA_VERSION} ({reason(error)}); "
                "choose another name, or add --overwrite"
            ) from error
        if difference := kept.difference(self.heading):
            raise ValueError(
                f"{self.path}: its points were measured with {difference}; they cannot stand beside new ones: choose "
                "another file, or add --overwrite"
            )
        if not lines:  # an editor took the line's end away: the heading is written again
            return
        self.heading, self._sound = kept, len(first) + 1
        tail = lines.pop()  # what follows the last line's end
        for number, line in enumerate(lines, start=2):
            last = number == len(lines) + 1 and not tail
            point = self._point(line, number, last=last)
            if point is None:
                break
            self.points[point.key] = point
            self._sound += len(line) + 1

    def _point(self, line: bytes, number: int, *, last: bool) -> Point | None:
        """The point on a line; None for a last line that is no JSON."""
        try:
            content = json.loads(line)
        except ValueError as error:
            if last:
                return None
            raise ValueError(f"{self.path}, line {number}: damaged ({error}); remove the line") from error
        try:
            return Point.model_validate(content)
        except ValidationError as error:
            raise ValueError(f"{self.path}, line {number}: not a point ({reason(error)}); remove the line") from error

    def check_unchanged(self) -> None:
        """Raise ValueError when somebody else has written to the file since it was read or written here."""
        if size_of(self.path) != self._size:
            raise ValueError(
                f"{self.path}: another run has written to this file meanwhile; the same command again goes on with "
                "what is there now"
            )

    def append(self, point: Point) -> None:
        """Write a point to the file, which then holds it whatever comes. Raises ValueError as `check_unchanged`."""
        self.check_unchanged()
        if self._sound is None:
            self._begin()
        line = (point.model_dump_json() + "\n").encode()
        with open(self.path, "r+b") as file:
            file.truncate(self._sound)
            file.seek(0, os.SEEK_END)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        assert self._sound is not None
        self._sound += len(line)
        self._size = self._sound
        self.points[point.key] = point

    def _begin(self) -> None:
        line = (self.heading.model_dump_json() + "\n").encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.partial")
        try:
            partial.write_bytes(line)
            partial.replace(self.path)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
        self._sound = self._size = len(line)


def size_of(path: Path) -> int | None:
    """Bytes; None for a file that is not there."""
    return path.stat().st_size if path.is_file() else None


def reason(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the line'}: {first['msg'].lower()}"
