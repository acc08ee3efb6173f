"""A run converts what is due, leaves what is done, names what is broken, and goes on where it was."""

from __future__ import annotations

import json
import os
import shutil

import pytest

import mapconv
from mapconv.catalog.lock import run_lock
from tests.catalog.conftest import POISONS, contents, ledger, lines, make_adapter, make_base, make_folder, poison
from tests.files import edit_json

COUNT = 70


def convert(catalog, out, **options):
    return mapconv.convert_catalog(catalog, out, **options)


def test_many_adapters_with_every_poison_among_them(tmp_path):
    adapters = make_folder(tmp_path, COUNT, doras=10)
    broken = {f"a{5 * number:03d}": kind for number, kind in enumerate(POISONS, start=1)}
    for name, kind in broken.items():
        poison(adapters / name, kind)
    result = convert(adapters, tmp_path / "out")
    assert (result.done, result.failed, result.left) == (COUNT - len(broken), len(broken), 0)
    table = ledger(tmp_path / "out")
    assert {name for name, line in table.items() if line["status"] == "failed"} == broken.keys()
    for name, kind in broken.items():
        error, words = POISONS[kind]
        assert table[name]["kind"] == error
        assert words in table[name]["error"]
        assert name in table[name]["error"] or kind in ("shape", "missing module")  # which speak of the base's names
        assert table[name]["output"] is None
        assert not (tmp_path / "out" / name).exists()
    assert sum(kind.count for kind in result.by_kind) == len(broken)
    good, last = table["a001"], f"a{COUNT - 1:03d}"
    assert (good["method"], good["rank"], good["modules"], good["worst_error"]) == ("LoRA", 2, 4, 0.0)
    assert good["base"] == str(tmp_path / "base-1")
    assert good["nbytes"] == sum(len(data) for data in contents(tmp_path / "out" / good["output"]).values())
    assert table[last]["method"] == "DoRA"
    assert table[last]["worst_error"] > table[last]["median_error"] > 0
    alone = mapconv.upgrade(adapters / last, tmp_path / "alone").out
    assert contents(alone) == contents(tmp_path / "out" / last)


def test_what_is_done_is_left_and_what_failed_is_named_again(adapters, tmp_path):
    poison(adapters / "a002", "nan")
    first = convert(adapters, tmp_path / "out")
    assert (first.converted, first.failed) == (5, 1)
    again = convert(adapters, tmp_path / "out")
    assert (again.converted, again.done, again.failed) == (0, 5, 1)
    assert again.by_kind == first.by_kind
    assert lines(tmp_path / "out") == 6
    retried = convert(adapters, tmp_path / "out", retry_failed=True)
    assert (retried.converted, retried.failed) == (0, 1)
    assert lines(tmp_path / "out") == 7


def _touch(tmp_path, adapters):
    os.utime(adapters / "a000" / "adapter_model.safetensors", (1, 1))


def _copy_elsewhere_and_back(tmp_path, adapters):
    shutil.copytree(adapters / "a000", tmp_path / "copy", copy_function=shutil.copyfile)
    shutil.rmtree(adapters / "a000")
    (tmp_path / "copy").rename(adapters / "a000")


def _log_beside_the_weights(tmp_path, adapters):
    (adapters / "a000" / "trainer_state.json").write_text("{}")


def _other_weights(tmp_path, adapters):
    shutil.rmtree(adapters / "a000")
    make_adapter(adapters / "a000", tmp_path / "base-0", seed=77)


def _other_scaling(tmp_path, adapters):
    edit_json(adapters / "a000" / "adapter_config.json", lora_alpha=6)


def _output_gone(tmp_path, adapters):
    shutil.rmtree(tmp_path / "out" / "a000")


def _ledger_gone(tmp_path, adapters):
    (tmp_path / "out" / "ledger.jsonl").unlink()


def _other_base(tmp_path, adapters):
    shutil.rmtree(tmp_path / "base-0")
    make_base(tmp_path / "base-0", seed=55)


