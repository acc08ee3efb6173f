"""What an adapter is worth on another base, as a table: of ``mapconv rebase`` and ``mapconv verify``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mapconv.cli.output import print_table, show
from mapconv.wording import fixed, percent, small

if TYPE_CHECKING:
    from mapconv.fidelity.served import ServedNumbers


def show_served(numbers: ServedNumbers) -> None:
    """The verdict first: what the adapter is worth on the other base, before and after."""
    show(f"  against the source on its own base, {numbers.positions:,} unseen positions:")
    show()
    named = [
        ("source on its own base", numbers.source),
        ("other base alone", numbers.alone),
        ("source put on it as it is", numbers.as_is),
        ("rebased", numbers.rebased),
    ]
    print_table(
        ["model", "KL(source ‖ model)", "same top token", "perplexity"],
        [
            [
                name,
                small(model.kl),
                percent(model.top1_agreement),
                fixed(model.perplexity),
            ]
            for name, model in named
        ],
    )
    show()
    if numbers.as_is.kl and numbers.rebased.kl:
        ratio, word = numbers.as_is.kl / numbers.rebased.kl, "closer to"
        if ratio < 1:
            ratio, word = 1 / ratio, "further from"
        show(f"  {ratio:.1f} × {word} the source than the source as it is")
