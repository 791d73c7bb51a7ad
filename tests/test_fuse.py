"""Fusing: exact against float64, nothing else touched, the same bytes however the work is cut, resumed or stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fusion_models import (
    HIDDEN,
    LAYERS,
    WIDE,
    deltas_for,
    llama_config,
    mlp_names,
    weights,
    write_checkpoint,
)
from safetensors import safe_open
from safetensors.torch import load_file

from neuroweave.checkpoint import Checkpoint
from neuroweave.checkpoint.journal import JOURNAL_FILE
from neuroweave.checkpoint.manifest import read_manifest, sha256_of
from neuroweave.surgery.fusion import tensor_edit
from neuroweave.surgery.fusion.dry_run import dry_run
from neuroweave.surgery.fusion.fuse import fuse_checkpoint, stored_deltas
from neuroweave.surgery.fusion.plan import FuseOptions

STEPS = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-23}  # relative to the binade's start


@pytest.fixture
def pair(tmp_path):
    """A model of three shards and its deltas, both bfloat16."""
    tensors = weights()
    model = write_checkpoint(tmp_path / "model", tensors, shards=3, config=llama_config())
    return model, write_checkpoint(tmp_path / "deltas", deltas_for(tensors), shards=2)


def fuse(model: Path, deltas: Path, out: Path, **options):
    run = {key: options.pop(key) for key in ("hashed", "workers", "copy", "overwrite", "scales") if key in options}
    return fuse_checkpoint(model, out, stored_deltas(deltas), FuseOptions(**options), **run)


def load(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def bytes_of(folder: Path, *, without: tuple[str, ...] = ()) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): sha256_of(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in without
    }


def reference(name: str, w: torch.Tensor, d: torch.Tensor, options: FuseOptions) -> np.ndarray:
    """The reference page's formulas in float64 NumPy."""
    w64, d64 = w.double().numpy(), d.double().numpy()
    if options.mode == "contour" and "gate_proj" in name:
        return w64 * (1 + np.clip(d64, -options.gamma_cap, options.gamma_cap))
    scale = {
        "seed": options.alpha * np.std(w64) / np.std(d64),
        "relative": options.alpha * (1 if options.mode == "contour" else np.std(w64)) / np.std(d64),
        "plain": options.alpha,
    }[options.alpha_mode]
    return w64 + scale * d64 * (w64 if options.mode == "contour" else 1.0)


def in_steps(new: torch.Tensor, old: torch.Tensor, wanted: np.ndarray) -> float:
    """The largest error in units in the last place (of the larger of old and new for float32, else of the result)."""
    size = np.abs(wanted) if new.dtype != torch.float32 else np.maximum(np.abs(wanted), np.abs(old.double().numpy()))
    smallest = torch.finfo(new.dtype).smallest_normal
    step = 2.0 ** np.floor(np.log2(np.maximum(size, smallest))) * STEPS[new.dtype]
    return float((np.abs(new.double().numpy() - wanted) / step).max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "options",
    [
        FuseOptions(),
        FuseOptions(alpha=3.7, gamma_cap=0.9),
        FuseOptions(alpha=64, gamma_cap=25),
        FuseOptions(alpha=0.5, alpha_mode="relative"),
        FuseOptions(alpha=0.3, mode="additive"),
        FuseOptions(alpha=1.5, mode="additive", alpha_mode="plain", targets=("gate", "up", "down")),
    ],
    ids=["defaults", "moderate", "seed-claim", "relative", "additive", "plain"],
)
def test_every_touched_tensor_is_within_one_unit_of_float64(tmp_path, dtype, options):
    tensors = weights(dtype)
    deltas = deltas_for(tensors, dtype, scale=0.4)
    model = write_checkpoint(tmp_path / "model", tensors, config=llama_config())
    source = stored_deltas(write_checkpoint(tmp_path / "deltas", deltas))
    result = fuse_checkpoint(model, tmp_path / "out", source, options)
    new = load(tmp_path / "out")
    assert new.keys() == tensors.keys()
    touched = {report.name for report in result.tensors}
    assert touched == {mlp_names(layer)[role] for layer in range(LAYERS) for role in options.targets}
    for name, old in tensors.items():
        if name in touched:
            wanted = reference(name, old, deltas[name], options)
            # float32 results carry the roundings of the arithmetic too, the others only the last one
            assert in_steps(new[name], old, wanted) <= (2.0 if dtype == torch.float32 else 1.0)
            assert not torch.equal(new[name], old)
        else:
            assert torch.equal(new[name], old)


