"""`neuroweave verify`: every fault is named, a sound checkpoint passes, memory is a few blocks, torch is not needed."""

import hashlib
import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from neuroweave.checkpoint import ShardWriter, TensorSpec, plan_shards
from neuroweave.checkpoint.header import build_header
from neuroweave.checkpoint.manifest import MANIFEST_FILE, file_entry, write_manifest
from neuroweave.checkpoint.reader import INDEX_FILE, numpy_dtype
from neuroweave.checkpoint.scanning import BLOCK_BYTES, FLOAT_BITS, Values, judge, scan_file
from neuroweave.checkpoint.verification import verify_checkpoint
from neuroweave.cli.main import main

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def run(capsys, *words):
    """(exit code, stdout, stderr) of `neuroweave verify WORDS`."""
    with pytest.raises(SystemExit) as stop:
        main(["verify", *map(str, words)])
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


@pytest.fixture
def folder(tmp_path):
    """Two shards of a tiny model with its config: 4 tensors, 3,500 bytes."""
    draw = np.random.default_rng(0)
    arrays = {
        "model.embed_tokens.weight": draw.standard_normal((123, 7)).astype("f4"),
        "model.layers.0.mlp.down_proj.weight": draw.standard_normal((7, 1)).astype("f2"),
        "model.layers.1.mlp.down_proj.weight": draw.standard_normal((7, 1)).astype("f2"),
        "model.norm.weight": np.ones(7, "f4"),
    }
    codes = {np.dtype("f4"): "F32", np.dtype("f2"): "F16"}
    shards = plan_shards([TensorSpec(name, codes[item.dtype], item.shape) for name, item in arrays.items()], 3450)
    out = tmp_path / "model"
    out.mkdir()
    with ShardWriter(out, shards) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
    (out / "config.json").write_text(json.dumps({"vocab_size": 123, "num_hidden_layers": 2}))
    assert [shard.file for shard in shards] == [FIRST, SECOND]
    return out


def edit_index(folder, change):
    index = json.loads((folder / INDEX_FILE).read_text())
    change(index)
    (folder / INDEX_FILE).write_text(json.dumps(index))


def with_manifest(folder):
    names = [path.name for path in folder.iterdir()]
    outputs = {name: file_entry(folder / name) for name in names}
    write_manifest(folder, operation="fuse", parameters={}, inputs={}, outputs=outputs)
    return folder


