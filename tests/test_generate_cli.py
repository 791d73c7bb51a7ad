"""`neuroweave generate`: the tokens of transformers' own `generate`, the text of their decoder, and what it refuses."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llama import tiny_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    GenerationConfig,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    TextStreamer,
)
from transformers.utils import logging

from neuroweave.cli.generate import in_use
from neuroweave.cli.main import main
from neuroweave.runtime.writing import Stream, Writer, reads_ahead
from neuroweave.text import documents

VOCABULARY = 400
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<pad>"}
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not m.content %}{{ raise_exception('an empty system') }}"
    "{% endif %}<s>{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
TEXT = [document.text[:20_000] for document in documents("calibration")[:2]] + ["    indented\n\n        twice\n"] * 50


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, as of GPT-2 and SmolLM2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return trained(tokenizer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def stripping_tokenizer() -> PreTrainedTokenizerFast:
    """Spaces as ▁, and a decoder that strips one from the start, as of Llama 2 and Mistral."""
    tokenizer = Tokenizer(models.BPE(unk_token="<pad>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return trained(tokenizer)


def trained(tokenizer: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False, **options
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """As in a program of its own, where transformers reads its settings when it is imported."""
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(before[0])
    if before[1]:
        logging.enable_progress_bar()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """plain: a model without a chat template; chat: with one; small: a draft model; endless: 100,000 positions
    and no end token."""
    root = tmp_path_factory.mktemp("generate")
    tokenizer = byte_tokenizer()
    for name, seed, settings_of in [
        ("plain", 0, {}),
        ("chat", 1, {}),
        ("small", 2, {"num_hidden_layers": 1}),
        ("endless", 3, {"max_position_embeddings": 100_000, "eos_token_id": None}),
    ]:
        tokenizer.chat_template = TEMPLATE if name == "chat" else None
        tokenizer.eos_token = None if name == "endless" else "</s>"
        model = tiny_model(seed, vocab_size=VOCABULARY, **{"max_position_embeddings": 123} | settings_of)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `neuroweave generate WORDS`."""
    with pytest.raises(SystemExit) as stop:
        main(["generate", *map(str, words)])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def by_transformers(folder: Path, prompt: str, **options: Any) -> tuple[list[int], str]:
    """New token ids of transformers' generate, and the text that they have after the prompt."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    before = inputs.input_ids.shape[1]
    torch.manual_seed(options.pop("seed", 0))
    ids = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, **options)[0].tolist()
    return ids[before:], text_after(tokenizer, ids[:before], ids[before:])


def text_after(tokenizer: PreTrainedTokenizerFast, prompt: list[int], new: list[int]) -> str:
    whole, before = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt + new, prompt))
    assert whole.startswith(before)
    return whole.removeprefix(before)


# --------------------------------------------------------------------------------------------------- tokens and text


@pytest.mark.parametrize("new_tokens", [1, 7, 100])
def test_greedy_tokens_and_text_are_those_of_transformers(folder: Path, capsys, new_tokens: int) -> None:
    words = [folder / "plain", "--prompt", "It was the best", "--new-tokens", new_tokens]
    ids, text = by_transformers(folder / "plain", "It was the best", max_new_tokens=new_tokens)
    code, out, err = run(capsys, *words, "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert (found["token_ids"], found["text"]) == (ids, text)
    assert (found["new_tokens"], found["stopped"], found["chat"]) == (len(ids), "length", False)
    assert found["settings"] == {"do_sample": False, "repetition_penalty": 1.0}
    assert run(capsys, *words) == (0, text + "\n", "")


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["--temperature", "0.8"], {"temperature": 0.8}),
        (["--top-k", "7"], {"top_k": 7}),
        (["--top-p", "0.6", "--repetition-penalty", "1.3"], {"top_p": 0.6, "repetition_penalty": 1.3}),
        (["--min-p", "0.01", "--temperature", "2", "--top-k", "0"], {"min_p": 0.01, "temperature": 2.0, "top_k": 0}),
    ],
)
def test_sampled_tokens_are_those_of_transformers(folder: Path, capsys, words: list[str], options: dict) -> None:
    wanted = by_transformers(folder / "plain", "It was", max_new_tokens=60, do_sample=True, seed=123, **options)
    call = [folder / "plain", "--prompt", "It was", "--new-tokens", 60, "--json", *words]
    found = json.loads(run(capsys, *call, "--seed", 123)[1])
    assert (found["token_ids"], found["text"]) == wanted
    assert found["settings"] | {"do_sample": True} | options == found["settings"]
    again = json.loads(run(capsys, *call)[1])
    assert again["seed"] != 123
    assert json.loads(run(capsys, *call, "--seed", again["seed"])[1])["token_ids"] == again["token_ids"]


def test_the_checkpoint_decides_where_nothing_is_said(folder: Path, tmp_path: Path, capsys) -> None:
    AutoTokenizer.from_pretrained(folder / "plain").save_pretrained(tmp_path)
    model = tiny_model(vocab_size=VOCABULARY)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.7, top_k=9, eos_token_id=2, pad_token_id=0, num_beams=3, max_length=5
    )
    model.save_pretrained(tmp_path)
    wanted, _ = by_transformers(tmp_path, "It was", max_new_tokens=30, seed=5, num_beams=1)
    words = [tmp_path, "--prompt", "It was", "--new-tokens", 30]
    found = json.loads(run(capsys, *words, "--seed", 5, "--json")[1])
    assert found["token_ids"] == wanted
    _, out, err = run(capsys, *words, "--seed", 5, "--verbose", "--stats")
    assert out == found["text"] + "\n"
    loaded, how, stats = err.splitlines()
    assert loaded == f"{tmp_path}: cpu, float32; raw text"
    assert how == "do_sample True, repetition_penalty 1.0, temperature 1.7, top_k 9, top_p 1.0, min_p None, seed 5"
    assert stats.startswith(f"{found['prompt_tokens']} tokens of prompt, 30 new, prefill ")
    assert stats.endswith("tokens/s, stopped: length")
    greedy = by_transformers(tmp_path, "It was", max_new_tokens=30, do_sample=False, num_beams=1)[0]
    for choice in (["--greedy"], ["--temperature", "0", "--top-p", "0.5"]):
        assert json.loads(run(capsys, *words, "--json", *choice)[1])["token_ids"] == greedy


def test_defaults_that_are_told_are_those_of_transformers() -> None:
    defaults = GenerationConfig._get_default_generation_params()
    told = in_use(GenerationConfig(do_sample=True))
    assert told == {"do_sample": True} | {name: defaults.get(name) for name in list(told)[1:]}


def test_it_ends_at_an_end_token(folder: Path, tmp_path: Path, capsys) -> None:
    ids, _ = by_transformers(folder / "plain", "It was the best", max_new_tokens=40)
    end = ids[20]
    AutoTokenizer.from_pretrained(folder / "plain").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder / "plain")
    model.generation_config.eos_token_id = [2, end]
    model.save_pretrained(tmp_path)
    found = json.loads(run(capsys, tmp_path, "--prompt", "It was the best", "--new-tokens", 40, "--json")[1])
    assert found["token_ids"] == ids[: ids.index(end) + 1]
    assert found["stopped"] == "end of text"


def test_it_ends_where_the_context_does(folder: Path, capsys) -> None:
    words = [folder / "plain", "--prompt", "It was the best"]
    found = json.loads(run(capsys, *words, "--json")[1])
    assert found["prompt_tokens"] + found["new_tokens"] == 123
    assert found["stopped"] == "context"
    _, _, err = run(capsys, *words)
    assert err == f"the context is full: {found['prompt_tokens']} tokens of prompt and {found['new_tokens']} new ones\n"


@pytest.mark.parametrize("draft", [["--prompt-lookup", 3], ["--assistant", "small"]])
def test_drafted_tokens_are_the_same(folder: Path, capsys, draft: list[object]) -> None:
    words = [folder / name if name == "small" else name for name in draft]
    ids, text = by_transformers(folder / "plain", "one two one two one", max_new_tokens=60)
    call = [folder / "plain", "--prompt", "one two one two one", "--new-tokens", 60]
    found = json.loads(run(capsys, *call, *words, "--json")[1])
    assert (found["token_ids"], found["text"]) == (ids, text)
    assert run(capsys, *call, *words)[1] == text + "\n"


def test_an_assistant_with_other_tokens(folder: Path, tmp_path: Path, capsys) -> None:
    families.tiny_model("llama").save_pretrained(tmp_path)
    tokenizer = Tokenizer(models.BPE(unk_token="<pad>"))
    tokenizer.decoder = decoders.Fuse()
    trainer = trainers.BpeTrainer(vocab_size=99, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL).save_pretrained(tmp_path)
    ids, _ = by_transformers(folder / "plain", "one two", max_new_tokens=20)
    words = [folder / "plain", "--prompt", "one two", "--new-tokens", 20, "--assistant", tmp_path, "--json"]
    assert json.loads(run(capsys, *words)[1])["token_ids"] == ids


# ----------------------------------------------------------------------------------------------------------- the text

TOKENIZERS = [byte_tokenizer(), stripping_tokenizer()]


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["byte", "stripping"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_pieces_are_the_text_of_the_tokens(tokenizer: PreTrainedTokenizerFast, data: st.DataObject) -> None:
    """Any tokens in any portions, among them lines with indents; special tokens are not shown."""
    lines = tokenizer("\n    return x\n\n        y", add_special_tokens=False)["input_ids"]
    some = st.sampled_from(["\n", "\n  a", " the", "é", "雪", "a b"]).map(lambda text: tokenizer(text)["input_ids"])
    parts = data.draw(st.lists(some | st.just(lines) | st.just([2]), max_size=12))
    prompt, new = tokenizer("It was")["input_ids"], [token for part in parts for token in part]
    shown: list[str] = []
    stream = Stream(tokenizer, shown.append)
    stream.put(torch.tensor([prompt]))
    first = 0
    while first < len(new):
        size = data.draw(st.integers(1, 3))
        stream.put(torch.tensor(new[first : first + size]))
        first += size
    stream.end()
    assert "".join(shown) == text_after(tokenizer, prompt, new)
    assert sum(count for _, count in stream.arrivals) == len(new)


def test_indents_that_transformers_own_streamer_loses() -> None:
    """One reason for a `Stream` of our own: if this fails, transformers has mended it."""
    tokenizer = stripping_tokenizer()
    ids = tokenizer("a\n    b", add_special_tokens=False)["input_ids"]
    pieces: list[str] = []
    theirs = TextStreamer(tokenizer)
    theirs.on_finalized_text = lambda text, stream_end=False: pieces.append(text)
    for token in ids:
        theirs.put(torch.tensor([token]))
    theirs.end()
    assert "".join(pieces) == "a\n   b"


def test_each_character_is_shown_when_it_is_whole() -> None:
    tokenizer = byte_tokenizer()
    shown: list[str] = []
    stream = Stream(tokenizer, lambda text: shown.append(text))
    stream.put(torch.tensor([tokenizer("x")["input_ids"]]))
    lengths = []
    for token in tokenizer("a,-é")["input_ids"]:
        stream.put(torch.tensor([token]))
        lengths.append(len("".join(shown)))
    assert "".join(shown) == "a,-é"
    assert lengths == [1, 2, 3, 3, 4]
    stream.put(torch.tensor([tokenizer("é")["input_ids"][0]]))
    assert "".join(shown) == "a,-é"
    stream.end()
    assert "".join(shown) == "a,-é\ufffd"


def test_text_is_shown_while_tokens_are_made(folder: Path) -> None:
    writer = Writer.load(str(folder / "endless"))
    ids, _ = writer.encode("It was the best")
    log: list[str] = []
    writer.model.register_forward_hook(lambda *_: log.append("step"))
    config = writer.settings({"do_sample": True, "temperature": 2.0}, 100, chat=False)
    found = writer.write(ids, config, seed=1, show=lambda text: log.append("text"))
    assert log.count("step") == len(found.token_ids) == 100
    first = log.index("text")
    assert log[:first].count("step") < 20  # a word or two
    assert log.count("text") > 10
    assert found.prefill_seconds > 0
    assert found.decode_seconds > 0
    assert found.decoded_tokens == 99


# --------------------------------------------------------------------------------------------------------- the prompt


def piped(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


@pytest.mark.parametrize(("data", "words"), [(b"It was\n", []), (b"It was\r\n", ["--prompt", "-"]), (b"It was", [])])
def test_a_prompt_from_a_pipe(folder: Path, capsys, monkeypatch, data: bytes, words: list[str]) -> None:
    piped(monkeypatch, data)
    code, out, _ = run(capsys, folder / "plain", *words, "--json", "--new-tokens", 3)
    assert (code, json.loads(out)["prompt"]) == (0, "It was")


def test_a_prompt_from_a_file(folder: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    piped(monkeypatch, b"not this")
    (tmp_path / "prompt.txt").write_bytes("Ça va\n\n".encode())
    _, out, _ = run(capsys, folder / "plain", "--file", tmp_path / "prompt.txt", "--json", "--new-tokens", 3)
    assert json.loads(out)["prompt"] == "Ça va\n"


@pytest.mark.parametrize(("words", "system"), [([], None), (["--system", "Be kind", "--chat"], "Be kind")])
def test_a_chat(folder: Path, capsys, words: list[str], system: str | None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "chat")
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": "Hello"})
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids, text = by_transformers(folder / "chat", asked, max_new_tokens=9)
    found = json.loads(run(capsys, folder / "chat", "--prompt", "Hello", "--json", "--new-tokens", 9, *words)[1])
    assert (found["token_ids"], found["text"], found["chat"]) == (ids, text, True)
    raw = json.loads(run(capsys, folder / "chat", "--prompt", "Hello", "--json", "--new-tokens", 9, "--raw")[1])
    assert raw["token_ids"] == by_transformers(folder / "chat", "Hello", max_new_tokens=9)[0]


def test_a_chat_ends_at_the_end_token_of_the_tokenizer_too(folder: Path) -> None:
    writer = Writer.load(str(folder / "chat"))
    writer.model.generation_config.eos_token_id = 7
    assert writer.settings({}, 5, chat=True).eos_token_id == [7, 2]
    assert writer.settings({}, 5, chat=False).eos_token_id == [7]
    writer.model.generation_config.eos_token_id = None
    assert writer.settings({}, 5, chat=False).eos_token_id == [2]


def test_a_tokenizer_that_ends_its_texts(folder: Path) -> None:
    writer = Writer.load(str(folder / "plain"))
    from tokenizers.processors import TemplateProcessing

    plain = writer.encode("It was")[0]
    writer.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert writer.encode("It was")[0] == [1, *plain]
    assert writer.encode("It was</s>")[0][-1] == 2


# ------------------------------------------------------------------------------------------------------- bad endings


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plain", "--prompt", " \n"], "--prompt: the prompt is empty; a model needs something to continue"),
        (["plain", "--prompt", "a", "--file", "x"], "give the prompt with --prompt or with --file, not both"),
        (["plain", "--file", "missing.txt"], "missing.txt: the prompt cannot be read (No such file or directory)"),
        (["plain", "--prompt", "word " * 200], "tokens and PLAIN has 123 positions, of which a new token needs one;"),
        (["plain", "--prompt", "a", "--temperature", "-1"], "-1.0 is not in the range x>=0"),
        (["plain", "--prompt", "a", "--temperature", "nan"], "--temperature nan: expected a finite number"),
        (["plain", "--prompt", "a", "--top-p", "1.5"], "1.5 is not in the range 0<x<=1"),
        (["plain", "--prompt", "a", "--new-tokens", "0"], "0 is not in the range x>=1"),
        (["plain", "--prompt", "a", "--greedy", "--top-k", "5"], "has no use for --top-k; leave one of them out"),
        (["plain", "--prompt", "a", "--device", "warp"], "--device warp is not to be had here (Expected one of cpu"),
        (["plain", "--prompt", "a", "--chat"], "PLAIN: its tokenizer has no chat template; leave --chat out"),
        (["plain", "--prompt", "a", "--system", "b"], "--system is a part of a chat, and this prompt is continued as"),
        (["chat", "--prompt", "a", "--system", ""], "its chat template refuses this chat (an empty system)"),
        (["chat", "--prompt", "a", "--assistant", "small", "--prompt-lookup", "2"], "both draft tokens; give one"),
        (["nowhere", "--prompt", "a"], "no such folder, and not a hub id of the form owner/name"),
        (["plain", "--prompt", "a", "--assistant", "nowhere"], "nowhere: no such folder"),
    ],
)  # fmt: skip
def test_what_is_refused(folder: Path, capsys, monkeypatch, words: list[str], message: str) -> None:
    monkeypatch.chdir(folder)
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert message.replace("PLAIN", "plain") in err
    assert err.startswith("neuroweave: ")
    assert err.count("\n") == 1


def test_prompts_that_cannot_be_read(folder: Path, capsys, monkeypatch) -> None:
    for data, message in [(b"", "stdin: the prompt is empty"), (b"a\xff", "stdin: not UTF-8 text (invalid start byte")]:
        piped(monkeypatch, data)
        code, _, err = run(capsys, folder / "plain")
        assert code == 2
        assert message in err
    monkeypatch.setattr(sys, "stdin", None)
    assert "nothing to continue: give --prompt TEXT or --file FILE" in run(capsys, folder / "plain")[2]


def bert(**settings_of: Any) -> BertLMHeadModel:
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        **settings_of,
    )  # fmt: skip
    return BertLMHeadModel(config).eval()


def test_models_that_do_not_continue_text(folder: Path, tmp_path: Path, capsys) -> None:
    small = {"vocab_size": VOCABULARY, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, d_model=32, d_ff=48, num_layers=1, num_heads=4))
    modern = ModernBertForMaskedLM(ModernBertConfig(**small, **tokens, num_hidden_layers=1))
    for model, message in [
        (bert(), "bert is an encoder here: it reads what comes after a token; give a causal language model"),
        (t5, "t5 is an encoder-decoder, which answers a text but does not continue it; give a decoder"),
        (modern, "modernbert is not a kind of model that continues text (an encoder?); give a causal language model"),
    ]:
        place = tmp_path / type(model).__name__
        model.save_pretrained(place)
        AutoTokenizer.from_pretrained(folder / "plain").save_pretrained(place)
        code, out, err = run(capsys, place, "--prompt", "a")
        assert (code, out) == (2, "")
        assert err == f"neuroweave: {place}: {message}\n"


def test_only_encoders_read_ahead() -> None:
    assert reads_ahead(bert())
    assert not reads_ahead(bert(is_decoder=True))
    for family in ("gpt_neox", "llama", "gpt2"):
        assert not reads_ahead(families.tiny_model(family))


def test_a_folder_without_a_tokenizer(tmp_path: Path, capsys) -> None:
    tiny_model().save_pretrained(tmp_path)
    code, out, err = run(capsys, tmp_path, "--prompt", "a")
    assert (code, out) == (2, "")
    assert f"{tmp_path}: no tokenizer could be loaded" in err
    assert err.count("\n") == 1


def test_logits_that_are_not_numbers(folder: Path, tmp_path: Path, capsys) -> None:
    AutoTokenizer.from_pretrained(folder / "plain").save_pretrained(tmp_path)
    model = tiny_model(vocab_size=VOCABULARY)
    model.lm_head.weight.data[3] = float("nan")
    model.save_pretrained(tmp_path)
    code, _, err = run(capsys, tmp_path, "--prompt", "a", "--temperature", "1")
    assert code == 2
    assert "its logits are not numbers, so no token can be drawn; give --dtype float32" in err


def test_ctrl_c_and_a_reader_that_leaves(folder: Path) -> None:
    """Of two endless runs one is interrupted and the other loses its reader; both end, and quietly."""
    words = [folder / "endless", "--prompt", "It was", "--new-tokens", 90_000, "--temperature", 2, "--top-k", 0]
    command = [sys.executable, "-m", "neuroweave", "generate", *map(str, words)]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as stopped, subprocess.Popen(command, **pipes) as left:
        assert stopped.stdout is not None
        assert left.stdout is not None
        assert stopped.stderr is not None
        assert left.stderr is not None
        begun = stopped.stdout.read(40)
        stopped.send_signal(signal.SIGINT)
        stopped.stdout.read()
        left.stdout.read(40)
        left.stdout.close()
        errors = stopped.stderr.read(), left.stderr.read()
        assert stopped.wait(10) == 130
        assert left.wait(10) == 1
    assert len(begun) == 40
    assert errors == (b"\nneuroweave: stopped\n", b"")  # click ends the line of the text
