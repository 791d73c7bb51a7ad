"""The activations that a patched NeuroBLAST's plan puts at each place, built once for each place. Without vLLM."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.activations import ACT2FN

from neuroweave.activations.mixtures import build_activation
from neuroweave.activations.torch import Activation
from neuroweave.checkpoint.sealed import KEY
from neuroweave.surgery.apply import Edit, paths_of
from neuroweave.vllm_plugin.neuron_shards import WHOLE, Shard, on_shard


class PlannedActivations:
    """Hands out what the plan of `config` has at a place, by the place's path in `NeuroBlastForCausalLM`.

    What nobody has asked for at the end (`left`) was not built in, and the model would not be the patched one.
    """

    def __init__(self, config: Any) -> None:
        entry = getattr(config, KEY, None)
        self.hidden_act = config.hidden_act
        self.left: dict[str, Edit] = {}
        for edit in entry["plan"] if entry else ():
            self.left |= dict.fromkeys(paths_of(edit), edit)

    def of_mlp(self, path: str, neurons: int, shard: Shard) -> nn.Module:
        """The activation of an MLP; without an edit, the configuration's."""
        edit = self.left.pop(path, None)
        if edit is None:
            return ACT2FN[self.hidden_act]
        built = build_activation(edit["activation"], original=ACT2FN[self.hidden_act], neurons=edit.get("neurons"))
        return on_shard(built, neurons, shard)

    def after(self, path: str, neurons: int, shard: Shard) -> nn.ModuleList:
        """What follows a projection: its own activations, or nothing."""
        edit = self.left.pop(path, {})
        return nn.ModuleList(on_shard(built(part), neurons, shard) for part in edit.get("after", ()))

    def on_input(self, path: str) -> nn.Module:
        """What the hidden states that enter a layer pass through."""
        edit = self.left.pop(path, None)
        return nn.Identity() if edit is None else on_shard(built(edit), None, WHOLE)

    def before_head(self) -> nn.Module:
        edit = self.left.pop("lm_head", None)
        return nn.Identity() if edit is None else built(edit | {"activation": edit["before"]})

    def check_all_taken(self) -> None:
        """Raise ValueError for an edit that no layer has asked for."""
        if self.left:
            raise ValueError(
                f"{next(iter(self.left))}: the recipe changes it, but NeuroBLAST in vLLM has no such place"
            )


def built(edit: Edit) -> nn.Module:
    return build_activation(edit["activation"], original=Activation("identity"), neurons=edit.get("neurons"))
