"""Continuations: greedy and sampled, against plain forward passes and SciPy; random state, memory, refusals."""

from __future__ import annotations

import math
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from tiny_llama import changed, subject, tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from neuroweave.diagnose.probes import generation
from neuroweave.diagnose.probes.generation import (
    Written,
    check_prompts,
    continue_prompt,
    continue_prompts,
    join_written,
    token_texts,
    write_all,
)
from neuroweave.diagnose.results.plan import Plan, SamplingPlan
from neuroweave.diagnose.subject import Subject, at_rest
from neuroweave.text.sample import encode

PROMPTS = ("w1 w2 w3", "w50 w7 w8 w9 w10 w11 w12", "w5")
PLAN = Plan(prompts=PROMPTS, new_tokens=7)
HOT = PLAN.model_copy(update={"sampling": SamplingPlan(seed=3, temperature=5.0, top_p=1.0)})


def naive(model: Any, prompt_ids: list[int], token_ids: list[int]) -> tuple[list[float], list[float], list[int]]:
    """Top-1 probability, cosines of consecutive final states and greedy choices, by one forward pass, in float64."""
    with torch.inference_mode():
        output = model(torch.tensor([prompt_ids + token_ids]), output_hidden_states=True)
    at = slice(len(prompt_ids) - 1, len(prompt_ids) + len(token_ids) - 1)
    logits, states = (value[0, at].double().numpy() for value in (output.logits, output.hidden_states[-1]))
    norms = np.linalg.norm(states, axis=1)
    turned = [
        float(a @ b / norm_a / norm_b)
        for a, b, norm_a, norm_b in zip(states, states[1:], norms, norms[1:], strict=False)
    ]
    return np.exp(log_softmax(logits, axis=1)).max(axis=1).tolist(), turned, logits.argmax(axis=1).tolist()


@pytest.mark.parametrize("mode", ["greedy", "sampled"])
def test_numbers_match_one_forward_pass(mode: generation.Mode) -> None:
    """Confidence and cosines at every step with the cache are those of a pass over the whole text, whatever the
    temperature; greedy tokens are the likeliest."""
    model = tiny_model(3)
    one = subject("one", model)
    for prompt in PROMPTS:
        with at_rest(model):
            written = continue_prompt(one, prompt, HOT, mode)
        prompt_ids = encode(one.tokenizer, prompt)
        confidence, turned, likeliest = naive(model, prompt_ids, written.token_ids)
        assert len(written.token_ids) == 7 or written.token_ids[-1] == 2
        assert written.confidence == pytest.approx(confidence, rel=1e-4)
        assert written.state_cosine == pytest.approx(turned, abs=1e-5)
        assert len(written.state_cosine) == len(written.token_ids) - 1
        if mode == "greedy":
            assert written.token_ids == likeliest
        else:
            assert written.token_ids != likeliest
        assert Written.model_validate_json(written.model_dump_json()) == written


def test_sampling_is_seeded_and_leaves_the_random_state() -> None:
    one = subject("one", tiny_model())
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = write_all(one, HOT)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12)
    assert write_all(one, HOT) == first
    other_seed = HOT.model_copy(update={"sampling": SamplingPlan(seed=4, temperature=5.0, top_p=1.0)})
    again = write_all(one, other_seed)
    assert [written.mode for written in first] == ["greedy"] * 3 + ["sampled"] * 3
    assert again[:3] == first[:3]
    assert all(a.token_ids != b.token_ids for a, b in zip(again[3:], first[3:], strict=True))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (2.0, 1.0), (0.7, 0.6)])
def test_sampled_tokens_have_the_distribution_of_the_plan(temperature: float, top_p: float) -> None:
    """First tokens of 30 seeds: those that torch draws from softmax(logits / temperature) in float64, cut at top_p."""
    model = tiny_model(1)
    model.generation_config.update(top_k=2, repetition_penalty=9.0, min_p=0.9)  # the plan, not the model, decides
    one = subject("one", model)
    logits = model(torch.tensor([encode(one.tokenizer, "w1 w2")])).logits[0, -1].detach().double().numpy() / temperature
    chances = np.exp(log_softmax(logits))
    order = np.argsort(-chances)
    kept = order[: int(np.searchsorted(np.cumsum(chances[order]), top_p)) + 1]
    cut = np.zeros_like(chances)
    cut[kept] = chances[kept] / chances[kept].sum()
    drawn, expected = [], []
    with at_rest(model):
        for seed in range(30):
            sampling = SamplingPlan(seed=seed, temperature=temperature, top_p=top_p)
            plan = Plan(prompts=("w1 w2",), new_tokens=1, sampling=sampling)
            drawn += continue_prompt(one, "w1 w2", plan, "sampled").token_ids
            start = torch.Generator().manual_seed(seed)
            expected.append(int(torch.multinomial(torch.tensor(cut, dtype=torch.float32), 1, generator=start)))
    assert drawn == expected
    assert len(set(drawn)) > 3


