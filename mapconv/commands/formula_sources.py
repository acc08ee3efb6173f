"""Sources of a verification that no release of PEFT runs: those of MAP's authors, and MAP on other methods.

Their formula is what a result is held to.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from mapconv.errors import UnsupportedError
from mapconv.fidelity.against_model import ModelComparison
from mapconv.fidelity.comparison import ModuleError
from mapconv.fidelity.weight_errors import weight_errors
from mapconv.formats.peft import CONFIG_FILE
from mapconv.merging.companions import write_companions
from mapconv.merging.plan import plan_merge
from mapconv.merging.writer import write_weights
from mapconv.placement.adapters import PlacedAdapter, place_adapter
from mapconv.refit.norms import BaseNorms
from mapconv.refit.plan import ConvertOptions, plan_upgrade
from mapconv.refit.writer import write_map_directory


def is_map_on_a_method(source: PlacedAdapter) -> bool:
    """Whether a source is another method's update with two scalars a layer."""
    return any(module.map_scalars is not None for module in source.adapter.modules)


def beside_merged(
    source: PlacedAdapter,
    own: PlacedAdapter | None,
    result: Path,
    *,
    dtype: str,
    device: torch.device,
    allow_pickle: bool,
) -> ModelComparison:
    """The models where the source is MAP on another method: no release of PEFT runs it, so it is merged, in float32."""
    folder, base = source.adapter.path, source.target.folder
    if own is not None:
        raise UnsupportedError(
            f"{folder} is MAP on another method, which no release of PEFT can run as it is on another base than its "
            "own: upgrade it first, and verify against the result."
        )
    placed = place_adapter(result, base, allow_pickle=allow_pickle) if (result / CONFIG_FILE).is_file() else result
    with TemporaryDirectory(prefix="mapconv-") as merged:
        plan = plan_merge([source], dtype="float32")
        write_weights(plan, Path(merged), quiet=True)
        write_companions(plan, folder, Path(merged), "float32", copied=False)
        return ModelComparison(placed, Path(merged), base, dtype=dtype, device=device)


@contextmanager
def run_by_peft(source: PlacedAdapter) -> Iterator[PlacedAdapter]:
    """The source where stock PEFT computes it: that of MAP's authors, which no release does, in a MAP directory."""
    if source.adapter.method != "LoMAP":
        yield source
        return
    with TemporaryDirectory(prefix="mapconv-") as folder:
        plan = plan_upgrade(source, ConvertOptions())
        write_map_directory(plan, BaseNorms(source.target.checkpoint), None, Path(folder), quiet=True)
        yield replace(source, adapter=replace(source.adapter, path=Path(folder)))


def errors_by_formula(source: PlacedAdapter, own: PlacedAdapter | None, result: Path) -> tuple[ModuleError, ...] | None:
    """Errors against MAP's formula on the files of the source; None where stock PEFT can be asked."""
    by_peft = source.adapter.method != "LoMAP" and not is_map_on_a_method(source)
    if by_peft or not (result / CONFIG_FILE).is_file():
        return None
    errors = weight_errors(source, own or place_adapter(result, source.target.folder))
    return tuple(ModuleError(path, error) for (path, _), error in errors.items())