def test_large_tensors_use_float32_sums_and_stay_exact(tmp_path):
    tensors = weights(torch.float32, hidden=1024, wide=1537, layers=1)
    deltas = deltas_for(tensors, torch.float32)
    assert tensors[mlp_names(0)["down"]].numel() > tensor_edit.EXACT_BELOW
    model = write_checkpoint(tmp_path / "model", tensors, config=llama_config())
    options = FuseOptions(alpha=64)
    fuse_checkpoint(model, tmp_path / "out", stored_deltas(write_checkpoint(tmp_path / "d", deltas)), options)
    name = mlp_names(0)["down"]
    wanted = reference(name, tensors[name], deltas[name], options)
    assert in_steps(load(tmp_path / "out")[name], tensors[name], wanted) <= 2.0


def test_the_scale_of_a_tensor_far_from_zero(tmp_path):
    tensors = weights(torch.float32, hidden=1024, wide=1537, layers=1)
    name = mlp_names(0)["down"]
    tensors[name] = tensors[name] * 1e-3 + 1.0  # the sums of squares alone would lose the variance
    deltas = deltas_for(tensors, torch.float32)
    model = write_checkpoint(tmp_path / "model", tensors, config=llama_config())
    result = fuse(model, write_checkpoint(tmp_path / "d", deltas), tmp_path / "out", alpha=1.0)
    [report] = [report for report in result.tensors if report.name == name]
    wanted = tensors[name].double().std(correction=0) / deltas[name].double().std(correction=0)
    assert report.scale == pytest.approx(float(wanted), rel=1e-6)


def test_everything_else_comes_along_to_the_byte(pair, tmp_path):
    model, deltas = pair
    (model / "tokenizer.json").write_bytes(b"{ }")
    (model / "chat_template.jinja").write_text("{{ x }}")
    (model / "extra").mkdir()
    (model / "extra" / "note.txt").write_text("kept")
    (model / "run.sh").write_text("#!/bin/sh\n")
    (model / "run.sh").chmod(0o755)
    (model / "model-00001-of-00003.safetensors").chmod(0o640)
    before = bytes_of(model)
    result = fuse(model, deltas, tmp_path / "out", layers=(1,))
    assert bytes_of(model) == before
    after = bytes_of(tmp_path / "out", without=("neuroweave_manifest.json",))
    assert after.keys() == before.keys()
    changed = {name for name in before if after[name] != before[name]}
    with Checkpoint(model) as checkpoint:
        assert changed == {checkpoint[name].file for role, name in mlp_names(1).items() if role != "up"}
        for file, header in checkpoint.shards.items():
            assert (tmp_path / "out" / file).read_bytes()[: header.data_start] == (model / file).read_bytes()[
                : header.data_start
            ]
            assert os.path.samefile(tmp_path / "out" / file, model / file) == (file not in changed)
    assert (tmp_path / "out" / "run.sh").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "out" / "model-00001-of-00003.safetensors").stat().st_mode & 0o777 == 0o640
    assert result.rewritten == len(changed)
    assert result.rewritten + result.linked == 3
    for file in after:
        if file.endswith(".safetensors"):
            with safe_open(tmp_path / "out" / file, "pt") as opened:
                assert opened.metadata() == {"format": "pt", "note": "kept as it is"}


def test_manifest_records_inputs_and_outputs(pair, tmp_path):
    model, deltas = pair
    result = fuse(model, deltas, tmp_path / "out", alpha=2.0)
    manifest = read_manifest(tmp_path / "out")
    assert manifest == result.manifest
    assert manifest["parameters"]["alpha"] == 2.0
    for folder, files in ((model, manifest["inputs"]["model"]["files"]), (tmp_path / "out", manifest["outputs"])):
        found = bytes_of(folder, without=("neuroweave_manifest.json",))
        assert {name: entry["sha256"] for name, entry in files.items()} == found
        assert all(entry["bytes"] == (folder / name).stat().st_size for name, entry in files.items())
    assert {name: entry["sha256"] for name, entry in manifest["inputs"]["deltas"]["files"].items()} == {
        name: digest for name, digest in bytes_of(deltas).items() if name.endswith(".safetensors")
    }
    again = fuse(tmp_path / "out", deltas, tmp_path / "again")
    assert again.manifest["inputs"]["model"]["manifest"] == manifest


