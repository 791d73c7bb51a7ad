"""Hostile headers and indexes: read consistently or refused with a ValueError, never more; judged by the library."""

import contextlib
import json
import os
import re
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from neuroweave.checkpoint import Checkpoint, read_header
from neuroweave.checkpoint.header import DTYPE_BITS, MAX_JSON_BYTES, parse_header
from neuroweave.checkpoint.reader import INDEX_FILE, read_index
from neuroweave.checkpoint.verification import verify_checkpoint

FUZZ = settings(
    deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
# what the library lets through and this reader refuses, on purpose; the test below proves the list
KNOWN_DIFFERENCES = re.compile(
    r"names '.*' twice|__metadata__ must map strings|expected dtype, shape and data_offsets, got", re.DOTALL
)


def whole_file(header, data_bytes):
    return len(header).to_bytes(8, "little") + header + bytes(data_bytes)


def read_by_both(content):
    """Reads a file's bytes with both readers and holds their results against each other; True when both accept."""
    length = int.from_bytes(content[:8], "little")
    ours = theirs = None
    try:
        ours = parse_header(content[8 : 8 + length], file="x", file_bytes=len(content))
    except ValueError as error:
        reason = str(error)
        assert not isinstance(error, UnicodeError)  # noqa: PT017
        assert reason.startswith("x: ")
        assert len(reason) < 1000
    with contextlib.suppress(SafetensorError, UnicodeError):
        theirs = {name: (item["dtype"], item["shape"], bytes(item["data"])) for name, item in deserialize(content)}
    if ours is None:
        assert theirs is None or KNOWN_DIFFERENCES.search(reason), (reason, content)
        return False
    assert theirs is not None, content
    assert set(theirs) == set(ours.tensors)
    for name, entry in ours.tensors.items():
        begin, end = ours.data_start + entry.begin, ours.data_start + entry.end
        assert ours.data_start <= begin <= end <= len(content)
        assert theirs[name][1:] == (list(entry.shape), content[begin:end])
        assert theirs[name][0] in (entry.dtype, entry.dtype.replace("_", "")), entry.dtype
    assert ours.data_start + ours.data_bytes == len(content)
    return True


# Headers, as text: sound ones with faults strewn in

ODD_NUMBERS = ["-0", "-1", "1e3", "1E0", "1.0", "0.0", "01", "+1", "true", "null", '"1"', "[]", "9" * 5000, "1e999",
               str(2**31), str(2**61), str(2**63), str(2**64 - 1), str(2**64), str(10**30)]  # fmt: skip
NAMES = ["a", "\\u0061", "b", "é", "", "\\ud83d\\ude00", "\\ud800", "\\uDFff x", "\\u0000", "\\n", "a\u0001", "x" * 300]
METADATA = ["{}", '{"a":"b"}', "null", '{"a":1}', '{"a":"b","a":"c"}', '{"\\ud800":"x"}', '{"a":"\\udc00"}', "[]"]
BLANKS = ["", " ", "\t\n\r", "\f", "\u00a0", "\ufeff", "//"]


@st.composite
def headers(draw):
    """(header bytes, data bytes): a sound layout in which any number, name, field or blank may be off."""

    def seldom(odd, usual):
        return draw(odd) if draw(st.integers(0, 19)) == 0 else usual

    position, parts = 0, []
    if draw(st.booleans()):
        parts.append(f'"__metadata__":{draw(st.sampled_from(METADATA))}')
    for number in range(draw(st.integers(0, 3))):
        dtype = draw(st.sampled_from(sorted(DTYPE_BITS)))
        shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 8]), max_size=3))
        position += seldom(st.sampled_from([-1, 1, 8]), 0)  # an overlap, a gap
        begin, position = position, position + int(np.prod(shape, dtype=int)) * DTYPE_BITS[dtype] // 8
        odd = st.sampled_from(ODD_NUMBERS)
        sizes = ",".join(seldom(odd, str(size)) for size in shape)
        sizes = seldom(st.sampled_from([f"{2**63},2,0", f"0,{2**64}", "1," * 70 + "1"]), sizes)
        fields = [f'"dtype":"{dtype}"', f'"shape":[{sizes}]']
        fields.append(f'"data_offsets":[{seldom(odd, str(begin))},{seldom(odd, str(position))}]')
        fields += seldom(st.sampled_from([['"x":1'], fields[:1], ['"dtype":"F31"'], ['"x":' + "[" * 150]]), [])
        entry = "{" + ",".join(fields) + "}"
        entry = seldom(st.sampled_from([f'["{dtype}",[{sizes}],[{begin},{position}]]', "null", "7", "{}"]), entry)
        parts.append(f'"{seldom(st.sampled_from(NAMES), f"t{number}")}":{entry}')
    blank = seldom(st.sampled_from(BLANKS), "")
    text = "{" + f",{blank}".join(draw(st.permutations(parts))) + "}" + seldom(st.sampled_from([" ", "\0", "\n "]), "")
    return text.encode(), max(0, position + seldom(st.sampled_from([-1, 1, 4]), 0))


