"""How large the signal is on its way through a model, and how sparse its MLPs are.

The first position of a window is counted apart (`first`): many models park a norm hundreds of times larger there (an
attention sink), and a mean over both would describe neither.
"""

from __future__ import annotations

from pydantic import Field

from neuroweave.diagnose.results.records import Estimate, Record


class Norms(Record):
    """Euclidean norms of the vectors that arrive at one place, over tokens."""

    place: str = Field(description="`layer input`, or the name of a norm in its layer, or `final norm`")
    layer: int | None = Field(description="null: after the last layer")
    mean: Estimate = Field(description="over all positions of a window but the first")
    deviation: float = Field(description="standard deviation over the same tokens")
    first: float = Field(description="mean over first positions of windows")


class Activations(Record):
    """What the down projection of one layer's MLP is given."""

    layer: int
    neurons: int
    zero: Estimate = Field(description="share of exact zeros, over tokens and neurons")
    near_zero: Estimate = Field(description="share below 1 % of the root mean square of the same token's neurons")
    dead: int = Field(description="neurons that were exactly zero at every token")
    nearly_dead: int = Field(description="neurons whose largest value stayed below 1 % of the layer's root mean square")


class Signal(Record):
    """One model's signal. Layers that could not be told from the model's modules are left out; `notes` say so."""

    inputs: list[Norms] = Field(description="before each layer, in order, and the last layer's output")
    growth: list[Estimate] = Field(description="by layer: mean norm after over mean norm before")
    norms: list[Norms] = Field(description="before each norm module of each layer, in order, and at the final norm")
    activations: list[Activations]


class SignalDifference(Record):
    """Other against base, paired over units of text; empty lists where their layers do not match."""

    input_ratio: list[Estimate] = Field(description="mean norms of `inputs`, other over base")
    zero: list[Estimate] = Field(description="share of exact zeros by layer, other minus base")
    near_zero: list[Estimate] = Field(description="share of near zeros by layer, other minus base")
