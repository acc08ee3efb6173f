"""How faithful an adapter is on a rounded copy of its base: as it is, rebased in every way, and beside EoRA.

    python examples/benchmarks/rebase.py FOLDER [--adapter lora] [--bits 4 --group 32] [--tokens 8192]
        [--storage grid|nf4|fp8] [--ranks 16 64] [--rows running source own none stored eora]
        [--all-linear] [--calibrate STEPS]

FOLDER is what ``smollm2_dora.py`` writes: base, an adapter, train.txt and held-out.txt. Every row is KL(source on its
own base ‖ model) on held-out text, measured on the files as written. EoRA (Liu et al. 2024) compensates the rounding in
the eigenspace of the base's inputs, beside the adapter: its rank here is what the adapter leaves of the total.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import mapconv
from mapconv.checkpoint.reader import TensorReader
from mapconv.data import read_blocks, read_rows
from mapconv.fidelity.metrics import Sums
from mapconv.refit.stored_statistics import read_statistics
from mapconv.runtime.models import attach_with_peft, load_model, load_tokenizer

LENGTH = 256
SUFFIXES = tuple(f"{name}_proj.weight" for name in ("q", "k", "v", "o", "gate", "up", "down"))


def on_a_grid(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Symmetric integers, with a scale for each group of inputs."""
    most = 2 ** (bits - 1) - 1
    grouped = weight.view(-1, group)
    scale = grouped.abs().amax(1, keepdim=True).clamp_min(1e-12) / most
    return ((grouped / scale).round() * scale).view(weight.shape)


def as_nf4(weight: torch.Tensor) -> torch.Tensor:
    """What bitsandbytes' NF4 in blocks of 64 stands for, its scales quantized once more as QLoRA has them."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    return dequantize_4bit(*quantize_4bit(weight, quant_type="nf4", compress_statistics=True)).view(weight.shape)


def as_fp8(weight: torch.Tensor) -> torch.Tensor:
    """e4m3 with a scale for each block of 128 × 128."""
    out = torch.empty_like(weight)
    for row in range(0, weight.shape[0], 128):
        for column in range(0, weight.shape[1], 128):
            block = weight[row : row + 128, column : column + 128]
            scale = block.abs().max().clamp_min(1e-12) / 448
            out[row : row + 128, column : column + 128] = (block / scale).to(torch.float8_e4m3fn).float() * scale
    return out


def write_rounded(base: Path, out: Path, rounded: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """The base with what its linear weights are ``rounded`` to; in float32."""
    if not out.exists():
        shutil.copytree(base, out)
        tensors = {name: tensor.float() for name, tensor in load_file(base / "model.safetensors").items()}
        for name, weight in tensors.items():
            if name.endswith(SUFFIXES):
                tensors[name] = rounded(weight)
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


class Judge:
    """The source's logits on held-out text, and the distance of other models from them."""

    def __init__(self, base: Path, adapter: Path, text: Path, sequences: int) -> None:
        blocks = read_blocks(read_rows(text), load_tokenizer(base), samples=sequences, length=LENGTH)
        self._rows = [torch.tensor([row]) for row in blocks.rows()]
        with torch.inference_mode():
            model = attach_with_peft(load_model(base, dtype="float32", device="cpu"), adapter, "source")
            self._wanted = [model(row).logits[0] for row in self._rows]

    @torch.inference_mode()
    def kl(self, base: Path, adapter: Path | None = None, changes: dict[str, torch.Tensor] | None = None) -> float:
        """Mean KL of a base with an adapter; ``changes`` are added to its weights."""
        model = load_model(base, dtype="float32", device="cpu")
        for name, change in (changes or {}).items():
            model.get_parameter(name).add_(change)
        if adapter is not None:
            model = attach_with_peft(model, adapter, "a")
        sums = Sums()
        for row, wanted in zip(self._rows, self._wanted, strict=True):
            sums.add(wanted, model(row).logits[0])
        return sums.means(causal=True).kl


