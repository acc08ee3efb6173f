"""Compare a result with its source as functions and weight by weight, with stock PEFT in the source's part."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from mapconv.checkpoint.filenames import MODEL_CONFIG
from mapconv.checkpoint.gguf.model import small_files
from mapconv.commands.formula_sources import beside_merged, errors_by_formula, is_map_on_a_method, run_by_peft
from mapconv.data import Rows, read_blocks, read_rows
from mapconv.errors import AdapterError, BaseMismatchError
from mapconv.fidelity.against_model import ModelComparison
from mapconv.fidelity.comparison import Agreement, Comparison, ModuleError
from mapconv.fidelity.saved import check_report_place, save_report
from mapconv.fidelity.served import ServedNumbers, measure_served
from mapconv.formats.mapdir import MAP_CONFIG_FILE
from mapconv.formats.peft import CONFIG_FILE
from mapconv.hub.locate import hub_reference, locate_adapter, locate_result, open_model
from mapconv.jsonfile import read_object
from mapconv.options.commands import VERIFY
from mapconv.placement.adapters import PlacedAdapter, place_adapter
from mapconv.refit.norms import strange_weights
from mapconv.runtime.devices import resolve_device
from mapconv.runtime.models import load_tokenizer
from mapconv.runtime.progress import progress_bar

SEQUENCE_LENGTH = 256
_DIVERGENCES: tuple[str, ...] = ("kl", "kl_largest", "kl_base", "top1_agreement", "largest_logit_difference")
_PERPLEXITIES: tuple[str, ...] = ("perplexity_base", "perplexity_source", "perplexity_result")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class VerifyReport:
    """How far a result is from its source.

    ``kl`` is the mean KL(source ‖ result) in nats per position (a predicted token, or a text for a classifier);
    ``kl_base`` is KL(source ‖ base), which says how much there was to preserve. Perplexities are those of a causal
    language model. What was not run is None, and ``notes`` says why. ``served`` is there where the source runs on
    another base than the result: it compares that base alone, the source put on it as it is, and the result.
    """

    result: Path
    source: Path
    base: Path
    tokens: int
    kl: float | None
    kl_largest: float | None
    kl_base: float | None
    top1_agreement: float | None
    largest_logit_difference: float | None
    perplexity_base: float | None
    perplexity_source: float | None
    perplexity_result: float | None
    modules: tuple[ModuleError, ...]
    seconds: float
    served: ServedNumbers | None = None
    notes: tuple[str, ...] = ()

    @property
    def worst_module(self) -> ModuleError:
        return max(self.modules, key=lambda module: module.error)

    def to_dict(self) -> dict[str, Any]:
        paths = {name: str(getattr(self, name)) for name in ("result", "source", "base")}
        return asdict(self) | paths | {"served": None if self.served is None else self.served.to_dict()}


@VERIFY.checks
def verify(
    result: str | Path,
    against: str | Path,
    *,
    base: str | Path | None = None,
    against_base: str | Path | None = None,
    data: str | Path | None = None,
    samples: int = 8,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    save: bool = False,
    allow_pickle: bool = False,
    quiet: bool = True,
) -> VerifyReport:
    """Run a result and its source on the same text, and compare their weights.

    Args:
        result: a MAP directory (or any PEFT adapter), or a merged model.
        against: the LoRA or DoRA adapter that it was made from, or the finetuned model that it was extracted from.
        base: the base model's folder or Hub id; None takes it from the source's configuration.
        against_base: the base that the source runs on, where it was trained on another one than the result is for (a
            quantized copy); None: the same, or of a rebased result the one that the source's configuration names.
        data: a text file, or a ``.jsonl`` or ``.parquet`` file with text, chats or labelled texts (``mapconv.data``);
            None uses the text that ships with mapconv.
        samples: sequences of 256 tokens to run.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: what the models compute in; float32 shows the conversion's error alone.
        save: store the report as ``verify.json`` in the result's folder, for the model card that ``push`` writes.
        allow_pickle: read the source's weights from a ``.bin`` file.
        quiet: no progress bar.

    Raises:
        MapconvError: a model, an adapter or the text cannot be used.
        ValueError: an option out of its range.
    """
    started = time.perf_counter()
    result, against = locate_result(result), _located(against, allow_pickle=allow_pickle)
    if result.resolve() == against.resolve():
        raise AdapterError(
            f"{result} is the source itself: give what `mapconv upgrade` or `mapconv merge` made of it as RESULT."
        )
    if save:
        check_report_place(result)
    rows = read_rows(data)
    place = resolve_device(device)
    compared: Comparison | ModelComparison
    own: PlacedAdapter | None = None
    source: PlacedAdapter | None = None
    if (against / CONFIG_FILE).is_file() or not (against / MODEL_CONFIG).is_file():
        if (against_base is not None and (result / CONFIG_FILE).is_file()) or _is_rebased(result):
            own = place_adapter(result, base, allow_pickle=allow_pickle)
        trained_on = base if own is None and against_base is None else against_base
        source = place_adapter(against, trained_on, allow_pickle=allow_pickle)
        _check_base(result, (own or source).target.folder)
        if is_map_on_a_method(source):
            compared = beside_merged(source, own, result, dtype=dtype, device=place, allow_pickle=allow_pickle)
        else:
            with run_by_peft(source) as runs:
                compared = Comparison(result, runs, dtype=dtype, device=place, result_base=own, quiet=quiet)
        base_folder, tokenizer = source.target.folder, source.target.folder
    else:
        if against_base is not None:
            raise AdapterError(f"{against} is a whole model, which runs on no base: leave --against-base out.")
        placed = place_adapter(result, base, allow_pickle=allow_pickle) if (result / CONFIG_FILE).is_file() else result
        base_folder, tokenizer = _base_of(placed, base), against
        _check_base(result, base_folder)
        compared = ModelComparison(placed, against, base_folder, dtype=dtype, device=place)
    log.info("loaded %s and its source", result)
    total, rows_run, notes = run_both(compared, rows, tokenizer, samples=samples, quiet=quiet)
    log.info("ran both on %d positions", total.result.positions)
    served = None
    if own is not None and source is not None and rows_run:
        other = place_adapter(against, own.target.folder, allow_pickle=allow_pickle)
        served = measure_served(source, other, result, rows_run, device=place, dtype=dtype, quiet=quiet)
    with torch.inference_mode():
        by_formula = None if source is None else errors_by_formula(source, own, result)
        modules = by_formula or tuple(compared.module_errors())
        log.info("compared %d weights", len(modules))
    report = VerifyReport(
        result=result,
        source=against,
        base=base_folder,
        tokens=total.result.positions,
        modules=modules,
        seconds=time.perf_counter() - started,
        served=served,
        notes=tuple(notes),
        **means(total, causal=compared.is_causal),
    )
    if save:
        save_report(result, report.to_dict())
    return report


def _located(source: str | Path, *, allow_pickle: bool) -> Path:
    """The folder of a source: an adapter, or the model that a result was extracted from."""
    reference = hub_reference(source)
    if reference is None:
        return locate_adapter(source, allow_pickle=allow_pickle)
    try:
        return locate_adapter(source, allow_pickle=allow_pickle)
    except AdapterError:
        return locate_result(source)


def _base_of(result: PlacedAdapter | Path, base: str | Path | None) -> Path:
    """The folder of the base that a result is compared with, beside a whole model.

    Raises:
        AdapterError: a merged model does not say which base it is of.
    """
    if isinstance(result, PlacedAdapter):
        return result.target.folder
    if base is None:
        raise AdapterError(f"{result} is a merged model, and so is its source: give the base of both with --base.")
    return open_model(base).folder


def _is_rebased(result: Path) -> bool:
    """Whether a MAP directory is for another base than its source, so that each runs on its own."""
    path = result / MAP_CONFIG_FILE
    return path.is_file() and read_object(path, AdapterError).get("rebase") is not None


def _check_base(result: Path, base: Path) -> None:
    """Refuse a MAP directory that was made for another base: what it is to its source cannot be seen on this one."""
    if not (result / MAP_CONFIG_FILE).is_file():
        return
    for item, fault in strange_weights(place_adapter(result, base)):
        file = item.weight.pieces[0].tensor.file
        raise BaseMismatchError(f"{file}: {item.weight.name} {fault}: give that base with --base.")


@torch.inference_mode()
def run_both(
    compared: Comparison | ModelComparison, rows: Rows, folder: Path, *, samples: int, quiet: bool
) -> tuple[Agreement, list[list[int]], list[str]]:
    """Run the models on the same text, with the tokenizer in ``folder``: (sums over positions, sequences, notes)."""
    total, not_run = Agreement(), "the model was not run (its input is more than text, or it has no logits)"
    if not compared.reads_text:
        return total, [], [f"{not_run}: only weights are compared"]
    length = min(SEQUENCE_LENGTH, compared.longest_text)
    blocks = read_blocks(
        rows, load_tokenizer(small_files(folder)), samples=samples, length=length, classes=compared.classes
    )
    with progress_bar(len(blocks), "running", unit="block", quiet=quiet) as advance:
        for block in blocks.rows():
            _compare(compared, block, total)
            advance(1)
    notes = [*blocks.notes, *([] if total.result.positions else [f"{not_run}: only weights are compared"])]
    return total, blocks.rows(), notes


def _compare(compared: Comparison | ModelComparison, block: list[int], total: Agreement) -> None:
    logits = compared.logits(block)
    if logits is None:
        return
    # The last position of a causal model predicts nothing that is known.
    targets = torch.tensor(block[1:], device=logits[0].device) if compared.is_causal else None
    total.add(*logits, targets)


def means(total: Agreement, *, causal: bool) -> dict[str, float | None]:
    """The numbers of a report that are means over positions; None where no model was run."""
    if not total.result.positions:
        return dict.fromkeys((*_DIVERGENCES, *_PERPLEXITIES))
    base, source, result = (sums.means(causal=causal) for sums in (total.base, total.source, total.result))
    values = (result.kl, total.result.kl_largest, base.kl, result.top1_agreement, total.result.difference)
    perplexities = (base.perplexity, source.perplexity, result.perplexity)
    return dict(zip(_DIVERGENCES, values, strict=True)) | dict(zip(_PERPLEXITIES, perplexities, strict=True))
