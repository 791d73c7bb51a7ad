"""Scores on benchmarks of lm-evaluation-harness."""

from __future__ import annotations

from pydantic import Field

from neuroweave.diagnose.results.records import Estimate, Record


class TaskScore(Record):
    """One metric of one task for one model."""

    task: str
    version: str
    metric: str
    higher_is_better: bool
    value: float
    standard_error: float | None
    questions: int


class TaskDifference(Record):
    """Other minus base, paired over questions."""

    task: str
    metric: str
    higher_is_better: bool
    difference: Estimate
    questions: int
    changed: int = Field(description="questions with another score")
