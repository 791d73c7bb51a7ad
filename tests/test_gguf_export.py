"""Exports: what comes back through both imports is the model that went in; refusals; nothing half."""

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny_gguf import MERGES, VOCABULARY
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from neuroweave.checkpoint import Checkpoint, import_checkpoint
from neuroweave.checkpoint.gguf import open_tensors, read_gguf_header
from neuroweave.checkpoint.gguf_export import export_gguf
from neuroweave.checkpoint.gguf_tensors import encode, interleaved
from neuroweave.checkpoint.gguf_vocabulary import PROBE
from neuroweave.cli.main import program
from neuroweave.surgery.on_disk import patch_checkpoint

SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip
FAMILIES = {
    "llama": (LlamaConfig, {"rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}}),
    "tied": (LlamaConfig, {"tie_word_embeddings": True, "head_dim": 16}),
    "mistral": (MistralConfig, {"sliding_window": None, "head_dim": 16}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 128}),
    "gemma3_text": (Gemma3TextConfig, {
        "num_hidden_layers": 7, "head_dim": 256, "sliding_window": 16, "num_attention_heads": 1,
        "num_key_value_heads": 1,
    }),
}  # fmt: skip
SAME_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "max_position_embeddings", "head_dim", "rope_parameters", "tie_word_embeddings", "sliding_window", "layer_types",
    "bos_token_id", "eos_token_id",
)  # fmt: skip
PIECES = [
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    *(f"<0x{byte:02X}>" for byte in range(256)),
    "▁",
    "a",
    "b",
    "ab",
    "▁a",
    "▁ab",
]


def byte_level(cut=None, *, merge_first=True):
    backend = Tokenizer(
        models.BPE(
            vocab={token: at for at, token in enumerate(VOCABULARY)},
            merges=[tuple(merge.split()) for merge in MERGES],
            ignore_merges=not merge_first,
        )
    )
    digits = pre_tokenizers.Digits(individual_digits=True)
    own = cut or pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.pre_tokenizer = own
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", normalized=False, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", bos_token="<|end|>")


def sentencepiece(merges=(("▁", "a"), ("a", "b"), ("▁", "ab"), ("▁a", "b"))):
    backend = Tokenizer(
        models.BPE(
            vocab={token: at for at, token in enumerate(PIECES)}, merges=list(merges), unk_token="<unk>", fuse_unk=True,
            byte_fallback=True,
        )
    )  # fmt: skip
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(pattern=" ", behavior="merged_with_previous", invert=False)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in names.values()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def make(folder, family, *, tokenizer=None, dtype=torch.float32, **settings):
    """A tiny checkpoint folder with random weights, norms and biases included."""
    tokenizer = tokenizer or (sentencepiece() if family == "gemma3_text" else byte_level())
    kind, own = FAMILIES[family]
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = kind(**SHAPE | own | ids | {"pad_token_id": None, "vocab_size": len(tokenizer)} | settings)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def same_tensors(before, after, *, family):
    with Checkpoint(before) as left, Checkpoint(after) as right:
        assert set(left) == set(right)
        for name in left:
            x, y = left.read_torch(name), right.read_torch(name)
            if family == "gemma3_text" and name.endswith("norm.weight"):  # the file holds 1 + x in float32
                assert (x - y).abs().max() <= 2**-23, name
                assert torch.equal(x + 1 - 1, y), name
            else:
                assert torch.equal(x, y), name


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family, tmp_path):
    """Tensors to the bit, configuration and tokens, through the import here and transformers' own."""
    source, file = make(tmp_path / "model", family), tmp_path / "model.gguf"
    result = export_gguf(source, file, type="f32")
    assert (result.bytes, result.pre) == (file.stat().st_size, "default" if "gemma" in family else "smollm")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.gguf"]
    import_checkpoint(file, tmp_path / "back")
    same_tensors(source, tmp_path / "back", family=family)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    for name, tensor in own.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], tensor), name
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (source, tmp_path / "back"))
    for name in SAME_FIELDS:
        assert getattr(before.config, name, None) == getattr(after.config, name, None), name
    assert after.config.rms_norm_eps == pytest.approx(1e-5, rel=1e-7)
    first, second = (AutoTokenizer.from_pretrained(path) for path in (source, tmp_path / "back"))
    for text in (PROBE, "ab a", "", "ab<|end|>12 1"):
        assert first(text).input_ids == second(text).input_ids
    ids = torch.tensor([[5, 7, 11, 2, 30]])
    with torch.no_grad():
        assert (before(ids).logits - after(ids).logits).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_quantized_values_are_the_gguf_packages(kind, tmp_path):
    source, file = make(tmp_path / "model", "llama"), tmp_path / "model.gguf"
    export_gguf(source, file, type=kind)
    header = read_gguf_header(file)
    types = {tensor.name: gguf.GGMLQuantizationType(tensor.type) for tensor in header.tensors}
    wanted = gguf.GGMLQuantizationType[kind.upper()]
    assert types["blk.0.ffn_down.weight"] == types["token_embd.weight"] == wanted
    assert types["output.weight"] == gguf.GGMLQuantizationType.Q8_0
    assert types["blk.0.attn_norm.weight"] == gguf.GGMLQuantizationType.F32
    with Checkpoint(source) as checkpoint, open_tensors(header) as data:
        down = checkpoint.read_numpy("model.layers.0.mlp.down_proj.weight")
        query = interleaved(checkpoint.read_numpy("model.layers.1.self_attn.q_proj.weight"), 4)
        for name, values in (("blk.0.ffn_down.weight", down), ("blk.1.attn_q.weight", query)):
            assert np.array_equal(data.read(name), gguf.dequantize(gguf.quantize(values, wanted), wanted))
    assert header.metadata["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"]


