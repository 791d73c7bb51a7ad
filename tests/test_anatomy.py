"""Parts of models of many families, by structure: the right layers, norms and down projections, and honest gaps."""

from __future__ import annotations

import pytest
import torch
from families import HIDDEN, INTERMEDIATE, tiny_config, tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from neuroweave.diagnose.probes.anatomy import Anatomy, find_anatomy, layers_and_families, linear_sizes
from neuroweave.neuroblast import NeuroBlastConfig, NeuroBlastForCausalLM
from neuroweave.surgery import Recipe, patch

# family: path of the layers, norms of a layer, final norm, down projection
EXPECTED = {
    "llama": ("model.layers", ("input_layernorm", "post_attention_layernorm"), "model.norm", "mlp.down_proj"),
    "gemma3_text": (
        "model.layers",
        (
            *("input_layernorm", "post_attention_layernorm"),
            *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
        ),
        "model.norm",
        "mlp.down_proj",
    ),
    "gpt2": ("transformer.h", ("ln_1", "ln_2"), "transformer.ln_f", "mlp.c_proj"),
    "gpt_neox": (
        "gpt_neox.layers",
        ("input_layernorm", "post_attention_layernorm"),
        "gpt_neox.final_layer_norm",
        "mlp.dense_4h_to_h",
    ),
    "opt": (
        "model.decoder.layers",
        ("self_attn_layer_norm", "final_layer_norm"),
        "model.decoder.final_layer_norm",
        "fc2",
    ),
    "qwen3": ("model.layers", ("input_layernorm", "post_attention_layernorm"), "model.norm", "mlp.down_proj"),
    "olmo2": (
        "model.layers",
        ("post_attention_layernorm", "post_feedforward_layernorm"),
        "model.norm",
        "mlp.down_proj",
    ),
    "phi": ("model.layers", ("input_layernorm",), "model.final_layernorm", "mlp.fc2"),
    "mixtral": ("model.layers", ("input_layernorm", "post_attention_layernorm"), "model.norm", None),
    "bloom": (
        "transformer.h",
        ("input_layernorm", "post_attention_layernorm"),
        "transformer.ln_f",
        "mlp.dense_4h_to_h",
    ),
    "ctrl": ("transformer.h", ("layernorm1", "layernorm2"), "transformer.layernorm", "ffn.2"),
    "gemma3": (
        "model.language_model.layers",
        (
            *("input_layernorm", "post_attention_layernorm"),
            *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
        ),
        "model.language_model.norm",
        "mlp.down_proj",
    ),
}


def check(anatomy: Anatomy, model: nn.Module, family: str) -> None:
    prefix, norms, final, down = EXPECTED[family]
    layers = model.get_submodule(prefix)
    assert anatomy.stacks == ((prefix, 0),)
    assert [layer.module for layer in anatomy.layers] == list(layers) != []
    assert anatomy.final_norm is model.get_submodule(final)
    assert anatomy.embedding is model.get_input_embeddings()
    for found, layer in zip(anatomy.layers, layers, strict=True):
        assert set(found.norms) == set(norms)
        assert all(found.norms[name] is layer.get_submodule(name) for name in norms)
        assert found.down_name == down
        assert found.down is (None if down is None else layer.get_submodule(down))


@pytest.mark.parametrize("family", EXPECTED)
def test_parts_of_a_family(family: str) -> None:
    model = tiny_model(family)
    anatomy = find_anatomy(model)
    check(anatomy, model, family)
    if EXPECTED[family][-1] is None:
        assert anatomy.down_family == ""
        assert any("no plain down projection in any layer" in note for note in anatomy.notes)
    else:
        assert anatomy.notes == ()
        assert [linear_sizes(layer.down) for layer in anatomy.layers] == [
            (4 * HIDDEN if family == "bloom" else INTERMEDIATE, HIDDEN)  # bloom's config has no intermediate size
        ] * 2
        assert anatomy.down_family == f"{EXPECTED[family][-1]}.weight"


def test_experts_in_some_layers_only() -> None:
    anatomy = find_anatomy(tiny_model("deepseek_v3"))
    assert [layer.down_name for layer in anatomy.layers] == ["mlp.down_proj", None]
    assert any("in layer 1 " in note for note in anatomy.notes)


def test_attention_that_widens_is_no_mlp() -> None:
    """Queries wider than the hidden states, as in Gemma, in a model whose MLPs are experts."""
    config = tiny_config("mixtral")
    config.head_dim = 3 * HIDDEN
    anatomy = find_anatomy(AutoModelForCausalLM.from_config(config))
    assert [layer.down for layer in anatomy.layers] == [None, None]


def test_head_norms_as_wide_as_the_hidden_states_are_no_residual_norms() -> None:
    model = tiny_model("qwen3")
    for layer in model.model.layers:
        layer.self_attn.q_norm = nn.RMSNorm(HIDDEN)
    check(find_anatomy(model), model, "qwen3")


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi", "gemma3_text"])
def test_a_patched_model_has_the_same_parts(family: str) -> None:
    model = tiny_model(family)
    plain = [layer.down for layer in find_anatomy(model).layers]
    recipe = {"sites": [{"site": "mlp", "activation": "relu"}, {"site": "mlp.down", "activation": "tanh"}]}
    patch(model, Recipe.model_validate(recipe))
    anatomy = find_anatomy(model)
    assert [layer.down for layer in anatomy.layers] == plain  # the projection itself, inside what is around it
    assert anatomy.down_family == f"{EXPECTED[family][-1]}.weight"


