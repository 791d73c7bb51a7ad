"""The layers of a checkpoint, found from tensor names and shapes by structure; no model's name is known here.

A stack is what comes before a layer number: `model.layers`, `model.language_model.layers`, `transformer.h`. In a layer
an MLP is a module with a down projection and one or two projections into the wide space.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from neuroweave.checkpoint.header import TensorSpec

# lists of layers that follow one another in a decoder of several stages, whose layers are counted through
STAGES = ("sensory_layers", "associative_layers", "motor_layers")
_NUMBERED = re.compile(
    rf"^(?P<stack>(?:.+?\.)?(?:layers?|h|blocks?|decoder_layers?|{'|'.join(STAGES)}))\.(?P<number>\d+)\.(?P<rest>.+)$"
)
_OTHER_SENSES = re.compile(r"vision|visual|image|audio|speech|video|\bvit\b|perceiver|projector|\bmtp\b")
_EMBEDDING = re.compile(
    r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|token_embd|tokens_embed|embeddings|embed|shared)\.weight$"
)
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output|output_layer)\.weight$")
_EXPERT = re.compile(r"(?:^|\.)experts?\.(?:(?P<number>\d+)\.)?")

_GATES = ("gate_proj", "wi_0", "gate", "w1", "gate_linear")
_UPS = ("up_proj", "wi_1", "up", "w3", "v1", "up_linear")
_DOWNS = (
    "down_proj",
    "w2",
    "c_proj",
    "fc2",
    "dense_4h_to_h",
    "wo",
    "Wo",
    "fc_out",
    "down",
    "output_linear",
    "lin2",
    "linear_2",
)
_FUSED = ("gate_up_proj", "gate_up", "input_linear", "Wi", "w13", "gate_and_up_proj")
_INTO = ("c_fc", "fc1", "dense_h_to_4h", "fc_in", "wi", "up_proj", "up", "w1", "lin1", "linear_1", "gate_proj")
_ROLES = frozenset((*_GATES, *_UPS, *_DOWNS, *_FUSED, *_INTO))
_NOT_MLP = re.compile(r"(?:^|\.)(?:self_attn|attn|attention|self_attention|cross_attn|linear_attn|router)\.")


@dataclass(frozen=True)
class MLP:
    """One MLP of a layer: gated, fused gate-up or plain. Sizes are from shapes; `experts` is 0 for a dense one."""

    kind: str
    hidden: int
    intermediate: int
    experts: int = 0

    def __str__(self) -> str:
        many = f"{self.experts} experts " if self.experts else ""
        return f"{many}{self.kind} {'' if self.experts else 'MLP '}{self.hidden}->{self.intermediate}"


@dataclass(frozen=True)
class GatedProjections:
    """The three matrices of a layer's dense gated MLP: `gate` and `up` `[m, d]`, `down` `[d, m]`, stored apart.

    Neuron i is row i of gate and up and column i of down.
    """

    layer: int
    gate: TensorSpec
    up: TensorSpec
    down: TensorSpec

    @property
    def hidden(self) -> int:
        return self.gate.shape[1]

    @property
    def intermediate(self) -> int:
        return self.gate.shape[0]


@dataclass
class Stack:
    """Layers that share a prefix: for each number, the layer's tensors by the rest of their name."""

    prefix: str
    layers: dict[int, dict[str, TensorSpec]] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        return sum(tensor.parameters for layer in self.layers.values() for tensor in layer.values())


def find_stacks(tensors: Iterable[TensorSpec]) -> list[Stack]:
    """All stacks, the text decoder first: the largest that is not named after another sense."""
    stacks: dict[str, Stack] = {}
    for tensor in tensors:
        if match := _NUMBERED.match(tensor.name):
            stack = stacks.setdefault(match["stack"], Stack(match["stack"]))
            stack.layers.setdefault(int(match["number"]), {})[match["rest"]] = tensor
    joined = _join_stages(stacks)
    return sorted(joined.values(), key=lambda stack: (bool(_OTHER_SENSES.search(stack.prefix)), -stack.parameters))


def _join_stages(stacks: dict[str, Stack]) -> dict[str, Stack]:
    """The stages of a decoder as one stack, `model.{sensory,associative,motor}_layers`, counted through."""
    joined: dict[str, Stack] = {}
    for path, stack in sorted(stacks.items(), key=lambda item: _stage_number(item[0])):
        parent, _, name = path.rpartition(".")
        if name not in STAGES:
            joined[path] = stack
            continue
        stages = ",".join(stage.removesuffix("_layers") for stage in STAGES)
        prefix = f"{parent}." * bool(parent) + f"{{{stages}}}_layers"
        whole = joined.setdefault(prefix, Stack(prefix))
        before = max(whole.layers, default=-1) + 1
        whole.layers.update({before + number: layer for number, layer in stack.layers.items()})
    return joined


def _stage_number(path: str) -> int:
    name = path.rpartition(".")[2]
    return STAGES.index(name) if name in STAGES else -1


def find_embedding(tensors: Iterable[TensorSpec]) -> TensorSpec | None:
    """The token embedding: the largest tensor with an embedding's name outside other senses."""
    found = [item for item in tensors if _EMBEDDING.search(item.name) and not _OTHER_SENSES.search(item.name)]
    return max(found, key=lambda item: item.parameters, default=None)


def has_head(tensors: Iterable[TensorSpec]) -> bool:
    """Whether the output projection is stored (when it is not, it is tied to the embedding)."""
    return any(_HEAD.search(item.name) and not _NUMBERED.match(item.name) for item in tensors)


