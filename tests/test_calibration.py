"""Closed-form repair: its parts against NumPy and brute force, and the whole on tiny models of several families."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

import neuroweave
from neuroweave.activations.mixtures import SegmentMixture
from neuroweave.activations.torch import Activation
from neuroweave.cli.main import program
from neuroweave.neuroblast import NeuroBlastConfig, NeuroBlastForCausalLM
from neuroweave.surgery.calibration.calibrate import (
    CalibratedLayer,
    CalibrationOptions,
    calibrate,
    find_parts,
    match_neurons,
    order_neurons,
)
from neuroweave.surgery.calibration.landing import Landing
from neuroweave.surgery.calibration.neurons import SCALES, assign, match
from neuroweave.surgery.calibration.on_disk import calibrate_checkpoint, draw_calibration_windows
from neuroweave.surgery.calibration.projections import activated_projections, factor_moves
from neuroweave.surgery.calibration.ridge import MOST_CAUTION, RidgeSums
from neuroweave.surgery.calibration.stream import LayerStream, listening

SIZES = {"vocab_size": 99, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, num_hidden_layers=3)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, num_key_value_heads=2, head_dim=6, num_hidden_layers=3, sliding_window=5)
    ),
    "granite": lambda: GraniteForCausalLM(
        GraniteConfig(**SIZES, num_key_value_heads=2, num_hidden_layers=3, residual_multiplier=0.3)
    ),
    "phi3": lambda: Phi3ForCausalLM(
        Phi3Config(**SIZES, num_key_value_heads=2, num_hidden_layers=3, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    ),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, num_hidden_layers=3)),
    "neuroblast": lambda: NeuroBlastForCausalLM(
        NeuroBlastConfig(
            **SIZES,
            num_key_value_heads=2,
            head_dim=6,
            num_sensory_layers=3,
            num_associative_layers=2,
            num_motor_layers=1,
        )
    ),
}


def pair(family: str, activation: object) -> tuple:
    """(student, teacher): the same stirred weights, the student patched."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        model = MODELS[family]().eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0, 0.5 / parameter.shape[-1] ** 0.5 * 2, generator=generator)
        models.append(model)
    if activation is not None:
        neuroweave.patch(models[0], {"sites": [{"site": "mlp", "activation": activation}]})
    return tuple(models)


def token_windows(count: int, length: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 99, (count, length), generator=torch.Generator().manual_seed(seed))


def divergence(student: nn.Module, teacher: nn.Module, windows: torch.Tensor) -> float:
    with torch.no_grad():
        ours, theirs = (model(windows).logits.double().log_softmax(-1) for model in (student, teacher))
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


# ------------------------------------------------------------------------------------------------------- the parts


@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(40, 7, 3), (5, 11, 1), (123, 1, 4)])
def test_ridge_is_numpys(tokens, inputs, outputs):
    draw = np.random.default_rng(0)
    a, lacking, weight = (
        draw.normal(size=(tokens, inputs)),
        draw.normal(size=(tokens, outputs)),
        draw.random((tokens, 1)),
    )
    sums = RidgeSums(inputs, outputs)
    for part in np.array_split(np.arange(tokens), 3):
        sums.add(*(torch.tensor(each[part], dtype=torch.float32) for each in (a, lacking, weight)))
    gram = (a * weight).T @ a
    ridge = 0.05 * np.diag(gram).mean()
    expected = np.linalg.solve(gram + ridge * np.eye(inputs), (a * weight).T @ lacking).T
    np.testing.assert_allclose(sums.correction(0.05).numpy(), expected, rtol=2e-4, atol=2e-5)
    assert sums.tokens == tokens


def test_ridge_with_dead_inputs():
    sums = RidgeSums(3, 2)
    sums.add(torch.tensor([[1.0, 0, 0], [2.0, 0, 0]]), torch.ones(2, 2), torch.ones(2, 1))
    with pytest.raises(ValueError, match=r"singular with ridge 0\.0; give a larger one"):
        sums.correction(0.0)
    sums = RidgeSums(3, 2)
    sums.add(torch.zeros(4, 3), torch.ones(4, 2), torch.ones(4, 1))
    assert not sums.correction(0.1).any()
    sums.add(torch.full((1, 3), torch.nan), torch.ones(1, 2), torch.ones(1, 1))
    with pytest.raises(ValueError, match="not finite"):
        sums.correction(0.1)


