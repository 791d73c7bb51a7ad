"""What a heal is made of: losses, cached teachers, trainable parts, blending, windows of text."""

from __future__ import annotations

import copy
import json
import pickle

import families
import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax
from tiny_llama import Text, texts, tiny_model, tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import neuroweave
from neuroweave.diagnose.probes.head import find_head
from neuroweave.surgery.apply import ActivatedProjection
from neuroweave.surgery.blending import Blending
from neuroweave.surgery.patching import unpatch
from neuroweave.training.distillation import (
    chunked_mean,
    full_kl,
    hidden_distance,
    next_token_loss,
    top_of,
    topk_kl,
)
from neuroweave.training.distillation_loop import Windows, predictor
from neuroweave.training.healing_inputs import split_windows
from neuroweave.training.teacher_logits import cache_teacher_logits
from neuroweave.training.trainable import lora_targets, select

SIZES = [(1, 7), (7, 123), (123, 7)]


def two(rows: int, vocabulary: int, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(rows)
    return tuple(scale * torch.randn(rows, vocabulary, generator=draw) for _ in range(2))


def mlp(activation: object, site: object = "mlp") -> dict:
    return {"sites": [{"site": site, "activation": activation}]}


# --------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize(("rows", "vocabulary"), SIZES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_full_kl_is_scipys(rows, vocabulary, temperature):
    ours, theirs = two(rows, vocabulary)
    p, q = (softmax(x.double().numpy() / temperature, axis=-1) for x in (theirs, ours))
    expected = temperature**2 * rel_entr(p, q).sum(-1)
    np.testing.assert_allclose(full_kl(ours, theirs, temperature=temperature), expected, rtol=1e-4, atol=1e-6)
    assert full_kl(theirs.bfloat16(), theirs.bfloat16()).abs().max() < 1e-6


@pytest.mark.parametrize(("rows", "vocabulary"), SIZES)
@pytest.mark.parametrize("k", [1, 5])
def test_topk_kl_is_that_of_buckets(rows, vocabulary, k):
    ours, theirs = two(rows, vocabulary)
    p, q = (softmax(x.double().numpy() / 1.5, axis=-1) for x in (theirs, ours))
    first = np.argsort(-p, axis=-1)[:, :k]
    buckets = [np.take_along_axis(x, first, -1) for x in (p, q)]
    buckets = [np.concatenate([part, 1 - part.sum(-1, keepdims=True)], -1) for part in buckets]
    kept = top_of(theirs, k, temperature=1.5)
    np.testing.assert_array_equal(kept[0].sort().values, np.sort(first, -1))
    found = topk_kl(ours, *kept, temperature=1.5)
    np.testing.assert_allclose(found, 1.5**2 * rel_entr(*buckets).sum(-1), rtol=1e-4, atol=1e-6)
    assert (found <= full_kl(ours, theirs, temperature=1.5) + 1e-6).all()


@pytest.mark.parametrize(("rows", "vocabulary"), SIZES)
def test_all_tokens_kept_is_the_full_kl(rows, vocabulary):
    ours, theirs = two(rows, vocabulary)
    torch.testing.assert_close(topk_kl(ours, *top_of(theirs, vocabulary)), full_kl(ours, theirs), rtol=1e-5, atol=1e-6)


def test_a_rest_of_almost_no_mass_counts_for_nothing():
    ours = torch.randn(3, 9).requires_grad_()
    theirs = torch.full((3, 9), -300.0)
    theirs[:, 2] = 300.0
    loss = topk_kl(ours, *top_of(theirs, 1))
    torch.testing.assert_close(loss, -ours.log_softmax(-1)[:, 2])
    loss.sum().backward()
    assert torch.isfinite(ours.grad).all()


@pytest.mark.parametrize("kind", ["full", "topk"])
def test_gradients_are_those_of_float64_autograd(kind):
    ours, theirs = two(7, 31)
    ours.requires_grad_()
    kept = top_of(theirs, 5)
    (full_kl(ours, theirs) if kind == "full" else topk_kl(ours, *kept)).sum().backward()
    exact = ours.detach().double().requires_grad_()
    log_q, p = exact.log_softmax(-1), theirs.double().softmax(-1)
    if kind == "topk":
        q = log_q.exp()
        parts = [(x.gather(-1, kept[0]), 1 - x.gather(-1, kept[0]).sum(-1, keepdim=True)) for x in (p, q)]
        p, log_q = torch.cat(parts[0], -1), torch.cat(parts[1], -1).log()
    nn.functional.kl_div(log_q, p, reduction="sum").backward()
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


def test_hidden_distance_is_relative_and_takes_any_dtype():
    draw = np.random.default_rng(0)
    ours, theirs = ([draw.normal(size=(2, 7, 5)) for _ in range(3)] for _ in range(2))
    theirs[0][0, 0] *= 1e4  # an attention sink: it counts as one position, not as all
    expected = np.mean([(((a - b) ** 2).sum(-1) / (b**2).sum(-1)).mean() for a, b in zip(ours, theirs, strict=True)])
    found = hidden_distance([torch.tensor(x) for x in ours], [torch.tensor(x).float() for x in theirs])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    mixed = hidden_distance([torch.tensor(x).bfloat16() for x in ours], [torch.tensor(x) for x in theirs])
    np.testing.assert_allclose(mixed, expected, rtol=2e-2)
    with pytest.raises(ValueError, match="3 layers of the student, 2 of the teacher"):
        hidden_distance([torch.zeros(1, 2, 3)] * 3, [torch.zeros(1, 2, 3)] * 2)
    with pytest.raises(ValueError, match="where both have the same size"):
        hidden_distance([torch.zeros(1, 2, 3)], [torch.zeros(1, 2, 4)])


def test_next_token_loss_skips_ignored_labels():
    logits, _ = two(4, 9)
    labels = torch.tensor([3, -100, 0, 8])
    expected = (
        -log_softmax(logits.double().numpy(), axis=-1)[np.arange(4), labels.clamp_min(0)] * (labels != -100).numpy()
    )
    np.testing.assert_allclose(next_token_loss(logits, labels), expected, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 7, 123, 500])