def test_bytes_do_not_depend_on_workers_hashing_or_recorded_scales(pair, tmp_path, monkeypatch):
    model, deltas = pair
    first = fuse(model, deltas, tmp_path / "a", workers=1, alpha=4.0, rounding="stochastic")
    monkeypatch.setattr(tensor_edit, "PIECE_BYTES", 4096)
    fuse(model, deltas, tmp_path / "b", workers=4, alpha=4.0, rounding="stochastic", hashed=False, copy=True)
    scales = {report.name: report.scale for report in first.tensors if report.scale is not None}
    fuse(model, deltas, tmp_path / "c", workers=2, alpha=4.0, rounding="stochastic", scales=scales)
    files = [bytes_of(tmp_path / name, without=("neuroweave_manifest.json",)) for name in "abc"]
    assert files[0] == files[1] == files[2]
    entries = read_manifest(tmp_path / "b")["outputs"].values()
    assert not any("sha256" in entry for entry in entries)
    assert not os.path.samefile(tmp_path / "b" / "config.json", model / "config.json")


def test_partial_coverage_changes_the_leading_block_only(tmp_path):
    tensors = weights(torch.float32)
    names = mlp_names(1)
    deltas = {
        names["gate"]: torch.full((7, 11), 0.04),
        names["down"]: torch.randn(5, 200, generator=torch.Generator().manual_seed(3)),
    }
    model = write_checkpoint(tmp_path / "model", tensors, config=llama_config())
    result = fuse(model, write_checkpoint(tmp_path / "d", deltas), tmp_path / "out", layers=(1,))
    new = load(tmp_path / "out")
    for role, (rows, columns) in (("gate", (7, 11)), ("down", (5, 200))):
        old, now = tensors[names[role]], new[names[role]]
        wanted = reference(names[role], old[:rows, :columns], deltas[names[role]], FuseOptions())
        if role == "down":  # the standard deviation is the whole tensor's
            scale = 0.02 * np.std(old.double().numpy()) / np.std(deltas[names["down"]].double().numpy())
            part = old[:rows, :columns].double().numpy()
            wanted = part + scale * deltas[names["down"]].double().numpy() * part
        assert in_steps(now[:rows, :columns], old[:rows, :columns], wanted) <= 2.0
        outside = torch.ones_like(old, dtype=torch.bool)
        outside[:rows, :columns] = False
        assert torch.equal(now[outside], old[outside])
    coverage = {report.projection: report.coverage for report in result.tensors}
    assert coverage == {"gate": 77 / (HIDDEN * WIDE), "down": 1000 / (HIDDEN * WIDE)}


@pytest.mark.parametrize("prefix", ["model.language_model.layers", "language_model.model.layers"])
def test_deltas_under_another_prefix_and_a_vision_tower_of_the_same_names(tmp_path, prefix):
    tensors = weights(prefix=prefix)
    vision = {
        f"model.vision_tower.encoder.layers.{layer}.mlp.{role}_proj.linear.weight": torch.ones(9, 9)
        for layer in range(LAYERS)
        for role in ("gate", "up", "down")
    }
    model = write_checkpoint(tmp_path / "model", tensors | vision, config=llama_config())
    plain = deltas_for(weights())
    fuse(model, write_checkpoint(tmp_path / "plain", plain), tmp_path / "a")
    own = {name.replace("model.layers", prefix): value for name, value in plain.items()}
    fuse(model, write_checkpoint(tmp_path / "own", own), tmp_path / "b")
    assert sha256_of(tmp_path / "a" / "model.safetensors") == sha256_of(tmp_path / "b" / "model.safetensors")
    new = load(tmp_path / "a")
    assert all(torch.equal(new[name], value) for name, value in vision.items())
    assert not torch.equal(new[mlp_names(0, prefix)["gate"]], tensors[mlp_names(0, prefix)["gate"]])