def test_match_finds_the_known_stand_in_for_silu():
    """1.702 * gelu(x / 1.702) is the field's approximation of silu (Hendrycks and Gimpel, arXiv:1606.08415)."""
    torch.manual_seed(0)
    gate, up = torch.randn(2000, 5) * 2, torch.randn(2000, 5)
    s, c, error = match(Activation("silu"), Activation("gelu"), gate, up)
    nearest = min(SCALES, key=lambda scale: abs(scale - 1 / 1.702))
    assert s.tolist() == pytest.approx([nearest] * 5)
    assert torch.allclose(c, torch.full((5,), 1 / nearest), rtol=0.05)
    plain = ((Activation("gelu")(gate) - Activation("silu")(gate)) * up).pow(2).sum(0)
    assert (error < 0.05 * plain).all()
    kept = match(Activation("silu"), Activation("silu"), gate, up)
    assert [part.tolist() for part in kept] == [[1.0] * 5, [1.0] * 5, [0.0] * 5]


def test_match_error_is_what_the_scales_give():
    torch.manual_seed(1)
    gate, up = torch.randn(300, 4), torch.randn(300, 4)
    old, new = Activation("silu"), Activation("relu")
    s, c, error = match(old, new, gate, up)
    found = ((old(gate) - c * new(s * gate)) * up).pow(2).sum(0)
    torch.testing.assert_close(error, found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("neurons", [1, 6, 7])
def test_assignment_of_two_members_is_the_best(neurons):
    errors = torch.rand(neurons, 2, generator=torch.Generator().manual_seed(neurons))
    sizes = shuffled_segments().segment_sizes(neurons)
    order = assign(errors, sizes)
    assert sorted(order.tolist()) == list(range(neurons))

    def total(first: set[int]) -> float:
        return sum(float(errors[each, 0 if each in first else 1]) for each in range(neurons))

    best = min(total(set(chosen)) for chosen in itertools.combinations(range(neurons), sizes[0]))
    assert total(set(order[: sizes[0]].tolist())) == pytest.approx(best)


def test_assignment_of_three_members_has_the_sizes_of_chunk():
    errors = torch.eye(3).repeat(3, 1)[:7]
    order = assign(1 - errors, [3, 3, 1])
    members = [0] * 3 + [1] * 3 + [2]
    assert sum(errors[neuron, member] for neuron, member in zip(order.tolist(), members, strict=True)) >= 5


# --------------------------------------------------------------------------------------------------- layer by layer


@pytest.mark.parametrize("family", MODELS)
def test_layer_by_layer_is_the_models_own_pass(family, tmp_path):
    _, model = pair(family, None)
    windows = token_windows(3)
    with torch.no_grad():
        expected = model(windows, output_hidden_states=True).hidden_states
    with LayerStream(model, windows, folder=tmp_path, batch=2) as stream:
        for number in range(len(stream.layers)):
            if number:
                torch.testing.assert_close(stream.stored(slice(0, 3)), expected[number], rtol=1e-5, atol=1e-5)
            stream.advance()
    assert not any("forward" in vars(module) for module in model.modules())
    assert list(tmp_path.iterdir()) == []


def test_a_bfloat16_model_runs_in_float32_a_layer_at_a_time(tmp_path):
    _, model = pair("llama", None)
    windows = token_windows(2)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    wide = MODELS["llama"]().eval()
    wide.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    with torch.no_grad():
        expected = wide(windows, output_hidden_states=True).hidden_states
    with LayerStream(model, windows, folder=tmp_path) as stream:
        stream.advance()
        torch.testing.assert_close(stream.stored(slice(0, 2)), expected[1], rtol=1e-5, atol=1e-5)
        assert stream.layers[1].mlp.down_proj.weight.dtype == torch.bfloat16
        assert stream.layer.mlp.down_proj.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("family", "scale", "normed", "attention"),
    [
        ("llama", 1.0, False, True),
        ("gemma3", 1.0, True, True),
        ("granite", 0.3, False, True),
        ("phi3", 1.0, False, True),
        ("gpt_neox", 1.0, False, False),
        ("neuroblast", 1.0, False, True),
    ],
)
def test_where_projections_land(family, scale, normed, attention, tmp_path):
    _, model = pair(family, None)
    with LayerStream(model, token_windows(2), folder=tmp_path) as stream:
        parts = find_parts(stream)
        assert parts.down_landing.scale == pytest.approx(scale, rel=1e-4)
        assert (parts.down_landing.norm is not None) is normed
        assert (parts.attention is not None) is attention
        with listening([parts.mlp.down]) as seen:
            out = stream.run(slice(0, 2))
        y = seen[parts.mlp.down][1]
        rest = out - parts.down_landing.added(y)
        moved = rest + parts.down_landing.added(2 * y if normed else y + 1)
        expected = out if normed else out + scale
        torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-4)


