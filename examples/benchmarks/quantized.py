"""Merge into a quantized base of 1.24 billion parameters and write it plain: mapconv, transformers + PEFT, and ``cp``.

    python examples/benchmarks/quantized.py /tmp/bench [--runs 3] [--storage nf4 fp8] [--no-peer]

transformers reads both storages on a CPU (NF4 with bitsandbytes installed) and dequantizes them before PEFT merges.
``cp`` copies the result. Wall time says little on a busy machine: CPU seconds stand beside it.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from llama_shape import write_adapter, write_model
from measure import Run, mapconv, median, python, run
from safetensors.torch import load_file, save_file

PEERS = {
    "nf4": """
import sys, torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, device_map={"": "cpu"}).dequantize()
model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
model.save_pretrained(out, max_shard_size="700MB")
""",
    "fp8": """
import sys, torch
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from peft import PeftModel
base, adapter, out = sys.argv[1:]
plain = FineGrainedFP8Config(weight_block_size=(128, 128), dequantize=True)
model = AutoModelForCausalLM.from_pretrained(
    base, dtype=torch.bfloat16, device_map={"": "cpu"}, quantization_config=plain)
model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
model.save_pretrained(out, max_shard_size="700MB")
""",
}
START_UP = "import mapconv.commands.merge"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--storage", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--no-peer", action="store_true")
    options = parser.parse_args()
    plain, out = write_model(options.folder / "base"), options.folder / "out"
    adapter = write_adapter(options.folder / "lora", plain, use_dora=False)
    start_up = median([python(START_UP) for _ in range(options.runs)])
    _show("start-up (imports alone)", start_up)
    for storage in options.storage:
        base = quantize(plain, storage, options.folder / f"base-{storage}")
        ours, theirs, copies = [], [], []
        for _ in range(options.runs):
            shutil.rmtree(out, ignore_errors=True)
            ours.append(mapconv("merge", adapter, "--base", base, "-o", out, "-q"))
            copies.append(run("cp", "-r", out, options.folder / "copy"))
            shutil.rmtree(options.folder / "copy")
            shutil.rmtree(out)
            if not options.no_peer:
                theirs.append(python(PEERS[storage], base, adapter, out))
        _report(storage, median(ours), median(theirs) if theirs else None, median(copies), start_up)


def quantize(plain: Path, storage: str, folder: Path) -> Path:
    """The model with its linear layers in NF4 (double quantization) or in FP8 by blocks of 128 × 128."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True)
    index = json.loads((plain / "model.safetensors.index.json").read_text())
    weight_map = {}
    for file in sorted(set(index["weight_map"].values())):
        tensors = {}
        for name, tensor in load_file(plain / file).items():
            parts = ENCODERS[storage](tensor) if "_proj" in name else {"": tensor}
            tensors |= {name.removesuffix(".weight") + ending if ending else name: t for ending, t in parts.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    settings = {
        "nf4": {
            "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16",
        },
        "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    }  # fmt: skip
    config = json.loads((plain / "config.json").read_text()) | {"quantization_config": settings[storage]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _nf4(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    from bitsandbytes.functional import quantize_4bit

    codes, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return {".weight": codes} | {f".weight.{name}": part.clone() for name, part in state.as_dict(packed=True).items()}


def _fp8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    height, width = (size // 128 for size in weight.shape)
    blocks = weight.float().view(height, 128, width, 128)
    scales = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn).view(weight.shape)
    return {".weight": codes, ".weight_scale_inv": scales}


ENCODERS = {"nf4": _nf4, "fp8": _fp8}


def _show(what: str, figures: Run) -> None:
    print(f"{what:28s} {figures.seconds:7.2f} s  {figures.cpu:7.2f} s CPU  {figures.megabytes:6.0f} MB", flush=True)


def _report(storage: str, ours: Run, theirs: Run | None, copy: Run, start_up: Run) -> None:
    _show(f"{storage}: mapconv", ours)
    if theirs is not None:
        _show(f"{storage}: transformers + PEFT", theirs)
        print(f"{storage}: peer / mapconv {theirs.seconds / ours.seconds:.1f} x, CPU {theirs.cpu / ours.cpu:.1f} x")
    _show(f"{storage}: cp of the result", copy)
    print(f"{storage}: net of start-up {(ours.seconds - start_up.seconds) / copy.seconds:.1f} x cp", flush=True)


if __name__ == "__main__":
    main()
