"""From documents to windows: nothing read twice, units kept apart, short text taken as it is."""

from __future__ import annotations

import itertools

import pytest
from tiny_llama import Text, texts, tiny_tokenizer

from neuroweave.text.sample import cut_windows, draw_sample
from neuroweave.text.tokens import start_tokens


def draw(documents: list[Text], *, tokens: int = 100, window: int = 10, passage: int = 10_000, start: bool = False):
    return draw_sample(documents, tiny_tokenizer(start=start), tokens=tokens, window=window, passage=passage)


def test_windows_tile_the_text() -> None:
    assert cut_windows(range(25), start=[], window=10) == [tuple(range(10)), tuple(range(10, 20)), tuple(range(20, 25))]
    assert cut_windows(range(24), start=[], window=10) == [tuple(range(10)), tuple(range(10, 20))]
    assert cut_windows(range(7), start=[], window=10) == [tuple(range(7))]
    assert cut_windows(range(4), start=[99], window=3) == [(99, 0, 1), (99, 2, 3)]
    assert cut_windows([5], start=[], window=10) == []
    assert cut_windows([5], start=[1], window=10) == [(1, 5)]


def test_start_token_is_used_where_the_tokenizer_uses_it() -> None:
    assert start_tokens(tiny_tokenizer()) == ()
    assert start_tokens(tiny_tokenizer(start=True)) == (1,)
    sample = draw(texts(3), start=True)
    assert sample.start_token
    assert all(window.token_ids[0] == 1 and 1 not in window.token_ids[1:] for window in sample.windows)


def test_windows_spread_over_as_many_units_as_there_are() -> None:
    sample = draw(texts(20, words=40), tokens=100)
    assert len(sample.windows) == 10
    assert len(sample.passages) == 10
    assert [window.unit for window in sample.windows] == list(range(10))
    numbers = [int(name.removeprefix("text-")) for name in sample.documents]
    assert numbers == sorted(numbers)
    assert max(b - a for a, b in itertools.pairwise(numbers)) <= 4
    assert numbers[-1] >= 16  # evenly, not the first ten
    assert not sample.exhausted
    assert sample.predictions == 90


def test_second_windows_come_after_all_first_ones() -> None:
    sample = draw(texts(4, words=40), tokens=60)
    assert [window.unit for window in sample.windows].count(0) in (1, 2)
    assert len(sample.passages) == 4
    assert len(sample.windows) == 6


def test_a_long_document_is_cut_into_passages() -> None:
    [long] = texts(1, words=400)
    sample = draw([long], tokens=100, passage=300)
    assert len(sample.passages) > 4
    assert sample.documents == ["text-0"]
    words = long.text.split()
    spoken = [w for passage in sample.passages for w in passage.text.split()]
    assert set(spoken) <= set(words)


def test_text_shorter_than_a_window() -> None:
    sample = draw([Text("short", "w1 w2 w3")], window=512)
    assert [window.token_ids for window in sample.windows] == [(4, 5, 6)]
    assert sample.predictions == 2
    assert sample.exhausted


@pytest.mark.parametrize("documents", [[], [Text("empty", "")], [Text("one word", "w1")]])
def test_no_text_is_refused(documents: list[Text]) -> None:
    with pytest.raises(ValueError, match=rf"no text to measure: {len(documents)} document\(s\) hold fewer than two"):
        draw(documents)


def test_a_window_for_the_start_token_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="a window of 1 tokens holds nothing but the start token"):
        draw(texts(1), window=1, start=True)


def test_the_hash_tells_texts_apart() -> None:
    assert draw(texts(3)).sha256 == draw(texts(3)).sha256
    assert draw(texts(3)).sha256 != draw(texts(3, seed=1)).sha256
