"""The safetensors header: equal to the library's, refused with a reason when anything is off."""

import json
import re
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from neuroweave.checkpoint.header import (
    DTYPE_BITS,
    MAX_HEADER_BYTES,
    TensorSpec,
    build_header,
    parse_header,
    read_header,
)


def whole_file(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_reads_what_the_library_wrote(tmp_path):
    path = tmp_path / "a.safetensors"
    arrays = {
        "one": np.arange(7, dtype="float32"),
        "empty": np.zeros((0, 123), dtype="float16"),
        "scalar": np.array(3, dtype="int64"),
        "ü.weight": np.ones((1, 7, 123), dtype="uint8"),
    }
    save_file(arrays, path, metadata={"format": "pt"})
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    assert {name: item.shape for name, item in header.tensors.items()} == {n: a.shape for n, a in arrays.items()}
    raw = path.read_bytes()
    for name, array in arrays.items():
        item = header.tensors[name]
        assert raw[header.data_start + item.begin : header.data_start + item.end] == array.tobytes()
    assert header.data_start + header.data_bytes == len(raw)


def test_library_reads_what_is_built(tmp_path):
    specs = [TensorSpec("b", "F32", (3, 1)), TensorSpec("a", "BF16", (123,)), TensorSpec("none", "I8", (0,))]
    raw, header = build_header(specs, {"format": "pt"})
    assert header.data_start % 8 == 0
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw + bytes(header.data_bytes))
    assert read_header(path) == header
    with safe_open(path, "pt") as opened:
        assert {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()} == {  # noqa: SIM118
            "a": (123,),
            "b": (3, 1),
            "none": (0,),
        }
        assert opened.metadata() == {"format": "pt"}


REFUSALS = {
    "too short": (b"abc", "3 bytes is too short for a safetensors file; was the download cut off?"),
    "absurd size": (
        struct.pack("<Q", 1 << 60) + b"{}",
        f"the header claims {1 << 60} bytes, more than the {MAX_HEADER_BYTES} allowed",
    ),
    "truncated header": (struct.pack("<Q", 100) + b"{}", "truncated: the header needs 108 bytes, the file has 10"),
    "no object": (whole_file(b"[1]"), "the header starts with b'[', expected '{'"),
    "bad JSON": (whole_file(b'{"a":'), "the header is not valid JSON"),
    "not UTF-8": (whole_file(b'{"\xff":1}'), "the header is not UTF-8 (byte 2)"),
    "nested": (whole_file(b'{"a":' * 20000), "nested too deeply"),
    "huge number": (whole_file(b'{"a":' + b"9" * 9000 + b"}"), "the header is not valid JSON"),
    "NaN": (whole_file(b'{"a":NaN}'), "the header is not valid JSON (NaN is not JSON)"),
    "twice": (
        whole_file(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)),
        "the header names 'a' twice",
    ),
    "metadata": (whole_file(b'{"__metadata__":{"a":1}}'), "__metadata__ must map strings to strings"),
    "no entry": (whole_file(b'{"a":7}'), "tensor 'a': expected dtype, shape and data_offsets, got 7"),
    "dtype": (whole_file(json.dumps({"a": entry("F31")}).encode(), bytes(8)), "tensor 'a': unknown dtype 'F31'"),
    "shape": (whole_file(json.dumps({"a": entry(shape=(-2,))}).encode(), bytes(8)), "shape [-2] is not a list of"),
    "float shape": (whole_file(json.dumps({"a": entry(shape=(2.0,))}).encode(), bytes(8)), "shape [2.0] is not"),
    "offsets": (whole_file(json.dumps({"a": entry(offsets=(8, 0))}).encode(), bytes(8)), "[8, 0] are not [begin, end]"),
    "size": (
        whole_file(json.dumps({"a": entry(shape=(3,))}).encode(), bytes(8)),
        "tensor 'a': F32 of shape [3] takes 12 bytes, its data_offsets span 8",
    ),
    "odd nibbles": (
        whole_file(json.dumps({"a": entry("F4", (3,), (0, 1))}).encode(), bytes(1)),
        "tensor 'a': shape [3] of F4 does not fill whole bytes",
    ),
    "overlap": (
        whole_file(json.dumps({"a": entry(), "b": entry(offsets=(4, 12))}).encode(), bytes(12)),
        "tensor 'b' overlaps 'a'",
    ),
    "gap": (
        whole_file(json.dumps({"a": entry(), "b": entry(offsets=(12, 20))}).encode(), bytes(20)),
        "tensor 'b' leaves a gap of 4 bytes after 'a'",
    ),
    "late start": (
        whole_file(json.dumps({"a": entry(offsets=(8, 16))}).encode(), bytes(16)),
        "tensor 'a' leaves a gap of 8 bytes after the start",
    ),
    "truncated data": (
        whole_file(json.dumps({"a": entry()}).encode(), bytes(5)),
        "truncated: tensor 'a' ends at data byte 8, the file holds 5; fetch it again",
    ),
    "left over": (
        whole_file(json.dumps({"a": entry()}).encode(), bytes(9)),
        "1 bytes after the last tensor belong to no tensor",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refuses(case, tmp_path):
    content, message = REFUSALS[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_header(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([TensorSpec("a", "F32", (1,))] * 2, "tensor name 'a' is taken twice"),
        ([TensorSpec("__metadata__", "F32", (1,))], "tensor name '__metadata__' is reserved"),
        ([TensorSpec("a", "F31", (1,))], "tensor a: dtype 'F31' is unknown"),
    ],
)
def test_refuses_to_build(specs, message):
    with pytest.raises((ValueError, KeyError), match=re.escape(message)):
        build_header(specs)


_SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
_SPECS = st.lists(st.tuples(st.text(max_size=8), st.sampled_from(["F32", "BF16", "I8", "BOOL", "F64"]), _SHAPES))


@settings(max_examples=150, deadline=None)
@given(_SPECS.map(lambda items: {name: TensorSpec(name, *rest) for name, *rest in items if name != "__metadata__"}))
def test_round_trip(specs):
    try:
        raw, header = build_header(specs.values())
    except UnicodeEncodeError:  # a lone surrogate is no name
        return
    assert parse_header(raw[8:], file="x", file_bytes=len(raw) + header.data_bytes) == header
    for name, spec in specs.items():
        assert header.tensors[name].nbytes == spec.nbytes == header.tensors[name].end - header.tensors[name].begin


_GOOD = whole_file(
    json.dumps({"__metadata__": {"format": "pt"}, "a": entry(), "b": entry("BF16", (2, 3), (8, 20))}).encode(),
    bytes(20),
)


@settings(max_examples=400, deadline=None)
@given(st.integers(0, len(_GOOD) - 1), st.binary(max_size=4), st.integers(0, 4))
def test_damaged_bytes_never_crash(position, replacement, removed):
    content = _GOOD[:position] + replacement + _GOOD[position + removed :]
    length = int.from_bytes(content[:8], "little")
    try:
        header = parse_header(content[8 : 8 + length], file="x", file_bytes=len(content))
    except ValueError as error:
        assert str(error).startswith("x: ")  # noqa: PT017
        return
    covered = sum(item.nbytes for item in header.tensors.values())
    assert header.data_start + covered == len(content)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(sorted(DTYPE_BITS)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "a"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), _JSON, max_size=3))
def test_any_json_is_parsed_or_refused(content):
    raw = json.dumps(content).encode()
    try:
        header = parse_header(raw, file="x", file_bytes=8 + len(raw))
    except ValueError:
        return
    assert header.data_bytes == 0
