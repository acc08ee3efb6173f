"""Image adapters out of mapconv: read again by mapconv and by diffusers, they make the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mapconv
from tests.cli.refusals import assert_refused
from tests.formats.image.bases import BASES, FLUX, Base
from tests.formats.image.updates import KINDS, low_rank

FILES = {"kohya": "out.safetensors", "comfyui": "out.safetensors", "diffusers": "out"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Base]:
    root = tmp_path_factory.mktemp("bases")
    return {name: make(root / name) for name, make in BASES.items()}


def source_for(base: Base, file: Path, rank: int = 3) -> Path:
    """A kohya file with a LoRA of every module, under diffusers' names."""
    generator, tensors = torch.Generator().manual_seed(3), {}
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te1_text_model_", "text_encoder_2": "lora_te2_text_model_"}
    for module, weight in base.weights(base.path).items():
        model, _, name = module.partition(".")
        key = prefixes[model] + name.removeprefix("text_model.").replace(".", "_")
        height, width, *kernel = weight.shape
        tensors[f"{key}.lora_down.weight"] = torch.randn(rank, width, *kernel, generator=generator) * 0.1
        tensors[f"{key}.lora_up.weight"] = torch.randn(height, rank, *(1 for _ in kernel), generator=generator) * 0.1
        tensors[f"{key}.alpha"] = torch.tensor(2.0)
    save_file(tensors, file)
    return file


@pytest.mark.parametrize("to", FILES)
@pytest.mark.parametrize("name", ["folder", "pipeline", "file"])
def test_what_is_written_makes_the_same_weights(name, to, bases, tmp_path):
    base = bases[name]
    source = source_for(base, tmp_path / "source.safetensors")
    mapconv.upgrade(source, tmp_path / "map", base=base.path)
    out = tmp_path / FILES[to]
    assert mapconv.export(tmp_path / "map", out, to=to, base=base.path).worst_error < 1e-6
    written = out / "pytorch_lora_weights.safetensors" if to == "diffusers" else out
    merged = {}
    for number, adapter in enumerate((source, written)):
        target = tmp_path / f"merged-{number}{'.safetensors' if base.path.is_file() else ''}"
        mapconv.merge(adapter, target, base=base.path)
        merged[number] = base.weights(target)
    for module, weight in merged[0].items():
        torch.testing.assert_close(merged[1][module], weight, rtol=1e-6, atol=1e-6)


def test_kohya_s_metadata_and_its_own_dialect_again(bases, tmp_path):
    source = source_for(bases["pipeline"], tmp_path / "source.safetensors")
    mapconv.export(source, tmp_path / "out.safetensors", to="kohya", base=bases["pipeline"].path)
    assert load_file(source).keys() == load_file(tmp_path / "out.safetensors").keys()
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata()["ss_network_dim"] == "3"
        assert file.metadata()["ss_network_module"] == "networks.lora"


def test_diffusers_reads_its_folder(bases, tmp_path):
    loaders = pytest.importorskip("diffusers.loaders")
    source = source_for(bases["pipeline"], tmp_path / "source.safetensors")
    mapconv.export(source, tmp_path / "out", to="diffusers", base=bases["pipeline"].path)
    state, alphas, metadata = loaders.StableDiffusionXLLoraLoaderMixin.lora_state_dict(
        str(tmp_path / "out"), unet_config=None, return_lora_metadata=True
    )
    assert len(state) == len(load_file(source)) * 2 // 3
    assert not alphas
    assert metadata["unet.lora_alpha"] == metadata["unet.r"] == 3
    assert all(name.startswith(("unet.", "text_encoder.", "text_encoder_2.")) for name in state)


def test_lycoris_reads_kohya_s_file(bases, tmp_path):
    locon = pytest.importorskip("lycoris.modules.locon").LoConModule
    base = bases["folder"]
    source = source_for(base, tmp_path / "source.safetensors")
    mapconv.export(source, tmp_path / "out.safetensors", to="kohya", base=base.path)
    mapconv.merge(source, tmp_path / "merged", base=base.path)
    tensors, wanted = load_file(tmp_path / "out.safetensors"), base.weights(tmp_path / "merged")
    for module, weight in base.weights(base.path).items():
        name = f"lora_unet_{module.partition('.')[2].replace('.', '_')}"
        height, width, *kernel = weight.shape
        layer = torch.nn.Conv2d(width, height, kernel, bias=False) if kernel else torch.nn.Linear(width, height, False)
        layer.weight.data = weight
        adapted = locon.make_module_from_state_dict(name, layer, *locon.extract_state_dict(tensors, name))
        got, _ = adapted.get_merged_weight(multiplier=1.0)
        torch.testing.assert_close(got.detach().view(weight.shape), wanted[module], rtol=1e-5, atol=1e-5)


