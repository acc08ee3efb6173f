"""Every adapter of the matrix, merged and upgraded by mapconv, against stock PEFT's unmerged forward pass."""

from __future__ import annotations

import json

import pytest

import mapconv

from .bases import reloaded
from .options import combinations
from .oracle import Case, Workshop, distance, load_adapter, tolerance

CASES = combinations()
parametrised = pytest.mark.parametrize(
    ("tiny", "option"), CASES, ids=[f"{option.name}-{tiny.name}" for tiny, option in CASES]
)


@parametrised
def test_case_is_sound(tiny, option, workshop: Workshop):
    """Stock PEFT against itself, before mapconv is judged by it.

    A case is sound if saving and loading gives the same logits, if the adapter matters far more than rounding does,
    and if ``merge_and_unload`` is right or wrong exactly where the option says so.
    """
    case = workshop.case(tiny, option)
    limit, source = tolerance(case), case.source
    if case.untrained is not None:
        assert distance(case.trained, case.untrained) > 1000 * limit
    # Both sides widen the same float32 numbers, so only the order of float64 sums may differ.
    assert source.lost < 1e-9
    if option.merge(tiny) == "sound":
        assert distance(source.merged, source.live) < 1e-9
    else:
        assert distance(source.merged, source.live) > 100 * limit


@parametrised
def test_merged_checkpoint_computes_what_the_adapter_does(tiny, option, workshop: Workshop, tmp_path):
    case = workshop.case(tiny, option)
    mapconv.merge(case.adapter, tmp_path / "merged", base=case.base, dtype="float32", **option.extra)
    # No argument beside the folder: the merged configuration itself must name its labels, rows, layers and ties.
    model = reloaded(tiny, tmp_path / "merged", case.base)
    assert distance(tiny.logits(model), case.trained) <= tolerance(case)
    assert_config_follows(case, json.loads((tmp_path / "merged" / "config.json").read_text()))


@parametrised
def test_map_directory_computes_what_the_adapter_does(tiny, option, workshop: Workshop, tmp_path):
    case = workshop.case(tiny, option)
    direction = "dora" if case.uses_dora else "low-rank"
    mapconv.upgrade(case.adapter, tmp_path / "map", base=case.base, direction=direction, **option.extra)
    assert (tmp_path / "map" / "map_config.json").is_file()
    # Also where PEFT cannot read the source itself, whose names an older transformers spelled (test_oracle.py).
    model = load_adapter(case, tmp_path / "map")
    if option.merge(tiny) == "live-wrong":
        model = model.merge_and_unload()
    assert distance(tiny.logits(model), case.trained) <= tolerance(case)


def assert_config_follows(case: Case, config: dict) -> None:
    """Fields of the merged configuration that must agree with its tensors, beyond what a reload notices."""
    if case.option.vocab is not None:
        assert config["vocab_size"] == case.option.vocab
    if case.option.base == "bare" and "classifier" in case.tiny.roles:
        assert len(config["id2label"]) == case.tiny.settings["num_labels"]
        assert config["architectures"] == [case.tiny.model_class]
