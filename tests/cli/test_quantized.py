"""Quantized bases as a user meets them on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.files import copy, edit_json, edit_tensors, read_header, read_tensors
from tests.models import save_adapter
from tests.quantized import WEIGHTS, quantize, quantize_with_twin, save_plain


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return save_plain(tmp_path_factory.mktemp("plain") / "base")


@pytest.fixture(scope="module")
def nf4(plain, tmp_path_factory) -> Path:
    return quantize(plain, "nf4-double", tmp_path_factory.mktemp("nf4"))


@pytest.fixture(scope="module")
def lora(plain, tmp_path_factory) -> Path:
    return save_adapter(plain, tmp_path_factory.mktemp("lora") / "lora")


def test_inspect_names_the_storage(run, nf4, lora):
    result = run("inspect", lora, "--base", nf4)
    assert result.status == 0
    assert "14 weights as bitsandbytes nf4, double quantized" in result.out
    assert f"the quantized {nf4} was given" in result.err
    assert json.loads(run("inspect", lora, "--base", nf4, "--json").out)["storages"] == {
        "bitsandbytes nf4, double quantized": 14
    }


def test_merge_says_what_becomes_of_the_codes(run, nf4, lora, tmp_path):
    result = run("merge", lora, "--base", nf4, "-o", tmp_path / "out")
    assert "is quantized (14 weights as bitsandbytes nf4" in result.err
    assert not [name for name in read_tensors(tmp_path / "out") if "quant" in name or "absmax" in name]


class TestQuantizedCopy:
    """Codes stay as they are where the adapter changes plain tensors alone."""

    @pytest.fixture
    def experts_only(self, plain, tmp_path) -> Path:
        """A base whose attention is plain and whose feed-forward layers are in codes."""
        return quantize(plain, "ct-int4", tmp_path / "bases", skip=("lm_head", "embed", "self_attn"))

    def test_bytes(self, run, experts_only, plain, tmp_path):
        edit_json(experts_only / "config.json", use_cache=True)
        adapter = save_adapter(plain, tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
        out = tmp_path / "out"
        result = run("merge", adapter, "--base", experts_only, "-o", out, "--quantized", "copy")
        assert result.status == 0, result.err
        assert "copied as they are" in result.err
        old, new = read_header(experts_only / WEIGHTS)[0], read_header(out / WEIGHTS)[0]
        assert list(old) == list(new)
        changed = set()
        with safe_open(experts_only / WEIGHTS, "pt") as before, safe_open(out / WEIGHTS, "pt") as after:
            for name in before.keys():  # noqa: SIM118
                if not torch.equal(before.get_tensor(name), after.get_tensor(name)):
                    changed.add(name.split(".")[-2])
        assert changed == {"q_proj", "v_proj"}
        config = json.loads((out / "config.json").read_text())
        assert config == json.loads((experts_only / "config.json").read_text())

    def test_refused_where_a_weight_in_codes_changes(self, run, nf4, lora, tmp_path):
        result = run("merge", lora, "--base", nf4, "-o", tmp_path / "out", "--quantized", "copy")
        assert result.status == 1
        assert "leave out --quantized copy" in result.err
        assert not (tmp_path / "out").exists()

    def test_takes_no_dtype(self, run, nf4, lora, tmp_path):
        options = ("--quantized", "copy", "--dtype", "float16")
        assert run("merge", lora, "--base", nf4, "-o", tmp_path / "out", *options).status == 2


class TestVerify:
    """The source may run on the base that it was trained on, and the result on another."""

    @pytest.fixture(scope="class")
    def map_adapter(self, lora, plain, tmp_path_factory) -> Path:
        import mapconv

        out = tmp_path_factory.mktemp("map") / "map"
        mapconv.upgrade(lora, out, base=plain)
        return out

    def verify(self, run, *arguments) -> dict:
        result = run("verify", *arguments, "--samples", 1, "--json")
        assert result.status == 0, result.err
        return json.loads(result.out)

    def test_quantized_base(self, run, nf4, lora, tmp_path):
        assert run("merge", lora, "--base", nf4, "-o", tmp_path / "merged", "--dtype", "float32").status == 0
        report = self.verify(run, tmp_path / "merged", "--against", lora, "--base", nf4)
        assert report["kl"] <= 1e-9
        assert report["kl_base"] > 1e-3
        assert max(module["error"] for module in report["modules"]) <= 1e-5

    def test_another_base_is_measured(self, run, plain, nf4, lora, map_adapter):
        same = self.verify(run, map_adapter, "--against", lora, "--base", plain)
        other = self.verify(run, map_adapter, "--against", lora, "--base", plain, "--against-base", nf4)
        assert same["kl"] <= 1e-9
        assert other["kl"] > 1e-4
        assert min(module["error"] for module in other["modules"]) > 1e-2


class TestBaseValues:
    """The quantized base that an adapter was trained on, or the model that it was made from."""

    @pytest.fixture
    def bases(self, plain, nf4, tmp_path) -> tuple[Path, Path]:
        """(a quantized base whose card names the original, the original)."""
        original, quantized = copy(plain, tmp_path / "plain"), copy(nf4, tmp_path / "nf4")
        header = f"---\nbase_model: {original}\nbase_model_relation: quantized\n---\n"
        (quantized / "README.md").write_text(header)
        return quantized, original

    def record(self, out: Path) -> dict:
        return json.loads((out / "map_merge.json").read_text())

    @pytest.mark.parametrize("values", ["original", "stored"])
    def test_by_name(self, run, values, bases, lora, tmp_path):
        quantized, original = bases
        expected = {"original": original, "stored": quantized}[values]
        for out, arguments in [("out", (quantized, "--base-values", values)), ("expected", (expected,))]:
            result = run("merge", lora, "--base", *arguments, "-o", tmp_path / out)
            assert result.status == 0, result.err
        assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "expected" / WEIGHTS).read_bytes()
        assert self.record(tmp_path / "out")["base_values"] == {"chosen": values}
        assert self.record(tmp_path / "out")["base"]["name"] == str(expected)

    def test_measured(self, run, bases, lora, tmp_path):
        result = run("merge", lora, "--base", bases[0], "-o", tmp_path / "out", "--base-values", "measured")
        assert result.status == 0, result.err
        record = self.record(tmp_path / "out")["base_values"]
        assert record["kl"] > 1e-4
        likelier = record["perplexity_original"] < record["perplexity_stored"]
        assert record["chosen"] == ("original" if likelier else "stored")
        assert f"merged into the {record['chosen']} values" in result.err

    def test_original_as_the_base(self, run, bases, lora, tmp_path):
        """Of the model that the adapter's configuration names, by its card."""
        quantized, original = bases
        adapter = copy(lora, tmp_path / "lora")
        edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(quantized))
        result = run("inspect", adapter, "--base", "original", "--json")
        assert json.loads(result.out)["fits"] == str(original)

    @pytest.mark.parametrize(
        "header",
        ["", "license: mit", "base_model: x/y\nbase_model_relation: finetune", "base_model: [x/y, y/z]", "[: {"],
    )
    def test_a_card_that_does_not_say_it(self, run, header, bases, lora, tmp_path):
        quantized, _ = bases
        (quantized / "README.md").write_text(f"---\n{header}\n---\n")
        result = run("merge", lora, "--base", quantized, "-o", tmp_path / "out", "--base-values", "original")
        assert result.status == 1
        assert "card" in result.err or "README.md" in result.err
        assert not (tmp_path / "out").exists()

    def test_a_plain_base_has_no_stored_values(self, run, plain, lora, tmp_path):
        result = run("merge", lora, "--base", plain, "-o", tmp_path / "out", "--base-values", "stored")
        assert result.status == 1
        assert "is not quantized" in result.err

    @pytest.mark.parametrize(
        "options", [("--original", "x"), ("--data", "x"), ("--base-values", "stored", "--data", "x")]
    )
    def test_options_that_say_nothing(self, run, options, nf4, lora, tmp_path):
        assert run("merge", lora, "--base", nf4, "-o", tmp_path / "out", *options).status == 2


