"""Find the sites of a model by its structure: what can be changed, where it is, how many neurons it has.

No model names: decoder layers are the longest list of equal blocks in the text decoder; an MLP is what holds an
activation beside the projections that widen and narrow the hidden states; projections are told apart by the field's
names for their roles (q_proj, c_attn, gate_up_proj, fc2, ...).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2CLS

from neuroweave.activations.mixtures import NeuronMixture, SegmentMixture
from neuroweave.activations.torch import Activation, activation_name
from neuroweave.surgery.recipe import LAYER_SITES, SITES

# What the field calls the projections, by role. A fused one holds its parts one after the other in its output.
ROLES = {
    "attention.q": ("q_proj", "query", "q_lin", "wq", "q_b_proj", "query_proj", "project_q", "Wq"),
    "attention.k": ("k_proj", "key", "k_lin", "wk", "key_proj", "project_k", "Wk"),
    "attention.v": ("v_proj", "value", "v_lin", "wv", "value_proj", "project_v", "Wv"),
    "attention.o": ("o_proj", "out_proj", "dense", "c_proj", "wo", "out_lin", "attention_out", "o_b_proj", "Wo"),
    "mlp.gate": ("gate_proj", "w1", "proj_up_gate", "wi_0", "linear_gate", "w_0"),
    "mlp.up": ("up_proj", "w3", "proj_up", "c_fc", "fc1", "fc_in", "dense_h_to_4h", "wi", "wi_1", "v1", "w_1", "lin1"),
    "mlp.down": (
        "down_proj",
        "w2",
        "proj_down",
        "c_proj",
        "fc2",
        "fc_out",
        "dense_4h_to_h",
        "wo",
        "Wo",
        "lin2",
        "output_linear",
    ),
}
FUSED_QKV = ("qkv_proj", "c_attn", "query_key_value", "Wqkv")
QKV_IN_ORDER = ("qkv_proj", "Wqkv", "c_attn")  # the whole of q, then k, then v; others interleave them by head
FUSED_GATE_UP = ("gate_up_proj", "input_linear", "Wi", "w12")
# A block that holds one of these is a mixer, a router or a side path, whatever activation it has.
NOT_AN_MLP = ("conv1d", "conv_1d", "conv", "per_layer_input_gate", "A_log", "ogate_preact", "e_score_correction_bias")
NOT_IN_AN_MLP = ("norm", "attn", "attention")
SIDE_PATHS = ("router", "vision", "visual", "image", "img", "audio", "speech", "indexer", "compressor")
ACTIVATION_NAMES = ("act_fn", "activation_fn", "act", "activation", "activation_func", "gelu_impl")
ACTIVATION_TYPES: tuple[Any, ...] = tuple(
    {entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()}
    | {nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.Softplus, nn.Hardswish, nn.Mish, nn.LeakyReLU}
    | {Activation, SegmentMixture, NeuronMixture}
)


@dataclass(frozen=True)
class Place:
    """One thing at a site that an edit can change.

    `op`: a kind of edit in `apply.py`, with `side` before or after for projections; empty for an MLP that computes its
    activation inside its own forward, where nothing can be put in its place. `path`: the module. `layer`: the
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
    stacks = decoder_stacks(model)
    places = [
        place
        for stack in stacks
        for number, (path, layer) in enumerate(stack)
        for place in layer_places(model, layer, number, path)
    ]
    places += model_places(model, stacks)
    once: dict[tuple[Any, ...], Place] = {}
    for place in places:  # a block that several layers share is changed once
        parent, _, name = place.path.rpartition(".")
        once.setdefault((id(model.get_submodule(parent)), name, place.site, place.part), place)
    found = {site: [place for place in once.values() if place.site == site] for site in SITES}
    return {site: chosen for site, chosen in found.items() if any(place.op for place in chosen)}