def shuffled_segments() -> SegmentMixture:
    """Members that disagree, so that neurons have to move."""
    return SegmentMixture([Activation("relu"), Activation("silu")])


def gate_and_up(neurons: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    spread = torch.linspace(0.1, 5, neurons).flip(0)
    return torch.randn(200, neurons, generator=generator) * spread, torch.randn(200, neurons, generator=generator)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox"])
def test_ordering_and_scaling_neurons_alone_is_exact_where_activations_agree(family, tmp_path):
    """Segments of one activation: any order of the neurons computes the same."""
    student, teacher = pair(family, {"segments": ["original", "original"]})
    windows = token_windows(3)
    with (
        LayerStream(student, windows, folder=tmp_path) as given,
        LayerStream(teacher, windows, folder=tmp_path) as wanted,
    ):
        done = CalibratedLayer(0)
        before = given.run(slice(0, 3))
        parts = find_parts(given)
        gates = parts.mlp.gate.weight.clone()
        teacher_mlp = find_parts(wanted).mlp
        order_neurons(parts.mlp, shuffled_segments(), teacher_mlp.activation, *gate_and_up(40), False, done)
        assert done.moved > 0
        torch.testing.assert_close(given.run(slice(0, 3)), before, rtol=1e-5, atol=1e-5)
        done = CalibratedLayer(0)
        match_neurons(given, parts.mlp, teacher_mlp, CalibrationOptions(), done)
        torch.testing.assert_close(given.run(slice(0, 3)), before, rtol=1e-5, atol=1e-5)
        assert (done.scaled, done.moved) == (0, 0)
        assert torch.equal(parts.mlp.gate.weight.sort(0).values, gates.sort(0).values)


# ------------------------------------------------------------------------------------- projections with an activation


def activated_pair(family: str, sites: list) -> tuple:
    student, teacher = pair(family, None)
    neuroweave.patch(student, {"sites": sites})
    return student, teacher


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "neuroblast"])
def test_values_get_both_scales(family, tmp_path):
    """tanh(s v) / s is v for small s: where c can follow, little is left of the change."""
    student, teacher = activated_pair(family, [{"site": "attention.v", "activation": "tanh"}])
    held_out = token_windows(6, seed=9)
    before = divergence(student, teacher, held_out)
    options = CalibrationOptions(attention=False)
    done = calibrate(student, teacher, token_windows(40), folder=tmp_path, options=options)
    assert divergence(student, teacher, held_out) < 0.2 * before
    assert sum(sum(layer.scaled_outputs.values()) for layer in done.layers) > 0


def test_queries_and_keys_behind_a_norm_get_any_length(tmp_path):
    student, teacher = activated_pair("gemma3", [{"site": ["attention.q", "attention.k"], "activation": "tanh"}])
    held_out = token_windows(6, seed=9)
    before = divergence(student, teacher, held_out)
    calibrate(student, teacher, token_windows(40), folder=tmp_path)
    assert divergence(student, teacher, held_out) < 0.1 * before