@FUZZ
@given(headers())
def test_headers(case):
    read_by_both(whole_file(*case))


@st.composite
def mutations(draw, content):
    """`content` after a few edits: bytes replaced, removed, doubled or put elsewhere."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.integers(0, 12)))
        kind = draw(st.sampled_from(["replace", "remove", "double", "move", "cut", "digit"]))
        if kind == "replace":
            data[at:end] = draw(st.binary(max_size=12))
        elif kind == "digit":
            data[at : at + 1] = draw(st.sampled_from([b"0", b"9", b"-", b"e", b'"', b"[", b"}", b",", b"\\"]))
        elif kind == "cut":
            del data[max(8, at) :]
        else:
            part = bytes(data[at:end])
            if kind != "double":
                del data[at:end]
            if kind != "remove":
                where = draw(st.integers(0, len(data)))
                data[where:where] = part
    return bytes(data)


SOUND = save(
    {"a": np.arange(7, dtype="f4"), "b.weight": np.ones((3, 1), "f2"), "none": np.zeros((0, 5), "i8")},
    metadata={"format": "pt"},
)


@FUZZ
@given(mutations(SOUND))
def test_mutated_files(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    try:
        header = read_header(path)
    except ValueError as error:
        assert str(error).startswith(f"{path}: ")  # noqa: PT017
    else:
        assert header.data_start + header.data_bytes == len(content)
    if len(content) >= 8:
        length = int.from_bytes(content[:8], "little")
        read_by_both(len(content[8 : 8 + length]).to_bytes(8, "little") + content[8:])


def test_the_sound_file_is_accepted():
    assert read_by_both(SOUND)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":1}}', 1, "expected dtype, shape and data_offsets"),
        (b'{"a":["U8",[1],[0,1]]}', 1, "expected dtype, shape and data_offsets, got ['U8', [1], [0, 1]]"),
        (b'{"a":["U8",[0],[0,0]],"a":["U8",[1],[0,1]]}', 1, "the header names 'a' twice"),
        (b'{"__metadata__":null}', 0, "__metadata__ must map strings to strings"),
        (b'{"__metadata__":{"a":"b","a":"c"}}', 0, "the header names 'a' twice"),
    ],
)
def test_known_differences(header, data, message):
    content = whole_file(header, data)
    deserialize(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_header(header, file="x", file_bytes=len(content))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', "holds half of a surrogate pair"),
        (b'{"__metadata__":{"a":"\\uDC00"}}', "holds half of a surrogate pair"),
        (b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}', "shape [-0.0] is not a list of sizes"),
        (b'{"a":{"dtype":"U8","shape":[true],"data_offsets":[0,1]}}', "shape [True] is not a list of sizes"),
        (b'{"a":{"dtype":"U8","shape":[1e3],"data_offsets":[0,1000]}}', "shape [1000.0] is not a list of sizes"),
        (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[-1,0]}}', "data_offsets [-1, 0] are not [begin, end]"),
        (b'{"a":{"dtype":"U8","shape":[%d,2,0],"data_offsets":[0,0]}}' % 2**63, "more elements than can be counted"),
        (b'{"a":{"dtype":"U8","shape":[0,%d],"data_offsets":[0,0]}}' % 2**64, "more elements than can be counted"),
    ],
)
def test_what_fuzzing_found(header, message):
    content = whole_file(header, 0)
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_header(header, file="x", file_bytes=len(content))
    with pytest.raises(SafetensorError):
        deserialize(content)


HOSTILE = {
    "a long shape": b'{"a":{"dtype":"F31","shape":[%s1],"data_offsets":[0,0]}}' % (b"1," * 100_000),
    "a wrong shape, long": b'{"a":{"dtype":"U8","shape":[%s-1],"data_offsets":[0,0]}}' % (b"1," * 100_000),
    "a product of many digits": b'{"a":{"dtype":"U8","shape":[%s1],"data_offsets":[0,0]}}'
    % (b"9" * 18 + b",")
    * 20_000,
    "a long name": b'{"%s":7}' % (b"x" * 300_000),
    "a long name twice": b'{"%s":7,"%s":7}' % ((b"x" * 150_000,) * 2),
    "deep lists": b'{"a":' + b"[" * 100_000,
    "deep objects": b'{"a":' * 60_000,
    "deep, just below the limit": b'{"a":' * 900 + b"1" + b"}" * 900,
    "many digits": b'{"a":' + b"9" * 300_000 + b"}",
    "many members": b'{"a":{%s"z":1}}' % b"".join(b'"%d":1,' % number for number in range(30_000)),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_cost_little(case, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(whole_file(HOSTILE[case], 0))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
            read_header(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 600
    assert peak < 40 * len(HOSTILE[case]) + 300_000


@pytest.mark.parametrize("claimed", [2**63, 2**64 - 1, 100_000_001, 99_999_999, 9])
def test_a_claimed_size_allocates_nothing(claimed, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(claimed.to_bytes(8, "little") + b"{}      ")
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"the header (claims|needs)"):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 300_000
    finally:
        tracemalloc.stop()


# Indexes


def two_shards(folder: Path) -> dict[str, str]:
    folder.mkdir(exist_ok=True)
    homes = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}
    for file in set(homes.values()):
        tensors = {name: np.ones(3, "f4") for name, home in homes.items() if home == file}
        (folder / file).write_bytes(save(tensors))
    return homes


FILES = ["one.safetensors", "two.safetensors", "../outside.safetensors", "/etc/passwd.safetensors", "x/one.safetensors",
         "..\\outside.safetensors", "C:one.safetensors", ".safetensors", "..safetensors", "folder.safetensors",
         "pipe.safetensors", "dangling.safetensors", "one.safetensors\\u0000.safetensors", "\\ud800.safetensors",
         "x" * 300 + ".safetensors", "é" * 130 + ".safetensors", "one.bin", "", "ONE.safetensors", "absent.safetensors",
         "broken.safetensors"]  # fmt: skip


@st.composite
def indexes(draw):
    """The bytes of an index: mostly the right one, with entries, values and structure that may be off."""
    homes = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}
    entries = [f'"{name}":"{home}"' for name, home in homes.items()]
    odd_values = ["null", "1", "[]", "{}", "true"]
    for _ in range(draw(st.integers(0, 2))):
        value = draw(st.sampled_from([f'"{file}"' for file in FILES] * 2 + odd_values))
        name = draw(st.sampled_from(["a", "b", "d", "", "a", "b", "d", "\\ud800"]))
        twice = draw(st.integers(0, 9)) == 9
        entries = [entry for entry in entries if twice or not entry.startswith(f'"{name}"')] + [f'"{name}":{value}']
    entries = entries[draw(st.sampled_from([0, 0, 0, 1])) :]
    sizes = ["36", "0", "9", "1e3", "1e999", "-1", "null", "true", '"36"', "[]", "9" * 5000, str(2**70)]
    metadata = f'"metadata":{{"total_size":{draw(st.sampled_from(sizes))}}}'
    parts = [f'"weight_map":{{{",".join(entries)}}}', *([metadata] if draw(st.booleans()) else [])]
    if draw(st.integers(0, 9)) == 9:
        parts.append(draw(st.sampled_from(['"weight_map":[]', '"metadata":3', '"x":' + "[" * 5000, "7", '"x":NaN'])))
    content = ("{" + ",".join(parts) + "}").encode()
    return draw(mutations(content)) if draw(st.integers(0, 4)) == 4 else content


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "inside"
    two_shards(folder)
    (folder.parent / "outside.safetensors").write_bytes(save({"a": np.ones(3, "f4")}))
    (folder / "folder.safetensors").mkdir()
    (folder / "broken.safetensors").write_bytes(SOUND[:40])
    (folder / "dangling.safetensors").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.safetensors")
    return folder


@settings(FUZZ, max_examples=150)  # each reads two shards
@given(indexes())
def test_indexes(folder, content):
    (folder / INDEX_FILE).write_bytes(content)
    found = verify_checkpoint(folder, threads=1)
    try:
        files = set(read_index(folder / INDEX_FILE)["weight_map"].values())
        assert all(Path(file).name == file and len(file.encode()) < 256 for file in files)
        with Checkpoint(folder) as checkpoint:
            for name, tensor in checkpoint.items():
                assert "/" not in tensor.file
                assert tensor.offset + tensor.nbytes <= (folder / tensor.file).stat().st_size
                assert np.array_equal(checkpoint.read_numpy(name), np.ones(3, "f4"))
            assert set(checkpoint) == set(read_index(folder / INDEX_FILE)["weight_map"])
    except ValueError as error:
        assert not isinstance(error, UnicodeError)  # noqa: PT017
        assert not found.sound


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("../outside.safetensors", "is not a plain file name of this folder"),
        ("/outside.safetensors", "is not a plain file name of this folder"),
        ("x" * 300 + ".safetensors", "a file name of 312 letters, which no system can hold"),
        ("é" * 130 + ".safetensors", "a file name of 142 letters, which no system can hold"),
        ("\ud800.safetensors", "the index holds half of a surrogate pair"),
        ("dangling.safetensors", "1 tensors are said to be in dangling.safetensors, which is not in the folder"),
        ("pipe.safetensors", "1 tensors are said to be in pipe.safetensors, which is not in the folder"),
        ("folder.safetensors", "1 tensors are said to be in folder.safetensors, which is not in the folder"),
    ],
)
def test_files_that_are_none(folder, file, message):
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(ValueError, match=re.escape(message)):
        Checkpoint(folder)


def test_a_shard_may_be_a_link(tmp_path):
    """The hub's cache is made of links: a shard that a link leads to is read, and only by the offsets of its header."""
    homes = two_shards(tmp_path / "real")
    shutil.copytree(tmp_path / "real", tmp_path / "links")
    (tmp_path / "links" / "one.safetensors").unlink()
    (tmp_path / "links" / "one.safetensors").symlink_to("../real/one.safetensors")
    (tmp_path / "links" / INDEX_FILE).write_text(json.dumps({"weight_map": homes}))
    with Checkpoint(tmp_path / "links") as checkpoint:
        assert np.array_equal(checkpoint.read_numpy("a"), np.ones(3, "f4"))


@pytest.mark.parametrize(("name", "what"), [(INDEX_FILE, "index"), ("config.json", "configuration")])
def test_absurd_json_is_not_read(tmp_path, name, what):
    save_path = tmp_path / "model.safetensors"
    if name != INDEX_FILE:
        save_path.write_bytes(SOUND)
    with (tmp_path / name).open("wb") as file:
        file.truncate(1 << 40)  # a hole: takes no space on the disk
    message = f"{1 << 40} bytes are too many for the {what}; at most {MAX_JSON_BYTES} are read"
    with pytest.raises(ValueError, match=message):
        Checkpoint(tmp_path).config()
