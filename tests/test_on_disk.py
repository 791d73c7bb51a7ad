"""Patched checkpoints on disk: the same shards, a config that says so, whole or not at all."""

import json
import os
import shutil
import subprocess
import sys

import families
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel
from transformers.activations import ACT2CLS

from neuroweave import patch, patch_checkpoint
from neuroweave.checkpoint.reader import Checkpoint
from neuroweave.checkpoint.sealed import seal, unseal
from neuroweave.surgery import on_disk

PHANTOM = {"sites": [{"site": "mlp", "activation": "phantom"}]}


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def logits(model, family="llama"):
    with torch.no_grad():
        return model(**families.tiny_inputs(family)).logits


@pytest.fixture
def original(tmp_path):
    model = families.tiny_model("llama")
    model.save_pretrained(tmp_path / "original")
    (tmp_path / "original" / "README.md").write_text("a card")
    (tmp_path / "original" / "pytorch_model.bin").write_bytes(b"the same weights in another form")
    return tmp_path / "original"


@pytest.mark.parametrize("recipe", ["silu-tanh-everywhere", "learned-mixture", "automixed-relu-silu"])
@pytest.mark.parametrize("shards", ["one", "several"])
def test_equals_the_model_patched_in_memory(tmp_path, recipe, shards):
    model = families.tiny_model("llama")
    model.save_pretrained(tmp_path / "original", max_shard_size="30KB" if shards == "several" else "1GB")
    result = patch_checkpoint(tmp_path / "original", tmp_path / "patched", recipe)
    assert (len(Checkpoint(tmp_path / "original").shards) > 1) == (shards == "several")
    assert result.copied == 0
    patch(model, recipe)
    assert torch.equal(logits(load(tmp_path / "patched")), logits(model))
    names = {name for name, _ in model.named_parameters()} - {"lm_head.weight"}
    assert names <= set(Checkpoint(tmp_path / "patched")) | {"lm_head.weight"}


def test_shards_are_the_same_files(original, tmp_path):
    patch_checkpoint(original, tmp_path / "linked", PHANTOM)
    patch_checkpoint(original, tmp_path / "copied", PHANTOM, copy=True)
    source = original / "model.safetensors"
    assert os.path.samefile(source, tmp_path / "linked" / "model.safetensors")
    assert not os.path.samefile(source, tmp_path / "copied" / "model.safetensors")
    assert (tmp_path / "copied" / "model.safetensors").read_bytes() == source.read_bytes()


