"""A patched model in vLLM: its Transformers backend builds the family's model, with every activation of the plan in it.

The backend replaces linear layers by its own and fuses siblings into one. Inside a block whose projections have
activations nothing is fused: its linear layers are replaced here, each by the one that the backend would take.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.linear import ColumnParallelLinear
from vllm.model_executor.models.transformers import TransformersForCausalLM
from vllm.model_executor.models.transformers.utils import replace_linear_class
from vllm.model_executor.models.utils import PPMissingLayer, WeightsMapper, maybe_prefix

from neuroweave.activations.mixtures import NeuronMixture, SegmentMixture, build_activation
from neuroweave.activations.torch import Activation
from neuroweave.checkpoint.sealed import KEY
from neuroweave.surgery.apply import ActivatedProjection, ProjectionPart, once, paths_of
from neuroweave.surgery.sites import find_sites
from neuroweave.vllm_plugin.neuron_shards import WHOLE, Shard, on_shard
from neuroweave.vllm_plugin.registration import refuse
from neuroweave.vllm_plugin.served_config import opened


class ServedProjection(nn.Module):
    """after(linear(before(x))), the linear layer vLLM's own; what `ActivatedProjection` is in transformers."""

    def __init__(self, linear: nn.Module, before: nn.Module | None, after: Iterable[nn.Module]) -> None:
        super().__init__()
        self.linear = linear
        if before is not None:
            self.activation_before = before
        self.activation_after = nn.ModuleList(after)

    def forward(self, x: Tensor) -> Tensor:
        if "activation_before" in self._modules:
            x = self.activation_before(x)
        x = self.linear(x)
        for activation in self.activation_after:
            x = activation(x)
        return x


