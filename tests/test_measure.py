"""Measuring a pair: against a naive twin, without leaving a trace in the model, and clear about what cannot be done."""

from __future__ import annotations

import functools
import gc
import itertools
import math
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from tiny_llama import QUICK, WITHOUT_SPEED, Text, changed, subject, texts, tiny_model, tiny_tokenizer

from neuroweave.diagnose import Ledger, Plan, SpeedPlan, Subject, compare, experiment
from neuroweave.diagnose.experiment import compare_one_by_one
from neuroweave.diagnose.probes import head, prediction
from neuroweave.diagnose.probes.speed import measure_speed, median_interval
from neuroweave.diagnose.subject import at_rest
from neuroweave.text.sample import draw_sample


def without_time(comparison):
    """What must not depend on when or in which groups it was measured."""
    return comparison.model_dump(exclude={"environment"})


@pytest.fixture(params=[1 << 19, 300])
def chunk_elements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole window at once, and two positions at a time."""
    monkeypatch.setattr(prediction, "CHUNK_ELEMENTS", request.param)
    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * request.param)


@pytest.mark.usefixtures("chunk_elements")
def test_numbers_match_a_naive_twin() -> None:
    base = tiny_model()
    other = changed(base, 0.2)
    documents = [*texts(5, words=33), *texts(3, words=7, seed=4)]
    comparison = compare(subject("base", base), [subject("other", other)], documents, plan=WITHOUT_SPEED)
    sample = draw_sample(documents, tiny_tokenizer(), tokens=400, window=32, passage=10_000)
    nll, nll_other, kl, cosine, agree, sure, hidden, right, unsure, moved, shared = ([] for _ in range(11))
    for window in sample.windows:
        ids = torch.tensor([window.token_ids])
        with torch.no_grad():
            out, changed_out = (model(ids, output_hidden_states=True) for model in (base, other))
        a, b = (x.logits[0, :-1].double().numpy() for x in (out, changed_out))
        p, q = log_softmax(a, -1), log_softmax(b, -1)
        rows, targets = np.arange(len(p)), np.array(window.token_ids[1:])
        nll.extend(-p[rows, targets])
        nll_other.extend(-q[rows, targets])
        kl.extend((np.exp(p) * (p - q)).sum(-1))
        cosine.extend((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1))
        agree.extend(a.argmax(-1) == b.argmax(-1))
        sure.extend(np.exp(q.max(-1)))
        right.extend(q.argmax(-1) == targets)
        unsure.extend(-(np.exp(q) * q).sum(-1))
        moved.extend((np.exp(q.max(-1)) - np.exp(p.max(-1))) ** 2)
        shared.extend(len({*x} & {*y}) / 5 for x, y in zip(a.argsort(-1)[:, -5:], b.argsort(-1)[:, -5:], strict=True))
        states = [(x[0, :-1].double(), y[0, :-1].double()) for x, y in zip(out[-1], changed_out[-1], strict=True)]
        hidden.extend(np.stack([torch.cosine_similarity(x, y) for x, y in states], axis=1))
    model, difference = comparison.others[0].model, comparison.others[0].difference
    close = {"rel": 1e-6}
    assert comparison.text.predictions == len(kl) == sum(part.predictions for part in comparison.base.calibration)
    assert comparison.base.perplexity.value == pytest.approx(math.exp(np.mean(nll)), **close)
    assert model.perplexity.value == pytest.approx(math.exp(np.mean(nll_other)), **close)
    assert difference.perplexity_ratio.value == pytest.approx(math.exp(np.mean(nll_other) - np.mean(nll)), **close)
    assert difference.kl.value == pytest.approx(np.mean(kl), **close)
    assert difference.logit_cosine.value == pytest.approx(np.mean(cosine), **close)
    assert difference.top1_agreement.value == pytest.approx(np.mean(agree), **close)
    assert model.confidence.value == pytest.approx(np.mean(sure), **close)
    assert model.accuracy.value == pytest.approx(np.mean(right), **close)
    assert model.entropy.value == pytest.approx(np.mean(unsure), **close)
    assert difference.confidence_squared.value == pytest.approx(np.mean(moved), **close)
    assert difference.top5_agreement.value == pytest.approx(np.mean(shared), **close)
    np.testing.assert_allclose([e.value for e in difference.hidden_cosine], np.mean(hidden, axis=0), rtol=1e-6)
    histogram = difference.kl_histogram
    wanted, _ = np.histogram(kl, bins=histogram.edges)
    assert histogram.counts == wanted.tolist()
    assert histogram.below + histogram.above + sum(histogram.counts) == len(kl)
    at = np.concatenate([np.arange(window.predictions) for window in sample.windows])
    for part in difference.kl_by_position:
        inside = (part.first <= at) & (at <= part.last)
        assert part.predictions == inside.sum()
        assert part.mean == pytest.approx(np.mean(np.array(kl)[inside]), **close)
    assert difference.kl_by_position[-1].last == max(at)
    assert difference.kl.low < difference.kl.value < difference.kl.high


def test_kl_by_position_is_at_the_right_place() -> None:
    """Equal models but for the rotary base, which cannot matter at position 0: there attention sees one token."""
    base = tiny_model()
    other = tiny_model(rope_parameters={"rope_theta": 2.0, "rope_type": "default"})
    other.load_state_dict(base.state_dict())
    comparison = compare(subject("base", base), [subject("other", other)], texts(), plan=WITHOUT_SPEED)
    bins = comparison.others[0].difference.kl_by_position
    assert (bins[0].first, bins[0].last) == (0, 0)
    assert bins[0].mean < 1e-12
    assert all(part.mean > 1e-6 for part in bins[1:])
    assert [part.first for part in bins[1:]] == [part.last + 1 for part in bins[:-1]]
    assert bins[-1].last == 30


def test_a_model_against_itself_gives_exactly_nothing() -> None:
    model = tiny_model()
    comparison = compare(subject("base", model), [subject("again", model)], texts(), plan=WITHOUT_SPEED)
    difference = comparison.others[0].difference
    assert difference.signal is not None
    assert difference.gradient is not None
    assert len(difference.hidden_cosine) == len(difference.hidden_cka) == len(difference.signal.input_ratio) == 4
    ones = [
        difference.perplexity_ratio, difference.logit_cosine, difference.top1_agreement, difference.top5_agreement,
        *difference.hidden_cosine, *difference.hidden_cka, *difference.signal.input_ratio, difference.gradient.total,
        *(ratio for family in difference.gradient.families for ratio in family.ratio),
    ]  # fmt: skip
    zeros = [
        difference.kl, difference.negative_log_likelihood, difference.confidence, difference.confidence_squared,
        difference.entropy, difference.accuracy, difference.calibration_error, *difference.signal.zero,
        *difference.signal.near_zero,
    ]  # fmt: skip
    assert {(each.value, each.low, each.high) for each in ones} == {(1, 1, 1)}
    assert {(each.value, each.low, each.high) for each in zeros} == {(0, 0, 0)}
    assert difference.weights is not None
    assert difference.weights.equal_bytes == difference.weights.parameters
    assert difference.kl_histogram.below == comparison.text.predictions
    assert all(part.mean == 0 for part in difference.kl_by_position)
    assert difference.changed_settings == {}
    for generated in comparison.generated:
        ours, theirs = generated.continuations
        assert ours.text == theirs.text
        assert theirs.shared_characters == len(theirs.text)


@pytest.mark.parametrize("broken", [False, True])
def test_measuring_leaves_no_trace(broken: bool) -> None:
    """Logits bit-equal before and after, no hook left, each module's mode as it was; also after an error."""
    model, other = tiny_model(), changed(tiny_model(), 0.1)
    ids = torch.arange(3, 30)[None]
    before = model(ids).logits
    model.model.layers[1].train()
    model.model.norm.register_forward_hook(lambda *_: None)
    hooks = [dict(module._forward_hooks) for module in model.modules()]
    modes = [module.training for module in model.modules()]
    names = [set(vars(module)) for module in model.modules()]
    if broken:
        other.lm_head.weight.data.fill_(torch.nan)
        with pytest.raises(ValueError, match="not numbers"):
            compare(subject("other", other), [subject("base", model)], texts(), plan=WITHOUT_SPEED)
    else:
        compare(subject("base", model), [subject("other", other)], texts(), plan=QUICK)
    assert [dict(module._forward_hooks) for module in model.modules()] == hooks
    assert [module.training for module in model.modules()] == modes
    assert [set(vars(module)) for module in model.modules()] == names
    model.eval()
    assert torch.equal(model(ids).logits, before)
    again = model(ids, output_hidden_states=True)  # and transformers can still give its hidden states
    assert len(again.hidden_states) == 4


