"""What ``upgrade`` and ``rebase`` share: one adapter is refitted into another folder, and what comes back of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mapconv.adapter import MapModule
from mapconv.checkpoint.filenames import ADAPTER_FILES
from mapconv.checkpoint.staging import check_output, staged_folder
from mapconv.checkpoint.unchanged import FileSignature, signatures_of, unchanged
from mapconv.commands.outputs import output_beside
from mapconv.hub.locate import locate_adapter
from mapconv.placement.target_model import TargetModel

if TYPE_CHECKING:
    from mapconv.training.calibration import CalibrationReport


@dataclass(frozen=True)
class Refitting:
    """An adapter's folder, and the folder that its refit goes to."""

    source: Path
    out: Path
    #: As the source's files were before anything was read of them.
    signatures: dict[Path, FileSignature]

    @classmethod
    def of(cls, source: str | Path, out: str | Path | None, suffix: str, *, allow_pickle: bool) -> Refitting:
        """Find the source, which may be on the Hub; without ``out`` its refit is ``<source>-<suffix>``."""
        out = output_beside(source, suffix) if out is None else Path(out)
        found = locate_adapter(source, allow_pickle=allow_pickle)
        return cls(found, out, signatures_of([found], ADAPTER_FILES))

    def check_output(self, *bases: TargetModel, nbytes: int, force: bool) -> None:
        """Refuse an output that is taken, is one of the inputs, or has no room (``staging.check_output``)."""
        check_output(self.out, force=force, inputs=[self.source, *(base.folder for base in bases)], nbytes=nbytes)

    @contextmanager
    def staged(self, *bases: TargetModel, force: bool) -> Iterator[Path]:
        """Yield the folder to write into, which becomes ``out`` unless the source or a base changed meanwhile."""
        signatures = dict(self.signatures)
        for base in bases:
            signatures |= base.checkpoint.signatures
        with staged_folder(self.out, force=force) as staging, unchanged(signatures):
            yield staging


@dataclass(frozen=True, kw_only=True)
class RefitResult:
    """What a refit wrote, or with ``dry_run`` what it would write (then without modules).

    ``parameters`` and ``nbytes`` are those of the adapter, as ``inspect`` counts them in the result. ``base`` is the
    model that the source was trained on.
    """

    out: Path
    source: Path
    base: Path
    method: str
    modules: tuple[MapModule, ...]
    parameters: int
    nbytes: int
    seconds: float
    dry_run: bool
    plain_lora: bool
    calibration: CalibrationReport | None = None
    notes: tuple[str, ...] = ()

    @property
    def worst_error(self) -> float:
        return max((module.measured_error for module in self.modules), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        table = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
        table["calibration"] = None if self.calibration is None else self.calibration.record()
        table["modules"] = [module.to_dict() for module in self.modules]
        return table | {"worst_error": self.worst_error}
