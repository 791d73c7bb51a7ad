"""`neuroweave tokenizer add`: rows, bytes and logits of models of all kinds, the tokenizer's files, refusals."""

from __future__ import annotations

import importlib.resources
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny_llama import WORDS, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PhiConfig, PhiForCausalLM

from neuroweave.checkpoint.reader import Checkpoint
from neuroweave.cli.tokenizer import command
from neuroweave.neuroblast.fresh import write_fresh_model
from neuroweave.surgery.on_disk import patch_checkpoint
from neuroweave.training.sources import Source
from neuroweave.training.tokenizer import train_tokenizer
from neuroweave.training.vocabulary import add_tokens, with_vocabulary

NEW = ["<think>", "</think>", "w1w2"]
PROMPT = torch.tensor([[1, 5, 9, 50, 77, 2]])


def llama(folder: Path, *, dtype: torch.dtype = torch.float32, shard: str = "5GB", **settings: Any) -> Path:
    """123 rows; the tokenizer has 123 tokens as well."""
    tiny_model(**settings).to(dtype).save_pretrained(folder, max_shard_size=shard)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(PROMPT).logits


def check_untouched(source: Path, out: Path, grown: list[str]) -> None:
    """Old rows, all other tensors, and all files but the tokenizer's and config.json, byte for byte."""
    with Checkpoint(source) as before, Checkpoint(out) as after:
        assert list(after) == list(before)
        assert {file: header.metadata for file, header in after.shards.items()} == {
            file: header.metadata for file, header in before.shards.items()
        }
        for name in before:
            assert after.read_bytes(name)[: before[name].nbytes] == before.read_bytes(name), name
            assert (after[name].shape != before[name].shape) == (name in grown)
        if before.index is not None:
            assert after.index is not None
            assert after.index["weight_map"] == before.index["weight_map"]
            assert after.index["metadata"]["total_size"] == after.nbytes
    for path in source.iterdir():
        if path.suffix == ".safetensors" or path.name.endswith("index.json") or "token" in path.name:
            continue
        same = path.read_bytes() == (out / path.name).read_bytes()
        assert same or path.name == "config.json"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_a_llama_grows(tied, dtype, shard, tmp_path):
    source = llama(tmp_path / "model", dtype=dtype, shard=shard, tie_word_embeddings=tied)
    done = add_tokens(source, tmp_path / "out", NEW, special=True)
    names = ["model.embed_tokens.weight", *([] if tied else ["lm_head.weight"])]
    assert (done.rows_before, done.rows, done.grown) == (123, 126, names)
    check_untouched(source, tmp_path / "out", names)
    before, after = Checkpoint(source), Checkpoint(tmp_path / "out")
    for name in names:
        old = before.read_torch(name).double().numpy()
        new = after.read_torch(name)[123:]
        expected = torch.from_numpy(np.stack([old.mean(0)] * 3)).to(dtype)
        assert torch.equal(new, expected), name
    was, now = logits(source), logits(tmp_path / "out")
    assert torch.equal(now[..., :123], was)
    assert now.shape[-1] == 126
    if dtype == torch.float32:  # the logit of a mean row is the mean logit
        torch.testing.assert_close(now[..., 123:], was.mean(-1, keepdim=True).expand(-1, -1, 3), rtol=0, atol=1e-5)
    text = (source / "config.json").read_text().replace('"vocab_size": 123', '"vocab_size": 126')
    assert (tmp_path / "out" / "config.json").read_text() == text
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_rows_of_the_pieces(tmp_path):
    source = llama(tmp_path / "model")
    done = add_tokens(source, tmp_path / "out", ["w3 w4"], start="pieces")
    tokenizer = tiny_tokenizer()
    with Checkpoint(tmp_path / "out") as after:
        for name in done.grown:
            rows = after.read_numpy(name).astype(np.float64)
            expected = rows[tokenizer.convert_tokens_to_ids(["w3", "w4"])].mean(0)
            np.testing.assert_array_equal(rows[123], expected.astype(np.float32))


