"""Every storage written as it is read: the same codes with the scales that it has, and new scales."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from mapconv.checkpoint.codecs import plain_view
from mapconv.checkpoint.codecs.base import EncodedTensor
from mapconv.checkpoint.codecs.encode import is_writable, open_store, rewritten
from mapconv.checkpoint.codecs.encode.base import Store, WrittenBytes
from mapconv.checkpoint.index import read_checkpoint
from mapconv.checkpoint.quantization import quantization_settings
from mapconv.checkpoint.reader import TensorReader

from .encoders import STORAGES, nf4
from .test_oracles import stored_case
from .test_values import NAME, weight_of, write

ALL = slice(None)
WRITABLE = [name for name in STORAGES if not name.startswith("mlx")]


def decoded(ref: EncodedTensor, reader: TensorReader, store: Store, levels: torch.Tensor) -> torch.Tensor:
    """What the codec reads in the bytes that the store makes."""
    out = torch.empty(ref.shape).view(-1, ref.shape[-1])
    ref.encoding.rows(WrittenBytes(reader, store.parts(levels)), 0, len(out), out)
    return out


def weight_in(tmp_path, storage, tensors) -> EncodedTensor:
    ref = write(tmp_path / "base", storage, tensors).tensors[f"{NAME}.weight"]
    assert isinstance(ref, EncodedTensor)
    return ref


@pytest.mark.parametrize("name", WRITABLE)
def test_a_weight_that_did_not_change_keeps_its_codes(name, tmp_path):
    ref = weight_in(tmp_path, STORAGES[name], STORAGES[name].encode(weight_of((40, 96)))[0])
    with TensorReader() as reader:
        store, values = open_store(ref.encoding, reader), reader.read(ref)
        matrix = values.T if store.turned else values
        levels = store.grid.nearest(matrix, ALL)
        assert store.grid.saturated(matrix) == 0
        # Scales are multiplied in another order: an ulp or two of float32.
        torch.testing.assert_close(store.grid.values(levels, ALL), matrix, rtol=1e-6, atol=0)
        assert torch.equal(decoded(ref, reader, store, levels), values)
        parts = {part.name: (start, data) for part, start, data in store.parts(levels)}
        assert parts.keys() == {part.name for part in rewritten(ref.encoding)}
        for part in rewritten(ref.encoding):
            start, data = parts[part.name]
            stored = reader.read_bytes(part, 0, part.nbytes)
            assert (start, len(data)) == (0, part.nbytes)
            # A zero may have had a sign.
            assert torch.equal(data, stored) or part == ref.encoding.stored[0]


@pytest.mark.parametrize("name", WRITABLE)
def test_new_scales_fit_a_weight_that_outgrew_its_own(name, tmp_path):
    storage = STORAGES[name]
    ref = weight_in(tmp_path, storage, storage.encode(weight_of((40, 96)))[0])
    wanted = 1.5 * weight_of((40, 96), seed=1)
    again = storage.encode(wanted)[1]
    with TensorReader() as reader:
        store = open_store(ref.encoding, reader)
        matrix = wanted.T if store.turned else wanted
        kept = decoded(ref, reader, store, store.grid.nearest(matrix, ALL))
        store.rescale(matrix)
        new = decoded(ref, reader, store, store.grid.nearest(matrix, ALL))
    errors = [float((values - wanted).square().sum()) for values in (new, kept, again)]
    assert errors[0] < errors[1]
    # What quantizing the weight anew makes of it; NVFP4 keeps the scale of the whole weight, which outgrew it.
    assert errors[0] <= (1.5 if "nvfp4" in name else 1.05) * errors[2]


@pytest.mark.parametrize("shape", [(7, 10), (33, 100), (3, 65)])
@pytest.mark.parametrize("double", [False, True])
def test_nf4_blocks_across_the_ends_of_rows(shape, double, tmp_path):
    ref = weight_in(tmp_path, STORAGES["nf4"], nf4(weight_of(shape), double=double)[0])
    with TensorReader() as reader:
        store, values = open_store(ref.encoding, reader), reader.read(ref)
        assert torch.equal(decoded(ref, reader, store, store.grid.nearest(values, ALL)), values)
        store.rescale(2 * values)
        new = decoded(ref, reader, store, store.grid.nearest(2 * values, ALL))
        assert float((new - 2 * values).norm() / values.norm()) < 0.1


def test_values_beyond_the_grid_are_counted(tmp_path):
    storage = STORAGES["ct-int4"]
    ref = weight_in(tmp_path, storage, storage.encode(weight_of((40, 96)))[0])
    with TensorReader() as reader:
        store = open_store(ref.encoding, reader)
        wanted = reader.read(ref)
        wanted[:2] *= 100
        beyond = (wanted / store.grid.scale_of(ALL) > 7.5) | (wanted / store.grid.scale_of(ALL) < -8.5)
        assert store.grid.saturated(wanted) == int(beyond.sum()) > 0


def test_what_a_merge_cannot_write_is_known(tmp_path):
    for name in set(STORAGES) - set(WRITABLE):
        ref = weight_in(tmp_path / name, STORAGES[name], STORAGES[name].encode(weight_of((40, 96)))[0])
        assert is_writable(ref.encoding) == (name in WRITABLE)


def test_experts_of_gpt_oss_go_back_one_by_one(tmp_path):
    config, tensors, _ = stored_case("gpt-oss-mxfp4")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    with TensorReader() as reader:
        view = plain_view(read_checkpoint(tmp_path), config, quantization_settings(tmp_path, config), reader)
        for ref in view.tensors.values():
            if not isinstance(ref, EncodedTensor):
                continue
            experts, height, width = ref.shape
            values = reader.read(ref)
            for index in range(experts):
                store = open_store(ref.encoding, reader, index)
                assert store.turned
                levels = store.grid.nearest(values[index].T, ALL)
                out = torch.empty(height, width)
                written = WrittenBytes(reader, store.parts(levels))
                ref.encoding.rows(written, index * height, (index + 1) * height, out)
                assert torch.equal(out, values[index])
                store.rescale(3 * values[index].T)
                written = WrittenBytes(reader, store.parts(store.grid.nearest(3 * values[index].T, ALL)))
                ref.encoding.rows(written, index * height, (index + 1) * height, out)
                assert float((out - 3 * values[index]).norm() / (3 * values[index]).norm()) < 0.15