@pytest.mark.parametrize("trained", ["both", "states", "head"])
def test_a_chunked_mean_has_the_gradients_of_the_whole(rows, trained):
    torch.manual_seed(0)
    head, states, theirs = nn.Linear(6, 31), torch.randn(123, 6), torch.randn(123, 31)
    head.requires_grad_(trained != "states")
    states.requires_grad_(trained != "head")
    seen = []

    def losses(part_ND, part):
        seen.append(len(part_ND))
        return full_kl(head(part_ND), theirs[part])

    chunked = chunked_mean(losses, states, rows=rows, parameters=list(head.parameters()))
    (3 * chunked).backward()
    assert max(seen) <= rows
    assert sum(seen) == 123
    found = [each.grad for each in (states, *head.parameters())]
    for each in (states, *head.parameters()):
        each.grad = None
    whole = full_kl(head(states), theirs).mean()
    (3 * whole).backward()
    torch.testing.assert_close(chunked, whole)
    for each, gradient in zip((states, *head.parameters()), found, strict=True):
        torch.testing.assert_close(gradient, each.grad, rtol=1e-4, atol=1e-7)
    with torch.no_grad():
        torch.testing.assert_close(chunked_mean(losses, states, rows=rows), whole)


@pytest.mark.parametrize("settings", [{}, {"tie_word_embeddings": True}])
def test_a_predictor_in_two_parts_is_the_model(settings):
    model, ids = tiny_model(**settings), torch.arange(3, 23).reshape(2, 10)
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True)
        for find in (find_head, None):
            parts = predictor(model, ids, find)
            states, layers = parts.states(model, ids, hidden=True)
            torch.testing.assert_close(parts.logits(states), expected.logits)
            assert all(map(torch.equal, layers, expected.hidden_states[1:]))
            assert (parts.head is None) == (find is None)


# -------------------------------------------------------------------------------------------------- cached teachers


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_cached_logits_are_the_live_ones(tmp_path, dtype):
    teacher, rows = tiny_model(), torch.arange(3, 45).reshape(3, 14)
    calls = []

    @torch.no_grad()
    def logits_of(row):
        calls.append(row)
        return teacher(row).logits

    def cache(fingerprint="a", k=9, of=logits_of):
        return cache_teacher_logits(
            tmp_path / "cache", rows, of, k=k, fingerprint=fingerprint, dtype=dtype, temperature=2.0
        )

    cached = cache()
    ours, _ = two(2 * 14, 123)
    chosen = cached.at([2, 0])
    assert [each.shape for each in chosen] == [(2, 14, 9), (2, 14, 9), (2, 14)]
    live = top_of(logits_of(rows[[2, 0]]).flatten(0, 1), 9, temperature=2.0)
    close = {"rtol": 1e-3, "atol": 1e-3} if dtype == "float16" else {"rtol": 0, "atol": 1e-6}
    assert torch.equal(chosen[0].flatten(0, 1).long(), live[0])
    torch.testing.assert_close(chosen[1].flatten(0, 1).float(), live[1], **close)
    torch.testing.assert_close(
        topk_kl(ours, *(each.flatten(0, 1) for each in chosen), temperature=2.0), topk_kl(ours, *live, temperature=2.0),
        **close,
    )  # fmt: skip
    calls.clear()
    cache()
    assert not calls
    cache(fingerprint="b")
    assert len(calls) == 3
    ids = tmp_path / "cache" / "ids.npy"
    ids.write_bytes(ids.read_bytes()[:200])
    cache(fingerprint="b")
    assert len(calls) == 6
    with pytest.raises(ValueError, match="the 124 most likely tokens of a vocabulary of 123"):
        cache(k=124)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]  # the refused one left the old as it was
    assert json.loads((tmp_path / "cache" / "teacher_logits.json").read_text())["fingerprint"] == "b"