def test_a_dora_is_kept_by_diffusers_and_refitted_for_the_others(bases, tmp_path):
    base = bases["folder"]
    tensors = load_file(source_for(base, tmp_path / "plain.safetensors"))
    for module, weight in base.weights(base.path).items():
        key = f"lora_unet_{module.partition('.')[2].replace('.', '_')}.dora_scale"
        norms = weight.flatten(1).norm(dim=1) * 1.3
        tensors[key] = norms.view(-1, *(1 for _ in weight.shape[1:]))
    save_file(tensors, tmp_path / "dora.safetensors")
    arguments = {"base": base.path, "dora_axis": "out"}
    kept = mapconv.export(tmp_path / "dora.safetensors", tmp_path / "out", to="diffusers", **arguments)
    assert kept.worst_error < 1e-7  # float32's rounding of the scaling, 2/3
    refitted = mapconv.export(tmp_path / "dora.safetensors", tmp_path / "k.safetensors", to="kohya", **arguments)
    assert 0 < refitted.worst_error < 1
    assert not any("dora" in name for name in load_file(tmp_path / "k.safetensors"))


def test_a_model_of_text_has_no_names_there(run, lora, tmp_path):
    for to, file in FILES.items():
        assert_refused(run("export", lora, "--to", to, "-o", tmp_path / file), "has no names for the modules", "--to")
    assert json.loads((lora / "adapter_config.json").read_text())["r"] == 4


@pytest.mark.parametrize("kind", ["low-rank", "loha", "lokr-w2", "full"])
def test_comfyui_loads_the_keys_of_kohya(kind, run, tmp_path):
    tensors, _ = KINDS[kind](torch.Size((12, 8)), torch.Generator().manual_seed(1))
    save_file({f"lora_unet_mid_block_proj.{ending}": t for ending, t in tensors.items()}, tmp_path / "a.safetensors")
    done = run("export", tmp_path / "a.safetensors", "--for", "comfyui", "--check")
    assert (done.status, "comfyui loads it as it is" in done.out) == (0, True), done.out


@pytest.mark.parametrize("to", ["kohya", "comfyui", "diffusers"])
def test_a_file_of_a_denoiser_alone_has_names(to, bases, tmp_path):
    base, tensors = bases["flux-file"], {}
    generator = torch.Generator().manual_seed(1)
    for names, key, width in FLUX:
        rows = sum(base.places[f"unet.{name}"][2] for name in names)
        parts, _ = low_rank(torch.Size((rows, width)), generator)
        # diffusers has no name for a query, key and value in one.
        if to != "diffusers" or len(names) == 1:
            tensors |= {f"lora_unet_{key.replace('.', '_')}.{ending}": tensor for ending, tensor in parts.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    out = tmp_path / FILES[to]
    assert mapconv.export(tmp_path / "a.safetensors", out, to=to, base=base.path).worst_error < 1e-6
    written = out / "pytorch_lora_weights.safetensors" if to == "diffusers" else out
    merged = []
    for number, adapter in enumerate((tmp_path / "a.safetensors", written)):
        mapconv.merge(adapter, tmp_path / f"{number}.safetensors", base=base.path)
        merged.append(base.weights(tmp_path / f"{number}.safetensors"))
    for module, weight in merged[0].items():
        torch.testing.assert_close(merged[1][module], weight, rtol=1e-6, atol=1e-6)


def test_kohya_has_no_name_for_a_query_alone(bases, tmp_path):
    parts, _ = low_rank(torch.Size((8, 8)), torch.Generator().manual_seed(1))
    key = "transformer.transformer_blocks.0.attn.to_q"
    a, b = parts["lora_down.weight"], parts["lora_up.weight"]
    save_file({f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}, tmp_path / "a.safetensors")
    with pytest.raises(mapconv.MapconvError, match="to_q"):
        mapconv.export(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="kohya", base=bases["flux-file"].path)


@pytest.mark.parametrize("name", ["pipeline", "file"])
def test_no_server_of_language_models_for_a_model_of_images(name, bases, run, tmp_path):
    source = source_for(bases["pipeline"], tmp_path / "source.safetensors")
    done = run("export", source, "--for", "vllm", "--base", bases[name].path, "-o", tmp_path / "out")
    assert_refused(done, "vLLM runs language models")
