"""``mapconv rebase`` from and to bases in codes: the result is that of the values that they stand for."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

import mapconv
from tests.cli.test_upgrade_data import write_text
from tests.files import edit_json, read_tensors
from tests.gguf_files import save_gguf
from tests.models import kl, load_adapted, log_probabilities, save_adapter, save_tokenizer
from tests.quantized import quantize_with_twin, save_plain

SIZES = {"samples": 8, "sequence_length": 32}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base, its NF4 copy, that one's values in float32, a GGUF copy, and adapters of the base."""
    folder = tmp_path_factory.mktemp("rebase-quantized")
    plain, gguf = save_plain(folder / "plain"), folder / "gguf" / "model-Q8_0.gguf"
    save_gguf(plain, gguf)
    save_tokenizer(gguf.parent)
    (gguf.parent / "config.json").write_text((plain / "config.json").read_text())
    codes, twin = quantize_with_twin(plain, "nf4", folder)
    lora = save_adapter(plain, folder / "lora", size=0.05)
    write_text(folder / "text.txt", 3, 2400)
    return SimpleNamespace(plain=plain, gguf=gguf, codes=codes, twin=twin, lora=lora, text=folder / "text.txt")


def test_onto_codes(files, tmp_path):
    result = mapconv.rebase(
        files.lora, tmp_path / "out", base=files.plain, onto=files.codes, data=files.text, rank=8, **SIZES
    )
    wanted = log_probabilities(load_adapted(files.plain, files.lora))
    as_is, rebased = (
        kl(wanted, log_probabilities(load_adapted(files.twin, each))) for each in (files.lora, result.out)
    )
    assert rebased < 0.5 * as_is
    assert result.served.rebased.kl < 0.5 * result.served.as_is.kl


def test_onto_a_gguf_file_with_training(files, run, tmp_path):
    result = run(
        "rebase", files.lora, "--base", files.plain, "--onto", files.gguf, "-o", tmp_path / "out", "--data", files.text,
        "--samples", 8, "--sequence-length", 32, "--calibrate", 2,
    )  # fmt: skip
    assert result.status == 0, result.err
    assert "closer to the source than the source as it is" in result.out
    assert json.loads((tmp_path / "out" / "map_config.json").read_text())["base"]["name"] == str(files.gguf)


@pytest.mark.parametrize("base", ["codes", "gguf"])
def test_statistics_of_codes_serve_a_rebase_from_them(base, files, tmp_path):
    trained_on = getattr(files, base)
    mapconv.statistics(trained_on, tmp_path / "stats", data=files.text, **SIZES)
    result = mapconv.rebase(
        files.lora, tmp_path / "out", base=trained_on, onto=files.plain, statistics_from=tmp_path / "stats"
    )
    assert all(module.output_error < 1 for module in result.modules)


def test_a_catalog_onto_codes(files, tmp_path):
    mapconv.statistics(files.plain, tmp_path / "stats", data=files.text, **SIZES)
    given = {"onto": str(files.gguf), "rank": 8, "statistics_from": str(tmp_path / "stats")}
    catalog = {"defaults": {"base": str(files.plain), "rebase": given}, "adapters": []}
    catalog["adapters"] = [{"source": str(files.lora), "output": name} for name in ("a", "b")]
    (tmp_path / "catalog.yaml").write_text(json.dumps(catalog))
    mapconv.convert_catalog(tmp_path / "catalog.yaml", tmp_path / "outs")
    one, two = (read_tensors(tmp_path / "outs" / name) for name in ("a", "b"))
    assert one.keys() == two.keys()
    assert next(iter(one.values())).shape[0] == 8


def test_a_configuration_of_another_model_beside_the_file_is_said(files, run, tmp_path):
    edit_json(files.gguf.parent / "config.json", hidden_size=48)
    try:
        result = run("upgrade", files.lora, "--base", files.gguf, "-o", tmp_path / "out")
    finally:
        edit_json(files.gguf.parent / "config.json", hidden_size=32)
    assert result.status == 0, result.err
    assert "config.json beside model-Q8_0.gguf is of another model and is not used" in result.err
    assert "its hidden_size is 48, and that of the file is 32" in result.err