# -------------------------------------------------------------------------------------------------- trainable parts


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_mixtures_alone():
    model = tiny_model()
    neuroweave.patch(model, mlp({"mixture": ["silu", "relu", {"swish_beta": {"beta": 1.5}}]}))
    chosen = select(model, "mixtures")
    expected = {f"model.layers.{layer}.mlp.act_fn.{name}" for layer in range(3) for name in ("gating_logits", "beta")}
    assert trained(model) == set(chosen.names) == expected
    assert chosen.count == 3 * 48 * 4
    assert trained(chosen.finish()) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3", "gpt_neox", "gemma3_text", "lfm2", "mixtral"])
def test_mlps_are_found_by_name(family):
    model = families.tiny_model(family)
    names = select(model, "mlp").names
    layers = {
        name for name, _ in model.named_parameters() if ".mlp." in name or ".feed_forward." in name or ".fc" in name
    }
    assert set(names) == layers
    assert not any("attn" in name or "norm" in name or "embed" in name for name in names)


def test_all_counts_a_tied_head_once():
    tied, untied = tiny_model(tie_word_embeddings=True), tiny_model()
    assert select(untied, "all").count - select(tied, "all").count == 123 * 32
    assert trained(tied) == {name for name, _ in tied.named_parameters()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora_merges_to_the_unmerged_logits(family, tmp_path):
    model = families.tiny_model(family)
    site = "attention.q" if family == "llama" else "mlp.up"
    neuroweave.patch(model, mlp("phantom", ["mlp", site]))
    around = [name for name, module in model.named_modules() if isinstance(module, ActivatedProjection)]
    targets = lora_targets(model)
    assert around
    assert not set(around) & set(targets)
    assert model.get_output_embeddings() not in {model.get_submodule(name) for name in targets}
    chosen = select(model, "lora", lora_rank=3)
    assert len(chosen.names) == 2 * len(targets)
    assert all("lora_" in name for name in chosen.names)
    torch.manual_seed(0)
    for name, parameter in chosen.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3)
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        adapted = chosen.model(ids).logits
    merged = chosen.finish()
    merged.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, adapted, rtol=1e-4, atol=1e-4)
    assert {name for name, _ in again.named_parameters()} == {name for name, _ in merged.named_parameters()}
    assert not any("lora" in name for name, _ in merged.named_parameters())


def test_what_cannot_be_trained_is_refused():
    model = tiny_model()
    for part, message in (
        ("mixtures", "LlamaForCausalLM has no learned mixture, so nothing would be trained"),
        ("head", "'head' is not known; choose from mixtures, mlp, lora, all"),
    ):
        with pytest.raises(ValueError, match=message):
            select(model, part)
    with pytest.raises(ValueError, match="adapters of rank 0"):
        select(model, "lora", lora_rank=0)
    assert trained(model) == {name for name, _ in model.named_parameters()}


# --------------------------------------------------------------------------------------------------------- blending

EVERYWHERE = {
    "sites": [
        {"site": "mlp", "activation": {"segments": ["relu", "tanh"]}},
        {"site": ["attention.q", "attention.o", "mlp.up"], "activation": "phantom"},
        {"site": ["embedding", "head"], "activation": "silu_tanh"},
    ]
}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 19).reshape(2, 8)).logits


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_a_blend_goes_from_the_teacher_to_the_patched_model(family):
    teacher, student = families.tiny_model(family), families.tiny_model(family)
    student.load_state_dict(teacher.state_dict())
    recipe = copy.deepcopy(EVERYWHERE)
    if family != "llama":  # fused projections: an activation on a part of the features
        recipe["sites"][1]["site"] = ["attention.q", "attention.o"]
    neuroweave.patch(student, recipe)
    patched, names = logits(student), list(student.state_dict())
    blending = Blending(student, teacher)
    assert torch.equal(logits(student), patched)
    blending.set(0.0)
    assert torch.equal(logits(student), logits(teacher))
    assert list(student.state_dict()) == names
    middle = {}
    for amount in (0.25, 0.75):
        blending.set(amount)
        middle[amount] = (logits(student) - logits(teacher)).norm()
    assert 0 < middle[0.25] < middle[0.75]
    copied = pickle.loads(pickle.dumps(student))
    assert torch.equal(logits(copied), logits(student))
    blending.undo()
    blending.undo()
    assert torch.equal(logits(student), patched)
    unpatch(student)
    assert torch.equal(logits(student), logits(teacher))


