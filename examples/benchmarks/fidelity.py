"""How close each step of mapconv brings a MAP adapter to the DoRA it was made from, on text that none of them saw.

    python examples/benchmarks/fidelity.py WORK [--steps 25]

WORK is a folder that ``smollm2_dora.py`` made: base, dora, train.txt, held-out.txt. One line for each of: the DoRA
with its magnitude dropped (a plain LoRA, which is what converters without a refit make), the optimum in weights
(``mapconv upgrade``), the optimum in outputs (``--data train.txt``), then calibrations of that by ``calibrate``:
the scalars alone, and all. A step is four sequences of 128 tokens; all are measured on the same 32 sequences of 128
tokens of held-out.txt, which no step before has seen. Seconds are those of this machine.
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
from mapconv.data import Dataset, read_blocks, read_rows
from mapconv.fidelity.metrics import ModelNumbers
from mapconv.placement.adapters import place_adapter
from mapconv.runtime.models import load_tokenizer
from mapconv.training.evaluation import Evaluator
from mapconv.training.models import SOURCE, WRITTEN, CalibrationModels
from mapconv.training.processes import Processes

LENGTH, BATCH, SEQUENCES, MEASURED = 128, 4, 16, 32


def drop_magnitude(dora: Path, out: Path) -> None:
    """The DoRA's factors as a plain LoRA."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    config = json.loads((dora / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps(config | {"use_dora": False}))
    tensors = load_file(dora / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "magnitude" not in name}
    save_file(kept, out / "adapter_model.safetensors", metadata={"format": "pt"})


class Measure:
    """The models on the held-out text."""

    def __init__(self, work: Path, closed_form: Path, held_out: Dataset) -> None:
        source = place_adapter(work / "dora", work / "base")
        self._models = CalibrationModels(
            source, closed_form, train="scalars", device=torch.device("cpu"), classes=None, padding=None,
            check_base=True, allow_pickle=False,
        )  # fmt: skip
        self._evaluator = Evaluator(self._models, held_out, "distill", BATCH, causal=True)

    def model(self, name: str | None) -> ModelNumbers:
        functions = {"model": lambda batch: self._models.logits(name, batch)}
        return self._evaluator.numbers(functions, Processes(torch.device("cpu")).device)[0]["model"]

    def folder(self, path: Path) -> ModelNumbers:
        with self._models.attached(path):
            return self.model(WRITTEN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--out", type=Path, help="Where the adapters are written. Default: WORK/fidelity.")
    arguments = parser.parse_args()
    work, out = arguments.work, arguments.out or arguments.work / "fidelity"
    out.mkdir(parents=True, exist_ok=True)
    settings = {
        "against": work / "dora", "data": work / "train.txt", "base": work / "base", "steps": arguments.steps,
        "batch_size": BATCH, "sequence_length": LENGTH, "held_out": SEQUENCES, "force": True,
    }  # fmt: skip
    makers: dict[str, Callable[[Path], object]] = {
        "magnitude dropped": lambda folder: drop_magnitude(work / "dora", folder),
        "weight space": lambda folder: mapconv.upgrade(work / "dora", folder, base=work / "base", force=True),
        "activation-aware": lambda folder: mapconv.upgrade(
            work / "dora", folder, base=work / "base", data=work / "train.txt", force=True
        ),
        f"+ scalars, {arguments.steps} steps": lambda folder: mapconv.calibrate(
            out / "activation-aware", out=folder, train="scalars", **settings
        ),
        f"+ all, {arguments.steps} steps": lambda folder: mapconv.calibrate(
            out / "activation-aware", out=folder, train="all", **settings
        ),
    }
    seconds = {}
    folders = {name: out / name.partition(",")[0].replace("+ ", "").replace(" ", "-") for name in makers}
    for name, make in makers.items():
        started = time.perf_counter()
        make(folders[name])
        seconds[name] = time.perf_counter() - started
    blocks = read_blocks(
        read_rows(work / "held-out.txt"), load_tokenizer(work / "base"), samples=MEASURED, length=LENGTH
    )
    measure = Measure(work, folders["weight space"], blocks)
    print(f"{'':24}{'KL(source ‖ model)':>20}{'top-1':>10}{'perplexity':>12}{'seconds':>9}")
    rows = {"base": measure.model(None), "source (DoRA)": measure.model(SOURCE)}
    rows |= {name: measure.folder(folder) for name, folder in folders.items()}
    for name, numbers in rows.items():
        spent = f"{seconds[name]:9.1f}" if name in seconds else ""
        print(f"{name:24}{numbers.kl:20.3e}{numbers.top1_agreement:10.2%}{numbers.perplexity:12.4f}{spent}")


if __name__ == "__main__":
    main()
