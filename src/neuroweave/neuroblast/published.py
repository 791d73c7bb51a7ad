"""Lets `from_pretrained` read published NeuroBLAST checkpoints as they are: the kernels' middle rows are taken."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.utils import logging

from neuroweave.neuroblast.configuration import NeuroBlastConfig
from neuroweave.neuroblast.weight_map import dead_weights, from_published

logger = logging.get_logger("transformers.neuroblast")  # heard at the verbosity that transformers is set to


class AsStored(ConversionOps):
    """Saving: in this layout."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **_: Any
    ) -> dict[str, Any]:
        return {name: first(tensors) for name, tensors in input_dict.items()}

    @property
    def reverse_op(self) -> ConversionOps:
        return FromPublished()


class FromPublished(ConversionOps):
    """Loading: a published tensor in this layout; one of this layout as it is."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **facts: Any
    ) -> dict[str, Any]:
        name, converted = facts["full_layer_name"], {}
        for pattern, tensors in input_dict.items():
            stored = first(tensors)
            if dead_weights(name, stored):
                logger.warning_once("this published NeuroBLAST checkpoint holds weights that never meet data: left out")
            converted[pattern] = from_published(name, stored).contiguous()
        return converted

    @property
    def reverse_op(self) -> ConversionOps:
        return AsStored()


def first(tensors: Tensor | list[Tensor]) -> Tensor:
    return tensors[0] if isinstance(tensors, list) else tensors


def register_published() -> None:
    names = ("conv.weight", "proj_back.weight")
    converters: list[Any] = [WeightConverter(name, name, [FromPublished()]) for name in names]
    register_checkpoint_conversion_mapping(NeuroBlastConfig.model_type, converters, overwrite=True)


register_published()
