"""Memory and token rate of a training run, estimated from the model's shape: the tables of docs/scale.md.

    python benchmarks/training_plan.py            # the table
    python benchmarks/training_plan.py --write    # put it into docs/scale.md

FLOPs of a token: 6 for each weight that is multiplied (2 forward, 4 backward), and for attention 12 * (T / 2) * heads *
head size a layer (scores and values, causal, forward and backward). Activations are not a formula: the tensors that
autograd keeps are counted while two small depths of the same width run on the CPU, in bfloat16, and the difference is
one layer.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from neuroweave.neuroblast.configuration import NeuroBlastConfig

PAGE = Path(__file__).parent.parent / "docs" / "scale.md"
BEGIN, END = "<!-- training_plan.py -->\n", "<!-- end -->\n"
UTILISATION = 0.25  # of the peak; 20 to 30 % is what such models reach without tuned kernels
# bfloat16 FLOP/s without sparsity and memory, from NVIDIA's data sheets
GPUS = {"A100 80 GB": (312e12, 80e9), "H100 80 GB": (989e12, 80e9), "H200 141 GB": (989e12, 141e9)}
STATE_BYTES = 16  # a parameter: float32 weight, gradient and two moments
LOSS_BYTES = 10  # a logit, at the peak: bfloat16, the float32 copy and its gradient
CAST_BYTES = 2  # a parameter: the bfloat16 copy that autocast keeps during a step


@dataclass(frozen=True)
class Shape:
    """A model and the rows it is trained on. `layers`: depths by the name of the configuration's field."""

    name: str
    config: Any
    length: int
    tokens: float
    layers: dict[str, int]

    def at_depth(self, times: int) -> Any:
        """The configuration with `times` layers of each kind (for NeuroBLAST: of attention and of convolution)."""
        small = {name: 2 * times if "motor" not in name else 0 for name in self.layers}
        if "num_hidden_layers" in self.layers:
            small = {"num_hidden_layers": 2 * times}
        fields = {key: value for key, value in self.config.to_dict().items() if key != "layer_types"}
        fields.pop("num_hidden_layers", None)
        return type(self.config)(**fields | small)


SHAPES = [
    Shape(
        "NeuroBLAST 0.5B",
        NeuroBlastConfig(),
        1280,
        16e9,
        {"num_sensory_layers": 24, "num_associative_layers": 32, "num_motor_layers": 16},
    ),
    Shape("Llama 7B", LlamaConfig(max_position_embeddings=4096), 4096, 140e9, {"num_hidden_layers": 32}),
]


def parameters(config: Any) -> tuple[int, int]:
    """(all parameters, those that a token is multiplied with: all but an embedding that is only looked up)."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return total, total - looked_up


def attention_layers(config: Any) -> int:
    kinds = getattr(config, "layer_types", None)
    return sum("attention" in kind for kind in kinds) if kinds else config.num_hidden_layers


def flops_of_token(config: Any, length: int) -> tuple[float, float]:
    """(of the weights, of attention), forward and backward."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    inner = config.num_attention_heads * head_dim
    return 6 * parameters(config)[1], 12 * (length / 2) * inner * attention_layers(config)


def saved_bytes(config: Any, length: int) -> int:
    """Bytes of the tensors that autograd keeps for one row, without parameters; every storage once."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen: dict[int, int] = {}
    kept: list[torch.Tensor] = []  # a storage must not be freed and counted again at the same address

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        cast = tensor.ndim == 2 and tensor.shape[0] != length and tensor.dtype == torch.bfloat16  # of a weight
        if storage.data_ptr() not in own and not cast:
            seen[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    ids = torch.randint(0, config.vocab_size, (1, length))
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        model(input_ids=ids, labels=ids, use_cache=False)
    return sum(seen.values())


def activation_bytes(shape: Shape, *, length: int = 64) -> tuple[float, float]:
    """(all layers, head and embedding): bytes of one token that autograd keeps."""
    one, two = (saved_bytes(shape.at_depth(times), length) for times in (1, 2))
    blocks_at_one = sum({name: 2 for name in shape.layers if "motor" not in name}.values())
    per_block = (two - one) / blocks_at_one
    return per_block * sum(shape.layers.values()) / length, (2 * one - two) / length


def table() -> str:
    lines = []
    for shape in SHAPES:
        total, multiplied = parameters(shape.config)
        of_weights, of_attention = flops_of_token(shape.config, shape.length)
        flops = of_weights + of_attention
        layers, _ = activation_bytes(shape)
        head = LOSS_BYTES * shape.config.vocab_size
        depth = sum(shape.layers.values())
        boundary = 4 * shape.config.hidden_size * depth  # float32 residual stream between layers
        row, recomputed = shape.length * (layers + head) / 1e9, shape.length * (boundary + layers / depth + head) / 1e9
        million = f"{total / 1e6:,.1f} M"
        lines += [
            f"### {shape.name}, rows of {shape.length:,} tokens",
            "",
            "| what | arithmetic | |",
            "|---|---|---|",
            f"| parameters | counted | {total / 1e6:,.1f} M |",
            f"| FLOPs of a token | 6 x {multiplied / 1e6:,.1f} M + 12 x {shape.length / 2:,.0f} x "
            f"{int(of_attention / 12 / (shape.length / 2) / attention_layers(shape.config)):,} x "
            f"{attention_layers(shape.config)} layers | {flops:.3g} |",
            f"| weights, gradients, Adam | {STATE_BYTES} B x {million} | {STATE_BYTES * total / 1e9:,.1f} GB |",
            f"| copies in bfloat16 (unsharded) | {CAST_BYTES} B x {million} | {CAST_BYTES * total / 1e9:,.1f} GB |",
            f"| activations of a row | {shape.length:,} x ({layers / 1e3:,.0f} kB layers + {head / 1e3:,.0f} kB head), "
            f"counted; head: {LOSS_BYTES} B x {shape.config.vocab_size:,} | {row:,.1f} GB |",
            f"| the same, gradient checkpointing | {shape.length:,} x ({boundary / 1e3:,.0f} kB + one layer "
            f"{layers / depth / 1e3:,.0f} kB + head {head / 1e3:,.0f} kB) | {recomputed:,.1f} GB |",
            f"| checkpoint on the disk | 12 B x {total / 1e6:,.1f} M | {12 * total / 1e9:,.1f} GB |",
            "",
            f"| {shape.tokens / 1e9:g}e9 tokens on | state of a GPU, sharded | rows that fit | with checkpointing "
            f"| tokens/s | days |",
            "|---|---|---|---|---|---|",
        ]
        for name, (peak, memory) in GPUS.items():
            for count in (1, 8, 32):
                state = STATE_BYTES * total / count
                free = 0.9 * memory - state - CAST_BYTES * total / (1 if count == 1 else depth / 2)
                fits, more = (max(0, int(free / 1e9 / size)) for size in (row, recomputed))
                rate = count * peak * UTILISATION / flops
                days = shape.tokens / rate / 86400
                speed = f"{rate:,.0f} | {days:,.1f}" if more else "does not fit | "
                lines.append(f"| {count} x {name} | {state / 1e9:,.1f} GB | {fits} | {more} | {speed} |")
        lines.append("")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/scale.md")
    found = table()
    print(found)
    if parser.parse_args().write:
        before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        PAGE.write_text(before + BEGIN + "\n" + found + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
