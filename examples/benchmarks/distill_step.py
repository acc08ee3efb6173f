"""What a step of ``mapconv calibrate`` costs beside its parts, and the share of a run that is held-out evaluation.

python examples/benchmarks/distill_step.py BASE LORA TEXT [--steps 25] [--rounds 3] [--train all]

A step towards the source is its forward pass, and a training step of the MAP adapter. The peer is the same two by
stock PEFT: the LoRA's forward pass, and a training step of a new LoRA of the same rank on the tokens themselves. Both
take turns in one process; CPU seconds. The share is that of the evaluations during the run and of the four models at
its end, in the time of all steps and evaluations.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("lora", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--train", choices=("scalars", "all"), default="all")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trainer, evaluator = calibration(options, Path(folder) / "map")
    batch = trainer._data.batch(trainer.recipe.batch(0, len(trainer._data)))["input_ids"]
    forward, train = peers(options)
    ours, theirs = [], []
    for step in range(options.rounds):
        ours.append(seconds(lambda step=step: (trainer._gradient(step), trainer._optimizer.step())))
        theirs.append((seconds(lambda: forward(batch)), seconds(lambda: train(batch))))
    ratio = statistics.median(own / sum(other) for own, other in zip(ours, theirs, strict=True))
    step, parts = statistics.median(ours), [statistics.median(column) for column in zip(*theirs, strict=True)]
    print(f"{options.base}: {' × '.join(map(str, batch.shape))} tokens, CPU s, median of {options.rounds} rounds")
    print(f"step of calibrate {step:.2f}; source forward {parts[0]:.2f} + PEFT LoRA step {parts[1]:.2f}: × {ratio:.3f}")
    once = seconds(lambda: evaluator.objective(trainer._processes))
    # Of the four models at the end each is run once, and in training two at each evaluation.
    end, count = 2 * once, 1 + options.steps // trainer.recipe.evaluate_every
    share = (count * once + end) / (count * once + end + options.steps * step)
    evaluations = f"{count} evaluations of {len(evaluator._data)} sequences, {once:.2f} each"
    print(f"{options.steps} steps: {evaluations}, and {end:.2f} at the end: {share:.1%} of the run")


def calibration(options: argparse.Namespace, folder: Path) -> tuple[Any, Any]:
    """The trainer and the evaluator of a run, as the command makes them."""
    import mapconv
    from mapconv.data import read_rows
    from mapconv.placement.adapters import place_adapter
    from mapconv.training.calibration import CalibrationOptions
    from mapconv.training.data import read_training_data
    from mapconv.training.evaluation import Evaluator
    from mapconv.training.loop import Trainer
    from mapconv.training.models import CalibrationModels
    from mapconv.training.processes import Processes

    mapconv.upgrade(options.lora, folder, base=options.base)
    recipe = CalibrationOptions(options.steps, options.train).recipe
    source = place_adapter(options.lora, options.base)
    rows = read_rows(options.text)
    trained = options.steps * recipe.batch_size
    data = read_training_data(rows, folder, source, length=recipe.sequence_length, trained=trained)
    processes = Processes(torch.device("cpu"))
    settings = {"classes": None, "padding": None, "check_base": True, "allow_pickle": False}
    models = CalibrationModels(
        source, source, folder, train=recipe.train, hold_gain=False, device=processes.device, **settings
    )
    evaluator = Evaluator(models, data.held_out, recipe.objective, recipe.batch_size, causal=True)
    return Trainer(recipe, models, data.train, evaluator, processes), evaluator


def peers(options: argparse.Namespace) -> tuple[Callable[[torch.Tensor], Any], Callable[[torch.Tensor], Any]]:
    """The source's forward pass and a training step, by stock PEFT."""
    from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32)

    source = PeftModel.from_pretrained(base(), str(options.lora)).eval()
    rank = PeftConfig.from_pretrained(str(options.lora)).r
    trained = get_peft_model(base(), LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")).train()
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-4, fused=True)

    @torch.no_grad()
    def forward(tokens: torch.Tensor) -> None:
        source(input_ids=tokens)

    def train(tokens: torch.Tensor) -> None:
        trained(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return forward, train


def seconds(work: Callable[[], Any]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


if __name__ == "__main__":
    main()