def test_half_precision_keeps_bits(tmp_path):
    source, file = make(tmp_path / "model", "qwen2", dtype=torch.bfloat16), tmp_path / "model.gguf"
    export_gguf(source, file, type="bf16")
    import_checkpoint(file, tmp_path / "back")
    same_tensors(source, tmp_path / "back", family="qwen2")


def test_rows_that_fill_no_block_are_f16(tmp_path):
    source, file = make(tmp_path / "model", "llama", intermediate_size=50), tmp_path / "model.gguf"
    export_gguf(source, file, type="q8_0")
    types = {tensor.name: tensor.type for tensor in read_gguf_header(file).tensors}
    assert types["blk.0.ffn_down.weight"] == gguf.GGMLQuantizationType.F16


def test_interleaved_pairs_the_halves():
    rows = np.arange(8, dtype=np.float32)[:, None]
    assert interleaved(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert interleaved(rows[:, 0], 1).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_rope_factors_are_transformers_frequencies(tmp_path):
    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 0.01, "high_freq_factor": 64.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    source, file = make(tmp_path / "model", "llama", rope_parameters=rope, head_dim=16), tmp_path / "model.gguf"
    export_gguf(source, file, type="f16")
    model = AutoModelForCausalLM.from_pretrained(source)
    plain = 10000.0 ** -(np.arange(0, 16, 2) / 16)
    with open_tensors(read_gguf_header(file)) as data:
        factors = data.read("rope_freqs.weight")
    assert len(set(factors.tolist())) > 3
    np.testing.assert_allclose(plain / factors, model.model.rotary_emb.inv_freq.numpy(), rtol=1e-6)


def test_scaled_rope_is_written(tmp_path):
    rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 16}
    export_gguf(make(tmp_path / "model", "qwen2", rope_parameters=rope), tmp_path / "m.gguf")
    metadata = read_gguf_header(tmp_path / "m.gguf").metadata
    found = {key.removeprefix("qwen2.rope."): value for key, value in metadata.items() if "qwen2.rope.s" in key}
    assert found == {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 16}


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


@pytest.mark.parametrize(
    ("cut", "name"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), "gpt-2"),
        (pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), BYTES]), "dbrx"),
        (
            pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3.replace("{1,3}", "")), "isolated"), BYTES]),
            "qwen2",
        ),
    ],
)
def test_the_pre_tokenizer_is_chosen_by_what_it_does(cut, name, tmp_path):
    source = make(tmp_path / "model", "llama", tokenizer=byte_level(cut))
    assert export_gguf(source, tmp_path / "m.gguf").pre == name


def test_whole_pieces_first_is_llama_bpe(tmp_path):
    cut = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), BYTES])
    source = make(tmp_path / "model", "llama", tokenizer=byte_level(cut, merge_first=False))
    assert export_gguf(source, tmp_path / "m.gguf").pre == "llama-bpe"


