"""The configuration of a NeuroBLAST model: what a person may say, and what is refused."""

from os import PathLike
from pathlib import Path
from typing import Any, no_type_check

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from neuroweave.neuroblast.layer_plan import STAGES, plan_layers

NEUROBLAST_FILE = "modeling_neuroblast.py"
NEUROBLAST_CLASSES = {
    "AutoConfig": "NeuroBlastConfig",
    "AutoModel": "NeuroBlastModel",
    "AutoModelForCausalLM": "NeuroBlastForCausalLM",
}
# In published configurations, without any effect on the published model.
WITHOUT_EFFECT = ("energy_dim", "attention_every", "temporal_kernel_size")


@no_type_check  # `strict` checks the types itself, of fields that transformers' own constructor takes
@strict
class NeuroBlastConfig(PreTrainedConfig):
    """A hybrid of attention and dilated causal convolutions in three stages; the defaults are the published model's.

    num_sensory_layers, num_associative_layers (`int`): layers of the first stages, attention and
        convolution by turns.
    num_motor_layers (`int`): attention layers of the last stage.
    kernel_size (`int`): taps of a convolution; odd.
    scale (`float`): width of the convolutions. 1: as wide as the hidden states. 2: twice as wide, one half gating the
        other. Below 1: narrower (at least a quarter), then projected back.
    max_dilation (`int`): largest distance between two taps.
    dropout (`float`): of the convolution blocks' output. attention_dropout (`float`): of the attention weights.
    use_sliding_window (`bool`), sliding_window (`int`), max_window_layers (`int`): attention layers numbered from
        `max_window_layers` on see at most `sliding_window` tokens, as in Qwen3.
    rope_parameters (`dict`): any of transformers' rotary scalings.
    bridges, alternating_rotary, convolutions (`bool`): off, they leave out the embedding's bridges between stages, give
        every attention layer rotary positions, or put attention layers where convolutions stand (for ablations).

    `num_hidden_layers` and `layer_types` follow from the stages. Source: the published NeuroBLAST V3.
    """

    model_type = "neuroblast"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  # a class attribute of transformers' own
    default_theta = 10000.0
    base_model_tp_plan = {  # noqa: RUF012
        f"{stage}_layers.*.{projection}": style
        for stage in ("sensory", "associative", "motor")
        for projection, style in {
            "self_attn.q_proj": "colwise",
            "self_attn.k_proj": "colwise",
            "self_attn.v_proj": "colwise",
            "self_attn.q_norm": "replicated_with_grad_allreduce",
            "self_attn.k_norm": "replicated_with_grad_allreduce",
            "self_attn.o_proj": "rowwise",
            "mlp.gate_proj": "colwise",
            "mlp.up_proj": "colwise",
            "mlp.down_proj": "rowwise",
        }.items()
    }
    base_model_fsdp_plan = {  # noqa: RUF012
        "embed_tokens": "free_full_weight",
        "sensory_layers.*": "free_full_weight",
        "associative_layers.*": "free_full_weight",
        "motor_layers.*": "free_full_weight",
        "norm": "keep_full_weight",
    }

    vocab_size: int = 65536
    hidden_size: int = 512
    intermediate_size: int = 3072
    num_sensory_layers: int = 24
    num_associative_layers: int = 32
    num_motor_layers: int = 16
    num_attention_heads: int = 16
    num_key_value_heads: int = 8
    head_dim: int = 128
    kernel_size: int = 5
    scale: float | int = 1.0
    max_dilation: int = 8
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = True
    rope_parameters: RopeParameters | dict | None = None
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    dropout: float | int = 0.0
    use_sliding_window: bool = False
    sliding_window: int | None = None
    max_window_layers: int = 0
    bridges: bool = True
    alternating_rotary: bool = True
    convolutions: bool = True
    num_hidden_layers: int | None = None
    layer_types: list[str] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in WITHOUT_EFFECT:
            if kwargs.pop(name, None) and name == "attention_every":
                raise ValueError(
                    "attention_every has no effect on the published model and none here: which layers attend follows "
                    "from the stages; leave it out"
                )
        self._check_sizes()
        if not self.use_sliding_window:
            self.sliding_window = None
        planned = [layer.type for layer in plan_layers(self)]
        if self.num_hidden_layers not in (None, len(planned)):
            raise ValueError(
                f"num_hidden_layers is {self.num_hidden_layers}, but the stages have {len(planned)}; leave it out"
            )
        # published configurations say `full_attention` for every layer, whatever it is
        if self.layer_types not in (None, planned) and set(self.layer_types or ()) != {"full_attention"}:
            raise ValueError(f"layer_types is {self.layer_types}, but the stages make it {planned}; leave it out")
        self.num_hidden_layers, self.layer_types = len(planned), planned
        super().__post_init__(**kwargs)
        if (self.rope_parameters or {}).get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError("partial_rotary_factor must be 1: every channel of a head is rotated")

    def validate_layer_type(self) -> None:
        """Nothing: they follow from the stages, and transformers 5.17 would rename `conv` to `linear_attention`."""

    def _check_sizes(self) -> None:
        """Refuse what cannot be built, by name. Raises ValueError."""
        positive = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
        counts = [f"num_{stage}_layers" for stage in STAGES]
        for name in (*positive, "head_dim", "kernel_size", "max_dilation", "max_position_embeddings", *counts):
            value, least = getattr(self, name), 0 if name in counts else 1
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        for name in ("scale", "dropout", "attention_dropout"):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), int | float):
                raise ValueError(f"{name} must be a number, got {getattr(self, name)!r}")
        if not any(getattr(self, name) for name in counts):
            raise ValueError("all stages have 0 layers; give at least one of them a layer")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even (rotary positions turn pairs of channels), got {self.head_dim}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads ({self.num_key_value_heads}) must divide num_attention_heads "
                f"({self.num_attention_heads})"
            )
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {self.kernel_size}; published checkpoints have 5")
        if not (0 < self.scale <= 1 or self.scale == 2):
            raise ValueError(
                f"scale must be 2, 1 or between 0 and 1, got {self.scale}: a gated convolution has two halves of the "
                f"hidden size, so no other scale above 1 fits the residual stream"
            )
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if self.use_sliding_window and (self.sliding_window is None or self.sliding_window < 1):
            raise ValueError(f"use_sliding_window needs a sliding_window of at least 1, got {self.sliding_window}")

    def save_pretrained(self, save_directory: str | PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """As of any configuration; the code that loads the checkpoint without neuroweave comes along."""
        plain = type(self).model_type == "neuroblast"  # a patched model brings other code
        if plain:
            module = NEUROBLAST_FILE.removesuffix(".py")
            self.auto_map = {auto: f"{module}.{name}" for auto, name in NEUROBLAST_CLASSES.items()}
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        if plain:
            (Path(save_directory) / NEUROBLAST_FILE).write_text(neuroblast_source(), encoding="utf-8")

    @property
    def convolution_channels(self) -> int:
        """Output channels of a convolution: hidden_size times scale; below 1 at least a quarter of hidden_size."""
        if self.scale >= 1:
            return int(self.hidden_size * self.scale)
        return max(int(self.hidden_size * self.scale), self.hidden_size // 4, 1)


def build_configuration(fields: dict[str, Any]) -> NeuroBlastConfig:
    """The configuration with these fields. Raises ValueError, in one line, for what does not fit."""
    try:
        return NeuroBlastConfig.from_dict(fields)
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from error


def neuroblast_source() -> str:
    """The text of the self-contained modelling file: this file itself when it is one, else joined from the package."""
    if __name__ != "neuroweave.neuroblast.configuration":
        return Path(__file__).read_text(encoding="utf-8")
    try:  # inside `try`, transformers does not count the import as a requirement of a checkpoint's code
        from neuroweave.neuroblast.bundle import bundle
    except ImportError as error:
        raise ImportError(f"{NEUROBLAST_FILE} cannot be written without the neuroweave package") from error
    return bundle()


# name: (settings, what it is for). Vocabulary and special tokens come from the tokenizer.
PRESETS: dict[str, tuple[dict[str, Any], str]] = {
    "default": ({}, "the published size: 72 layers, 416 M parameters with its vocabulary of 65,536"),
    "small": (
        {
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_sensory_layers": 6,
            "num_associative_layers": 8,
            "num_motor_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 64,
            "max_position_embeddings": 8192,
        },
        "18 layers, 15 M parameters without the embedding: trains on one GPU, or slowly on a CPU",
    ),
    "tiny": (
        {
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_sensory_layers": 4,
            "num_associative_layers": 4,
            "num_motor_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 2048,
        },
        "10 layers: for tests and for trying things out",
    ),
}
