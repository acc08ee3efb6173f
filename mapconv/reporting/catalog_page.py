"""The report of a catalog run as a page."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from mapconv.reporting.charts import histogram_figure, share_table
from mapconv.reporting.datatable import Column, DataTable, linked, numeric
from mapconv.reporting.ledger import Entry, Ledger, href
from mapconv.reporting.markup import Html, element, table
from mapconv.reporting.numbers import finite_or_none
from mapconv.reporting.page import build_page, section, tiles
from mapconv.wording import NONE, count, seconds, size, small

_REPORT_FILE = "report.html"
#: Entries of a list of extremes, failures shown of one kind, and names of one group.
_EXTREMES, _FAILURES, _GROUPS = 10, 40, 12
#: (key, title, about, value of an entry, spelling) of each distribution.
DISTRIBUTIONS: tuple[tuple[str, str, str, Callable[[Entry], float | None], Callable[[float | None], str]], ...] = (
    ("worst_error", "ε, worst module", "Share of an update lost in the worst module", lambda e: e.worst_error, small),
    ("median_error", "ε, median module", "The same in its median module", lambda e: e.median_error, small),
    ("kl", "KL to the source", "Mean KL(source ‖ result) in nats", lambda e: e.kl, small),
    ("seconds", "seconds", "Time that an entry took", lambda e: e.seconds, seconds),
    ("nbytes", "bytes", "Size of what was written", lambda e: e.nbytes, size),
)  # fmt: skip


def catalog_page(ledger: Ledger, out: Path) -> str:
    """``out`` is where the page will stand: its links are relative to that."""
    here = out.resolve().parent
    links = {entry.name: _link(ledger, entry, here) for entry in ledger.done}
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


def _link(ledger: Ledger, entry: Entry, here: Path) -> str | None:
    folder = ledger.inside(entry)
    if folder is None:
        return None
    page = folder / _REPORT_FILE
    return href(page if page.is_file() and not page.is_symlink() else folder, here)


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
        size(sum(_known(done, lambda e: e.nbytes))),
        (f"{count(sum(_known(done, lambda e: e.parameters)))} parameters"),
    )
    yield "work", seconds(sum(_known(ledger.entries, lambda e: e.seconds))), "summed over the entries"


def _unreadable(ledger: Ledger) -> Html | None:
    if not ledger.unreadable:
        return None
    lines = "1 line of the ledger was" if ledger.unreadable == 1 else f"{ledger.unreadable:,} lines of the ledger were"
    return element("p", f"{lines} not readable and not counted.", class_="note")


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
        Column("entry", "entry", lambda e: e.name, width=28),
        Column("status", "status", lambda e: e.status, "choice", 9),
        Column("method", "method", lambda e: e.method, "choice", 9),
        Column("base", "base", lambda e: e.base, "choice", 25),
        Column("rank", "rank", lambda e: numeric(e.rank, count), "number", 7),
        Column("worst_error", "worst ε", lambda e: numeric(e.worst_error, small), "number", 10),
        Column("kl", "KL", lambda e: numeric(e.kl, small), "number", 10),
        Column("seconds", "time", lambda e: numeric(e.seconds, seconds), "number", 11),
        Column("nbytes", "size", lambda e: numeric(e.nbytes, size), "number", 12),
        Column("kind", "error", lambda e: e.kind, "choice", 17),
        Column("output", "output", lambda e: linked(e.output, links.get(e.name)), width=24),
        Column("sentence", "error sentence", lambda e: e.error, hidden=True),
        Column("stage", "failed while", lambda e: e.stage, hidden=True),
        Column("median_error", "median ε", lambda e: numeric(e.median_error, small), "number", hidden=True),
        Column("modules", "modules", lambda e: numeric(e.modules, count), "number", hidden=True),
        Column("parameters", "parameters", lambda e: numeric(e.parameters, count), "number", hidden=True),
        Column("attempts", "attempts", lambda e: numeric(e.attempts, count), "number", hidden=True),
        Column("source", "source", lambda e: e.source, hidden=True),
        Column("merged", "merged model", lambda e: e.merged, hidden=True),
        Column("pushed", "pushed to", lambda e: e.pushed, hidden=True),
        Column("finished", "finished", lambda e: e.finished, hidden=True),
        Column("fingerprint", "fingerprint", lambda e: e.fingerprint, hidden=True),
    ]
    return DataTable("entries", "entries", columns, ledger.entries)


def _known(entries: Sequence[Entry], value: Callable[[Entry], float | None]) -> list[float]:
    return [found for entry in entries if (found := finite_or_none(value(entry))) is not None]


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else ""
