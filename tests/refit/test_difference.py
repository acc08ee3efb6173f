"""The difference of two stored weights, by row blocks: the same numbers however it is read, as dense float64 says."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mapconv.algebra.fingerprint import matrix_fingerprint
from mapconv.checkpoint.headers import read_tensor_file
from mapconv.checkpoint.reader import TensorReader
from mapconv.placement.matrices import MatrixRows
from mapconv.placement.weights import Piece, WeightView
from mapconv.refit.targets import difference
from mapconv.refit.targets.difference import Difference


@pytest.fixture
def files(tmp_path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """W0 in two tensors, the second one in another dtype, and T in one, bfloat16."""
    draw = torch.Generator().manual_seed(0)
    W = torch.randn(700, 96, generator=draw).bfloat16()
    T = (W.float() + 0.01 * torch.randn(700, 96, generator=draw)).bfloat16()
    save_file({"up": W[:300].contiguous(), "down": W[300:].float()}, tmp_path / "base.safetensors")
    save_file({"weight": T}, tmp_path / "tuned.safetensors")
    return W, T


def rows_of(file: Path, names: list[str], reader: TensorReader, held: int) -> MatrixRows:
    found = {ref.name: ref for ref in read_tensor_file(file).tensors}
    pieces, start = [], 0
    for name in names:
        pieces.append(Piece(found[name], start, start + found[name].shape[0]))
        start = pieces[-1].stop
    return MatrixRows(WeightView((start, 96), tuple(pieces)), reader, held=held)


@pytest.mark.parametrize("held", [0, 1 << 20])
@pytest.mark.parametrize("elements", [1 << 11, 1 << 19])
def test_blocks_norms_and_products(files, tmp_path: Path, monkeypatch, held: int, elements: int) -> None:
    monkeypatch.setattr(difference, "WIDE_ELEMENTS", elements)
    W, T = (values.double() for values in files)
    with TensorReader() as reader:
        base = rows_of(tmp_path / "base.safetensors", ["up", "down"], reader, held)
        target = Difference(base, rows_of(tmp_path / "tuned.safetensors", ["weight"], reader, held))
        blocks = [(S.double(), W0.double()) for _, _, S, W0 in target.blocks(elements)]
        assert torch.equal(torch.cat([S for S, _ in blocks]), T - W)
        assert torch.equal(torch.cat([W0 for _, W0 in blocks]), W)
        exact = float((T - W).square().sum()), float(((T - W) * W).sum()), float(W.square().sum())
        assert target.squared_norms() == pytest.approx(exact, rel=1e-12)
        for found, matrix in ((target.base, W), (target.tuned, T)):
            wanted = matrix_fingerprint(matrix)
            assert found.norm == pytest.approx(wanted.norm, rel=1e-9)
            assert found.projection == pytest.approx(wanted.projection, rel=1e-9)
        A, B = torch.randn(3, 96), 0.01 * torch.randn(700, 3)
        norms = target.approximation_row_norms(B, A)
        assert torch.allclose(norms, (W + B.double() @ A.double()).norm(dim=1), rtol=1e-12)


def test_a_sample_of_the_rows_tells_the_rounding(files, tmp_path: Path, monkeypatch) -> None:
    floors = []
    for sampled in (1 << 20, 1 << 14):
        monkeypatch.setattr(difference, "SAMPLED", sampled)
        monkeypatch.setattr(difference, "WIDE_ELEMENTS", 1 << 12)
        with TensorReader() as reader:
            base = rows_of(tmp_path / "base.safetensors", ["up", "down"], reader, 0)
            target = Difference(base, rows_of(tmp_path / "tuned.safetensors", ["weight"], reader, 0))
            floors.append(target.floor())
    assert 0 < floors[0] < 1
    # 16,000 of 67,000 squares whose spread is about their mean: 1 % is three times what chance gives.
    assert floors[1] != floors[0]
    assert floors[1] == pytest.approx(floors[0], rel=0.01)
