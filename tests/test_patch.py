"""Patching a model in memory: identity, undo, every kind of site, and what is refused."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import families
import pytest
import torch
from transformers import AutoModelForCausalLM

from neuroweave import patch, unpatch
from neuroweave.activations.torch import Activation
from neuroweave.surgery.apply import apply_plan
from neuroweave.surgery.modeling import PatchedModel
from neuroweave.surgery.recipe import SITES, shipped_recipes

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import prove_families

OWN = {
    "llama": "silu",
    "gemma3_text": "gelu_tanh",
    "falcon": "gelu",
    "opt": "relu",
    "nemotron": "relu2",
    "gpt2": "original|original",
}


def logits(model, family="llama", **inputs):
    with torch.no_grad():
        return model(**(families.tiny_inputs(family) | inputs)).logits


def recipe(site, activation, **fields):
    return {"sites": [{"site": site, "activation": activation} | fields]}


@pytest.mark.parametrize("family", OWN)
def test_the_models_own_activation_is_bit_equal_and_undo_restores(family):
    model = families.tiny_model(family)
    before, names = logits(model, family), [name for name, _ in model.named_parameters()]
    with patch(model, recipe("mlp", OWN[family])) as patched:
        assert patched is model
        assert isinstance(model, PatchedModel)
        assert torch.equal(logits(model, family), before)
    with patch(model, recipe("mlp", "phantom")):
        assert not torch.equal(logits(model, family), before)
    assert torch.equal(logits(model, family), before)
    assert [name for name, _ in model.named_parameters()] == names
    assert type(model) is type(families.tiny_model(family))
    assert type(model.config) is type(families.tiny_model(family).config)
    assert not hasattr(model.config, "neuroweave")


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_recipe_round_trips(name, tmp_path):
    model = families.tiny_model("llama")
    before = logits(model)
    handle = patch(model, name)
    after = logits(model)
    model.save_pretrained(tmp_path / "once")
    once = AutoModelForCausalLM.from_pretrained(tmp_path / "once", attn_implementation="eager").eval()
    assert torch.equal(logits(once), after)
    once.save_pretrained(tmp_path / "twice")
    twice = AutoModelForCausalLM.from_pretrained(tmp_path / "twice", attn_implementation="eager").eval()
    assert torch.equal(logits(twice), after)
    assert torch.equal(logits(copy.deepcopy(once)), after)
    unpatch(once)
    assert torch.equal(logits(once), before)
    handle.undo()
    handle.undo()  # a second time does nothing
    assert torch.equal(logits(model), before)


def test_mlp_equals_the_formula_by_hand():
    model = families.tiny_model("llama")
    mlp = model.model.layers[1].mlp
    x = torch.randn(2, 3, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    gate = mlp.gate_proj(x)
    with patch(model, recipe("mlp", "relu|silu", layers=[1])):
        half = gate.shape[-1] // 2
        act = torch.cat([gate[..., :half].relu(), torch.nn.functional.silu(gate[..., half:])], dim=-1)
        assert torch.allclose(mlp(x), mlp.down_proj(act * mlp.up_proj(x)), atol=1e-6)
        assert isinstance(
            model.model.layers[0].mlp.act_fn, type(families.tiny_model("llama").model.layers[0].mlp.act_fn)
        )


def test_embedding_and_head_act_where_they_say():
    model = families.tiny_model("gemma3_text")  # scales its embeddings inside the embedding class
    inputs = families.tiny_inputs("gemma3_text")
    embedded = model.get_input_embeddings()(inputs["input_ids"])
    seen = {}
    model.model.layers[0].input_layernorm.register_forward_pre_hook(lambda _, args: seen.update(layer=args[0]))
    with patch(model, recipe(["embedding", "head"], "silu_tanh")), torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
        expected = Activation("silu_tanh")(embedded)
        assert torch.allclose(seen["layer"], expected, atol=1e-6)
        final = Activation("silu_tanh")(output.hidden_states[-1])
        assert torch.allclose(output.logits, torch.nn.functional.linear(final, model.lm_head.weight), atol=1e-5)
        assert len(output.hidden_states) == model.config.num_hidden_layers + 1


@pytest.mark.parametrize(("family", "projection"), [("llama", "q_proj"), ("llama", "o_proj"), ("llama", "up_proj")])
def test_projection_output_is_activated(family, projection):
    model = families.tiny_model(family)
    layer = model.model.layers[0]
    parent = layer.mlp if projection == "up_proj" else layer.self_attn
    linear = getattr(parent, projection)
    x = torch.randn(2, linear.in_features, generator=torch.Generator().manual_seed(0))
    site = {"q_proj": "attention.q", "o_proj": "attention.o", "up_proj": "mlp.up"}[projection]
    with patch(model, recipe(site, "tanh", layers=[0])):
        wrapped = getattr(parent, projection)
        assert torch.allclose(wrapped(x), linear(x).tanh(), atol=1e-6)
        assert wrapped.weight is linear.weight
        assert not isinstance(wrapped, torch.nn.Linear)  # what replaces linear layers by class must not take it for one
        assert wrapped.in_features == linear.in_features
    assert getattr(parent, projection) is linear


def test_parts_of_fused_projections():
    model = families.tiny_model("phi3")
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    x = torch.randn(2, 3, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    qkv, gate_up = attention.qkv_proj(x), mlp.gate_up_proj(x)
    queries = model.config.num_attention_heads * attention.head_dim
    keys = model.config.num_key_value_heads * attention.head_dim
    with patch(model, recipe(["attention.k", "mlp.up"], "tanh")):
        expected = qkv.clone()
        expected[..., queries : queries + keys] = qkv[..., queries : queries + keys].tanh()
        assert torch.allclose(attention.qkv_proj(x), expected, atol=1e-6)
        width = gate_up.shape[-1] // 2
        assert torch.allclose(
            mlp.gate_up_proj(x), torch.cat([gate_up[..., :width], gate_up[..., width:].tanh()], -1), atol=1e-6
        )


def test_interleaved_query_key_value_is_all_or_none():
    model = families.tiny_model("gpt_neox")
    before = logits(model, "gpt_neox")
    with pytest.raises(
        ValueError, match=r"interleaved by head: give attention.q, attention.k and attention.v one elementwise"
    ):
        patch(model, recipe("attention.q", "tanh"))
    assert torch.equal(logits(model, "gpt_neox"), before)
    patch(model, recipe(["attention.q", "attention.k", "attention.v"], "tanh"))
    assert not torch.equal(logits(model, "gpt_neox"), before)


def test_a_later_edit_replaces_an_earlier_one():
    model = families.tiny_model("llama")
    both = {"sites": [{"site": "mlp", "activation": "relu"}, {"site": "mlp", "activation": "tanh", "layers": [1]}]}
    patch(model, both)
    assert [layer.mlp.act_fn.name for layer in model.model.layers][:2] == ["relu", "tanh"]


def test_the_learned_mixture_starts_as_the_original_and_trains():
    model = families.tiny_model("llama")
    before = logits(model)
    patch(model, "learned-mixture")
    probabilities = logits(model).log_softmax(-1)
    divergence = torch.nn.functional.kl_div(
        probabilities, before.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert divergence < 1e-3
    model(**families.tiny_inputs("llama")).logits.square().mean().backward()
    gates = {name: parameter for name, parameter in model.named_parameters() if "gating_logits" in name}
    assert len(gates) == model.config.num_hidden_layers
    assert all(parameter.grad.abs().max() > 0 for parameter in gates.values())


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_with_each_cache_equals_no_cache(cache):
    model = families.tiny_model("llama")
    patch(model, "phantom-everywhere")
    tokens = families.tiny_inputs("llama")["input_ids"][:1]
    settings = {
        "max_new_tokens": 9,
        "do_sample": False,
        "attention_mask": torch.ones_like(tokens),
        "eos_token_id": None,
    }
    settings["pad_token_id"] = 0
    plain = model.generate(tokens, use_cache=False, **settings)
    cached = model.generate(
        tokens, cache_implementation=None if cache == "dynamic" else "static", disable_compile=True, **settings
    )
    assert torch.equal(plain, cached)


COMPILED = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import families, neuroweave
model, inputs = families.tiny_model("llama"), families.tiny_inputs("llama")
neuroweave.patch(model, "silu-tanh-everywhere")
with torch.no_grad():
    eager = model(**inputs).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs).logits
assert torch.allclose(eager, compiled, atol=1e-5), (eager - compiled).abs().max()
"""


