"""Refit a DoRA adapter on Llama-3.2-1B's shape: mapconv's upgrade against PEFT's ``convert_to_lora`` (full SVDs).

    python examples/benchmarks/refit.py /tmp/bench [--layers 16] [--peft-layers 2]

PEFT takes minutes, so by default it converts a model of two layers, and its figure is scaled to ``--layers``: all
layers have the same shapes. Start-up and loading are outside both figures. PEFT's result is also wrong (it drops the
magnitude); only its time is compared. ``--oracle`` checks modules of each shape against a full float64 SVD.
``--ranks BASE DORA`` instead refits a DoRA of your own at rising ranks and a tolerance (``--choices 16 64 0.05`` names
others: whole numbers are ranks): times as whole processes beside PEFT's at the same rank (``--no-peft`` leaves them
out), and how far every module is from the optimum, by eigenvalues in float64.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from llama_shape import LINEARS, write_adapter, write_model
from measure import mapconv, python
from safetensors import safe_open

CHOICES = ("1", "16", "64", "128", "256", "576", "0.05")
#: Gains that the optimum is looked for among: closest together around the one that is best at rank 0.
GAINS = 41
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
    parser.add_argument("--choices", nargs="+", default=CHOICES, metavar="RANK|TOLERANCE")
    parser.add_argument("--no-peft", action="store_true")
    options = parser.parse_args()
    if options.ranks:
        _compare_ranks(*options.ranks, options.folder, options.choices, peft=not options.no_peft)
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


def _compare_ranks(base: Path, dora: Path, folder: Path, choices: Sequence[str], *, peft: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    out, optima = folder / "out", _optima(base, dora, folder / "optima.pt")
    for value in choices:
        option = "--tolerance" if "." in value else "--rank"
        shutil.rmtree(out, ignore_errors=True)
        ours = mapconv("upgrade", dora, "--base", base, "-o", out, option, value, "--json", "-q")
        line = f"{option + ' ' + value:16s} {ours.seconds:6.1f} s ({ours.cpu:.1f} s of processor)"
        if peft:
            # PEFT's threshold is the energy that is kept.
            theirs = python(PEFT, base, dora, value if option == "--rank" else str(1 - float(value) ** 2))
            line += f", PEFT {theirs.seconds:6.1f} s ({theirs.cpu:.1f} s) = {theirs.seconds / ours.seconds:.1f} x"
        modules = json.loads(ours.output)["modules"]
        excess = max(_excess(module, optima[module["path"]]) for module in modules)
        line += f"; over the optimum at worst {100 * excess:+.3f} %"
        if option == "--tolerance":
            line += _against_least(modules, optima, float(value))
        print(line, flush=True)


def _optima(base: Path, dora: Path, kept: Path) -> dict[str, torch.Tensor]:
    """By module, the least ε at each rank; kept in a file, as they take a minute or more."""
    if not kept.exists():
        with safe_open(dora / "adapter_model.safetensors", "pt") as file:
            keys = [key for key in file.keys() if key.endswith(".lora_A.weight")]  # noqa: SIM118
        paths = [key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for key in keys]
        torch.save({path: _optimum(base, dora, path) for path in paths}, kept)
    return torch.load(kept)


def _optimum(base: Path, dora: Path, path: str) -> torch.Tensor:
    """The least ε at each rank 0 … min(n, m) over a grid of gains, of which there are valleys at high ranks."""
    config = json.loads((dora / "adapter_config.json").read_text())
    with safe_open(dora / "adapter_model.safetensors", "pt") as file:
        A, B, m = (
            file.get_tensor(f"base_model.model.{path}.{part}").double()
            for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
        )
    W = _base_weight(base, f"{path}.weight").double()
    V = W + config["lora_alpha"] / config["r"] * (B @ A)
    S = (m / V.norm(dim=1))[:, None] * V - W
    middle = float((S * W).sum() / W.square().sum())
    reach = 2 * float(S.norm() / W.norm())
    gains = [middle + reach * x * abs(x) for x in torch.linspace(-1, 1, GAINS).tolist()]
    return (torch.stack([_tails(S - gain * W) for gain in gains]).amin(0).clamp_min(0) / S.square().sum()).sqrt()


def _tails(E: torch.Tensor) -> torch.Tensor:
    """‖E − [E]_k‖² for k = 0 … min(n, m)."""
    gram = E.T @ E if E.shape[0] > E.shape[1] else E @ E.T
    values = torch.linalg.eigvalsh(gram).clamp_min(0)
    return torch.cat([values.new_zeros(1), values.cumsum(0)]).flip(0)


def _excess(module: dict, optimum: torch.Tensor) -> float:
    best = float(optimum[module["rank"]])
    # At full rank the optimum is zero, and what is left is rounding of the factors as stored.
    return module["error"] / best - 1 if best > 1e-6 else module["error"]


def _against_least(modules: list[dict], optima: dict[str, torch.Tensor], tolerance: float) -> str:
    """How a tolerance was met: by ε as stored, and by the least rank that could."""
    most = max(module["rank"] for module in modules)
    missed = sum(module["error"] > tolerance and module["rank"] < most for module in modules)
    least = {path: int((optimum <= tolerance).nonzero()[0]) for path, optimum in optima.items()}
    above = max(module["rank"] - min(least[module["path"]], most) for module in modules)
    at_most = sum(module["rank"] == most for module in modules)
    return (
        f"; {missed} modules miss the tolerance below rank {most}, {at_most} are at it; "
        f"ranks are at most {above} above the least"
    )


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
            tails = [float(_tails(T - (1 + step / 1000) * W)[A.shape[0]]) for step in range(0, 13, 2)]
            best = (min(tails) / float((T - W).square().sum())) ** 0.5
            error = modules[path]["error"]
            print(f"{path:32s} ε {error:.5f}, full SVD {best:.5f}: {100 * (error / best - 1):+.3f} %")


def _base_weight(base: Path, name: str) -> torch.Tensor:
    index = base / "model.safetensors.index.json"
    shard = json.loads(index.read_text())["weight_map"][name] if index.exists() else "model.safetensors"
    with safe_open(base / shard, "pt") as file:
        return file.get_tensor(name)


if __name__ == "__main__":
    main()