def test_without_hard_links_shards_are_copied(original, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    result = patch_checkpoint(original, tmp_path / "out", PHANTOM)
    assert (result.linked, result.copied) == (0, 1)
    assert torch.isfinite(logits(load(tmp_path / "out"))).all()


def test_other_files_come_along_but_no_unpatched_weights(original, tmp_path):
    result = patch_checkpoint(original, tmp_path / "out", PHANTOM)
    assert (tmp_path / "out" / "README.md").read_text() == "a card"
    assert result.left_out == ["pytorch_model.bin"]
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()


def test_the_config_names_nothing_that_an_engine_would_run_unpatched(original, tmp_path):
    before = json.loads((original / "config.json").read_text())
    patch_checkpoint(original, tmp_path / "out", PHANTOM)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    entry = config["neuroweave"]
    outside = json.dumps({key: value for key, value in config.items() if key != "neuroweave"})
    assert config["architectures"] == ["NeuroweaveForCausalLM"]
    assert config["model_type"] == config["hidden_act"] == "neuroweave"
    assert "silu" not in outside
    assert "Llama" not in outside
    assert unseal(config) == before
    assert seal(unseal(config) | {"neuroweave": entry}, ACT2CLS) == config
    assert entry["recipe"]["sites"][0]["activation"] == "phantom"
    assert set(entry["source"]["files"]) == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("family", ["gemma3", "qwen3_5", "gpt2", "dbrx", "mixtral"])
def test_other_layouts_of_config_and_weights(family, tmp_path):
    config = families.tiny_config(family)
    if family == "qwen3_5":  # the whole multimodal checkpoint, of which AutoModelForCausalLM takes the text model
        from transformers import Qwen3_5ForConditionalGeneration

        Qwen3_5ForConditionalGeneration(config).save_pretrained(tmp_path / "original")
        model = load(tmp_path / "original")
    else:
        model = families.tiny_model(family)
        model.save_pretrained(tmp_path / "original")
    recipe = {"sites": [{"site": "mlp", "activation": "relu|tanh"}]}
    patch_checkpoint(tmp_path / "original", tmp_path / "patched", recipe)
    patched = load(tmp_path / "patched")
    patch(model, recipe)
    assert torch.equal(logits(patched, family), logits(model, family))
    patched.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again"), family), logits(model, family))
    with pytest.raises((KeyError, ValueError), match="neuroweave"):  # the family's own class must not take it
        type(model).__mro__[2].from_pretrained(tmp_path / "patched")


def test_a_config_that_leaves_the_activation_to_its_default(tmp_path):
    families.tiny_model("gpt2").save_pretrained(tmp_path / "original")
    config = json.loads((tmp_path / "original" / "config.json").read_text())
    del config["activation_function"]
    (tmp_path / "original" / "config.json").write_text(json.dumps(config))
    patch_checkpoint(tmp_path / "original", tmp_path / "patched", PHANTOM)
    assert unseal(json.loads((tmp_path / "patched" / "config.json").read_text())) == config
    with pytest.raises(Exception, match="neuroweave"):
        GPT2LMHeadModel.from_pretrained(tmp_path / "patched")
    assert not torch.equal(logits(load(tmp_path / "patched"), "gpt2"), logits(load(tmp_path / "original"), "gpt2"))


# ------------------------------------------------------------------------------------------------ refusals


def files(folder):
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def refused(source, out, recipe, message, **options):
    before = files(source)
    siblings = set(out.parent.iterdir())
    with pytest.raises(ValueError, match=message):
        patch_checkpoint(source, out, recipe, **options)
    assert files(source) == before
    assert set(out.parent.iterdir()) == siblings


def test_recipe_that_does_not_fit(original, tmp_path):
    refused(
        original,
        tmp_path / "out",
        {"sites": [{"site": "mlp", "activation": "relu", "layers": [9]}]},
        "layer 9 does not exist",
    )


def test_output_that_holds_files(original, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    refused(original, tmp_path / "out", PHANTOM, "not empty.*--overwrite")
    assert (tmp_path / "out" / "precious").read_text() == "mine"
    patch_checkpoint(original, tmp_path / "out", PHANTOM, overwrite=True)
    assert not (tmp_path / "out" / "precious").exists()


def test_output_that_is_the_source(original):
    with pytest.raises(ValueError, match="the output is the source itself"):
        patch_checkpoint(original, original, PHANTOM, overwrite=True)


def test_truncated_shard(original, tmp_path):
    shard = original / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(original, tmp_path / "out", PHANTOM, r"model\.safetensors")


def test_missing_shard(tmp_path):
    families.tiny_model("llama").save_pretrained(tmp_path / "original", max_shard_size="30KB")
    next((tmp_path / "original").glob("model-00002*")).unlink()
    refused(tmp_path / "original", tmp_path / "out", PHANTOM, "which is not in the folder; fetch the missing file")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_hidden_layers", 5, r"asks for model\.layers\.2\..* \(and \d+ more\), which no shard holds"),
        ("intermediate_size", 80, r"has shape \[40, 32\] in model.safetensors, but config.json asks for \[80, 32\]"),
    ],
)
def test_config_and_weights_that_do_not_belong_together(original, tmp_path, field, value, message):
    config = json.loads((original / "config.json").read_text()) | {field: value}
    (original / "config.json").write_text(json.dumps(config))
    refused(original, tmp_path / "out", PHANTOM, message)


def test_weights_stored_without_the_base_models_prefix(tmp_path):
    """As the first GPT-2 checkpoints are: `h.0.mlp...`; the mixture's own weights follow that convention."""
    model = families.tiny_model("gpt2")
    model.save_pretrained(tmp_path / "original")
    shard = tmp_path / "original" / "model.safetensors"
    save_file(
        {name.removeprefix("transformer."): value for name, value in load_file(shard).items()}, shard, {"format": "pt"}
    )
    patch_checkpoint(tmp_path / "original", tmp_path / "out", "learned-mixture")
    assert "h.0.mlp.act.gating_logits" in Checkpoint(tmp_path / "out")
    patch(model, "learned-mixture")
    assert torch.equal(logits(load(tmp_path / "out"), "gpt2"), logits(model, "gpt2"))


def test_already_patched(original, tmp_path):
    patch_checkpoint(original, tmp_path / "out", "phantom-mlp")
    refused(tmp_path / "out", tmp_path / "twice", PHANTOM, "already patched \\(recipe 'phantom-mlp'\\)")


