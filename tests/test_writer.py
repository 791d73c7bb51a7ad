"""The streaming writer: files that safetensors and transformers read, bounded memory, refusals, no leftovers."""

import errno
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from neuroweave.checkpoint import Checkpoint, ShardWriter, TensorSpec, plan_shards
from neuroweave.checkpoint.reader import INDEX_FILE
from neuroweave.checkpoint.writer import cast_to, dtype_code, parse_size


def specs_of(tensors):
    return [TensorSpec(name, dtype_code(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()]


def awkward_tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "half": torch.randn(7, 1, generator=generator).to(torch.bfloat16),
        "wide": torch.randn(123, 7, generator=generator),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.zeros(0, 5),
        "flags": torch.tensor([True, False, True]),
        "ü": torch.randn(1, 1, 3, generator=generator).to(torch.float16),
    }


@pytest.mark.parametrize("size", ["1B", "100B", "1KB", "2GB"])
def test_library_reads_it_back(tmp_path, size):
    tensors = awkward_tensors()
    with ShardWriter(tmp_path, plan_shards(specs_of(tensors), size)) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])
    read = {}
    for path in tmp_path.glob("*.safetensors"):
        read |= load_file(path)
        with safe_open(path, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())
    with Checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint) == set(tensors)
        for item in checkpoint.values():
            assert item.nbytes == 0 or item.offset % (item.nbytes // item.parameters) == 0, "unaligned data"


def test_transformers_loads_shards_and_their_index(tmp_path):
    config = LlamaConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, vocab_size=99,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    state = model.state_dict()
    (tmp_path / "ours").mkdir()
    with ShardWriter(tmp_path / "ours", plan_shards(specs_of(state), "20KB")) as writer:
        for name, tensor in state.items():
            writer.write(name, tensor)
    config.save_pretrained(tmp_path / "ours")
    theirs, ours = (json.loads((tmp_path / name / INDEX_FILE).read_text()) for name in ("theirs", "ours"))
    assert ours["metadata"] == theirs["metadata"]
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()
    names = sorted(path.name for path in (tmp_path / "ours").glob("*.safetensors"))
    assert names == [f"model-{i:05d}-of-{len(names):05d}.safetensors" for i in range(1, len(names) + 1)]
    assert len(names) > 2
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


def test_blocks_by_position_from_threads_give_the_same_bytes(tmp_path):
    tensors = awkward_tensors()
    folders = [tmp_path / "whole", tmp_path / "blocks"]
    for folder in folders:
        folder.mkdir()
        with ShardWriter(folder, plan_shards(specs_of(tensors), "1KB")) as writer, ThreadPoolExecutor(8) as pool:
            for name, tensor in tensors.items():
                raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
                if folder.name == "whole":
                    writer.write(name, raw)
                else:
                    jobs = [
                        pool.submit(writer.write_at, name, i, raw[i : i + 13]) for i in reversed(range(0, len(raw), 13))
                    ]
                    for job in jobs:
                        job.result()
    for path in folders[0].iterdir():
        assert path.read_bytes() == (folders[1] / path.name).read_bytes()


def test_arrays_and_strides(tmp_path):
    array = np.arange(21, dtype="float32").reshape(3, 7)
    specs = [TensorSpec("array", "F32", (7, 3)), TensorSpec("tensor", "F32", (7, 3))]
    with ShardWriter(tmp_path, plan_shards(specs)) as writer:
        writer.write("array", array.T)
        writer.write("tensor", torch.from_numpy(array).T)
    read = load_file(tmp_path / "model.safetensors")
    assert np.array_equal(read["array"].numpy(), array.T)
    assert np.array_equal(read["tensor"].numpy(), array.T)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_file_mode_follows_the_umask(tmp_path, umask):
    old = os.umask(umask)
    try:
        with ShardWriter(tmp_path, plan_shards([TensorSpec("a", "F32", (1,)), TensorSpec("b", "F32", (1,))], 4)) as w:
            w.write("a", bytes(4))
            w.write("b", bytes(4))
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~umask}
    assert len(list(tmp_path.iterdir())) == 3


def write_wrong_shape(writer):
    writer.write("a", torch.ones(3, 2))


def write_wrong_dtype(writer):
    writer.write("a", torch.ones(2, 3, dtype=torch.float16))