def find_mlps(layer: Mapping[str, TensorSpec], hidden: int) -> list[MLP]:
    """The MLPs of a layer, dense ones first. `hidden`: the model's width, which tells rows from columns."""
    modules: dict[tuple[str, bool], dict[str, TensorSpec]] = {}
    experts: dict[str, set[int]] = {}
    for rest, tensor in layer.items():
        path = rest.removesuffix(".weight").removesuffix(".linear")
        parent, _, role = path.rpartition(".")
        if role not in _ROLES or rest.endswith(".bias") or len(tensor.shape) < 2 or _NOT_MLP.search(f"{parent}."):
            continue
        expert = _EXPERT.search(f"{parent}.")
        if expert:
            parent = f"{parent}."[: expert.start()] + ".experts"
            experts.setdefault(parent, set()).update([int(expert["number"])] if expert["number"] else [])
        modules.setdefault((parent, bool(expert)), {}).setdefault(role, tensor)
    found = []
    for (parent, is_expert), roles in modules.items():
        mlp = _recognise(roles, hidden, is_expert, len(experts.get(parent, ())))
        if mlp:
            found.append(mlp)
    return sorted(found, key=lambda mlp: (mlp.experts, -mlp.intermediate))


def find_projections(tensors: Iterable[TensorSpec]) -> tuple[list[GatedProjections], dict[int, str]]:
    """The dense gated MLPs of the text decoder, and why the other layers' MLPs (or parts of them) are none.

    Found by shape: gate and up are `[m, d]` and down is `[d, m]`. Experts, fused gate-up matrices and plain MLPs are
    named in the second value with a reason for people; a layer may hold both a dense MLP and experts.
    """
    stacks = find_stacks(tensors)
    found, others = [], {}
    for number, layer in sorted(stacks[0].layers.items()) if stacks else ():
        parents: dict[str, dict[str, TensorSpec]] = {}
        for rest, tensor in layer.items():
            parent, _, role = rest.removesuffix(".weight").rpartition(".")
            if role in ("gate_proj", "up_proj", "down_proj", *_FUSED):
                parents.setdefault(parent, {})[role] = tensor
        for parent, roles in parents.items():
            if _EXPERT.search(f"{parent}."):
                others[number] = "mixture-of-experts matrices (experts)"
            elif any(role in roles for role in _FUSED):
                others[number] = "gate and up fused in one matrix"
            elif len(roles) == 3 and _fit(*(roles[role].shape for role in ("gate_proj", "up_proj", "down_proj"))):
                found.append(GatedProjections(number, roles["gate_proj"], roles["up_proj"], roles["down_proj"]))
        if number not in others and not any(mlp.layer == number for mlp in found):
            others[number] = "no gated MLP with gate_proj, up_proj and down_proj"
    return found, others


def _fit(gate: tuple[int, ...], up: tuple[int, ...], down: tuple[int, ...]) -> bool:
    return len(gate) == 2 and gate == up and down == gate[::-1]


def _recognise(roles: dict[str, TensorSpec], hidden: int, is_expert: bool, numbered: int) -> MLP | None:
    down = next((roles[role] for role in _DOWNS if role in roles), None)
    fused = next((roles[role] for role in _FUSED if role in roles), None)
    gate = next((roles[role] for role in _GATES if role in roles), None)
    up = next((roles[role] for role in _UPS if role in roles), None)
    into = next((roles[role] for role in _INTO if role in roles), None)
    if down is None or (fused is None and into is None):
        return None
    stacked = len(down.shape) == 3 or numbered == 0
    count = (
        (down.shape[0] if len(down.shape) == 3 and stacked else numbered or 1)
        if is_expert or len(down.shape) == 3
        else 0
    )
    width = hidden or min(down.shape[-2:])
    wide = _other(down, width)
    if fused is None and gate is not None and up is not None:
        return MLP("gated", width, wide, count)
    projection = fused if fused is not None else into
    assert projection is not None
    doubled = _other(projection, width) == 2 * wide
    return MLP("fused gate-up" if doubled else "plain", width, wide, count)


def _other(tensor: TensorSpec, width: int) -> int:
    """The size that is not the model's width, whichever way round the matrix is stored."""
    rows, columns = tensor.shape[-2:]
    return columns if rows == width else rows


def attention_kind(number: int, layer: Mapping[str, TensorSpec], config: Mapping[str, Any]) -> str:
    """What mixes the positions in a layer: from the configuration's layer types, else from what the layer holds."""
    types = config.get("layer_types")
    if isinstance(types, list) and number < len(types):
        return _named(str(types[number]), config)
    names = " ".join(layer)
    if re.search(r"(?:^|[ .])(?:mamba|mixer\.(?:in_proj|A_log)|ssm)", names):
        return "state space"
    if "linear_attn." in names:
        return "linear attention"
    if re.search(r"(?:^|[ .])(?:conv|short_conv)\.", names) and not re.search(r"attn|attention", names):
        return "convolution"
    if not re.search(r"attn|attention|(?:^|[ .])[qkv]_proj|qkv|query_key_value", names):
        return "none"
    pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern")
    if isinstance(pattern, int) and pattern > 1 and config.get("sliding_window"):
        return _named("full_attention" if (number + 1) % pattern == 0 else "sliding_attention", config)
    if config.get("sliding_window") and config.get("use_sliding_window", "layer_types" not in config):
        first = config.get("max_window_layers", 0) if "use_sliding_window" in config else 0
        return _named("sliding_attention" if number >= first else "full_attention", config)
    return "full attention"


def _named(kind: str, config: Mapping[str, Any]) -> str:
    text = {"conv": "convolution"}.get(kind, kind.replace("_", " "))
    window = config.get("sliding_window") if kind.startswith("sliding") else None
    return f"{text} ({window})" if window else text
