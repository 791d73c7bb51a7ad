"""`neuroweave extract-delta`: A plus the delta is B to the bit, and where no delta can do that, it is counted."""

import hashlib
import json
import math
import re
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from fusion_models import deltas_for, llama_config, mlp_names, weights, write_checkpoint
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from neuroweave.checkpoint import Checkpoint
from neuroweave.checkpoint import tensor_difference as blocks
from neuroweave.checkpoint.manifest import MANIFEST_FILE
from neuroweave.checkpoint.verification import verify_checkpoint
from neuroweave.cli.main import main
from neuroweave.surgery.fusion.delta_extraction import STORED, delta_block, extract_delta
from neuroweave.surgery.fusion.plan import FuseOptions


def run(capsys, *words):
    """(exit code, stdout, stderr) of `neuroweave WORDS`."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def tensors_of(folder):
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def edited(tensors, dtype, strength, seed=3):
    """Every kind of tensor changed: a norm, the embedding, MLPs; zeros appear, and signs flip at a strength of 0.5."""
    draw = torch.Generator().manual_seed(seed)
    result = dict(tensors)
    for name in ("model.norm.weight", "model.embed_tokens.weight", *mlp_names(1).values()):
        old = tensors[name].float()
        new = old * (1 + strength * torch.randn(old.shape, generator=draw))
        new[torch.rand(old.shape, generator=draw) < 0.2] = 0
        result[name] = torch.where(torch.rand(old.shape, generator=draw) < 0.3, old, new).to(dtype)
    return result


@pytest.fixture
def pair(tmp_path):
    def make(dtype, strength=0.1):
        tensors = weights(dtype)
        a = write_checkpoint(tmp_path / "a", tensors, shards=2, config=llama_config())
        return a, write_checkpoint(tmp_path / "b", edited(tensors, dtype, strength), shards=3, config=llama_config())

    return make


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_it_is_b(capsys, pair, tmp_path, monkeypatch, dtype):
    """The printed command, run: the same bytes as B in every tensor. Blocks of 100 elements."""
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 100)
    a, b = pair(dtype)
    out = tmp_path / "delta"
    code, text, err = run(capsys, "extract-delta", a, b, "--output", out)
    assert (code, err) == (0, "")
    lines = text.splitlines()
    size = sum(tensor.nbytes for tensor in tensors_of(out).values())
    assert lines[0] == f"{out}: 5 tensors that differ, {size / 1e6:.1f} MB; 12 are equal and left out"
    assert lines[1] == f"A + delta is B to the bit, in all {size // 4} elements"
    words = lines[2].removeprefix("apply it:  neuroweave ").replace("DIR", str(tmp_path / "fused")).split()
    assert run(capsys, *words)[0] == 0
    fused, wanted = tensors_of(tmp_path / "fused"), tensors_of(b)
    assert set(fused) == set(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(fused[name].view(torch.int16), tensor.view(torch.int16)), name
    assert verify_checkpoint(out).sound


def test_the_delta_of_a_fuse(capsys, tmp_path):
    """A default fuse leaves up projections alone, and so the delta: the printed command asks for what it holds."""
    tensors = weights()
    a = write_checkpoint(tmp_path / "a", tensors, config=llama_config())
    words = ["--weights", write_checkpoint(tmp_path / "d", deltas_for(tensors)), "--output", tmp_path / "b"]
    assert run(capsys, "fuse", "--model", a, *words, "--layers", "0,2")[0] == 0
    code, text, _ = run(capsys, "extract-delta", a, tmp_path / "b", "--output", tmp_path / "delta")
    assert code == 0
    assert "4 tensors that differ" in text
    words = text.splitlines()[2].removeprefix("apply it:  neuroweave ").replace("DIR", str(tmp_path / "again")).split()
    code, _, err = run(capsys, *words)
    assert (code, err) == (0, "no delta for layer 1: left as it is\n")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "b" / "model.safetensors"
    ).read_bytes()
    code, _, err = run(capsys, *words[:-1], tmp_path / "no", "--layers", "0", "1")
    assert code == 2
    assert "no delta for model.layers.1.mlp.gate_proj.weight (and 2 more)" in err


def test_float32_counts_what_it_misses(capsys, pair, tmp_path):
    """The count and the largest gap are those of the fuse itself."""
    a, b = pair(torch.float32, strength=0.5)
    out = tmp_path / "delta"
    code, text, err = run(capsys, "extract-delta", a, b, "--output", out, "--json")
    found = json.loads(text)
    assert (code, err) == (0, "")
    words = found["apply"].removeprefix("neuroweave ").replace("DIR", str(tmp_path / "fused")).split()
    assert run(capsys, *words)[0] == 0
    fused, wanted = tensors_of(tmp_path / "fused"), tensors_of(b)
    missed = {name: int((fused[name].view(torch.int32) != value.view(torch.int32)).sum()) for name, value in
              wanted.items()}  # fmt: skip
    assert found["not_reproduced"] == {name: count for name, count in missed.items() if count}
    total = sum(missed.values())
    assert 0 < total < 0.1 * found["elements"]
    gap = max(float((fused[name].double() - value.double()).abs().max()) for name, value in wanted.items())
    assert found["largest_miss"] == gap < 2.0**-22
    _, text, err = run(capsys, "extract-delta", a, b, "--output", out, "--overwrite")
    share = f"{100 * total / found['elements']:.2g}"
    assert f"A + delta is not B to the bit in {total} of {found['elements']} elements ({share} %)" in text
    assert err.startswith("most of them in ")


def test_values_are_float32_differences(pair, tmp_path):
    a, b = pair(torch.bfloat16)
    extract_delta(a, b, tmp_path / "delta")
    old, new = tensors_of(a), tensors_of(b)
    for name, delta in tensors_of(tmp_path / "delta").items():
        assert delta.dtype == torch.float32
        assert torch.equal(delta, new[name].float() - old[name].float())


def test_bfloat16_deltas(pair, tmp_path):
    a, b = pair(torch.bfloat16, strength=0.5)
    found = extract_delta(a, b, tmp_path / "delta", dtype="bfloat16", max_shard_size=50_000)
    old, new = tensors_of(a), tensors_of(b)
    deltas = tensors_of(tmp_path / "delta")
    missed = 0
    for name, delta in deltas.items():
        assert torch.equal(delta, (new[name].float() - old[name].float()).bfloat16())
        fused = (old[name].float() + delta.float()).bfloat16()
        missed += int((fused.view(torch.int16) != new[name].view(torch.int16)).sum())
    assert found.missed == missed > 0
    assert found.nbytes == sum(delta.nbytes for delta in deltas.values())
    assert len(list((tmp_path / "delta").glob("*.safetensors"))) > 1


def test_same_bytes_on_any_number_of_threads(pair, tmp_path):
    a, b = pair(torch.float16)
    for threads in (1, 5):
        extract_delta(a, b, tmp_path / str(threads), threads=threads)
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "15"]
    assert files[0] == files[1]


FLOATS = st.floats(width=16, allow_nan=False, allow_infinity=False)


@settings(max_examples=300, deadline=None)
@example(pairs=[(-4.875659942626953e-05, 1024.0)], code="F32")
@given(st.lists(st.tuples(FLOATS, FLOATS), min_size=1, max_size=20), st.sampled_from(["F32", "F16", "BF16"]))
def test_no_other_delta_does_better(pairs, code):
    """Where A + D misses B, no float32 near D hits it; equal elements, -0 too, are always given back."""
    old, new = (np.array(side, "f8").astype(STORED[code]) for side in zip(*pairs, strict=True))
    delta = delta_block(old, new, np.dtype("f4"))
    fused = (old.astype("f4") + delta).astype(STORED[code])
    bits = f"u{old.itemsize}"
    same = old.view(bits) == new.view(bits)
    assert (fused.view(bits)[same] == new.view(bits)[same]).all()
    for a, b, d, f in zip(old, new, delta, fused, strict=True):
        if f != b:
            for side in (np.inf, -np.inf):
                near = d
                for _ in range(3):
                    near = np.nextafter(near, np.float32(side))
                    assert (np.float32(a) + near).astype(STORED[code]) != b
            power_of_two = math.frexp(abs(float(b)))[0] == 0.5  # finer steps below than above
            assert math.frexp(abs(float(a)))[1] > math.frexp(abs(float(b)))[1] or power_of_two


def test_signed_zeros():
    for dtype in STORED.values():
        old, new = np.array([0.0, -0.0, -0.0, 0.0]).astype(dtype), np.array([0.0, -0.0, 0.0, -0.0]).astype(dtype)
        fused = (old.astype("f4") + delta_block(old, new, np.dtype("f4"))).astype(dtype)
        assert np.signbit(fused.astype("f4")).tolist() == [False, True, False, False]  # no delta makes -0 of +0


def test_manifest(pair, tmp_path):
    a, b = pair(torch.bfloat16)
    extract_delta(a, b, tmp_path / "delta")
    manifest = json.loads((tmp_path / "delta" / MANIFEST_FILE).read_text())
    assert manifest["operation"] == "extract-delta"
    options = manifest["parameters"]["fuse"]
    assert FuseOptions(**options | {"targets": (options["targets"],)}) == FuseOptions(
        mode="additive", alpha_mode="plain", alpha=1.0, targets=("all",)
    )
    assert manifest["not_reproduced"] == {}
    for label, folder in (("model", a), ("result", b)):
        files = manifest["inputs"][label]["files"]
        assert set(files) == {path.name for path in folder.glob("*.safetensors")}
        for name, entry in files.items():
            assert entry["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    extract_delta(a, b, tmp_path / "plain", hashed=False)
    assert "sha256" not in (tmp_path / "plain" / MANIFEST_FILE).read_text()


# Refusals: nothing is written


def replaced(tensors, name, value):
    return tensors | {name: value}


NORM = "model.norm.weight"
REFUSALS = {
    "nothing": (lambda t: t, "nothing differs: the tensors of"),
    "only in B": (lambda t: t | {"x": torch.ones(1), "y": torch.ones(1)}, ("only in B (", "): x, y; a delta needs")),
    "only in A": (lambda t: {n: v for n, v in t.items() if n != NORM}, ("only in A (", f"): {NORM}; a delta needs")),
    "shape": (lambda t: replaced(t, NORM, torch.ones(7)), f"{NORM}: shape [123] in A, [7] in B"),
    "dtype": (lambda t: replaced(t, NORM, t[NORM].float()), f"{NORM}: bfloat16 in A, float32 in B; a fuse keeps A's"),
    "nan": (lambda t: replaced(t, NORM, t[NORM] * math.nan), f"{NORM}: B holds NaN or infinite values"),
    "infinite": (lambda t: replaced(t, NORM, t[NORM] / 0), f"{NORM}: B holds NaN or infinite values"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(capsys, tmp_path, case):
    change, message = REFUSALS[case]
    tensors = weights()
    a, b = write_checkpoint(tmp_path / "a", tensors), write_checkpoint(tmp_path / "b", change(tensors))
    code, out, err = run(capsys, "extract-delta", a, b, "--output", tmp_path / "delta")
    assert (code, out) == (2, "")
    assert all(part in err for part in ([message] if isinstance(message, str) else message)), err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.int32, "int32"), (torch.float64, "float64"), (torch.float8_e4m3fn, "float8_e4m3fn")]
)
def test_refuses_types_that_no_fuse_adds_to(tmp_path, dtype, name):
    for side in (1, 2):
        (tmp_path / str(side)).mkdir()
        save_file({"w": torch.full((3,), float(side)).to(dtype)}, tmp_path / str(side) / "model.safetensors")
    message = f"w: differs and is {name}; a delta is added to float32, float16, bfloat16 only"
    with pytest.raises(ValueError, match=re.escape(message)):
        extract_delta(tmp_path / "1", tmp_path / "2", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_types_that_do_not_differ_do_not_matter(tmp_path):
    for side in (1, 2):
        (tmp_path / str(side)).mkdir()
        tensors = {"steps": torch.arange(3), "w": torch.full((3,), float(side))}
        save_file(tensors, tmp_path / str(side) / "model.safetensors")
    found = extract_delta(tmp_path / "1", tmp_path / "2", tmp_path / "out")
    assert (found.tensors, found.same, found.missed) == (1, 1, 0)
    with Checkpoint(tmp_path / "out") as delta:
        assert delta.read_numpy("w").tolist() == [1, 1, 1]


def test_too_large_a_difference(tmp_path):
    for side, value in (("a", 3e38), ("b", -3e38)):
        (tmp_path / side).mkdir()
        save_file({"w": torch.full((3,), value)}, tmp_path / side / "model.safetensors")
    with pytest.raises(ValueError, match="w: the difference of A and B does not fit the delta's type"):
        extract_delta(tmp_path / "a", tmp_path / "b", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_rounded_delta_that_leads_out_of_range(tmp_path):
    """65504 is the largest float16; the nearest bfloat16 is 65536."""
    for side, value in (("a", 0.0), ("b", 65504.0)):
        (tmp_path / side).mkdir()
        save_file({"w": torch.full((3,), value, dtype=torch.float16)}, tmp_path / side / "model.safetensors")
    with pytest.raises(ValueError, match=re.escape("w: A + D leaves the range of the stored type; store the delta as")):
        extract_delta(tmp_path / "a", tmp_path / "b", tmp_path / "out", dtype="bfloat16")
    assert extract_delta(tmp_path / "a", tmp_path / "b", tmp_path / "out").missed == 0


def test_refuses_a_value_that_is_not_finite_in_both(tmp_path):
    """Equal NaN need no delta, but the fuse would refuse A."""
    for side, value in (("a", 0.0), ("b", 1.0)):
        (tmp_path / side).mkdir()
        save_file({"w": torch.tensor([value, math.nan])}, tmp_path / side / "model.safetensors")
    with pytest.raises(ValueError, match="w: A holds NaN or infinite values; a fuse refuses them"):
        extract_delta(tmp_path / "a", tmp_path / "b", tmp_path / "out")


@pytest.mark.parametrize(
    ("output", "message"),
    [("a", "the output is the source itself"), ("a/inside", "lies inside the source"), ("b", "is the source itself")],
)
def test_outputs(pair, tmp_path, output, message):
    a, b = pair(torch.bfloat16)
    with pytest.raises(ValueError, match=message):
        extract_delta(a, b, tmp_path / output, overwrite=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    with pytest.raises(ValueError, match="is not empty"):
        extract_delta(a, b, tmp_path / "full")


def test_memory_and_imports(tmp_path):
    """One tensor of 200 MB: a few blocks of memory, no torch."""
    for side in "ab":
        (tmp_path / side).mkdir()
        array = np.zeros(100_000_000, ml_dtypes.bfloat16)
        array[-1] = "ab".index(side)
        header = b'{"w":{"dtype":"BF16","shape":[100000000],"data_offsets":[0,200000000]}}'
        with (tmp_path / side / "model.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.write(array.tobytes())
    code = (
        "import sys\nfrom neuroweave.cli.main import main\n"
        f"try: main(['extract-delta', {str(tmp_path / 'a')!r}, {str(tmp_path / 'b')!r}, '--no-hash', '--output', "
        f"{str(tmp_path / 'out')!r}])\n"
        "finally:\n"
        "    assert not {'torch', 'transformers', 'safetensors', 'tqdm'} & set(sys.modules)\n"
        "    print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1] == "A + delta is B to the bit, in all 100000000 elements"
    assert int(done.stdout.splitlines()[-1]) < 150_000