@torch.no_grad()
@pytest.mark.parametrize(("site", "reads"), [("attention.v", True), ("mlp.up", True), ("attention.q", False)])
def test_a_factor_moves_only_to_what_reads_it_feature_by_feature(site, reads, tmp_path):
    student, _ = activated_pair("llama", [{"site": site, "activation": "tanh"}])
    with LayerStream(student, token_windows(3), folder=tmp_path) as given:
        [found] = activated_projections(given)
        assert (found.reader is not None) is reads
        if reads:  # as the model itself reads it: with the activation bypassed, c moves from rows to columns
            module, read = found.reader
            before = given.run(slice(0, 3))
            assert factor_moves(given, found)
            assert torch.equal(given.run(slice(0, 3)), before)
            wrong = replace(found, reader=(module, read.flip(0)))
            assert not factor_moves(given, wrong)


def test_an_activated_projection_is_not_solved_as_a_plain_one(tmp_path):
    student, teacher = activated_pair("llama", [{"site": ["attention.o", "mlp.down"], "activation": "silu_tanh"}])
    done = calibrate(student, teacher, token_windows(40), folder=tmp_path)
    assert all(layer.solved == [] for layer in done.layers)
    assert all("no plain matrix" in layer.left_out for layer in done.layers)


def test_finished_layers_lie_in_the_weights_folder(tmp_path):
    (tmp_path / "weights").mkdir()
    students = []
    for weights in (None, tmp_path / "weights"):
        student, teacher = pair("llama", "silu_tanh")
        student.bfloat16()
        calibrate(student, teacher, token_windows(20), folder=tmp_path, weights=weights)
        students.append(student)
    for ours, theirs in zip(*(student.parameters() for student in students), strict=True):
        assert torch.equal(ours, theirs)
    held = sum(parameter.nbytes for layer in students[1].model.layers for parameter in layer.parameters())
    assert sum(file.stat().st_size for file in (tmp_path / "weights").iterdir()) == held


# ------------------------------------------------------------------------------------------------------------ whole


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("activation", ["silu_tanh", {"segments": ["relu", "silu"]}])
def test_calibration_brings_the_student_back(family, activation, tmp_path):
    student, teacher = pair(family, activation)
    held_out = token_windows(6, seed=9)
    before = divergence(student, teacher, held_out)
    done = calibrate(student, teacher, token_windows(60), folder=tmp_path)
    after = divergence(student, teacher, held_out)
    assert 0 < after < 0.5 * before
    for layer in done.layers:
        if not layer.left_out:
            assert layer.error_after < layer.error_before
    assert list(tmp_path.iterdir()) == []


def test_an_unchanged_student_stays(tmp_path):
    student, teacher = pair("llama", {"segments": ["original", "original"]})
    windows = token_windows(40)
    calibrate(student, teacher, windows, folder=tmp_path, options=CalibrationOptions(order=False))
    for (name, ours), theirs in zip(student.named_parameters(), teacher.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5, msg=name)


def test_layers_without_an_mlp_are_left_as_they_are(tmp_path):
    student, teacher = pair("neuroblast", "relu")
    done = calibrate(student, teacher, token_windows(40), folder=tmp_path)
    assert [layer.layer for layer in done.layers if layer.left_out == "no MLP"] == [1, 4]
    assert torch.equal(student.model.sensory_layers[1].conv.weight, teacher.model.sensory_layers[1].conv.weight)


def test_models_that_are_not_teacher_and_student_are_refused(tmp_path):
    student, _ = pair("llama", "relu")
    for other, message in (
        ({"num_hidden_layers": 4}, "the student has 3 layers, the teacher 4"),
        ({"num_hidden_layers": 3, "intermediate_size": 12}, r"the student's is \[40, 24\], the teacher's \[12, 24\]"),
    ):
        teacher = LlamaForCausalLM(LlamaConfig(**(SIZES | {"num_key_value_heads": 2} | other)))
        with pytest.raises(ValueError, match=message):
            calibrate(student, teacher, token_windows(2), folder=tmp_path)
    with pytest.raises(ValueError, match="ridge must not be negative, got -1"):
        CalibrationOptions(ridge=-1.0)


# ---------------------------------------------------------------------------------------------------------- on disk


