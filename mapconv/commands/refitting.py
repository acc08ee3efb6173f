"""What ``upgrade``, ``rebase``, ``extract`` and ``combine`` share: a folder made of others, and what they return."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mapconv.adapter import MapModule
from mapconv.checkpoint.filenames import ADAPTER_FILES
from mapconv.checkpoint.index import Checkpoint
from mapconv.checkpoint.staging import check_output, staged_folder
from mapconv.checkpoint.unchanged import FileSignature, signatures_of, unchanged
from mapconv.commands.outputs import output_beside
from mapconv.hub.locate import locate_adapter
from mapconv.wording import counted

if TYPE_CHECKING:
    from mapconv.refit.writer import Sample
    from mapconv.training.calibration import CalibrationReport


@dataclass(frozen=True)
class Refitting:
    """The folders of the adapters that a result is made of, none for one that models alone make, and its own."""

    sources: tuple[Path, ...]
    out: Path
    #: As the sources' files were before anything was read of them.
    signatures: dict[Path, FileSignature]

    @classmethod
    def of(cls, sources: Sequence[str | Path], out: str | Path | None, suffix: str, *, allow_pickle: bool) -> Refitting:
        """Find the sources, which may be on the Hub; without ``out`` the result is ``<first>-<suffix>``."""
        out = output_beside(sources[0], suffix) if out is None else Path(out)
        found = tuple(locate_adapter(source, allow_pickle=allow_pickle) for source in sources)
        return cls(found, out, signatures_of(found, ADAPTER_FILES))

    @classmethod
    def of_model(cls, model: str | Path, out: str | Path | None, suffix: str) -> Refitting:
        """A result that is made of models alone; without ``out`` it is ``<model>-<suffix>``."""
        return cls((), output_beside(model, suffix) if out is None else Path(out), {})

    @property
    def source(self) -> Path:
        """The first source."""
        return self.sources[0]

    def check_output(self, *models: Checkpoint, nbytes: int = 0, force: bool) -> None:
        """Refuse an output that is taken, is one of the inputs, or has no room (``staging.check_output``)."""
        inputs = [*self.sources, *(model.folder for model in models)]
        check_output(self.out, force=force, inputs=inputs, nbytes=nbytes)

    @contextmanager
    def staged(self, *models: Checkpoint, force: bool) -> Iterator[Path]:
        """Yield the folder to write into, which becomes ``out`` unless a source or a model changed meanwhile."""
        signatures = dict(self.signatures)
        for model in models:
            signatures |= model.signatures
        with staged_folder(self.out, force=force) as staging, unchanged(signatures):
            yield staging


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a command made, or with ``dry_run`` what it would make (then without modules).

    ``parameters`` and ``nbytes`` are those of the adapter, as ``inspect`` counts them in the result. ``base`` is the
    model that the sources were trained on.
    """

    out: Path
    base: Path
    method: str
    modules: tuple[MapModule, ...]
    parameters: int
    nbytes: int
    seconds: float
    dry_run: bool
    plain_lora: bool
    notes: tuple[str, ...] = ()

    @property
    def worst_error(self) -> float:
        return max((module.measured_error for module in self.modules), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        table = {field.name: _plain(getattr(self, field.name)) for field in fields(self)}
        table["modules"] = [module.to_dict() for module in self.modules]
        return table | {"worst_error": self.worst_error}


@dataclass(frozen=True, kw_only=True)
class RefitResult(Result):
    """What the refit of one adapter made."""

    source: Path
    calibration: CalibrationReport | None = None

    def to_dict(self) -> dict[str, Any]:
        calibration = None if self.calibration is None else self.calibration.record()
        return super().to_dict() | {"calibration": calibration}


def data_notes(sample: Sample, wanted: int, refitted: Sequence[MapModule]) -> list[str]:
    """What is wrong with a text of which ``wanted`` sequences were to run, and which of the ``refitted`` modules it
    could not serve; a dry run has none."""
    notes, found = list(sample.sequences.notes), len(sample.sequences)
    if found < wanted:
        notes.append(f"--data gives {counted(found, 'sequence')} beside those held out, fewer than the {wanted} to run")
    unseen = [module.path for module in refitted if module.output_error is None and module.error]
    if unseen:
        shown = ", ".join(unseen[:3]) + (", …" if len(unseen) > 3 else "")
        notes.append(
            f"--data gave no input vectors to {counted(len(unseen), 'module')}, refitted by the weights alone: {shown}"
        )
    return notes


def _plain(value: Any) -> Any:
    """A value as JSON has it: paths as text."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def missed_tolerance(modules: Sequence[MapModule], tolerance: float | None, max_rank: int) -> list[str]:
    """That modules are further off than was asked for, because their ranks end at ``max_rank``."""
    errors = [(m, m.error if m.output_error is None else m.output_error) for m in modules if m.rank >= max_rank]
    above = sum(error is not None and tolerance is not None and error > tolerance for _, error in errors)
    if not above:
        return []
    return [f"--max-rank {max_rank} leaves {counted(above, 'module')} above ε = {tolerance:g}: raise it"]
