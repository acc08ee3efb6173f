"""Compare a combination with what it is one of: the model whose weights are T = W0 + Σ w_i·(T_i − W0), or their mix.

No adapter has such weights. They are put into a model of their own, in float32, in a temporary folder; what adapters
bring whole is there as the result has it, where `--whole` settled which of them counts.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from mapconv.algebra.norms import row_blocks
from mapconv.checkpoint.reader import TensorReader
from mapconv.commands.verify import VerifyReport, means, run_both
from mapconv.data import read_rows
from mapconv.errors import AdapterError
from mapconv.fidelity.against_model import ModelComparison
from mapconv.fidelity.saved import check_report_place, save_report
from mapconv.hub.locate import locate_adapter, locate_result
from mapconv.merging.companions import write_companions
from mapconv.merging.plan import plan_merge
from mapconv.merging.writer import write_weights
from mapconv.metadata.provenance import source_fingerprint
from mapconv.placement.adapters import place_adapter, place_apart
from mapconv.placement.union import shared_weights
from mapconv.placement.weights import WeightView
from mapconv.refit.combination import CombineOptions, Combiner
from mapconv.refit.norms import BaseNorms
from mapconv.refit.targets.base import RowsTarget
from mapconv.runtime.devices import resolve_device


def verify_combination(
    result: str | Path,
    sources: Sequence[str | Path],
    combined: Mapping[str, Any],
    *,
    base: str | Path | None = None,
    data: str | Path | None = None,
    samples: int = 8,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    save: bool = False,
    allow_pickle: bool = False,
    quiet: bool = True,
) -> VerifyReport:
    """As ``verify``, of what ``combine`` made of ``sources`` with the options ``combined``.

    Raises:
        MapconvError: a model, an adapter or the text cannot be used.
    """
    started, result = time.perf_counter(), locate_result(result)
    if save:
        check_report_place(result)
    allow_pickle = allow_pickle or bool(combined.get("allow_pickle"))
    rows, place = read_rows(data), resolve_device(device)
    placed = place_adapter(result, base)
    folder = placed.target.folder
    paths = [locate_adapter(source, allow_pickle=allow_pickle) for source in sources]
    with TemporaryDirectory(prefix="mapconv-") as model:
        plan = plan_merge([placed], dtype="float32")
        write_weights(plan, Path(model), quiet=True)
        write_companions(plan, result, Path(model), "float32", copied=False)
        _write_targets(Path(model), result, paths, folder, combined, allow_pickle=allow_pickle)
        compared = ModelComparison(placed, Path(model), folder, dtype=dtype, device=place)
    total, _, notes = run_both(compared, rows, folder, samples=samples, quiet=quiet)
    with torch.inference_mode():
        modules = tuple(compared.module_errors())
    report = VerifyReport(
        result=result,
        source=paths[0],
        base=folder,
        tokens=total.result.positions,
        modules=modules,
        seconds=time.perf_counter() - started,
        served=None,
        notes=tuple(notes),
        **means(total, causal=compared.is_causal),
    )
    if save:
        save_report(result, report.to_dict())
    return report


def _write_targets(
    model: Path, result: Path, sources: Sequence[Path], base: Path, combined: Mapping[str, Any], *, allow_pickle: bool
) -> None:
    """Put T of every combined weight into a model's files, which hold what the result's adapter merges to.

    Raises:
        AdapterError: the sources adapt other weights than the result.
    """
    places = {item.key: item.weight for item in place_adapter(result, model).modules}
    placed = place_apart(sources, base, allow_pickle=allow_pickle)
    shared = shared_weights(placed)
    if places.keys() != {item.item.key for item in shared}:
        raise AdapterError(
            f"{result} adapts other weights than {', '.join(map(str, sources))}, so is not made of them."
        )
    options = CombineOptions(
        weights=tuple(combined.get("weights") or [1.0] * len(sources)),
        method=combined.get("method") or "sum",
        density=combined.get("density") or 1.0,
        seed=combined.get("seed") or 0,
        rank=None,
        tolerance=None,
        max_rank=1,
        direction="low-rank",
        lora_compatible=False,
        dtype="float32",
        device=torch.device("cpu"),
    )
    checkpoint = placed[0].target.checkpoint
    contents = [source_fingerprint(item.adapter.path) for item in placed]
    with TensorReader(checkpoint.source) as reader, torch.inference_mode():
        norms, names = BaseNorms(checkpoint), [*map(str, sources)]
        combiner = Combiner(reader, norms, options, names, contents, with_magnitude=False, force=True)
        for weight in shared:
            _write(places[weight.item.key], combiner.target(weight))


def _write(view: WeightView, target: RowsTarget) -> None:
    """Put T in the place of a float32 weight on disk, a block of rows at a time."""
    matrices = []
    for piece in view.pieces:
        ref = piece.tensor
        stored = torch.from_file(str(ref.file), shared=True, size=ref.stop, dtype=torch.uint8)[ref.start :]
        matrix = stored.view(torch.float32).view(piece.grid)[piece.index]
        rows = slice(piece.offset, piece.offset + piece.stop - piece.start)
        matrices.append((piece, matrix[:, rows].T if piece.transposed else matrix[rows]))
    for start, stop in row_blocks(*view.shape):
        change, weight = target.rows(start, stop, torch.float64)
        rows = (change + weight).float()
        for piece, matrix in matrices:
            first, last = max(start, piece.start), min(stop, piece.stop)
            if first < last:
                matrix[first - piece.start : last - piece.start] = rows[first - start : last - start]
