"""How neurons chose: counted, measured, drawn, and logged while they learn."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy
from tiny_llama import WITHOUT_SPEED, subject, texts, tiny_model
from transformers import TrainerControl, TrainerState, TrainingArguments

import neuroweave
from neuroweave.activations.mixtures import NeuronMixture
from neuroweave.activations.neuron_choices import gate_entropy, neuron_choices
from neuroweave.diagnose import compare
from neuroweave.diagnose.report.page import render_report
from neuroweave.surgery.hardening import harden
from neuroweave.training.choice_log import ChoiceLog


def learned(seed: int = 3):
    model = tiny_model()
    neuroweave.patch(model, "learned-mixture")
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, NeuronMixture):
            module.gating_logits.data = 3 * torch.randn(module.gating_logits.shape, generator=generator)
    return model


def test_choices_and_entropy_equal_scipy():
    model = learned()
    found = neuron_choices(model)
    modules = [module for module in model.modules() if isinstance(module, NeuronMixture)]
    every = []
    for choices, module in zip(found, modules, strict=True):
        weights = softmax(module.gating_logits.detach().double().numpy(), axis=1)
        chosen = np.bincount(weights.argmax(1), minlength=weights.shape[1])
        assert list(choices.neurons.values()) == chosen.tolist()
        np.testing.assert_allclose(list(choices.weights.values()), weights.mean(0), atol=1e-6)
        every.append(entropy(weights, axis=1))
        assert choices.entropy == pytest.approx(every[-1].mean(), rel=1e-5)
    assert list(found[0].neurons) == ["original", "relu", "gelu", "swish_beta"]
    assert gate_entropy(model).item() == pytest.approx(np.concatenate(every).mean(), rel=1e-5)


def test_the_entropy_has_the_gradient_that_makes_neurons_decide():
    model = learned()
    before = gate_entropy(model).item()
    logits = [module.gating_logits for module in model.modules() if isinstance(module, NeuronMixture)]
    for gradient, each in zip(torch.autograd.grad(gate_entropy(model), logits), logits, strict=True):
        each.data -= 20 * gradient
    assert gate_entropy(model).item() < before
    for each in logits:
        each.data.zero_()
    assert gate_entropy(model).item() == pytest.approx(math.log(4))
    for each in logits:
        each.data[:, 1] = 200.0  # exp(-200) is 0 in float32: no 0 * log 0
    assert gate_entropy(model).item() == 0
    with pytest.raises(ValueError, match="no learned mixture"):
        gate_entropy(tiny_model())


def test_the_log_goes_on_where_a_resumed_run_does(tmp_path):
    model, log = learned(), ChoiceLog()
    args, control = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True), TrainerControl()

    def run(start: int, stop: int) -> list[int]:
        state = TrainerState(global_step=start, is_world_process_zero=True)
        log.on_train_begin(args, state, control, model=model)
        for step in range(start + 1, stop + 1):
            state.global_step = step
            log.on_log(args, state, control, model=model, logs={"loss": 1.0})
        log.on_log(args, state, control, model=model, logs={"eval_loss": 1.0})
        lines = (tmp_path / "neuron_choices.jsonl").read_text().splitlines()
        return [json.loads(line)["step"] for line in lines]

    assert run(0, 3) == [0, 1, 2, 3]
    assert run(2, 4) == [0, 1, 2, 3, 4]
    entry = json.loads((tmp_path / "neuron_choices.jsonl").read_text().splitlines()[0])
    assert sum(entry["mixtures"][0]["neurons"].values()) == 48
    assert run(0, 1) == [0, 1]


@pytest.mark.parametrize("hardened", [False, True])
def test_the_report_shows_which_activation_won(hardened):
    model = learned()
    if hardened:
        harden(model)
    comparison = compare(subject("base", tiny_model()), [subject("mixed", model)], texts(), plan=WITHOUT_SPEED)
    choices = comparison.others[0].model.choices
    assert [(each.layer, each.family) for each in choices] == [(n, "mlp.act_fn") for n in range(3)]
    assert all(sum(each.neurons.values()) == 48 for each in choices)
    assert all((each.entropy is None) is hardened for each in choices)
    page = render_report(comparison)
    assert "Which activation won in mixed" in page
    figure = page.partition('id="figure-neuron-choices"')[2].partition("</figure>")[0]
    assert ("mean entropy" in figure) is not hardened
    assert comparison.base.choices == []
