"""What every part of a stored result is made of."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


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


class Histogram(Record):
    """Counts between edges; `below` and `above` count what lies outside of them."""

    edges: list[float]
    counts: list[int]
    below: int
    above: int
