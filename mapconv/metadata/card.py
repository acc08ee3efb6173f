"""The model card of what mapconv makes: its metadata, and the part of README.md that mapconv writes.

Everything in a card was recorded when the result was made (``map_config.json``, ``map_merge.json``) or measured on it
(``verify.json``). A licence is copied from the cards of the source and of the base, or given; it is never guessed.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mapconv.adapter import MapModule
from mapconv.hub.reference import is_repo_id
from mapconv.metadata.loading import how_to_load, pipeline_of
from mapconv.metadata.markdown import calibration_table, number, share, table
from mapconv.metadata.readme import Readme, compose, read_readme
from mapconv.metadata.rebased import rebase_section
from mapconv.metadata.survived import survival_table
from mapconv.untrusted.printable import markdown_code, markdown_text
from mapconv.wording import fixed, small, spread

CARD_FILE, PLOT_FILE, REPORT_FILE = "README.md", "scalars.png", "verify.json"
#: What is taken over from the cards of the source and the base, and may be the user's own in README.md.
_COPIED = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag")
#: What mapconv alone decides, whatever an older card says.
_OWNED = (
    "base_model", "base_model_relation", "base_model_revision", "library_name", "source_adapter",
    "source_adapter_revision",
)  # fmt: skip
#: What a ``form`` begins with that is MAP on another method, in a file of its own kind.
ON_METHOD = "MAP on "
_ABOUT = (
    "[MAP](https://arxiv.org/abs/2505.23094) treats a weight matrix as one vector and writes the adapted weight as "
    "`W' = α·W0/‖W0‖ + β·Δ/‖Δ‖`: a direction, and two scalars that scale the base and the update independently. "
    "A LoRA is such a form exactly; a DoRA is refitted to the closest one of its rank, or kept in its own factors."
)


@dataclass(frozen=True)
class CardFacts:
    """What a card says. ``base`` is a Hub id, or None while it is only known as a folder of this machine.

    ``form`` is what stock PEFT loads the adapter as (LoRA, DoRA, LoHa); where it begins with ``MAP on``, no release of
    PEFT loads it.
    """

    kind: Literal["adapter", "merged"]
    base: str | None
    base_revision: str | None
    record: Mapping[str, Any]
    modules: Sequence[MapModule]
    task: str | None
    form: str
    report: Mapping[str, Any] | None = None
    has_plot: bool = False

    @property
    def runs_in_peft(self) -> bool:
        return not self.form.startswith(ON_METHOD)

    @property
    def source(self) -> Mapping[str, Any]:
        return self.record.get("source") or {}


def card_facts(folder: Path) -> dict[str, Any]:
    """What a result takes over from the README.md of its base or source; a card that is not YAML says nothing."""
    metadata = read_readme(folder / CARD_FILE).metadata
    return {key: metadata[key] for key in _COPIED if _is_plain(metadata.get(key))}


def local_card(
    config: Mapping[str, Any],
    record: Mapping[str, Any],
    modules: Sequence[MapModule],
    own: Readme | None = None,
    form: str | None = None,
) -> str:
    """The README.md of an adapter as it is first written, before anybody publishes it; ``form`` as in ``CardFacts``."""
    name = record["base"].get("name")
    facts = CardFacts(
        kind="adapter",
        base=name if name and is_repo_id(name) else None,
        base_revision=record["base"].get("revision"),
        record=record,
        modules=modules,
        task=config.get("task_type"),
        form=form or adapter_form(config),
    )
    return write_card(facts, own or Readme(), title="MAP adapter", repo_id=None, license_=None)


def adapter_form(config: Mapping[str, Any]) -> str:
    """What stock PEFT loads a MAP directory as."""
    return "DoRA" if config.get("use_dora") else "LoRA"


def write_card(facts: CardFacts, own: Readme, *, title: str, repo_id: str | None, license_: str | None) -> str:
    """The whole README.md: metadata, mapconv's block, and the user's own text around it."""
    return compose(_metadata(facts, own.metadata, license_), _block(facts, title, repo_id), own)


def _metadata(facts: CardFacts, own: Mapping[str, Any], license_: str | None) -> dict[str, Any]:
    """Ours first and in a fixed order; then what the user's README.md says besides."""
    adapter = _hub_name(facts.source) if _is_adapter(facts.source) else None
    data: dict[str, Any] = {
        "base_model": facts.base,
        "base_model_relation": "adapter" if facts.kind == "adapter" else "finetune",
        "base_model_revision": facts.base_revision if facts.base else None,
        "library_name": "transformers" if facts.kind == "merged" else "peft" if facts.runs_in_peft else None,
        "source_adapter": adapter,
        "source_adapter_revision": facts.source.get("revision") if adapter else None,
    }
    copied = (facts.record.get("base") or {}).get("card") or {}
    copied = copied | (facts.source.get("card") or {}) | {key: own[key] for key in _COPIED if own.get(key)}
    copied.setdefault("pipeline_tag", pipeline_of(facts.task))
    if license_ is not None:
        # A name and a link belong to the licence "other" that they came with.
        copied = {key: value for key, value in copied.items() if not key.startswith("license")} | {"license": license_}
    data |= {key: copied.get(key) for key in _COPIED}
    ours = ["map", facts.form.removeprefix(ON_METHOD).lower()] if facts.kind == "adapter" else ["map", "merge"]
    data["tags"] = [*ours, *(tag for tag in own.get("tags") or [] if tag not in ours)]
    data |= {key: value for key, value in own.items() if key not in data and key not in _OWNED}
    return {key: value for key, value in data.items() if value is not None}


