"""Entries of a catalog that make one adapter of several: their sources in the file, the ledger, and a second run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

import mapconv
from mapconv.catalog.entries import Job
from mapconv.catalog.ledger import Ledger
from mapconv.catalog.reading import read_catalog
from mapconv.catalog.work import run_job
from mapconv.errors import CatalogError
from mapconv.metadata.provenance import source_fingerprint
from mapconv.reporting.ledger import read_ledger
from tests.catalog.conftest import ledger, make_adapter, make_base, poison


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    """A LoRA and a DoRA of one base."""
    base = make_base(tmp_path / "base")
    return [
        make_adapter(tmp_path / "poems", base, seed=1),
        make_adapter(tmp_path / "songs", base, seed=2, use_dora=True),
    ]


@pytest.fixture
def catalog(two, tmp_path: Path) -> Path:
    """One entry that combines both, beside one that upgrades one of them; the defaults are for upgrades."""
    path = tmp_path / "catalog.yaml"
    path.write_text(
        "defaults: {upgrade: {dtype: bfloat16}}\n"
        "adapters:\n"
        "- {source: [poems, songs], combine: {weights: [0.7, -0.3], rank: 2}, merge: true}\n"
        "- {source: poems}\n"
    )
    return path


def test_an_entry_may_combine_adapters(catalog, two, tmp_path):
    out = tmp_path / "out"
    result = mapconv.convert_catalog(catalog, out)
    assert (result.done, result.failures) == (2, ())
    assert (out / "poems-combined-merged" / "model.safetensors").is_file()
    mapconv.combine(two, tmp_path / "alone", weights=[0.7, -0.3], rank=2)
    for name in ("adapter_model.safetensors", "map_config.json"):
        assert (out / "poems-combined" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    lines = ledger(out)
    assert lines["poems-combined"]["source"] == list(map(str, two))
    assert lines["poems-combined"]["content"] == list(map(source_fingerprint, two))
    assert (lines["poems-combined"]["stage"], lines["poems-combined"]["method"]) == (None, "sum")
    # Of one source, a line is what it was before there were several.
    assert lines["poems"]["source"] == str(two[0])
    assert isinstance(lines["poems"]["stat"], str)
    assert [entry.source for entry in read_ledger(out).entries] == [f"{two[0]} + {two[1]}", str(two[0])]


def test_each_source_is_watched(catalog, two, tmp_path):
    def again() -> int:
        return mapconv.convert_catalog(catalog, tmp_path / "out").converted

    assert again() == 2
    assert again() == 0
    os.utime(two[1] / "adapter_model.safetensors", (1, 1))
    assert again() == 0  # touched, and the same
    poison(two[1], "nan")
    result = mapconv.convert_catalog(catalog, tmp_path / "out")
    assert [(failure.entry, failure.kind) for failure in result.failures] == [("poems-combined", "AdapterError")]
    assert result.done == 1
    assert again() == 0  # failed before, of the same sources
    make_adapter(tmp_path / "new", tmp_path / "base", seed=3).rename(two[1].with_name("newer"))
    catalog.write_text(catalog.read_text().replace("songs", "newer"))
    assert again() == 1
    with Ledger(tmp_path / "out" / "ledger.jsonl") as opened:
        assert len(opened.seen["poems-combined"].contents) == 2


def test_a_job_goes_through_a_pipe(two, tmp_path):
    job = Job("x", list(map(str, two)), None, str(tmp_path / "x"), None, {"upgrade": {}, "combine": {"rank": 1}})
    assert run_job(Job(**json.loads(json.dumps(job.to_dict())))).done
    bad = Job("y", [str(two[0]), "nowhere/at/all"], None, str(tmp_path / "y"), None, job.stages)
    assert run_job(bad).table["stage"] == "combine"


def test_a_run_verifies_combinations(two, catalog, tmp_path, monkeypatch):
    def combination(result, sources, combined, **asked):
        seen.append((result, list(sources), dict(combined)))
        return SimpleNamespace(kl=0.25)

    seen = []
    monkeypatch.setattr(mapconv, "verify_combination", combination, raising=False)
    monkeypatch.setattr(mapconv, "verify", lambda *arguments, **asked: SimpleNamespace(kl=0.5), raising=False)
    result = mapconv.convert_catalog(catalog, tmp_path / "out", verify=True)
    assert result.failures == ()
    wanted = [*map(str, two)], {"weights": (0.7, -0.3), "rank": 2}
    assert seen == [(str(tmp_path / "out" / "poems-combined"), *wanted)]
    assert {name: ledger(tmp_path / "out")[name]["kl"] for name in ("poems", "poems-combined")} == {
        "poems": 0.5,
        "poems-combined": 0.25,
    }


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("source: [a, b]", "source names 2 adapters, which combine alone takes"),
        ("source: [a, 3]", 'source is ["a", 3]'),
        ("source: []", "source is []"),
        ("source: [a, b], combine: {weights: [1, 2, 3]}", "combine: weights has 3 numbers for 2 adapters"),
        ("source: a, combine: {weights: [1, .nan]}", "expected numbers with commas"),
        ("source: [a, b], combine: {method: ties}", "method: ties requires density"),
        ("source: [a, b], combine: {method: dare, density: 1.5}", "density is 1.5: expected a number above 0, up to 1"),
        ("source: [a, b], combine: {rank: 3}, upgrade: {rank: 3}", "give its options below combine"),
        ("source: [a, b], combine: true, extract: true, base: c", "either extract or combine"),
        ("source: [a, b], combine: true, calibrate: {steps: 3, data: x}", "calibrate does not go with combine"),
        ("source: [a, b], combine: {adapters: [c]}", "the run sets it"),
    ],
)
def test_faults(entry, said, tmp_path):
    path = tmp_path / "catalog.yaml"
    path.write_text(f"adapters:\n- {{{entry}}}\n")
    with pytest.raises(CatalogError) as caught:
        read_catalog(path)
    assert "line 2: " in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("combine", "method: dare, density: 1.5"),
        ("combine", "weights: [a, b]"),
        ("upgrade", "tolerance: 7, max_rank: 3"),
        ("rebase", "onto: 3"),
    ],
)
@pytest.mark.parametrize("place", ["own", "defaults"])
def test_a_value_that_is_refused_is_one_fault(stage, options, place, tmp_path):
    path, source = tmp_path / "catalog.yaml", "[a, b]" if stage == "combine" else "a"
    own = f", {stage}: {{{options}}}" if place == "own" else ""
    defaults = "" if own else f"{stage}: {{{options}}}"
    path.write_text(f"defaults: {{{defaults}}}\nadapters:\n- {{source: {source}{own}}}\n")
    with pytest.raises(CatalogError, match="has 1 fault") as caught:
        read_catalog(path)
    assert f"{stage}: " in str(caught.value)


def test_combine_may_be_the_default(tmp_path):
    path = tmp_path / "catalog.yaml"
    path.write_text(
        "defaults: {combine: {method: dare, density: 0.5}}\n"
        "adapters:\n- {source: [a/x, b], combine: {seed: 3}}\n- {source: [a, b], combine: {density: 0.9}, output: y}\n"
        "- {source: c, combine: false}\n"
    )
    one, two, three = read_catalog(path)
    assert one.name == "x-combined"
    assert one.options.stages["combine"] == {"method": "dare", "density": 0.5, "seed": 3}
    assert two.options.stages["combine"] == {"method": "dare", "density": 0.9}
    assert three.options.stages == {"upgrade": {}}
