"""The tensors of a NeuroBLAST checkpoint by name and shape, and how the published layout stores them. Without torch.

Names are the published ones. Two kinds of tensors are stored otherwise there: a convolution's weight [D, C, K] is the
middle row of a [D, C, K, K] kernel, whose other rows never meet data, and `proj_back` [C, D] is a 1 x 1 convolution.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from neuroweave.neuroblast.layer_plan import BRIDGES, STAGES, plan_layers

if TYPE_CHECKING:
    import numpy as np

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
Shape = tuple[int, ...]


def tensor_shapes(config: Any) -> dict[str, Shape]:
    """Name -> shape of every parameter of `NeuroBlastForCausalLM`, in the model's order; a tied head is left out.

    `config`: a `NeuroBlastConfig`, or anything with its attributes.
    """
    C, planned = config.hidden_size, plan_layers(config)
    shapes: dict[str, Shape] = {EMBEDDING: (config.vocab_size, C)}
    for stage in STAGES:
        for layer in planned:
            if layer.stage == stage:
                own = convolution_shapes(config) if layer.is_convolution else attention_shapes(config)
                shapes |= {f"model.{layer.name}.{name}": shape for name, shape in own.items()}
        if stage in BRIDGES and config.bridges:
            shapes[f"model.{BRIDGES[stage]}.weight"] = (C,)
    shapes["model.norm.weight"] = (C,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, C)
    return shapes


def attention_shapes(config: Any) -> dict[str, Shape]:
    """Of one attention layer, by the rest of the name."""
    C, F, D = config.hidden_size, config.intermediate_size, config.head_dim
    inner, key_value = config.num_attention_heads * D, config.num_key_value_heads * D
    projections = {"q_proj": (inner, C), "k_proj": (key_value, C), "v_proj": (key_value, C), "o_proj": (C, inner)}
    shapes: dict[str, Shape] = {}
    for name, shape in projections.items():
        shapes[f"self_attn.{name}.weight"] = shape
        if config.attention_bias:
            shapes[f"self_attn.{name}.bias"] = shape[:1]
    shapes |= {"self_attn.q_norm.weight": (D,), "self_attn.k_norm.weight": (D,)}
    shapes |= {"mlp.gate_proj.weight": (F, C), "mlp.up_proj.weight": (F, C), "mlp.down_proj.weight": (C, F)}
    return shapes | {"input_layernorm.weight": (C,), "post_attention_layernorm.weight": (C,)}


def convolution_shapes(config: Any) -> dict[str, Shape]:
    """Of one convolution block, by the rest of the name."""
    C, D = config.hidden_size, config.convolution_channels
    shapes: dict[str, Shape] = {"norm_in.weight": (C,), "conv.weight": (D, C, config.kernel_size)}
    shapes["norm_out.weight"] = (C,)
    return shapes | ({"proj_back.weight": (C, D)} if config.scale < 1 else {})


def published_shape(name: str, shape: Shape) -> Shape:
    """The shape that the published layout has for a tensor of this one."""
    if name.endswith(".conv.weight"):
        return (*shape, shape[-1])
    return (*shape, 1, 1) if name.endswith(".proj_back.weight") else shape


def from_published(name: str, stored: Any) -> Any:
    """A published tensor (of numpy or torch) in this layout; one that has this layout's dimensions comes as it is."""
    if name.endswith(".conv.weight") and stored.ndim == 4:
        return stored[:, :, stored.shape[2] // 2]
    return stored[:, :, 0, 0] if name.endswith(".proj_back.weight") and stored.ndim == 4 else stored


def to_published(name: str, array: np.ndarray) -> np.ndarray:
    """The inverse of `from_published`; the rows of the kernel that never meet data are zeros."""
    import numpy as np

    whole = np.zeros(published_shape(name, array.shape), array.dtype)
    if name.endswith(".conv.weight"):
        whole[:, :, array.shape[-1] // 2] = array
        return whole
    return array.reshape(whole.shape)


def dead_weights(name: str, stored: Any) -> int:
    """How many weights of a published convolution are not zero and yet meet no data."""
    if not name.endswith(".conv.weight") or stored.ndim != 4:
        return 0
    return int((stored != 0).sum()) - int((from_published(name, stored) != 0).sum())


def layout_of(shapes: dict[str, Shape]) -> str:
    """`published` where a convolution has four dimensions, else `neuroweave`."""
    kernels = [shape for name, shape in shapes.items() if name.endswith(".conv.weight")]
    return "published" if any(len(shape) == 4 for shape in kernels) else "neuroweave"


def misfits(stored: dict[str, Shape], config: Any, layout: str) -> list[str]:
    """What is missing, unexpected or of another shape, a phrase each; empty for a sound checkpoint.

    A head beside a tied embedding is allowed: whoever reads its data is to check that it is equal.
    """
    expected = tensor_shapes(config)
    if layout == "published":
        expected = {name: published_shape(name, shape) for name, shape in expected.items()}
    allowed = {HEAD: expected[EMBEDDING]} if config.tie_word_embeddings else {}
    found = _listed("missing", (name for name in expected if name not in stored))
    found += _listed("unexpected", (name for name in stored if name not in expected and name not in allowed))
    for name, shape in (expected | allowed).items():
        if name in stored and tuple(stored[name]) != shape:
            found.append(f"{name} has shape {list(stored[name])}, the configuration makes it {list(shape)}")
    return found


def check_tied_head(checkpoint: Any, config: Any) -> None:
    """Refuse a stored head that is not the embedding it is said to be tied to; `checkpoint`: an opened folder."""
    if not config.tie_word_embeddings or HEAD not in checkpoint:
        return
    if checkpoint.read_bytes(HEAD) != checkpoint.read_bytes(EMBEDDING):
        raise ValueError(
            f"{checkpoint.folder}: tie_word_embeddings is true, but {HEAD} differs from {EMBEDDING}; "
            f"say tie_word_embeddings: false in config.json to keep both"
        )


def _listed(what: str, names: Iterable[str]) -> list[str]:
    listed = list(names)
    if not listed:
        return []
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return [f"{what}: {', '.join(listed[:3])}{more}"]
