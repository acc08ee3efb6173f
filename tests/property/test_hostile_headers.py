"""Safetensors files made to harm: one MapconvError, never another exception, never memory that a header only claims."""

from __future__ import annotations

import json
import struct
import tracemalloc

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mapconv.checkpoint.headers import read_tensor_file
from mapconv.checkpoint.index import read_checkpoint
from mapconv.errors import CheckpointError, MapconvError
from tests import examples
from tests.files import read_header, write_header

FAST = settings(max_examples=examples(300), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
sizes = st.integers(-2, 10) | st.sampled_from([2**31, 2**63, 2**64, 10**30, True, 1.0, None, "4"])
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I64", "BOOL", "F4", "f32", None, [], {}]) | scalars,
        "shape": st.lists(sizes, max_size=4) | json_values,
        "data_offsets": st.lists(sizes, max_size=3) | json_values,
    }
)
headers = st.dictionaries(st.text(max_size=8) | st.just("__metadata__"), entries | json_values, max_size=4)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile") / "model.safetensors"


def read_or_refuse(path):
    """What our reader makes of a file; whatever it accepts must be true of the bytes."""
    try:
        file = read_tensor_file(path)
    except MapconvError as error:
        message = str(error)
        file = None
    if file is None:
        assert str(path) in message
        message.encode()  # a message that no terminal can show is not a message
        return None
    size = path.stat().st_size
    assert sum(ref.nbytes for ref in file.tensors) < size
    assert all(0 < ref.start <= ref.stop <= size for ref in file.tensors)
    return file


@FAST
@given(content=st.binary(max_size=200))
def test_random_bytes(content, path):
    path.write_bytes(content)
    read_or_refuse(path)


@FAST
@given(claim=st.integers(0, 2**64 - 1), content=st.binary(max_size=64))
def test_any_claim_of_a_header_length_takes_no_memory(claim, content, path):
    path.write_bytes(struct.pack("<Q", claim) + content)
    tracemalloc.start()
    try:
        read_or_refuse(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


@FAST
@given(header=json_values | headers, data=st.binary(max_size=40))
# What random search finds seldom: a key that cannot be hashed, numbers too long to print, halves of characters.
@example(header={"a": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}, data=bytes(4))
@example(header={"a": {"dtype": "F32", "shape": [10**4000, 10**4000], "data_offsets": [0, 4]}}, data=bytes(4))
@example(header={"a": {"dtype": "F32", "shape": [2**62] * 999, "data_offsets": [0, 4]}}, data=bytes(4))
@example(header={"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 10**4000]}}, data=bytes(4))
@example(header={"\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, data=bytes(4))
@example(header={"__metadata__": {"format": "\ud800"}}, data=b"")
def test_any_json_header(header, data, path):
    write_header(path, header, data)
    read_or_refuse(path)


@FAST
@given(data=st.data())
def test_one_change_in_a_sound_header(data, path):
    """Delete, replace or swap one part of a real header; what is still accepted, safetensors itself must accept."""
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.ones(())}, path)
    header, content = read_header(path)
    entry = header[data.draw(st.sampled_from(["a", "b", "c"]))]
    field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
    entry[field] = data.draw(
        {"dtype": st.sampled_from(["F32", "F16", "I8", "F64"]), "shape": st.lists(sizes, max_size=3)}.get(
            field, st.lists(st.integers(0, 40), min_size=2, max_size=2)
        )
    )
    write_header(path, header, content)
    if read_or_refuse(path) is not None:
        with safe_open(path, "pt") as theirs:
            assert set(theirs.keys()) == {"a", "b", "c"}


@FAST
@given(position=st.integers(0, 10**6), value=st.integers(0, 255))
def test_one_changed_byte(position, value, path):
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4)}, path)
    content = bytearray(path.read_bytes())
    content[position % len(content)] = value
    path.write_bytes(content)
    ours = read_or_refuse(path)
    try:
        with safe_open(path, "pt") as file:
            theirs = set(file.keys())
    except SafetensorError:
        return  # the library may be stricter than we are; it must not be laxer about what a tensor is
    if ours is not None:
        assert {ref.name for ref in ours.tensors} == theirs


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a": 1' + b"0" * 10_000 + b"}",
        b'{"a": NaN}',
        b"\xff\xfe\x00",
        b'{"a": {}, "a": {}}',
        b"{" + b",".join(b'"%d": {}' % (number % 149_999) for number in range(150_000)) + b"}",
        json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode("utf-16"),
    ],
    ids=["deep list", "deep object", "long number", "NaN", "no UTF-8", "twice", "many names twice", "UTF-16"],
)
def test_json_that_is_a_trap(header, path):
    write_header(path, header, bytes(4))
    with pytest.raises(CheckpointError):
        read_tensor_file(path)


@FAST
@given(index=json_values | st.fixed_dictionaries({"weight_map": json_values, "metadata": json_values}))
def test_any_index(index, path):
    folder = path.parent / "sharded"
    folder.mkdir(exist_ok=True)
    save_file({"a": torch.ones(2)}, folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError):
        read_checkpoint(folder)
