"""The plan of an upgrade: what it decides from names and shapes is what the run then does."""

from __future__ import annotations

import pytest

import mapconv
from mapconv.placement.adapters import place_adapter
from mapconv.refit.plan import ConvertOptions, plan_upgrade


@pytest.mark.parametrize(
    ("method", "options", "kind"),
    [
        ("lora", {}, "keep-lora"),
        ("lora", {"rank": 4}, "keep-lora"),
        ("lora", {"rank": 3}, "resize"),
        ("lora", {"tolerance": 0.1}, "resize"),
        ("lora", {"rank": 3, "statistics": "full"}, "resize"),
        ("lora", {"rank_at_most": 3}, "resize"),
        ("lora", {"rank_at_most": 9}, "keep-lora"),
        ("dora", {"rank_at_most": 3}, "refit"),
        ("lora", {"direction": "dora"}, "keep-lora"),
        ("dora", {}, "refit"),
        ("dora", {"rank": 16}, "refit"),
        ("dora", {"direction": "dora"}, "keep-dora"),
    ],
)
def test_every_module_has_one_kind(method, options, kind, lora, dora):
    placed = place_adapter({"lora": lora, "dora": dora}[method], None)
    plan = plan_upgrade(placed, ConvertOptions(**options))
    assert {job.kind for job in plan.jobs} == {kind}
    assert plan.is_exact == (kind not in ("refit", "resize"))
    assert len(plan.light) == (14 if kind in ("keep-lora", "resize") else 0)
    assert len(plan.reading) == 14 - len(plan.light)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        *((method, options) for method in ("lora", "dora") for options in ({}, {"rank": 2}, {"dtype": "bfloat16"})),
        ("dora", {"direction": "dora"}),
    ],
    ids=str,
)
def test_a_dry_run_foretells_the_result(method, options, lora, dora, tmp_path):
    source = {"lora": lora, "dora": dora}[method]
    foretold = mapconv.upgrade(source, tmp_path / "map", dry_run=True, **options)
    done = mapconv.upgrade(source, tmp_path / "map", **options)
    kept = done.plan.exact
    assert foretold.plan.to_dict() | {"seconds": None, "memory": None} == done.plan.to_dict()
    assert foretold.plan.seconds > 0
    assert foretold.plan.memory > 1e8
    assert set(foretold.plan.ranks) == {module.rank for module in done.modules}
    assert kept == sum(not module.error for module in done.modules) or options.get("dtype") == "bfloat16"
    stored = (tmp_path / "map" / "adapter_model.safetensors").stat().st_size
    assert done.plan.nbytes <= stored < done.plan.nbytes + 20_000  # and a header


def test_the_plan_is_what_dry_run_prints(run, lora, dora, tmp_path):
    for source, kept, refitted in ((lora, 14, 0), (dora, 0, 14)):
        result = run("upgrade", source, "-o", tmp_path / "map", "--dry-run")
        assert f"kept      {kept} in their own factors" in result.out
        assert f"refitted  {refitted} to the closest" in result.out
        assert "takes     roughly" in result.out