def test_the_command(smollm2, tmp_path):
    """Two layers of the real model, so that the tokenizer is real too."""
    model = AutoModelForCausalLM.from_pretrained(smollm2, num_hidden_layers=2)
    model.save_pretrained(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "base" / name).write_bytes((smollm2 / name).read_bytes())
    runner = CliRunner()
    run = lambda *words: runner.invoke(program, [str(word) for word in words], obj={"debug": False})  # noqa: E731
    assert run("patch", tmp_path / "base", tmp_path / "patched", "--mlp", "relu|silu").exit_code == 0
    base = ("calibrate", tmp_path / "patched", "--teacher", tmp_path / "base", "--output", tmp_path / "out")
    done = run(*base, "--tokens", 768, "--window", 64, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert [layer["solved"] for layer in report["layers"]] == [["attention.o", "mlp.down"]] * 2
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["neuroweave"]["calibration"]["tokens"] == 768
    assert config["neuroweave"]["recipe"]["sites"][0]["activation"] == {"segments": ["relu", "silu"]}
    windows = token_windows(4, 32)
    patched, calibrated, teacher = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("patched", "out", "base")
    )
    assert divergence(calibrated, teacher, windows) < divergence(patched, teacher, windows)
    again = run(*base, "--tokens", 768, "--window", 64)
    assert isinstance(again.exception, ValueError)
    assert "the output folder is not empty" in str(again.exception)
    with pytest.raises(ValueError, match="not a patched model"):
        calibrate_checkpoint(
            tmp_path / "base", tmp_path / "base", tmp_path / "x", [text("word " * 900)], tokens=64, window=64
        )


def text(content: str) -> SimpleNamespace:
    return SimpleNamespace(name="t", text=content)


def test_windows_are_whole_and_drawn_by_seed(smollm2):
    from neuroweave.checkpoint.loading import load_tokenizer
    from neuroweave.text import documents

    tokenizer, texts = load_tokenizer(smollm2), documents("calibration")[:6]
    draw = lambda seed: draw_calibration_windows(texts, tokenizer, tokens=1000, window=128, seed=seed)  # noqa: E731
    assert draw(0).shape == (7, 128)
    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    with pytest.raises(ValueError, match="no text of at least 128 tokens among 1 documents"):
        draw_calibration_windows([text("short")], tokenizer, tokens=1000, window=128, seed=0)
    with pytest.raises(ValueError, match="give at least one window"):
        draw_calibration_windows(texts, tokenizer, tokens=10, window=128, seed=0)


def test_rows_of_small_gain_are_held_by_a_larger_ridge():
    """Against NumPy, row by row: the ridge times 4 to the power of caution; gains from the usual one to 0."""
    gain = torch.tensor([[[2.0, 0.5, 2.0 / 64, 0.0, 2.0]]])
    caution = Landing(1.0, nn.Identity(), gain).caution()
    usual = float(gain.pow(2).mean().sqrt())
    expected_powers = [max(0, round(float(np.log2(usual / g)))) for g in (2.0, 0.5, 2.0 / 64)]
    assert caution[:3].tolist() == expected_powers == [0, 1, 5]
    assert caution[3] > MOST_CAUTION
    assert Landing(1.0, None, None).caution() is None
    draw = np.random.default_rng(0)
    a, lacking = draw.normal(size=(40, 7)), draw.normal(size=(40, 5))
    sums = RidgeSums(7, 5)
    sums.add(*(torch.tensor(each, dtype=torch.float32) for each in (a, lacking)), torch.ones(40, 1))
    found = sums.correction(0.05, caution).numpy()
    gram = a.T @ a
    for row, power in enumerate(caution.tolist()):
        if power > MOST_CAUTION:
            assert not found[row].any()
            continue
        ridge = 0.05 * np.diag(gram).mean() * 4.0**power
        expected = np.linalg.solve(gram + ridge * np.eye(7), a.T @ lacking[:, row])
        np.testing.assert_allclose(found[row], expected, rtol=2e-4, atol=2e-5)