def test_the_base_reads_each_window_once() -> None:
    base, reads = tiny_model(), []
    others = [subject(f"other {n}", changed(base, 0.1 * n)) for n in (1, 2, 3)]
    base.register_forward_hook(lambda *_: reads.append(1))
    plan = WITHOUT_SPEED.model_copy(update={"prompts": (), "gradient": None})
    comparison = compare(subject("base", base), others, texts(), plan=plan)
    assert len(reads) == 1 + comparison.text.windows  # one to find its head
    assert len({other.difference.kl.value for other in comparison.others}) == 3


def test_one_by_one_gives_the_same_numbers_and_lets_models_go(tmp_path: Path) -> None:
    base = tiny_model()
    plan = WITHOUT_SPEED.model_copy(update={"weights": False})
    alive: list[weakref.ref] = []

    def load(n: int) -> Subject:
        gc.collect()
        assert not any(model() for model in alive), "a measured model is still held"
        other = made(n)
        alive.append(weakref.ref(other.model))
        return other

    def made(n: int) -> Subject:
        return subject(f"model {n}", changed(base, 0.1 * n))

    apart = compare_one_by_one(
        [functools.partial(load, n) for n in range(4)], texts(), plan=plan, ledger=Ledger(tmp_path)
    )
    together = compare(made(0), [made(n) for n in (1, 2, 3)], texts(), plan=plan)
    assert len(alive) == 4
    assert without_time(apart) == without_time(together)
    assert len(apart.generated[0].continuations) == 4


