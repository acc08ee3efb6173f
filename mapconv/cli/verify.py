"""``mapconv verify``."""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import TYPE_CHECKING

from mapconv.cli.options import Chosen, command
from mapconv.cli.output import EPSILON, explain, notes, print_json, print_table, show
from mapconv.cli.served import show_served
from mapconv.cli.startup import starting
from mapconv.hub.reference import shown
from mapconv.options.commands import VERIFY
from mapconv.wording import fixed, percent, small

if TYPE_CHECKING:
    from mapconv.commands.verify import VerifyReport


@command(VERIFY, "Measure how far a result is from its source.")
def verify(chosen: Chosen) -> None:
    """Compare RESULT (a MAP folder or a merged model) with the adapter it was made from.

    Both run as functions on the same text, using stock PEFT for the source, and every weight is compared as well.
    """
    with starting([chosen["result"], chosen["against"]], chosen["base"], whole_base=True, quiet=chosen["quiet"]):
        from mapconv.commands.verify import verify
        from mapconv.errors import FidelityError

    report, result, max_kl = verify(**chosen.arguments), chosen["result"], chosen["max_kl"]
    if chosen["as_json"]:
        print_json(report.to_dict())
    else:
        _report(report)
    notes(report.notes)
    if max_kl is not None and report.kl is None:
        raise FidelityError(f"{result}: --max-kl was given, but the model could not be run.")
    if max_kl is not None and not report.kl <= max_kl:  # a NaN is over any limit
        raise FidelityError(f"{result}: KL {report.kl:.3g} to the source is over --max-kl {max_kl:g}.")


def _report(report: VerifyReport) -> None:
    where = f"{shown(report.result)} against {shown(report.source)}"
    show(f"{where}, {report.tokens:,} positions, {report.seconds:.1f} s")
    show()
    if report.served is not None:
        show_served(report.served)
        show()
    elif report.kl is not None:
        _functions(report)
    if report.kl is not None:
        show(f"  top-1 agreement               {percent(report.top1_agreement)}")
        show(f"  largest KL at one position    {small(report.kl_largest)}")
        show(f"  largest logit difference      {small(report.largest_logit_difference)}")
        show()
    explain(EPSILON)
    groups = defaultdict(list)
    for module in report.modules:
        groups[module.path.rpartition(".")[2]].append(module.error)
    print_table(
        ["weights of", "modules", "ε worst", "ε median"],
        [
            [name, str(len(errors)), small(max(errors)), small(statistics.median(errors))]
            for name, errors in groups.items()
        ],
    )


def _functions(report: VerifyReport) -> None:
    rows = [
        ("base", report.perplexity_base, report.kl_base),
        ("source", report.perplexity_source, 0.0),
        ("result", report.perplexity_result, report.kl),
    ]
    print_table(
        ["model", "perplexity", "KL(source ‖ model)"],
        [[name, fixed(perplexity), small(kl)] for name, perplexity, kl in rows],
    )
    show()
