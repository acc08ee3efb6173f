"""The statistics folder: what is written comes back, and roots that do not fit are refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from mapconv.algebra.fingerprint import Fingerprint
from mapconv.algebra.regression import PairedMoment
from mapconv.checkpoint.reader import TensorReader
from mapconv.errors import CheckpointError
from mapconv.refit.stored_statistics import LEADING, ROOTS_FILE, StatisticsWriter, read_statistics

WIDTH = 50


@pytest.fixture
def folder(tmp_path):
    """Two layers with one input, and what was written of it."""
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, WIDTH, generator=draw) * 0.9 ** torch.arange(WIDTH)
    moment = PairedMoment(WIDTH)
    moment.add(inputs, inputs)
    known = moment.inputs()
    writer = StatisticsWriter(tmp_path)
    for path in ("layers.0.q", "layers.0.k"):
        writer.add(path, known, Fingerprint(1.0, 0.5))
    assert writer.finish({"name": "base"}, {}) == 2
    writer.close()
    return tmp_path, known.root


def read(folder):
    with TensorReader() as reader:
        return read_statistics(folder).inputs("layers.0.k", reader).root


def test_roots_come_back_with_their_leading_directions(folder):
    folder, root = folder
    found = read(folder)
    assert torch.equal(found.factor, root.factor)
    assert torch.equal(found.leading(8), root.leading(LEADING, 8)[:, :8].bfloat16().float())
    exact = torch.linalg.svd(root.factor.double()).Vh[:8].T
    directions = torch.linalg.qr(found.leading(8).double()).Q
    assert torch.linalg.matrix_norm(exact.T @ directions) ** 2 == pytest.approx(8, abs=1e-3)


def test_more_directions_than_are_stored_are_found(folder):
    folder, _ = folder
    assert read(folder).leading(LEADING + 5).shape == (WIDTH, LEADING + 5)


def test_a_folder_without_leading_directions_serves(folder):
    folder, root = folder
    tensors = load_file(folder / ROOTS_FILE)
    save_file({name: value for name, value in tensors.items() if not name.endswith("leading")}, folder / ROOTS_FILE)
    found = read(folder)
    assert torch.equal(found.factor, root.factor)
    assert found.leading(8).shape == (WIDTH, 8)


@pytest.mark.parametrize("wrong", ["width", "dtype", "NaN"])
def test_leading_directions_that_do_not_fit_are_refused(folder, wrong):
    folder, _ = folder
    tensors = load_file(folder / ROOTS_FILE)
    (name,) = [name for name in tensors if name.endswith("leading")]
    tensors[name] = {
        "width": tensors[name][1:].contiguous(), "dtype": tensors[name].float(), "NaN": tensors[name] * torch.nan,
    }[wrong]  # fmt: skip
    save_file(tensors, folder / ROOTS_FILE)
    with pytest.raises(CheckpointError, match="make the folder again"):
        read(folder)