def test_remote_code_model(original, tmp_path):
    config = json.loads((original / "config.json").read_text()) | {"auto_map": {"AutoConfig": "a.B"}}
    (original / "config.json").write_text(json.dumps(config))
    refused(original, tmp_path / "out", PHANTOM, "needs its own remote code")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_or_ctrl_c_leaves_nothing(original, tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(on_disk, "place_other_files", fail)
    before = set(tmp_path.iterdir())
    with pytest.raises(type(error)):
        patch_checkpoint(original, tmp_path / "out", PHANTOM)
    assert set(tmp_path.iterdir()) == before


def test_missing_mixture_weights_are_an_error(original, tmp_path):
    patch_checkpoint(original, tmp_path / "out", "learned-mixture")
    shard = tmp_path / "out" / "model-00002-of-00002.safetensors"
    tensors = load_file(shard)
    save_file({name: tensor for name, tensor in tensors.items() if "gating" not in name}, shard, {"format": "pt"})
    with pytest.raises(ValueError, match=r"act_fn\.gating_logits and 1 more weights that the patch needs are missing"):
        load(tmp_path / "out")


def test_a_newer_format_is_refused(original, tmp_path):
    patch_checkpoint(original, tmp_path / "out", PHANTOM)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["neuroweave"]["version"] = 99
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="patched in format 99, this code reads format 1; update neuroweave"):
        load(tmp_path / "out")


# ---------------------------------------------------------------------------- loading without the package, for real

WITHOUT_PACKAGE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "neuroweave":
            raise ImportError("No module named 'neuroweave'")
sys.meta_path.insert(0, Hidden())
import torch
from transformers import AutoModelForCausalLM, AutoModel, LlamaForCausalLM
"""


def fresh_process(code, tmp_path, *arguments):
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE + code, *map(str, arguments)],
        capture_output=True, text=True, env=environment, cwd=tmp_path, stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.mark.parametrize("recipe", ["silu-tanh-everywhere", "learned-mixture"])
def test_remote_code_in_a_process_without_the_package(original, tmp_path, recipe):
    patch_checkpoint(original, tmp_path / "out", recipe)
    torch.save(logits(load(tmp_path / "out")), tmp_path / "expected.pt")
    torch.save(families.tiny_inputs("llama"), tmp_path / "inputs.pt")
    code = """
folder, expected, inputs, again = sys.argv[1:]
expected, inputs = torch.load(expected), torch.load(inputs)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, attn_implementation="eager").eval()
with torch.no_grad():
    assert torch.equal(model(**inputs).logits, expected)
    model.save_pretrained(again)
    model = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True, attn_implementation="eager").eval()
    assert torch.equal(model(**inputs).logits, expected)
print(model.generate(inputs["input_ids"][:1], max_new_tokens=3, attention_mask=torch.ones(1, 7), pad_token_id=0).shape)
assert "neuroweave" not in sys.modules
"""
    done = fresh_process(
        code, tmp_path, tmp_path / "out", tmp_path / "expected.pt", tmp_path / "inputs.pt", tmp_path / "again"
    )
    assert done.returncode == 0, done.stderr
    assert torch.equal(logits(load(tmp_path / "again")), torch.load(tmp_path / "expected.pt"))


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ("AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=False)", "contains custom code"),
        ("AutoModel.from_pretrained(sys.argv[1], trust_remote_code=False)", "contains custom code"),
        ("LlamaForCausalLM.from_pretrained(sys.argv[1])", "KeyError: 'neuroweave'"),
        ("AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)", "load the model with AutoModelForCausalLM"),
    ],
)
def test_without_the_package_nothing_loads_unpatched(original, tmp_path, call, reason):
    patch_checkpoint(original, tmp_path / "out", "phantom-everywhere")
    done = fresh_process(call, tmp_path, tmp_path / "out")
    assert done.returncode == 1
    assert reason in done.stderr


def test_the_real_model_patched_keeps_its_tokenizer_and_chats(smollm2, tmp_path):
    patch_checkpoint(smollm2, tmp_path / "out", "silu-tanh-mlp")
    tokenizer, theirs = AutoTokenizer.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(smollm2)
    chat = [{"role": "user", "content": "What is the capital of France? 1234  🙂"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert type(tokenizer) is type(theirs)
    assert (
        ids["input_ids"].tolist()
        == theirs.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
            "input_ids"
        ].tolist()
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    text = tokenizer.decode(model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :])
    assert "Paris" in text


def test_real_gemma_keeps_its_logits_with_its_own_activation(gemma3, tmp_path):
    patch_checkpoint(gemma3, tmp_path / "out", {"sites": [{"site": "mlp", "activation": "gelu_tanh"}]})
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out")("The quick brown fox", return_tensors="pt")
    with torch.no_grad():
        original = AutoModelForCausalLM.from_pretrained(gemma3)(**tokens).logits
        patched = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(**tokens).logits
    assert torch.equal(original, patched)
    shutil.rmtree(tmp_path / "out")
