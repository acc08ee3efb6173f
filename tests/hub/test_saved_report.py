"""``verify --save``: a report that names no path, is tied to its weights, and that a card shows."""

from __future__ import annotations

import json
import shutil

import pytest

from mapconv.errors import AdapterError, OutputError
from mapconv.fidelity.saved import check_report_place, read_report, save_report
from tests.hub.conftest import BASE_ID

REPORT = {
    "result": "/home/me/result", "source": "/home/me/source", "base": "/home/me/base", "tokens": 100, "kl": 0.0123,
    "kl_base": 0.5, "kl_largest": float("nan"), "top1_agreement": 0.97, "perplexity_base": 20.0,
    "perplexity_source": 10.0, "perplexity_result": 10.1, "modules": [{"path": "a", "error": 0.02}],
}  # fmt: skip


@pytest.fixture
def result(models, tmp_path):
    return shutil.copytree(models.dora_map, tmp_path / "result")


def test_a_saved_report_has_no_paths_and_no_nan(result):
    save_report(result, REPORT)
    text = (result / "verify.json").read_text()
    assert "/home/me" not in text
    report = json.loads(text, parse_constant=pytest.fail)
    assert report["kl"] == REPORT["kl"]
    assert report["kl_largest"] is None
    assert [path.name for path in result.iterdir() if "partial" in path.name] == []


def test_the_card_shows_the_report(result):
    from mapconv.publishing.package import pack

    save_report(result, REPORT)
    card = pack(result, base_id=BASE_ID).card("me/x")
    assert "| this | 10.1000 | 0.0123 |" in card
    assert "97.00%" in card
    assert "Not measured" not in card
    save_report(result, REPORT | {"kl": float("inf")})
    assert "| this | 10.1000 | not finite |" in pack(result, base_id=BASE_ID).card("me/x")
    save_report(result, REPORT | {"perplexity_result": None})  # a model that predicts no next token
    assert "| this | – | 0.0123 |" in pack(result, base_id=BASE_ID).card("me/x")
    names = ("kl", "kl_base", "top1_agreement", "perplexity_base", "perplexity_source", "perplexity_result")
    save_report(result, REPORT | {"tokens": 0} | dict.fromkeys(names))
    assert "on the weights alone" in pack(result, base_id=BASE_ID).card("me/x")


def test_a_report_of_other_weights_is_refused(models, result):
    assert read_report(result) is None
    save_report(result, REPORT)
    assert read_report(result)["tokens"] == 100
    shutil.copy(models.lora_map / "adapter_model.safetensors", result)
    with pytest.raises(AdapterError, match="other weights"):
        read_report(result)
    (result / "verify.json").write_text("{}")
    with pytest.raises(AdapterError, match="format_version is null"):
        read_report(result)


def test_a_copy_in_the_hubs_cache_takes_no_report(tmp_path):
    folder = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    with pytest.raises(OutputError, match="cache"):
        check_report_place(folder)