def eora(base: Path, rounded: Path, statistics: Path, rank: int) -> dict[str, torch.Tensor]:
    """EoRA's closed form: the rank-k part of (W − W_rounded)·P for the base's inputs, taken back by P⁻¹."""
    stored = read_statistics(statistics)
    plain, coarse = (load_file(folder / "model.safetensors") for folder in (base, rounded))
    changes = {}
    with TensorReader() as reader:
        for path in stored.paths:
            name = f"{path}.weight"
            root = stored.inputs(path, reader).root
            U, s, V = torch.linalg.svd(root.multiply(plain[name].float() - coarse[name]), full_matrices=False)
            changes[name] = (U[:, :rank] * s[:rank]) @ root.divide(V[:rank])
    return changes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--adapter", default="lora")
    parser.add_argument("--storage", choices=["grid", "nf4", "fp8"], default="grid")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--rows", nargs="+", default=["none", "running", "source", "own", "stored", "eora"])
    parser.add_argument("--all-linear", action="store_true", help="fit the layers that the adapter leaves alone, too")
    parser.add_argument("--calibrate", type=int, default=0, metavar="STEPS", help="train each result afterwards")
    parser.add_argument("--held-out", type=int, default=8, help="sequences of 256 tokens to measure on")
    options = parser.parse_args()
    folder, work = options.folder, options.folder / "rebased"
    work.mkdir(exist_ok=True)
    base, adapter, text = folder / "base", folder / options.adapter, folder / "train.txt"
    rounding, name = {
        "grid": (lambda weight: on_a_grid(weight, options.bits, options.group), f"{options.bits}bit-{options.group}"),
        "nf4": (as_nf4, "nf4"),
        "fp8": (as_fp8, "fp8"),
    }[options.storage]
    rounded = write_rounded(base, work / f"base-{name}", rounding)
    wanted = {"all_linear": options.all_linear, "calibrate": options.calibrate}
    also = "".join(f", {key} {value}" for key, value in wanted.items() if value)
    judge = Judge(base, adapter, folder / "held-out.txt", options.held_out)
    as_is = judge.kl(rounded, adapter)
    print(f"{options.adapter} on {rounded.name}, {options.tokens:,} tokens")
    print(f"{'the rounded base alone':44} KL {judge.kl(rounded):.4f}")
    print(f"{'the adapter as it is':44} KL {as_is:.4f}", flush=True)
    samples = options.tokens // LENGTH
    statistics = work / f"statistics-{options.tokens}"
    if {"stored", "eora"} & set(options.rows) and not statistics.exists():
        mapconv.statistics(base, statistics, data=text, samples=samples, sequence_length=LENGTH)

    def report(name: str, kl: float, seconds: float) -> None:
        print(f"{name:44} KL {kl:.4f} = {kl / as_is:.2f} of as it is, {seconds:.0f} s", flush=True)

    for rank in options.ranks:
        for row in options.rows:
            started = time.perf_counter()
            if row == "eora":
                own = json.loads((adapter / "adapter_config.json").read_text())["r"]
                if rank > own:
                    changes = eora(base, rounded, statistics, rank - own)
                    kl = judge.kl(rounded, adapter, changes)
                    report(f"EoRA of rank {rank - own} beside the adapter", kl, time.perf_counter() - started)
                continue
            out = work / f"{options.adapter}-{row}-{rank}"
            given = {"statistics": row, "data": text, "samples": samples, "sequence_length": LENGTH}
            if row == "own":
                given = {"samples": 2 * samples, "sequence_length": LENGTH}  # twice as many, as by default
            elif row == "stored":
                given = {"statistics_from": statistics}
            given |= {"force": True, "keep_worse": True, **wanted}
            mapconv.rebase(adapter, out, base=base, onto=rounded, rank=rank, **given)
            seconds = time.perf_counter() - started
            label = f"{row} ({2 * options.tokens:,} tokens)" if row == "own" else row
            report(f"rebased, {label}, rank {rank}{also}", judge.kl(rounded, out), seconds)


if __name__ == "__main__":
    main()
