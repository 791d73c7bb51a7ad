"""NeuroBLAST, the hybrid of attention and causal convolutions: configuration, layer plan, models, weight maps."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuroweave.neuroblast.configuration import NeuroBlastConfig
    from neuroweave.neuroblast.layer_plan import PlannedLayer, plan_layers
    from neuroweave.neuroblast.modeling import NeuroBlastForCausalLM, NeuroBlastModel

_HOME = {
    "NeuroBlastConfig": "configuration",
    "NeuroBlastForCausalLM": "modeling",
    "NeuroBlastModel": "modeling",
    "PlannedLayer": "layer_plan",
    "plan_layers": "layer_plan",
}
__all__ = ["NeuroBlastConfig", "NeuroBlastForCausalLM", "NeuroBlastModel", "PlannedLayer", "plan_layers"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"neuroweave.neuroblast.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