def test_experts_and_router_stay_while_the_dense_mlp_is_fused(tmp_path):
    tensors = weights()
    experts = {}
    for layer in range(LAYERS):
        experts |= {
            f"model.layers.{layer}.experts.gate_up_proj": torch.randn(4, 18, HIDDEN),
            f"model.layers.{layer}.experts.down_proj": torch.randn(4, HIDDEN, 9),
            f"model.layers.{layer}.router.proj.weight": torch.randn(4, HIDDEN),
        }
    model = write_checkpoint(tmp_path / "model", tensors | experts, config=llama_config())
    deltas = deltas_for(tensors)
    result = fuse(model, write_checkpoint(tmp_path / "d", deltas), tmp_path / "out")
    assert any("mixture-of-experts" in note for note in result.plan.notes)
    new = load(tmp_path / "out")
    assert all(torch.equal(new[name], value) for name, value in experts.items())
    bad = deltas | {"model.layers.0.experts.down_proj": experts["model.layers.0.experts.down_proj"]}
    with pytest.raises(ValueError, match=r"experts\.down_proj: mixture-of-experts"):
        fuse(model, write_checkpoint(tmp_path / "bad", bad), tmp_path / "no")


def test_stochastic_rounding_is_unbiased_and_seeded(tmp_path):
    tensors = weights(torch.bfloat16, hidden=256, wide=1000, layers=1)
    name = mlp_names(0)["down"]
    deltas = {key: torch.full_like(value, 0.0004) for key, value in deltas_for(tensors, roles=("gate",)).items()}
    model = write_checkpoint(tmp_path / "model", tensors, config=llama_config())
    folder = write_checkpoint(tmp_path / "d", deltas)
    out = {}
    for label, options in {
        "nearest": {}, "one": {"rounding": "stochastic", "seed": 1}, "again": {"rounding": "stochastic", "seed": 1},
        "two": {"rounding": "stochastic", "seed": 2},
    }.items():  # fmt: skip
        fuse(model, folder, tmp_path / label, targets=("gate",), **options)
        out[label] = load(tmp_path / label)[mlp_names(0)["gate"]].double()
    old = tensors[mlp_names(0)["gate"]].double()
    assert torch.equal(out["nearest"], old)  # an update of 0.0004 rounds away everywhere
    assert torch.equal(out["one"], out["again"])
    assert not torch.equal(out["one"], out["two"])
    gain = float((out["one"] * old).sum() / (old * old).sum() - 1)
    noise = 2.0**-8 / np.sqrt(old.numel())  # one rounding of 2^-8 relative size at most, averaged
    assert abs(gain - float(torch.tensor(0.0004).bfloat16())) < 5 * noise
    steps = (out["one"] - old).abs() / 2.0 ** (torch.floor(torch.log2(old.abs().clamp_min(1e-30))) - 7)
    assert float(steps[old != 0].max()) <= 1.0
    assert name not in deltas


def test_stochastic_rounding_to_float16_reaches_both_neighbours(tmp_path):
    tensors = weights(torch.float16, hidden=64, wide=1000, layers=1)
    names = mlp_names(0)
    tensors[names["gate"]] = torch.full((1000, 64), 3e-6).half()  # below the normal range
    tensors[names["down"]] = torch.full((64, 1000), 1.5).half()
    deltas = {names["gate"]: torch.full((1000, 64), 0.01), names["down"]: torch.full((64, 1000), 2.0**-12)}
    model = write_checkpoint(tmp_path / "model", tensors, config=llama_config())
    options = {"rounding": "stochastic", "gamma_cap": 1.0, "alpha": 1.0, "alpha_mode": "plain"}
    fuse(model, write_checkpoint(tmp_path / "d", deltas), tmp_path / "out", **options)
    new = load(tmp_path / "out")
    for name, delta in deltas.items():
        old = tensors[name].double()
        wanted = float(old[0, 0] * (1 + float(delta.flatten()[0])))
        values = new[name].double()
        assert 2 <= len(values.unique()) <= 2
        spread = float(values.std() / np.sqrt(values.numel()))
        assert abs(float(values.mean()) - wanted) < 5 * spread


# Stopping and resuming


SLOW = """
import sys, time
import neuroweave.surgery.fusion.tensor_edit as edit
original = edit.edit_block
def slow(*arguments):
    time.sleep(0.003)
    return original(*arguments)
edit.edit_block = slow
from neuroweave.cli.main import main
main(sys.argv[1:])
"""


def start_slow(model: Path, deltas: Path, out: Path) -> subprocess.Popen:
    words = ["fuse", "--model", model, "--weights", deltas, "--output", out, "--alpha", "3"]
    return subprocess.Popen([sys.executable, "-c", SLOW, *map(str, words)], stderr=subprocess.PIPE, text=True)


