"""What a rebase knows of the layers' inputs, and where the text for it comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from mapconv.algebra.regression import RegressionInputs
from mapconv.checkpoint.model_config import read_model_config
from mapconv.checkpoint.reader import TensorReader
from mapconv.data import Dataset, read_dataset, read_rows
from mapconv.data.blocks import BATCH, Tokens, batches_of, stack
from mapconv.errors import DataError
from mapconv.placement.adapters import PlacedAdapter
from mapconv.placement.running import load_base
from mapconv.placement.weights import PlacedModule
from mapconv.refit.mixture import Mixture, Run, SourceInputs
from mapconv.refit.rebase import Rebased, Rebaser
from mapconv.refit.rebase_plan import PlannedText
from mapconv.refit.stored_statistics import read_statistics
from mapconv.runtime.models import attach_with_peft, load_tokenizer, longest_text, reads_text, stored_text_classes
from mapconv.runtime.sampling import sample_sequences

#: Modules, with their inputs where those are known.
Survey = Callable[[Sequence[PlacedModule]], Iterator[tuple[PlacedModule, RegressionInputs | None]]]
Statistics = Literal["running", "source", "none"]
#: Unseen sequences that a result is measured on: the three models on them are compared on the same 1,024 tokens.
MEASURED = 4


@dataclass(frozen=True)
class Evidence:
    """What modules are refitted on, and unseen sequences to measure the result on.

    ``record`` describes what was used in ``map_config.json``; None for nothing. ``text`` has the sequences; None where
    there are none.
    """

    record: dict[str, Any] | None
    text: Text | None = None

    def held_out(self, *, every: bool = False) -> list[list[int]]:
        """Sequences to measure the result on: ``MEASURED``, or ``every`` one that there is."""
        if self.text is None:
            return []
        held_out = self.text.held_out
        return (held_out if every else held_out.first(MEASURED)).rows()

    @property
    def notes(self) -> tuple[str, ...]:
        return () if self.text is None else self.text.train.notes


@dataclass(frozen=True)
class Text:
    """Sequences to train on, of which the first ``samples`` are fitted on, and others that are held out."""

    train: Dataset
    held_out: Dataset
    samples: int
    record: dict[str, Any]

    @property
    def rows(self) -> list[list[int]]:
        return self.train.first(self.samples).rows()


@dataclass(frozen=True)
class Refits:
    """Ways to go through modules. They hold the models that run for that, which take memory until they are dropped.

    ``run`` refits one module after another; ``survey`` gives the modules with what can be known of their inputs before
    any is refitted.
    """

    run: Callable[[Rebaser, Sequence[PlacedModule]], Iterator[Rebased]]
    survey: Survey


def gather(
    trained: PlacedAdapter,
    served: PlacedAdapter,
    statistics: Statistics,
    data: Path | None,
    samples: int,
    length: int,
    seed: int,
    device: torch.device,
    *,
    collected: Path | None,
    quiet: bool,
) -> tuple[Refits, Evidence]:
    """How modules are refitted, and what is known for it: the text, and the models that run on it.

    Args:
        trained, served: the adapter on the base it was trained on, and on the other.
        statistics: ``none`` runs no model for the refit; with ``data`` the result is still measured on it.
        data: the user's text; None: the source model writes its own.
        collected: what ``mapconv statistics`` wrote: no model runs for the refit.

    Raises:
        DataError: the data does not suit the model, or the model writes none and there is none.
    """
    if statistics == "none" or collected is not None:
        text = None if data is None else _from_file(trained, data, samples, length)
        if collected is None:
            return Refits(Rebaser.by_weights, _unknown), Evidence(None, text)
        return _stored(collected, text)
    source = attach_with_peft(load_base(trained, device=device), trained.adapter.path, "source").get_base_model()
    if not reads_text(source):
        raise DataError(
            f"{trained.target.folder} needs more than text as its input: rebase it by its weights, with "
            "--statistics none."
        )
    length = min(length, longest_text(source)) if data is None else length
    text = _own(trained, source, samples, length, seed) if data is None else _from_file(trained, data, samples, length)
    batches = [torch.tensor(batch, device=device) for batch in batches_of(text.rows, BATCH)]
    paths = [item.module.path for item in served.modules if item.experts == 1 and not item.module.embedding]

    def survey(modules: Sequence[PlacedModule]) -> Iterator[tuple[PlacedModule, RegressionInputs | None]]:
        waiting = {item.module.path: item for item in modules}
        with closing(SourceInputs(source, paths)) as run:
            for layer in run.run(batches):
                if layer.path in waiting:
                    yield waiting.pop(layer.path), layer.inputs
        yield from _unknown(list(waiting.values()))

    def refits(rebaser: Rebaser, modules: Sequence[PlacedModule]) -> Iterator[Rebased]:
        run: Run
        if statistics == "running":
            other = load_base(served, device=device)
            if served.adapter.whole:
                other = attach_with_peft(other, served.adapter.path, "source").get_base_model()
            run = Mixture(source, other, paths)
        else:
            run = SourceInputs(source, paths)
        return rebaser.by_inputs(run, batches)

    return Refits(refits, survey), Evidence(text.record, text)


def planned_text(
    trained: PlacedAdapter, statistics: Statistics, data: Path | None, samples: int, length: int, collected: Path | None
) -> PlannedText:
    """What ``gather`` would look at, from the file or the folder, without a model.

    Raises:
        DataError, CheckpointError: as ``gather``.
    """
    text = None if data is None else _from_file(trained, data, samples, length)
    measured = 0 if text is None else text.held_out.first(MEASURED).tokens
    if collected is not None:
        stored = read_statistics(collected).data
        return PlannedText("statistics", stored.get("sequences", 0), stored.get("tokens", 0), measured)
    if statistics == "none":
        return PlannedText("weights", 0, 0, measured)
    if text is None:
        return PlannedText("samples", samples, samples * length, MEASURED * length)
    used = text.train.first(samples)
    return PlannedText("data", len(used), used.tokens, measured)


def _unknown(modules: Sequence[PlacedModule]) -> Iterator[tuple[PlacedModule, RegressionInputs | None]]:
    return ((item, None) for item in modules)


def _stored(folder: Path, text: Text | None) -> tuple[Refits, Evidence]:
    stored = read_statistics(folder)
    record = {"name": "statistics of the base", **stored.data}

    def refits(rebaser: Rebaser, modules: Sequence[PlacedModule]) -> Iterator[Rebased]:
        return rebaser.by_statistics(stored, modules)

    def survey(modules: Sequence[PlacedModule]) -> Iterator[tuple[PlacedModule, RegressionInputs | None]]:
        with TensorReader() as reader:
            known = stored.inputs_of((item.module.path for item in modules), reader)
            for item, read in zip(modules, known, strict=True):
                yield item, None if read is None else read()

    return Refits(refits, survey), Evidence(record, text)


def _from_file(trained: PlacedAdapter, path: Path, samples: int, length: int) -> Text:
    target = trained.target
    config = target.source_config or read_model_config(target.folder)
    classes = stored_text_classes(target.class_name or "", config)
    train, held_out = read_dataset(read_rows(path), load_tokenizer(target.tokenizer), length=length, classes=classes)
    used = train.first(samples)
    record = {"name": path.name, "fingerprint": used.fingerprint, "sequences": len(used), "tokens": used.tokens}
    return Text(train, held_out, samples, record)


def _own(trained: PlacedAdapter, source: Any, samples: int, length: int, seed: int) -> Text:
    """What the source writes itself; a tail of it is held out."""
    rows = sample_sequences(
        source, load_tokenizer(trained.target.tokenizer), samples=samples + MEASURED, length=length, seed=seed
    )
    # Packed blocks, in which every token counts.
    written = stack([Tokens(tuple(row), tuple(row)) for row in rows], "text", padding=0)
    record = {"name": "the source's own samples", "seed": seed, "sequences": samples, "tokens": samples * length}
    return Text(written.first(samples), written.last(MEASURED), samples, record)
