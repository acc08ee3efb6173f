"""``mapconv export``: what is written is read by the libraries that it is for, and computes what the source does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mapconv
from tests.cli.refusals import assert_refused, nothing_written
from tests.files import edit_json
from tests.models import load_adapted, load_base, log_probabilities, merged_by_peft, save_adapter

QUERY = "model.layers.0.self_attn.q_proj"


def config_of(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def assert_same_weights(base: Path, out: Path, source: Path) -> None:
    """Stock PEFT merges both to the same weights, in float64."""
    wanted, got = merged_by_peft(base, source), merged_by_peft(base, out)
    assert wanted.keys() == got.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(got[name], weight, rtol=0, atol=2e-6 * float(weight.abs().max()))


def test_a_lora_for_vllm_is_the_same_function_in_the_form_that_servers_read(run, base, uneven, tmp_path):
    assert run("export", uneven, "--for", "vllm", "--check").status == 1
    result = run("export", uneven, "--to", "peft", "--for", "vllm", "-o", tmp_path / "out")
    assert result.status == 0, result.err
    assert "rank 7" in result.out
    config = config_of(tmp_path / "out")
    assert (config["r"], config["lora_alpha"]) == (7, 7)
    assert not any(config[name] for name in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern"))
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    shapes = {tuple(tensor.shape) for name, tensor in load_file(tmp_path / "out/adapter_model.safetensors").items()}
    assert {shape[0] for shape in shapes if shape[1] in (32, 48)} == {7}
    assert_same_weights(base, tmp_path / "out", uneven)
    assert run("export", tmp_path / "out", "--for", "vllm", "--check").status == 0


def test_modules_of_some_layers_alone_are_named_in_full(base, models, tmp_path):
    source = save_adapter(base, models / "some-layers", layers_to_transform=[1])
    mapconv.export(source, tmp_path / "out", server="vllm")
    assert all(name.startswith("model.layers.1.") for name in config_of(tmp_path / "out")["target_modules"])
    assert_same_weights(base, tmp_path / "out", source)


def test_a_dora_becomes_the_closest_plain_lora(run, base, dora, tmp_path):
    result = run("export", dora, "--for", "vllm", "-o", tmp_path / "out", "--json")
    report = json.loads(result.out)
    assert 0 < report["worst_error"] < 1
    assert not any("magnitude" in name for name in load_file(tmp_path / "out/adapter_model.safetensors"))
    assert config_of(tmp_path / "out")["use_dora"] is False
    W, T, got = merged_by_peft(base, tmp_path / "out"), merged_by_peft(base, dora), load_base(base).state_dict()
    errors = {item["path"]: item["error"] for item in report["modules"]}
    for path, error in errors.items():
        name = f"{path}.weight"
        off = (W[name] - T[name]).norm() / (T[name] - got[name].double()).norm()
        assert float(off) == pytest.approx(error, rel=1e-4)
    # It is the optimum: the same solver as `upgrade --lora-compatible`, whose tests compare it with float64.
    upgraded = mapconv.upgrade(dora, tmp_path / "map", base=base, lora_compatible=True)
    assert report["worst_error"] == pytest.approx(upgraded.worst_error, rel=1e-6)


def test_a_dry_run_measures_and_keeps_nothing(run, base, dora, models, tmp_path):
    arguments = ("export", dora, "--for", "vllm", "-o", tmp_path / "out")
    dry = json.loads(run(*arguments, "--dry-run", "--json").out)
    assert not list(tmp_path.iterdir())
    real = json.loads(run(*arguments, "--json").out)
    assert {**dry, "seconds": 0} == {**real, "seconds": 0, "dry_run": True}
    assert dry["nbytes"] > 1000
    assert run(*arguments, "--dry-run").status == 1  # it would stop at what is there now

    source = save_adapter(base, models / "dry-embedding", target_modules=["q_proj", "embed_tokens"])
    arguments = ("export", source, "--for", "sglang", "-o", tmp_path / "other", "--dry-run")
    refused = run(*arguments)
    assert (refused.status, "refused without --fold-into BASE_OUT: model.embed_tokens" in refused.out) == (1, True)
    folded = run(*arguments, "--fold-into", tmp_path / "folded")
    assert folded.status == 0
    assert "would be written" in folded.out
    assert not (tmp_path / "other").exists()
    assert not (tmp_path / "folded").exists()


def test_a_map_adapter_is_exported_as_the_function_that_it_is(base, lora, dora, tmp_path):
    mapconv.upgrade(lora, tmp_path / "plain", base=base)
    result = mapconv.export(tmp_path / "plain", tmp_path / "out", server="vllm")
    assert (result.method, result.worst_error) == ("MAP", 0.0)
    assert_same_weights(base, tmp_path / "out", lora)
    mapconv.upgrade(dora, tmp_path / "gained", base=base, rank=8)
    exact = mapconv.export(tmp_path / "gained", tmp_path / "stock", to="peft")
    assert exact.worst_error == 0
    assert_same_weights(base, tmp_path / "stock", tmp_path / "gained")
    assert mapconv.export(tmp_path / "gained", tmp_path / "again", server="vllm").worst_error > 0


def test_a_lora_of_a_lower_rank_stays_a_lora(lora, tmp_path):
    assert mapconv.export(lora, tmp_path / "out", to="peft", rank=2).worst_error > 0
    assert (config_of(tmp_path / "out")["r"], config_of(tmp_path / "out")["use_dora"]) == (2, False)


def test_a_server_that_computes_dora_gets_it(base, dora, tmp_path):
    assert mapconv.export(dora, tmp_path / "out", server="tensorrt-llm").worst_error == 0
    assert_same_weights(base, tmp_path / "out", dora)


def test_what_a_server_does_not_take_is_refused_by_name_or_folded(run, base, models, tmp_path):
    source = save_adapter(base, models / "with-head", modules_to_save=["lm_head"], bias="none")
    head = "base_model.model.lm_head.weight"
    tensors = load_file(source / "adapter_model.safetensors")
    save_file(tensors | {head: tensors[head] + 1}, source / "adapter_model.safetensors", {"format": "pt"})
    with nothing_written(tmp_path):
        assert_refused(run("export", source, "--for", "vllm", "-o", tmp_path / "out"), "lm_head.weight", "--fold-into")
        for inside in (tmp_path / "out" / "base", tmp_path):
            result = run("export", source, "--for", "vllm", "-o", tmp_path / "out", "--fold-into", inside)
            assert_refused(result, "a folder apart")
    folded = run("export", source, "--for", "vllm", "-o", tmp_path / "out", "--fold-into", tmp_path / "folded")
    assert folded.status == 0, folded.err
    assert "lm_head.weight" in folded.out
    assert config_of(tmp_path / "out")["base_model_name_or_path"] == str(tmp_path / "folded")
    torch.testing.assert_close(
        log_probabilities(load_adapted(tmp_path / "folded", tmp_path / "out")),
        log_probabilities(load_adapted(base, source)),
    )


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"use_rslora": True}, "use_rslora is not read"),
        ({"rank_pattern": {"v_proj": 4}}, "rank_pattern in its configuration is not read"),
        ({"use_dora": True}, None),
    ],
)
def test_check_says_why(run, own_lora, own_dora, changes, fault):
    source = own_dora if "use_dora" in changes else own_lora
    edit_json(source / "adapter_config.json", **changes)
    result = run("export", source, "--for", "sglang", "--check")
    assert result.status == 1
    assert (fault or "it is a DoRA, which SGLang refuses") in result.out
    assert result.out.rstrip().endswith("--for sglang -o OUT")
    assert "--for ollama -o OUT.gguf" in run("export", source, "--for", "ollama", "--check").out


def test_a_rank_that_needs_an_option_or_is_too_large(run, base, models, tmp_path):
    wide = save_adapter(base, models / "wide", r=20, lora_alpha=20)
    result = run("export", wide, "--for", "vllm", "-o", tmp_path / "out")
    assert "start vLLM with --max-lora-rank 32" in result.err
    wider = save_adapter(base, models / "wider", r=70, lora_alpha=70, target_modules=["down_proj"])
    assert_refused(run("export", wider, "--for", "tensorrt-llm", "-o", tmp_path / "trt"), "takes 64 at most", "--rank")


@pytest.mark.parametrize(
    "arguments",
    [(), ("--to", "peft"), ("--for", "vllm"), ("--check", "--to", "peft"), ("--for", "vllm", "--check", "-o", "x")],
)
def test_usage(run, lora, arguments):
    assert run("export", lora, *arguments).status == 2


def test_outputs(run, lora, base, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "lora.gguf").touch()
    with nothing_written(tmp_path):
        assert_refused(run("export", lora, "--for", "vllm", "-o", tmp_path / "there"), "--force")
        assert_refused(run("export", lora, "--to", "gguf", "-o", tmp_path / "lora.gguf"), "--force")
        assert_refused(run("export", lora, "--to", "gguf", "-o", tmp_path / "lora.bin"), ".gguf")
        assert_refused(
            run("export", lora, "--to", "peft", "-o", tmp_path / "x.safetensors"), "a folder", "a file's name"
        )
        assert_refused(
            run("export", lora, "--to", "mlx", "--for", "vllm", "-o", tmp_path / "x"), "does not read MLX-LM"
        )
    assert run("export", lora, "--to", "gguf", "-o", tmp_path / "lora.gguf", "--force").status == 0


@pytest.mark.parametrize(("to", "file"), [("peft", "out"), ("mlx", "out"), ("gguf", "out.gguf")])
def test_a_map_adapter_comes_back_from_every_format(to, file, base, lora, tmp_path):
    mapconv.upgrade(lora, tmp_path / "map", base=base)
    mapconv.export(tmp_path / "map", tmp_path / file, to=to, base=base)
    mapconv.merge(tmp_path / file, tmp_path / "merged", base=base)
    got, wanted = load_file(tmp_path / "merged" / "model.safetensors"), merged_by_peft(base, lora)
    for name, weight in wanted.items():
        torch.testing.assert_close(got[name].double(), weight, rtol=0, atol=2e-6)


@pytest.mark.parametrize("source", ["lora", "dora", "uneven"])
def test_mlx_holds_lora_and_dora_exactly(source, base, tmp_path, request):
    adapter = request.getfixturevalue(source)
    # The scaling goes into the factors: a power of two loses nothing there, another one float32's rounding.
    assert mapconv.export(adapter, tmp_path / "out", to="mlx").worst_error < (1e-7 if source == "uneven" else 1e-30)
    config = config_of(tmp_path / "out")
    assert (config["num_layers"], config["fine_tune_type"]) == (2, "dora" if source == "dora" else "lora")
    assert config["lora_parameters"]["scale"] == 1
    tensors, W, T = (
        load_file(tmp_path / "out/adapters.safetensors"),
        load_base(base).state_dict(),
        merged_by_peft(base, adapter),
    )
    for name in {key.rpartition(".")[0] for key in tensors}:
        merged = W[f"{name}.weight"].double()
        merged += (tensors[f"{name}.lora_a"].double() @ tensors[f"{name}.lora_b"].double()).T
        if source == "dora":
            merged *= (tensors[f"{name}.m"].double() / merged.norm(dim=1))[:, None]
        torch.testing.assert_close(merged, T[f"{name}.weight"], rtol=0, atol=2e-6)
    assert {tensors[f"{name}.lora_a"].shape[1] for name in {k.rpartition(".")[0] for k in tensors}} == {
        config["lora_parameters"]["rank"]
    }


@pytest.mark.parametrize("source", ["dora", "uneven"])
def test_mlx_lm_loads_it_and_fuses_to_the_same_weights(source, base, tmp_path, request):
    mx, utils = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_lm.tuner.utils")
    from mlx_lm.utils import load_model

    adapter = request.getfixturevalue(source)
    mapconv.export(adapter, tmp_path / "out", to="mlx")
    model, _ = load_model(base)
    utils.load_adapters(model, str(tmp_path / "out"))
    T, fused = merged_by_peft(base, adapter), 0
    for path, module in model.named_modules():
        if hasattr(module, "fuse"):
            weight = torch.tensor(module.fuse().weight.astype(mx.float32).tolist())
            torch.testing.assert_close(weight.double(), T[f"{path}.weight"], rtol=0, atol=5e-6)
            fused += 1
    assert fused == {"dora": 14, "uneven": 6}[source]