def test_what_is_solved_takes_the_caution_of_its_landing(tmp_path, monkeypatch):
    """A layer's weights come out otherwise where its landing asks for none."""
    weights = []
    for caution in (Landing.caution, lambda landing: None):
        monkeypatch.setattr(Landing, "caution", caution)
        student, teacher = pair("gemma3", "relu")
        with torch.no_grad():
            for model in (student, teacher):
                model.model.layers[0].post_feedforward_layernorm.weight[2] = -0.99
        plain = CalibrationOptions(match=False, order=False)
        calibrate(student, teacher, token_windows(16), folder=tmp_path, options=plain)
        weights.append(student.model.layers[0].mlp.down_proj.weight[2].clone())
    before = teacher.model.layers[0].mlp.down_proj.weight[2]
    moved = [float((weight - before).detach().norm()) for weight in weights]
    assert moved[0] < 0.5 * moved[1], moved


def test_gains_of_zero_and_outputs_as_small_as_the_norms_epsilon(tmp_path):
    """As in Gemma 3 270M, gains from 0 to 1,657 and MLP outputs shorter than the root of epsilon."""
    student, teacher = pair("gemma3", "relu")
    for model in (student, teacher):
        with torch.no_grad():
            for layer in model.model.layers:
                for norm in (layer.post_feedforward_layernorm, layer.post_attention_layernorm):
                    norm.weight[0], norm.weight[1], norm.weight[2] = -1.0, 20.0, -0.999
                layer.mlp.down_proj.weight.mul_(1e-3)
    before = divergence(student, teacher, token_windows(8, seed=1))
    done = calibrate(student, teacher, token_windows(64), folder=tmp_path, batch=16)
    assert [layer.solved for layer in done.layers] == [["attention.o", "mlp.down"]] * 3
    assert all(bool(torch.isfinite(parameter).all()) for parameter in student.parameters())
    assert divergence(student, teacher, token_windows(8, seed=1)) < 0.7 * before
    neurons = CalibrationOptions(match=False, order=False)
    student, teacher = pair("gemma3", "relu")
    with torch.no_grad():
        for model in (student, teacher):
            model.model.layers[1].post_feedforward_layernorm.weight[0] = -1.0
    calibrate(student, teacher, token_windows(64), folder=tmp_path, batch=16, options=neurons)
    rows = [model.model.layers[1].mlp.down_proj.weight[0] for model in (student, teacher)]
    assert torch.equal(*rows)  # it adds nothing to the stream, so nothing is learned of it


# ----------------------------------------------------------------------------------------------------------- refine


@pytest.mark.parametrize("family", ["gemma3", "phi3"])
def test_refine_goes_beyond_what_is_solved(family, tmp_path):
    """On other text the KL is a tenth lower and more; normed (Gemma) and fused (Phi) MLPs."""
    learned, other = token_windows(512), token_windows(16, seed=1)
    found = {}
    for passes in (0, 8):
        student, teacher = pair(family, {"segments": ["relu", "silu"]})
        options = CalibrationOptions(refine=passes)
        done = calibrate(student, teacher, learned, folder=tmp_path, options=options, batch=64)
        assert all(layer.refined == (passes > 0) for layer in done.layers)
        assert all(parameter.grad is None for parameter in student.parameters())
        assert [p.requires_grad for p in student.parameters()] == [p.requires_grad for p in teacher.parameters()]
        found[passes] = divergence(student, teacher, other)
    assert found[8] < 0.9 * found[0], found


def test_refine_takes_back_what_does_not_help(tmp_path, monkeypatch):
    """With a rate that destroys the MLP, weights are what was solved, bit for bit."""
    from neuroweave.surgery.calibration import refine

    weights = []
    for passes in (0, 2):
        monkeypatch.setattr(refine, "RATE", 50.0)
        student, teacher = pair("llama", "relu")
        done = calibrate(student, teacher, token_windows(8), folder=tmp_path, options=CalibrationOptions(refine=passes))
        assert not any(layer.refined for layer in done.layers)
        weights.append({name: tensor.clone() for name, tensor in student.state_dict().items()})
    assert all(torch.equal(weights[1][name], tensor) for name, tensor in weights[0].items())


def test_refine_is_refused_below_zero():
    with pytest.raises(ValueError, match="refine must not be negative, got -1"):
        CalibrationOptions(refine=-1)
