"""What a comparison does, with every default of the command line."""

from __future__ import annotations

from pydantic import Field

from neuroweave.diagnose.results.records import Record
from neuroweave.text.passages import PASSAGE

DEFAULT_PROMPTS = (
    "Once upon a time, in a small village by the sea,",
    "The three most important things about water are",
    "Dear Sir, I was very glad to receive your letter, and",
)


class SpeedPlan(Record):
    """How speed is measured; the same for every model, KV cache on, greedy."""

    prompt_tokens: int = Field(128, ge=1, description="tokens read at once (prefill)")
    new_tokens: int = Field(24, ge=2, description="tokens written one by one (decode), the first one not timed")
    batch: int = Field(1, ge=1, description="sequences side by side")
    repeats: int = Field(6, ge=1, description="timed runs per model, taken in turns; six is the least for an interval")
    warmups: int = Field(1, ge=0, description="untimed runs per model before")


class GradientPlan(Record):
    """How gradients of the loss are measured: one backward pass a window, no step is taken."""

    windows: int = Field(10, ge=1, description="windows, spread evenly over the text")
    tokens: int = Field(192, ge=2, description="tokens of each window that are read, at most")


class SamplingPlan(Record):
    """How the sampled continuations are drawn."""

    seed: int = Field(0, ge=0, description="the same for every model and prompt")
    temperature: float = Field(0.8, gt=0)
    top_p: float = Field(0.95, gt=0, le=1)


class TaskPlan(Record):
    """Benchmarks of lm-evaluation-harness."""

    names: tuple[str, ...] = Field(description="tasks by name, or paths of task files")
    limit: int | None = Field(None, ge=1, description="questions per task, at most; null: all")


class Plan(Record):
    """What a comparison does. Every default of the command line is here. A part that is null is not measured."""

    tokens: int = Field(8192, ge=2, description="tokens of text to measure on, at most")
    window: int = Field(512, ge=2, description="tokens per forward pass; the context a prediction can see")
    passage: int = Field(PASSAGE, ge=1, description="longer documents are cut to about so many characters")
    resamples: int = Field(2000, ge=100, description="bootstrap resamples")
    seed: int = Field(0, ge=0, description="seed of the bootstrap")
    prompts: tuple[str, ...] = Field(DEFAULT_PROMPTS, description="texts that every model continues")
    new_tokens: int = Field(40, ge=1, description="tokens written per prompt")
    signal: bool = Field(True, description="norms and sparsity by layer, from the same forward passes")
    sampling: SamplingPlan | None = Field(SamplingPlan(), description="null: greedy continuations only")
    gradient: GradientPlan | None = Field(GradientPlan(), description="null: gradients are not measured")
    weights: bool = Field(True, description="tensor by tensor; from the files where a model came from a folder")
    speed: SpeedPlan | None = Field(SpeedPlan(), description="null: speed is not measured")
    tasks: TaskPlan | None = Field(None, description="null: no benchmarks")
