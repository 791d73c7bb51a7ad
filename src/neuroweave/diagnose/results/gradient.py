"""How large the gradient of the loss is, weight family by weight family. No step is taken."""

from __future__ import annotations

from pydantic import Field

from neuroweave.diagnose.results.records import Estimate, Record


class FamilyGradient(Record):
    """Parameters of the same name in different layers, such as `mlp.down_proj.weight`."""

    family: str
    layers: list[int | None] = Field(description="in order; [null] for a parameter outside of the layers")
    parameters: list[int] = Field(description="numbers in the parameter of each layer")
    norm: list[Estimate] = Field(description="mean over windows of the gradient's Euclidean norm, by layer")


class Gradient(Record):
    """One model's gradients of the mean negative log-likelihood (nats per token) of a window."""

    windows: int
    loss: Estimate
    total: Estimate = Field(description="norm over all parameters")
    families: list[FamilyGradient] = Field(description="`mlp.down_proj.weight` first, where there is one")


class FamilyRatio(Record):
    """Other over base, paired over windows."""

    family: str
    layers: list[int | None]
    ratio: list[Estimate]


class GradientDifference(Record):
    """Families that both models have, with the same layers."""

    total: Estimate = Field(description="other over base")
    families: list[FamilyRatio]
    only_base: list[str]
    only_other: list[str]