@once
def unfused(block: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a block's class (same name): vLLM keeps what it may fuse by class, and this one it may not."""
    return type(block.__name__, (block,), {"__module__": block.__module__, "__qualname__": block.__qualname__})


class NeuroweaveForCausalLM(TransformersForCausalLM):
    """The patched model of any family that `decisions.py` lets through."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        refuse(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.head_activation = self._head_activation()
        self._check_in_place()

    # ------------------------------------------------------------------------------------------ called by the backend

    def _patch_config(self) -> None:
        """The backend builds a model without head, so the head's activation is put on here and not by the plan."""
        self.config: Any = opened(self.config)
        self.text_config = self.config.get_text_config()
        entry = getattr(self.config, KEY)
        inside = [edit for edit in entry["plan"] if edit["path"].startswith(entry["base"]["prefix"])]
        self.head_edits = [edit for edit in entry["plan"] if edit not in inside]
        entry["plan"] = inside
        super()._patch_config()

    def recursive_replace(self) -> None:
        places = find_sites(self.model) if self.tp_group.world_size > 1 else {}
        sizes = {place.path: place.neurons for place in places.get("mlp", ())}
        renamed = self._replace_activated_blocks()
        super().recursive_replace()
        self._cut_activations(sizes)
        self.hf_to_vllm_mapper |= WeightsMapper(
            orig_to_new_prefix=renamed | {"lm_head.activation_before.": "head_activation."}
        )

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return super().compute_logits(self.head_activation(hidden_states))

    # ------------------------------------------------------------------------------------------------------ the plan

    def _replace_activated_blocks(self) -> dict[str, str]:
        """Replace the linear layers of every block that holds an activated one; returns how its weights are renamed."""
        renamed: dict[str, str] = {}
        styles = {f"model.{path}": style for path, style in (self.model.tp_plan or {}).items()}
        for path, block in list(self.model.named_modules(prefix="model")):
            if not any(isinstance(child, ActivatedProjection) for child in block.children()):
                continue
            block.__class__ = unfused(type(block))
            for name, child in list(block.named_children()):
                where = f"{path}.{name}"
                style = next((found for pattern, found in styles.items() if re.match(pattern, where)), "replicate")
                activated = isinstance(child, ActivatedProjection)
                linear = vars(child)["projection"] if activated else child
                if not isinstance(linear, nn.Linear):
                    if activated:
                        raise ValueError(
                            f"{where} is no linear layer but a {type(linear).__name__}; not served by vLLM"
                        )
                    continue
                served = replace_linear_class(linear, style, self.quant_config, prefix=where)
                if activated:
                    before = child._modules.get("activation_before")
                    shard = self._shard_of(served)
                    after = [self._on_shard(each, linear.out_features, shard, where) for each in child.activation_after]
                    renamed |= {f"{where}.{each}": f"{where}.linear.{each}" for each in ("weight", "bias")}
                    served = ServedProjection(served, before, after)
                setattr(block, name, served)
        return renamed

    def _shard_of(self, linear: nn.Module) -> Shard:
        """Which part of a layer's outputs this rank has."""
        if isinstance(linear, ColumnParallelLinear) and not linear.gather_output and linear.tp_size > 1:
            return Shard(get_tensor_model_parallel_rank(), linear.tp_size)
        return WHOLE

    def _cut_activations(self, sizes: dict[str, int | None]) -> None:
        """Cut the MLPs' mixtures, where tensor parallelism has cut what comes into them."""
        for path in self._paths("activation") if self.tp_group.world_size > 1 else ():
            parent, name = self.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
            shards = {self._shard_of(layer) for layer in parent.modules()} - {WHOLE}
            shard = shards.pop() if shards else WHOLE
            setattr(
                parent, name, self._on_shard(getattr(parent, name), sizes[path.removeprefix("model.")], shard, path)
            )

    def _on_shard(self, activation: nn.Module, neurons: int | None, shard: Shard, where: str) -> nn.Module:
        if shard.parts > 1 and isinstance(activation, ProjectionPart):
            raise ValueError(f"{where}: a fused projection's parts cannot be found again under tensor parallelism")
        try:
            with torch.device(self.device_config.device):
                return on_shard(activation, neurons, shard)
        except ValueError as error:
            raise ValueError(f"{where}: {error}; choose another tensor_parallel_size") from error

    def _head_activation(self) -> nn.Module:
        if isinstance(self.lm_head, PPMissingLayer):
            return PPMissingLayer()  # as the head itself: nothing is loaded for it
        if not self.head_edits:
            return nn.Identity()
        [edit] = self.head_edits
        if edit["op"] != "projection" or "before" not in edit or edit.get("after"):
            raise ValueError(f"{edit['path']}: an edit that is not served by vLLM: {edit}")
        with torch.device(self.device_config.device):
            return build_activation(edit["before"], original=Activation("identity"), neurons=edit.get("neurons"))

    def _paths(self, *ops: str) -> list[str]:
        """The places of the plan's edits in this rank's part of the model."""
        entry = getattr(self.config, KEY)
        inside = [path for edit in entry["plan"] if edit["op"] in ops for path in paths_of(edit)]
        paths = [maybe_prefix("model", path.removeprefix(entry["base"]["prefix"])) for path in inside]
        return [path for path in paths if not self._missing(path)]

    def _missing(self, path: str) -> bool:
        """Whether pipeline parallelism has put the layer of this path on another rank."""
        module: nn.Module = self
        for name in path.split("."):
            if isinstance(module, PPMissingLayer):
                return True
            module = getattr(module, name)
        return isinstance(module, PPMissingLayer)

    def _check_in_place(self) -> None:
        """Raise ValueError when the backend has removed an activation, as a vLLM that fuses more than 0.32 might."""
        for ops, kinds in IN_PLACE.items():
            for path in self._paths(*ops):
                module = self.get_submodule(path)
                there = isinstance(module, kinds) and "forward" not in vars(module)
                if not there or (ops == ("layer_input",) and "input_activation" not in module._modules):
                    raise ValueError(
                        f"{path}: vLLM has replaced what the recipe puts there ({type(module).__name__}), so the model "
                        f"would not be the patched one; not served by this version of vLLM"
                    )


# what stands at the path of an edit, once the backend is done
IN_PLACE: dict[tuple[str, ...], tuple[type, ...]] = {
    ("activation",): (Activation, SegmentMixture, NeuronMixture),
    ("projection",): (ServedProjection,),
    ("layer_input",): (nn.Module,),
}
