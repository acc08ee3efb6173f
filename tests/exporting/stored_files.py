"""Exports that the libraries they are for have read: the tests compare today's with them where no such library is.

``python -m tests.exporting.stored_files`` makes them anew, and holds each to what its library makes of it.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file

import mapconv
from tests.formats.image.bases import pipeline
from tests.models import merged_by_peft, save_base

STORED = Path(__file__).parent / "stored"
LAYER, RANK, ALPHA = "model.layers.1", 2, 3.0
#: (out, in) of the layers that are adapted in the tests' tiny Llama.
TARGETS = {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "mlp.down_proj": (32, 48)}
#: And in the pipeline of images, with their kernels.
IMAGE = {
    "lora_unet_conv_in": (6, 4, 3, 3),
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj": (16, 8),
    "lora_te2_text_model_encoder_layers_0_self_attn_q_proj": (8, 8),
}
#: What is exported to which format, and the file that it is.
EXPORTS = {
    "mlx-lora": ("mlx", "adapters.safetensors"),
    "mlx-dora": ("mlx", "adapters.safetensors"),
    "gguf": ("gguf", None),
    "kohya": ("kohya", None),
    "comfyui": ("comfyui", None),
    "diffusers": ("diffusers", "pytorch_lora_weights.safetensors"),
}


def wave(*shape: int, start: float) -> torch.Tensor:
    """Values that need no random numbers."""
    return torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * 0.7 + start).view(shape).float() / 4


def text_source(folder: Path, *, dora: bool) -> Path:
    folder.mkdir()
    tensors = {}
    for number, (name, (height, width)) in enumerate(TARGETS.items()):
        key = f"base_model.model.{LAYER}.{name}"
        tensors[f"{key}.lora_A.weight"] = wave(RANK, width, start=number)
        tensors[f"{key}.lora_B.weight"] = wave(height, RANK, start=number + 0.5)
        if dora:
            tensors[f"{key}.lora_magnitude_vector"] = 1 + wave(height, start=number)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "use_dora": dora, "task_type": "CAUSAL_LM"}
    config |= {"target_modules": [f"{LAYER}.{name}" for name in TARGETS]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def image_source(file: Path) -> Path:
    tensors = {}
    for number, (key, (height, width, *kernel)) in enumerate(IMAGE.items()):
        tensors[f"{key}.lora_down.weight"] = wave(RANK, width, *kernel, start=number)
        tensors[f"{key}.lora_up.weight"] = wave(height, RANK, *(1 for _ in kernel), start=number + 0.5)
        tensors[f"{key}.alpha"] = torch.tensor(ALPHA)
    save_file(tensors, file)
    return file


def exported(name: str, place: Path) -> Path:
    """Export a source that is always the same; the file or the folder."""
    to, _ = EXPORTS[name]
    if to in ("mlx", "gguf"):
        base, source = save_base(place / "base"), text_source(place / "own", dora=name.endswith("dora"))
    else:
        base, source = pipeline(place / "base").path, image_source(place / "own.safetensors")
    out = place / {"gguf": "out.gguf", "kohya": "out.safetensors", "comfyui": "out.safetensors"}.get(to, "out")
    mapconv.export(source, out, to=to, base=base)
    return out


def content(name: str, out: Path) -> Path:
    """The file of an export."""
    _, file = EXPORTS[name]
    return out if file is None else out / file


def main() -> None:
    STORED.mkdir(exist_ok=True)
    for name in EXPORTS:
        with TemporaryDirectory() as place:
            out = exported(name, Path(place))
            READERS[EXPORTS[name][0]](out, Path(place))
            shutil.copyfile(content(name, out), STORED / f"{name}{content(name, out).suffix}")
            if (out / "adapter_config.json").is_file():
                shutil.copyfile(out / "adapter_config.json", STORED / f"{name}.json")


def _updates(place: Path) -> dict[str, torch.Tensor]:
    """What stock PEFT makes of each weight, without the base."""
    before, after = load_file(place / "base" / "model.safetensors"), merged_by_peft(place / "base", place / "own")
    return {name: after[f"{LAYER}.{name}.weight"] - before[f"{LAYER}.{name}.weight"].double() for name in TARGETS}


def _by_mlx(out: Path, place: Path) -> None:
    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    model, _ = load_model(place / "base")
    load_adapters(model, str(out))
    after, seen = merged_by_peft(place / "base", place / "own"), 0
    for path, module in model.named_modules():
        if hasattr(module, "fuse"):
            weight = torch.tensor(module.fuse().weight.astype(mx.float32).tolist())
            torch.testing.assert_close(weight.double(), after[f"{path}.weight"], rtol=0, atol=5e-6)
            seen += 1
    assert seen >= len(TARGETS)


def _by_gguf(out: Path, place: Path) -> None:
    from gguf import GGUFReader

    reader = GGUFReader(out)
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    alpha = reader.fields["adapter.lora.alpha"].contents()
    names = {"self_attn.q_proj": ("attn_q", 4), "self_attn.k_proj": ("attn_k", 2), "mlp.down_proj": ("ffn_down", None)}
    for path, update in _updates(place).items():
        name, heads = names[path]
        A, B = (tensors[f"blk.1.{name}.weight.lora_{part}"].double() for part in "ab")
        if heads is not None:  # as llama.cpp's converter stores the rows of a model
            update = update.view(heads, 2, -1, update.shape[1]).transpose(1, 2).reshape(update.shape)
        torch.testing.assert_close(B @ A * (alpha / len(A)), update, rtol=0, atol=1e-6)


def _by_lycoris(out: Path, place: Path) -> None:
    from lycoris.modules.locon import LoConModule

    tensors, own = load_file(out), load_file(place / "own.safetensors")
    for key, (height, width, *kernel) in IMAGE.items():
        layer = torch.nn.Conv2d(width, height, kernel, bias=False) if kernel else torch.nn.Linear(width, height, False)
        layer.weight.data.zero_()
        merged = [
            LoConModule.make_module_from_state_dict(key, layer, *LoConModule.extract_state_dict(one, key))
            .get_merged_weight(multiplier=1.0)[0]
            .detach()
            for one in (tensors, own)
        ]
        torch.testing.assert_close(*merged, rtol=1e-6, atol=1e-6)


def _by_diffusers(out: Path, place: Path) -> None:
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin

    state, _, metadata = StableDiffusionXLLoraLoaderMixin.lora_state_dict(
        str(out), unet_config=None, return_lora_metadata=True
    )
    assert len(state) == 2 * len(IMAGE)
    assert metadata["unet.lora_alpha"] == metadata["unet.r"] == RANK


def _by_mapconv(out: Path, place: Path) -> None:
    """ComfyUI is no library: its names are read by the reader of its dialect here."""
    for adapter, target in ((out, "after"), (place / "own.safetensors", "wanted")):
        mapconv.merge(adapter, place / target, base=place / "base" / "pipeline", dtype="float32")
    for file in ("unet/diffusion_pytorch_model.safetensors", "text_encoder_2/model.safetensors"):
        wanted = load_file(place / "wanted" / file)
        for name, weight in load_file(place / "after" / file).items():
            torch.testing.assert_close(weight, wanted[name], rtol=1e-6, atol=1e-6)


READERS: dict[str, Callable[[Path, Path], None]] = {
    "mlx": _by_mlx,
    "gguf": _by_gguf,
    "kohya": _by_lycoris,
    "comfyui": _by_mapconv,
    "diffusers": _by_diffusers,
}

if __name__ == "__main__":
    main()
