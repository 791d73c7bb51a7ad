"""Where the parts of a causal language model are that the probes look at, told by structure and not by model name.

Decoder layers are the largest list of blocks in the text decoder; a residual norm is as wide as the hidden states; the
down projection is the linear layer that narrows the MLP's intermediate size back to the hidden size. Works for any
family of transformers, for models that neuroweave patched and for models with PEFT adapters.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from neuroweave.checkpoint.layers import STAGES

# What the field calls the projection from the intermediate size back to the hidden size.
DOWN_NAMES = (
    *("down_proj", "w2", "c_proj", "fc2", "fc_out", "dense_4h_to_h", "proj_down", "wo", "Wo", "lin2"),
    *("output_linear", "proj_2"),
)
SIDE_PATHS = ("vision", "visual", "image", "audio", "speech", "local_encoder", "local_decoder")
# Inside a layer, never the MLP: what has such a word in its path.
NOT_THE_MLP = ("norm", "attn", "attention", "expert", "router", "per_layer", "laurel", "altup")
# Mixers that widen and narrow as an MLP does; only a known name tells an MLP from them.
MIXERS = ("mixer", "mamba", "ssm", "conv", "temporal", "recurrent", "rwkv", "lstm")
NOT_RESIDUAL = re.compile(r"(^|\.)((q|k|v|qk|kv|query|key|value)_\w*|.*router\w*)$")
PEFT_PREFIX = "base_model.model."
_IN_LAYER = re.compile(
    rf"(?P<stack>(?:.*?\.)?(?:layers?|h|blocks?|{'|'.join(STAGES)}))\.(?P<layer>\d+)\.(?P<family>.+)"
)


@dataclass(frozen=True, eq=False)
class Layer:
    """One decoder layer. `norms`: its residual norms by their path in it; `down`: its MLP's down projection."""

    module: nn.Module
    norms: dict[str, nn.Module]
    down_name: str | None
    down: nn.Module | None


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The parts of one model. `stacks`: module path of each list of layers and the number of its first layer (one list,
    or a decoder's stages); `embedding`: what token ids go into; `notes`: what was not found, in words."""

    stacks: tuple[tuple[str, int], ...]
    embedding: nn.Module | None
    layers: tuple[Layer, ...]
    final_norm: nn.Module | None
    notes: tuple[str, ...]

    @property
    def down_family(self) -> str:
        """Name of the down projection's weight in its layer, empty where there is none: `mlp.down_proj.weight`."""
        return next((f"{layer.down_name}.weight" for layer in self.layers if layer.down_name is not None), "")


def find_anatomy(model: nn.Module) -> Anatomy:
    """The parts of `model`; what cannot be found is left out, and `notes` say so."""
    kind = type(model).__name__
    decoder = text_decoder(model)
    lists = decoder_layers(model, decoder)
    embedding = token_embedding(model)
    if not lists:
        notes = (f"{kind}: no list of decoder layers was found, so nothing is told by layer",)
        return Anatomy((), embedding, (), None, notes)
    names = {id(module): name for name, module in model.named_modules()}
    firsts = itertools.accumulate(map(len, lists[:-1]), initial=0)
    stacks = tuple((names[id(blocks)], first) for blocks, first in zip(lists, firsts, strict=True))
    hidden = hidden_size(model)
    layers = tuple(read_layer(block, hidden, intermediate_sizes(model)) for blocks in lists for block in blocks)
    final = find_final_norm(decoder, lists[-1], hidden)
    missing = []
    if not any(layer.norms for layer in layers):
        missing.append(f"{kind}: no norms as wide as the hidden states were found in the layers")
    if final is None:
        missing.append(f"{kind}: no norm after the last layer was found")
    without = [number for number, layer in enumerate(layers) if layer.down is None]
    if without:
        missing.append(
            f"{kind}: no plain down projection in {in_words(without, len(layers))} (a mixture of experts, or no MLP), "
            "so sparsity is not told there"
        )
    return Anatomy(stacks, embedding, layers, final, tuple(missing))


def layers_and_families(
    names: Iterable[str], *, stacks: Sequence[tuple[str, int]] = ()
) -> dict[str, tuple[int | None, str]]:
    """Each tensor's layer and its name within it: `model.layers.3.mlp.up_proj.weight` is (3, `mlp.up_proj.weight`).

    `stacks`: the decoder's lists of layers (`Anatomy.stacks`); without them, the list that has the most names, or the
    stages beside each other that it is one of. Layers of other lists (an image encoder's, say) keep its path in the
    family's name, so that no two tensors share a layer and a family. A name outside of all layers is whole, with None.
    PEFT's own parts of a name are left out, so that a weight has one family with and without adapters.
    """
    plain = {name: plain_name(name) for name in names}
    firsts = {plain_name(path): first for path, first in stacks}
    given = "|".join(map(re.escape, firsts))
    of_stack = re.compile(rf"(?P<stack>{given})\.(?P<layer>\d+)\.(?P<family>.+)")
    parts = {name: (firsts and of_stack.fullmatch(own)) or _IN_LAYER.fullmatch(own) for name, own in plain.items()}
    firsts = firsts or main_stacks([match for match in parts.values() if match])
    found: dict[str, tuple[int | None, str]] = {}
    for name, match in parts.items():
        if not match:
            found[name] = None, plain[name]
        else:
            outside = "" if match["stack"] in firsts else f"{match['stack']}."
            found[name] = firsts.get(match["stack"], 0) + int(match["layer"]), outside + match["family"]
    return found


def main_stacks(matches: Sequence[re.Match[str]]) -> dict[str, int]:
    """The list that has the most names, with 0; of a decoder in stages all, with their first layers' numbers."""
    sizes = Counter(match["stack"] for match in matches)
    main = max(sizes, key=lambda each: sizes[each], default="")
    parent, dot, name = main.rpartition(".")
    if name not in STAGES:
        return {main: 0}
    firsts, first = {}, 0
    for stage in STAGES:
        firsts[f"{parent}{dot}{stage}"] = first
        numbers = [int(match["layer"]) for match in matches if match["stack"] == f"{parent}{dot}{stage}"]
        first += max(numbers, default=-1) + 1
    return firsts


def plain_name(name: str) -> str:
    return name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")


def in_words(numbers: Iterable[int], of: int) -> str:
    chosen = list(numbers)
    if len(chosen) == of:
        return "any layer"
    return ("layer " if len(chosen) == 1 else "layers ") + ", ".join(map(str, chosen))


# ---------------------------------------------------------------------------------------------------- the whole model


def text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def hidden_size(model: nn.Module) -> int | None:
    size = getattr(text_config(model), "hidden_size", None)
    if isinstance(size, int):
        return size
    weight = getattr(token_embedding(model), "weight", None)
    return weight.shape[-1] if isinstance(weight, Tensor) else None


def token_embedding(model: nn.Module) -> nn.Module | None:
    """The module that token ids go into."""
    of_model: Any = getattr(model, "get_input_embeddings", None)
    if of_model is not None:
        return of_model()
    return next((module for module in model.modules() if isinstance(module, nn.Embedding)), None)


def intermediate_sizes(model: nn.Module) -> set[int]:
    """What the config calls the size between the MLP's projections; empty where it does not say."""
    names = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "feed_forward_size")
    sizes = (getattr(text_config(model), name, None) for name in names)
    return {size for size in sizes if isinstance(size, int)}


