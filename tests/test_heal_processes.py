"""A heal in two processes (gloo, on the CPU) is the heal of one with twice the accumulation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train_sharded import TORCHRUN, free_port
from tiny_llama import texts, tiny_model, tiny_tokenizer

from neuroweave.surgery.on_disk import patch_checkpoint
from neuroweave.training.heal import HealOptions, heal_checkpoint

OPTIONS = "--tokens 768 --window 32 --learning-rate 1e-3 --evaluate-every 6 --precision float32 --json"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    patch_checkpoint(tmp_path / "base", tmp_path / "patched", {"sites": [{"site": "mlp", "activation": "relu"}]})
    (tmp_path / "text").mkdir()
    for text in texts(count=24, words=64):
        (tmp_path / "text" / f"{text.name}.txt").write_text(text.text)
    return tmp_path


def run(models: Path, out: str, *more: str, launcher: tuple[str, ...] = ()):
    command = [sys.executable, "-m", *launcher, *(["-m"] if launcher else []), "neuroweave", "heal", "patched"]
    command += ["--teacher", "base", "--data", "text", "--output", out, *OPTIONS.split(), *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    return subprocess.run(command, cwd=models, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("loss", [pytest.param("full", marks=pytest.mark.slow), "topk"])
def test_two_processes_are_one_with_twice_the_accumulation(models: Path, loss: str) -> None:
    alone = run(models, "one", "--loss", loss, "--accumulate", "2")
    assert alone.returncode == 0, alone.stderr
    both = run(models, "two", "--loss", loss, launcher=(*TORCHRUN, str(free_port())))
    assert both.returncode == 0, both.stderr[-3000:]
    told = [json.loads(each.stdout) for each in (alone, both)]
    for name in ("kl_before", "kl_after"):
        assert told[1][name] == pytest.approx(told[0][name], abs=1e-5)
    assert told[0]["kl_after"] < 0.9 * told[0]["kl_before"]
    assert (told[1]["steps"], told[1]["tokens"]) == (told[0]["steps"], told[0]["tokens"]) == (12, 768)
    ours, theirs = (load_file(models / out / "model.safetensors") for out in ("two", "one"))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-4, msg=name)
    assert not list(models.glob(".*neuroweave*"))


def test_sharding_is_refused(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="start it with torchrun, not with FSDP"):
        heal_checkpoint(models / "patched", models / "base", models / "out", texts(), options=HealOptions(window=32))
    assert not (models / "out").exists()