def wait_for_journal(folder: Path, process: subprocess.Popen) -> Path:
    for _ in range(3000):
        found = list(folder.glob(f".out.neuroweave-partial-*/{JOURNAL_FILE}"))
        if found and found[0].stat().st_size:
            return found[0].parent
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    raise AssertionError("no shard was finished")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_stopped_fuse_is_resumed_to_the_same_bytes(tmp_path, how):
    tensors = weights(hidden=256, wide=1024)
    model = write_checkpoint(tmp_path / "model", tensors, shards=3, config=llama_config())
    deltas = write_checkpoint(tmp_path / "deltas", deltas_for(tensors))
    before = bytes_of(model)
    fuse(model, deltas, tmp_path / "whole", alpha=3.0)
    process = start_slow(model, deltas, tmp_path / "out")
    stage = wait_for_journal(tmp_path, process)
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert "Traceback" not in errors
    assert process.returncode != 0
    assert stage.is_dir()
    assert not (tmp_path / "out").exists()
    assert bytes_of(model) == before
    result = fuse(model, deltas, tmp_path / "out", alpha=3.0)
    assert 1 <= result.resumed < 3
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    assert {report.name for report in result.tensors} == {
        mlp_names(layer)[role] for layer in range(LAYERS) for role in ("gate", "down")
    }
    assert not list(tmp_path.glob(".out*"))


def interrupted(pair, tmp_path) -> Path:
    """A folder that a fuse left when it was stopped after its second shard."""
    model, deltas = pair
    count = 0

    def stop(done: int, total: int) -> None:
        nonlocal count
        count = done
        if done > 0.8 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fuse_checkpoint(model, tmp_path / "out", stored_deltas(deltas), FuseOptions(), progress=stop, workers=1)
    assert count
    [stage] = tmp_path.glob(".out.neuroweave-partial-*")
    assert (stage / JOURNAL_FILE).read_text().count("\n") >= 1
    return stage


def test_a_damaged_or_foreign_shard_is_written_again(pair, tmp_path):
    stage = interrupted(pair, tmp_path)
    lines = (stage / JOURNAL_FILE).read_text().splitlines()
    first = json.loads(lines[0].split(" ", 1)[1])["file"]
    raw = bytearray((stage / first).read_bytes())
    raw[-1] ^= 1
    (stage / first).unlink()
    (stage / first).write_bytes(raw)
    (stage / JOURNAL_FILE).write_text("\n".join(lines) + "\nffffffff torn li")
    result = fuse(*pair, tmp_path / "out")
    assert result.resumed == len(lines) - 1
    fuse(*pair, tmp_path / "whole")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_another_job_does_not_take_over_what_was_left(pair, tmp_path):
    stage = interrupted(pair, tmp_path)
    os.utime(stage, (1, 1))
    result = fuse(*pair, tmp_path / "out", alpha=0.5)
    assert result.resumed == 0
    fuse(*pair, tmp_path / "whole", alpha=0.5)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_a_changed_input_starts_afresh(pair, tmp_path):
    interrupted(pair, tmp_path)
    model, _ = pair
    path = model / "model-00001-of-00003.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-2] ^= 1
    path.write_bytes(raw)
    assert fuse(*pair, tmp_path / "out").resumed == 0


def test_two_runs_for_one_output_do_not_meet(pair, tmp_path):
    def second(done: int, total: int) -> None:
        with pytest.raises(ValueError, match="another run is writing this output"):
            fuse(*pair, tmp_path / "out")

    fuse_checkpoint(pair[0], tmp_path / "out", stored_deltas(pair[1]), FuseOptions(), progress=second)
    assert (tmp_path / "out" / "config.json").is_file()


# Refusals: a clear error, and nothing is left


