"""What a calibration measured, and where it is recorded: ``map_config.json`` and the model card."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mapconv.adapter import MapModule
from mapconv.checkpoint.staging import write_file
from mapconv.errors import AdapterError
from mapconv.fidelity.metrics import ModelNumbers
from mapconv.fidelity.weight_errors import weight_errors
from mapconv.formats import read_adapter
from mapconv.formats.mapdir import MAP_CONFIG_FILE, read_record, write_configs
from mapconv.formats.peft import CONFIG_FILE, WEIGHTS_FILE
from mapconv.jsonfile import finite, read_object
from mapconv.metadata.card import CARD_FILE, local_card
from mapconv.metadata.readme import read_readme
from mapconv.placement.adapters import PlacedAdapter, place_adapter
from mapconv.training.loop import Recipe


@dataclass(frozen=True)
class CalibrationReport:
    """What a calibration did, in numbers measured on the bytes that were read and written.

    ``models`` has the held-out numbers of ``base``, ``source``, ``closed form`` (the adapter as it came) and
    ``calibrated``; ``history`` the held-out objective after so many steps, and ``update_sizes`` the median of |β|/‖W0‖
    over the weights at the same steps. ``modules`` are the calibrated scalars.
    """

    recipe: Recipe
    steps: int
    best_step: int
    stopped: str | None
    interrupted: bool
    tokens: int
    trained_parameters: int
    train_sequences: int
    held_out_sequences: int
    held_out_positions: int
    history: tuple[tuple[int, float], ...]
    models: dict[str, ModelNumbers]
    modules: tuple[MapModule, ...]
    data: dict[str, str]
    seconds: float
    update_sizes: tuple[tuple[int, float], ...] = ()
    notes: tuple[str, ...] = field(default=())

    def record(self) -> dict[str, Any]:
        """What ``map_config.json`` keeps: no path of this machine, and no time."""
        table = asdict(self) | {"models": {name: numbers.to_dict() for name, numbers in self.models.items()}}
        for name in ("modules", "notes", "seconds", "interrupted", "recipe"):
            del table[name]
        return asdict(self.recipe) | table


def calibrated_modules(folder: Path, fresh: Path, source: PlacedAdapter, base: Path) -> tuple[MapModule, ...]:
    """The calibrated scalars beside those before, with ε on ``base`` measured against the source on its own."""
    before = {(module.path, module.expert): module for module in read_adapter(folder).map_modules}
    placed = place_adapter(fresh, base)
    errors = weight_errors(source, placed)
    modules = []
    for module in placed.adapter.map_modules:
        key = (module.path, module.expert)
        old = before[key]
        modules.append(
            replace(
                module,
                error=errors[key],
                alpha_before=old.alpha,
                beta_before=old.beta,
                error_before=old.error,
            )
        )
    return tuple(modules)


def write_calibrated(folder: Path, fresh: Path, into: Path, report: CalibrationReport) -> None:
    """Move the measured bytes from ``fresh`` into place and record what was measured; ``map_config.json`` comes last.

    What the adapter is of and was made from is as ``folder`` has it.
    """
    old_config, record = read_object(folder / CONFIG_FILE, AdapterError), read_record(folder / MAP_CONFIG_FILE)
    config = read_object(fresh / CONFIG_FILE, AdapterError)
    config |= {name: old_config.get(name) for name in ("base_model_name_or_path", "revision")}
    entries = {(entry["path"], entry.get("expert")): entry for entry in record["modules"]}
    record["modules"] = [entries[module.path, module.expert] | module.to_dict() for module in report.modules]
    # An adapter that is calibrated again keeps the record of the first time.
    earlier = record.get("calibration")
    record["calibration"] = finite(report.record()) | ({"earlier": earlier} if earlier else {})
    (fresh / WEIGHTS_FILE).replace(into / WEIGHTS_FILE)
    shutil.rmtree(fresh)
    write_file(into / CARD_FILE, local_card(config, record, report.modules, read_readme(into / CARD_FILE)))
    write_configs(into, config, record)
