"""Reading and writing safetensors, against the safetensors library."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mapconv.adapter import TensorRef
from mapconv.checkpoint import headers
from mapconv.checkpoint.headers import read_model_file, read_tensor_file
from mapconv.checkpoint.index import read_checkpoint
from mapconv.checkpoint.reader import TensorReader
from mapconv.checkpoint.writer import FixedFile, SpooledFile, TensorSpec, copy_range, lay_out, write_all_at
from mapconv.errors import CheckpointError
from tests.files import cached

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.uint8, torch.bool]


def sample(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).mul(10).to(dtype)


@pytest.fixture
def tensors():
    return {str(dtype): sample(dtype) for dtype in DTYPES} | {
        "scalar": torch.tensor(2.5),
        "empty": torch.ones(0, 4),
        "deep": torch.arange(24.0).view(2, 3, 4),
        "naïve": torch.ones(1),
    }


def test_headers_say_what_the_library_says(tensors, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "note": "ü"})
    file = read_tensor_file(path)
    assert file.metadata == {"format": "pt", "note": "ü"}
    assert {ref.name: ref.shape for ref in file.tensors} == {name: tuple(t.shape) for name, t in tensors.items()}
    assert [ref.start for ref in file.tensors] == sorted(ref.start for ref in file.tensors)
    with safe_open(path, "pt") as theirs:
        assert {ref.name: ref.dtype for ref in file.tensors} == {
            name: theirs.get_slice(name).get_dtype()
            for name in theirs.keys()  # noqa: SIM118
        }


def test_a_models_header_is_parsed_again_when_its_file_has_changed(tmp_path, monkeypatch):
    path, other = tmp_path / "model.safetensors", tmp_path / "other.safetensors"
    save_file({"a": torch.ones(3)}, path)
    save_file({"b": torch.ones(3)}, other)
    first = read_model_file(path)
    assert read_model_file(path) is first
    os.replace(other, path)
    assert [ref.name for ref in read_model_file(path).tensors] == ["b"]
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read_model_file(path)
    # What is kept has an end.
    monkeypatch.setattr(headers, "KEPT_TENSORS", 1)
    save_file({"c": torch.ones(3)}, path)
    save_file({"d": torch.ones(3)}, other)
    kept = read_model_file(path)
    read_model_file(other)
    assert read_model_file(path) is not kept


def test_reading_whole_tensors_rows_and_ranges(tensors, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    refs = {ref.name: ref for ref in read_tensor_file(path).tensors}
    buffer = torch.empty(8 * 100, dtype=torch.uint8)
    with TensorReader() as reader:
        for name, tensor in tensors.items():
            assert torch.equal(reader.read(refs[name]), tensor), name
            assert reader.read(refs[name]).dtype == tensor.dtype
            flat = tensor.reshape(-1)
            assert torch.equal(reader.read_range(refs[name], len(flat) // 3, len(flat), buffer), flat[len(flat) // 3 :])
        for name in ("torch.bfloat16", "deep"):
            assert torch.equal(reader.read_rows(refs[name], 1, 2, buffer), tensors[name][1:2])


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    (ref,) = read_tensor_file(path).tensors
    with TensorReader() as reader:
        os.truncate(path, 2000)
        with pytest.raises(CheckpointError, match="truncated during reading"):
            reader.read(ref)


def test_the_reader_closes_its_files(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(3)}, path)
    (ref,) = read_tensor_file(path).tensors
    with TensorReader() as reader:
        reader.read(ref)
        descriptor = reader.descriptor(path)
        assert reader.descriptor(path) == descriptor
        os.fstat(descriptor)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_a_spooled_file_is_what_the_library_would_read(tensors, tmp_path):
    path = tmp_path / "out.safetensors"
    spool = SpooledFile(path)
    for name, tensor in tensors.items():
        spool.append(name, tensor)
    spool.append("transposed", tensors["torch.float32"].T)
    spool.finish()
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys() | {"transposed"}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert torch.equal(loaded["transposed"], tensors["torch.float32"].T)
    assert [file.name for file in tmp_path.iterdir()] == ["out.safetensors"]


def test_a_spooled_file_that_is_given_up_leaves_nothing(tmp_path):
    spool = SpooledFile(tmp_path / "out.safetensors")
    spool.append("a", torch.ones(4))
    spool.close()
    assert not any(tmp_path.iterdir())


def test_a_fixed_file_filled_in_any_order(tmp_path):
    path = tmp_path / "out.safetensors"
    specs = [TensorSpec("b", "F32", (2, 3)), TensorSpec("ä", "BF16", (5,)), TensorSpec("a", "F32", ())]
    header, targets = lay_out(path, specs, {"format": "pt"})
    file = FixedFile(path, header, targets[-1].stop)
    values = [torch.randn(2, 3), torch.randn(5).bfloat16(), torch.tensor(3.0)]
    for value, target in reversed(list(zip(values, targets, strict=True))):
        file.write(value, target.start)
    file.close()
    loaded = load_file(path)
    assert all(torch.equal(loaded[spec.name], value) for spec, value in zip(specs, values, strict=True))
    # The library pads the header so that data is aligned for any dtype.
    assert targets[0].start % 8 == 0
    assert [ref.name for ref in read_tensor_file(path).tensors] == ["b", "ä", "a"]


@pytest.mark.parametrize("refusal", [None, errno.EXDEV, errno.EINVAL, errno.ENOSYS])
def test_copying_with_and_without_the_kernels_help(refusal, tmp_path, monkeypatch):
    if refusal is not None:

        def refuse(*arguments):
            raise OSError(refusal, os.strerror(refusal))

        monkeypatch.setattr(os, "copy_file_range", refuse)
    content = os.urandom(3_000_000)
    (tmp_path / "source").write_bytes(content)
    source, target = os.open(tmp_path / "source", os.O_RDONLY), os.open(tmp_path / "target", os.O_RDWR | os.O_CREAT)
    copy_range(source, target, 1000, 7, 2_500_000)
    os.close(source)
    os.close(target)
    assert (tmp_path / "target").read_bytes() == bytes(7) + content[1000:2_501_000]


@pytest.mark.parametrize("refusal", [None, errno.EXDEV])
def test_copying_from_a_file_that_ends_too_soon(refusal, tmp_path, monkeypatch):
    if refusal is not None:
        monkeypatch.setattr(os, "copy_file_range", lambda *_: (_ for _ in ()).throw(OSError(refusal, "")))
    (tmp_path / "source").write_bytes(b"short")
    source, target = os.open(tmp_path / "source", os.O_RDONLY), os.open(tmp_path / "target", os.O_RDWR | os.O_CREAT)
    with pytest.raises(OSError, match="truncated"):
        copy_range(source, target, 0, 0, 100)
    os.close(source)
    os.close(target)


def test_single_and_sharded_checkpoints_hold_the_same(base, sharded):
    single, shards = read_checkpoint(base), read_checkpoint(sharded)
    assert len(shards.files) > len(single.files) == 1
    assert {name: ref.shape for name, ref in shards.tensors.items()} == {
        name: ref.shape for name, ref in single.tensors.items()
    }
    assert shards.nbytes == single.nbytes == json.loads(
        (sharded / "model.safetensors.index.json").read_text()
    )["metadata"]["total_size"]  # fmt: skip


def test_a_shard_may_be_a_link_as_in_the_hubs_cache(sharded, tmp_path):
    snapshot = cached(sharded, tmp_path / "models--lab--llama")
    assert (snapshot / "config.json").is_symlink()
    assert read_checkpoint(snapshot).tensors.keys() == read_checkpoint(sharded).tensors.keys()


def test_a_tensor_in_two_shards(sharded, tmp_path):
    for name in ("model-1.safetensors", "model-2.safetensors"):
        save_file({"a": torch.ones(2)}, tmp_path / name)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"tensor a is in model-1\.safetensors and model-2\.safetensors"):
        read_checkpoint(tmp_path)


def test_sizes_of_a_reference(tmp_path):
    ref = TensorRef(tmp_path, "a", "BF16", (3, 4), 100)
    assert (ref.numel, ref.nbytes, ref.stop) == (12, 24, 124)


def test_a_spool_writes_many_tensors_in_few_calls(tmp_path, monkeypatch):
    calls = []
    pwritev = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, parts, offset: calls.append(len(parts)) or pwritev(fd, parts, offset))
    tensors = {f"t{number:04}": torch.full((number % 7 + 1,), float(number)) for number in range(1500)}
    spool = SpooledFile(tmp_path / "out.safetensors")
    for name, tensor in tensors.items():
        spool.append(name, tensor)
    spool.finish()
    assert calls == [512, 512, 476]
    loaded = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("taken", [0, 1, 4, 5, 9, 11, 12])
def test_what_the_kernel_leaves_of_several_parts_is_written_after(taken, tmp_path, monkeypatch):
    parts = [memoryview(b"abcd"), memoryview(b""), memoryview(b"efghi"), memoryview(b"jkl")]
    whole = b"".join(parts)
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    monkeypatch.setattr(os, "pwritev", lambda fd, _, offset: os.pwrite(fd, whole[:taken], offset))
    write_all_at(descriptor, parts, 3)
    os.close(descriptor)
    assert (tmp_path / "file").read_bytes() == bytes(3) + whole


def test_neighbours_in_a_file_are_read_at_once(tmp_path):
    tensors = {name: torch.randn(size) for name, size in (("a", 3), ("b", 4), ("c", 0), ("d", 5))}
    tensors |= {"h": torch.randn(6).bfloat16()}
    save_file(tensors, tmp_path / "x.safetensors")
    refs = {ref.name: ref for ref in read_tensor_file(tmp_path / "x.safetensors").tensors}
    with TensorReader() as reader:
        runs = list(reader.read_runs([refs[name] for name in "abcdhdab"]))
    assert [[ref.name for ref in run] for run, _ in runs] == [["a", "b", "c", "d"], ["h"], ["d"], ["a", "b"]]
    for run, flat in runs:
        assert torch.equal(flat, torch.cat([tensors[ref.name] for ref in run]))
