"""The report of a catalog run as a page."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from mapconv.reporting.charts import histogram_figure, share_table
from mapconv.reporting.datatable import Column, DataTable, linked, numeric
from mapconv.reporting.ledger import Entry, Ledger, href
from mapconv.reporting.markup import Html, element, table
from mapconv.reporting.numbers import NONE, count, finite_or_none, seconds, size, small
from mapconv.reporting.page import build_page, section, tiles

_REPORT_FILE = "report.html"
#: Entries of a list of extremes, failures shown of one kind, and names of one group.
_EXTREMES, _FAILURES, _GROUPS = 10, 40, 12
#: (key, title, about, value of an entry, spelling) of each distribution.
DISTRIBUTIONS: tuple[tuple[str, str, str, Callable[[Entry], float | None], Callable[[float | None], str]], ...] = (
    ("worst_error", "ε, worst module", "Lost of an update in an entry's worst module", lambda e: e.worst_error, small),
    ("median_error", "ε, median module", "The same in its median module", lambda e: e.median_error, small),
    ("kl", "KL to the source", "Mean KL(source ‖ result) in nats", lambda e: e.kl, small),
    ("seconds", "seconds", "Time that an entry took", lambda e: e.seconds, seconds),
    ("nbytes", "bytes", "Size of what was written", lambda e: e.nbytes, size),
)  # fmt: skip


def catalog_page(ledger: Ledger, out: Path) -> str:
    """``out`` is where the page will stand: its links are relative to that."""
    links = {entry.name: _link(ledger, entry, out) for entry in ledger.done}
    entries = _entry_table(ledger, links)
    lead = element("p", f"A catalog of {len(ledger.entries):,} adapters, upgraded to MAP form by mapconv.")
    sections = [
        section("summary", "Summary", tiles(list(_tiles(ledger))), _unreadable(ledger)),
        section("groups", "What was converted", element("div", *_groups(ledger), class_="pair")),
        section("distributions", "Distributions", element("div", *_histograms(ledger), class_="pair")),
        section("failures", "Failures", *_failures(ledger)),
        section("extremes", "Look at these first", element("div", *_extremes(ledger, links), class_="pair")),
        section("entries", "All entries", entries.place()),
    ]
    return build_page(ledger.folder.resolve().name, lead, sections, [entries])


def _link(ledger: Ledger, entry: Entry, out: Path) -> str | None:
    folder = ledger.inside(entry)
    if folder is None:
        return None
    page = folder / _REPORT_FILE
    return href(page if page.is_file() and not page.is_symlink() else folder, out)


def _tiles(ledger: Ledger) -> Iterable[tuple[str, str, str]]:
    done = ledger.done
    yield "entries", f"{len(ledger.entries):,}", f"on {len({entry.base for entry in ledger.entries}):,} bases"
    yield "done", f"{len(done):,}", _percent(len(done), len(ledger.entries))
    yield (
        "failed",
        f"{len(ledger.failed):,}",
        f"{len({e.kind for e in ledger.failed}):,} kinds of error" if ledger.failed else "",
    )
    errors, divergences = _known(done, lambda e: e.worst_error), _known(done, lambda e: e.kl)
    if errors:
        yield "worst ε, median", small(statistics.median(errors)), f"largest {small(max(errors))}"
    if divergences:
        yield "KL, median", small(statistics.median(divergences)), f"largest {small(max(divergences))}"
    yield (
        "written",
        size(math.fsum(_known(done, lambda e: e.nbytes))),
        (f"{count(math.fsum(_known(done, lambda e: e.parameters)))} parameters"),
    )
    yield "work", seconds(math.fsum(_known(ledger.entries, lambda e: e.seconds))), "summed over the entries"


def _unreadable(ledger: Ledger) -> Html | None:
    if not ledger.unreadable:
        return None
    lines = "1 line of the ledger is" if ledger.unreadable == 1 else f"{ledger.unreadable:,} lines of the ledger are"
    return element(
        "p", f"{lines} no entry and not counted: a run that was killed leaves a torn last line.", class_="note"
    )


def _groups(ledger: Ledger) -> Iterable[Html]:
    for title, name_of in (("method", lambda e: e.method), ("base", lambda e: e.base)):
        counts: dict[str, Counter[bool]] = defaultdict(Counter)
        for entry in ledger.entries:
            counts[name_of(entry)][entry.done] += 1
        ordered = sorted(counts.items(), key=lambda item: (-item[1].total(), item[0]))
        rows = [(name, found[True], found[False]) for name, found in ordered[:_GROUPS]]
        if rest := ordered[_GROUPS:]:
            done, failed = (sum(found[status] for _, found in rest) for status in (True, False))
            rows.append((f"{len(rest):,} others", done, failed))
        yield element("div", share_table(title, rows), class_="card")


def _histograms(ledger: Ledger) -> Iterable[Html]:
    for key, title, about, value, spell in DISTRIBUTIONS:
        values = [value(entry) for entry in ledger.done]
        if _known(ledger.done, value):
            yield histogram_figure(key, title, about, values, spell, "entries")


def _failures(ledger: Ledger) -> Iterable[Html]:
    if not ledger.failed:
        yield element("p", "None.")
        return
    kinds: dict[str, list[Entry]] = defaultdict(list)
    for entry in ledger.failed:
        kinds[entry.kind].append(entry)
    for number, (kind, entries) in enumerate(sorted(kinds.items(), key=lambda item: (-len(item[1]), item[0]))):
        name = kind or "no kind recorded"
        items = [
            element("li", element("b", e.name), " ", e.error or "no sentence recorded") for e in entries[:_FAILURES]
        ]
        rest = len(entries) - _FAILURES
        more = element(
            "button", f"Show all {len(entries):,} in the table", type="button", data_find="entries", data_column="kind",
            data_value=kind,
        )  # fmt: skip
        yield element(
            "details",
            element("summary", element("b", name), " ", element("span", f"{len(entries):,}", class_="badge")),
            element("ul", *items),
            element("p", f"and {rest:,} more. " if rest > 0 else "", more),
            class_="card failure",
            open=number == 0,
        )


def _extremes(ledger: Ledger, links: dict[str, str | None]) -> Iterable[Html]:
    for title, head, value, spell in (
        ("Slowest", "time", lambda e: e.seconds, seconds),
        ("Least faithful, by KL", "KL", lambda e: e.kl, small),
        ("Least faithful, by ε", "worst ε", lambda e: e.worst_error, small),
    ):
        found = [entry for entry in ledger.done if finite_or_none(value(entry)) is not None]
        found.sort(key=lambda entry: (-value(entry), entry.name))
        if found:
            rows = [(_anchor(e.name, links.get(e.name)), e.method or NONE, spell(value(e))) for e in found[:_EXTREMES]]
            yield element("div", table(("entry", "method", head), rows, caption=title), class_="card")


def _anchor(name: str, link: str | None) -> object:
    return name if link is None else element("a", name, href=link)


def _entry_table(ledger: Ledger, links: dict[str, str | None]) -> DataTable:
    columns = [
        Column("entry", "entry", width=28),
        Column("status", "status", "choice", 9),
        Column("method", "method", "choice", 9),
        Column("base", "base", "choice", 25),
        Column("rank", "rank", "number", 7),
        Column("worst", "worst ε", "number", 10),
        Column("kl", "KL", "number", 10),
        Column("seconds", "time", "number", 11),
        Column("nbytes", "size", "number", 12),
        Column("kind", "error", "choice", 17),
        Column("output", "output", width=24),
        *(
            Column(key, label, kind, hidden=True)
            for key, label, kind in (
                ("error", "error sentence", "text"), ("median", "median ε", "number"), ("modules", "modules", "number"),
                ("parameters", "parameters", "number"), ("attempts", "attempts", "number"),
                ("source", "source", "text"), ("finished", "finished", "text"), ("fingerprint", "fingerprint", "text"),
            )
        ),
    ]  # fmt: skip
    rows = [
        [
            entry.name,
            entry.status,
            entry.method,
            entry.base,
            numeric(entry.rank, count),
            numeric(entry.worst_error, small),
            numeric(entry.kl, small),
            numeric(entry.seconds, seconds),
            numeric(entry.nbytes, size),
            entry.kind,
            linked(entry.output, links.get(entry.name)),
            entry.error,
            numeric(entry.median_error, small),
            numeric(entry.modules, count),
            numeric(entry.parameters, count),
            numeric(entry.attempts, count),
            entry.source,
            entry.finished,
            entry.fingerprint,
        ]
        for entry in ledger.entries
    ]
    return DataTable("entries", "entries", columns, rows)


def _known(entries: Sequence[Entry], value: Callable[[Entry], float | None]) -> list[float]:
    return [found for entry in entries if (found := finite_or_none(value(entry))) is not None]


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else ""
