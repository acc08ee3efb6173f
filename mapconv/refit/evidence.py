"""What a rebase knows of the layers' inputs, and where the text for it comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from mapconv.checkpoint.model_config import read_model_config
from mapconv.data import read_dataset, read_rows
from mapconv.errors import DataError
from mapconv.placement.adapters import FLOAT_DTYPES, PlacedAdapter
from mapconv.placement.running import load_base
from mapconv.placement.weights import PlacedModule
from mapconv.refit.mixture import Mixture, Run, SourceInputs
from mapconv.refit.rebase import Rebased, Rebaser
from mapconv.refit.stored_statistics import read_statistics
from mapconv.runtime.models import attach_with_peft, load_tokenizer, longest_text, reads_text, stored_text_classes
from mapconv.runtime.sampling import sample_sequences

Statistics = Literal["running", "source", "none"]
#: Sequences that run together.
BATCH = 8
#: Sequences of its own that the source writes besides, to measure the result on.
OWN_HELD_OUT = 8
_DTYPES = {stored: name for name, stored in FLOAT_DTYPES.items()}


@dataclass(frozen=True)
class Evidence:
    """How modules are refitted, on what, and unseen sequences to measure the result on.

    ``record`` describes the text in ``map_config.json``; None where none was used.
    """

    refits: Callable[[Rebaser, Sequence[PlacedModule]], Iterator[Rebased]]
    record: dict[str, Any] | None
    held_out: list[list[int]]
    notes: tuple[str, ...] = ()

    def run(self, rebaser: Rebaser, modules: Sequence[PlacedModule]) -> Iterator[Rebased]:
        return self.refits(rebaser, modules)


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
) -> Evidence:
    """The text and the models that run on it.

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
        held_out = [] if text is None else text.held_out
        return Evidence(Rebaser.by_weights, None, held_out) if collected is None else _stored(collected, held_out)
    source = attach_with_peft(_load(trained, device), trained.adapter.path, "source").get_base_model()
    if not reads_text(source):
        raise DataError(
            f"{trained.target.folder} needs more than text as its input: rebase it by its weights, with "
            "--statistics none."
        )
    length = min(length, longest_text(source)) if data is None else length
    text = _own(trained, source, samples, length, seed) if data is None else _from_file(trained, data, samples, length)
    batches = [torch.tensor(batch, device=device) for batch in batches_of(text.rows, BATCH)]
    paths = [item.module.path for item in served.modules if item.experts == 1 and not item.module.embedding]
    run: Run = SourceInputs(source, paths)
    if statistics == "running":
        other = _load(served, device)
        if served.adapter.whole:
            other = attach_with_peft(other, served.adapter.path, "source").get_base_model()
        run = Mixture(source, other, paths)

    def refits(rebaser: Rebaser, modules: Sequence[PlacedModule]) -> Iterator[Rebased]:
        return rebaser.by_inputs(run, batches)

    return Evidence(refits, text.record, text.held_out, text.notes)


def _stored(folder: Path, held_out: list[list[int]]) -> Evidence:
    stored = read_statistics(folder)
    record = {"name": "statistics of the base", **stored.data}

    def refits(rebaser: Rebaser, modules: Sequence[PlacedModule]) -> Iterator[Rebased]:
        return rebaser.by_statistics(stored, modules)

    return Evidence(refits, record, held_out)


@dataclass(frozen=True)
class _Text:
    rows: list[list[int]]
    held_out: list[list[int]]
    record: dict[str, Any]
    notes: tuple[str, ...]


def _from_file(trained: PlacedAdapter, path: Path, samples: int, length: int) -> _Text:
    target = trained.target
    config = target.source_config or read_model_config(target.folder)
    classes = stored_text_classes(target.class_name or "", config)
    train, held_out = read_dataset(
        read_rows(path), load_tokenizer(target.folder), length=length, samples=samples, classes=classes
    )
    record = {"name": path.name, "fingerprint": train.fingerprint, "sequences": len(train), "tokens": train.tokens}
    return _Text(train.rows(), held_out.rows(), record, train.notes)


def _own(trained: PlacedAdapter, source: Any, samples: int, length: int, seed: int) -> _Text:
    """What the source writes itself; a tail of it is held out."""
    rows = sample_sequences(
        source, load_tokenizer(trained.target.folder), samples=samples + OWN_HELD_OUT, length=length, seed=seed
    )
    record = {"name": "the source's own samples", "seed": seed, "sequences": samples, "tokens": samples * length}
    return _Text(rows[:samples], rows[samples:], record, ())


def _load(placed: PlacedAdapter, device: torch.device) -> Any:
    dtype = placed.modules[0].weight.dtype
    return load_base(placed, dtype=_DTYPES.get(dtype, "float32"), device=device)


def batches_of(rows: Sequence[list[int]], size: int) -> list[list[list[int]]]:
    """Sequences of equal length together, so that no batch needs padding, which would count as inputs."""
    by_length: dict[int, list[list[int]]] = {}
    for row in rows:
        by_length.setdefault(len(row), []).append(row)
    return [group[i : i + size] for _, group in sorted(by_length.items()) for i in range(0, len(group), size)]