def test_free_rows_come_first(tmp_path):
    """130 rows, 123 tokens: three tokens fill free rows, ten more make the tensors grow; unused rows do not count."""
    source = llama(tmp_path / "model", vocab_size=130)
    done = add_tokens(source, tmp_path / "out", NEW)
    assert (done.rows_before, done.rows) == (130, 130)
    assert (source / "config.json").read_bytes() == (tmp_path / "out" / "config.json").read_bytes()
    was, now = logits(source), logits(tmp_path / "out")
    assert torch.equal(now[..., :123], was[..., :123])
    assert torch.equal(now[..., 126:], was[..., 126:])
    with Checkpoint(tmp_path / "out") as after, Checkpoint(source) as before:
        for name in done.grown:
            mean = before.read_numpy(name)[:123].astype(np.float64).mean(0).astype(np.float32)
            np.testing.assert_array_equal(after.read_numpy(name)[123:126], [mean] * 3)
    more = add_tokens(tmp_path / "out", tmp_path / "more", [f"new{at}" for at in range(10)])
    assert (more.rows_before, more.rows, list(more.tokens.values())) == (130, 136, list(range(126, 136)))
    assert torch.equal(logits(tmp_path / "more")[..., :126], now[..., :126])


def test_the_tokenizer_finds_them(tmp_path):
    source = llama(tmp_path / "model")
    add_tokens(source, tmp_path / "out", NEW, special=True)
    before, after = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert after("w1<think> w2 w1w2</think>")["input_ids"] == [4, 123, 5, 125, 124]
    assert after.decode([4, 123, 5], skip_special_tokens=True) == "w1 w2"
    text = " ".join(WORDS)
    assert after(text)["input_ids"] == before(text)["input_ids"]
    add_tokens(source, tmp_path / "kept", NEW)
    kept = AutoTokenizer.from_pretrained(tmp_path / "kept")
    assert "<think>" in kept.decode([4, 123, 5], skip_special_tokens=True)


def test_a_head_with_a_bias_and_old_names(tmp_path):
    """Phi: a bias in the head; GPT-2: stored without the base model's prefix, tied."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 123, "bos_token_id": 1, "eos_token_id": 2}
    phi = PhiConfig(**shape, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
    model = PhiForCausalLM(phi)
    torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(tmp_path / "phi")
    GPT2LMHeadModel(GPT2Config(**shape, n_embd=32, n_layer=2, n_head=4)).save_pretrained(tmp_path / "gpt2")
    stored = load_file(tmp_path / "gpt2" / "model.safetensors")
    short = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    save_file(short, tmp_path / "gpt2" / "model.safetensors", metadata={"format": "pt"})
    for name, grown in (
        ("phi", ["model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"]),
        ("gpt2", ["wte.weight"]),
    ):
        tiny_tokenizer().save_pretrained(tmp_path / name)
        done = add_tokens(tmp_path / name, tmp_path / f"{name}-out", NEW)
        assert done.grown == grown
        check_untouched(tmp_path / name, tmp_path / f"{name}-out", grown)
        was, now = logits(tmp_path / name), logits(tmp_path / f"{name}-out")
        assert torch.equal(now[..., :123], was)
        torch.testing.assert_close(now[..., 123:], was.mean(-1, keepdim=True).expand(-1, -1, 3), rtol=0, atol=1e-5)


def test_patched_models(tmp_path):
    source = llama(tmp_path / "model", tie_word_embeddings=True)
    for kind in ("silu-tanh-everywhere", "learned-mixture"):
        patch_checkpoint(source, tmp_path / kind, kind)
        done = add_tokens(tmp_path / kind, tmp_path / f"{kind}-out", NEW)
        assert done.grown == ["model.embed_tokens.weight"]
        check_untouched(tmp_path / kind, tmp_path / f"{kind}-out", done.grown)
        assert torch.equal(logits(tmp_path / f"{kind}-out")[..., :123], logits(tmp_path / kind))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    prose = importlib.resources.files("neuroweave.text") / "prose" / "training"
    file = sorted(Path(str(prose)).glob("*.txt"))[0]
    train_tokenizer(folder / "made", [Source(path=str(file))], vocab_size=500, chat_template="chatml")
    return folder / "made"


@pytest.mark.parametrize("tied", [False, True])
def test_neuroblast_and_both_forms(tied, trained, tmp_path):
    """A fresh model with a trained tokenizer; sentencepiece's own file gets the tokens too."""
    source = tmp_path / "model"
    settings = {"tie_word_embeddings": tied}
    write_fresh_model(source, preset="tiny", tokenizer=trained, settings=settings)
    for file in trained.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    done = add_tokens(source, tmp_path / "out", ["<think>", "wxyz"], special=True)
    assert (done.rows, done.notes, len(done.grown)) == (502, [], 1 if tied else 2)
    check_untouched(source, tmp_path / "out", done.grown)
    assert torch.equal(logits(tmp_path / "out")[..., :500], logits(source))
    slow = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "out" / "tokenizer.model"))
    fast = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("a<think>b", "<|im_start|>wxyz wxy", "wxyzwxyz"):
        assert fast(text)["input_ids"] == slow.encode(text)
        assert fast.decode(slow.encode(text)) == text
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["added_tokens_decoder"]["501"] == config["added_tokens_decoder"]["1"] | {"content": "wxyz"}
    assert json.loads((tmp_path / "out" / "added_tokens.json").read_text())["wxyz"] == 501
    for content in (config, json.loads((tmp_path / "out" / "special_tokens_map.json").read_text())):
        assert content["additional_special_tokens"][-2:] == ["<think>", "wxyz"]
    assert fast.all_special_ids[-2:] == [500, 501]