def decoder_stacks(model: PreTrainedModel) -> list[list[tuple[str, nn.Module]]]:
    """(path, layer) of each decoder layer, in order; and of other lists of the same blocks.

    The decoder layers are the list with the most parameters, or lists that follow one another as a decoder's stages:
    side by side, and together as many as the config says.
    """
    names = {id(module): name for name, module in model.named_modules()}
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = [
        module
        for module in text_decoder(model).modules()
        if isinstance(module, nn.ModuleList)
        and any(True for _ in module.parameters())
        and not any(word in names[id(module)].lower() for word in SIDE_PATHS)
    ]
    whole = [module for module in lists if len(module) == count]
    if not whole and (stages := staged_lists(lists, names, count)):
        return [[pair for module in stages for pair in layer_paths(module, names)]]
    lists = whole or lists
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of decoder layers that could be found by structure")
    best = max(lists, key=lambda module: sum(parameter.numel() for parameter in module.parameters()))
    kinds = {type(layer) for layer in best}
    alike = [module for module in lists if module is best or {type(layer) for layer in module} == kinds]
    outer = [module for module in alike if not any(module in set(other.modules()) - {other} for other in alike)]
    return [layer_paths(module, names) for module in outer]


def staged_lists(lists: list[nn.ModuleList], names: dict[int, str], count: int | None) -> list[nn.ModuleList]:
    """The lists beside the first one, where they have `count` layers together; else none."""
    beside = [each for each in lists if names[id(each)].rpartition(".")[0] == names[id(lists[0])].rpartition(".")[0]]
    return beside if len(beside) > 1 and sum(map(len, beside)) == count else []


def layer_paths(layers: nn.ModuleList, names: dict[int, str]) -> list[tuple[str, nn.Module]]:
    return [(f"{names[id(layers)]}.{index}", layer) for index, layer in enumerate(layers)]


