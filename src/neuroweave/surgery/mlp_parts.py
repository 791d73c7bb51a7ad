"""The matrices of one MLP whose rows and columns are neurons: to reorder neurons, and to scale them.

Both change nothing of what the MLP computes: a permutation for any activation, a scale where the activation lets it
through. Letters: M neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from neuroweave.surgery.apply import ActivatedProjection
from neuroweave.surgery.sites import FUSED_GATE_UP, layer_places, mlp_roles, projections


@dataclass
class MlpParts:
    """`block`: the module that holds them. `path`: of the activation within the layer. `gate`: what the activation
    reads (the up projection where there is no gate). `up`: what it is multiplied with, None where there is none or
    where `fused`: gate and up in one matrix, in that order."""

    block: nn.Module
    path: str
    activation: Callable[[Tensor], Tensor]
    down: nn.Module
    gate: nn.Module | None
    up: nn.Module | None
    fused: bool

    @torch.no_grad()
    def reorder(self, order: Int[Tensor, " M"]) -> None:
        """Neuron `order[i]` becomes neuron i."""
        for weight in self.neuron_rows():
            whole = len(weight) == len(order)
            weight.copy_(weight[order] if whole else torch.cat([half[order] for half in weight.chunk(2)]))
        down: Any = self.down.weight
        down.copy_(down[:, order])

    @torch.no_grad()
    def scale(self, s: Float[Tensor, " M"], c: Float[Tensor, " M"]) -> None:
        """Multiply what the activation of each neuron reads by `s`, and the neuron's column of the down projection by
        `c`."""
        assert self.gate is not None
        for tensor in (self.gate.weight, getattr(self.gate, "bias", None)):
            if isinstance(tensor, Tensor):
                rows = tensor.chunk(2)[0] if self.fused else tensor
                rows.mul_(s[:, None] if tensor.ndim == 2 else s)
        down: Any = self.down.weight
        down.mul_(c)

    def neuron_rows(self) -> Iterator[Any]:
        """Weights and biases whose rows are neurons."""
        for module in (self.gate, self.up):
            for tensor in (getattr(module, "weight", None), getattr(module, "bias", None)):
                if isinstance(tensor, Tensor):
                    yield tensor


def find_mlp(model: PreTrainedModel, layer: nn.Module) -> MlpParts:
    """The MLP of a decoder layer. Raises ValueError, with the reason, where there is not one of known form."""
    places = [place for place in layer_places(model, layer, 0, "") if place.op and place.site == "mlp"]
    blocks = {place.path.strip(".").rpartition(".")[0] for place in places}
    if len(blocks) != 1:
        raise ValueError("no MLP" if not blocks else f"{len(blocks)} MLPs")
    block = layer.get_submodule(blocks.pop())
    roles = mlp_roles(projections(block))
    down = getattr(block, roles.get("mlp.down", ""), None)
    if down is None or not is_linear(down):
        raise ValueError("its down projection is no plain matrix")
    fused = next((name for name in FUSED_GATE_UP if is_linear(getattr(block, name, None))), None)
    path = places[0].path.strip(".")
    return MlpParts(
        block=block,
        path=path,
        activation=getattr(block, path.rpartition(".")[2]),
        down=down,
        gate=getattr(block, fused or roles.get("mlp.gate") or roles.get("mlp.up", ""), None),
        up=None if fused or "mlp.gate" not in roles else getattr(block, roles["mlp.up"], None),
        fused=fused is not None,
    )


def is_linear(module: Any) -> bool:
    """Whether it applies one plain matrix, outputs by inputs, and nothing else."""
    weight = getattr(module, "weight", None)
    plain = isinstance(module, nn.Module) and not isinstance(module, ActivatedProjection) and not hasattr(module, "nf")
    return plain and isinstance(weight, Tensor) and weight.ndim == 2
