"""The whole result: the models, what separates each from the base, and where and on what it was measured.

Lengths of time are seconds, rates are tokens per second, likelihoods and KL are nats per token. A field that could not
be measured is null or an empty list, and `notes` says why.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from neuroweave.diagnose.results.generation import Generated
from neuroweave.diagnose.results.gradient import Gradient, GradientDifference
from neuroweave.diagnose.results.neurons import MixtureChoices
from neuroweave.diagnose.results.plan import Plan
from neuroweave.diagnose.results.records import Estimate, Histogram, Record
from neuroweave.diagnose.results.signal import Signal, SignalDifference
from neuroweave.diagnose.results.tasks import TaskDifference, TaskScore
from neuroweave.diagnose.results.weights import Weights

SCHEMA_VERSION: Literal[2] = 2


class TextUsed(Record):
    """Which text was measured."""

    documents: list[str]
    unit: str = Field(description="what the bootstrap draws, in words")
    units: int
    windows: int
    predictions: int = Field(description="tokens predicted and scored, by each model")
    start_token: bool = Field(description="whether each window starts with the tokenizer's start token")
    sha256: str = Field(description="of the token ids of all windows, as little-endian int64")


class Rate(Record):
    """Tokens per second: median, least and most of the timed runs, and the runs in order."""

    median: float
    low: float
    high: float
    runs: list[float]


class Speed(Record):
    """One model's speed under the plan's `speed`."""

    prefill: Rate
    decode: Rate


class CalibrationBin(Record):
    """Predictions whose top token had a probability in one of equal bins from 0 to 1."""

    predictions: int
    confidence: float = Field(description="mean probability of the top token")
    accuracy: float = Field(description="share where the top token is the one that came")


class Measured(Record):
    """One model on the text."""

    name: str
    source: str = Field(description="folder or hub id; empty for a model that was only in memory")
    architecture: str
    parameters: int
    dtype: str
    device: str
    recipe: dict[str, Any] | None = Field(description="`neuroweave` in the model's config, if any")
    choices: list[MixtureChoices] = Field([], description="of mixtures; empty: the model has none of uneven sizes")
    negative_log_likelihood: Estimate
    perplexity: Estimate
    confidence: Estimate = Field(description="mean probability of the top token")
    accuracy: Estimate = Field(description="share of predictions whose top token is the one that came")
    entropy: Estimate = Field(description="of the predicted distribution, nats")
    calibration_error: Estimate = Field(description="expected calibration error over the bins of `calibration`")
    calibration: list[CalibrationBin]
    signal: Signal | None = None
    gradient: Gradient | None = None
    speed: Speed | None = None
    tasks: list[TaskScore] = Field([], description="empty: none were run")


class PositionBin(Record):
    """Mean KL over predictions at positions first..last of their window (counted from 0)."""

    first: int
    last: int
    mean: float
    predictions: int


class Difference(Record):
    """What separates one model from the base, on the same tokens. Intervals are paired over units of text."""

    perplexity_ratio: Estimate
    negative_log_likelihood: Estimate = Field(description="other minus base")
    confidence: Estimate = Field(description="other minus base")
    confidence_squared: Estimate = Field(description="mean square of the difference of top-1 confidence")
    entropy: Estimate = Field(description="other minus base")
    calibration_error: Estimate = Field(description="other minus base")
    accuracy: Estimate = Field(description="other minus base")
    kl: Estimate = Field(description="KL(base || other)")
    logit_cosine: Estimate
    top1_agreement: Estimate = Field(description="share of predictions with the same top token")
    top5_agreement: Estimate = Field(description="mean share of the base's five top tokens among the other's five")
    hidden_cosine: list[Estimate] = Field(description="by depth: input of the first layer, then after each layer")
    hidden_cka: list[Estimate] = Field(description="linear centred kernel alignment, by depth as above")
    kl_histogram: Histogram
    kl_by_position: list[PositionBin]
    prefill_ratio: Estimate | None = Field(None, description="speed of the other over the base's, paired runs")
    decode_ratio: Estimate | None = Field(None, description="speed of the other over the base's, paired runs")
    signal: SignalDifference | None = None
    gradient: GradientDifference | None = None
    weights: Weights | None = None
    tasks: list[TaskDifference] = Field([], description="empty: none were run")
    changed_settings: dict[str, list[str]] = Field(description="config entries that differ: [base, other]")


class Other(Record):
    """One model that was compared with the base."""

    model: Measured
    difference: Difference


class Environment(Record):
    """Where and with what it was measured."""

    date: str = Field(description="UTC, ISO 8601")
    cpu: str
    cores: int
    threads: int = Field(description="torch's, for one operation")
    accelerator: str
    platform: str
    versions: dict[str, str]


class Failure(Record):
    """Something that could not be measured; the rest of the comparison stands."""

    model: str
    part: str = Field(description="prediction, generation, gradient, weights, speed or tasks")
    message: str


class Comparison(Record):
    """One base and the models compared with it."""

    schema_version: Literal[2] = SCHEMA_VERSION
    plan: Plan
    text: TextUsed
    base: Measured
    others: list[Other]
    generated: list[Generated]
    environment: Environment
    failures: list[Failure] = Field([], description="empty: everything was measured")
    notes: list[str]

    @property
    def models(self) -> list[Measured]:
        """The base, then the others."""
        return [self.base, *(other.model for other in self.others)]

    def write(self, path: Path) -> None:
        path.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Comparison:
        """The comparison stored at `path`. Raises ValueError if it is none, or of another schema version."""
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not a comparison: not UTF-8 text ({error.reason})") from error
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            raise ValueError(
                f"{path}: not a comparison of schema version {SCHEMA_VERSION}: {place}: {first['msg']}"
            ) from error
