"""Training runs its gated MLPs fused, gives the losses that plain PyTorch gives, and leaves a plain model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_train_mixtures import train_mixed
from tiny_llama import tiny_model
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaMLP

from neuroweave.activations import fused_glu, fused_glu_triton
from neuroweave.native.build import available
from neuroweave.training.fused_mlps import fuse_mlps
from neuroweave.training.metrics import METRICS_FILE, read_metrics

needs_compiler = pytest.mark.skipif(not available(), reason="no C++ compiler")


@needs_compiler
def test_training_is_fused_and_its_losses_are_those_of_plain_pytorch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    plain = fused_glu.planned_glu

    def counted(gate: Tensor, up: Tensor, activation: Any, plan: str) -> Tensor:
        calls.append(plan)
        return plain(gate, up, activation, plan)

    monkeypatch.setattr(fused_glu, "planned_glu", counted)
    losses, models = [], []
    for switch in ("1", "0"):
        monkeypatch.setenv(fused_glu.SWITCH, switch)
        before = len(calls)
        (tmp_path / switch).mkdir()
        _, trained, run = train_mixed(tmp_path / switch)
        assert (len(calls) > before) is (switch == "1")
        losses.append([each["loss"] for each in read_metrics(run / METRICS_FILE) if "loss" in each])
        models.append(trained)
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    ours, theirs = (torch.cat([each.flatten() for each in model.parameters()]) for model in models)
    assert (
        float((ours - theirs).detach().norm() / theirs.detach().norm()) < 1e-2
    )  # AdamW amplifies where a gradient is nearly zero


@needs_compiler
def test_only_where_there_are_kernels() -> None:
    model: Any = tiny_model()
    assert fuse_mlps(model, device="cpu", precision=torch.bfloat16).fused == []
    assert fuse_mlps(model, device="mps", precision=torch.float32).fused == []
    done = fuse_mlps(model, device="cpu", precision=torch.float32)
    assert len(done.fused) == model.config.num_hidden_layers
    done()
    assert type(model.model.layers[0].mlp) is LlamaMLP


def test_processes_that_have_no_weights_yet_fuse_too() -> None:
    with torch.device("meta"):
        model: Any = tiny_model()
    assert fused_glu.fuse_glu(model).left["model.layers.0.mlp"] == "it has no weights to try it with"
    assert len(fused_glu.fuse_glu(model, without_weights=True).fused) == model.config.num_hidden_layers


@pytest.mark.parametrize("fault", ["raises", "wrong"])
def test_triton_kernels_that_do_not_work_here_are_not_used(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def forward(gate: Tensor, up: Tensor, segments: Any) -> Tensor:
        if fault == "raises":
            raise RuntimeError("no such device\nmore")
        return fused_glu.twin_forward(gate, up, segments) * 1.01

    monkeypatch.setattr(fused_glu, "triton_supports", lambda tensor: True)
    monkeypatch.setattr(fused_glu.fused_glu_native, "supports", lambda tensor: False)
    monkeypatch.setattr(fused_glu_triton, "forward", forward)
    monkeypatch.setattr(fused_glu_triton, "backward", fused_glu.twin_backward)
    fused_glu.triton_agrees.cache_clear()
    gate, up = torch.randn(2, 5, 7)
    reason = {"raises": "RuntimeError: no such device", "wrong": "of the largest value off"}[fault]
    with pytest.warns(UserWarning, match=reason):
        found = fused_glu.fused_glu(gate, up, torch.nn.SiLU())
    torch.testing.assert_close(found, torch.nn.functional.silu(gate) * up)
    fused_glu.triton_agrees.cache_clear()
