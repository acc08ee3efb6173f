"""What claim.py concludes from its runs: the learning rate to try next, means and deviations, paired differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

#: Student's t at 95 % (two-sided), by degrees of freedom: three seeds leave two.
T_95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


def next_learning_rate(tried: Mapping[float, float], grid: Sequence[float], ladder: Sequence[float]) -> float | None:
    """The learning rate to try next, or None where the best of ``tried`` (rate → validation loss) is settled.

    First the grid, then one rung of the ladder further for as long as the best is at an edge of what was tried. A run
    that diverged counts as infinitely bad.
    """
    for rate in grid:
        if rate not in tried:
            return rate
    place = ladder.index(best_learning_rate(tried))
    neighbours = [ladder[i] for i in (place - 1, place + 1) if 0 <= i < len(ladder)]
    return next((rate for rate in neighbours if rate not in tried), None)


def best_learning_rate(tried: Mapping[float, float]) -> float:
    return min(sorted(tried), key=lambda rate: tried[rate] if math.isfinite(tried[rate]) else math.inf)


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and the sample's standard deviation (n − 1); the deviation of one value is NaN."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def paired(runs: Sequence[dict[str, Any]], first: str, second: str, score: str) -> dict[str, float] | None:
    """First − second over the seeds that both have: mean, deviation, 95 % half width, seeds; None under two."""
    values = {
        method: {run["seed"]: run["test"][score] for run in runs if run["method"] == method}
        for method in (first, second)
    }
    seeds = sorted(values[first].keys() & values[second].keys())
    if len(seeds) < 2:
        return None
    mean, deviation = mean_and_deviation([values[first][seed] - values[second][seed] for seed in seeds])
    width = T_95[len(seeds) - 1] * deviation / math.sqrt(len(seeds))
    return {"mean": mean, "deviation": deviation, "width": width, "seeds": len(seeds)}


def verdict(difference: Mapping[str, float], score: str) -> str:
    """What a paired difference says, against the spread of that difference over the seeds."""
    side = "better" if (difference["mean"] < 0) == (score == "loss") else "worse"
    size = abs(difference["mean"]) / difference["deviation"] if difference["deviation"] else math.inf
    place = "beyond" if abs(difference["mean"]) > difference["width"] else "within"
    return f"{side} by {size:.1f} deviations, {place} the 95 % interval"


def markdown(task: str, runs: Sequence[dict[str, Any]], tuned: Mapping[str, float], methods: Sequence[str]) -> str:
    """The tables of one task: a row for each method (the base first), then the paired differences."""
    tested = [run for run in runs if "test" in run]
    scores = list(tested[0]["test"]) if tested else []
    names = [f"test {score}" + (" (%)" if score == "accuracy" else "") for score in scores]
    lines = [_row(task, "trainable", "learning rate", *names, "CPU s a step"), _row(*["---"] * (4 + len(names)))]
    for method in methods:
        own = [run for run in tested if run["method"] == method]
        if not own:
            continue
        cells = [_plus_minus(*mean_and_deviation([run["test"][score] for run in own]), score) for score in scores]
        rate = f"{tuned[method]:g}" if method in tuned else "–"
        seconds = statistics.median(run["seconds"] for run in own)
        time = f"{seconds:.2f}" if seconds else "–"
        lines.append(_row(f"{method} ({len(own)} seeds)", f"{own[0]['parameters']:,}", rate, *cells, time))
    lines += [
        "",
        _row("paired by seed", *names, "against the spread over the seeds"),
        _row(*["---"] * (2 + len(names))),
    ]
    adapted = [method for method in methods if method in tuned]
    for second, first in ((a, b) for i, a in enumerate(adapted) for b in adapted[i + 1 :]):
        pairs = [(difference, score) for score in scores if (difference := paired(tested, first, second, score))]
        if pairs:
            cells = [_plus_minus(d["mean"], d["deviation"], score, sign="+") for d, score in pairs]
            words = [f"{score} {verdict(d, score)}" for d, score in pairs]
            lines.append(_row(f"{first} − {second}", *cells, "; ".join(words)))
    return "\n".join(lines)


def _plus_minus(mean: float, deviation: float, score: str, sign: str = "") -> str:
    digits = 2 if score == "accuracy" else 4
    return f"{mean:{sign}.{digits}f}" + ("" if math.isnan(deviation) else f" ± {deviation:.{digits}f}")


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
