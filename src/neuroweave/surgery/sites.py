"""Find the sites of a model by its structure: what can be changed, where it is, how many neurons it has.

No model names: decoder layers are the longest list of equal blocks in the text decoder; an MLP is what holds an
activation beside the projections that widen and narrow the hidden states; projections are told apart by the field's
names for their roles (q_proj, c_attn, gate_up_proj, fc2, ...).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2CLS

from neuroweave.activations.formulas import FORMULAS
from neuroweave.surgery.recipe import LAYER_SITES, SITES

# What the field calls the projections, by role. A fused one holds its parts one after the other in its output.
ROLES = {
    "attention.q": ("q_proj", "query", "q_lin", "wq", "q_b_proj", "query_proj", "to_q", "q_up_proj"),
    "attention.k": ("k_proj", "key", "k_lin", "wk", "key_proj", "to_k"),
    "attention.v": ("v_proj", "value", "v_lin", "wv", "value_proj", "to_v"),
    "attention.o": ("o_proj", "out_proj", "dense", "c_proj", "wo", "out_lin", "attention_output", "to_out", "resid_proj"),
    "mlp.gate": ("gate_proj", "w1", "gate", "wi_0", "linear_gate", "w_gate", "w_0"),
    "mlp.up": (
        *("up_proj", "w3", "fc1", "c_fc", "dense_h_to_4h", "fc_in", "wi", "wi_1", "lin1", "linear_1", "linear_v"),
        *("intermediate_dense", "dense_in", "w_in", "w_1", "fc", "key_proj", "up", "v1", "linear_fc1"),
    ),
    "mlp.down": (
        *("down_proj", "w2", "fc2", "c_proj", "dense_4h_to_h", "fc_out", "wo", "lin2", "linear_2", "down"),
        *("output_dense", "dense_out", "w_out", "w_2", "proj", "output_linear", "linear_fc2"),
    ),
}
FUSED_QKV = ("qkv_proj", "c_attn", "query_key_value", "Wqkv", "qkv", "att_proj", "in_proj_qkv")
QKV_IN_ORDER = ("qkv_proj", "Wqkv", "c_attn")  # the whole of q, then k, then v; others interleave them by head
FUSED_GATE_UP = ("gate_up_proj", "gate_and_up_proj", "input_linear", "gate_up", "Wi", "w12", "fc1_gate_up", "linear_in")
NOT_AN_MLP = ("conv1d", "conv", "per_layer_input_gate", "A_log", "dt_bias", "time_mix_key", "x_proj")
ACTIVATION_NAMES = ("act_fn", "activation_fn", "act", "activation", "activation_func", "ffn_act_fn", "intermediate_act_fn")
ACTIVATION_TYPES = tuple(
    {entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()}
    | {nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.Softplus, nn.Hardswish, nn.Mish, nn.LeakyReLU}
)


@dataclass(frozen=True)
class Place:
    """One thing at a site that an edit can change.

    `op`: a kind of edit in `apply.py`, with `side` before or after for projections. `path`: the module. `layer`: the
    decoder layer's number, None for embedding and head. `neurons`: width of what the activation sees, None if unknown.
    `original`: the activation that runs there now ("identity" where there is none, "" where it has no name here).
    `part`: (start, stop) in the last dimension of a fused projection's output. `shared`: a fused projection whose
    parts cannot be told apart, so that it takes one activation for all of them.
    """

    site: str
    op: str
    path: str
    layer: int | None
    neurons: int | None
    original: str
    side: str = ""
    part: tuple[int, int] | None = None
    shared: bool = False


def find_sites(model: PreTrainedModel) -> dict[str, list[Place]]:
    """Every site of the model, in the order of `SITES`; a site that it lacks is not in the result.

    Raises ValueError when no decoder layers can be found.
    """
    path, layers = decoder_layers(model)
    places = [place for number, layer in enumerate(layers) for place in layer_places(model, layer, number, f"{path}.{number}")]
    places += model_places(model, path)
    once: dict[tuple[Any, ...], Place] = {}
    for place in places:  # a block that several layers share is changed once
        parent, _, name = place.path.rpartition(".")
        once.setdefault((id(model.get_submodule(parent)), name, place.site, place.part), place)
    found: dict[str, list[Place]] = {}
    for site in SITES:
        if chosen := [place for place in once.values() if place.site == site]:
            found[site] = chosen
    return found


def decoder_layers(model: PreTrainedModel) -> tuple[str, list[nn.Module]]:
    """(path of the list, its modules): the list of decoder layers with the most parameters in the text decoder."""
    names = {id(module): name for name, module in model.named_modules()}
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    root = text_decoder(model)
    lists = [module for module in root.modules() if isinstance(module, nn.ModuleList) and len(module) > 0]
    lists = [module for module in lists if any(True for _ in module.parameters())]
    exact = [module for module in lists if len(module) == count] or lists
    if not exact:
        raise ValueError(f"{type(model).__name__} has no list of decoder layers that could be found by structure")
    best = max(exact, key=lambda module: sum(parameter.numel() for parameter in module.parameters()))
    return names[id(best)], list(best)


def text_decoder(model: PreTrainedModel) -> nn.Module:
    """The text decoder of a model: itself, or the part of a multimodal model that reads and writes tokens."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if decoder is None or not any(isinstance(module, nn.ModuleList) for module in decoder.modules()):
        return model
    return decoder


