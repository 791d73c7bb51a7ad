"""`neuroweave tokenizer train`: both forms against each other, round trips, what transformers reads, refusals."""

from __future__ import annotations

import importlib.resources
import json
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer

from neuroweave.cli.tokenizer import command
from neuroweave.training import tokenizer as training
from neuroweave.training.sources import Source
from neuroweave.training.text_sample import CHUNK, cut_chunks, sample_text
from neuroweave.training.tokenizer import TrainedTokenizer, train_tokenizer
from neuroweave.training.tokenizer_forms import NORMAL, SPACE, disagreement, fast_form, fuzz_texts, read_model
from neuroweave.training.tokenizer_names import check_names

FILES = [
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja",
]  # fmt: skip
KINDS = [("bpe", "identity"), ("unigram", "identity"), ("bpe", "nfkc"), ("unigram", "nfkc")]
Made = dict[tuple[str, str], TrainedTokenizer]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prose, and Python with its runs of spaces; markup whose tags begin and end like special tokens."""
    folder = tmp_path_factory.mktemp("text")
    prose = importlib.resources.files("neuroweave.text") / "prose" / "training"
    chapters = sorted(Path(str(prose)).glob("*.txt"))[:12]
    (folder / "prose.txt").write_text("\n\n".join(file.read_text() for file in chapters), encoding="utf-8")
    (folder / "code.txt").write_text(Path(training.__file__).read_text() * 2, encoding="utf-8")
    markup = "".join(f"<p>haha{'=-' * (at % 9)} {at} in 1984</p><s\n<b>ä日本語 <|x</b>\n" for at in range(400))
    (folder / "markup.md").write_text(markup, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def made(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        (model, form): train_tokenizer(
            folder / f"{model}-{form}",
            [Source(path=str(text))],
            vocab_size=2048,
            model=model,
            normalization=form,
            special=["<|end|>"],
            tokens=["<think>", "</think>", "->"],
            chat_template="chatml",
        )
        for model, form in KINDS
    }


def both(made: TrainedTokenizer) -> tuple[Any, Any]:
    model = str(Path(made.folder, "tokenizer.model"))
    return sentencepiece.SentencePieceProcessor(model_file=model), AutoTokenizer.from_pretrained(made.folder)


# --------------------------------------------------------------------------------------------------------- two forms


@pytest.mark.parametrize("kind", KINDS)
def test_both_forms_give_the_same_tokens(made, kind):
    """On a long seeded fuzz other than the one of training; with the identity the text comes back."""
    slow, fast = both(made[kind])
    backend = fast.backend_tokenizer
    pieces = [slow.id_to_piece(number).replace(SPACE, " ") for number in range(2048) if not slow.is_byte(number)]
    for sample in fuzz_texts(pieces, list(made[kind].tokens), count=1_500, seed=123):
        tokens = slow.encode(sample)
        assert backend.encode(sample).ids == tokens, sample
        assert backend.decode(tokens, skip_special_tokens=False) == slow.decode(tokens), sample
        if kind[1] == "identity":
            assert slow.decode(tokens) == sample.replace(SPACE, " "), sample


@pytest.fixture(scope="module")
def pairs(made) -> list[tuple[Any, Any]]:
    return [both(made[kind]) for kind in KINDS]


PARTS = st.sampled_from(
    ["<s>", "</s>", "<pad>", "<|im_start|>", "<think>", "->", "<|end|", "<unk>", "<0x0A>", " ", "  ", "\n", "\t", "\0",
     "\u200d", "\u0301", "\u2581", "\u202e", "the ", "ff", "haha", "\U0001f468\u200d\U0001f469"]
)  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(st.lists(st.one_of(PARTS, st.text(st.characters(exclude_categories=["Cs"]))), max_size=8).map("".join))
def test_any_text(pairs, sample):
    for slow, fast in pairs:
        tokens = slow.encode(sample)
        assert fast(sample)["input_ids"] == tokens
        assert fast.decode(tokens) == slow.decode(tokens)
    for slow, _ in pairs[:2]:
        assert slow.decode(slow.encode(sample)) == sample.replace(SPACE, " ")


@pytest.mark.parametrize("kind", KINDS[:2])
def test_a_long_text(made, kind):
    """One text of a quarter million tokens: scores added in 32 bits are still exact."""
    slow, fast = both(made[kind])
    parts = fuzz_texts(["ff", "haha", " the", "==="], list(made[kind].tokens)[1:], count=1_500, seed=7)
    sample = "".join(parts) * 10
    tokens = slow.encode(sample)
    assert len(tokens) > 250_000
    assert fast.backend_tokenizer.encode(sample).ids == tokens


def test_what_is_never_found(made):
    """`<unk>`, byte names and halves of special tokens are plain text; each byte of anything unknown is a token."""
    for each in made.values():
        slow, fast = both(each)
        for sample in ("<unk>", "<0x41>", "<|im_start", "</s"):
            assert not {0, *each.tokens.values()} & set(fast(sample)["input_ids"]), sample
            assert slow.decode(fast(sample)["input_ids"]) == sample
        assert fast.tokenize("\U00012345") == ["<0xF0>", "<0x92>", "<0x8D>", "<0x85>"]


def test_scores_on_the_grid_and_symbols_whole(made):
    """Unigram: multiples of 1/8; no piece over the edge of a special token is worth its part outside."""
    slow, _ = both(made["unigram", "identity"])
    model = read_model(Path(made["unigram", "identity"].folder, "tokenizer.model").read_bytes())
    assert all(piece.score * 8 == round(piece.score * 8) < 0 for piece in model.pieces if piece.type == NORMAL)
    for outside in (">", "x", "p>", "\n", " ", "日"):
        for symbol in ("<s>", "</s>", "->", "<think>"):
            for sample in (outside + symbol, symbol + outside, outside + symbol + outside):
                assert slow.piece_to_id(symbol) in slow.encode(sample), sample


def test_nfkc_is_by_character(made):
    slow, _ = both(made["bpe", "nfkc"])
    for sample in ("ﬁ①Ａ", "a\xa0b\u3000c", "한", "x²", "㍿"):
        expected = "".join(unicodedata.normalize("NFKC", letter) for letter in sample)
        assert slow.decode(slow.encode(sample)) == expected
    assert slow.decode(slow.encode("a\x07b\nc\td")) == "ab\nc\td"


def test_normalised_text_can_spell_a_token(made):
    for kind in KINDS:
        slow, fast = both(made[kind])
        for sample in ("\uff1cs\uff1ea", "<\x0bthink>", "-\x01>"):
            assert fast(sample)["input_ids"] == slow.encode(sample)
            assert bool({1, 7, 9} & set(slow.encode(sample))) == (kind[1] == "nfkc")


def test_a_symbol_wins_over_what_runs_over_its_edge(tmp_path):
    """Text in which `=<`, `s` and `>` are frequent and `=` is not: together they are worth more than `=` and `<s>`."""
    words = (f"w{chr(97 + at % 26)}{chr(97 + at // 26 % 26)}> s =<" for at in range(3_000))
    (tmp_path / "text.txt").write_text(" ".join(words))
    made = train_tokenizer(tmp_path / "out", [Source(path=str(tmp_path))], vocab_size=380, model="unigram")
    slow, fast = both(made)
    assert [piece for piece in map(slow.id_to_piece, range(380)) if piece.endswith("=<")]
    for sample in (" =<s>", "=<s>", "<s>=<", " =<s> =<s> s>"):
        assert slow.encode(sample).count(1) == sample.count("<s>"), slow.encode(sample, out_type=str)
        assert fast(sample)["input_ids"] == slow.encode(sample)


def test_digits_are_single(made):
    """Also in years that the text is full of."""
    for each in made.values():
        assert both(each)[1].tokenize("in 1984")[-4:] == ["1", "9", "8", "4"]


def test_disagreement_is_found(made, tmp_path):
    """A tokenizer.json that differs on one text is refused, and training writes nothing then."""
    source = Path(made["bpe", "identity"].folder)
    for name in FILES:
        (tmp_path / name).write_bytes((source / name).read_bytes())
    assert disagreement(tmp_path, ["a b", "the"], exact=True) is None
    backend = Tokenizer.from_file(str(source / "tokenizer.json"))
    backend.add_tokens([AddedToken("xyz", normalized=False)])
    backend.save(str(tmp_path / "tokenizer.json"))
    assert disagreement(tmp_path, ["a xyz"], exact=True) == 'the two forms give different tokens: "a xyz"'
    assert disagreement(source, [f"a{SPACE}b"], exact=True) is None


def test_training_refuses_to_write_what_disagrees(text, tmp_path, monkeypatch):
    def other(model: Any, *, special: Any) -> Tokenizer:
        made = fast_form(model, special=special)
        made.add_tokens([AddedToken("e", normalized=False)])
        return made

    monkeypatch.setattr(training, "fast_form", other)
    with pytest.raises(ValueError, match="not written: the two forms give different tokens"):
        train_tokenizer(tmp_path / "out", [Source(path=str(text))], vocab_size=600)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------- what others read


def test_files_and_transformers(made):
    each = made["bpe", "identity"]
    assert sorted(path.name for path in Path(each.folder).iterdir()) == sorted(FILES)
    slow, fast = both(each)
    assert (len(fast), slow.vocab_size(), each.vocab_size) == (2048, 2048, 2048)
    assert (fast.bos_token_id, fast.eos_token_id, fast.pad_token_id, fast.unk_token) == (1, 2, 3, None)
    assert each.tokens == {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3, "<|end|>": 4, "<|im_start|>": 5,
                           "<|im_end|>": 6, "<think>": 7, "</think>": 8, "->": 9}  # fmt: skip
    for number in range(2048):
        assert fast.convert_ids_to_tokens(number) == slow.id_to_piece(number)
    chat = [{"role": "user", "content": "hi"}]
    rendered = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert fast.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == rendered
    assert fast.decode(fast("<s>a<think>b<|end|>")["input_ids"], skip_special_tokens=True) == "a<think>b"
    added = json.loads(Path(each.folder, "added_tokens.json").read_text())
    assert added == {token: number for token, number in each.tokens.items() if number}


def test_saved_again_it_is_the_same(made, tmp_path):
    for kind in KINDS:
        slow, fast = both(made[kind])
        fast.save_pretrained(tmp_path / kind[0])
        again = AutoTokenizer.from_pretrained(tmp_path / kind[0])
        for sample in fuzz_texts((" the", "ff"), list(made[kind].tokens), count=300, seed=1):
            assert again(sample)["input_ids"] == slow.encode(sample), sample


def test_a_fresh_model_takes_it(made, tmp_path):
    from neuroweave.neuroblast.fresh import write_fresh_model

    each = made["unigram", "identity"]
    done = write_fresh_model(tmp_path / "model", preset="tiny", tokenizer=each.folder)
    assert (done.vocabulary, done.added_pad) == (2048, False)
    slow = both(each)[0]
    fast = AutoTokenizer.from_pretrained(tmp_path / "model")
    for sample in ("<|im_start|>user\nhi", "ff" * 9, "x\u0301"):
        assert fast(sample)["input_ids"] == slow.encode(sample)


def test_the_same_text_gives_the_same_bytes(text, tmp_path):
    for model in ("bpe", "unigram"):
        folders = [tmp_path / f"{model}-{number}" for number in range(2)]
        for folder in folders:
            train_tokenizer(folder, [Source(path=str(text))], vocab_size=600, model=model, sample_bytes=60_000)
        for name in FILES[:-1]:
            assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
        assert str(tmp_path).encode() not in (folders[0] / "tokenizer.model").read_bytes()


# ------------------------------------------------------------------------------------------------------------- text


def test_chunks_joined_are_the_text():
    for sample in ("", "a", "x" * 5_001, "word " * 3_000, "line\n" * 999, " " * 4_001):
        chunks = list(cut_chunks(sample))
        assert "".join(chunks) == sample
        assert all(0 < len(chunk) <= CHUNK for chunk in chunks)


def test_the_sample_is_bounded_and_even(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{at:06d} " * 40}) + "\n" for at in range(3_000)))
    whole = sample_text([Source(path=str(tmp_path))])
    assert (whole.documents, whole.read, whole.used) == (3_000, 840_000, 840_000)
    some = sample_text([Source(path=str(tmp_path))], limit=84_000)
    assert 83_000 < some.used <= 84_000
    places = [int(chunk[:6]) for chunk in some.chunks]
    assert places == sorted(places)
    assert 1_300 < sum(places) / len(places) < 1_700


# --------------------------------------------------------------------------------------------------------- refusals


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(command, [str(each) for each in arguments], obj={"debug": False})


def test_the_command(text, tmp_path):
    out = tmp_path / "out"
    arguments = ["train", "--data", text / "prose.txt", "--vocab-size", "500", "--output", out]
    result = run(*arguments, "--token", "<think>", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["tokens"]["<think>"] == 4
    assert "not empty" in str(run(*arguments).exception)
    assert "500 tokens" in run(*arguments, "--overwrite", "--sample", "50kB").stdout


def binary(folder: Path) -> None:
    (folder / "bad.txt").write_bytes(b"ab\0cd" * 100)


def empty(folder: Path) -> None:
    (folder / "bad.txt").write_text("  \n")


def lines(folder: Path) -> None:
    (folder / "bad.jsonl").write_text('{"body": "a"}\n' * 5)


@pytest.mark.parametrize(
    ("make", "size", "message"),
    [
        (binary, 500, "binary"),
        (empty, 500, "empty"),
        (lines, 500, "text"),
        (None, 300, r"vocabulary of 300 is too small: 4 special tokens, 256 bytes and an alphabet of \d+ characters"),
        (None, 900_000, r"more than this text can give; the largest possible is (\d+)"),
    ],
)
def test_refused_text_and_sizes(make: Callable[[Path], None] | None, size, message, text, tmp_path):
    path = text / "prose.txt"
    if make is not None:
        path = tmp_path / "data"
        path.mkdir()
        make(path)
    for model in ("bpe", "unigram"):
        with pytest.raises(ValueError, match=message) as raised:
            train_tokenizer(tmp_path / "out", [Source(path=str(path))], vocab_size=size, model=model)
    assert not (tmp_path / "out").exists()
    if "largest" in str(raised.value):
        largest = int(str(raised.value).split()[-1])
        train_tokenizer(tmp_path / "out", [Source(path=str(path))], vocab_size=largest, model="unigram")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a b"], "no spaces"),
        ([f"a{SPACE}b"], "no spaces"),
        (["a\nb"], "no spaces"),
        (["\ud800x"], "surrogates"),
        (["x"], "2 characters"),
        (["<unk>"], "something else"),
        (["<0x0A>"], "something else"),
        (["<s>"], "always there"),
        (["<a>", "<a>"], "named twice"),
        (["<a>", "<a><b>"], "overlap"),
        (["ab", "bc"], "overlap"),
        (["aba"], "overlap"),
        (["<p"], "overlap"),
    ],
)
def test_refused_names(names, message):
    with pytest.raises(ValueError, match=message):
        check_names(names)


def test_names_that_the_normalisation_changes():
    check_names(["\uff1ca\uff1e"])
    with pytest.raises(ValueError, match="normalisation changes"):
        check_names(["\uff1ca\uff1e"], normalization="nfkc")


def test_refused_templates(text, tmp_path):
    broken, silent = tmp_path / "broken.jinja", tmp_path / "silent.jinja"
    broken.write_text("{% for message in %}")
    silent.write_text("hello")
    sources = [Source(path=str(text))]
    for chosen, message in ((broken, "does not work"), (silent, "leaves out"), (tmp_path / "none", "no such file")):
        with pytest.raises(ValueError, match=message):
            train_tokenizer(tmp_path / "out", sources, vocab_size=500, chat_template=chosen)


def test_without_sentencepiece(text, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ValueError, match=r"needs sentencepiece: pip install 'neuroweave\[train\]'"):
        train_tokenizer(tmp_path / "out", [Source(path=str(text))], vocab_size=500)