def test_adapters_change_neither_parts_nor_names() -> None:
    model = tiny_model("llama")
    names = [name for name, _ in model.named_parameters()]
    plain = find_anatomy(model)
    layers = [layer.module for layer in plain.layers]
    wanted = list(layers_and_families(names, stacks=plain.stacks).values())
    adapted = get_peft_model(model, LoraConfig(r=INTERMEDIATE, target_modules=["down_proj", "q_proj"]))
    anatomy = find_anatomy(adapted)
    assert [layer.module for layer in anatomy.layers] == layers
    assert [layer.down_name for layer in anatomy.layers] == ["mlp.down_proj"] * 2
    assert linear_sizes(anatomy.layers[0].down) == (INTERMEDIATE, HIDDEN)
    adapted_names = [name for name, _ in adapted.named_parameters()]
    for stacks in (anatomy.stacks, ()):
        found = layers_and_families(adapted_names, stacks=stacks)
        assert [place for name, place in found.items() if "lora_" not in name] == wanted
        assert (1, "mlp.down_proj.lora_A.default.weight") in found.values()


def test_names() -> None:
    names = {
        "model.layers.3.mlp.down_proj.weight": (3, "mlp.down_proj.weight"),
        "model.layers.10.mlp.experts.5.w1.weight": (10, "mlp.experts.5.w1.weight"),
        "model.layers.0.mlp.act_fn.beta": (0, "mlp.act_fn.beta"),
        "model.layers.12.blocks.4.x": (12, "blocks.4.x"),
        "model.embed_tokens.weight": (None, "model.embed_tokens.weight"),
        "model.norm.weight": (None, "model.norm.weight"),
        "model.layers.norm.weight": (None, "model.layers.norm.weight"),
        "model.layers_2.0.weight": (None, "model.layers_2.0.weight"),
        "vision.encoder.layers.3.mlp.down_proj.weight": (3, "vision.encoder.layers.mlp.down_proj.weight"),
        "model.blocks.3.mlp.down_proj.weight": (3, "model.blocks.mlp.down_proj.weight"),
    }
    assert layers_and_families(names) == names
    assert layers_and_families(names, stacks=find_anatomy(tiny_model("llama")).stacks) == names
    assert layers_and_families(["base_model.model.lm_head.weight"]) == {
        "base_model.model.lm_head.weight": (None, "lm_head.weight")
    }


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("transformer.h.11.attn.c_attn.weight", (11, "attn.c_attn.weight")),
        ("decoder.block.2.layer.1.wi.weight", (2, "layer.1.wi.weight")),
        ("layers.7.w", (7, "w")),
        ("players.7.w", (None, "players.7.w")),
        ("conv.3.weight", (None, "conv.3.weight")),
        ("0.weight", (None, "0.weight")),
    ],
)
def test_names_by_themselves(name: str, place: tuple[int | None, str]) -> None:
    assert layers_and_families([name]) == {name: place}
    assert layers_and_families([]) == {}


def test_a_list_of_layers_that_is_known_counts_whatever_its_name_and_size() -> None:
    names = ["tower.layers.0.w", "tower.layers.1.w", "model.stages.0.w"]
    assert list(layers_and_families(names, stacks=[("model.stages", 0)]).values()) == [
        (0, "tower.layers.w"),
        (1, "tower.layers.w"),
        (0, "w"),
    ]


def test_no_layers_is_said_in_words() -> None:
    anatomy = find_anatomy(nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 7)))
    assert (anatomy.layers, anatomy.final_norm, anatomy.down_family) == ((), None, "")
    assert anatomy.notes == ("Sequential: no list of decoder layers was found, so nothing is told by layer",)


def test_a_plain_module_without_a_config() -> None:
    """Layers in a list, the projections in an unnamed Sequential, hidden size from the embedding."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(7)
            self.ffn = nn.Sequential(nn.Linear(7, 123), nn.GELU(), nn.Linear(123, 7))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(11, 7)
            self.blocks = nn.ModuleList([Block(), Block(), Block()])
            self.norm = nn.LayerNorm(7)

    model = Model()
    anatomy = find_anatomy(model)
    assert [layer.down for layer in anatomy.layers] == [block.ffn[2] for block in model.blocks]
    assert anatomy.final_norm is model.norm
    assert anatomy.embedding is model.tokens
    assert torch.is_tensor(model.tokens.weight)
    assert anatomy.notes == ()


def test_stages_of_a_decoder_are_counted_through() -> None:
    model = NeuroBlastForCausalLM(
        NeuroBlastConfig(
            vocab_size=30, hidden_size=8, intermediate_size=16, head_dim=4, num_attention_heads=2,
            num_key_value_heads=1, num_sensory_layers=3, num_associative_layers=2, num_motor_layers=2,
        )
    )  # fmt: skip
    anatomy = find_anatomy(model)
    assert anatomy.stacks == (("model.sensory_layers", 0), ("model.associative_layers", 3), ("model.motor_layers", 5))
    assert len(anatomy.layers) == 7
    assert anatomy.final_norm is model.model.norm
    names = [name for name, _ in model.named_parameters()]
    for stacks in (anatomy.stacks, ()):
        places = layers_and_families(names, stacks=stacks)
        assert places["model.associative_layers.1.conv.weight"] == (4, "conv.weight")
        assert places["model.motor_layers.1.mlp.down_proj.weight"] == (6, "mlp.down_proj.weight")
        assert places["model.sensory_to_motor.weight"] == (None, "model.sensory_to_motor.weight")
