"""The compiled arithmetic of a fuse: bit for bit what NumPy does, right by torch and float64, and never needed."""

from __future__ import annotations

import math
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from fusion_models import deltas_for, llama_config, weights, write_checkpoint

from neuroweave.checkpoint.manifest import read_manifest, sha256_of
from neuroweave.surgery.fusion import compiled
from neuroweave.surgery.fusion.arithmetic import (
    BLOCK,
    FORMULAS,
    LANES,
    STORED,
    Edit,
    Workspace,
    block_moments,
    edit_block,
)
from neuroweave.surgery.fusion.compiled import Kernel
from neuroweave.surgery.fusion.fuse import fuse_checkpoint, stored_deltas
from neuroweave.surgery.fusion.plan import FuseOptions

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SHAPES = [(1, 1), (1, 7), (7, 1), (123, 7), (7, 1025), (3, 2048), (1, BLOCK)]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """Compiled here: every machine that runs these tests has a C compiler."""
    found = compiled.compile_kernel(tmp_path_factory.mktemp("compiled") / "kernel.so")
    assert found is not None
    return found


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and every fuse large enough to compile for."""
    monkeypatch.setenv("NEUROWEAVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(compiled.SWITCH, raising=False)
    monkeypatch.setattr(compiled, "WORTH_BYTES", 1)
    return tmp_path / "cache" / "compiled"


def values(shape, seed, dtype=BFLOAT16, spread=0.05):
    return (np.random.default_rng(seed).standard_normal(shape) * spread).astype(dtype)


def bfloat16(*numbers: float) -> np.ndarray:
    return np.array([numbers], BFLOAT16)


def by_torch(edit: Edit, w: np.ndarray, d: np.ndarray) -> np.ndarray:
    """The formulas in torch's float32, and torch's rounding, as bits."""
    x, y = (torch.from_numpy(each.view(np.int16).copy()).view(torch.bfloat16).float() for each in (w, d))
    new = {
        "contour down": lambda: x * (y * torch.tensor(edit.scale, dtype=torch.float32) + 1),
        "contour gate": lambda: x * (y.clamp(-edit.gamma, edit.gamma) + 1),
        "add": lambda: x + y * torch.tensor(edit.scale, dtype=torch.float32),
    }[edit.formula]()
    return new.to(torch.bfloat16).view(torch.int16).numpy().view("u2")


# Blocks


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("place", [0, BLOCK])  # measured for the report, and not
def test_a_block_is_what_numpy_and_torch_give(kernel, formula, place):
    edit = Edit("w", formula, "BF16", 0.02, 0.05, scale=0.7)
    for shape in SHAPES:
        w, d = values(shape, 1), values(shape, 2)
        ours, theirs = w.copy(), w.copy()
        effect = kernel.edit_block(edit, ours, d, place, Workspace())
        assert effect == edit_block(edit, theirs, d, place, Workspace())
        assert np.array_equal(ours.view("u2"), theirs.view("u2"))
        assert np.array_equal(ours.view("u2"), by_torch(edit, w, d))
        assert effect.changed == np.count_nonzero(ours.view("u2") != w.view("u2"))


@pytest.mark.parametrize("formula", FORMULAS)
def test_every_stored_value_rounds_as_torch_rounds_it(kernel, formula):
    """Subnormals, both zeros, the largest: all finite bfloat16, with deltas from the smallest to 1."""
    bits = np.arange(1 << 16, dtype="u2")
    w = bits[bits & 0x7F80 != 0x7F80].view(BFLOAT16)[None]
    for factor in (0.0, 9.2e-41, 3e-20, 1.0):
        d = np.resize(values((1, 977), 3, spread=0.3), w.shape) * BFLOAT16.type(factor)
        edit = Edit("w", formula, "BF16", 0.02, 0.05, scale=0.9)
        part = np.isfinite(by_torch(edit, w, d).view(BFLOAT16).astype("f4"))
        ours, delta = np.ascontiguousarray(w[part])[None], np.ascontiguousarray(d[part])[None]
        wanted = by_torch(edit, ours, delta)
        assert part.mean() > 0.99
        kernel.edit_block(edit, ours, delta, 0, Workspace())
        assert np.array_equal(ours.view("u2"), wanted)


def test_ties_go_to_even_and_a_delta_of_zero_changes_nothing(kernel):
    step = 2.0**-7  # between bfloat16 numbers from 1 to 2
    w = bfloat16(1, 1 + step, -1, -1 - step, 1, 1, 2.0**-133, -0.0)
    d = bfloat16(step / 2, step / 2, -step / 2, -step / 2, step / 2 + 2.0**-15, step / 4, 0, -0.0)
    edit = Edit("w", "add", "BF16", 1.0, 0.05, scale=1.0)
    effect = kernel.edit_block(edit, w, d, 0, Workspace())
    wanted = bfloat16(1, 1 + 2 * step, -1, -1 - 2 * step, 1 + step, 1, 2.0**-133, -0.0)
    assert np.array_equal(w.view("u2"), wanted.view("u2"))
    assert effect.changed == 3


@pytest.mark.parametrize("formula", FORMULAS)
def test_parts_of_longer_rows_are_edited_alone(kernel, formula):
    edit = Edit("w", formula, "BF16", 0.02, 0.05, scale=0.7)
    whole, d = values((41, 3000), 4), values((41, 2777), 5)
    ours, theirs = whole.copy(), whole.copy()
    effect = kernel.edit_block(edit, ours[:29, 11:1311], d[:29, 7:1307], 0, Workspace())
    assert effect == edit_block(edit, theirs[:29, 11:1311], d[:29, 7:1307], 0, Workspace())
    assert np.array_equal(ours.view("u2"), theirs.view("u2"))
    assert np.array_equal(ours[29:].view("u2"), whole[29:].view("u2"))
    assert effect.count == 29 * 1300


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("where", [0, 5000])
@pytest.mark.parametrize(
    ("weight", "delta", "scale"),
    [(np.inf, 0.1, 1.0), (np.nan, 0.1, 1.0), (0.1, np.inf, 1.0), (0.1, -np.inf, 1.0), (0.0, np.nan, 1.0),
     (3e38, 3e38, 1.0), (0.1, 0.1, 1e300)],
)  # fmt: skip
def test_what_is_not_finite_is_refused_in_the_same_words(kernel, formula, where, weight, delta, scale):
    edit = Edit("w", formula, "BF16", 0.02, 1.0, scale=scale)
    w, d = values((3, 2048), 6), values((3, 2048), 7)
    w.reshape(-1)[where], d.reshape(-1)[where] = weight, delta
    before, messages = w.copy(), []
    for change in (kernel.edit_block, edit_block):
        w = before.copy()
        try:
            change(edit, w, d, 0, Workspace())
        except ValueError as error:
            messages.append(str(error))
            assert np.array_equal(w.view("u2"), before.view("u2"))
        else:
            messages.append(w.tobytes().hex())
    assert messages[0] == messages[1]
    if not (math.isfinite(weight) and math.isfinite(delta)):
        assert "hold" in messages[0]


def test_a_refused_part_of_longer_rows_is_left_as_it_was(kernel):
    w, d = values((5, 1500), 8), values((5, 1500), 9)
    d[3, 1200] = np.inf
    before = w.copy()
    with pytest.raises(ValueError, match="the delta holds NaN or infinite values"):
        kernel.edit_block(Edit("w", "add", "BF16", 1.0, 1.0, scale=1.0), w[:, 3:1303], d[:, 3:1303], 0, Workspace())
    assert np.array_equal(w.view("u2"), before.view("u2"))


# Moments


@pytest.mark.parametrize("size", [1, 7, 123, LANES - 1, LANES, LANES + 1, BLOCK, 2 * BLOCK + 123])
@pytest.mark.parametrize("factor", [1.0, 1e-30, 1e30])  # squares that float32 holds, and not
def test_moments_are_numpys_and_right(kernel, size, factor):
    numbers = values((1, size), 10) * BFLOAT16.type(factor)
    found = kernel.block_moments(numbers, exact=False)
    wide = numbers.astype("f8")
    assert found == block_moments(numbers, exact=False)
    assert found.squares == pytest.approx(float((wide**2).sum()), rel=2e-6)
    assert found.total == pytest.approx(float(wide.sum()), abs=2e-6 * float(np.abs(wide).sum()))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_moments_say_that_a_value_is_not_finite(kernel, value):
    numbers = values((3, 999), 11)
    numbers[1, 5] = value
    for each in (kernel.block_moments, block_moments):
        assert not each(numbers, exact=False).finite


# Whole checkpoints


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "options",
    [{}, {"alpha_mode": "relative", "alpha": 0.3}, {"mode": "additive", "targets": ("gate", "up", "down")},
     {"mode": "additive", "alpha_mode": "plain", "alpha": 1.0}, {"rounding": "stochastic"},
     {"mode": "append", "gain": 0.5}],
    ids=["contour", "relative", "additive", "plain", "stochastic", "append"],
)  # fmt: skip
def test_a_fuse_gives_the_same_bytes_with_and_without(tmp_path, cache, monkeypatch, dtype, options):
    sizes = {"hidden": 1025, "wide": 1031, "layers": 1}  # large enough for float32 moments, and odd
    tensors = weights(dtype, **sizes)
    new = deltas_for(
        weights(dtype, hidden=1025, wide=7, layers=1) if options.get("mode") == "append" else tensors, dtype
    )
    model = write_checkpoint(tmp_path / "model", tensors, config=llama_config(**sizes))
    deltas = write_checkpoint(tmp_path / "deltas", new)
    calls = []
    original = Kernel.edit_block
    monkeypatch.setattr(Kernel, "edit_block", lambda *words: (calls.append(1), original(*words))[1])
    for name, switch in (("with", "1"), ("without", "0")):
        monkeypatch.setenv(compiled.SWITCH, switch)
        calls.clear()
        fuse_checkpoint(model, tmp_path / name, stored_deltas(deltas), FuseOptions(**options))
        assert bool(calls) == (name == "with" and options.get("mode") != "append" and dtype == torch.bfloat16)
    assert sha256_of(tmp_path / "with/model.safetensors") == sha256_of(tmp_path / "without/model.safetensors")
    assert sha256_of(tmp_path / "with/model.safetensors") != sha256_of(model / "model.safetensors")
    first, second = (read_manifest(tmp_path / name)["tensors"] for name in ("with", "without"))
    assert first == second


# With, without, and with what kind of compiler


def test_it_is_compiled_once_and_kept(cache, monkeypatch):
    assert compiled.load(1) is not None
    (library,) = cache.iterdir()
    assert library.stat().st_mode & 0o022 == 0
    monkeypatch.setenv("PATH", "")  # no compiler any more
    assert compiled.load(1) is not None


def test_without_a_compiler_numpy_does_it(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    assert compiled.load(1) is None
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'error: no such thing' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compiled.load(1) is None
    assert not list(cache.iterdir())


def test_small_jobs_and_the_switch_do_without(cache, monkeypatch):
    monkeypatch.setattr(compiled, "WORTH_BYTES", 100)
    assert compiled.load(99) is None
    monkeypatch.setenv(compiled.SWITCH, "0")
    assert compiled.load(100) is None
    assert not cache.exists()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("((bits >> 16) & 1)", "1"), ("d * scale + 1.0f", "__builtin_fmaf(d, scale, 1.0f)"),
     ("w + d * scale", "__builtin_fmaf(d, scale, w)"), ("d > gamma ? gamma : d", "d"),
     ("squares[i] += value * value", "squares[i] += value")],
)  # fmt: skip
def test_a_kernel_that_computes_anything_else_is_not_kept(cache, monkeypatch, tmp_path, right, wrong):
    source = Path(compiled.__file__).with_name("kernel.c").read_text()
    assert right in source
    (tmp_path / "kernel.c").write_text(source.replace(right, wrong))
    monkeypatch.setattr(compiled, "_SOURCE", tmp_path / "kernel.c")
    assert compiled.load(1) is None
    assert not list(cache.iterdir())


def test_a_damaged_library_is_not_used(cache):
    assert compiled.load(1) is not None
    (library,) = cache.iterdir()
    library.unlink()
    library.write_bytes(b"not a library")
    assert compiled.load(1) is None


def test_code_that_others_could_have_written_is_not_run(cache):
    assert compiled.load(1) is not None
    cache.chmod(0o777)
    assert compiled.load(1) is None


def test_a_cache_folder_that_cannot_be_made_does_no_harm(tmp_path, cache, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NEUROWEAVE_CACHE", str(tmp_path / "file"))
    assert compiled.load(1) is None


def test_the_formulas_have_the_numbers_of_the_source():
    source = Path(compiled.__file__).with_name("kernel.c").read_text()
    wanted = ", ".join("edit_" + name.replace(" ", "_") for name in FORMULAS)
    assert f"edits[] = {{{wanted}}}" in source
    assert f"#define LANES {LANES} " in source
    assert STORED["BF16"] == BFLOAT16
    assert os.path.getsize(Path(compiled.__file__).with_name("kernel.c")) < 8000