def refused(model: Path, deltas: Path, match: str, **options) -> None:
    out = model.parent / "refused"
    with pytest.raises(ValueError, match=match):
        fuse(model, deltas, out, **options)
    assert not out.exists()
    assert not list(model.parent.glob(".refused*"))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"alpha": -1.0}, "alpha is a number of at least 0, got -1"),
        ({"alpha": float("nan")}, "alpha is a number of at least 0, got nan"),
        ({"alpha": float("inf")}, "alpha is a number of at least 0, got inf"),
        ({"gamma_cap": -0.1}, "gamma_cap is a number of at least 0"),
        ({"gamma_cap": float("nan")}, "gamma_cap is a number of at least 0"),
        ({"layers": (1, 3)}, "layer 3 does not exist: the model has layers 0 to 2"),
        ({"mode": "sideways"}, "mode 'sideways' is not known"),
        ({"targets": ("up",)}, "contour changes gate and down only"),
        ({"targets": ()}, "targets is empty"),
    ],
)
def test_options_that_mean_nothing(pair, options, match):
    refused(*pair, match, **options)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda d, n: d.pop(n["down"]), r"no delta for model\.layers\.1\.mlp\.down_proj\.weight"),
        (lambda d, n: d.update({"model.layers.9.mlp.up_proj.weight": torch.ones(2, 2)}), "no tensor for the delta"),
        (lambda d, n: d.update({"model.norm.weight": torch.ones(HIDDEN)}), r"norm\.weight: not a gate, up or down"),
        (lambda d, n: d.update({n["gate"]: torch.ones(WIDE + 1, HIDDEN)}), "larger than the tensor"),
        (lambda d, n: d.update({n["gate"]: torch.ones(WIDE)}), r"the delta has shape \[307\]"),
        (lambda d, n: d.update({n["gate"]: torch.ones(WIDE, HIDDEN, dtype=torch.int8)}), "the delta is int8"),
        (lambda d, n: d.update({n["gate"]: torch.ones(0, HIDDEN)}), "is empty"),
        (lambda d, n: d[n["gate"]].view(-1)[5:6].fill_(torch.nan), "gate_proj.weight: the delta holds NaN"),
        (lambda d, n: d[n["down"]].view(-1)[5:6].fill_(torch.inf), "down_proj.weight: the delta holds NaN or inf"),
        (lambda d, n: d[n["down"]].fill_(0.3), "the delta has no variance"),
    ],
)
def test_deltas_that_do_not_fit(tmp_path, change, match):
    tensors = weights()
    model = write_checkpoint(tmp_path / "model", tensors, config=llama_config())
    deltas = deltas_for(tensors)
    change(deltas, mlp_names(1))
    refused(model, write_checkpoint(tmp_path / "deltas", deltas), match)


def test_models_that_cannot_be_fused(tmp_path):
    tensors = weights()
    deltas = write_checkpoint(tmp_path / "deltas", deltas_for(tensors))
    names = mlp_names(1)
    quantized = llama_config() | {"quantization_config": {"quant_method": "fp8"}}
    refused(write_checkpoint(tmp_path / "q", tensors, config=quantized), deltas, r"a quantized model \(fp8\)")
    float8 = tensors | {names["gate"]: tensors[names["gate"]].to(torch.float8_e4m3fn)}
    refused(write_checkpoint(tmp_path / "f8", float8, config=llama_config()), deltas, "stores it as float8_e4m3fn")
    broken = {name: value.clone() for name, value in tensors.items()}
    broken[names["down"]][3, 4] = torch.nan
    refused(write_checkpoint(tmp_path / "nan", broken, config=llama_config()), deltas, "the weights hold NaN")
    small = weights(torch.float16)
    small[names["gate"]][0, 0] = 60000.0
    large = deltas_for(small, torch.float16)
    large[names["gate"]].fill_(0.5)
    model = write_checkpoint(tmp_path / "f16", small, config=llama_config())
    refused(model, write_checkpoint(tmp_path / "big", large), "does not fit F16", gamma_cap=1.0)


def test_a_delta_that_names_a_tensor_twice(tmp_path):
    tensors = weights()
    deltas = deltas_for(tensors)
    twin = {name.replace("model.", "language_model.model."): value.clone() for name, value in deltas.items()}
    model = write_checkpoint(tmp_path / "model", tensors, config=llama_config())
    refused(model, write_checkpoint(tmp_path / "deltas", deltas | twin), "two deltas mean this tensor")


def test_outputs_that_cannot_be_used(pair, tmp_path):
    model, deltas = pair
    with pytest.raises(ValueError, match="the output is the source itself"):
        fuse(model, deltas, model)
    with pytest.raises(ValueError, match="the output is the source itself"):
        fuse(model, deltas, deltas, overwrite=True)
    with pytest.raises(ValueError, match="lies inside the source"):
        fuse(model, deltas, model / "out")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="symbolic link"):
        fuse(model, deltas, tmp_path / "link")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    with pytest.raises(ValueError, match="not empty"):
        fuse(model, deltas, tmp_path / "full")


