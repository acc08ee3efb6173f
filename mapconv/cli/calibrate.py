"""``mapconv calibrate``."""

from __future__ import annotations

import os
import statistics
import sys
from collections import defaultdict
from typing import TYPE_CHECKING

from mapconv.cli.options import Chosen, command
from mapconv.cli.output import EPSILON, SCALARS, explain, notes, print_json, print_table, show
from mapconv.cli.startup import starting
from mapconv.hub.reference import shown
from mapconv.options.commands import CALIBRATE
from mapconv.wording import fixed, percent, small, spread

if TYPE_CHECKING:
    from mapconv.adapter import MapModule
    from mapconv.training.calibration import CalibrationReport

#: The exit status of a run that Ctrl-C ended, as shells have it.
INTERRUPTED = 130


@command(CALIBRATE, "Train a MAP adapter towards its source, or on a task.")
def calibrate(chosen: Chosen) -> None:
    """Train the MAP adapter in MAPDIR on FILE, and write the state that does best on its held-out part.

    The unchanged adapter is a candidate too, so the result is never worse. Ctrl-C writes the best state so far.

    Several GPUs: accelerate launch -m mapconv calibrate …
    """
    if os.environ.get("RANK", "0") != "0":
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - the first process speaks for all, to the end of this one
    with starting([chosen["adapter"], chosen["against"]], chosen["base"], whole_base=True, quiet=chosen["quiet"]):
        from mapconv.commands.calibrate import calibrate

    result = calibrate(**chosen.arguments)
    if result is None:
        return
    if chosen["as_json"]:
        print_json(result.to_dict())
    else:
        show(f"{shown(result.adapter)} → {result.out}, against {shown(result.source)}")
        show()
        explain(SCALARS, EPSILON)
        print_calibration(result.report)
    notes(result.report.notes)
    if result.report.interrupted:
        sys.exit(INTERRUPTED)


def print_calibration(report: CalibrationReport) -> None:
    """The whole model's numbers, the modules' by type, and what was trained."""
    print_table(
        ["model", "perplexity", "KL(source ‖ model)", "top-1 as the source"],
        [
            [
                name,
                fixed(numbers.perplexity),
                small(numbers.kl),
                percent(numbers.top1_agreement),
            ]
            for name, numbers in report.models.items()
        ],
    )
    show()
    groups = defaultdict(list)
    for module in report.modules:
        groups[module.path.rpartition(".")[2]].append(module)
    print_table(
        ["target", "modules", "α after/before", "β after/before", "ε median before", "after"],
        [_row(name, modules) for name, modules in groups.items()],
    )
    show()
    show(
        f"  {report.trained_parameters:,} numbers trained for {report.steps} steps on {report.tokens:,} tokens in "
        f"{report.seconds:.1f} s; step {report.best_step} is the best of the {len(report.history)} that were measured"
    )
    sizes = dict(report.update_sizes)
    if sizes:
        show(
            f"  the update is {percent(sizes[report.best_step])} of ‖W0‖ at the median weight, and was "
            f"{percent(sizes[min(sizes)])} before"
        )
    show(
        f"  measured on the written files at {report.held_out_positions:,} positions of "
        f"{report.held_out_sequences} held-out sequences"
    )


def _row(name: str, modules: list[MapModule]) -> list[str]:
    return [
        name,
        str(len(modules)),
        spread([_ratio(module.alpha, module.alpha_before) for module in modules], fixed),
        spread([_ratio(module.beta, module.beta_before) for module in modules], fixed),
        small(statistics.median(module.error_before for module in modules if module.error_before is not None)),
        small(statistics.median(module.measured_error for module in modules)),
    ]


def _ratio(after: float, before: float | None) -> float:
    return after / before if before else 1.0
