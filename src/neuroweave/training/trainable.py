"""Which parameters of a model are trained: mixtures, MLPs, low-rank adapters (LoRA), or all."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from neuroweave.activations.mixtures import NeuronMixture

PARTS = ("mixtures", "mlp", "lora", "all")
# What the field calls an MLP, its experts, or its two projections where a layer holds them itself.
MLP = re.compile(r"(?:^|\.)(?:\w*mlp|feed_forward|ffn?|\w*moe|experts?|shared_experts?|fc1|fc2)\.")
LORA_RANK = 8


@dataclass
class Trainable:
    """What `select` chose. `model`: to be trained (for `lora` PEFT's, around the model). `names`: of the trained
    parameters, tied ones once. `count`: of the numbers in them."""

    model: nn.Module
    part: str
    names: list[str]
    count: int

    def finish(self) -> PreTrainedModel:
        """The plain model: adapters are merged into the weights, and every parameter asks for a gradient again."""
        model: Any = self.model
        return (model.merge_and_unload() if self.part == "lora" else model).requires_grad_(True)


def select(model: PreTrainedModel, part: str, *, lora_rank: int = LORA_RANK) -> Trainable:
    """Let gradients reach only one of `PARTS` of the model; the others are frozen.

    mixtures: `gating_logits` and `beta` of learned mixtures. mlp: all that the MLPs hold, mixtures in them included.
    lora: adapters of rank `lora_rank` on every linear layer but the output head (PEFT); what is adapted has no
    activation of a recipe around it. all: everything; a head that is tied to the embedding is one parameter with it.
    Raises ValueError where that would be nothing, or for a part that is not known; then nothing was changed.
    """
    if part not in PARTS:
        raise ValueError(f"trainable part {part!r} is not known; choose from {', '.join(PARTS)}")
    if part == "lora":
        return adapted(model, lora_rank)
    mixtures = tuple(name for name, module in model.named_modules() if isinstance(module, NeuronMixture))
    chosen = [
        name
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point()
        and (
            part == "all"
            or (part == "mlp" and MLP.search(name))
            or (part == "mixtures" and name.rpartition(".")[0] in mixtures)
        )
    ]
    if not chosen:
        what = {"mixtures": "no learned mixture", "mlp": "no MLP that could be found by name", "all": "no parameter"}
        raise ValueError(f"{type(model).__name__} has {what[part]}, so nothing would be trained; choose another part")
    wanted = set(chosen)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(name in wanted)
    return counted(model, part)


def counted(model: nn.Module, part: str) -> Trainable:
    trained = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}
    return Trainable(model, part, list(trained), sum(trained.values()))


def lora_targets(model: PreTrainedModel) -> list[str]:
    """Full names of the linear layers that PEFT can adapt, without the output head.

    A projection with activations around it is no linear layer (see `ActivatedProjection`), so it is not among them.
    """
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return [
        name for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D) and module is not head
    ]


def adapted(model: PreTrainedModel, rank: int) -> Trainable:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("LoRA needs the package peft; pip install 'neuroweave[train]'") from error
    if rank < 1:
        raise ValueError(f"adapters of rank {rank}; give a rank of 1 or more")
    targets = lora_targets(model)
    if not targets:
        raise ValueError(f"{type(model).__name__} has no linear layer without an activation around it to adapt")
    # alpha = 2 r, as is usual: the adapters' learning rate then does not depend on the rank
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
    return counted(get_peft_model(model, config), "lora")
