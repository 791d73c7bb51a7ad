"""What was read is not read again, and changes nothing: the tokens are those of one pass over the whole text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from serving import served
from test_batching import MODELS, Text, alone, greedy, prompts
from tiny_llama import tiny_model
from transformers import MambaConfig, MambaForCausalLM
from transformers.cache_utils import DynamicCache

from neuroweave.runtime import prefix_cache
from neuroweave.runtime.batching import Batcher
from neuroweave.runtime.engine import Engine
from neuroweave.runtime.fast_writing import FastWriter, LoweredModel
from neuroweave.runtime.lowering import lower
from neuroweave.runtime.prefix_cache import WORTH, PrefixCache, why_not_reused
from neuroweave.runtime.writing import StopWriting, Writer

GO_BACK = ("llama", "patched")  # every token of a text that was read is still there


def written(batcher: Batcher, ids: list[int], count: int, **settings: Any) -> Text:
    text = Text(ids, count, **settings)
    batcher.submit(text.job)
    text.done.wait(60)
    return text


@pytest.mark.parametrize("name", MODELS)
def test_a_chat_goes_on_where_it_was(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neuroweave.runtime.batching.PIECE", 9)
    model = MODELS[name]()
    batcher = Batcher(model, slots=3, kept_tokens=500)
    assert batcher.prefixes.why_none == ""
    first, other, *_ = prompts()[2:]
    # Beside it a longer text is written, so that its row ends in the middle of a batch.
    beside = Text(prompts()[4], 60)
    batcher.submit(beside.job)
    texts = [written(batcher, first, 12)]
    for more in ([5, 6, 7], other, [9]):
        ids = texts[-1].job.ids + more
        texts.append(written(batcher, ids, 12))
        assert texts[-1].job.known == len(ids) - len(more) - 1  # the last token was written, and not read
        assert texts[-1].tokens() == alone(model, ids, 12)
    again = written(batcher, first, 12)  # the same question once more, and another that begins like it
    fork = written(batcher, [*first[:15], *first[:15]], 12)
    assert again.tokens() == texts[0].tokens() == alone(model, first, 12)
    assert fork.tokens() == alone(model, [*first[:15], *first[:15]], 12)
    assert [again.job.known, fork.job.known] == ([len(first) - 1, 15] if name in GO_BACK else [0, 0])
    assert beside.tokens() == alone(model, prompts()[4], 60)
    batcher.close()
    assert batcher.prefixes.kept == []


def test_what_many_begin_with_is_not_changed_by_any() -> None:
    model = tiny_model()
    batcher = Batcher(model, slots=3, kept_tokens=500)
    begin = prompts()[4]
    written(batcher, begin, 1)
    texts = [Text([*begin, 7, number], 20) for number in (5, 6, 7, 8)]
    for each in texts:
        batcher.submit(each.job)
    for number, each in zip((5, 6, 7, 8), texts, strict=True):
        assert each.tokens() == alone(model, [*begin, 7, number], 20)
        assert each.job.known >= len(begin)
    batcher.close()


def test_texts_that_are_stopped_or_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neuroweave.runtime.batching.PIECE", 10)
    model = tiny_model()
    batcher = Batcher(model, slots=2, kept_tokens=500)
    first, _, long = prompts()[2:]

    def fail(ids: list[int], logits: torch.Tensor) -> int:
        if len(ids) > len(first) + 2:
            raise ValueError("no token")
        return greedy(ids, logits)

    failing = written(batcher, first, 9, choose=fail)
    assert isinstance(failing.told[-1], ValueError)
    after = written(batcher, [*failing.job.ids, 5], 9)
    assert (after.job.known, after.tokens()) == (0, alone(model, [*failing.job.ids, 5], 9))
    stopped = Text(long, 400)
    stopped.tell = stopped.job.tell = lambda token: stopped.job.cancel()  # type: ignore[method-assign]
    batcher.submit(stopped.job)
    reading = Text([*first[::-1], *long], 9)
    rows = batcher._forward

    def stop_after_a_piece(tokens: list[list[int]], cache: Any, seen: list[int], mask: Any) -> Any:
        if tokens == [reading.job.ids[10:20]]:
            reading.job.cancel()
        return rows(tokens, cache, seen, mask)

    monkeypatch.setattr(batcher, "_forward", stop_after_a_piece)
    batcher.submit(reading.job)
    assert written(batcher, [9, 8], 1).tokens() == alone(model, [9, 8], 1)  # both are gone now
    for text, known in ((stopped, len(long)), (reading, 20)):
        ids = [*text.job.ids[:known], 3, 4]
        found = written(batcher, ids, 9)
        assert (found.job.known, found.tokens()) == (known, alone(model, ids, 9))
    batcher.close()


def cache_of(model: Any, ids: list[int]) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True)
    return cache


def test_the_oldest_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    prefixes = PrefixCache(model, tokens=60)
    texts = [[number] * 25 for number in (3, 4, 5)]
    for ids in texts[:2]:
        prefixes.put(ids, cache_of(model, ids))
    assert prefixes.begin([*texts[0], 9])[0] == 25  # used, so it is the newest now
    prefixes.put(texts[2], cache_of(model, texts[2]))
    assert [prefixes.begin([*ids, 9])[0] for ids in texts] == [25, 0, 25]
    prefixes.put([3] * 30, cache_of(model, [3] * 30))  # what goes on from one takes its place
    assert sorted(len(each.ids) for each in prefixes.kept) == [25, 30]
    prefixes.put([7] * 61, cache_of(model, [7] * 61))  # more than all there is room for
    prefixes.put([8] * (WORTH - 1), cache_of(model, [8] * (WORTH - 1)))
    assert sorted(len(each.ids) for each in prefixes.kept) == [25, 30]
    assert prefixes.begin([3] * 30)[0] == 29  # a token is left to read
    assert prefixes.begin([3] * 31)[1].get_seq_length() == 30

    def no_memory(*_: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(prefix_cache, "beginning", no_memory)
    known, cache = prefixes.begin([3] * 31)
    assert (known, cache.get_seq_length(), prefixes.kept) == (0, 0, [])


def test_what_is_kept_holds_no_more_memory_than_it_needs() -> None:
    model = tiny_model(num_key_value_heads=1)  # slices of one head's keys are in one piece, and could stay views
    batcher = Batcher(model, slots=2, kept_tokens=500)
    beside = Text(prompts()[4] * 9, 90)
    batcher.submit(beside.job)
    written(batcher, prompts()[1] * 2, 9)
    beside.done.wait(60)
    batcher.run(dict).result()  # the thread is done with both
    for each in batcher.prefixes.kept:
        for layer in each.cache.layers:
            assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes
    assert [each.size for each in batcher.prefixes.kept] == [7 * 2 + 8, 40 * 9 + 89]
    batcher.close()


def test_states_of_convolutions_count() -> None:
    model = MODELS["neuroblast"]()
    ids = [3] * 20
    prefixes = PrefixCache(model, tokens=200)
    for first in range(4, 40):
        prefixes.put([first, *ids], cache_of(model, [first, *ids]))
    held = sum(
        state.numel()
        for each in prefixes.kept
        for layer in each.cache.layers
        for state in (
            getattr(layer, "keys", None),
            getattr(layer, "values", None),
            *vars(layer).get("conv_states", {}).values(),
        )
        if state is not None
    )
    whole = cache_of(model, [3] * 200)
    column = sum(2 * layer.keys[..., :1, :].numel() for layer in whole.layers if hasattr(layer, "keys"))
    assert 100 * column < held <= 200 * column
    assert all(each.size > 21 for each in prefixes.kept)


def test_a_salt_keeps_texts_apart() -> None:
    model = tiny_model()
    prefixes = PrefixCache(model, tokens=90)
    prefixes.put([3] * 20, cache_of(model, [3] * 20), salt="hers")
    assert prefixes.begin([3] * 30)[0] == prefixes.begin([3] * 30, salt="his")[0] == 0
    prefixes.put([3] * 25, cache_of(model, [3] * 25))
    assert [prefixes.begin([3] * 30, salt=salt)[0] for salt in ("", "hers", "his")] == [25, 20, 0]


def test_when_memory_runs_out_what_was_kept_makes_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    batcher = Batcher(model, slots=2, kept_tokens=500)
    ids = prompts()[2]
    written(batcher, ids, 5)
    forward = batcher._forward

    def full(*given: Any) -> Any:
        if batcher.prefixes.kept:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*given)

    monkeypatch.setattr(batcher, "_forward", full)
    for _ in range(2):
        found = written(batcher, [*ids, 9], 5)
        assert (found.job.known, found.tokens()) == (0, alone(model, [*ids, 9], 5))
    monkeypatch.setattr(batcher, "_forward", lambda *_: 1 / 0)
    assert isinstance(written(batcher, ids, 5).told[-1], ZeroDivisionError)
    batcher.close()


def test_models_that_read_everything_again() -> None:
    mamba = MambaForCausalLM(MambaConfig(vocab_size=123, hidden_size=16, state_size=4, num_hidden_layers=2))
    assert why_not_reused(mamba.eval())
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert "its positions (dynamic) change" in why_not_reused(tiny_model(rope_parameters=scaled))
    model = tiny_model()
    forward = model.forward

    def deaf(*args: Any, past_key_values: Any = None, **inputs: Any) -> Any:
        if past_key_values is not None and past_key_values.get_seq_length():
            inputs["input_ids"] = inputs["input_ids"] + 1
        return forward(*args, past_key_values=past_key_values, **inputs)

    model.forward = deaf
    assert "gets other logits" in why_not_reused(model)
    prefixes = PrefixCache(model, tokens=60)
    prefixes.put([3] * 20, cache_of(tiny_model(), [3] * 20))
    assert prefixes.kept == []


# ------------------------------------------------------------------------------------------------- one text at a time


@pytest.mark.parametrize(
    ("settings", "read_whole"),
    [
        ({"use_cache": False}, False),
        ({"cache_implementation": "dynamic"}, True),
        ({"cache_implementation": "static"}, True),
        ({"prompt_lookup_num_tokens": 3}, True),
    ],
)
def test_settings_of_a_checkpoint_for_its_cache(settings: dict[str, Any], read_whole: bool) -> None:
    model = tiny_model()
    model.generation_config.update(**settings, eos_token_id=None)
    writer = Writer("tiny", model, served().writer.tokenizer, "", {}).remembering()
    text = prompts()[2]
    for _ in range(2):
        config = writer.settings({"do_sample": False}, 9, chat=False)
        new = writer.write(text, config, seed=0, show=str).token_ids
        assert new == alone(tiny_model(), text, 9)
        assert config.to_dict().items() >= settings.items()  # what was given is as it was
        text = [*text, *new, 5]
    assert (writer.prefixes.kept == []) == read_whole


def reading(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens the model is given at once."""
    read: list[int] = []
    if isinstance(writer, FastWriter):
        whole = Engine.read_prompt

        def read_prompt(engine: Engine, tokens: list[int]) -> Any:
            read.append(len(tokens))
            return whole(engine, tokens)

        monkeypatch.setattr(Engine, "read_prompt", read_prompt)
    else:
        writer.model.register_forward_pre_hook(
            lambda _, given, named: read.append(named["input_ids"].shape[1]), with_kwargs=True
        )
    return read