def test_full_graph_compile_of_every_kind_of_edit():
    """In a process of its own: the tests' run-time shape checks are not for a compiler."""
    done = subprocess.run([sys.executable, "-c", COMPILED, Path(__file__).parent], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_resizing_the_vocabulary_keeps_the_head_activation():
    model = families.tiny_model("llama")
    patch(model, recipe("head", "relu"))
    before = logits(model)
    model.resize_token_embeddings(model.config.vocab_size + 5)
    after = logits(model)
    assert after.shape[-1] == before.shape[-1] + 5
    assert torch.allclose(after[..., :-5], before, atol=1e-6)


def test_nothing_of_transformers_is_touched():
    theirs = families.tiny_model("llama")
    layer, mlp = type(theirs.model.layers[0]), type(theirs.model.layers[0].mlp)
    forwards = layer.forward, mlp.forward, type(theirs).forward
    other = logits(theirs)
    patch(families.tiny_model("llama"), "phantom-everywhere")
    assert (layer.forward, mlp.forward, type(theirs).forward) == forwards
    assert torch.equal(logits(theirs), other)


def test_a_plan_that_fails_half_way_changes_nothing():
    model = families.tiny_model("llama")
    modules = [id(module) for module in model.modules()]
    plan = [
        {"op": "activation", "path": "model.layers.{}.mlp.act_fn", "layers": [0, 1], "activation": "relu"},
        {"op": "layer_input", "path": "model.layers.0", "activation": "tanh"},
        {"op": "activation", "path": "model.layers.{}.mlp.gone", "layers": [0], "activation": "relu"},
    ]
    with pytest.raises(
        ValueError, match=r"LlamaForCausalLM has no 'model.layers.0.mlp.gone', which the recipe changes"
    ):
        apply_plan(model, plan)
    assert [id(module) for module in model.modules()] == modules


def test_undo_restores_order_mode_and_config():
    model = families.tiny_model("llama")
    names = [name for name, _ in model.named_modules()]
    architectures = model.config.architectures
    handle = patch(model, "silu-tanh-everywhere")
    model.train()
    assert all(module.training for module in model.modules())
    handle.undo()
    assert [name for name, _ in model.named_modules()] == names
    assert all(module.training for module in model.modules())
    assert model.config.architectures in (architectures, ["LlamaForCausalLM"])
    patch(model.eval(), "silu-tanh-everywhere")
    assert not any(module.training for module in model.modules())


def test_new_parameters_follow_the_models_dtype_and_device():
    model = families.tiny_model("llama").to(torch.bfloat16)
    patch(model, "learned-mixture")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(families.tiny_config("llama"))
    patch(empty, "learned-mixture")  # outside the context: its parameters would be on the CPU
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}