def write_wrong_array(writer):
    writer.write("a", np.ones((6,), dtype="float32"))


def write_wrong_bytes(writer):
    writer.write("a", bytes(23))


def write_twice(writer):
    writer.write("a", bytes(24))
    writer.write("a", bytes(24))


def write_past_the_end(writer):
    writer.write_at("a", 20, bytes(5))


def write_unplanned(writer):
    writer.write("c", bytes(24))


def write_too_little(writer):
    writer.write_at("a", 0, bytes(23))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (write_wrong_shape, "a: F32 of shape [3, 2] came, F32 of shape [2, 3] was planned"),
        (write_wrong_dtype, "a: F16 of shape [2, 3] came, F32 of shape [2, 3] was planned"),
        (write_wrong_array, "a: shape [6] came, [2, 3] was planned"),
        (write_wrong_bytes, "a: 23 bytes came, 24 were planned"),
        (write_twice, "a: 24 bytes at 0 are too many, or came twice (24 in all)"),
        (write_past_the_end, "a: 5 bytes at 20 are too many, or came twice (24 in all)"),
        (write_unplanned, "c: this tensor was not planned"),
        (write_too_little, "2 planned tensors are incomplete, the first is 'a'"),
    ],
)
def test_refusals_leave_nothing_behind(tmp_path, act, message):
    shards = plan_shards([TensorSpec("a", "F32", (2, 3)), TensorSpec("b", "F32", (1,))], 24)
    with pytest.raises(ValueError, match=re.escape(message)), ShardWriter(tmp_path, shards) as writer:
        act(writer)
    assert list(tmp_path.iterdir()) == []


def test_never_overwrites(tmp_path):
    (tmp_path / "model.safetensors").write_text("precious")
    with pytest.raises(FileExistsError), ShardWriter(tmp_path, plan_shards([TensorSpec("a", "F32", (1,))])):
        pass
    assert (tmp_path / "model.safetensors").read_text() == "precious"


def test_disk_full(tmp_path, monkeypatch):
    real, written = os.pwrite, 0

    def full(descriptor, data, position):
        nonlocal written
        written += len(data)
        if written > 2000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data, position)

    monkeypatch.setattr(os, "pwrite", full)
    shards = plan_shards([TensorSpec(str(i), "U8", (1000,)) for i in range(5)], 2000)
    with pytest.raises(OSError, match="No space left"), ShardWriter(tmp_path, shards) as writer:  # noqa: PT012
        for i in range(5):
            writer.write(str(i), bytes(1000))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "nbytes"), [("2GB", 2 * 10**9), ("500 MiB", 500 << 20), ("1.5kb", 1500), (7, 7), ("7", 7)]
)
def test_sizes(text, nbytes):
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "2XB", "1e9", "0.5"])
def test_refuses_sizes(text):
    with pytest.raises(ValueError, match=re.escape(f"size {text!r} is not understood")):
        parse_size(text)


def test_casts_are_checked():
    spec = TensorSpec("a", "F16", (2,))
    assert cast_to(torch.tensor([1.0, float("inf")]), spec).dtype == torch.float16
    with pytest.raises(ValueError, match=r"a: values up to 1e\+06 do not fit float16"):
        cast_to(torch.tensor([1.0, 1e6]), spec)


def test_memory_is_one_block(tmp_path):
    """1 GB is streamed by a process that may take 200 MB more address space than it starts with."""
    code = f"""
import resource, os
from neuroweave.checkpoint import ShardWriter, TensorSpec, plan_shards
import neuroweave.checkpoint.writer
base = int(open('/proc/self/statm').read().split()[0]) * os.sysconf('SC_PAGE_SIZE')
resource.setrlimit(resource.RLIMIT_AS, (base + (200 << 20),) * 2)
specs = [TensorSpec(f't{{i}}', 'U8', (1 << 28,)) for i in range(4)]
block = bytes(1 << 24)
os.pwrite = lambda descriptor, data, position: len(data)  # a sparse file: the disk is not what is measured
with ShardWriter({str(tmp_path)!r}, plan_shards(specs, '600MB')) as writer:
    for spec in specs:
        for start in range(0, spec.nbytes, len(block)):
            writer.write_at(spec.name, start, block)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) > 4 << 28
