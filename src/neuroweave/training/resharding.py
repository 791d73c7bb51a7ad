"""Load a checkpoint that another number of processes saved: sharded (FSDP) into whole, and whole into sharded.

A sharded checkpoint holds torch's distributed format in `pytorch_model_fsdp_0/` and `optimizer_0/`, with the
optimizer's state under parameter names. A whole one holds `model.safetensors` and `optimizer.pt`, with the state under
numbers, in the order of the optimizer's parameters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SHARDED_MODEL, SHARDED_OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"


def load_weights(trainer: Any, checkpoint: Path, model: nn.Module) -> bool:
    """Load the weights where the checkpoint's form is not the model's. Returns whether that was so."""
    sharded = (checkpoint / SHARDED_MODEL).is_dir()
    if sharded == trainer.is_fsdp_enabled:
        return False
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    if sharded:
        weights = {name: torch.empty_like(value, device="cpu") for name, value in model.state_dict().items()}
        read_sharded(checkpoint / SHARDED_MODEL, {"model": weights})
        model.load_state_dict(weights)
        return True
    whole: dict[str, Any] = dict(whole_weights(checkpoint))
    for name in set(model.state_dict()) - set(whole):  # a tied head is stored once
        whole[name] = whole[trainer.accelerator.unwrap_model(model).all_tied_weights_keys[name]]
    set_model_state_dict(model, whole, options=StateDictOptions(full_state_dict=True))
    return True


def load_optimizer(trainer: Any, checkpoint: Path) -> bool:
    """Load optimizer and schedule where the checkpoint's form is not the optimizer's. Returns whether that was so."""
    sharded = (checkpoint / SHARDED_OPTIMIZER).is_dir()
    if sharded == trainer.is_fsdp_enabled:
        return False
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    model, optimizer = trainer.model, getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    if sharded:
        state = get_optimizer_state_dict(model, optimizer)  # zeros where there is no state yet
        read_sharded(checkpoint / SHARDED_OPTIMIZER, {"optimizer": state})
        set_optimizer_state_dict(model, optimizer, state)
    else:
        stored = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
        state = by_name(stored, model, optimizer)
        set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))
    trainer.lr_scheduler.load_state_dict(torch.load(checkpoint / "scheduler.pt", weights_only=True))
    return True


def read_sharded(folder: Path, state: dict[str, Any]) -> None:
    """Fill the tensors of `state` from a folder in torch's distributed format."""
    import torch.distributed.checkpoint as distributed

    distributed.load(state, storage_reader=distributed.FileSystemReader(folder), no_dist=True)


def whole_weights(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of an unsharded checkpoint, by name."""
    from safetensors.torch import load_file

    weights: dict[str, Tensor] = {}
    for file in sorted(checkpoint.glob("model*.safetensors")):
        weights |= load_file(file)
    return weights


def by_name(stored: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state dictionary with parameters under their names in place of numbers."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    numbered = [number for group in stored["param_groups"] for number in group["params"]]
    ordered = [name for group in groups for name in group]
    if len(numbered) != len(ordered):
        raise ValueError(f"the optimizer's state is of {len(numbered)} tensors, the model has {len(ordered)}")
    of = dict(zip(numbered, ordered, strict=True))
    return {
        "state": {of[number]: state for number, state in stored["state"].items()},
        "param_groups": [
            group | {"params": [of[number] for number in group["params"]]} for group in stored["param_groups"]
        ],
    }