def test_sentencepiece_metadata(tmp_path):
    export_gguf(make(tmp_path / "model", "gemma3_text", vocab_size=len(PIECES) + 2), tmp_path / "m.gguf")
    metadata = read_gguf_header(tmp_path / "m.gguf").metadata
    ggml = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    scores = dict(zip(ggml["tokens"], ggml["scores"], strict=True))
    assert scores["▁a"] > scores["ab"] > scores["▁ab"] > scores["a"]
    assert ggml["token_type"][:5] == [3, 3, 3, 2, 6]
    assert ggml["tokens"][-2:] == [f"[PAD{len(PIECES)}]", f"[PAD{len(PIECES) + 1}]"]
    assert ggml["token_type"][-2:] == [5, 5]
    assert (ggml["model"], ggml["add_bos_token"], ggml["add_eos_token"], ggml["add_space_prefix"]) == (
        "llama", True, False, False,
    )  # fmt: skip
    assert (ggml["bos_token_id"], ggml["eos_token_id"], ggml["padding_token_id"]) == (1, 2, 0)
    assert metadata["gemma3.attention.sliding_window"] == 16


def test_chat_template_and_other_ends(tmp_path):
    source = make(tmp_path / "model", "llama")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [len(VOCABULARY) - 1, 7]}))
    export_gguf(source, tmp_path / "m.gguf")
    metadata = read_gguf_header(tmp_path / "m.gguf").metadata
    assert metadata["tokenizer.chat_template"] == "{{ messages }}"
    assert metadata["tokenizer.ggml.eot_token_id"] == 7


def refusal(source, out, **options):
    """The message with which an export is refused."""
    with pytest.raises(ValueError, match=r".") as refused:
        export_gguf(source, out, **options)
    return str(refused.value)


# Patched models


def test_patched_models_are_refused_by_name(tmp_path):
    source = make(tmp_path / "model", "llama")
    patch_checkpoint(source, tmp_path / "patched", {"sites": [{"site": "mlp", "activation": "phantom"}]})
    assert refusal(tmp_path / "patched", tmp_path / "m.gguf") == (
        f"{tmp_path / 'patched'}: patched with phantom (mlp); llama.cpp has no such activation there: its graph for "
        "'llama' always computes silu; export the unpatched model, or run this one with transformers"
    )


def test_a_patch_to_what_llama_cpp_computes_is_the_plain_family(tmp_path):
    source = make(tmp_path / "model", "llama", hidden_act="relu")
    recipe = {"sites": [{"site": "mlp", "activation": "silu"}]}
    patch_checkpoint(source, tmp_path / "patched", recipe)
    export_gguf(tmp_path / "patched", tmp_path / "m.gguf", type="f32")
    import_checkpoint(tmp_path / "m.gguf", tmp_path / "back")
    same_tensors(source, tmp_path / "back", family="llama")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["hidden_act"] == "silu"
    patch_checkpoint(source, tmp_path / "half", {"sites": [recipe["sites"][0] | {"layers": [0]}]})
    with pytest.raises(ValueError, match="hidden_act is 'relu'"):
        export_gguf(tmp_path / "half", tmp_path / "half.gguf")


# Refusals


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("llama", {"hidden_act": "relu"}, "hidden_act is 'relu'; llama.cpp's graph for 'llama' always computes silu, "
         "so the model cannot run there; use transformers"),
        ("gemma3_text", {"hidden_activation": "silu"}, "hidden_activation is 'silu'; llama.cpp's graph for 'gemma3' "
         "always computes gelu_pytorch_tanh, so the model cannot run there; use transformers"),
        ("gemma3_text", {"layer_types": ["full_attention"] * 7}, "layer_types differ; in 'gemma3' every 6th layer is "
         "full_attention, the others sliding; llama.cpp would compute another model, so use transformers"),
        ("gemma3_text", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar is 64; this size of 'gemma3' has 256; "
         "llama.cpp would compute another model, so use transformers"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope type "
         "'dynamic' cannot be exported; known are default, linear, llama3 and plain yarn"),
        ("qwen3", {"attention_bias": True}, "tensor 'model.layers.0.self_attn.k_proj.bias' has no place in llama.cpp's "
         "'qwen3'; it cannot be exported"),
        ("llama", {"vocab_size": 200}, "the tokenizer has token 259, the embedding 200 rows; they do not fit"),
    ],
)  # fmt: skip
def test_refuses_what_llama_cpp_cannot_run(family, settings, message, tmp_path):
    source = make(tmp_path / "model", family, **settings)
    assert refusal(source, tmp_path / "m.gguf") == f"{source}: {message}"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_refuses_unknown_families_and_tokenizers(tmp_path):
    source = make(tmp_path / "model", "llama")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(
        ValueError, match=r"model type 'gpt2' cannot be exported; known are llama, mistral, qwen2, qwen3, "
    ):
        export_gguf(source, tmp_path / "m.gguf")
    (source / "config.json").write_text(json.dumps(config))
    odd = byte_level(pre_tokenizers.Sequence([pre_tokenizers.Split(Regex("[aeiou]"), "isolated"), BYTES]))
    odd.save_pretrained(source)
    with pytest.raises(
        ValueError, match=r"in a way that no known tokenizer\.ggml\.pre stands for; tried gpt-2, smollm, "
    ):
        export_gguf(source, tmp_path / "m.gguf")
    with pytest.raises(ValueError, match="merges are not those of a sentencepiece vocabulary"):
        export_gguf(
            make(tmp_path / "other", "llama", tokenizer=sentencepiece((("▁", "a"), ("a", "b")))), tmp_path / "m.gguf"
        )
    (source / "tokenizer.json").unlink()
    with pytest.raises(
        ValueError, match=r"(?s)no tokenizer can be read here .*; add tokenizer\.json and tokenizer_config\.json"
    ):
        export_gguf(source, tmp_path / "m.gguf")


