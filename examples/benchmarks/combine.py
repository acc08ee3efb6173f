"""Combination of eight LoRAs of rank 16 on Llama-3.2-1B's shape: time beside reading them and the base's norms.

    python examples/benchmarks/combine.py FOLDER [--layers 16] [--adapters 8] [--rank 16]

The lower bound reads every adapter and finds the norm and the projection of every adapted weight of the base, in a
process of its own, as a combination has to. Times are CPU seconds of each process, start-up included. The exact sum is
held against the dense float64 sum of one weight of each shape.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent))
from llama_shape import LINEARS, write_adapter, write_model
from measure import mapconv, python

_BOUND = """
import sys
from pathlib import Path
import torch
from mapconv.checkpoint.reader import TensorReader
from mapconv.placement.adapters import place_apart
from mapconv.refit.norms import BaseNorms
placed = place_apart([Path(name) for name in sys.argv[2:]], sys.argv[1])
with TensorReader() as reader:
    BaseNorms(placed[0].target.checkpoint).load([item.weight for item in placed[0].modules], reader)
    for item in placed:
        for module in item.adapter.modules:
            reader.read(module.lora_A), reader.read(module.lora_B)
"""


def write_adapters(folder: Path, base: Path, layers: int, count: int) -> list[Path]:
    """Random LoRAs, each with factors of its own."""
    made = []
    for number in range(count):
        out = folder / f"lora-{layers}-{number}"
        if not out.exists():
            first = write_adapter(folder / f"lora-{layers}", base, use_dora=False, layers=layers)
            shutil.copytree(first, out)
            draw = torch.Generator().manual_seed(number)
            tensors = load_file(first / "adapter_model.safetensors")
            for name, value in tensors.items():
                tensors[name] = value.std() * torch.randn(value.shape, generator=draw)
            save_file(tensors, out / "adapter_model.safetensors", {"format": "pt"})
        made.append(out)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    arguments = parser.parse_args()
    base = write_model(arguments.folder / f"base-{arguments.layers}", arguments.layers)
    adapters = write_adapters(arguments.folder, base, arguments.layers, arguments.adapters)
    names, out = [str(adapter) for adapter in adapters], arguments.folder / "combined"
    os.environ["MAPCONV_CACHE"] = "off"  # no run finds the norms that another has left
    bound = python(_BOUND, base, *names)
    print(f"reading them and the base's norms: {bound.cpu:.1f} s of CPU, {bound.megabytes:.0f} MB", flush=True)
    for options in (["--rank", str(arguments.rank)], []):
        run = mapconv("combine", *names, "--base", base, "-o", out, "--force", "-q", *options)
        shown, ratio = " ".join(options) or "(exact)", run.cpu / bound.cpu
        print(f"mapconv combine {shown}: {run.cpu:.1f} s of CPU ({ratio:.1f} ×), {run.megabytes:.0f} MB", flush=True)
    config = json.loads((adapters[0] / "adapter_config.json").read_text())
    scaling, worst = config["lora_alpha"] / config["r"], 0.0
    made = load_file(out / "adapter_model.safetensors")
    for name in LINEARS:
        key = f"base_model.model.model.layers.0.{name}.lora_{{}}.weight"
        wanted = 0.0
        for adapter in adapters:
            tensors = load_file(adapter / "adapter_model.safetensors")
            wanted = wanted + scaling * tensors[key.format("B")].double() @ tensors[key.format("A")].double()
        got = made[key.format("B")].double() @ made[key.format("A")].double()
        worst = max(worst, float((got - wanted).norm() / wanted.norm()))
    print(f"exact sum: {worst:.1e} off the dense float64 sum at most")


if __name__ == "__main__":
    main()
