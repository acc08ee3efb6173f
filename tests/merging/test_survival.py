"""What a merge says of the update that its stored values hold, against the same numbers taken from its files."""

from __future__ import annotations

import json

import pytest
import torch

import mapconv
from mapconv.algebra.norms import BLOCK_ELEMENTS
from mapconv.merging.survival import Gauge, Samples, total
from mapconv.publishing.package import pack
from tests.files import read_tensors
from tests.models import merged_by_peft


def numbers(before: torch.Tensor, wanted: torch.Tensor, stored: torch.Tensor) -> tuple[float, float, float]:
    """(share changed, projection, ε) in float64."""
    update, kept = (values.double() - before.double() for values in (wanted, stored))
    square = float(update.square().sum())
    changed = float((before.to(stored.dtype) != stored).double().mean())
    return changed, float((update * kept).sum()) / square, float((kept - update).norm()) / square**0.5


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_the_gauge_is_what_the_files_hold(method, dtype, half_base, request, tmp_path):
    adapter = request.getfixturevalue(method)
    result = mapconv.merge(adapter, tmp_path / "merged", base=half_base, dtype=dtype, weights=[0.02])
    before, exact, stored = read_tensors(half_base), merged_by_peft(half_base, adapter), read_tensors(result.out)
    sums = torch.zeros(3, dtype=torch.float64)
    for item in result.merged:
        base = before[item.tensor].double()
        wanted = base + 0.02 * (exact[item.tensor].double() - base)
        changed, projection, error = numbers(before[item.tensor], wanted, stored[item.tensor])
        assert item.survival.changed_share == changed
        # ‖D‖² and S·D are sums of float32 products.
        assert item.survival.projection == pytest.approx(projection, abs=1e-4)
        assert item.survival.error == pytest.approx(error, rel=1e-4)
        square = float((wanted - base).square().sum())
        sums += torch.tensor([square, projection * square, error**2 * square], dtype=torch.float64)
    assert result.survival.projection == pytest.approx(float(sums[1] / sums[0]), abs=1e-4)
    assert result.survival.error == pytest.approx(float(sums[2] / sums[0]) ** 0.5, rel=1e-4)
    assert 0 < result.survival.changed_share < 1


def test_in_float32_all_of_it_survives(half_base, dora, tmp_path):
    result = mapconv.merge(dora, tmp_path / "merged", base=half_base, dtype="float32")
    assert all(item.survival.projection == 1 and item.survival.error == 0 for item in result.merged)
    assert not any("survives" in note for note in result.notes)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("elements", [BLOCK_ELEMENTS, 4 * BLOCK_ELEMENTS])
def test_a_large_matrix_is_sampled(known, elements):
    torch.manual_seed(0)
    before = (0.02 * torch.randn(2048, 2048)).bfloat16()
    B, A = 0.02 * torch.randn(2048, 4), 1e-3 * torch.randn(4, 2048)
    wanted = before.float() + B @ A
    gauge = Gauge(before.numel(), float((B @ A).double().norm()) if known else None)
    for start in range(0, 2048, elements // 2048):
        part = slice(start, start + elements // 2048)
        rows = before[part], wanted[part], wanted[part].bfloat16()
        gauge.add(Samples(*rows, torch.empty(2 * BLOCK_ELEMENTS)))
    changed, projection, error = numbers(before, wanted, wanted.bfloat16())
    found, sampled = gauge.result, before.numel() / 8
    # Five standard errors of an eighth of the values, of which ‖D‖² varies as the columns of A do.
    assert found.projection == pytest.approx(projection, abs=5 * error / sampled**0.5)
    assert found.changed_share == pytest.approx(changed, abs=5 * (changed * (1 - changed) / sampled) ** 0.5)
    assert found.error == pytest.approx(error, rel=5 / (2 * sampled) ** 0.5 if known else 0.05)
    assert found.update_square == pytest.approx(float((B @ A).double().square().sum()), rel=1e-6 if known else 0.1)


def test_no_update_survives_whole():
    gauge = Gauge(4, None)
    gauge.add(Samples(torch.ones(2, 2), torch.ones(2, 2), torch.ones(2, 2), torch.empty(8)))
    found = total([gauge.result, gauge.result])
    assert (found.values, found.changed_share, found.projection, found.error) == (8, 0.0, 1.0, 0.0)


def test_a_lost_update_is_said_with_what_helps(half_base, lora, run, tmp_path):
    done = run("merge", lora, "--base", half_base, "--weights", "0.002", "-o", tmp_path / "merged")
    assert done.status == 0, done.err
    assert "of the update survives" in done.out
    assert "less than 0.9 of the update survives rounding to BF16 in 14 tensors" in done.err
    assert "--dtype float32 keeps all of it" in done.err
    table = json.loads(run("merge", lora, "--base", half_base, "-o", tmp_path / "other", "--json").out)
    assert table["survival"].keys() == {"changed", "projection", "error"}
    assert table["merged"][0].keys() >= {"changed", "projection", "rounding_error"}


def test_the_record_the_card_and_the_report_have_it(half_base, lora, run, tmp_path):
    result = mapconv.merge(lora, tmp_path / "merged", base=half_base)
    record = json.loads((result.out / "map_merge.json").read_text())
    assert len(record["survival"]["tensors"]) == 14
    card = pack(result.out, base_id="lab/base", license_="mit").card("me/merged")
    assert "## What survives in the stored weights" in card
    assert f"| all that were merged | {result.survival.projection:.3f} |" in card
    done = run("report", result.out, "-o", tmp_path / "a.html")
    assert done.out.startswith(f"{result.out} (merged, 14 merged tensors)"), done.err
    assert "update that survives" in (tmp_path / "a.html").read_text()


def test_a_record_without_the_gauge_is_refused_by_the_report(half_base, lora, run, tmp_path):
    place = mapconv.merge(lora, tmp_path / "merged", base=half_base).out / "map_merge.json"
    record = json.loads(place.read_text())
    for value in (None, {"changed": 0.5, "projection": "all", "error": 0, "tensors": []}):
        place.write_text(json.dumps(record | {"survival": value}))
        done = run("report", place.parent, "-o", tmp_path / "a.html")
        assert done.status == 1
        assert len(done.err.splitlines()) == 1
        assert "survi" in done.err
