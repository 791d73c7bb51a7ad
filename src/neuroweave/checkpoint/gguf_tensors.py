"""The tensors of a GGUF file: names, types and values, read one at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from neuroweave.checkpoint.gguf import import_gguf
from neuroweave.checkpoint.gguf_families import Family, rope_factors
from neuroweave.checkpoint.reader import Checkpoint

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedConfig

_CHUNK_ELEMENTS = 1 << 20  # quantizing needs several temporaries of this size
_STORED = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the file: its shape in torch order, a ggml type, its size, and what gives its float32 values."""

    name: str
    shape: tuple[int, ...]
    kind: Any
    nbytes: int
    values: Callable[[], np.ndarray]


def plan_tensors(checkpoint: Checkpoint, config: PreTrainedConfig, family: Family, type: str) -> list[PlannedTensor]:
    """The file's tensors. Raises ValueError when the checkpoint's are not those of the configuration."""
    gguf = import_gguf()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.architecture.upper()], config.num_hidden_layers)
    tied = bool(config.tie_word_embeddings)
    expected = _expected_shapes(config)
    stored = [name for name in checkpoint if not name.endswith("rotary_emb.inv_freq")]
    own = [name for name in stored if not (tied and name == "lm_head.weight")]
    if missing := [name for name in expected if name not in checkpoint and not (tied and name == "lm_head.weight")]:
        raise ValueError(
            f"{checkpoint.folder}: tensor {missing[0]!r} is missing ({len(missing)} in all); fetch it again"
        )
    planned = []
    factors = rope_factors(config)
    if factors is not None:
        planned.append(planned_tensor("rope_freqs.weight", factors.shape, type, tied, lambda: factors))
    for name in own:
        tensor, target = checkpoint[name], names.get_name(name, (".weight", ".bias"))
        where = f"{checkpoint.folder}: tensor {name!r}"
        if target is None or name not in expected or _has_no_bias(name, family):
            raise ValueError(f"{where} has no place in llama.cpp's {family.architecture!r}; it cannot be exported")
        if tensor.shape != expected[name]:
            raise ValueError(
                f"{where} has shape {list(tensor.shape)}, the configuration implies {list(expected[name])}"
            )
        if tensor.dtype not in _STORED:
            raise ValueError(f"{where} is stored as {tensor.dtype}; expected one of {', '.join(_STORED)}")
        planned.append(planned_tensor(target, tensor.shape, type, tied, _reader(checkpoint, name, config, family)))
    return planned


def _expected_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _has_no_bias(name: str, family: Family) -> bool:
    return name.endswith(".bias") and name.split(".")[-2] not in family.biases


def planned_tensor(
    name: str, shape: tuple[int, ...], type: str, tied: bool, values: Callable[[], np.ndarray]
) -> PlannedTensor:
    """With the type that is stored: vectors in float32; q4_0 keeps what gives the logits in q8_0; rows that do not fill
    blocks in f16."""
    gguf = import_gguf()
    if type == "q4_0" and name == ("token_embd.weight" if tied else "output.weight"):
        type = "q8_0"
    kind = gguf.GGMLQuantizationType["F32" if len(shape) == 1 else type.upper()]
    if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = gguf.GGMLQuantizationType.F16
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    return PlannedTensor(name, tuple(shape), kind, prod(shape) // per_block * block_bytes, values)


def _reader(checkpoint: Checkpoint, name: str, config: PreTrainedConfig, family: Family) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        import numpy as np

        values = checkpoint.read_numpy(name).astype(np.float32, copy=False)
        projection = name.split(".")[-2]
        if family.permuted and projection in ("q_proj", "k_proj"):
            heads = config.num_attention_heads if projection == "q_proj" else config.num_key_value_heads
            return interleaved(values, heads)
        return values + np.float32(1) if family.shifted and name.endswith("norm.weight") else values

    return read


def interleaved(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head reordered from (first half, second half) to pairs: llama.cpp rotates neighbours."""
    rows = values.shape[0]
    return values.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(values.shape)


def encode(tensor: PlannedTensor) -> np.ndarray:
    """The tensor's values as its type stores them. Raises ValueError for values that are not finite, or too large."""
    import numpy as np

    gguf = import_gguf()
    values = tensor.values()
    table = values.reshape(-1, values.shape[-1])
    step = max(1, _CHUNK_ELEMENTS // table.shape[1])
    parts = []
    for start in range(0, len(table), step):
        block = table[start : start + step]
        if not np.isfinite(block).all():
            raise ValueError(f"tensor {tensor.name!r} has values that are not finite; neuroweave verify shows where")
        with np.errstate(over="ignore"):
            parts.append(gguf.quants.quantize(block, tensor.kind))
        if tensor.kind.name == "F16" and np.isinf(parts[-1]).any():
            raise ValueError(f"tensor {tensor.name!r} has values beyond what float16 holds; choose bf16 or f32")
    return np.concatenate(parts)