def layer_places(model: PreTrainedModel, layer: nn.Module, number: int, path: str) -> Iterator[Place]:
    for name, block in layer.named_modules():
        where = f"{path}.{name}" if name else path
        if "." in name and not is_leaf_block(name):
            continue
        yield from mlp_places(block, where, number)
        yield from attention_places(model, block, where, number)


def is_leaf_block(name: str) -> bool:
    """Skip vision towers, routers and the like deep inside a layer."""
    return not any(word in name.lower() for word in ("router", "vision", "visual"))


# ------------------------------------------------------------------------------------------------------------- MLP


def activation_attributes(block: nn.Module) -> list[tuple[str, Any]]:
    """(name, activation) of what `block` itself holds as an activation: a child module, or a plain function."""
    children = [
        (name, child)
        for name, child in block.named_children()
        if isinstance(child, ACTIVATION_TYPES) or (name in ACTIVATION_NAMES and not any(True for _ in child.parameters()))
    ]
    functions = [(name, vars(block)[name]) for name in ACTIVATION_NAMES if callable(vars(block).get(name))]
    return children + functions


def projections(block: nn.Module) -> dict[str, tuple[int, int]]:
    """Name -> (inputs, outputs) of the linear layers and stacked expert matrices that `block` itself holds."""
    found = {}
    for name, child in block.named_children():
        if sizes := linear_sizes(child):
            found[name] = sizes
    for name, parameter in block.named_parameters(recurse=False):
        if parameter.ndim == 3:
            found[name] = (parameter.shape[2], parameter.shape[1])
    return found


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear layer of any class, Conv1D included, else None."""
    weight = getattr(module, "weight", None)
    if weight is None or weight.ndim != 2 or isinstance(module, nn.Embedding):
        return None
    if hasattr(module, "nf"):  # transformers' Conv1D keeps its weight transposed
        return weight.shape[0], weight.shape[1]
    return weight.shape[1], weight.shape[0]


def mlp_places(block: nn.Module, path: str, number: int) -> Iterator[Place]:
    held = projections(block)
    if any(hasattr(block, name) for name in NOT_AN_MLP):
        return
    activations = activation_attributes(block)
    roles = mlp_roles(held)
    if not activations or not (roles or list_of_experts(block) or len(held) >= 2):
        return
    neurons = mlp_neurons(held, roles)
    for name, activation in activations:
        yield Place("mlp", "activation", f"{path}.{name}", number, neurons, activation_name(activation))
    for site, name in roles.items():
        if name in dict(block.named_children()):
            yield Place(site, "projection", f"{path}.{name}", number, held[name][1], "identity", "after")
    for name in held:
        if name in FUSED_GATE_UP and name in dict(block.named_children()):
            half = held[name][1] // 2
            for site, part in (("mlp.gate", (0, half)), ("mlp.up", (half, 2 * half))):
                yield Place(site, "projection", f"{path}.{name}", number, half, "identity", "after", part)


def mlp_roles(held: dict[str, tuple[int, int]]) -> dict[str, str]:
    """Site -> name of the projection in that role."""
    roles = {}
    for site in ("mlp.gate", "mlp.up", "mlp.down"):
        name = next((name for name in ROLES[site] if name in held), None)
        if name is not None:
            roles[site] = name
    return roles if "mlp.down" in roles or "mlp.up" in roles else {}


def mlp_neurons(held: dict[str, tuple[int, int]], roles: dict[str, str]) -> int | None:
    """How many neurons the activation sees: what the gate (or up) projection gives, half of a fused one."""
    for name in held:
        if name in FUSED_GATE_UP:
            return fused_width(held[name], held.get(roles.get("mlp.down", "")))
    role = roles.get("mlp.gate") or roles.get("mlp.up")
    return held[role][1] if role else None


def fused_width(fused: tuple[int, int], down: tuple[int, int] | None) -> int:
    """Neurons of a fused gate-up matrix, whichever way round a family stacks its experts."""
    if down is not None:
        for width in fused:
            if width % 2 == 0 and width // 2 in down:
                return width // 2
    return fused[1] // 2


def list_of_experts(block: nn.Module) -> bool:
    return any(parameter.ndim == 3 for _, parameter in block.named_parameters(recurse=False))


def activation_name(activation: Any) -> str:
    """Our name of an activation that computes exactly one of our formulas, else an empty string."""
    if isinstance(activation, nn.Module) and getattr(activation, "name", None) in FORMULAS:
        return str(activation.name)
    for name, theirs in TRANSFORMERS_NAMES.items():
        entry = ACT2CLS[theirs]
        cls, settings = entry if isinstance(entry, tuple) else (entry, {})
        if type(activation) is cls and not settings:
            return name
    kinds = {nn.ReLU: "relu", nn.SiLU: "silu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid"}
    return kinds.get(type(activation), "")


TRANSFORMERS_NAMES = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "identity": "linear",
}


# ------------------------------------------------------------------------------------------------------- attention


def attention_places(model: PreTrainedModel, block: nn.Module, path: str, number: int) -> Iterator[Place]:
    held = projections(block)
    names = {site: [name for name in ROLES[site] if name in held] for site in ROLES if site.startswith("attention")}
    fused = next((name for name in FUSED_QKV if name in held), None)
    if fused is None and not (names["attention.q"] and (names["attention.k"] or "kv_b_proj" in held or names["attention.o"])):
        return
    for site, candidates in names.items():
        if candidates and not (fused and site != "attention.o"):
            name = candidates[0]
            yield Place(site, "projection", f"{path}.{name}", number, held[name][1], "identity", "after")
    if fused is not None:
        parts = qkv_parts(model, fused, held[fused])
        for site in ("attention.q", "attention.k", "attention.v"):
            where, shared = (parts[site], False) if parts else (None, True)
            width = where[1] - where[0] if where else held[fused][1]
            yield Place(site, "projection", f"{path}.{fused}", number, width, "identity", "after", where, shared)


def qkv_parts(model: PreTrainedModel, name: str, sizes: tuple[int, int]) -> dict[str, tuple[int, int]] | None:
    """Where q, k and v lie in the output of a fused projection that holds them one after the other, else None."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", None)
    if name not in QKV_IN_ORDER or not heads or getattr(config, "multi_query", None) is False:
        return None
    queries = (getattr(config, "head_dim", None) or config.hidden_size // heads) * heads
    values, rest = divmod(sizes[1] - queries, 2)
    if values <= 0 or rest:
        return None
    edges = (0, queries, queries + values, queries + 2 * values)
    return {f"attention.{part}": (edges[i], edges[i + 1]) for i, part in enumerate("qkv")}


# ------------------------------------------------------------------------------------------------ embedding and head


def model_places(model: PreTrainedModel, layers: str) -> Iterator[Place]:
    config = model.config.get_text_config(decoder=True)
    yield Place("embedding", "layer_input", f"{layers}.0", None, getattr(config, "hidden_size", None), "identity")
    head = model.get_output_embeddings()
    if head is not None and (sizes := linear_sizes(head)):
        path = next(name for name, module in model.named_modules() if module is head)
        yield Place("head", "projection", path, None, sizes[0], "identity", "before")


def describe_sites(places: dict[str, list[Place]]) -> str:
    """One phrase that names the sites that are there, for errors."""
    return ", ".join(
        site if site not in LAYER_SITES else f"{site} ({len({place.layer for place in found})} layers)"
        for site, found in places.items()
    )