def test_what_does_not_fit_stays_behind(tmp_path):
    source = llama(tmp_path / "model")
    (source / "pytorch_model.bin").write_bytes(b"old")
    (source / "model.gguf").write_bytes(b"old")
    (source / "notes.txt").write_text("kept")
    done = add_tokens(source, tmp_path / "out", NEW)
    assert done.left_out == ["model.gguf", "pytorch_model.bin"]
    assert (tmp_path / "out" / "notes.txt").read_text() == "kept"
    assert not (tmp_path / "out" / "model.gguf").exists()


def test_an_untouched_shard_is_linked(tmp_path):
    source = llama(tmp_path / "model", shard="20KB")
    add_tokens(source, tmp_path / "out", NEW)
    shards = [path.name for path in source.glob("*.safetensors")]
    linked = [name for name in shards if os.path.samefile(source / name, tmp_path / "out" / name)]
    with Checkpoint(source) as before:
        names = {before["model.embed_tokens.weight"].file, before["lm_head.weight"].file}
        assert sorted(linked) == sorted(set(before.shards) - names)


def test_the_size_in_the_configuration():
    assert with_vocabulary('{"vocab_size":5, "x": 1}', 5, 7) == '{"vocab_size":7, "x": 1}'
    nested = '{"text_config": {"vocab_size": 5}, "vision_config": {"vocab_size": 5}}'
    expected = {"text_config": {"vocab_size": 7}, "vision_config": {"vocab_size": 5}}
    assert json.loads(with_vocabulary(nested, 5, 7)) == expected


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "name at least one"),
        (["w1"], r"has it already \(number 4\)"),
        (["<new>", "<new>"], "named twice"),
        ([" \n"], "blank"),
        (["\ud800"], "not Unicode"),
    ],
)
def test_refused_tokens(tokens, message, tmp_path):
    source = llama(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        add_tokens(source, tmp_path / "out", tokens)
    assert not (tmp_path / "out").exists()


def test_refused_models(tmp_path):
    source = llama(tmp_path / "model")
    plain = (source / "config.json").read_text()
    (source / "config.json").write_text(plain.replace('"vocab_size": 123', '"vocab_size": 100'))
    with pytest.raises(ValueError, match=r"has shape \[123, 32\], config.json asks for \[100, 32\]"):
        add_tokens(source, tmp_path / "out", NEW)
    (source / "config.json").write_text(plain.replace('"llama"', '"nobody"'))
    with pytest.raises(ValueError, match="nobody"):
        add_tokens(source, tmp_path / "out", NEW)
    (source / "config.json").write_text(plain)
    with pytest.raises(ValueError, match="lies inside the source"):
        add_tokens(source, source / "out", NEW)
    stored = load_file(source / "model.safetensors")
    stored["lm_head.weight"] = stored["lm_head.weight"].to(torch.float8_e4m3fn)
    save_file(stored, source / "model.safetensors")
    with pytest.raises(ValueError, match="only floats"):
        add_tokens(source, tmp_path / "out", NEW)
    (source / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"no tokenizer"):
        add_tokens(source, tmp_path / "out", NEW)
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path):
    source = llama(tmp_path / "model")
    arguments = ["add", str(source), str(tmp_path / "out"), "--token", "<a>", "--token", "<b>", "--special"]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    assert "2 tokens added (<a> 123, <b> 124); 123 to 125 rows" in result.stdout
    again = CliRunner().invoke(command, [*arguments, "--overwrite", "--json", "--start", "pieces"])
    assert json.loads(again.stdout)["tokens"] == {"<a>": 123, "<b>": 124}
