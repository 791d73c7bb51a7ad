"""Opening checkpoint folders: parity with the safetensors library, lazy reads, and every way an index can lie."""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from neuroweave.checkpoint import Checkpoint
from neuroweave.checkpoint.reader import INDEX_FILE, read_index


def make_shards(folder, dtype=torch.float32):
    """Two shards with awkward sizes; returns the tensors."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    parts = {
        "model-00001-of-00002.safetensors": {
            "a.weight": torch.randn(7, 123, generator=generator).to(dtype),
            "scalar": torch.tensor(2.5).to(dtype),
        },
        "model-00002-of-00002.safetensors": {
            "b.weight": torch.randn(1, generator=generator).to(dtype),
            "empty": torch.zeros(0, 3, dtype=dtype),
        },
    }
    for file, tensors in parts.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, tensors in parts.items() for name in tensors}
    write_index(folder, weight_map)
    return {name: tensor for tensors in parts.values() for name, tensor in tensors.items()}


def write_index(folder, weight_map):
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_library(tmp_path, dtype):
    tensors = make_shards(tmp_path, dtype)
    with Checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint) == set(tensors)
        assert checkpoint.parameters == sum(tensor.numel() for tensor in tensors.values())
        assert checkpoint.nbytes == sum(tensor.nbytes for tensor in tensors.values())
        for name, tensor in tensors.items():
            assert checkpoint[name].shape == tuple(tensor.shape)
            assert checkpoint.read_torch(name).dtype == dtype
            assert torch.equal(checkpoint.read_torch(name), tensor)
            assert bytes(checkpoint.read_bytes(name)) == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("rows", [slice(0, 7), slice(2, 5), slice(6, 7), slice(3, 3), slice(5, 2), slice(-2, None)])
def test_rows(tmp_path, rows):
    whole = make_shards(tmp_path)["a.weight"]
    with Checkpoint(tmp_path) as checkpoint:
        assert torch.equal(checkpoint.read_torch("a.weight", rows), whole[rows])
        assert np.array_equal(checkpoint.read_numpy("a.weight", rows), whole[rows].numpy())
        assert checkpoint.read_torch("empty", slice(0, 1)).shape == (0, 3)
        with pytest.raises(ValueError, match="cannot be read"):
            checkpoint.read_torch("scalar", slice(0, 1))


def test_bfloat16_in_numpy_is_its_bits(tmp_path):
    whole = make_shards(tmp_path, torch.bfloat16)["a.weight"]
    with Checkpoint(tmp_path) as checkpoint:
        array = checkpoint.read_numpy("a.weight")
        assert str(array.dtype) == "bfloat16"
        assert np.array_equal(array.view("u2"), whole.view(torch.uint16).numpy())


def test_single_file_and_other_files(tmp_path):
    save_file({"x": torch.ones(3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "extra").mkdir()
    (tmp_path / "extra" / "note.txt").write_text("x")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "download").write_text("x")
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.other_files == ["config.json", "extra/note.txt"]
        assert checkpoint.config() == {"model_type": "llama"}
        assert checkpoint.index is None
        with pytest.raises(KeyError, match="no tensor named 'y'"):
            checkpoint["y"]
        with pytest.raises(ValueError, match="bytes 0 to 13 asked for, the tensor has 12"):
            checkpoint.read_bytes("x", 0, 13)


def test_threads_read_the_same(tmp_path):
    whole = make_shards(tmp_path)["a.weight"]
    with Checkpoint(tmp_path) as checkpoint, ThreadPoolExecutor(8) as pool:
        blocks = list(pool.map(lambda row: checkpoint.read_torch("a.weight", slice(row % 7, row % 7 + 1)), range(70)))
    assert all(torch.equal(block, whole[row % 7 : row % 7 + 1]) for row, block in enumerate(blocks))


def test_real_model_equals_the_library(smollm2):
    expected = load_file(smollm2 / "model.safetensors")
    with Checkpoint(smollm2) as checkpoint:
        assert set(checkpoint) == set(expected)
        assert all(torch.equal(checkpoint.read_torch(name), tensor) for name, tensor in expected.items())


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def damage_missing_shard(folder):
    (folder / SECOND).unlink()


def damage_truncated_shard(folder):
    content = (folder / FIRST).read_bytes()
    (folder / FIRST).write_bytes(content[:-100])


def damage_absent_tensor(folder):
    write_index(folder, {"a.weight": FIRST, "scalar": FIRST, "b.weight": SECOND, "empty": SECOND, "c": FIRST})


def damage_wrong_shard(folder):
    write_index(folder, {"a.weight": SECOND, "scalar": FIRST, "b.weight": SECOND, "empty": SECOND})


def damage_orphan(folder):
    write_index(folder, {"a.weight": FIRST, "b.weight": SECOND, "empty": SECOND})


def damage_both(folder):
    save_file({"scalar": torch.ones(1), "b.weight": torch.ones(1), "empty": torch.ones(1)}, folder / SECOND)


def damage_nothing_left(folder):
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_missing_shard, f"{INDEX_FILE}: 2 tensors are said to be in {SECOND}, which is not in the folder"),
        (damage_truncated_shard, f"{FIRST}: truncated: tensor 'scalar' ends at data byte"),
        (damage_absent_tensor, f"{INDEX_FILE}: 'c' is said to be in {FIRST}, which does not hold it"),
        (damage_wrong_shard, f"{INDEX_FILE}: 'a.weight' is said to be in {SECOND}, which does not hold it"),
        (damage_orphan, f"{FIRST}: holds 'scalar', which {INDEX_FILE} does not name"),
        (damage_both, f"{SECOND}: holds 'scalar', which {INDEX_FILE} sends to {FIRST}"),
        (damage_nothing_left, "no model.safetensors and no model.safetensors.index.json in this folder"),
    ],
)
def test_refuses_damaged_folders(tmp_path, damage, message):
    make_shards(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        Checkpoint(tmp_path)


def test_orphans_can_be_allowed(tmp_path):
    make_shards(tmp_path)
    damage_orphan(tmp_path)
    with Checkpoint(tmp_path, allow_orphans=True) as checkpoint:
        assert [tensor.name for tensor in checkpoint.orphans] == ["scalar"]
        assert "scalar" not in checkpoint


@pytest.mark.parametrize(
    "file",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "..\\x.safetensors",
        "C:x.safetensors",
        ".safetensors",
    ],
)
def test_refuses_paths_in_the_index(tmp_path, file):
    save_file({"a": torch.ones(1)}, tmp_path.parent / "x.safetensors")
    write_index(tmp_path, {"a": file})
    with pytest.raises(ValueError, match=re.escape(f"'a' maps to {file!r}, which is not a plain file name")):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "the index is a JSON list, expected an object"),
        ("{", "the index is not valid JSON"),
        ("{}", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": {"a": 3}}', "'a' maps to 3, expected the name of a .safetensors file"),
        ('{"weight_map": {"a": "pytorch_model.bin"}}', "'a' maps to 'pytorch_model.bin', expected the name"),
        ('{"weight_map": {"a": "b.safetensors", "a": "c.safetensors"}}', "the index names 'a' twice"),
        ('{"weight_map": {"a": "b.safetensors"}, "metadata": 3}', "metadata is not an object"),
    ],
)
def test_refuses_bad_indexes(tmp_path, content, message):
    (tmp_path / INDEX_FILE).write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        Checkpoint(tmp_path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=40) | st.recursive(
    st.none() | st.integers() | st.text(max_size=6) | st.just("a.safetensors"),
    lambda inner: st.lists(inner, max_size=2)
    | st.dictionaries(st.sampled_from(["weight_map", "metadata", "x"]), inner, max_size=3),
    max_leaves=6,
).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_any_index_is_read_or_refused(tmp_path, content):
    path = tmp_path / INDEX_FILE
    path.write_bytes(content)
    try:
        index = read_index(path)
    except ValueError as error:
        assert str(error).startswith(str(path))  # noqa: PT017
        return
    assert all("/" not in file for file in index["weight_map"].values())


def test_a_file_that_shrinks_while_open(tmp_path):
    make_shards(tmp_path)
    with Checkpoint(tmp_path) as checkpoint:
        content = (tmp_path / FIRST).read_bytes()
        (tmp_path / FIRST).write_bytes(content[:-10])
        with pytest.raises(ValueError, match="truncated while it was being read"):
            checkpoint.read_bytes("a.weight")


def test_headers_need_no_torch(tmp_path):
    make_shards(tmp_path)
    code = (
        "import sys, neuroweave.checkpoint as c\n"
        f"assert len(c.Checkpoint({str(tmp_path)!r})) == 4\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