def test_too_little_disk_space(pair, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    refused(*pair, "are needed here")


@pytest.mark.parametrize("damage", ["truncated", "index", "traversal", "missing", "header"])
def test_a_damaged_model_is_refused_before_anything_is_written(pair, damage):
    model, deltas = pair
    file, index = model / "model-00002-of-00003.safetensors", model / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = next(key for key, value in content["weight_map"].items() if value == file.name)
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "index":
        content["weight_map"][name] = "model-00001-of-00003.safetensors"
    elif damage == "traversal":
        content["weight_map"][name] = "../model-00002-of-00003.safetensors"
    elif damage == "missing":
        file.unlink()
    else:
        file.write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    index.write_text(json.dumps(content))
    expected = {
        "truncated": "truncated", "index": "does not hold it|sends to", "traversal": "not a plain file name",
        "missing": "not in the folder", "header": "the header claims",
    }  # fmt: skip
    refused(model, deltas, expected[damage])


def test_a_source_that_shrinks_meanwhile_is_an_error(pair, tmp_path):
    model, deltas = pair
    path = model / "model-00003-of-00003.safetensors"

    def shrink(done: int, total: int) -> None:
        os.truncate(path, 2000)

    with pytest.raises(ValueError, match=r"cut off|truncated"):
        fuse_checkpoint(model, tmp_path / "out", stored_deltas(deltas), FuseOptions(), progress=shrink, workers=1)
    assert not list(tmp_path.glob("*out*"))


def test_a_header_whose_order_is_not_that_of_the_data(tmp_path):
    tensors = weights(torch.bfloat16) | {"a.first_in_json": torch.ones(7, dtype=torch.float32)}
    model = write_checkpoint(tmp_path / "model", tensors, config=llama_config())
    path = model / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    shuffled = json.dumps(dict(sorted(header.items(), reverse=True))).encode()
    path.write_bytes(len(shuffled).to_bytes(8, "little") + shuffled + raw[8 + length :])
    fuse(model, write_checkpoint(tmp_path / "d", deltas_for(tensors)), tmp_path / "out", alpha=2.0)
    assert (tmp_path / "out" / "model.safetensors").read_bytes()[8 : 8 + len(shuffled)] == shuffled
    new = load_file(tmp_path / "out" / "model.safetensors")
    for name, old in tensors.items():
        assert torch.equal(new[name], old) == ("gate_proj" not in name and "down_proj" not in name)


# What an attack found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_an_update_of_zero_keeps_every_bit(tmp_path, dtype, rounding):
    tensors = weights(dtype)
    for name in mlp_names(1).values():
        tensors[name][::3] = -0.0
    model = write_checkpoint(tmp_path / "model", tensors, config=llama_config())
    folder = write_checkpoint(tmp_path / "d", deltas_for(tensors))
    result = fuse(model, folder, tmp_path / "out", alpha=0, gamma_cap=0, rounding=rounding)
    assert sha256_of(tmp_path / "out" / "model.safetensors") == sha256_of(model / "model.safetensors")
    assert not any(report.changed for report in result.tensors)


@pytest.mark.parametrize("role", ["gate", "down"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7FC00000, 0x7F800000])
def test_no_delta_that_is_not_finite_slips_through(tmp_path, role, rounding, bits):
    tensors = weights(torch.bfloat16)
    deltas = deltas_for(tensors, torch.float32)
    deltas[mlp_names(1)[role]].view(torch.int32)[0, 3] = bits
    model = write_checkpoint(tmp_path / "model", tensors, config=llama_config())
    folder = write_checkpoint(tmp_path / "d", deltas)
    refused(model, folder, "the delta holds NaN or infinite", rounding=rounding)
    plain = {"mode": "additive", "alpha_mode": "plain", "alpha": 1.0}
    refused(model, folder, "the delta holds NaN or infinite", rounding=rounding, **plain)


def test_sizes_at_the_ends_of_the_range_are_reported_as_numbers(tmp_path):
    tensors = weights(torch.bfloat16)
    tensors = {name: value * 1e20 if "_proj" in name else value for name, value in tensors.items()}
    model = write_checkpoint(tmp_path / "model", tensors, config=llama_config())
    folder = write_checkpoint(tmp_path / "d", deltas_for(tensors))
    for label, alpha in (("small", 1e-22), ("large", 1e-3)):
        result = fuse(model, folder, tmp_path / label, alpha=alpha)
        assert all(np.isfinite(report.relative_change) for report in result.tensors)
        assert read_manifest(tmp_path / label)["tensors"]
        gates = [report.relative_change for report in result.tensors if report.projection == "gate"]
        assert all(0.02 < change < 0.03 for change in gates)  # deltas of 0.03, clamped at 0.05


@pytest.mark.parametrize("scale", [1e-22, 1e-24, 1e-38])
def test_deltas_whose_squares_leave_float32(tmp_path, scale):
    tensors = weights(torch.float32, hidden=1024, wide=1030, layers=1)
    deltas = {name: value * scale for name, value in deltas_for(tensors, torch.float32).items()}
    model = write_checkpoint(tmp_path / "model", tensors, config=llama_config())
    result = fuse(model, write_checkpoint(tmp_path / "d", deltas), tmp_path / "out")
    [report] = [report for report in result.tensors if report.projection == "down"]
    w, d = (each[mlp_names(0)["down"]].double().std(correction=0) for each in (tensors, deltas))
    assert report.scale == pytest.approx(float(0.02 * w / d), rel=1e-6)


def test_a_source_changed_behind_an_interrupted_run(pair, tmp_path):
    stage = interrupted(pair, tmp_path)
    first = json.loads((stage / JOURNAL_FILE).read_text().splitlines()[0].split(" ", 1)[1])["file"]
    path = pair[0] / first
    before = path.stat()
    with open(path, "r+b") as file:
        file.seek(-20, os.SEEK_END)
        file.write(bytes(20))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    fuse(*pair, tmp_path / "out")
    fuse(*pair, tmp_path / "whole")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_sources_that_are_links_into_the_output(pair, tmp_path):
    model, deltas = pair
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in model.iterdir():
        (linked / path.name).symlink_to(path)
    before = bytes_of(model)
    with pytest.raises(ValueError, match="the output contains the source"):
        fuse(linked, deltas, model, overwrite=True)
    assert bytes_of(model) == before
    fuse(linked, deltas, tmp_path / "out")  # a hub's cache holds such links
    fuse(model, deltas, tmp_path / "whole")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_what_cannot_come_along_is_told_before_anything_is_written(pair, tmp_path):
    model, deltas = pair
    for make, match in (
        (lambda path: os.mkfifo(path), "neither a file nor a folder"),
        (lambda path: path.symlink_to("nowhere"), "a link to nothing"),
    ):
        make(model / "odd")
        refused(model, deltas, match)
        with pytest.raises(ValueError, match=match):
            dry_run(model, None, stored_deltas(deltas), FuseOptions())
        (model / "odd").unlink()
    for name, text, match in (
        ("neuroweave_manifest.json", "{", "is not valid JSON"),
        (JOURNAL_FILE, "", "the journal of an interrupted fuse"),
    ):
        (model / name).write_text(text)
        refused(model, deltas, match)
        (model / name).unlink()


def test_a_linked_subfolder_comes_along(pair, tmp_path):
    model, deltas = pair
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "a.txt").write_text("kept")
    (model / "assets").symlink_to(tmp_path / "assets")
    (tmp_path / "assets" / "loop").symlink_to(tmp_path / "assets")
    fuse(model, deltas, tmp_path / "out")
    assert (tmp_path / "out" / "assets" / "a.txt").read_text() == "kept"


