"""What the processes of one run tell each other besides gradients: over the CPU, so that no word waits for a GPU."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
import torch.distributed as dist


def processes() -> int:
    """How many processes the run has."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the first of the processes that a launcher has started, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


@functools.cache
def control_group() -> Any:
    """A group of all processes that talk over gloo."""
    return dist.new_group(backend="gloo")


def largest(number: int) -> int:
    """The largest of what the processes hand in."""
    if processes() == 1:
        return number
    value = torch.tensor(number, dtype=torch.int64)
    dist.all_reduce(value, op=dist.ReduceOp.MAX, group=control_group())
    return int(value)


def from_first(value: Any) -> Any:
    """What the first process hands in."""
    if processes() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=control_group())
    return box[0]


def from_all(value: Any) -> list[Any]:
    """What each process hands in, in order."""
    if processes() == 1:
        return [value]
    found: list[Any] = [None] * processes()
    dist.all_gather_object(found, value, group=control_group())
    return found


def summed(values: torch.Tensor) -> torch.Tensor:
    """The sum of the processes' tensors, on the CPU."""
    values = values.cpu()
    if processes() > 1:
        dist.all_reduce(values, group=control_group())
    return values


def shard_on_cpu(mixed_precision: str | None) -> None:
    """Let accelerate shard over CPU processes (FSDP2 over gloo) when its configuration asks for FSDP.

    accelerate 1.15 takes FSDP for GPUs alone and silently trains unsharded on CPUs, although torch shards there too.
    To be called before the first `Accelerator` of the process.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() != "true":
        return
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, TorchDynamoPlugin

    if PartialState().distributed_type != DistributedType.MULTI_CPU:
        return
    plugin = FullyShardedDataParallelPlugin()
    state = AcceleratorState(
        mixed_precision=mixed_precision,
        dynamo_plugin=TorchDynamoPlugin(),
        fsdp_plugin=plugin,
        _from_accelerator=True,
    )
    PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = plugin
    if mixed_precision not in (None, "no"):
        plugin.set_mixed_precision(mixed_precision)