class Interrupted(BaseException):
    """Ctrl-C at a chosen window."""


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read twice but the windows since the last note, and every number is that of a run in one go."""
    base, other = tiny_model(), changed(tiny_model(), 0.2)
    reads: list[int] = []
    read = prediction.LiveReader.read

    def counted(self, window, number):
        reads.append(number)
        if len(reads) == 9:
            raise Interrupted
        return read(self, window, number)

    def run(ledger: Ledger):
        return compare(subject("base", base), [subject("other", other)], texts(), plan=WITHOUT_SPEED, ledger=ledger)

    monkeypatch.setattr(experiment, "KEEP_SECONDS", 0.0)
    monkeypatch.setattr(prediction.LiveReader, "read", counted)
    with pytest.raises(Interrupted):
        run(Ledger(tmp_path))
    interrupted = run(Ledger(tmp_path))
    assert sorted(reads)[: 2 * 5] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 4][: 2 * 5]
    again = run(Ledger(tmp_path))
    assert without_time(interrupted) == without_time(again) == without_time(run(Ledger()))
    finished = [n for n in reads if n == 0]
    assert len(finished) == 4  # the run in one go, and the first; the others took the pass over


def test_no_logits_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a model runs, only the models before it have tensors in memory; after a window nothing that they gave is."""
    given: list[tuple[weakref.ref, ...]] = []
    before: list[int] = []
    after: list[int] = []
    read = prediction.LiveReader.read

    def living() -> int:
        gc.collect()
        return sum(any(tensor() is not None for tensor in tensors) for tensors in given)

    def watched(self, window, number):
        before.append(living())
        seen = read(self, window, number)
        given.append(tuple(map(weakref.ref, seen.states)))
        return seen

    monkeypatch.setattr(prediction.LiveReader, "read", watched)
    subjects = [subject(f"model {n}", changed(tiny_model(), 0.1 * n)) for n in (0, 1, 2)]
    sample = draw_sample(texts(), tiny_tokenizer(), tokens=100, window=32, passage=10_000)
    with at_rest(subjects[0].model), at_rest(subjects[1].model), at_rest(subjects[2].model):
        base, *others = (prediction.LiveReader(each, sample) for each in subjects)
        tallies = prediction.Tallies.empty(sample, 2)
        windows = list(enumerate(sample.windows))
        after.extend(living() for _ in prediction.measure_windows(base, others, windows, tallies))
    assert before == [0, 1, 2] * len(sample.windows)
    assert after == [0] * len(sample.windows)


def test_models_of_other_depth_are_compared_without_hidden_states() -> None:
    comparison = compare(
        subject("deep", tiny_model()),
        [subject("flat", tiny_model(num_hidden_layers=1))],
        texts(),
        plan=WITHOUT_SPEED,
    )
    difference = comparison.others[0].difference
    assert difference.hidden_cosine == []
    assert difference.changed_settings["num_hidden_layers"] == ["3", "1"]
    assert any(note.startswith("flat: no cosine similarity of hidden states") for note in comparison.notes)


def test_few_units_and_short_text_are_noted() -> None:
    base, other = tiny_model(), changed(tiny_model(), 0.1)
    one = compare(subject("a", base), [subject("b", other)], [Text("x", "w1 w2 w3")], plan=WITHOUT_SPEED)
    assert one.others[0].difference.kl.low is None
    assert any("only one unit" in note for note in one.notes)
    assert any("holds only 3 tokens" in note for note in one.notes)
    few = compare(subject("a", base), [subject("b", other)], texts(3), plan=WITHOUT_SPEED)
    assert any("only 3 units" in note for note in few.notes)