def test_everywhere_in_some_layers_leaves_embedding_and_head_alone():
    model = families.tiny_model("llama")
    handle = patch(model, recipe("everywhere", "tanh", layers=[1]))
    assert set(handle.resolution.layers) == set(SITES) - {"embedding", "head"}
    assert all(count == 1 for count in handle.resolution.layers.values())


def test_a_layer_that_is_called_by_keyword():
    model = families.tiny_model("llama")
    layer = model.model.layers[0]
    x = torch.randn(1, 3, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    positions = model.model.rotary_emb(x, torch.arange(3)[None])
    expected = layer(x.tanh(), position_embeddings=positions)
    with patch(model, recipe("embedding", "tanh")):
        assert torch.equal(layer(hidden_states=x, position_embeddings=positions), expected)


def test_the_neutral_member_is_the_one_that_equals_the_original():
    model = families.tiny_model("llama")
    with patch(model, recipe("mlp", {"mixture": ["relu", "swish_beta"]})):
        assert model.model.layers[0].mlp.act_fn.neutral == 1
    gemma = families.tiny_model("gemma3_text")
    with pytest.raises(ValueError, match=r"equals the original there \(gelu_tanh\)"):
        patch(gemma, recipe("mlp", {"mixture": ["relu", "swish_beta"]}))


def test_a_patched_model_can_be_pickled():
    model = families.tiny_model("llama")
    before = logits(model)
    patch(model, "phantom-everywhere")
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(again), logits(model))
    unpatch(again)
    assert torch.equal(logits(again), before)