def text_decoder(model: nn.Module) -> nn.Module:
    """The part that reads text, of a multimodal model; else the model itself."""
    of_model: Any = getattr(model, "get_decoder", None)
    decoder = of_model() if of_model is not None else None
    if isinstance(decoder, nn.Module) and any(isinstance(module, nn.ModuleList) for module in decoder.modules()):
        return decoder
    return model


def decoder_layers(model: nn.Module, decoder: nn.Module) -> list[nn.ModuleList]:
    """The list with the most parameters, of those as long as the config says, if there are such; else the lists beside
    each other that are as long together (a decoder's stages), or the list with the most parameters."""
    names = {id(module): name for name, module in model.named_modules()}
    lists = [
        module
        for module in decoder.modules()
        if isinstance(module, nn.ModuleList)
        and any(True for _ in module.parameters())
        and not any(word in names[id(module)].lower() for word in SIDE_PATHS)
    ]
    if not lists:
        return []
    count = getattr(text_config(model), "num_hidden_layers", None)
    whole = [module for module in lists if len(module) == count]
    parents = [names[id(module)].rpartition(".")[0] for module in lists]
    beside = [module for module, parent in zip(lists, parents, strict=True) if parent == parents[0]]
    if not whole and len(beside) > 1 and sum(map(len, beside)) == count:
        return beside
    # The first of equals: a list inside of a list of one block can hold all of its parameters.
    return [max(whole or lists, key=lambda module: sum(parameter.numel() for parameter in module.parameters()))]


