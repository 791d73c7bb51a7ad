"""A GGUF file as a Hugging Face model: its configuration, and its tensors one by one under their own names.

What an architecture's tensors are called and how llama.cpp changed their values is transformers' knowledge, and is
taken from there; only the slow metadata reader and the whole-model state dict are avoided.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuroweave.checkpoint.gguf import GGUFHeader, open_tensors, write_stand_in
from neuroweave.checkpoint.header import TensorSpec
from neuroweave.checkpoint.writer import dtype_code

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

_LAYER = re.compile(r"^(.*?\.(\d+)\.)")


@dataclass
class GGUFModel:
    """What a GGUF file becomes: the configuration, the tensors to write, and a stream of their values.

    `left_out`: tensors of the file that the model class has no place for.
    """

    header: GGUFHeader
    config: PreTrainedConfig
    specs: list[TensorSpec]
    left_out: list[str]
    _model: PreTrainedModel
    _groups: dict[str, list[str]] = field(default_factory=dict)
    _processor: Any = None
    _names: dict[str, str] = field(default_factory=dict)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every planned tensor once, in float32 or the planned dtype; one layer at most is in memory.

        Raises ValueError when the values do not have the shape that the configuration implies.
        """
        if self._processor is None:
            yield from _checkpoint_tensors(self._model, self._model.state_dict()).items()
            return
        expected = self._model.state_dict()
        with open_tensors(self.header) as data:
            for names in self._groups.values():
                found = self._convert((name, data.read(name)) for name in names)
                for name, tensor in found.items():
                    if name in expected and tensor.shape != expected[name].shape:
                        raise ValueError(
                            f"{self.header.path}: {name} has shape {list(tensor.shape)}, "
                            f"the configuration implies {list(expected[name].shape)}"
                        )
                yield from _checkpoint_tensors(self._model, found).items()

    def _convert(self, values: Iterable[tuple[str, Any]]) -> dict[str, torch.Tensor]:
        """Undo llama.cpp's changes with transformers' processor of the architecture, and rename."""
        import numpy as np
        import torch

        parsed: dict[str, dict[str, torch.Tensor]] = {"tensors": {}}
        for gguf_name, array in values:
            result = self._processor.process(
                weights=array, name=gguf_name, tensor_key_mapping=self._names, parsed_parameters=parsed
            )
            if result.name in self._names:
                values_ = np.ascontiguousarray(result.weights)
                values_ = values_ if values_.flags.writeable else values_.copy()
                parsed["tensors"][self._names[result.name]] = torch.from_numpy(values_)
        return parsed["tensors"]


def open_gguf_model(header: GGUFHeader, *, dtype: str) -> GGUFModel:
    """Plan the import of a GGUF file in `dtype` (float32, bfloat16 or float16).

    Raises ValueError for an architecture that the installed transformers does not know, and for a file that lacks
    tensors of its architecture.
    """
    import torch
    from transformers import AutoConfig
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    if header.architecture in GGUF_CONFIG_ARCHS:
        return _open_with_transformers(header, getattr(torch, dtype))
    content = _read_config(header)
    config = AutoConfig.for_model(**content)
    model = _empty_model(config, header)
    processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)(config=content)
    try:
        names = get_gguf_hf_weights_map(_Names(model), processor)
    except NotImplementedError as error:
        raise ValueError(f"{header.path}: {error}") from error
    for tied in getattr(model, "all_tied_weights_keys", None) or {}:
        names = {gguf_name: name for gguf_name, name in names.items() if name != tied}
    groups: dict[str, list[str]] = {}
    targets: set[str] = set()
    left_out = []
    for tensor in header.tensors:
        # a mixture's stacked experts are mapped without their suffix
        target = names.get(tensor.name) or names.get(tensor.name.removesuffix(".weight"))
        if target is None:
            left_out.append(tensor.name)
            continue
        layer = _LAYER.match(target)
        targets.add(target)
        groups.setdefault(layer[1] if layer else target, []).append(tensor.name)
    _check_complete(model, targets, header)
    planned = {name: value for name, value in model.state_dict().items() if name in targets}
    stored = _checkpoint_tensors(model, planned)
    code = dtype_code(dtype)
    specs = [TensorSpec(name, code, tuple(value.shape)) for name, value in stored.items()]
    return GGUFModel(header, config, specs, left_out, model, groups, processor, names)