def test_a_model_against_itself_writes_the_same() -> None:
    model = tiny_model()
    pair = [subject("base", model), subject("same", model)]
    for generated in continue_prompts(pair, PROMPTS, HOT):
        ours, theirs = generated.continuations
        assert theirs == ours.model_copy(update={"model": "same"})
        assert theirs.shared_tokens == len(theirs.tokens)
        assert theirs.shared_characters == len(theirs.text)


def test_prompts_and_models_are_in_order_and_counted() -> None:
    base = tiny_model()
    subjects = [subject("a", base), subject("b", changed(base, 0.5)), subject("c", changed(base, 0.7))]
    calls: list[None] = []
    generated = continue_prompts(subjects, PROMPTS, PLAN, after_prompt=lambda: calls.append(None))
    assert [(g.prompt, g.mode) for g in generated] == [(p, mode) for mode in ("greedy", "sampled") for p in PROMPTS]
    assert [[c.model for c in g.continuations] for g in generated] == [["a", "b", "c"]] * 6
    assert len(calls) == 18
    greedy = continue_prompts(subjects, PROMPTS, PLAN.model_copy(update={"sampling": None}))
    assert greedy == generated[:3]


def test_model_after_model_gives_the_same_as_together() -> None:
    base = tiny_model()
    subjects = [subject("a", base), subject("b", changed(base, 0.5))]
    apart = [[Written.model_validate(w.model_dump()) for w in write_all(s, PLAN)] for s in subjects]
    assert join_written(apart, tiny_tokenizer()) == continue_prompts(subjects, PROMPTS, PLAN)
    with pytest.raises(ValueError, match="not given the same prompts in the same order"):
        join_written([apart[0], apart[1][:-1]], tiny_tokenizer())


def made(token_ids: list[int], tokenizer: PreTrainedTokenizerFast) -> Written:
    return Written(
        model="m", prompt="p", mode="greedy", token_ids=token_ids, text=str(tokenizer.decode(token_ids)),
        tokens=[""] * len(token_ids), confidence=[1.0] * len(token_ids), state_cosine=[],
    )  # fmt: skip


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that an accented letter is two."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_what_is_shared_is_counted_in_tokens_and_characters() -> None:
    tokenizer = byte_tokenizer()
    base = made(encode(tokenizer, "ab é c"), tokenizer)
    for text, tokens, characters in (
        ("ab é c", 7, 6), ("ab é d", 6, 5), ("ab ê c", 4, 3), ("x", 0, 0), ("ab", 2, 2), ("ab é cd", 7, 6),
    ):  # fmt: skip
        other = made(encode(tokenizer, text), tokenizer)
        found = join_written([[base], [other]], tokenizer)[0].continuations[1]
        assert (found.shared_tokens, found.shared_characters) == (tokens, characters), text


def test_each_token_as_text_of_its_own() -> None:
    words = tiny_tokenizer()
    assert token_texts(words, 4, [5, 6, 2]) == [" w2", " w3", " </s>"]
    letters = byte_tokenizer()
    ids = encode(letters, "a bé")
    assert token_texts(letters, ids[0], ids[1:]) == [" ", "b", "\N{REPLACEMENT CHARACTER}", "\N{REPLACEMENT CHARACTER}"]


def test_a_text_that_ends_has_as_many_numbers_as_tokens() -> None:
    model = tiny_model()
    second = continue_prompt(subject("one", model), "w1 w2 w3", PLAN, "greedy").token_ids[1]
    model.generation_config.eos_token_id = [second, 121]
    written = continue_prompt(subject("one", model), "w1 w2 w3", PLAN, "greedy")
    assert written.token_ids[-1] == second
    assert (len(written.tokens), len(written.confidence), len(written.state_cosine)) == (2, 2, 1)


def test_confidence_is_the_models_own_where_its_config_rules_out_the_top_token() -> None:
    model = tiny_model()
    free = continue_prompt(subject("one", model), "w1 w2 w3", PLAN, "greedy")
    model.generation_config.suppress_tokens = [free.token_ids[0]]
    bound = continue_prompt(subject("one", model), "w1 w2 w3", PLAN, "greedy")
    assert bound.token_ids[0] != free.token_ids[0]
    assert bound.confidence[0] == free.confidence[0]