def test_a_blend_is_the_weighted_sum_and_gradients_flow_through_both():
    teacher, student = tiny_model(num_hidden_layers=1), tiny_model(num_hidden_layers=1)
    neuroweave.patch(student, mlp("relu"))
    blending = Blending(student, teacher)
    blending.set(0.3)
    x = torch.linspace(-2, 2, 48).requires_grad_()
    module = student.model.layers[0].mlp.act_fn
    y = module(x)
    y.sum().backward()
    exact = x.detach().double().requires_grad_()
    expected = 0.7 * nn.functional.silu(exact) + 0.3 * exact.relu()
    expected.sum().backward()
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=0, atol=1e-6)


def test_a_blend_brings_the_weights_of_an_activation_along():
    teacher = families.tiny_model("apertus")
    for layer in teacher.model.layers:
        layer.mlp.act_fn.alpha_p.data.fill_(1.7)
    student = families.tiny_model("apertus")
    student.load_state_dict(teacher.state_dict())
    neuroweave.patch(student, mlp("relu"))
    blending = Blending(student, teacher)
    blending.set(0.0)
    assert torch.equal(logits(student), logits(teacher))
    assert not any("alpha_p" in name for name, _ in student.named_parameters())


def test_blends_that_cannot_be_are_refused():
    teacher, student = tiny_model(), tiny_model()
    with pytest.raises(ValueError, match="is not a patched model; there is nothing to blend"):
        Blending(student, teacher)
    neuroweave.patch(student, mlp("relu"))
    with pytest.raises(ValueError, match="the teacher is patched itself"):
        Blending(student, student)
    with pytest.raises(ValueError, match=r"a blend of 1\.5; give a number from 0"):
        Blending(student, teacher).set(1.5)


# ------------------------------------------------------------------------------------------------------------ text


def test_windows_cover_every_document_and_hold_some_out():
    documents = texts(count=26, words=45)
    split = split_windows(documents, tiny_tokenizer(start=True), window=16, held_out_tokens=33)
    assert split.training.shape == (24 * 3, 16)
    assert split.held_out.shape == (2, 16)
    assert (split.documents, split.held_out_documents) == (24, 2)
    assert (split.training[:, 0] == 1).all()  # the start token
    tokenizer = tiny_tokenizer()
    bodies = [tokenizer(each.text)["input_ids"] for each in documents]
    held = [
        body
        for body in bodies
        if any(w[1:].tolist() == body[at : at + 15] for w in split.held_out for at in (0, 15, 30))
    ]
    assert 1 <= len(held) <= 2
    for body in bodies:
        first = [window for window in split.training.tolist() if window[1:] == body[:15]]
        last = [window for window in split.training.tolist() if window[1:] == body[-15:]]
        assert bool(first) == bool(last)
    again = split_windows(documents[::-1] + documents[:3], tiny_tokenizer(start=True), window=16, held_out_tokens=33)
    assert torch.equal(again.training, split.training)
    assert torch.equal(again.held_out, split.held_out)


def test_text_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match="1 of 2 different documents fill a window of 16 tokens; heal needs two"):
        split_windows([*texts(1), Text("b", "w1 w2")], tiny_tokenizer(), window=16, held_out_tokens=64)
    with pytest.raises(ValueError, match="a window of 1 tokens predicts nothing"):
        split_windows(texts(4), tiny_tokenizer(), window=1, held_out_tokens=64)


def test_each_epoch_is_a_permutation_of_its_own():
    rows = Windows(torch.arange(70).reshape(7, 10), seed=3)
    epochs = [[rows.row(7 * epoch + place)["row"] for place in range(7)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    row = rows.row(11)
    assert row["labels"].tolist() == [-100, *row["input_ids"][1:].tolist()]


def test_gpt2_has_no_logits_to_keep_trouble():
    """A family with dropout and learned positions."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=24, n_layer=2, n_head=4, n_positions=32)).eval()
    ids = torch.arange(3, 13)[None]
    parts = predictor(model, ids, find_head)
    with torch.no_grad():
        torch.testing.assert_close(parts.logits(parts.states(model, ids)[0]), model(ids).logits)