@pytest.mark.parametrize(("name", "fast"), [*((name, False) for name in MODELS), ("llama", True), ("neuroblast", True)])
def test_a_writer_goes_on_where_it_was(name: str, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, reference = MODELS[name](), MODELS[name]()
    model.generation_config.eos_token_id = None
    writer = Writer(name, model, served().writer.tokenizer, "", {})
    if fast:
        quick = LoweredModel(model.config, model.generation_config, lower(model), 1)
        writer = FastWriter(name, quick, writer.tokenizer, "", {})
    writer = writer.remembering()
    read = reading(writer, monkeypatch)

    def asked(ids: list[int], show: Callable[[str], object] = str) -> tuple[list[int], int]:
        """(new tokens, how many tokens of the prompt were read)"""
        read.clear()
        config = writer.settings({"do_sample": False}, 12, chat=False)
        return writer.write(ids, config, seed=0, show=show).token_ids, read[0]

    def enough(piece: str) -> None:
        raise StopWriting

    def broken(piece: str) -> None:
        raise KeyboardInterrupt

    first = prompts()[2]
    new = alone(reference, first, 12)
    assert asked(first) == (new, len(first))
    ids = [*first, *new, 5, 6]
    new = alone(reference, ids, 12)
    assert asked(ids) == (new, 3)
    with pytest.raises(StopWriting):
        asked([*ids, *new, 7], enough)
    ids = [*ids, *new, 7, alone(reference, [*ids, *new, 7], 1)[0], 8]
    assert asked(ids) == (alone(reference, ids, 12), 2)
    new, count = asked(first)
    assert new == alone(reference, first, 12)
    assert count == (1 if name in GO_BACK else len(first))
    fork = [*first, 9]
    assert asked(fork)[0] == alone(reference, fork, 12)
    with pytest.raises(KeyboardInterrupt):
        asked(prompts()[4], broken)
    assert asked(fork)[0] == alone(reference, fork, 12)
