"""Learned mixtures in `neuroweave train`: their parameters alone, their choices logged, the gate entropy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import texts, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

import neuroweave
from neuroweave.activations.mixtures import NeuronMixture
from neuroweave.activations.neuron_choices import gate_entropy
from neuroweave.training.configuration import build_configuration
from neuroweave.training.train import train


def mixed_model(folder: Path) -> Path:
    """A patched Llama with learned mixtures, and its tokenizer."""
    model = tiny_model()
    neuroweave.patch(model, {"sites": [{"site": "mlp", "activation": {"mixture": ["original", "relu", "tanh"]}}]})
    for module in model.modules():
        if isinstance(module, NeuronMixture):
            module.gating_logits.data.normal_(generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def train_mixed(tmp_path: Path, **training: Any) -> tuple[Any, Any, Path]:
    """(model before, model after, run)"""
    start = mixed_model(tmp_path / "mixed")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": each.text}) + "\n" for each in texts(30)))
    run = tmp_path / "run"
    train(
        build_configuration(
            {
                "model": {"path": str(start)},
                "data": {"sources": [{"path": str(tmp_path / "text.jsonl")}], "sequence_length": 32, "held_out": 0.2},
                "training": {
                    "steps": 6, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 0.1, "decay_steps": 0,
                    "precision": "float32", **training,
                },
                "metrics": {"log_every": 2},
                "output": {"folder": str(run), "save_every": 100},
            }
        )
    )  # fmt: skip
    loaded = (AutoModelForCausalLM.from_pretrained(folder) for folder in (start, run / "model"))
    return *loaded, run


def test_mixtures_alone_are_trained_and_their_choices_logged(tmp_path: Path) -> None:
    before, after, run = train_mixed(tmp_path, parts="mixtures")
    for (name, ours), theirs in zip(after.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(ours, theirs) is not name.endswith("gating_logits")
    log = [json.loads(line) for line in (run / "neuron_choices.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [0, 2, 4, 6]
    assert log[0]["mixtures"][0]["entropy"] != log[-1]["mixtures"][0]["entropy"]


def test_the_gate_entropy_makes_neurons_decide(tmp_path: Path) -> None:
    entropies = {}
    for weight in (0.0, 10.0):
        _, after, _ = train_mixed(tmp_path / str(weight), parts="mixtures", gate_entropy=weight)
        entropies[weight] = gate_entropy(after).item()
    assert entropies[10.0] < 0.8 * entropies[0.0]


def test_the_gate_entropy_counts_once_a_step_however_the_batch_is_cut(tmp_path: Path) -> None:
    ends = []
    for micro in (1, 4):
        _, after, _ = train_mixed(tmp_path / str(micro), gate_entropy=1.0, micro_batch_size=micro, learning_rate=1e-2)
        ends.append(after)
    for ours, theirs in zip(*(model.parameters() for model in ends), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_no_mixture_no_gate_entropy(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "plain")
    tiny_tokenizer().save_pretrained(tmp_path / "plain")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": each.text}) + "\n" for each in texts(30)))
    for training, message in (
        ({"parts": "mixtures"}, "no learned mixture"),
        ({"gate_entropy": 1.0}, "no gate entropy"),
    ):
        with pytest.raises(ValueError, match=message):
            train(
                build_configuration(
                    {
                        "model": {"path": str(tmp_path / "plain")},
                        "data": {"sources": [{"path": str(tmp_path / "text.jsonl")}], "sequence_length": 32},
                        "training": {"steps": 2, "batch_size": 2, "micro_batch_size": 2, **training},
                        "output": {"folder": str(tmp_path / "run")},
                    }
                )
            )