def text_decoder(model: PreTrainedModel) -> nn.Module:
    """The text decoder of a model: itself, or the part of a multimodal model that reads and writes tokens."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if decoder is None or not any(isinstance(module, nn.ModuleList) for module in decoder.modules()):
        return model
    return decoder


def layer_places(model: PreTrainedModel, layer: nn.Module, number: int, path: str) -> Iterator[Place]:
    for name, block in layer.named_modules():
        if any(word in name.lower() for word in SIDE_PATHS):
            continue
        where = f"{path}.{name}" if name else path
        attention = list(attention_places(model, block, where, number))
        yield from attention
        if not attention and not any(word in name.lower() for word in NOT_IN_AN_MLP):
            yield from mlp_places(model, block, where, number)


# ------------------------------------------------------------------------------------------------------------- MLP


def activation_attributes(block: nn.Module) -> list[tuple[str, Any]]:
    """(name, activation) of what `block` itself holds as an activation of one input: a child, or a plain function."""
    children = [
        (name, child)
        for name, child in block.named_children()
        if isinstance(child, ACTIVATION_TYPES) or (name in ACTIVATION_NAMES and takes_one_input(child))
    ]
    functions = [(name, vars(block)[name]) for name in ACTIVATION_NAMES if callable(vars(block).get(name))]
    return children + functions


def takes_one_input(module: nn.Module) -> bool:
    inputs = inspect.signature(module.forward).parameters.values()
    return sum(each.default is each.empty and each.kind == each.POSITIONAL_OR_KEYWORD for each in inputs) == 1


def projections(block: nn.Module) -> dict[str, tuple[int, int]]:
    """Name -> (inputs, outputs) of the linear layers and the expert matrices that `block` itself holds."""
    found = {}
    for name, child in block.named_children():
        if sizes := linear_sizes(child):
            found[name] = sizes
    for name, parameter in block.named_parameters(recurse=False):
        if parameter.ndim == 3 or (parameter.ndim == 2 and any(name in known for known in ROLES.values())):
            found[name] = (parameter.shape[-1], parameter.shape[-2])
    return found


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear layer of any class, Conv1D and stacks of them included, else None."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim not in (2, 3) or isinstance(module, nn.Embedding | nn.Conv1d):
        return None
    if hasattr(module, "nf"):  # transformers' Conv1D keeps its weight transposed
        return weight.shape[0], weight.shape[1]
    return weight.shape[-1], weight.shape[-2]


def mlp_places(model: PreTrainedModel, block: nn.Module, path: str, number: int) -> Iterator[Place]:
    held = projections(block)
    if any(hasattr(block, name) for name in NOT_AN_MLP):
        return
    roles = mlp_roles(held)
    activations = activation_attributes(block)
    widens = any(outputs > inputs for inputs, outputs in held.values())
    if not activations and {"mlp.down", "mlp.up"} <= set(roles) | (
        {"mlp.up"} if set(held) & set(FUSED_GATE_UP) else set()
    ):
        yield Place("mlp", "", path, number, None, "")  # computes its activation inside its own forward
    elif not activations or not (roles or widens):
        return
    neurons = mlp_neurons(model, block, held, roles)
    for name, activation in activations:
        yield Place("mlp", "activation", f"{path}.{name}", number, neurons, activation_name(activation))
    children = dict(block.named_children())
    for site, name in roles.items():
        if name in children and name not in FUSED_GATE_UP:
            yield Place(site, "projection", f"{path}.{name}", number, held[name][1], "identity", "after")
    for name in children:
        if name in FUSED_GATE_UP and name in held:
            half = held[name][1] // 2
            for site, part in (("mlp.gate", (0, half)), ("mlp.up", (half, 2 * half))):
                yield Place(site, "projection", f"{path}.{name}", number, half, "identity", "after", part)


def mlp_roles(held: dict[str, tuple[int, int]]) -> dict[str, str]:
    """Site -> name of the projection in that role; nothing when there is neither an up nor a down projection."""
    roles = {}
    for site in ("mlp.gate", "mlp.up", "mlp.down"):
        name = next((name for name in ROLES[site] if name in held), None)
        if name is not None:
            roles[site] = name
    return roles if "mlp.down" in roles or "mlp.up" in roles else {}


def mlp_neurons(
    model: PreTrainedModel, block: nn.Module, held: dict[str, tuple[int, int]], roles: dict[str, str]
) -> int | None:
    """How many neurons the activation sees: the side of the down projection that is not the hidden size."""
    hidden = getattr(model.config.get_text_config(decoder=True), "hidden_size", None)
    if (down := roles.get("mlp.down")) is not None:
        if getattr(getattr(block, down), "ndim", 0) == 2:
            return None  # the matrices of all experts below each other: their number is not in the shape
        inputs, outputs = held[down]
        return outputs if inputs == hidden != outputs else inputs
    role = roles.get("mlp.gate") or roles.get("mlp.up")
    widths = [held[role][1]] if role else [outputs for inputs, outputs in held.values() if outputs > inputs]
    return widths[0] if len(widths) == 1 else None


# ------------------------------------------------------------------------------------------------------- attention


def attention_places(model: PreTrainedModel, block: nn.Module, path: str, number: int) -> Iterator[Place]:
    held = projections(block)
    names = {site: [name for name in ROLES[site] if name in held] for site in ROLES if site.startswith("attention")}
    fused = next((name for name in FUSED_QKV if name in held), None)
    if fused is None and not (
        names["attention.q"] and (names["attention.k"] or "kv_b_proj" in held or names["attention.o"])
    ):
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


def model_places(model: PreTrainedModel, stacks: list[list[tuple[str, nn.Module]]]) -> Iterator[Place]:
    hidden = getattr(model.config.get_text_config(decoder=True), "hidden_size", None)
    if len(stacks) == 1:  # with several stacks, no one layer is where the embeddings go in
        yield Place("embedding", "layer_input", stacks[0][0][0], None, hidden, "identity")
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
