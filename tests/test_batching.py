"""Texts continued together are those that transformers continues alone, whoever comes, goes or fails meanwhile."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from tiny_llama import tiny_model
from tiny_training import tiny_neuroblast
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, MambaConfig, MambaForCausalLM

import neuroweave
from neuroweave.runtime.batching import Batcher, Job, Token, mask_of, why_not_together

LENGTHS = [1, 7, 23, 3, 40]  # longer and shorter than the windows below


def tiny_gemma() -> Any:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=123, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=8, layer_types=["sliding_attention"] * 2 + ["full_attention"],
        query_pre_attn_scalar=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval()


def patched() -> Any:
    model = tiny_model()
    neuroweave.patch(model, "phantom-everywhere")
    return model


MODELS: dict[str, Any] = {
    "llama": tiny_model,
    "patched": patched,
    "gemma3, windows": tiny_gemma,
    "neuroblast": lambda: tiny_neuroblast(dropout=0.0).eval(),
}


def greedy(ids: list[int], logits: torch.Tensor) -> int:
    return int(logits.argmax())


class Text:
    """A job, and what was told of it."""

    def __init__(self, ids: list[int], new_tokens: int, **settings: Any) -> None:
        self.told: list[Any] = []
        self.done = threading.Event()
        ends = settings.pop("ends", frozenset())
        self.job = Job(list(ids), new_tokens, ends, settings.pop("choose", greedy), self.tell, **settings)

    def tell(self, token: Token | Exception) -> None:
        self.told.append(token)
        if isinstance(token, Exception) or token.last:
            self.done.set()

    def tokens(self) -> list[int]:
        assert self.done.wait(60)
        return [each.id for each in self.told]


def prompts() -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(3, 123, (length,), generator=draw).tolist() for length in LENGTHS]


def alone(model: Any, ids: list[int], count: int) -> list[int]:
    with torch.no_grad():
        for _ in range(count):
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[-count:]


@pytest.mark.parametrize("name", MODELS)
def test_texts_of_different_lengths_are_written_as_each_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neuroweave.runtime.batching.PIECE", 9)  # long prompts are read in pieces
    model = MODELS[name]()
    batcher = Batcher(model, slots=3)
    assert batcher.why_single == ""
    texts = [Text(ids, count) for ids, count in zip(prompts(), [9, 30, 5, 21, 12], strict=True)]
    for each in texts:
        batcher.submit(each.job)
    for each, ids in zip(texts, prompts(), strict=True):
        assert each.tokens() == alone(model, ids, len(each.told))
        assert [token.last for token in each.told] == [None] * (len(each.told) - 1) + ["length"]
    assert batcher.load() == (0, 0)
    batcher.close()


def test_logprobs_are_those_of_one_pass() -> None:
    model = tiny_model()
    batcher = Batcher(model)
    texts = [Text(ids, 6, likeliest=4) for ids in prompts()]
    for each in texts:
        batcher.submit(each.job)
    for each, ids in zip(texts, prompts(), strict=True):
        tokens = each.tokens()
        with torch.no_grad():
            wanted = model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        for token, row in zip(each.told, wanted, strict=True):
            assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
            assert [place for place, _ in token.likeliest] == row.topk(4).indices.tolist()
    batcher.close()


def test_a_text_that_is_cancelled_or_fails_leaves_the_others_alone() -> None:
    model = tiny_model()
    batcher = Batcher(model, slots=3)
    first, *others = prompts()[1:4]

    def fail_later(ids: list[int], logits: torch.Tensor) -> int:
        if len(ids) > len(others[0]) + 3:
            raise ValueError("no token")
        return greedy(ids, logits)

    stopped, failing, staying = Text(first, 400), Text(others[0], 9, choose=fail_later), Text(others[1], 60)
    tell = stopped.job.tell

    def tell_and_cancel(token: Any) -> None:
        tell(token)
        if len(stopped.told) == 5:
            stopped.job.cancel()

    stopped.job.tell = tell_and_cancel
    for each in (stopped, failing, staying):
        batcher.submit(each.job)
    assert staying.tokens() == alone(model, others[1], 60)
    assert failing.done.wait(60)
    assert [type(each) for each in failing.told] == [Token] * 4 + [ValueError]
    assert len(stopped.told) == 5
    assert batcher.load() == (0, 0)
    batcher.close()


def test_whoever_has_many_texts_waits_for_who_has_few() -> None:
    batcher = Batcher(tiny_model(), slots=2)
    begun: list[str] = []

    def text(owner: str, number: int) -> Text:
        def choose(ids: list[int], logits: torch.Tensor) -> int:
            if len(ids) == 3:
                begun.append(f"{owner}{number}")
            return greedy(ids, logits)

        return Text([3, 4, 5], 6, choose=choose, owner=owner)

    texts = [text("many", at) for at in range(4)] + [text("one", 0), text("other", 0)]
    batcher.run(lambda: [batcher.submit(each.job) for each in texts]).result(60)
    for each in texts:
        assert len(each.tokens()) == 6
    assert begun == ["many0", "one0", "many1", "other0", "many2", "many3"]
    batcher.close()


def test_logits_in_pieces_are_those_of_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neuroweave.runtime.batching.PIECE", 7)
    for make in MODELS.values():
        model = make()
        batcher = Batcher(model)
        ids = prompts()[-1]
        with torch.no_grad():
            wanted = model(torch.tensor([ids])).logits[0]
        for first in (0, 6, 7, len(ids) - 1):
            pieces = list(batcher.logits(ids, first))
            places = [place + at for place, rows in pieces for at in range(len(rows))]
            assert places == list(range(first, len(ids)))
            torch.testing.assert_close(torch.cat([rows for _, rows in pieces]), wanted[first:], atol=1e-4, rtol=1e-4)
        batcher.close()


def test_ends_errands_and_closing() -> None:
    model = tiny_model()
    batcher = Batcher(model, slots=2)
    ids = prompts()[1]
    wanted = alone(model, ids, 8)
    end = wanted[4]
    text = Text(ids, 400, ends=frozenset({end}))
    batcher.submit(text.job)
    assert text.tokens() == wanted[: wanted.index(end) + 1]
    assert text.told[-1].last == "stop"
    assert batcher.run(lambda: threading.current_thread() is batcher.thread.thread).result(60)
    with pytest.raises(ZeroDivisionError):
        batcher.run(lambda: 1 / 0).result(60)
    with pytest.raises(ValueError, match="no token"):
        batcher.submit(Text([], 3).job)
    endless = Text(ids, 10**6)
    batcher.submit(endless.job)
    batcher.close()
    assert isinstance(endless.told[-1], RuntimeError)


def test_models_that_cannot_share_are_run_one_text_at_a_time() -> None:
    class Sums(torch.nn.Module):
        """Looks at the padding: what is to its left changes its logits."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_model()
            self.config, self.device, self.dtype = self.inner.config, self.inner.device, torch.float32

        def forward(self, attention_mask: Any = None, **inputs: Any) -> Any:
            return self.inner(**inputs)

    assert "a text in a batch gives other logits than alone" in why_not_together(Sums())
    mamba = MambaForCausalLM(MambaConfig(vocab_size=123, hidden_size=16, state_size=4, num_hidden_layers=2))
    assert why_not_together(mamba.eval())
    assert mask_of([2, 4]).tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
