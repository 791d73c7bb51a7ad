"""The result of a comparison, as it is stored in comparison.json: typed, versioned, every number of every figure.

Lengths of time are seconds, rates are tokens per second, likelihoods and KL are nats per token. A field that could not
be measured is null or an empty list, and `notes` says why.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from neuroweave.text.passages import PASSAGE

SCHEMA_VERSION: Literal[1] = 1


class Record(BaseModel):
    """A frozen part of the result. Infinity is written as text, so that the file stays plain JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Estimate(Record):
    """A number with its 95 % interval; without one (`low` and `high` null) when too little was measured for it."""

    value: float
    low: float | None = None
    high: float | None = None

    def excludes(self, reference: float) -> bool:
        """Whether there is an interval and `reference` lies outside of it."""
        return self.low is not None and self.high is not None and not self.low <= reference <= self.high


class SpeedPlan(Record):
    """How speed is measured; the same for every model, KV cache on, greedy."""

    prompt_tokens: int = Field(128, ge=1, description="tokens read at once (prefill)")
    new_tokens: int = Field(24, ge=2, description="tokens written one by one (decode), the first one not timed")
    batch: int = Field(1, ge=1, description="sequences side by side")
    repeats: int = Field(6, ge=1, description="timed runs per model, taken in turns; six is the least for an interval")
    warmups: int = Field(1, ge=0, description="untimed runs per model before")


DEFAULT_PROMPTS = (
    "Once upon a time, in a small village by the sea,",
    "The three most important things about water are",
    "Dear Sir, I was very glad to receive your letter, and",
)


class Plan(Record):
    """What a comparison does. Every default of the command line is here."""

    tokens: int = Field(8192, ge=2, description="tokens of text to measure on, at most")
    window: int = Field(512, ge=2, description="tokens per forward pass; the context a prediction can see")
    passage: int = Field(PASSAGE, ge=1, description="longer documents are cut to about so many characters")
    resamples: int = Field(2000, ge=100, description="bootstrap resamples")
    seed: int = Field(0, ge=0, description="seed of the bootstrap")
    prompts: tuple[str, ...] = Field(DEFAULT_PROMPTS, description="texts that every model continues greedily")
    new_tokens: int = Field(40, ge=1, description="tokens written per prompt")
    speed: SpeedPlan | None = Field(SpeedPlan(), description="null: speed is not measured")


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


class Measured(Record):
    """One model on the text."""

    name: str
    source: str = Field(description="folder or hub id; empty for a model that was only in memory")
    architecture: str
    parameters: int
    dtype: str
    device: str
    recipe: dict[str, Any] | None = Field(description="`neuroweave` in the model's config, if any")
    negative_log_likelihood: Estimate
    perplexity: Estimate
    confidence: Estimate = Field(description="mean probability of the top token")
    confidence_counts: list[int] = Field(description="predictions by top-token probability, in equal bins from 0 to 1")
    speed: Speed | None = None


class Histogram(Record):
    """Counts between edges; `below` and `above` count what lies outside of them."""

    edges: list[float]
    counts: list[int]
    below: int
    above: int


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
    kl: Estimate = Field(description="KL(base || other)")
    logit_cosine: Estimate
    top1_agreement: Estimate = Field(description="share of predictions with the same top token")
    hidden_cosine: list[Estimate] = Field(description="by depth: input of the first layer, then after each layer")
    kl_histogram: Histogram
    kl_by_position: list[PositionBin]
    prefill_ratio: Estimate | None = Field(None, description="speed of the other over the base's, paired runs")
    decode_ratio: Estimate | None = Field(None, description="speed of the other over the base's, paired runs")
    changed_settings: dict[str, list[str]] = Field(description="config entries that differ: [base, other]")


class Other(Record):
    """One model that was compared with the base."""

    model: Measured
    difference: Difference


class Continuation(Record):
    """What one model wrote after a prompt."""

    model: str
    text: str
    shared_tokens: int = Field(description="leading tokens that are the base's as well")
    shared_characters: int


class Generated(Record):
    """One prompt and its greedy continuations, the base's first."""

    prompt: str
    continuations: list[Continuation]


class Environment(Record):
    """Where and with what it was measured."""

    date: str = Field(description="UTC, ISO 8601")
    cpu: str
    cores: int
    threads: int = Field(description="torch's, for one operation")
    accelerator: str
    platform: str
    versions: dict[str, str]


class Comparison(Record):
    """One base and the models compared with it."""

    schema_version: Literal[1] = SCHEMA_VERSION
    plan: Plan
    text: TextUsed
    base: Measured
    others: list[Other]
    generated: list[Generated]
    environment: Environment
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
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            raise ValueError(
                f"{path}: not a comparison of schema version {SCHEMA_VERSION}: {place}: {first['msg']}"
            ) from error