def test_refuses_incomplete_folders_and_values_beyond_f16(tmp_path):
    source = make(tmp_path / "model", "llama")
    weights = load_file(source / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, source / "model.safetensors")
    missing = f"{source}: tensor 'model.norm.weight' is missing (1 in all); fetch it again"
    assert refusal(source, tmp_path / "m.gguf") == missing
    weights["model.norm.weight"] = torch.ones(32)
    weights["lm_head.weight"][3, 3] = 1e6
    save_file(weights, source / "model.safetensors")
    with pytest.raises(ValueError, match=r"'output\.weight' has values beyond what float16 holds; choose bf16 or f32"):
        export_gguf(source, tmp_path / "m.gguf", type="f16")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (source / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        export_gguf(source, tmp_path / "m.gguf")


# The file


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_nothing(error, tmp_path, monkeypatch):
    source, file, calls = make(tmp_path / "model", "llama"), tmp_path / "m.gguf", []
    file.write_bytes(b"before")

    def fail(tensor):
        calls.append(tensor.name)
        if len(calls) == 3:
            raise error
        return encode(tensor)

    monkeypatch.setattr("neuroweave.checkpoint.gguf_export.encode", fail)
    expected = ValueError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as failed:
        export_gguf(source, file, force=True)
    if expected is ValueError:
        assert str(failed.value) == (
            f"{file}: could not be written ([Errno 28] No space left on device); make room or choose another place, "
            "and run it again"
        )
    assert file.read_bytes() == b"before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "model"]


def test_full_disks_and_names_that_cannot_be_used(tmp_path, monkeypatch):
    source, file = make(tmp_path / "model", "llama"), tmp_path / "m.gguf"
    file.write_bytes(b"before")
    with pytest.raises(ValueError, match=r"m\.gguf: the output exists; choose another name, or add --force"):
        export_gguf(source, file)
    with pytest.raises(ValueError, match=r"expected a file name that ends in \.gguf"):
        export_gguf(source, source / "model.safetensors", force=True)
    with pytest.raises(ValueError, match="there is no folder"):
        export_gguf(source, tmp_path / "missing" / "m.gguf")
    with pytest.raises(ValueError, match="type 'q5' is not known; choose from f32, f16, bf16, q8_0, q4_0"):
        export_gguf(source, file, type="q5")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    with pytest.raises(ValueError, match=r"are needed here, 0\.00 MB are free; make room"):
        export_gguf(source, file, force=True)


def test_command(tmp_path):
    source, file = make(tmp_path / "model", "llama"), tmp_path / "m.gguf"
    run = CliRunner().invoke(program, ["export", str(source), "--gguf", str(file), "--type", "q4_0", "--json"])
    assert run.exit_code == 0, run.output
    report = json.loads(run.stdout)
    assert (report["architecture"], report["type"], report["pre"]) == ("llama", "q4_0", "smollm")
    run = CliRunner().invoke(program, ["export", str(source), "--gguf", str(file), "--force"])
    assert run.stdout.startswith(f"{file}: llama, 0.0 M parameters, q8_0, ")


@pytest.mark.parametrize("type", ["f32", "f16", "q8_0", "q4_0"])
def test_weights_that_are_not_finite_are_refused(type, tmp_path):
    source = make(tmp_path / "model", "llama")
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 4] = float("nan")
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"tensor 'blk.1.ffn_down.weight' has values that are not finite"):
        export_gguf(source, tmp_path / "m.gguf", type=type)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