def _open_with_transformers(header: GGUFHeader, dtype: torch.dtype) -> GGUFModel:
    """The newer architectures of transformers are converted by its own loader, whole model in memory."""
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        header.path.parent,
        gguf_file=header.path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=dtype,
    )
    state = _checkpoint_tensors(model, model.state_dict())
    specs = [TensorSpec(name, dtype_code(value.dtype), tuple(value.shape)) for name, value in state.items()]
    return GGUFModel(header, model.config, specs, [], model)


def _read_config(header: GGUFHeader) -> dict[str, Any]:
    """transformers' configuration for the file, read from a stand-in without the vocabulary's arrays."""
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES, load_gguf_checkpoint

    with tempfile.TemporaryDirectory(prefix="neuroweave-gguf-") as folder:
        stand_in = Path(folder) / "metadata.gguf"
        write_stand_in(header, stand_in)
        try:
            content = load_gguf_checkpoint(str(stand_in), return_tensors=False)["config"]
        except ValueError as error:
            if "not supported" not in str(error):
                raise ValueError(f"{header.path}: {error}") from error
            known = sorted({*GGUF_SUPPORTED_ARCHITECTURES, *GGUF_CONFIG_ARCHS} - {"general"})
            raise ValueError(
                f"{header.path}: architecture {header.architecture!r} cannot be imported by the installed "
                f"transformers, which knows {', '.join(known)}"
            ) from error
    embedding = next((tensor for tensor in header.tensors if tensor.name == "token_embd.weight"), None)
    tokens = header.metadata.get("tokenizer.ggml.tokens", ())
    content["vocab_size"] = embedding.shape[0] if embedding is not None else len(tokens)
    return content


class _Names:
    """The part of a model that transformers' name map looks at, without what lies below its main parts.

    The map is built once per module, 30 ms each; only the whole, its body and the body's parts can match a name.
    """

    def __init__(self, module: Any, config: PreTrainedConfig | None = None, depth: int = 2) -> None:
        self.config = config or module.config
        self._module, self._depth = module, depth

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._module.state_dict()

    def named_children(self) -> list[tuple[str, _Names]]:
        if not self._depth:
            return []
        return [(name, _Names(child, self.config, self._depth - 1)) for name, child in self._module.named_children()]


def _empty_model(config: PreTrainedConfig, header: GGUFHeader) -> PreTrainedModel:
    """The model on the meta device: names and shapes without memory."""
    import torch
    import transformers
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )

    kind = config.model_type
    named = config.architectures[0] if config.architectures else None
    class_name = (
        named or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind) or MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.get(kind)
    )
    if class_name is None or not hasattr(transformers, class_name):
        raise ValueError(f"{header.path}: transformers has no language model for model type {kind!r}")
    config.architectures = [class_name]
    with torch.device("meta"):
        return getattr(transformers, class_name)._from_config(config)


def _check_complete(model: PreTrainedModel, targets: set[str], header: GGUFHeader) -> None:
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    missing = [name for name, _ in model.named_parameters(remove_duplicate=False) if name not in targets | tied]
    if missing:
        raise ValueError(
            f"{header.path}: {len(missing)} tensors of {type(model).__name__} are not in the file, "
            f"the first is {missing[0]!r}; transformers cannot map this file"
        )


def _checkpoint_tensors(model: PreTrainedModel, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors under the names and in the layout that the model's published checkpoints have; tied copies left out."""
    from transformers.core_model_loading import revert_weight_conversion

    tied = getattr(model, "all_tied_weights_keys", None) or {}
    own = {name: tensor for name, tensor in state.items() if name not in tied}
    return revert_weight_conversion(model, own)