@pytest.mark.parametrize(
    ("change", "due"),
    [
        (_touch, 0),
        (_copy_elsewhere_and_back, 0),
        (_log_beside_the_weights, 0),
        (_other_weights, 1),
        (_other_scaling, 1),
        (_output_gone, 1),
        (_ledger_gone, 6),
        (_other_base, 3),
    ],
)
def test_what_makes_an_entry_due_again(change, due, adapters, tmp_path):
    convert(adapters, tmp_path / "out")
    change(tmp_path, adapters)
    assert convert(adapters, tmp_path / "out").converted == due
    convert(adapters, tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_options_and_version_make_an_entry_due_again(adapters, tmp_path, monkeypatch):
    catalog = tmp_path / "catalog.jsonl"
    entries = [{"source": f"adapters/a{number:03d}"} for number in range(3)]
    catalog.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert convert(catalog, tmp_path / "out").converted == 3
    entries[1]["upgrade"] = {"dtype": "bfloat16"}
    catalog.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert convert(catalog, tmp_path / "out").converted == 1
    monkeypatch.setattr("mapconv.catalog.ledger.__version__", "99")
    monkeypatch.setattr("mapconv.catalog.fingerprints.__version__", "99")
    assert convert(catalog, tmp_path / "out").converted == 3


def test_a_repaired_adapter_is_tried_again_by_itself(adapters, tmp_path):
    whole = (adapters / "a000" / "adapter_model.safetensors").read_bytes()
    poison(adapters / "a000", "truncated")
    assert convert(adapters, tmp_path / "out").failed == 1
    (adapters / "a000" / "adapter_model.safetensors").write_bytes(whole)
    result = convert(adapters, tmp_path / "out")
    assert (result.converted, result.failed) == (1, 0)


def test_limit_and_only(adapters, tmp_path):
    result = convert(adapters, tmp_path / "out", limit=2)
    assert (result.converted, result.left) == (2, 4)
    result = convert(adapters, tmp_path / "out", only="a00[45]")
    assert (result.entries, result.done) == (2, 2)
    assert convert(adapters, tmp_path / "out").converted == 2
    with pytest.raises(mapconv.MapconvError, match="no entry that matches"):
        convert(adapters, tmp_path / "out", only="b*")


def test_entries_of_one_base_follow_one_another(adapters, tmp_path):
    convert(adapters, tmp_path / "out")
    order = [line["base"] for line in ledger(tmp_path / "out").values()]
    assert order == sorted(order)


def test_a_second_run_is_refused_while_the_first_goes_on(adapters, tmp_path):
    convert(adapters, tmp_path / "out", limit=1)
    with (
        run_lock(tmp_path / "out" / ".mapconv" / "lock"),
        pytest.raises(mapconv.MapconvError, match=f"process {os.getpid()}"),
    ):
        convert(adapters, tmp_path / "out")
    assert convert(adapters, tmp_path / "out").done == 6


def test_a_folder_that_no_run_made_is_left_alone(adapters, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(mapconv.MapconvError, match="no run made it"):
        convert(adapters, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_merge_and_verify_of_an_entry(base, lora, tmp_path):
    catalog = tmp_path / "catalog.yaml"
    catalog.write_text(
        f"adapters:\n- {{source: {lora}, output: poems, merge: {{dtype: bfloat16}}, verify: {{samples: 1}}}}\n"
    )
    result = convert(catalog, tmp_path / "out")
    assert result.failures == ()
    line = ledger(tmp_path / "out")["poems"]
    assert 0 <= line["kl"] < 1e-6
    assert line["merged"] == "poems-merged"
    assert json.loads((tmp_path / "out" / "poems-merged" / "config.json").read_text())["dtype"] == "bfloat16"
    assert convert(catalog, tmp_path / "out").converted == 0
    shutil.rmtree(tmp_path / "out" / "poems-merged")
    assert convert(catalog, tmp_path / "out").converted == 1


def test_calibration_of_an_entry(base, dora, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    catalog = tmp_path / "catalog.yaml"
    catalog.write_text(
        f"defaults: {{calibrate: {{data: {text}, steps: 2, sequence_length: 16, batch_size: 2}}}}\n"
        f"adapters:\n- {{source: {dora}, output: poems}}\n"
    )
    result = convert(catalog, tmp_path / "out")
    assert result.failures == ()
    config = json.loads((tmp_path / "out" / "poems" / "map_config.json").read_text())
    assert config["calibration"]["steps"] == 2
    errors = [module["error"] for module in config["modules"]]
    assert ledger(tmp_path / "out")["poems"]["worst_error"] == pytest.approx(max(errors))
    assert convert(catalog, tmp_path / "out").converted == 0


def test_an_entry_may_be_a_finetune_to_extract(base, lora, tmp_path):
    mapconv.merge(lora, tmp_path / "tuned", base=base)
    entry = {"source": str(tmp_path / "tuned"), "base": str(base), "extract": {"rank": 4}, "verify": True}
    (tmp_path / "catalog.jsonl").write_text(json.dumps(entry) + "\n")
    result = mapconv.convert_catalog(tmp_path / "catalog.jsonl", tmp_path / "out")
    assert (result.done, result.converted) == (1, 1), result.failures
    line = json.loads((tmp_path / "out" / "ledger.jsonl").read_text().splitlines()[-1])
    assert line["method"] == "full finetune"
    assert line["worst_error"] < 1e-5
    assert line["kl"] < 1e-9
    again = mapconv.convert_catalog(tmp_path / "catalog.jsonl", tmp_path / "out")
    assert (again.done, again.converted) == (1, 0)
