"""`neuroweave diff`: figures against float64 numpy for every dtype, what counts as a difference, what people read."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from fusion_models import llama_config, mlp_names, weights, write_checkpoint

from neuroweave.checkpoint import Checkpoint, ShardWriter, TensorSpec, plan_shards
from neuroweave.checkpoint import tensor_difference as blocks
from neuroweave.checkpoint.difference import compare_checkpoints, families
from neuroweave.checkpoint.reader import numpy_dtype
from neuroweave.checkpoint.tensor_difference import TensorDifference, same_bytes
from neuroweave.cli.main import main


def run(capsys, *words):
    """(exit code, stdout, stderr) of `neuroweave diff WORDS`."""
    with pytest.raises(SystemExit) as stop:
        main(["diff", *map(str, words)])
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def write(folder, arrays, codes, shard_size="2GB"):
    folder.mkdir(parents=True, exist_ok=True)
    specs = [TensorSpec(name, codes[name], array.shape) for name, array in arrays.items()]
    with ShardWriter(folder, plan_shards(specs, shard_size)) as writer:
        for name, array in arrays.items():
            writer.write_at(name, 0, array.tobytes())
    return folder


def one(tmp_path, a, b, codes):
    """The difference of one tensor `w`, its dtypes given by safetensors names."""
    for side, array, code in zip("ab", (a, b), codes, strict=True):
        write(tmp_path / side, {"w": array.astype(numpy_dtype(code))}, {"w": code})
    found = compare_checkpoints(tmp_path / "a", tmp_path / "b")
    assert len(found.changed) <= 1
    return found.changed[0] if found.changed else None


PAIRS = [(code, code) for code in ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I8", "I64", "U16", "C64")]
PAIRS += [("F32", "BF16"), ("F16", "F32"), ("BF16", "F16"), ("F8_E4M3", "BF16"), ("F64", "F32")]


@pytest.mark.parametrize("codes", PAIRS, ids="-".join)
@pytest.mark.parametrize("shape", [(), (1,), (7, 123), (3, 1, 7)], ids=str)
def test_figures(tmp_path, monkeypatch, codes, shape):
    """Equal to float64 numpy over whole arrays, while read in blocks of 100 elements."""
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 100)
    draw = np.random.default_rng(5)
    scale = 40 if codes[0][0] in "IU" else 1
    a = np.abs(draw.standard_normal(shape)) * scale + 1
    b = np.where(draw.random(shape) < 0.6, a, a * 1.5) + (not shape or shape == (1,))
    stored = [np.asarray(array).astype(numpy_dtype(code)) for array, code in zip((a, b), codes, strict=True)]
    found = one(tmp_path, np.asarray(a), np.asarray(b), codes)
    kind = np.complex128 if "C64" in codes else np.float64
    wide_a, wide_b = (array.astype(kind) for array in stored)
    assert found is not None
    assert (found.dtypes, found.shape, found.elements) == (codes, shape, wide_a.size)
    assert found.differing == np.count_nonzero(wide_a != wide_b) > 0
    assert found.not_finite == 0
    gap = (wide_b - wide_a).reshape(-1)
    parts = np.concatenate([gap.real, gap.imag])  # of a complex number the two parts are values
    assert found.largest == pytest.approx(np.abs(parts).max(), rel=1e-14)
    assert found.relative == pytest.approx(np.linalg.norm(gap) / np.linalg.norm(wide_a), rel=1e-12)
    inner = np.vdot(wide_a, wide_b).real
    assert found.cosine == pytest.approx(inner / np.linalg.norm(wide_a) / np.linalg.norm(wide_b), rel=1e-12)


def test_every_float8_value(tmp_path):
    a = np.arange(256, dtype="u1")
    for code in ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"):
        folder = tmp_path / code
        write(folder / "a", {"w": a}, {"w": code})
        write(folder / "b", {"w": a[::-1].copy()}, {"w": code})
        found = compare_checkpoints(folder / "a", folder / "b").changed[0]
        wide = a.view(numpy_dtype(code)).astype("f8")
        finite = np.isfinite(wide) & np.isfinite(wide[::-1])
        assert found.not_finite == 256 - finite.sum()
        assert found.largest == np.abs(wide - wide[::-1])[finite].max()


def test_sums_are_in_double(tmp_path):
    """A small change of a large tensor: float32 sums would lose it."""
    a = np.full(300_000, 1.0, "f4")
    b = a.copy()
    b[::2] += 2.0**-20
    found = one(tmp_path, a, b, ("F32", "F32"))
    assert (found.differing, found.share, found.largest) == (150_000, 0.5, 2.0**-20)
    assert found.relative == pytest.approx(2.0**-20 / np.sqrt(2), rel=1e-12)
    assert found.cosine <= 1


def test_not_finite_elements_are_counted_apart(tmp_path):
    a = np.array([1, np.nan, np.inf, 3, np.nan], "f4")
    b = np.array([2, np.nan, 5, 3, 0], "f4")
    found = one(tmp_path, a, b, ("F32", "F32"))
    assert (found.differing, found.not_finite, found.largest) == (3, 3, 1.0)
    assert found.relative == pytest.approx(1 / np.sqrt(10))


@pytest.mark.parametrize("codes", [("F32", "F32"), ("F32", "F16")])
def test_from_zero(tmp_path, codes):
    found = one(tmp_path, np.zeros(3), np.array([0, 0, 2.0]), codes)
    assert (found.differing, found.largest, found.relative, found.cosine) == (1, 2.0, None, None)


def test_signs_of_zero_and_kinds_of_nan(tmp_path):
    """Bits count where the dtypes are equal, values where they are not."""
    a, b = np.array([0.0, np.nan]), np.array([-0.0, np.nan])
    assert one(tmp_path / "x", a, b, ("F32", "F32")).differing == 1
    found = one(tmp_path / "y", a, b, ("F32", "F16"))
    assert (found.differing, found.largest) == (0, 0.0)


def test_packed_formats_are_compared_as_bytes(tmp_path):
    for side, byte in (("a", 3), ("b", 4)):
        write(tmp_path / side, {"w": np.full(4, byte, "u1").reshape(4), }, {"w": "U8"})  # fmt: skip
        raw = (tmp_path / side / "model.safetensors").read_bytes()
        content = raw.replace(b'"U8","shape":[4]', b'"F4","shape":[8]')
        (tmp_path / side / "model.safetensors").write_bytes(content)
    found = compare_checkpoints(tmp_path / "a", tmp_path / "b").changed
    assert found == [TensorDifference("w", ("F4", "F4"), (8,), 8, None)]


def test_empty_tensors_are_equal(tmp_path):
    assert one(tmp_path, np.zeros((0, 3)), np.zeros((0, 3)), ("F32", "F32")) is None


# Whole checkpoints


@pytest.fixture
def pair(tmp_path):
    """A and its copy B in other shards and another order."""
    tensors = weights()
    a = write_checkpoint(tmp_path / "a", tensors, config=llama_config())
    b = write_checkpoint(tmp_path / "b", dict(reversed(tensors.items())), shards=3, config=llama_config())
    for folder in (a, b):
        (folder / "tokenizer.json").write_text("{}")
    return a, b, tensors


def test_identical(capsys, pair):
    a, b, tensors = pair
    assert run(capsys, a, b) == (0, f"identical: {len(tensors)} tensors, config.json and every other file\n", "")
    assert run(capsys, a, a)[0] == 0
    assert json.loads(run(capsys, a, b, "--json")[1])["identical"] is True


def test_hard_links_are_not_read(pair, tmp_path, monkeypatch):
    a, _, tensors = pair
    shutil.copytree(a, tmp_path / "c", copy_function=os.link)
    with Checkpoint(a) as first, Checkpoint(tmp_path / "c") as second:
        monkeypatch.setattr(Checkpoint, "read_bytes", lambda *args: pytest.fail("read"))
        assert all(same_bytes(first, second, name) for name in tensors)


def test_what_people_read(capsys, pair, tmp_path):
    a, _, tensors = pair
    names = mlp_names(1)
    changed = dict(tensors)
    for layer, factor in ((0, 1.5), (1, 4.0), (2, 1.25)):
        changed[mlp_names(layer)["down"]] = tensors[mlp_names(layer)["down"]] * factor
    changed[names["gate"]] = tensors[names["gate"]].clone()
    changed[names["gate"]][3, 5] += 1
    b = write_checkpoint(tmp_path / "c", changed, config=llama_config())
    (b / "tokenizer.json").write_text("{}")
    code, out, err = run(capsys, a, b)
    lines = out.splitlines()
    assert (code, err) == (1, "")
    assert lines[0].split() == [
        "changed", "tensors", "layers", "tensors", "worst", "share", "largest", "relative", "cosine"
    ]  # fmt: skip
    row = ["model.layers.*.mlp.down_proj.weight", "0-2", "3", "layer", "1", "100", "%"]
    assert lines[1].split()[: len(row)] == row
    assert lines[1].split()[-2:] == ["3", "1.000000"]
    assert lines[2].split()[:2] == ["model.layers.*.mlp.gate_proj.weight", "1"]
    assert lines[-1] == f"differ: 4 tensors changed; {len(tensors) - 4} tensors identical to the byte"
    each = run(capsys, a, b, "--each")[1].splitlines()
    assert [line.split()[0] for line in each[1:5]] == [*(mlp_names(n)["down"] for n in (1, 0, 2)), names["gate"]]
    found = json.loads(run(capsys, a, b, "--json")[1])
    assert [item["name"] for item in found["changed"]] == [line.split()[0] for line in each[1:5]]
    assert found["changed"][0]["relative"] == pytest.approx(3, rel=1e-12)
    assert found["changed"][3]["differing"] == 1


def test_names_shapes_and_dtypes(capsys, tmp_path):
    a = write(
        tmp_path / "a", {"x": np.ones(3, "f4"), "y": np.ones((2, 3), "f4"), "z": np.full(4, 1.1, "f4")},
        dict.fromkeys("xyz", "F32"),
    )  # fmt: skip
    b = write(
        tmp_path / "b", {"w": np.ones(3, "f4"), "y": np.ones((3, 2), "f4"), "z": np.full(4, 1.1, ml_dtypes.bfloat16)},
        {"w": "F32", "y": "F32", "z": "BF16"},
    )  # fmt: skip
    code, out, _ = run(capsys, a, b)
    assert code == 1
    assert "float32 -> bfloat16" in out
    assert "only in A: x F32 [3]\nonly in B: w F32 [3]\nother shape: y F32 [2, 3] -> F32 [3, 2]\n" in out
    assert out.endswith(
        "differ: 1 tensor changed, 1 of another shape, 1 only in A, 1 only in B; 0 tensors identical to the byte\n"
    )


def test_the_same_values_in_another_dtype_differ(capsys, tmp_path):
    for side, code in (("a", "F32"), ("b", "BF16")):
        write(tmp_path / side, {"w": np.ones(3).astype(numpy_dtype(code))}, {"w": code})
    code, out, _ = run(capsys, tmp_path / "a", tmp_path / "b")
    assert code == 1
    assert out.splitlines()[1].split() == ["w", "1", "0", "%", "0", "0", "1.000000", "float32", "->", "bfloat16"]


def test_config_and_files(capsys, pair):
    a, b, tensors = pair
    config = llama_config() | {"hidden_act": "relu", "rope": {"theta": 1.0, "kind": "x"}, "tie": True, "n": 1}
    (a / "config.json").write_text(json.dumps(llama_config() | {"rope": {"theta": 2.0, "kind": "x"}, "tie": 1, "n": 1}))
    (b / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
    (b / "tokenizer.json").write_text("{ }")
    (b / "extra").mkdir()
    (b / "extra" / "note.txt").write_text("x")
    code, out, _ = run(capsys, a, b)
    assert code == 1
    assert sorted(out.splitlines()[:-1]) == [
        'config.json: hidden_act: "silu" -> "relu"',
        "config.json: rope.theta: 2.0 -> 1.0",
        "config.json: tie: 1 -> true",
        "file: extra/note.txt: only in B",
        "file: tokenizer.json: 2 -> 3 bytes, other SHA-256",
    ]
    assert out.splitlines()[-1] == (
        f"differ: 3 keys of config.json, 2 other files; {len(tensors)} tensors identical to the byte"
    )
    found = json.loads(run(capsys, a, b, "--json")[1])
    assert found["files"]["tokenizer.json"]["b"] == {"bytes": 3, "sha256": hashlib.sha256(b"{ }").hexdigest()}
    assert found["config"]["tie"] == {"a": 1, "b": True}
    (b / "config.json").unlink()
    assert "file: config.json: only in A" in run(capsys, a, b)[1]


def test_errors(capsys, pair, tmp_path):
    a, b, _ = pair
    assert run(capsys, a, tmp_path / "absent")[0] == 2
    (b / "model-00002-of-00003.safetensors").write_bytes(b"x")
    code, _, err = run(capsys, a, b)
    assert code == 2
    assert "1 bytes is too short for a safetensors file" in err


def test_threads_find_the_same(pair, tmp_path):
    a, _, tensors = pair
    other = {name: tensor * 1.125 for name, tensor in tensors.items()}
    b = write_checkpoint(tmp_path / "c", other)
    assert compare_checkpoints(a, b, threads=1) == compare_checkpoints(a, b, threads=7)


def test_families_keep_dtypes_apart():
    def item(name, relative, dtypes=("F32", "F32")):
        return TensorDifference(name, dtypes, (4,), 4, 2, 1.0, relative, 1.0)

    found = families(
        [
            item("m.layers.3.experts.7.w", 0.1), item("m.layers.2.experts.0.w", 0.3), item("head", None),
            item("m.layers.9.experts.0.w", 0.2, ("F32", "BF16")),
        ]
    )  # fmt: skip
    assert [(family.name, family.layers, family.worst.relative, family.share) for family in found] == [
        ("head", [], None, 0.5),
        ("m.layers.*.experts.*.w", [2, 3], 0.3, 0.5),
        ("m.layers.*.experts.*.w", [9], 0.2, 0.5),
    ]


def test_memory_and_imports(tmp_path):
    """Two files of 400 MB that differ in their last element: a few blocks of memory, no torch."""
    for side in "ab":
        (tmp_path / side).mkdir()
        with ShardWriter(tmp_path / side, plan_shards([TensorSpec("w", "BF16", (200_000_000,))])) as writer:
            writer._written["w"] = 400_000_000 - 2  # the rest is a hole
            writer.write_at("w", 0 if side == "a" else 400_000_000 - 2, b"\x80\x3f")
    code = (
        "import sys\nfrom neuroweave.cli.main import main\n"
        f"try: main(['diff', {str(tmp_path / 'a')!r}, {str(tmp_path / 'b')!r}])\n"
        "finally:\n"
        "    assert not {'torch', 'transformers', 'safetensors', 'tqdm'} & set(sys.modules)\n"
        "    print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[1].split() == ["w", "1", "1e-06", "%", "1", "1.41", "0.000000"]
    assert int(done.stdout.splitlines()[-1]) < 150_000
