"""Refit a DoRA adapter on Llama-3.2-1B's shape: mapconv's upgrade against PEFT's ``convert_to_lora`` (full SVDs).

    python examples/benchmarks/refit.py /tmp/bench [--layers 16] [--peft-layers 2]

PEFT takes minutes, so by default it converts a model of two layers, and its figure is scaled to ``--layers``: all
layers have the same shapes. Start-up and loading are outside both figures. PEFT's result is also wrong (it drops the
magnitude); only its time is compared. ``--oracle`` checks modules of each shape against a full float64 SVD.
``--ranks BASE DORA`` instead refits a DoRA of your own at rising ranks and a tolerance: times as whole processes beside
PEFT's at the same rank, and the excess of the worst module over the optimum.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from llama_shape import LINEARS, write_adapter, write_model
from measure import mapconv, python
from safetensors import safe_open

#: Every so many modules are held against the optimum: of seven kinds of layer, each.
SAMPLED = 13
PEFT = """
import sys, time, torch
from transformers import AutoModelForCausalLM
from peft import PeftModel, convert_to_lora
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
model = PeftModel.from_pretrained(model, sys.argv[2])
started = time.perf_counter()
convert_to_lora(model, float(sys.argv[3]) if '.' in sys.argv[3] else int(sys.argv[3]))
print(time.perf_counter() - started)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--peft-layers", type=int, default=2)
    parser.add_argument("--oracle", action="store_true")
    parser.add_argument("--ranks", type=Path, nargs=2, metavar=("BASE", "DORA"))
    options = parser.parse_args()
    if options.ranks:
        _compare_ranks(*options.ranks, options.folder / "out")
        return
    base = write_model(options.folder / f"base-{options.layers}", options.layers)
    dora = write_adapter(options.folder / f"dora-{options.layers}", base, use_dora=True, layers=options.layers)
    lora = write_adapter(options.folder / f"lora-{options.layers}", base, use_dora=False, layers=options.layers)
    result, seconds = _upgrade(dora, base, options.folder / "out")
    print(f"DoRA refit, {options.layers} layers: {seconds:.2f} s, peak {result.megabytes:.0f} MB")
    small = write_model(options.folder / f"base-{options.peft_layers}", options.peft_layers)
    adapter = write_adapter(
        options.folder / f"dora-{options.peft_layers}", small, use_dora=True, layers=options.peft_layers
    )
    peft = float(python(PEFT, small, adapter, "16").output.split()[-1]) * options.layers / options.peft_layers
    print(f"PEFT convert_to_lora: {peft:.1f} s ({options.peft_layers} layers measured) = {peft / seconds:.1f} x")
    result, seconds = _upgrade(lora, base, options.folder / "out")
    print(f"LoRA upgrade: {seconds:.2f} s, peak {result.megabytes:.0f} MB")
    if options.oracle:
        _check_optimum(base, dora, options.folder / "out")


def _compare_ranks(base: Path, dora: Path, out: Path) -> None:
    for choice in ("--rank 1", "--rank 16", "--rank 64", "--rank 128", "--rank 256", "--rank 576", "--tolerance 0.05"):
        option, value = choice.split()
        shutil.rmtree(out, ignore_errors=True)
        ours = mapconv("upgrade", dora, "--base", base, "-o", out, option, value, "--json", "-q")
        # PEFT's threshold is the energy that is kept.
        theirs = python(PEFT, base, dora, value if option == "--rank" else str(1 - float(value) ** 2))
        excess = max(_excess(base, dora, module) for module in json.loads(ours.output)["modules"][::SAMPLED])
        print(
            f"{choice:16s} {ours.seconds:6.1f} s, PEFT {theirs.seconds:6.1f} s "
            f"= {theirs.seconds / ours.seconds:.1f} x; {100 * excess:+.3f} % over the optimum at worst",
            flush=True,
        )


def _excess(base: Path, dora: Path, module: dict) -> float:
    """How far ε is above the least of a grid of gains, by eigenvalues in float64."""
    config = json.loads((dora / "adapter_config.json").read_text())
    with safe_open(dora / "adapter_model.safetensors", "pt") as file:
        A, B, m = (
            file.get_tensor(f"base_model.model.{module['path']}.{part}").double()
            for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
        )
    W = _base_weight(base, f"{module['path']}.weight").double()
    V = W + config["lora_alpha"] / config["r"] * (B @ A)
    T = (m / V.norm(dim=1))[:, None] * V
    rank = module["rank"]
    if rank >= min(W.shape):
        return 0.0
    middle = float(((T - W) * W).sum() / W.square().sum())
    best = min(_tail(T, W, 1 + middle * step / 4, rank) for step in range(9)) / float((T - W).norm())
    return module["error"] / best - 1


def _upgrade(adapter: Path, base: Path, out: Path):
    """The process as measured, and the seconds of the work itself."""
    shutil.rmtree(out, ignore_errors=True)
    result = mapconv("upgrade", adapter, "--base", base, "-o", out, "--json", "-q")
    return result, json.loads(result.output)["seconds"]


def _check_optimum(base: Path, adapter: Path, out: Path) -> None:
    """ε of layer 0's modules against the optimum over a by full float64 SVDs (on the transposed Gram matrix)."""
    shutil.rmtree(out, ignore_errors=True)
    modules = {
        m["path"]: m
        for m in json.loads(mapconv("upgrade", adapter, "--base", base, "-o", out, "--json").output)["modules"]
    }
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        for name in LINEARS:
            path = f"model.layers.0.{name}"
            A, B, m = (
                file.get_tensor(f"base_model.model.{path}.{part}").double()
                for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
            )
            W = _base_weight(base, f"{path}.weight").double()
            V = W + B @ A
            T = (m / V.norm(dim=1))[:, None] * V
            best = min(_tail(T, W, 1 + step / 1000, A.shape[0]) for step in range(0, 13, 2)) / float((T - W).norm())
            error = modules[path]["error"]
            print(f"{path:32s} ε {error:.5f}, full SVD {best:.5f}: {100 * (error / best - 1):+.3f} %")


def _tail(T: torch.Tensor, W: torch.Tensor, gain: float, rank: int) -> float:
    E = T - gain * W
    gram = E.T @ E if E.shape[0] > E.shape[1] else E @ E.T
    return float(torch.linalg.eigvalsh(gram)[:-rank].clamp_min(0).sum()) ** 0.5


def _base_weight(base: Path, name: str) -> torch.Tensor:
    index = base / "model.safetensors.index.json"
    shard = json.loads(index.read_text())["weight_map"][name] if index.exists() else "model.safetensors"
    with safe_open(base / shard, "pt") as file:
        return file.get_tensor(name)


if __name__ == "__main__":
    main()