def _block(facts: CardFacts, title: str, repo_id: str | None) -> str:
    sections = [
        f"# {title}",
        _summary(facts),
        f"## What MAP is\n\n{_ABOUT}",
        how_to_load(facts.task, repo_id, facts.base, merged=facts.kind == "merged", by_peft=facts.runs_in_peft),
    ]
    rebase = facts.record.get("rebase")
    if rebase:
        name, revision = rebase["from"].get("name"), rebase["from"].get("revision")
        origin = _pinned(name, revision) if name and is_repo_id(name) else "a base in a local folder"
        base = _pinned(facts.base, facts.base_revision) if facts.base else "another base"
        sections.append("## Rebased\n\n" + rebase_section(rebase, origin, base))
    sections.append("## Fidelity\n\n" + _fidelity(facts))
    if facts.record.get("survival"):
        sections.append("## What survives in the stored weights\n\n" + survival_table(facts.record["survival"]))
    if facts.record.get("calibration"):
        sections.append("## Calibration\n\n" + calibration_table(facts.record["calibration"]))
    if facts.modules:
        sections.append("## Scalars\n\n" + _scalars(facts))
    sections.append("## Made from\n\n" + _origins(facts))
    return "\n\n".join(sections)


def _summary(facts: CardFacts) -> str:
    base = _link(facts.base) if facts.base else "a base model"
    method = _method(facts.source)
    if facts.kind == "merged":
        return f"{base} with an adapter ({method}) merged into its weights by mapconv."
    made = f"A {method} adapter of {base}, converted to MAP form by mapconv."
    if facts.record.get("rebase"):
        made = f"An adapter of {base}, fitted to it by mapconv from a {method} adapter of another base."
    elif facts.record.get("extract"):
        made = f"What a full finetune changed in {base}, extracted as an adapter by mapconv."
    elif not facts.source:
        made = f"A MAP adapter of {base}, trained with mapconv."
    elif str(facts.source.get("method")).startswith("MAP"):
        made = f"A MAP adapter of {base}, trained further with mapconv."
    if not facts.runs_in_peft:
        return (
            f"{made} Its direction is the update of {facts.form.removeprefix(ON_METHOD)}: no release of PEFT loads it."
        )
    return f"{made} Stock PEFT loads it as a {'plain LoRA' if facts.form == 'LoRA' else facts.form} adapter."