def test_sound(capsys, folder):
    assert run(capsys, folder) == (0, "sound: 4 tensors in 2 files, 0.0 MB; every value finite\n", "")
    assert run(capsys, folder, "--no-values")[1] == "sound: 4 tensors in 2 files, 0.0 MB\n"
    code, out, _ = run(capsys, folder, "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["sound"], found["tensors"], found["parameters"], found["bytes"]) == (True, 4, 882, 3500)
    for name in (FIRST, SECOND):
        assert found["files"][name]["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
        assert found["files"][name]["bytes"] == (folder / name).stat().st_size
    assert "sha256" not in json.loads(run(capsys, folder, "--json", "--no-hash")[1])["files"][FIRST]


def test_single_file(capsys, tmp_path):
    save_file({"a": np.ones(3, "f4"), "b": np.array([1, np.nan], "f8")}, tmp_path / "bank.safetensors")
    code, out, _ = run(capsys, tmp_path / "bank.safetensors")
    assert code == 1
    assert "not finite  bank.safetensors  b       1 NaN of 2 values; the first at [1]" in out
    assert out.splitlines()[-1] == "not sound: 1 problem; 2 tensors in 1 file, 0.0 MB"


# Values: judged as integers, against numpy and ml_dtypes as floats


@pytest.mark.parametrize("code", FLOAT_BITS)
def test_values_of_every_format(code):
    """All patterns of 8 and 16 bits, and random ones of 32 and 64 with every exponent."""
    bits = FLOAT_BITS[code]
    dtype = numpy_dtype(code)
    width = np.dtype(bits.unsigned).itemsize
    if width <= 2:
        patterns = np.arange(256**width, dtype=bits.unsigned)
    else:
        patterns = np.random.default_rng(1).integers(0, 256, 40_000 * width, dtype="u1").view(bits.unsigned)
        ones = {4: 0x7F80_0000, 8: 0x7FF0_0000_0000_0000}[width]
        special = [0, ones, ones + 1, ones - 1, ones | 1 << (8 * width - 1), 1 << (8 * width - 1)]
        patterns = np.concatenate([patterns, np.array(special, bits.unsigned)])
    with np.errstate(invalid="ignore"):
        floats = patterns.view("<f4" if code == "C64" else dtype).astype("f8")
    values = Values()
    judge(patterns.tobytes(), code, values)
    assert values.nan == np.isnan(floats).sum() > 0
    assert values.infinite == np.isinf(floats).sum()
    bad = ~np.isfinite(floats)
    assert values.first == int(bad.argmax()) // (2 if code == "C64" else 1)
    finite = patterns[~bad]
    values = Values()
    judge(finite.tobytes(), code, values)
    assert (values.nan, values.infinite, values.first) == (0, 0, None)
    assert not values.zero


@pytest.mark.parametrize("code", FLOAT_BITS)
def test_zero(code):
    values = Values()
    judge(bytes(80), code, values)
    assert values.zero == (code != "F8_E8M0")  # there all bits 0 is 2^-127
    if not FLOAT_BITS[code].flip and code not in ("C64", "F8_E8M0"):  # the others have one zero
        judge(np.full(5, -0.0).astype(numpy_dtype(code)).tobytes(), code, values)
        assert values.zero


@pytest.mark.parametrize("place", [0, 1, BLOCK_BYTES // 2 - 1, BLOCK_BYTES // 2, 3 * BLOCK_BYTES // 2 + 5])
def test_place_across_blocks(tmp_path, place):
    """A file of several blocks after a tensor of an odd size: counts, places and the hash are right."""
    path = tmp_path / "a.safetensors"
    count = 2 * BLOCK_BYTES
    raw, header = build_header([TensorSpec("odd", "I8", (3,)), TensorSpec("w", "BF16", (count // 4, 4))])
    array = np.ones(count, ml_dtypes.bfloat16)
    array[place] = np.inf
    array[place + 1 : place + 4] = np.nan
    content = raw + b"abc" + array.tobytes()
    path.write_bytes(content)
    seen = []
    found = scan_file(path, header, progress=seen.append)
    assert found.values == {"w": Values(nan=3, infinite=1, first=place, zero=False)}
    assert found.sha256 == hashlib.sha256(content).hexdigest()
    assert sum(seen) == len(content)
    assert max(seen) <= BLOCK_BYTES
    assert scan_file(path, None).sha256 == found.sha256


def test_not_finite(capsys, folder):
    with (folder / SECOND).open("r+b") as file:
        file.seek(-2, 2)
        file.write(np.array([-np.inf], "f2").tobytes())
    code, out, _ = run(capsys, folder)
    assert code == 1
    assert "1 infinite of 7 values; the first at [6, 0]" in out
    assert run(capsys, folder, "--no-values")[0] == 0


def test_zero_is_a_note(capsys, tmp_path):
    save_file({"a": np.zeros((2, 3), "f2"), "i": np.zeros(3, "i4")}, tmp_path / "model.safetensors")
    assert run(capsys, tmp_path) == (
        0,
        "sound: 2 tensors in 1 file, 0.0 MB; every value finite\n",
        "note: model.safetensors: a: all 6 values are zero\n",
    )


# The index and the shards


def drop_entry(folder):
    edit_index(folder, lambda index: index["weight_map"].pop("model.norm.weight"))


def extra_entry(folder):
    edit_index(folder, lambda index: index["weight_map"].update({"ghost": FIRST}))


def wrong_file(folder):
    edit_index(folder, lambda index: index["weight_map"].update({"model.norm.weight": FIRST}))


def absent_shard(folder):
    (folder / SECOND).unlink()


def truncated_shard(folder):
    content = (folder / SECOND).read_bytes()
    (folder / SECOND).write_bytes(content[:-5])


def twice(folder):
    save_file({"model.norm.weight": np.ones(7, "f4"), "x": np.ones(1, "f4")}, folder / "more.safetensors")
    edit_index(folder, lambda index: index["weight_map"].update({"x": "more.safetensors"}))


def wrong_total(folder):
    edit_index(folder, lambda index: index["metadata"].update({"total_size": 3499}))


def total_of_a_lost_shard(folder):
    (folder / SECOND).unlink()
    edit_index(
        folder, lambda index: [index["weight_map"].pop(n) for n in list(index["weight_map"]) if "embed" not in n]
    )


def leaving_index(folder):
    edit_index(folder, lambda index: index["weight_map"].update({"x": "../x.safetensors"}))


def broken_index(folder):
    (folder / INDEX_FILE).write_text("{")


def broken_config(folder):
    (folder / "config.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (drop_entry, ("orphan tensor", SECOND, "model.norm.weight", "the index does not name it")),
        (extra_entry, ("missing tensor", FIRST, "ghost", "the index sends it here, but no shard holds it")),
        (
            wrong_file,
            ("missing tensor", FIRST, "model.norm.weight", f"the index sends it here, but it is in {SECOND}"),
        ),
        (absent_shard, ("missing file", SECOND, "", "the index sends 3 tensors here, such as")),
        (truncated_shard, ("file", SECOND, "", "truncated: tensor 'model.layers.1.mlp.down_proj.weight' ends at")),
        (twice, ("orphan tensor", "more.safetensors", "model.norm.weight", f"the index takes it from {SECOND}")),
        (wrong_total, ("total size", INDEX_FILE, "", "total_size is 3499, the tensors take 3500 bytes")),
        (total_of_a_lost_shard, ("total size", INDEX_FILE, "", "total_size is 3500, the tensors take 3444 bytes")),
        (leaving_index, ("index", INDEX_FILE, "", "'x' maps to '../x.safetensors', which is not a plain file name")),
        (broken_index, ("index", INDEX_FILE, "", "the index is not valid JSON")),
        (broken_config, ("config", "config.json", "", "the configuration is a JSON list, expected an object")),
    ],
)
def test_problems(capsys, folder, damage, expected):
    damage(folder)
    found = verify_checkpoint(folder)
    kind, file, tensor, text = expected
    matching = [item for item in found.at("problem") if (item.kind, item.file, item.tensor) == (kind, file, tensor)]
    assert len(matching) == 1, found.findings
    assert matching[0].text.startswith(text)
    code, out, _ = run(capsys, folder)
    assert code == 1
    assert text in out
    assert out.splitlines()[-1].startswith("not sound: ")


def test_everything_in_one_run(folder):
    """A fault does not hide the next: two shards, the index and the config are all named."""
    for damage in (truncated_shard, extra_entry, broken_config):
        damage(folder)
    save_file({"model.embed_tokens.weight": np.full((123, 7), np.nan, "f4")}, folder / FIRST)
    found = verify_checkpoint(folder)
    assert [item.kind for item in found.at("problem")] == ["file", "missing tensor", "config", "not finite"]


def counts_parameters(folder):
    edit_index(folder, lambda index: index["metadata"].update({"total_size": 882}))


def counts_files(folder):
    size = sum((folder / name).stat().st_size for name in (FIRST, SECOND))
    edit_index(folder, lambda index: index["metadata"].update({"total_size": size}))


def other_vocabulary(folder):
    (folder / "config.json").write_text(json.dumps({"text_config": {"vocab_size": 128}}))


def lost_layer(folder):
    (folder / "config.json").write_text(json.dumps({"vocab_size": 123, "num_hidden_layers": 4}))


def stray(folder):
    (folder / "original").mkdir()
    save_file({"a": np.full(1, np.nan)}, folder / "original" / "a.safetensors")


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (counts_parameters, "total_size is 882, the tensors take 3500 bytes: it counts parameters; loaders ignore it"),
        (counts_files, "it counts whole files, headers too; loaders ignore it"),
        (other_vocabulary, "vocab_size is 128, the embedding has shape [123, 7]"),
        (lost_layer, "num_hidden_layers is 4; 2 layers have no tensor, the first is 2"),
        (stray, "warning: original/a.safetensors: not part of the checkpoint; not checked"),
    ],
)
def test_warnings_do_not_count(capsys, folder, damage, text):
    damage(folder)
    code, out, err = run(capsys, folder)
    assert code == 0
    assert out == "sound: 4 tensors in 2 files, 0.0 MB; every value finite\n"
    assert text in err
    assert err.startswith("warning: ")


def test_single_file_beside_an_index(folder):
    save_file({"a": np.ones(1, "f4")}, folder / "model.safetensors")
    found = verify_checkpoint(folder)
    assert found.sound
    assert [item.text for item in found.at("warning") if item.kind == "index"] == [
        "loaders ignore it: model.safetensors lies beside it"
    ]
    assert [item.file for item in found.at("warning") if item.kind == "stray file"] == [FIRST, SECOND]


def test_files_without_an_index(capsys, tmp_path):
    for name in ("adapter", "other"):
        save_file({"a": np.ones(1, "f4")}, tmp_path / f"{name}.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    code, out, err = run(capsys, tmp_path)
    assert (code, out) == (0, "sound: 2 tensors in 2 files, 0.0 MB; every value finite\n")
    assert "each .safetensors file is checked alone" in err


def test_a_folder_of_models_is_no_checkpoint(capsys, folder):
    """Nothing is called sound that was not looked at: what could be meant is named."""
    place = folder.parent
    refused = f"neuroweave: {place}: no checkpoint in this folder; nothing was checked"
    assert run(capsys, place) == (2, "", f"{refused}; the folder model in it is\n")
    save_file({"a": np.ones(1, "f4")}, place / "bank.safetensors")
    (place / "other").mkdir()
    save_file({"a": np.ones(1, "f4")}, place / "other" / "model.safetensors")
    (place / "notes").mkdir()
    names = "; the folders model, other in it are; to check a file alone, name it: bank.safetensors"
    assert run(capsys, place) == (2, "", f"{refused}{names}\n")
    assert run(capsys, place / "bank.safetensors")[0] == 0


@pytest.mark.parametrize("case", ["absent", "empty", "a text"])
def test_unusable(capsys, tmp_path, case):
    place = tmp_path / "model"
    if case == "empty":
        place.mkdir()
    if case == "a text":
        place.write_text("x")
    code, _, err = run(capsys, place)
    if case == "a text":  # named as the file to check: that it is none is what was to be found out
        assert code == 1
    else:
        assert code == 2
        assert err.startswith(f"neuroweave: {place}: no ")


# Known hashes


def test_manifest(capsys, folder):
    with_manifest(folder)
    code, out, _ = run(capsys, folder)
    assert (code, out) == (
        0, f"sound: 4 tensors in 2 files, 0.0 MB; every value finite; SHA-256 of 4 files as in {MANIFEST_FILE}\n"
    )  # fmt: skip
    assert "SHA-256" not in run(capsys, folder, "--no-hash")[1]


def changed_config(folder):
    content = (folder / "config.json").read_text()
    (folder / "config.json").write_text(content.replace("123", "321"))


def longer_config(folder):
    (folder / "config.json").write_text(json.dumps({"vocab_size": 123, "num_hidden_layers": 2, "x": 1}))


def one_bit(folder):
    with (folder / SECOND).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x3e")


def no_config(folder):
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "kind", "file", "text", "seen_without_hash"),
    [
        (changed_config, "changed file", "config.json", "SHA-256 ", False),
        (longer_config, "changed file", "config.json", "51 bytes, 43 according to neuroweave_manifest.json", True),
        (one_bit, "changed file", SECOND, "SHA-256 ", False),
        (no_config, "missing file", "config.json", "neuroweave_manifest.json names it, it is not there", True),
    ],
)
def test_manifest_finds(capsys, folder, damage, kind, file, text, seen_without_hash):
    with_manifest(folder)
    damage(folder)
    found = verify_checkpoint(folder)
    assert [(item.kind, item.file) for item in found.at("problem")] == [(kind, file)]
    assert found.at("problem")[0].text.startswith(text)
    assert run(capsys, folder)[0] == 1
    assert run(capsys, folder, "--no-hash")[0] == (1 if seen_without_hash else 0)


def test_manifest_and_a_file_more(capsys, folder):
    with_manifest(folder)
    (folder / "README.md").write_text("x")
    code, _, err = run(capsys, folder)
    assert (code, err) == (0, "warning: README.md: neuroweave_manifest.json does not name it\n")


@pytest.mark.parametrize(
    ("outputs", "text"),
    [
        ({"../secret": {"bytes": 1}}, "its output '../secret' is not a file of this folder"),
        ({"/etc/passwd": {"bytes": 1}}, "its output '/etc/passwd' is not a file of this folder"),
        ({"": {"bytes": 1}}, "its output '' is not a file of this folder"),
        ({"config.json": 3}, "its output 'config.json' lacks a size in bytes, or a SHA-256"),
        ({"config.json": {"bytes": 1, "sha256": "x"}}, "its output 'config.json' lacks a size in bytes, or a SHA-256"),
    ],
)
def test_bad_manifests(folder, outputs, text):
    write_manifest(folder, operation="fuse", parameters={}, inputs={}, outputs=outputs)
    problems = verify_checkpoint(folder).at("problem")
    assert [(item.kind, item.text) for item in problems] == [("manifest", text)]


@pytest.mark.parametrize("layout", ["cache", "local"])
def test_hashes_of_a_hub_download(capsys, tmp_path, folder, layout):
    """The two layouts of huggingface_hub: links to blobs named by their hash, and notes beside a plain folder."""
    digest = hashlib.sha256((folder / FIRST).read_bytes()).hexdigest()
    if layout == "cache":
        blobs = tmp_path / "blobs"
        blobs.mkdir()
        (folder / FIRST).rename(blobs / digest)
        (folder / FIRST).symlink_to(f"../blobs/{digest}")
        (folder / "config.json").rename(blobs / ("0" * 40))  # small files go by their git hash
        (folder / "config.json").symlink_to(f"../blobs/{'0' * 40}")
        damaged = blobs / digest
    else:
        notes = folder / ".cache/huggingface/download"
        notes.mkdir(parents=True)
        (notes / f"{FIRST}.metadata").write_text(f"{'1' * 40}\n{digest}\n1700000000.0\n")
        (notes / "config.json.metadata").write_text(f"{'1' * 40}\n{'0' * 40}\n1700000000.0\n")
        damaged = folder / FIRST
    assert run(capsys, folder)[:2] == (
        0, "sound: 4 tensors in 2 files, 0.0 MB; every value finite; SHA-256 of 1 file as in the hub\n"
    )  # fmt: skip
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    assert [(item.kind, item.file) for item in verify_checkpoint(folder).at("problem")] == [("changed file", FIRST)]


def test_a_file_that_shrinks_while_it_is_read(folder):
    sizes = []

    def shrink(done, total):
        if not sizes:
            (folder / SECOND).write_bytes(b"")
        sizes.append((done, total))

    found = verify_checkpoint(folder, threads=1, progress=shrink)
    assert [(item.file, item.text) for item in found.at("problem") if item.kind == "file"] == [
        (SECOND, "truncated while it was being read")
    ]
    assert sizes[0][1] == sum(entry["bytes"] for entry in found.files.values())


def test_threads_find_the_same(folder):
    truncated_shard(folder)
    assert verify_checkpoint(folder, threads=1) == verify_checkpoint(folder, threads=7)


def test_memory_and_imports(tmp_path):
    """Half a gigabyte in one tensor (a hole in the file): under 150 MB, without torch."""
    raw, header = build_header([TensorSpec("a", "BF16", (1 << 13, 1 << 15))])
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(raw)
        file.truncate(header.data_start + header.data_bytes)
    code = (
        "import sys\nfrom neuroweave.cli.main import main\n"
        f"try: main(['verify', {str(tmp_path)!r}, '--no-hash'])\n"
        "finally:\n"
        "    assert not {'torch', 'transformers', 'safetensors', 'ml_dtypes', 'tqdm'} & set(sys.modules)\n"
        "    print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    summary, peak = done.stdout.splitlines()
    assert summary.startswith("sound: 1 tensor in 1 file, 536.9 MB")
    assert int(peak) < 150_000
