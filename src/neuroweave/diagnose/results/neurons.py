"""Which activation the neurons of a model's mixtures run."""

from __future__ import annotations

from pydantic import Field

from neuroweave.diagnose.results.records import Record


class MixtureChoices(Record):
    """One learned mixture, or one segment mixture of uneven sizes."""

    layer: int | None = Field(description="null: outside of the layers")
    family: str = Field(description="the name within its layer, such as `mlp.act_fn`")
    neurons: dict[str, int] = Field(description="activation -> neurons that run it, or give it most weight")
    weights: dict[str, float] | None = Field(None, description="activation -> mean weight; null: nothing is learned")
    entropy: float | None = Field(None, description="of a neuron's weights, nats, mean; null: nothing is learned")
