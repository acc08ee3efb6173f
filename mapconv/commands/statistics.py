"""Second moments of a base's layer inputs, collected once for every adapter that is to be rebased from it."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch

from mapconv.algebra.fingerprint import Fingerprint, matrix_fingerprint
from mapconv.checkpoint.codecs import storages
from mapconv.checkpoint.gguf.model import notes_beside
from mapconv.checkpoint.staging import check_output, staged_folder
from mapconv.checkpoint.unchanged import unchanged
from mapconv.data import read_dataset, read_rows
from mapconv.data.blocks import BATCH, batches_of
from mapconv.errors import DataError
from mapconv.hub.locate import open_base
from mapconv.metadata.provenance import recorded_name
from mapconv.options.commands import STATISTICS_COMMAND
from mapconv.options.shared import SAMPLES, SEQUENCE_LENGTH
from mapconv.placement.adapters import FLOAT_NAMES
from mapconv.placement.bases import plain_base
from mapconv.placement.running import load_target
from mapconv.placement.target_model import common_dtype, plain_target
from mapconv.refit.mixture import SourceInputs
from mapconv.refit.stored_statistics import StatisticsWriter
from mapconv.runtime.devices import resolve_device
from mapconv.runtime.models import load_tokenizer, longest_text, reads_text
from mapconv.runtime.progress import progress_bar


@dataclass(frozen=True)
class StatisticsResult:
    """What was collected."""

    out: Path
    base: Path
    layers: int
    tokens: int
    nbytes: int
    seconds: float
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"out": str(self.out), "base": str(self.base)}


@STATISTICS_COMMAND.checks
def statistics(
    base: str | Path,
    out: str | Path,
    *,
    data: str | Path,
    samples: int | None = None,
    sequence_length: int | None = None,
    device: str = "auto",
    force: bool = False,
    quiet: bool = True,
) -> StatisticsResult:
    """Run a base on sample text and store the second moment of every linear layer's inputs.

    Args:
        base: the model's folder or Hub id; quantized ones run in the values of their codes.
        out: the folder to write, for ``rebase``'s ``statistics_from``.
        data: text of the domain that the adapters are for.
        samples: sequences to run (32), each of ``sequence_length`` tokens (256).
        device: ``auto``, ``cpu`` or ``cuda``.
        force: replace ``out``.
        quiet: no progress bar.

    Raises:
        MapconvError: of the kind that fits; ``out`` then does not exist.
    """
    started = time.perf_counter()
    samples, length = samples or SAMPLES.fallback, sequence_length or SEQUENCE_LENGTH.fallback
    stored = open_base(base, None, None, Path(base))
    checkpoint, _ = plain_base(stored)
    target, out, place = plain_target(checkpoint), Path(out), resolve_device(device)
    check_output(out, force=force, inputs=[target.folder], nbytes=0)
    rows = read_rows(Path(data))
    train, _ = read_dataset(rows, load_tokenizer(target.tokenizer), length=length, samples=samples)
    # The layers' weights are recorded as what codes stand for, which 16 bits would round.
    dtype = "float32" if storages(checkpoint) else FLOAT_NAMES.get(common_dtype(checkpoint), "float32")
    with staged_folder(out, force=force) as staging, unchanged(checkpoint.signatures):
        model = load_target(target, dtype=dtype, device=place, quiet=quiet)
        if not reads_text(model) or length > longest_text(model):
            raise DataError(
                f"{target.folder} runs on at most {longest_text(model)} tokens of text, and sequences have {length}: "
                "choose a smaller --sequence-length, or another model."
            )
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        paths = [
            path
            for path, layer in model.named_modules()
            if (isinstance(layer, torch.nn.Linear) or type(layer).__name__ == "Conv1D") and layer is not head
        ]
        writer = StatisticsWriter(staging)
        try:
            with torch.inference_mode(), progress_bar(len(paths), "collecting", unit="layer", quiet=quiet) as advance:
                batches = [torch.tensor(batch, device=place) for batch in batches_of(train.rows(), BATCH)]
                for layer in SourceInputs(model, paths).run(batches):
                    if layer.inputs is not None:
                        writer.add(layer.path, layer.inputs, _fingerprint(model.get_submodule(layer.path)))
                    advance(1)
            name, revision = recorded_name(target.folder)
            record = {"name": Path(data).name, "fingerprint": train.fingerprint, "sequences": len(train)}
            layers = writer.finish({"name": name, "revision": revision}, record | {"tokens": train.tokens})
        finally:
            writer.close()
        nbytes = sum(path.stat().st_size for path in staging.iterdir())
    notes = (*notes_beside(stored.folder), *train.notes)
    return StatisticsResult(out, target.folder, layers, train.tokens, nbytes, time.perf_counter() - started, notes)


def _fingerprint(layer: torch.nn.Module) -> Fingerprint:
    """The shape of a layer's weight as a matrix (out, in)."""
    weight = cast(torch.Tensor, layer.weight).detach().float().cpu()
    return matrix_fingerprint(weight.T.contiguous() if type(layer).__name__ == "Conv1D" else weight)