def test_steps_beyond_the_last_token_are_left_out() -> None:
    """Where stopping is checked late (on CUDA), generate runs a step that gives no token."""
    watch = generation.Watch()
    watch.confidence, watch.state_cosine = [0.1, 0.2, 0.3], [0.4, 0.5]
    written = generation.describe_written(subject("one", tiny_model()), "w1", "greedy", [4], [5, 2], watch)
    assert (written.confidence, written.state_cosine) == ([0.1, 0.2], [0.4])


def test_one_new_token_has_no_state_before_it() -> None:
    written = continue_prompt(subject("one", tiny_model()), "w1", PLAN.model_copy(update={"new_tokens": 1}), "sampled")
    assert (len(written.token_ids), len(written.confidence), written.state_cosine) == (1, 1, [])


def test_a_model_without_a_head_module_gives_no_states() -> None:
    model = tiny_model()
    model.get_output_embeddings = lambda: None
    written = continue_prompt(subject("one", model), "w1", PLAN, "greedy")
    assert (len(written.confidence), written.state_cosine) == (7, [])


@pytest.mark.parametrize("broken", [False, True])
def test_no_hook_is_left(broken: bool) -> None:
    model = tiny_model()
    if broken:
        model.model.norm.weight.data.fill_(torch.nan)
    before = model(torch.arange(3, 9)[None]).logits
    state = torch.get_rng_state()
    if broken:
        with pytest.raises(ValueError, match="not finite"):
            write_all(subject("one", model), PLAN)
    else:
        write_all(subject("one", model), PLAN)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model(torch.arange(3, 9)[None]).logits.nan_to_num(7), before.nan_to_num(7))


def test_logits_of_no_more_than_a_step_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given, living = tiny_model(), [], []
    see_logits = generation.Watch.see_logits

    def watched(self: Any, module: nn.Module, arguments: Any, output: Any) -> None:
        living.append(sum(logits() is not None for logits in given))
        given.append(weakref.ref(output.logits))
        see_logits(self, module, arguments, output)

    monkeypatch.setattr(generation.Watch, "see_logits", watched)
    write_all(subject("one", model), PLAN)
    assert len(living) >= 30
    assert max(living) <= 1


@pytest.mark.parametrize("mode", ["greedy", "sampled"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_numbers_are_refused(mode: generation.Mode, value: float) -> None:
    model = tiny_model()

    def spoil(module: nn.Module, arguments: Any, output: Any) -> Any:
        output.logits = torch.full_like(output.logits, value)
        return output

    model.register_forward_hook(spoil)
    message = rf"^broken: after the prompt 'w50 w7' and 0 new tokens \({mode}\) the logits give no probabilities"
    with pytest.raises(ValueError, match=message):
        continue_prompt(subject("broken", model), "w50 w7", PLAN, mode)


def test_a_token_that_is_ruled_out_is_no_fault() -> None:
    model = tiny_model()

    def rule_out(module: nn.Module, arguments: Any, output: Any) -> Any:
        output.logits[..., 5:] = -math.inf
        return output

    model.register_forward_hook(rule_out)
    for mode in ("greedy", "sampled"):
        written = continue_prompt(subject("one", model), "w50 w7", HOT, mode)
        assert max(written.token_ids) < 5


def encoder() -> Subject:
    config = BertConfig(vocab_size=123, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    return subject("encoder", BertModel(config))


class Failing(nn.Linear):
    config = None

    def generate(self, *arguments: Any, **options: Any) -> Any:
        raise NotImplementedError("no cache here")


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (encoder(), r"^encoder \(BertModel\) has no generate\(\), so it cannot continue prompts; compare a causal"),
        (
            subject("broken", Failing(1, 1)),
            r"^broken \(Failing\): generate\(\) does not work on this model: no cache here$",
        ),
    ],
)
def test_models_that_cannot_generate_are_refused(one: Subject, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        continue_prompt(one, "w1", PLAN, "greedy")


def test_a_prompt_that_leaves_no_room_is_refused() -> None:
    config = GPT2Config(vocab_size=123, n_embd=8, n_layer=1, n_head=1, n_positions=10, bos_token_id=1, eos_token_id=2)
    one = subject("short", GPT2LMHeadModel(config).eval())
    assert len(continue_prompt(one, "w1 w2 w3", PLAN, "greedy").token_ids) <= 7
    with pytest.raises(
        ValueError,
        match=r"the prompt 'w1 w2 w3 w4' \(4 tokens\) and 7 new tokens are more than short can read \(10\); shorten",
    ):
        continue_prompt(one, "w1 w2 w3 w4", PLAN, "greedy")


@pytest.mark.parametrize("prompts", [("",), (" \n",)])
def test_empty_prompts_are_refused(prompts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        check_prompts(prompts)
    with pytest.raises(ValueError, match="holds no token for one"):
        continue_prompt(subject("one", tiny_model()), prompts[0], PLAN, "greedy")
