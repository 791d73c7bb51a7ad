"""Which layer of a NeuroBLAST model stands where: the one place that knows, for torch, JAX, conversion and `inspect`.

Layers are counted through all stages: sensory, associative, motor. In the first two, even layers are attention layers
and odd ones convolution blocks; the motor stage is attention throughout. Sensory attention always has rotary
positions; in the other stages every second attention layer has none, the first one has. The convolution at index i of
its stage has dilation 2^(i - 1), at most `max_dilation`. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

STAGES = ("sensory", "associative", "motor")
# Norms of the bridges: the embedding comes back into the residual stream where a stage ends.
BRIDGES = {"sensory": "sensory_to_associative", "associative": "sensory_to_motor"}


@dataclass(frozen=True)
class PlannedLayer:
    """One layer. `number`: in the whole model; `index`: in its stage; `type`: as in transformers' `layer_types`.

    `dilation`: of a convolution block, else None. `rotary`: whether an attention layer has rotary positions.
    """

    number: int
    stage: str
    index: int
    type: str
    dilation: int | None = None
    rotary: bool = False

    @property
    def is_convolution(self) -> bool:
        return self.dilation is not None

    @property
    def name(self) -> str:
        """The layer's path in the base model: `sensory_layers.3`."""
        return f"{self.stage}_layers.{self.index}"

    def __str__(self) -> str:
        if self.is_convolution:
            return f"convolution, dilation {self.dilation}"
        return f"{self.type.replace('_', ' ')}, {'rotary' if self.rotary else 'no positions'}"


def plan_layers(config: Any) -> list[PlannedLayer]:
    """The layers of a configuration (an object with its attributes, or a mapping), in the order in which they run."""
    if isinstance(config, Mapping):
        config = _Attributes(config)
    planned: list[PlannedLayer] = []
    for stage in STAGES:
        attention = 0
        for index in range(getattr(config, f"num_{stage}_layers")):
            number = len(planned)
            if stage != "motor" and index % 2 == 1 and config.convolutions:
                dilation = min(2 ** (index - 1), config.max_dilation)
                planned.append(PlannedLayer(number, stage, index, "conv", dilation=dilation))
                continue
            slides = config.use_sliding_window and number >= config.max_window_layers
            kind = "sliding_attention" if slides else "full_attention"
            rotary = stage == "sensory" or not config.alternating_rotary or attention % 2 == 0
            planned.append(PlannedLayer(number, stage, index, kind, rotary=rotary))
            attention += 1
    return planned


class _Attributes:
    """A config.json as an object; what a published one does not have is as published."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.convolutions = self.alternating_rotary = True
        self.use_sliding_window, self.max_window_layers, self.max_dilation = False, 0, 8
        self.__dict__.update(config)