@pytest.mark.parametrize("command", ["merge", "upgrade", "inspect"])
def test_a_broken_quantized_base_writes_nothing(run, command, nf4, lora, tmp_path):
    base = copy(nf4, tmp_path / "nf4")
    name = "model.layers.1.mlp.up_proj.weight.absmax"
    edit_tensors(base / WEIGHTS, lambda tensors: tensors.pop(name))
    out = () if command == "inspect" else ("-o", tmp_path / "out")
    result = run(command, lora, "--base", base, *out)
    assert result.status == 1
    assert name in result.err
    assert not (tmp_path / "out").exists()


class TestLiveRuns:
    """What runs the model does so on the values that the codes stand for."""

    @pytest.fixture(scope="class")
    def dora(self, plain, tmp_path_factory) -> Path:
        return save_adapter(plain, tmp_path_factory.mktemp("dora") / "dora", use_dora=True, target_modules=["q_proj"])

    @pytest.fixture(scope="class")
    def text(self, tmp_path_factory) -> Path:
        path = tmp_path_factory.mktemp("text") / "text.txt"
        path.write_text(
            "\n\n".join(f"line {number} of a text that says little, again and again." for number in range(99))
        )
        return path

    @pytest.mark.parametrize("storage", ["nf4-double", "gptq-order"])
    def test_refit_and_calibration(self, run, storage, plain, dora, text, tmp_path):
        """To the same numbers as on a base that stores these values plain."""
        found = []
        for base in quantize_with_twin(plain, storage, tmp_path):
            out, trained = tmp_path / f"{base.name}-map", tmp_path / f"{base.name}-trained"
            data = ("--data", text, "--sequence-length", 32)
            result = run("upgrade", dora, "-o", out, "--base", base, *data, "--samples", 4)
            assert result.status == 0, result.err
            result = run(
                "calibrate",
                out,
                "--against",
                dora,
                "--base",
                base,
                "-o",
                trained,
                *data,
                "--steps",
                2,
                "--batch-size",
                2,
            )
            assert result.status == 0, result.err
            tables = [json.loads((folder / "map_config.json").read_text())["modules"] for folder in (out, trained)]
            found.append([(module["alpha"], module["beta"]) for table in tables for module in table])
        (first, second) = (torch.tensor(numbers) for numbers in found)
        # The inputs that a refit sees are those of weights rounded to the base's own 16 bits (2⁻⁹ each).
        assert torch.allclose(first, second, rtol=2**-9)


def test_norms_follow_the_configuration(run, plain, lora, tmp_path, monkeypatch):
    """How zero points are stored stands in config.json alone: another version is another base to the cache of norms."""
    monkeypatch.setenv("MAPCONV_CACHE", str(tmp_path / "cache"))
    base = quantize(plain, "gptq-4", tmp_path)
    norms = []
    for version in ("gptq", "gptq_v2"):
        edit_json(base / "config.json", quantization_config={"quant_method": "gptq", "checkpoint_format": version})
        result = run("upgrade", lora, "-o", tmp_path / version, "--base", base)
        assert result.status == 0, result.err
        table = json.loads((tmp_path / version / "map_config.json").read_text())
        norms.append([module["base_norm"] for module in table["modules"]])
    assert all(first != second for first, second in zip(*norms, strict=True))
