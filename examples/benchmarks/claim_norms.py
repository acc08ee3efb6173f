"""How far training moved the weights of claim.py: ‖W' − W0‖/‖W0‖ of every adapted weight, and a plot over the steps."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def movements(model: nn.Module) -> list[float]:
    """‖W' − W0‖/‖W0‖ of every weight that an adapter of PEFT's (LoRA, DoRA) or of ``mapconv.nn`` changes."""
    return [float((merged - base).norm() / base.norm()) for base, merged in _weights(model)]


@torch.no_grad()
def shares(model: nn.Module) -> list[float]:
    """|β|/‖W0‖ of every weight with a low-rank update in MAP form: what MAP's own scalar says of the same."""
    from mapconv.nn import map_layers

    updates = [layer.update(layer.active) for layer in map_layers(model).values() if layer.active is not None]
    return [abs(float(update.relative_beta)) for update in updates if update.direction == "low-rank"]


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3


def _weights(model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """(W0, W') of every adapted linear layer."""
    from mapconv.nn import map_layers

    for layer in map_layers(model).values():
        base, update = layer.base_layer.weight, layer.update(layer.active)
        a, b = layer.gains(layer.active)
        if update.direction == "dora":
            scaled = update.scales(layer.base_layer, layer.path)[:, None] * (base + update.B @ update.A)
            yield base, (a - b) * base + b * scaled
        else:
            yield base, a * base + b * (update.B @ update.A)
    for layer in model.modules():
        if getattr(layer, "lora_A", None):
            base, delta = layer.base_layer.weight, layer.get_delta_weight("default")
            merged = base + delta
            if layer.use_dora.get("default"):
                magnitude = layer.lora_magnitude_vector["default"].weight
                merged = merged * (magnitude / merged.norm(dim=1))[:, None]
            yield base, merged


def plot(task: str, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the median of ‖W' − W0‖/‖W0‖ over the steps, a line for each run and a color for each method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    methods = list(dict.fromkeys(row["method"] for row in rows if row.get("movement")))
    for number, method in enumerate(methods):
        for i, row in enumerate(row for row in rows if row["method"] == method):
            steps, medians = zip(*((step, values[1]) for step, values in row["movement"]), strict=True)
            axes.plot(steps, medians, color=f"C{number}", linewidth=1, label=None if i else method)
            if row.get("share"):
                steps, medians = zip(*((step, values[1]) for step, values in row["share"]), strict=True)
                axes.plot(steps, medians, color=f"C{number}", linewidth=1, linestyle=":")
    axes.set(title=f"{task}: how far the weights move (dotted: β)", xlabel="step", ylabel="‖W' − W0‖ / ‖W0‖, median")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=150)
