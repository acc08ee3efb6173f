"""The part of an adapter that a format cannot hold, merged into a base of its own."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from mapconv.checkpoint.filenames import MERGE_RECORD
from mapconv.checkpoint.staging import awaits, check_output, staged_with, write_file
from mapconv.errors import OutputError, UnsupportedError
from mapconv.exporting.limits import Limits
from mapconv.merging.companions import write_companions
from mapconv.merging.merger import survival_record
from mapconv.merging.plan import MergePlan, plan_merge
from mapconv.merging.writer import write_weights
from mapconv.metadata.provenance import merge_record
from mapconv.placement.adapters import PlacedAdapter


class Folding:
    """What is left over of a placed adapter, and the base that it is merged into.

    Whole tensors and biases are part of the target model that the adapter was placed on, so that a merge of no more
    than the modules that are left over writes them as well.
    """

    def __init__(self, placed: PlacedAdapter, limits: Limits, folder: Path) -> None:
        held = limits.held(placed)
        self._rest = replace(placed, modules=tuple(item for item in placed.modules if item.key not in held))
        self._folder = folder
        self._plan: MergePlan = plan_merge([self._rest])
        if self._plan.target.checkpoint.is_file:
            raise UnsupportedError(
                f"{placed.target.folder} is a single file: --fold-into takes a base that is a folder."
            )

    def check(self, adapter_out: Path, *, force: bool) -> None:
        """Refuse a place that is taken, or that is the adapter's."""
        own, other = self._folder.resolve(), adapter_out.resolve()
        if own.is_relative_to(other) or other.is_relative_to(own):
            raise OutputError(
                f"{self._folder} and the adapter's output {adapter_out} lie in one another: give "
                "the base a folder apart."
            )
        inputs = [self._rest.adapter.path, self._plan.target.folder]
        force = force or awaits(self._folder, adapter_out)
        check_output(self._folder, force=force, inputs=inputs, nbytes=self._plan.nbytes)

    def staged(
        self, adapter: AbstractContextManager[Path], adapter_out: Path, *, force: bool
    ) -> AbstractContextManager[tuple[Path, Path]]:
        """The folder to write the base to, and that or the file of the adapter's staging: both appear, or none."""
        return staged_with(self._folder, adapter, adapter_out, force=force)

    def write(self, staging: Path | None, *, quiet: bool) -> list[str]:
        """Write the base with the rest in it into ``staging`` (None: nowhere); returns notes for the user."""
        source, target = self._rest.adapter.path, self._plan.target
        merged = write_weights(self._plan, staging, quiet=quiet)
        if staging is None:
            return [*target.notes]
        notes = write_companions(self._plan, source, staging, "auto", copied=False)
        record = merge_record([self._rest], None) | {"survival": survival_record(merged)}
        write_file(staging / MERGE_RECORD, json.dumps(record, indent=2) + "\n")
        return [*target.notes, *notes]