def test_a_copy_is_undone_by_itself():
    model = families.tiny_model("llama")
    before = logits(model)
    patch(model, "silu-tanh-everywhere")
    after, other = logits(model), copy.deepcopy(model)
    unpatch(other)
    assert torch.equal(logits(other), before)
    assert torch.equal(logits(model), after)


def test_lora_on_a_patched_model_merges_to_the_same_logits():
    peft = pytest.importorskip("peft")
    model = families.tiny_model("llama")
    patch(model, recipe(["mlp", "attention.q"], "phantom"))
    with pytest.raises(
        ValueError, match=r"(?s)ActivatedProjection.*is not supported"
    ):  # loud, where a subclass of Linear would be silent
        peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["q_proj"]))
    lora = peft.get_peft_model(model, peft.LoraConfig(target_modules=["v_proj", "up_proj"], init_lora_weights=False))
    unmerged = logits(lora)
    assert torch.allclose(logits(lora.merge_and_unload()), unmerged, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "what", "message"),
    [
        ("llama", recipe("mlp", "relu", layers=[99]), "layer 99 does not exist: the model has layers 0 to 1"),
        ("gpt2", recipe("mlp.gate", "relu"), r"gpt2 has no site mlp.gate; it has: mlp \(2 layers\), mlp.up"),
        ("llama", recipe("mlp", "original"), "changes nothing"),
        ("llama", recipe("head", "relu", layers=[0]), "site head is not in a layer"),
        ("llama", recipe("mlp", {"mixture": ["relu", "tanh"]}), r"equals the original there \(silu\).*add 'original'"),
        ("hy_v4", recipe("mlp", "relu"), "computes its activation inside its own code"),
        ("lfm2", recipe("mlp", "relu"), "lfm2 has no site mlp; it has: mlp.gate"),
        ("apertus", recipe("mlp", "original|relu"), "has weights of its own"),
    ],
)
def test_refusals_leave_the_model_alone(family, what, message):
    model = families.tiny_model(family)
    before = logits(model, family)
    with pytest.raises(ValueError, match=message):
        patch(model, what)
    assert not isinstance(model, PatchedModel)
    assert torch.equal(logits(model, family), before)


def test_patching_twice_is_refused():
    model = families.tiny_model("llama")
    patch(model, "phantom-mlp")
    with pytest.raises(ValueError, match="already patched \\(recipe 'phantom-mlp'\\)"):
        patch(model, "silu-tanh-mlp")


def test_a_model_under_liger_is_refused():
    model = families.tiny_model("llama")
    mlp = model.model.layers[0].mlp

    def forward(x):
        return x

    forward.__module__ = "liger_kernel.transformers.swiglu"
    mlp.forward = forward
    with pytest.raises(ValueError, match="replaced by Liger's, which hard-codes the activation"):
        patch(model, "phantom-mlp")


# One family of each structure, on every site; the whole table is made by benchmarks/prove_families.py.
STRUCTURES = [
    "llama",
    "gpt2",
    "phi3",
    "opt",
    "mixtral",
    "falcon",
    "moshi",
    "deepseek_v3",
    "cpmant",
    "nemotron_h",
    "dbrx",
]


def documented():
    """Family -> its row of docs/families.md."""
    lines = (Path(__file__).parents[1] / "docs" / "families.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {family: cells for family, *cells in rows[1:]}


@pytest.mark.parametrize("family", STRUCTURES)
def test_every_structure_works_as_documented(family):
    assert [prove_families.prove(family, site) for site in SITES] == documented()[family]


def test_the_table_covers_every_decoder_family():
    table = documented()
    assert set(families.DECODER_FAMILIES) <= set(table)
    assert sum(cells[0].startswith("yes") for cells in table.values()) >= 120
    assert {cell for cells in table.values() for cell in cells} == {"yes", "yes, no mixture", "-", "part"}