def test_copies_count_in_the_disk_space(pair, tmp_path, monkeypatch):
    model, deltas = pair
    whole = sum(path.stat().st_size for path in model.iterdir())
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": whole - 1000})())
    with pytest.raises(ValueError, match="MB are needed here"):
        fuse(model, deltas, tmp_path / "out", layers=(0,), copy=True)
    fuse(model, deltas, tmp_path / "out", layers=(0,))


def test_many_shards_with_few_descriptors(tmp_path):
    tensors = weights(hidden=16, wide=24, layers=30)
    model = write_checkpoint(tmp_path / "model", tensors, shards=90, config=llama_config(16, 24, 30))
    deltas = write_checkpoint(tmp_path / "deltas", deltas_for(tensors), shards=45)
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "from neuroweave.cli.main import main; main(sys.argv[1:])"
    )
    words = ["fuse", "--model", model, "--weights", deltas, "--output", tmp_path / "out"]
    done = subprocess.run([sys.executable, "-c", script, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_weights_in_another_form_come_along_with_a_word(pair, tmp_path):
    model, deltas = pair
    (model / "pytorch_model.bin").write_bytes(b"original")
    result = fuse(model, deltas, tmp_path / "out")
    assert result.plan.notes == ["pytorch_model.bin: comes along as it is and still holds the original weights"]
    assert (tmp_path / "out" / "pytorch_model.bin").read_bytes() == b"original"
