"""What every storage's codes stand for: rows in any cut, against plain arithmetic on whole matrices."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from mapconv.checkpoint.codecs import arithmetic, plain_view
from mapconv.checkpoint.codecs.arithmetic import expand_bytes
from mapconv.checkpoint.index import Checkpoint, read_checkpoint
from mapconv.checkpoint.quantization import quantization_settings
from mapconv.checkpoint.reader import TensorReader

from .encoders import STORAGES, Storage, nf4

NAME = "model.layers.0.self_attn.q_proj"


def write(folder, storage: Storage, tensors) -> Checkpoint:
    """A checkpoint of one quantized weight and one plain one, as a plain view."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = {f"{NAME}.{ending}": tensor.contiguous() for ending, tensor in tensors.items()}
    save_file(stored | {"model.norm.weight": torch.ones(5)}, folder / "model.safetensors", metadata={"format": "pt"})
    return view(folder, storage)


def view(folder, storage: Storage) -> Checkpoint:
    config = {storage.key: storage.settings} | storage.config
    with TensorReader() as reader:
        return plain_view(read_checkpoint(folder), config, quantization_settings(folder, config), reader)


def weight_of(shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", STORAGES)
@pytest.mark.parametrize("shape", [(32, 64), (40, 96)])
def test_values(name, shape, tmp_path):
    storage = STORAGES[name]
    tensors, values = storage.encode(weight_of(shape))
    checkpoint = write(tmp_path / "base", storage, tensors)
    assert list(checkpoint.tensors) in (
        [f"{NAME}.weight", "model.norm.weight"],
        ["model.norm.weight", f"{NAME}.weight"],
    )
    ref = checkpoint.tensors[f"{NAME}.weight"]
    assert (ref.shape, ref.dtype) == (shape, "BF16")
    buffer = torch.empty(8 * ref.numel, dtype=torch.uint8)
    with TensorReader() as reader:
        assert torch.equal(reader.read(ref), values)
        for start, stop in [(0, 1), (3, 8), (7, 29), (shape[0] - 1, shape[0])]:
            assert torch.equal(reader.read_rows(ref, start, stop, buffer), values[start:stop])


@pytest.mark.parametrize("shape", [(7, 9), (5, 64), (33, 100), (3, 65)])
@pytest.mark.parametrize("double", [False, True])
def test_nf4_blocks_run_across_the_ends_of_rows(shape, double, tmp_path):
    storage = STORAGES["nf4"]
    tensors, values = nf4(weight_of(shape), double=double)
    ref = write(tmp_path / "base", storage, tensors).tensors[f"{NAME}.weight"]
    buffer = torch.empty(8 * ref.numel, dtype=torch.uint8)
    with TensorReader() as reader:
        assert torch.equal(reader.read(ref), values)
        for start in range(shape[0]):
            assert torch.equal(reader.read_rows(ref, start, start + 1, buffer), values[start : start + 1])


def test_every_byte_of_e4m3():
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.view(torch.float8_e4m3fn).float()
    for part in (codes, codes[expected.isfinite()]):
        found = torch.empty(len(part))
        expand_bytes(part, "F8_E4M3", found)
        # In bits, which tell −0 and NaN.
        assert torch.equal(found.view(torch.int32), part.view(torch.float8_e4m3fn).float().view(torch.int32))


@pytest.mark.parametrize("name", ["nf4", "nf4-double", "fp8-ragged", "fp8-fp4"])
def test_scales_of_a_large_weight_are_read_with_its_rows(name, tmp_path, monkeypatch):
    storage = STORAGES[name]
    tensors, values = storage.encode(weight_of((40, 96)))
    ref = write(tmp_path / "base", storage, tensors).tensors[f"{NAME}.weight"]
    monkeypatch.setattr(arithmetic, "KEPT_SCALES", 0)
    buffer = torch.empty(8 * ref.numel, dtype=torch.uint8)
    with TensorReader() as reader:
        for start, stop in [(0, 40), (7, 29)]:
            assert torch.equal(reader.read_rows(ref, start, stop, buffer), values[start:stop])