def test_broken_logits_name_the_layer_and_the_rest_stands() -> None:
    other = tiny_model()
    other.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    models = [subject("bad", other), subject("good", changed(tiny_model(), 0.1))]
    comparison = compare(subject("base", tiny_model()), models, texts(), plan=QUICK)
    assert [found.model.name for found in comparison.others] == ["good"]
    assert [(failure.model, failure.part) for failure in comparison.failures] == [("bad", "prediction")]
    assert comparison.failures[0].message == (
        "bad gives logits that are not numbers (window 0, position 0 of it); the first hidden state that is not "
        "finite is the output of layer 1"
    )
    assert comparison.others[0].difference.decode_ratio is not None
    head = tiny_model()
    head.lm_head.weight.data[5, 5] = torch.inf
    with pytest.raises(ValueError, match=r"base gives logits.*finite, so it is the output projection"):
        compare(subject("base", head), [subject("good", tiny_model())], texts(), plan=WITHOUT_SPEED)


def test_a_token_that_is_ruled_out_is_no_fault() -> None:
    base = tiny_model()
    base.register_forward_hook(rule_out_last)
    comparison = compare(subject("base", base), [subject("same", base)], texts(), plan=WITHOUT_SPEED)
    assert comparison.others[0].difference.kl.value == 0
    assert comparison.base.perplexity.value == math.inf  # the text holds that token
    assert comparison.others[0].difference.perplexity_ratio.value == 1
    assert type(comparison).model_validate_json(comparison.model_dump_json()) == comparison


def rule_out_last(module: torch.nn.Module, args: object, out):
    out.logits[..., -1] = -torch.inf
    return out


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            subject("x", tiny_model(), tiny_tokenizer(words=[f"v{n}" for n in range(120)])),
            "x has another vocabulary than base: 123 and 123 entries, 120 of the base's are missing",
        ),
        (
            subject("x", tiny_model(), tiny_tokenizer(start=True)),
            "x cuts the same text into other tokens than base, although the vocabularies are equal",
        ),
        (subject("x", tiny_model(vocab_size=128)), "x predicts over 128 entries and base over 123"),
        (subject("x", tiny_model(max_position_embeddings=16)), "a window of 32 tokens is more than x can read .16."),
        (subject("base", tiny_model()), "two models are called 'base'"),
    ],
)
def test_models_that_cannot_be_compared_are_refused(other: Subject, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(subject("base", tiny_model()), [other], texts(), plan=WITHOUT_SPEED)


def test_nothing_to_do_is_refused() -> None:
    base = subject("base", tiny_model())
    with pytest.raises(ValueError, match="nothing to compare with the base"):
        compare(base, [], texts(), plan=WITHOUT_SPEED)
    with pytest.raises(ValueError, match="prompt 2 is empty"):
        compare(base, [base], texts(), plan=Plan(prompts=("w1", "  ")))


def test_speed_is_measured_in_turns_under_one_plan() -> None:
    models, order = [tiny_model(), changed(tiny_model(), 0.1)], []
    for name, model in zip("ab", models, strict=True):
        model.register_forward_hook(
            lambda module, args, kwargs, out, name=name: order.append((name, kwargs["input_ids"].shape)),
            with_kwargs=True,
        )
    plan = SpeedPlan(prompt_tokens=8, new_tokens=3, repeats=2, warmups=1, batch=2)
    with at_rest(models[0]), at_rest(models[1]):
        speeds = measure_speed([subject("a", models[0]), subject("b", models[1])], range(3, 8), plan)
    one_run = [(2, 8), (2, 1), (2, 1)]  # the prompt at once, then one token at a time: the KV cache is on
    assert [(name, tuple(shape)) for name, shape in order] == [(n, s) for n in "ababab" for s in one_run]
    for speed, kind in itertools.product(speeds, ("prefill", "decode")):
        rate = getattr(speed, kind)
        assert len(rate.runs) == 2
        assert 0 < rate.low <= rate.median <= rate.high


def test_timed_runs_write_all_their_tokens_even_if_the_model_would_stop() -> None:
    model, steps = tiny_model(), []
    prompt = list(range(3, 11))
    first = int(model(torch.tensor([prompt])).logits[0, -1].argmax())
    model.generation_config.eos_token_id = first
    model.register_forward_hook(lambda *_: steps.append(1))
    with at_rest(model):
        measure_speed([subject("a", model)], prompt, SpeedPlan(prompt_tokens=8, new_tokens=5, repeats=1, warmups=0))
    assert len(steps) == 5


@pytest.mark.parametrize(("n", "low", "high"), [(6, 0, 5), (9, 1, 7), (20, 5, 14)])
def test_median_interval_takes_the_textbook_order_statistics(n: int, low: int, high: int) -> None:
    """Ranks from the usual table of sign-test intervals at 95 % (Conover)."""
    estimate = median_interval([float(value) for value in reversed(range(n))])
    assert (estimate.value, estimate.low, estimate.high) == ((n - 1) / 2, low, high)


def test_no_interval_for_a_median_of_five() -> None:
    assert median_interval([1.0, 2.0, 3.0, 4.0, 5.0]).low is None
    same = median_interval([1.0] * 6)
    assert (same.value, same.low, same.high) == (1, 1, 1)
