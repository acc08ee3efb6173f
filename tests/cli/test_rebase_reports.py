"""What is said of a rebased adapter afterwards: by ``verify``, by its report, and by its card."""

from __future__ import annotations

import json

import pytest

import mapconv
from mapconv.errors import AdapterError
from tests.cli.refusals import assert_refused
from tests.cli.test_rebase import SIZES, rounded_copy
from tests.cli.test_upgrade_data import write_text
from tests.files import copy
from tests.models import save_adapter, save_base


@pytest.fixture(scope="module")
def rebased(tmp_path_factory):
    """A base, its rounded copy, a LoRA, and the LoRA rebased."""
    folder = tmp_path_factory.mktemp("rebased")
    base = save_base(folder / "base")
    save_adapter(base, folder / "lora", size=0.05)
    rounded_copy(base, folder / "rounded")
    write_text(folder / "text.txt", 3)
    mapconv.rebase(
        folder / "lora", folder / "out", base=base, onto=folder / "rounded", data=folder / "text.txt", rank=8, **SIZES
    )
    return folder


def test_verify_prints_and_stores_the_three_models(rebased, run, tmp_path):
    copy(rebased / "out", tmp_path / "out")
    given = [
        "verify", tmp_path / "out", "--against", rebased / "lora", "--against-base", rebased / "base", "--base",
        rebased / "rounded", "--data", rebased / "text.txt", "--samples", 2, "--save",
    ]  # fmt: skip
    printed = run(*given)
    assert printed.status == 0, printed.err
    for words in ("other base alone", "source put on it as it is", "closer to the source than the source as it is"):
        assert words in printed.out
    stored = json.loads((tmp_path / "out" / "verify.json").read_text())
    served = stored["served"]
    assert served["rebased"]["kl"] < served["as_is"]["kl"] < served["alone"]["kl"]
    # Without the bases, each runs on the one that its own configuration names.
    assert run(*given[:4], *given[8:]).status == 0
    assert json.loads((tmp_path / "out" / "verify.json").read_text())["served"] == served
    # Two ways to the same number.
    assert served["rebased"]["kl"] == pytest.approx(stored["kl"], rel=1e-3)
    assert served["alone"]["kl"] > stored["kl"]


def test_training_towards_the_source_on_the_wrong_base_is_refused(rebased, run, tmp_path):
    given = ["calibrate", rebased / "out", "--against", rebased / "lora", "--data", rebased / "text.txt"]
    refused = run(*given, "-o", tmp_path / "trained", "--steps", 1)
    assert_refused(refused, "mapconv rebase --calibrate STEPS")


def test_inspect_says_where_it_comes_from(rebased, run):
    shown = run("inspect", rebased / "out").out
    lora, base = (rebased / name for name in ("lora", "base"))
    assert f"  made      from {lora} (LoRA), trained on {base} and rebased\n" in shown
    assert "  made " not in run("inspect", lora).out


def test_the_report_says_what_the_rebase_brought(rebased, run, tmp_path):
    result = run("report", rebased / "out", "-o", tmp_path / "report.html")
    assert result.status == 0, result.err
    page = (tmp_path / "report.html").read_text()
    assert page.index("closer to its source than the source itself") < page.index('id="summary"')
    assert page.index('id="map-outputs-before"') < page.index('id="map-output"')


def test_the_card_says_where_it_came_from_and_what_that_brought(rebased):
    card = (rebased / "out" / "README.md").read_text()
    assert "## Rebased" in card
    assert "closer to its source than the source itself" in card
    assert all(f"| {name} |" in card for name in ("the base alone", "the source put on it as it is", "this adapter"))
    assert str(rebased) not in card  # a folder of this machine is nobody's business


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda record: record.update(rebase=[]), "rebase is"),
        (lambda record: record["rebase"].update(modules={}), "rebase.modules is"),
        (lambda record: record["rebase"]["modules"][0].update(output_error_before="<b>"), "output_error_before"),
        (lambda record: record["rebase"]["served"]["alone"].update(kl="0"), "rebase.served.alone.kl"),
        (lambda record: record["rebase"]["served"].pop("as_is"), "rebase.served.as_is"),
    ],
)
def test_a_record_of_other_types_is_refused(rebased, change, place, tmp_path):
    copy(rebased / "out", tmp_path / "out")
    path = tmp_path / "out" / "map_config.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(AdapterError, match=place):
        mapconv.report(tmp_path / "out", tmp_path / "report.html")