def _fidelity(facts: CardFacts) -> str:
    report = facts.report
    if report is None and not facts.source:
        return "It was trained in MAP form, so there is no source to compare it with."
    if report is None:
        return "Not measured: `mapconv verify RESULT --against SOURCE --save` measures it."
    # null is a number that was not finite: no error is worse.
    errors = [math.inf if module["error"] is None else module["error"] for module in report["modules"]]
    weights = (
        f"the weights differ from the source's by {number(max(errors))} of its update in the worst of {len(errors)} "
        f"modules, {number(statistics.median(errors))} in the median"
    )
    if not report["tokens"]:
        return (
            f"Measured by `mapconv verify` on the weights alone, as the model needs more than text as its "
            f"input: {weights}."
        )
    rows = [
        (name, fixed(report[key]), number(kl))
        for name, key, kl in (
            ("base", "perplexity_base", report["kl_base"]),
            ("source adapter" if _is_adapter(facts.source) else "source", "perplexity_source", 0.0),
            ("this", "perplexity_result", report["kl"]),
        )
    ]
    head = ("model", "perplexity", "KL(source ‖ model)")
    return (
        f"{table(head, rows)}\n\nMeasured by `mapconv verify` at {report['tokens']:,} positions of a text: the same "
        f"most likely answer as the source {share(report['top1_agreement'])} of the time; {weights}."
    )


def _scalars(facts: CardFacts) -> str:
    groups: dict[str, list[MapModule]] = defaultdict(list)
    for module in facts.modules:
        groups[module.path.rpartition(".")[2]].append(module)
    rows = [
        (
            markdown_text(name),
            str(len(modules)),
            spread([module.rank for module in modules], lambda rank: str(rank or "full")),
            spread([module.base_gain for module in modules], fixed),
            spread([module.beta / module.alpha if module.alpha else 0.0 for module in modules], fixed),
            small(max((module.error for module in modules if module.error is not None), default=None)),
        )
        for name, modules in groups.items()
    ]
    text = table(("target", "modules", "rank", "α/‖W0‖", "β/α", "ε worst"), rows)
    if any(module.error is not None for module in facts.modules):
        text += "\n\nε is the share of the source's update that the refit loses in a weight; 0 is exact."
    return f"{text}\n\n![α/‖W0‖ and β/α over the layers, by module type]({PLOT_FILE})" if facts.has_plot else text


def _origins(facts: CardFacts) -> str:
    rows = [("base", _pinned(facts.base, facts.base_revision) if facts.base else "a local folder")]
    for source in (facts.source, *(facts.record.get("more_sources") or ())):
        rows += _lineage(source)
    rows.append(("mapconv", markdown_text(facts.record.get("mapconv_version"))))
    return table(("what", "which"), rows)


def _lineage(source: Mapping[str, Any]) -> list[tuple[str, str]]:
    """An adapter, and those that it was made from, newest first."""
    rows = []
    while source:
        name = _hub_name(source)
        kind = "adapter" if _is_adapter(source) else "model"
        place = _pinned(name, source.get("revision")) if name else "not on the Hub"
        rows.append(
            (kind, f"{_method(source)}, {place}, {markdown_code(str(source.get('fingerprint', ''))[:23] + '…')}")
        )
        source = source.get("source") or {}
    return rows


def _hub_name(source: Mapping[str, Any]) -> str | None:
    """A source's name if it is on the Hub: only what came from there has a commit."""
    return source.get("name") if source.get("revision") else None


def _is_adapter(source: Mapping[str, Any]) -> bool:
    return source.get("method") != "full finetune"


def _method(source: Mapping[str, Any]) -> str:
    return markdown_text(source.get("method") or "LoRA or DoRA")


def _pinned(name: str, revision: str | None) -> str:
    return f"{_link(name)} at {markdown_code(revision[:12])}" if revision else _link(name)


def _link(name: str) -> str:
    repo = "/".join(name.split("/")[:2])
    return f"[{markdown_text(name)}](https://huggingface.co/{repo})" if is_repo_id(repo) else markdown_text(name)


def _is_plain(value: Any) -> bool:
    """A word or a list of words: nothing else of a stranger's card is taken over."""
    words = value if isinstance(value, list) else [value]
    return bool(words) and all(isinstance(word, str) and word.strip() for word in words)