def find_final_norm(decoder: nn.Module, layers: nn.ModuleList, hidden: int | None) -> nn.Module | None:
    """The norm beside the list of layers: the first after it, else (OPT) the last before that is not the embedding's.

    Registration order is all there is to go by.
    """
    parent = next((module for module in decoder.modules() if layers in module.children()), decoder)
    children = list(parent.named_children())
    at = next((index for index, (_, child) in enumerate(children) if child is layers), len(children))
    after = [child for _, child in children[at + 1 :] if is_norm(child, hidden)]
    before = [child for name, child in children[:at] if is_norm(child, hidden) and "emb" not in name]
    return after[0] if after else before[-1] if before else None


# --------------------------------------------------------------------------------------------------------- one layer


def read_layer(layer: nn.Module, hidden: int | None, intermediate: set[int]) -> Layer:
    norms = {
        name: module
        for name, module in layer.named_modules()
        if name and is_norm(module, hidden, inner="." in name) and not NOT_RESIDUAL.search(name)
    }
    down = find_down_projection(layer, hidden, intermediate) if hidden else None
    return Layer(layer, norms, *(down or (None, None)))


def is_norm(module: nn.Module, hidden: int | None, *, inner: bool = False) -> bool:
    """Whether `module` is a norm as wide as the hidden states; an `inner` one has to state its width."""
    if "norm" not in type(module).__name__.lower() or hidden is None:
        return False
    weight, shape = getattr(module, "weight", None), getattr(module, "normalized_shape", None)
    if isinstance(weight, Tensor):
        return tuple(weight.shape) == (hidden,)
    if shape is not None:
        return tuple(shape) == (hidden,)
    return not inner and not any(True for _ in module.children())


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear layer, quantized, adapted or patched ones and transformers' Conv1D included."""
    for inputs, outputs in (("in_features", "out_features"), ("nx", "nf")):
        sizes = getattr(module, inputs, None), getattr(module, outputs, None)
        if isinstance(sizes[0], int) and isinstance(sizes[1], int):
            return sizes[0], sizes[1]
    return None


def linear_layers(layer: nn.Module) -> Iterator[tuple[str, nn.Module, int, int]]:
    """(path, module, inputs, outputs) of the outermost linear layers that can belong to the MLP."""
    found: list[str] = []
    for name, module in layer.named_modules():
        if any(word in name.lower() for word in NOT_THE_MLP) or any(name.startswith(f"{path}.") for path in found):
            continue
        if sizes := linear_sizes(module):
            found.append(name)
            yield name, module, *sizes


def find_down_projection(layer: nn.Module, hidden: int, intermediate: set[int]) -> tuple[str, nn.Module] | None:
    """(path, module) of the linear layer whose input is the MLP's intermediate; None if there is no plain one.

    One with another name than the field's counts if another layer widens the hidden states to its input (or, gate and
    up projection in one, to twice that) and it is not in a block that mixes tokens. Of several: a known name, then
    the config's intermediate size, then the widest.
    """
    linears = list(linear_layers(layer))
    widened = {outputs for _, _, inputs, outputs in linears if inputs == hidden != outputs}
    ranked = []
    for name, module, inputs, outputs in linears:
        if outputs != hidden:
            continue
        known = name.rpartition(".")[2] in DOWN_NAMES
        mixer = any(word in name.lower() for word in MIXERS)
        if known or (not mixer and inputs != hidden and ({inputs, 2 * inputs} & widened)):
            ranked.append(((known, inputs in intermediate, inputs), name, module))
    if not ranked:
        return None
    _, name, module = max(ranked, key=lambda entry: entry[0])
    return name, innermost(module)


def innermost(module: nn.Module) -> nn.Module:
    """The projection itself where neuroweave put activations around it: what they do comes before its input."""
    projection = vars(module).get("projection")
    return projection if isinstance(projection, nn.Module) else module
