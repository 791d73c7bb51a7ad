"""Extraction against numpy in float64 on the MLPs' inputs, on tiny models and on SmolLM2; choice, windows, refusals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from families import tiny_model as tiny_family
from tiny_llama import Text, texts, tiny_model, tiny_tokenizer
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedModel

from neuroweave.checkpoint import Checkpoint
from neuroweave.checkpoint.loading import load_model, load_tokenizer
from neuroweave.surgery.neurons.bank import Bank, default_bank, default_bank_path, join_banks, load_bank, save_bank
from neuroweave.surgery.neurons.curves import Curve, curve_of, sparkline, text_plot
from neuroweave.surgery.neurons.extraction import extract_neurons, model_record
from neuroweave.surgery.neurons.neuron_statistics import FINE, ChosenStatistics, Moments
from neuroweave.surgery.neurons.selection import best, shares
from neuroweave.surgery.neurons.text_windows import Window, draw_windows, encode
from neuroweave.surgery.patching import patch
from neuroweave.text import documents
from neuroweave.text.tokens import start_tokens

SETTLED = 8
SETTINGS: dict[str, Any] = {"window": 32, "tokens": None}


def silu(x: np.ndarray) -> np.ndarray:
    return x * scipy.special.expit(x)


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def tiny_gemma() -> Gemma3ForCausalLM:
    torch.manual_seed(3)
    config = Gemma3TextConfig(
        vocab_size=123, hidden_size=32, intermediate_size=41, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, sliding_window=8, initializer_range=0.2,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval()


def reference(
    model: PreTrainedModel, windows: Sequence[Window], layer: int, index: int, act: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """s and h of one neuron, `[windows, positions]` (nan where a window is shorter), from the inputs of its MLP."""
    mlp = model.get_submodule(f"model.layers.{layer}.mlp")
    seen: list[np.ndarray] = []
    handle = mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0].double().numpy()))
    with torch.no_grad():
        for window in windows:
            model(torch.tensor([window.token_ids]))
    handle.remove()
    length = max(len(x) for x in seen)
    gate, up = (mlp.get_submodule(name).weight[index].detach().double().numpy() for name in ("gate_proj", "up_proj"))
    s, u = (
        np.stack([np.pad(x @ row, (0, length - len(x)), constant_values=np.nan) for x in seen]) for row in (gate, up)
    )
    return s, act(s) * u


def check_neuron(bank: Bank, at: int, s_wt: np.ndarray, h_wt: np.ndarray, windows: Sequence[Window]) -> None:
    """Every number of neuron `at` against the reference, of which the first 8 positions of each window do not count."""
    neuron = bank.neurons[at]
    known = ~np.isnan(s_wt[:, SETTLED:])
    s, h = s_wt[:, SETTLED:][known], h_wt[:, SETTLED:][known]
    magnitude = np.abs(h)
    expected = {
        "positions": len(h),
        "mean": h.mean(),
        "mean_absolute": magnitude.mean(),
        "deviation": h.std(),
        "peak": magnitude.max(),
        "kurtosis": scipy.stats.kurtosis(h, fisher=False),
        "open_share": (s > 0).mean(),
        "strong_share": (magnitude > magnitude.max() / 2).mean(),
        "input_mean": s.mean(),
        "input_deviation": s.std(),
        "input_minimum": s.min(),
        "input_maximum": s.max(),
        "gate_norm": np.linalg.norm(bank.gate[at].astype(np.float64)),
        "up_norm": np.linalg.norm(bank.up[at].astype(np.float64)),
        "down_norm": np.linalg.norm(bank.down[at].astype(np.float64)),
    }
    expected["contribution"] = expected["mean_absolute"] * expected["down_norm"]
    found = {name: value for name, value in neuron.statistics.items() if not name.startswith("input_q")}
    assert found == pytest.approx(expected, rel=3e-4, abs=1e-6)
    cell = (s.max() - s.min()) / (24 * FINE)
    for name, value in neuron.statistics.items():
        if name.startswith("input_q"):
            share = float(name.removeprefix("input_q")) / 100
            # at most one cell away from the sample's quantile, whichever of its neighbours is meant
            low, high = (np.quantile(s, share, method=method) for method in ("lower", "higher"))
            assert low - 1.01 * cell <= value <= high + 1.01 * cell
    check_response(neuron.response or {}, s, h)
    order = np.argsort(-np.abs(np.nan_to_num(h_wt[:, SETTLED:])), axis=None)[:8]
    for moment, place in zip(neuron.fired, order, strict=True):
        row, column = np.unravel_index(place, known.shape)
        assert moment["value"] == pytest.approx(h_wt[row, column + SETTLED], rel=1e-3)
        assert moment["text"][moment["start"] : moment["end"]] == moment["token"]
        window = windows[row]
        assert moment["document"] == window.encoded.document
        before = window.encoded.spans[window.begin + column + SETTLED - len(window.start)][0]
        assert window.encoded.text[:before].endswith(moment["text"][: moment["start"]])


def check_response(response: dict[str, list[float]], s: np.ndarray, h: np.ndarray) -> None:
    bins = np.minimum((s - s.min()) / (s.max() - s.min()) * 24, 23).astype(int)
    seen = [number for number in range(24) if (bins == number).any()]
    assert response["count"] == [(bins == number).sum() for number in seen]
    for name, values in {
        "input": [s[bins == number].mean() for number in seen],
        "mean": [h[bins == number].mean() for number in seen],
        "deviation": [h[bins == number].std() for number in seen],
    }.items():
        np.testing.assert_allclose(response[name], values, rtol=1e-3, atol=1e-4 * np.abs(values).max())


# --------------------------------------------------------------------------------------------- against the reference


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize(("make", "act"), [(tiny_model, silu), (tiny_gemma, gelu_tanh)])
def test_statistics_curves_and_moments(make: Callable[[], PreTrainedModel], act: Any, start: bool) -> None:
    model, tokenizer = make(), tiny_tokenizer(start=start)
    bank = extract_neurons(model, tokenizer, texts(), count=7, **SETTINGS)
    windows = draw_windows(texts(), tokenizer, window=32, tokens=None, seed=0)
    assert [neuron.origin["layer"] for neuron in bank.neurons] == [0, 0, 1, 1, 1, 2, 2]
    assert bank.provenance["activation"] == {silu: "silu", gelu_tanh: "gelu_tanh"}[act]
    for at, neuron in enumerate(bank.neurons):
        where = neuron.origin["layer"], neuron.origin["index"]
        check_neuron(bank, at, *reference(model, windows, *where, act), windows)


def test_a_real_model(smollm2: Path) -> None:
    model, _ = load_model(smollm2, dtype="float32", device="cpu")
    tokenizer = load_tokenizer(smollm2)
    text = documents("calibration")[:3]
    bank = extract_neurons(model, tokenizer, text, count=31, window=48, tokens=96, source=model_record(smollm2))
    windows = draw_windows(text, tokenizer, window=48, tokens=96, seed=0)
    assert sorted({neuron.origin["layer"] for neuron in bank.neurons}) == list(range(30))
    for at in (0, 13, 30):
        where = bank.neurons[at].origin["layer"], bank.neurons[at].origin["index"]
        check_neuron(bank, at, *reference(model, windows, *where, silu), windows)
    assert set(bank.provenance["model"]["files"]) == {"config.json", "model.safetensors"}
    with Checkpoint(smollm2) as checkpoint:
        check_directions(bank, checkpoint)


def check_directions(bank: Bank, checkpoint: Checkpoint) -> None:
    """Gate row, up row and down column of every neuron are the checkpoint's own numbers."""
    for at, neuron in enumerate(bank.neurons):
        prefix, index = f"model.layers.{neuron.origin['layer']}.mlp", neuron.origin["index"]
        for name in ("gate", "up"):
            row = checkpoint.read_numpy(f"{prefix}.{name}_proj.weight", slice(index, index + 1))[0]
            np.testing.assert_array_equal(getattr(bank, name)[at], row.astype(np.float32))
        column = checkpoint.read_numpy(f"{prefix}.down_proj.weight")[:, index]
        np.testing.assert_array_equal(bank.down[at], column.astype(np.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_directions_are_the_checkpoints_rows(tmp_path: Path, dtype: torch.dtype) -> None:
    tiny_gemma().to(dtype).save_pretrained(tmp_path)
    model, _ = load_model(tmp_path, dtype="float32", device="cpu")
    bank = extract_neurons(model, tiny_tokenizer(), texts(), count=10, **SETTINGS)
    with Checkpoint(tmp_path) as checkpoint:
        check_directions(bank, checkpoint)


def test_the_model_is_left_as_it_was_and_the_bank_is_reproducible(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = model(ids).logits
        calls: list[tuple[int, int]] = []
        arguments = {"count": 5, "tokens": 100, "window": 32, "seed": 4}
        first = extract_neurons(
            model, tokenizer, texts(), progress=lambda done, total: calls.append((done, total)), **arguments
        )
        assert torch.equal(model(ids).logits, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    windows = first.provenance["text"]["windows"]
    assert calls == [(done, 2 * windows) for done in range(1, 2 * windows + 1)]
    second = extract_neurons(model, tokenizer, texts(), **arguments)
    assert save_bank(first, tmp_path / "a").sha256 == save_bank(second, tmp_path / "b").sha256
    again = load_bank(tmp_path / "a")
    assert again.neurons == first.neurons
    assert again.provenance == first.provenance
    other = extract_neurons(model, tokenizer, texts(), **arguments | {"seed": 5})
    assert other.provenance["text"]["sha256"] != first.provenance["text"]["sha256"]


# ---------------------------------------------------------------------------------------------------------- the choice


@pytest.mark.parametrize("select", ["contribution", "selectivity"])
def test_the_best_of_each_layer_are_chosen(select: str) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    everything = extract_neurons(model, tokenizer, texts(), count=3 * 48, **SETTINGS)
    chosen = extract_neurons(model, tokenizer, texts(), count=11, select=select, **SETTINGS)
    assert len(everything) == 144
    expected = []
    for layer, quota in ((0, 4), (1, 3), (2, 4)):
        ours = [neuron for neuron in everything.neurons if neuron.origin["layer"] == layer]
        if select == "selectivity":
            middle = np.median([neuron.statistics["contribution"] for neuron in ours])
            ours = [neuron for neuron in ours if neuron.statistics["contribution"] >= middle * (1 - 1e-6)]
            ours = [each for each in ours if each.statistics["kurtosis"] <= each.statistics["positions"] / 8]
        key = "contribution" if select == "contribution" else "kurtosis"
        ours.sort(key=lambda neuron: -neuron.statistics[key])
        expected += sorted(ours[:quota], key=lambda neuron: neuron.origin["index"])
    assert [neuron.name for neuron in chosen.neurons] == [neuron.name for neuron in expected]
    assert chosen.neurons == expected


def test_only_the_layers_asked_for() -> None:
    bank = extract_neurons(tiny_model(), tiny_tokenizer(), texts(), count=6, layers=[2, 0], **SETTINGS)
    assert [neuron.origin["layer"] for neuron in bank.neurons] == [0, 0, 0, 2, 2, 2]
    assert bank.provenance["layers"] == [0, 2]


@pytest.mark.parametrize(
    ("count", "sizes", "expected"),
    [
        (7, [48, 48, 48], [2, 3, 2]),
        (1, [5] * 7, [0, 0, 0, 1, 0, 0, 0]),
        (3, [5] * 9, [0, 1, 0, 0, 1, 0, 0, 1, 0]),
        (12, [1, 7, 123], [1, 5, 6]),
        (131, [1, 7, 123], [1, 7, 123]),
    ],
)
def test_shares_are_equal_as_far_as_layers_allow(count: int, sizes: list[int], expected: list[int]) -> None:
    given = shares(count, [np.zeros(size) for size in sizes])
    assert sum(given) == count
    assert given == expected


def test_of_equal_scores_the_lower_index_is_taken() -> None:
    assert best(np.array([1.0, 3.0, 2.0, 3.0, 2.0]), 3).tolist() == [1, 2, 3]


# ------------------------------------------------------------------------------------------------------------- moments


@pytest.mark.parametrize("parts", [[1], [7, 1, 123], [123, 0, 123, 5]])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_moments_merged_in_parts_equal_those_of_the_whole(parts: list[int], offset: float) -> None:
    draw = np.random.default_rng(0)
    x = draw.standard_exponential((sum(parts), 7)) * draw.uniform(0.1, 3, 7) + offset
    moments = Moments(7)
    for part in np.split(x, np.cumsum(parts)[:-1]):
        moments.add(part)
    assert moments.count == len(x)
    np.testing.assert_allclose(moments.mean, x.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.deviation, x.std(axis=0), rtol=1e-8, atol=1e-10)
    if len(x) > 1:
        np.testing.assert_allclose(moments.kurtosis, scipy.stats.kurtosis(x, fisher=False), rtol=1e-6)
        third = ((x - x.mean(axis=0)) ** 3).sum(axis=0)
        np.testing.assert_allclose(moments.power3, third, rtol=1e-6)


def test_a_neuron_that_never_changes_has_numbers_too() -> None:
    moments = Moments(1)
    moments.add(np.full((5, 1), 3.0))
    assert moments.kurtosis.tolist() == [0]
    chosen = ChosenStatistics(np.array([2.0]), np.array([2.0]), np.array([0.0]), bins=4, moments=3)
    chosen.add(np.full((5, 1), 2.0, np.float32), np.zeros((5, 1), np.float32), window=0, first=1)
    assert chosen.response(0) == {"input": [2.0], "mean": [0.0], "deviation": [0.0], "count": [5.0]}
    assert [(peak.window, peak.position) for peak in chosen.peaks(0)] == [(0, 1), (0, 2), (0, 3)]


# ------------------------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize("start", [False, True])
def test_windows_cover_the_text_once(start: bool) -> None:
    tokenizer = tiny_tokenizer(start=start)
    text = [*texts(5, words=42), Text("short", "w1 " * 9), Text("shorter", "w1 " * 7), Text("empty", "")]
    windows = draw_windows(text, tokenizer, window=16, tokens=None, seed=1)
    assert {window.start for window in windows} == {(1,) if start else ()}
    body = 15 if start else 16
    for document in text[:-2]:
        ours = [window for window in windows if window.encoded.document == document.name]
        ids = [token for window in ours for token in window.token_ids[len(window.start) :]]
        whole = tokenizer(document.text, add_special_tokens=False)["input_ids"]
        # the rest of 10 or 12 tokens is at least half a window
        assert ids == whole
        assert all(len(window.token_ids) <= 16 for window in ours)
        assert [window.begin for window in ours] == list(range(0, len(whole), body))
    assert {window.encoded.document for window in windows} == {document.name for document in text[:-2]}


def test_part_of_a_text_is_drawn_from_the_seed_over_all_documents() -> None:
    tokenizer = tiny_tokenizer()
    drawn = [draw_windows(texts(), tokenizer, window=10, tokens=60, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 6
    assert len({window.encoded.document for window in drawn[0]}) == 6
    assert all(window.begin == 0 for window in drawn[0])


class SlowTokenizer:
    """A tokenizer that knows no places: one token a letter."""

    is_fast, bos_token_id = False, None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def test_a_tokenizer_without_places() -> None:
    encoded = encode.__wrapped__(Text("t", "añb"), SlowTokenizer())  # past the type check: it is no Hugging Face class
    assert [encoded.text[first:last] for first, last in encoded.spans] == ["a", "ñ", "b"]


def test_a_moment_marks_its_token_in_the_text(smollm2: Path) -> None:
    tokenizer = load_tokenizer(smollm2)
    assert start_tokens(tokenizer) == ()
    text = "Zwölf große Boxkämpfer jagen Viktor quer über den großen Sylter Deich, heißt es.\n\nSo."
    window = draw_windows([Text("t", text)], tokenizer, window=99, tokens=None, seed=0)[0]
    for position in range(len(window.token_ids)):
        moment = window.moment(position, before=9, after=5)
        token, around = str(moment["token"]), str(moment["text"])
        assert around[int(moment["start"]) : int(moment["end"])] == token
        assert token
        assert token in text
        assert around in text
        assert len(around) <= 14 + len(token)


# ------------------------------------------------------------------------------------------------------------ refusals


def biased() -> PreTrainedModel:
    return tiny_model(mlp_bias=True)


def patched() -> PreTrainedModel:
    model = tiny_model()
    patch(model, {"sites": [{"site": "mlp", "activation": "relu"}]})
    return model


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (tiny_model, {"count": 0}, "0 neurons asked for; the 3 layers have 144: give 1 to 144"),
        (tiny_model, {"count": 145}, "145 neurons asked for"),
        (tiny_model, {"select": "size"}, "select 'size' is not known; choose from contribution, selectivity"),
        (tiny_model, {"layers": [1, 3]}, "layer 3 has no dense gated MLP: the model has layers 0 to 2"),
        (tiny_model, {"layers": []}, "no layers were given"),
        (tiny_model, {"window": 65}, "a window of 65 tokens; this model reads 64 at most"),
        (tiny_model, {"window": 8}, "a window of 8 tokens; expected more than 8"),
        (tiny_model, {"tokens": 0}, "0 tokens of text; expected 1 or more"),
        (tiny_model, {"bins": 0}, "a response curve of 0 bins; expected 1 or more"),
        (biased, {}, "model.layers.0.mlp.gate_proj has a bias, which a bank of directions cannot hold"),
        (patched, {}, "LlamaForCausalLM was patched; take the neurons from the original model"),
        (lambda: tiny_family("gpt2"), {}, "GPT2LMHeadModel has no dense gated MLP to take neurons from: no gated MLP"),
        (lambda: tiny_family("mixtral"), {}, "MixtralForCausalLM has no dense gated MLP .*: mixture-of-experts"),
        (lambda: tiny_family("phi3"), {}, "Phi3ForCausalLM has no dense gated MLP .*: gate and up fused"),
        (lambda: tiny_family("gemma3n_text"), {}, "does not compute gelu_pytorch_tanh.gate.x. . .up.x."),
    ],
)
def test_refusals(make: Callable[[], PreTrainedModel], settings: dict[str, Any], message: str) -> None:
    words = [f"w{number}" for number in range(90)]  # within the vocabulary of every family
    with pytest.raises(ValueError, match=message):
        extract_neurons(
            make(), tiny_tokenizer(words=words), [Text("t", " ".join(words[:40]))], **{"count": 4} | SETTINGS | settings
        )


def test_a_text_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no text to measure: 1 document.s. hold no more than 8 tokens each"):
        extract_neurons(tiny_model(), tiny_tokenizer(), [Text("t", "w1 " * 8)], count=1, **SETTINGS)


# --------------------------------------------------------------------------------------------- banks and their curves


def small_bank(seed: int, *, hidden: int = 32, activation: str | None = "silu") -> Bank:
    draw = np.random.default_rng(seed)
    gate, up, down = draw.standard_normal((3, 2, hidden)).astype(np.float32)
    from neuroweave.surgery.neurons.bank import SOURCE, Neuron

    neurons = [Neuron(f"{seed}.{number}", SOURCE) for number in range(2)]
    return Bank(gate, up, down, neurons, {"activation": activation, "seed": seed})


def test_banks_are_joined_with_their_provenance() -> None:
    parts = [small_bank(1), small_bank(2, activation=None), small_bank(3)]
    bank = join_banks(parts)
    np.testing.assert_array_equal(bank.up, np.concatenate([part.up for part in parts]))
    assert [neuron.name for neuron in bank.neurons] == ["1.0", "1.1", "2.0", "2.1", "3.0", "3.1"]
    assert bank.provenance["activation"] == "silu"
    assert [part["seed"] for part in bank.provenance["banks"]] == [1, 2, 3]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "no banks to join"),
        ([small_bank(1), small_bank(2, hidden=31)], "banks of hidden size 32 and 31 cannot be joined"),
        ([small_bank(1), small_bank(2, activation="gelu")], "banks for silu and for gelu cannot be joined"),
        ([small_bank(1), small_bank(1)], "the bank names '1.0' twice"),
    ],
)
def test_banks_that_do_not_fit_together(parts: list[Bank], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        join_banks(parts)


def test_the_bank_of_the_package(smollm2: Path) -> None:
    bank = default_bank()
    assert default_bank_path().stat().st_size < 1_000_000
    assert bank.hidden_size == 576
    assert bank.provenance["activation"] == "silu"
    extracted = [neuron for neuron in bank.neurons if "layer" in neuron.origin]
    assert len(extracted) == 64
    part = Bank(bank.gate[:64], bank.up[:64], bank.down[:64], extracted, {})
    with Checkpoint(smollm2) as checkpoint:
        check_directions(part, checkpoint)
    assert all(len(neuron.fired) == 8 and neuron.response for neuron in extracted)
    assert bank.provenance["banks"][0]["model"]["licence"] == "Apache-2.0"


def test_a_curve_in_characters() -> None:
    curve = Curve("measured", np.array([-1.0, 0.0, 2.0]), np.array([0.0, 0.0, 4.0]), np.array([0.0, 0.0, 1.0]))
    assert sparkline(curve, 7) == "▁▁▁▃▅▆█"
    assert sparkline(Curve("measured", curve.input, np.array([-1.0, 0.0, 1.0])), 4) == "▁▅▆█"
    assert text_plot(curve, width=7, height=6) == [
        "5 ┤      ░",
        "  ┤     ░●",
        "  ┤     ●░",
        "  ┤    ●░ ",
        "  ┤   ●   ",
        "0 ┤●●●────",
        "  └───────",
        "   -1    2  gate·x",
    ]


def test_a_curve_that_is_flat_or_a_point() -> None:
    flat = Curve("measured", np.array([1.0]), np.array([0.0]))
    assert sparkline(flat, 5) == "▁" * 5
    assert text_plot(flat, width=5, height=3)[2] == "0 ┤●●●●●"
    assert curve_of(small_bank(1).neurons[0]) is None
