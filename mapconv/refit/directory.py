"""A MAP directory in the making: converted modules as they come, then all that the adapter brings besides."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mapconv.adapter import MapModule
from mapconv.checkpoint.headers import read_tensor_file
from mapconv.checkpoint.reader import TensorReader
from mapconv.checkpoint.sidecars import copy_tokenizer
from mapconv.checkpoint.staging import write_file
from mapconv.checkpoint.writer import SpooledFile, TensorSpec
from mapconv.errors import AdapterError
from mapconv.formats.config import names_parameter
from mapconv.formats.mapdir import (
    MAP_CONFIG_FILE,
    lora_settings_of,
    map_modules,
    needs_magnitude,
    peft_config,
    peft_factors,
    peft_magnitude,
    read_record,
    write_configs,
)
from mapconv.formats.peft import CONFIG_FILE, KEY_PREFIX, WEIGHTS_FILE
from mapconv.jsonfile import read_object
from mapconv.metadata.card import CARD_FILE, local_card
from mapconv.metadata.provenance import base_name, base_revision, map_config
from mapconv.placement.adapters import PlacedAdapter
from mapconv.placement.target_model import BiasUpdate
from mapconv.placement.weights import PlacedModule
from mapconv.refit.converted import Converted


class MapDirectory:
    """Writes one placed adapter's result into ``staging``; the file that makes it valid is written last.

    Args:
        placed: the adapter on the base that the result is for.
        staging: an empty folder.
        expected: the tensors of the result in their order, where that is known; their header then needs no second copy.
        sources: what the record says of what the result is made from; None: the adapter itself.
    """

    def __init__(
        self,
        placed: PlacedAdapter,
        staging: Path,
        expected: Sequence[TensorSpec] = (),
        sources: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        self._placed, self._staging, self._sources = placed, staging, sources
        self._spool = SpooledFile(staging / WEIGHTS_FILE, expected)
        self._stack: list[Converted] = []
        self._converted: dict[tuple[str, int | None], tuple[MapModule, torch.Tensor | None]] = {}
        self._has_own_biases = False

    def add(self, item: PlacedModule, result: Converted) -> None:
        """Write a module's factors; the experts of a stack come one after another."""
        self._stack.append(result)
        if len(self._stack) == item.experts:
            for name, tensor in peft_factors(item.module, *_side_by_side(self._stack)):
                self._spool.append(name, tensor)
            self._stack.clear()
        if result.bias is not None:
            self._has_own_biases = True
            self._spool.append(f"{KEY_PREFIX}{item.module.path}.base_layer.bias", result.bias)
        self._converted[item.key] = result.scalars, result.magnitude

    def carry(self, name: str, spec: TensorSpec, blocks: Iterable[torch.Tensor]) -> None:
        """Write a further tensor under PEFT's key ``name``; the factors of all modules come first."""
        self._spool.append_blocks(replace(spec, name=name), blocks)

    def finish(self, options: Mapping[str, Any], data: Mapping[str, Any] | None, **more: Any) -> tuple[MapModule, ...]:
        """Write the rest: magnitudes, the adapter's whole tensors, tokenizer, card and configurations.

        Args:
            options: what the run was asked for, for the record.
            data: the text that the refits looked at, or None.
            more: further entries of ``map_config.json``.
        """
        placed, converted = self._placed, [self._converted[item.key] for item in self._placed.modules]
        modules = tuple(scalars for scalars, _ in converted)
        if needs_magnitude(modules):
            for item, (_, magnitude) in zip(placed.modules, converted, strict=True):
                assert magnitude is not None  # where one module needs a magnitude, each was given one
                self._spool.append(*peft_magnitude(item.module, magnitude))
        self._keep_the_rest()
        self._spool.finish()
        copy_tokenizer(placed.adapter.path, self._staging)
        settings = placed.adapter.settings
        names = {item.module.path: item.module.path for item in placed.modules}
        names |= {
            item.module.path: item.parameter
            for item in placed.modules
            if item.experts > 1 or names_parameter(settings, item.parameter)
        }
        own_paths = {module.path for module in placed.adapter.modules}
        respelled = any(item.module.path not in own_paths for item in placed.modules)
        source = placed.adapter.config
        if any(item.module.method is not None for item in placed.modules):
            source, respelled = lora_settings_of(source, own_biases=self._has_own_biases), True
        config = peft_config(source, modules, names, base=base_name(placed), respelled=respelled)
        config["revision"] = base_revision(placed)
        self._describe(config, map_config(placed, options, modules, data=data, sources=self._sources) | more, modules)
        return modules

    def amend(self, **more: Any) -> None:
        """Put further entries into ``map_config.json`` as it is now, such as what was measured on the folder."""
        config = read_object(self._staging / CONFIG_FILE, AdapterError)
        record = read_record(self._staging / MAP_CONFIG_FILE) | more
        self._describe(config, record, map_modules(record, self._staging / MAP_CONFIG_FILE))

    def _describe(self, config: Mapping[str, Any], record: Mapping[str, Any], modules: Sequence[MapModule]) -> None:
        write_file(self._staging / CARD_FILE, local_card(config, record, modules))
        write_configs(self._staging, config, record)

    def close(self) -> None:
        self._spool.close()

    def _keep_the_rest(self) -> None:
        """Carry over what is not a low-rank update: heads, rows and biases unchanged, LoRA biases scaled."""
        placed = self._placed
        with TensorReader(placed.target.checkpoint.source) as reader:
            for item in {item.module.path: item for item in placed.modules}.values():
                if item.module.bias is not None:
                    bias = reader.read(item.module.bias).float() * item.scaling
                    self._spool.append(f"{KEY_PREFIX}{item.module.path}.lora_B.bias", bias)
            merged = {f"{item.parameter.removesuffix('weight')}bias" for item in placed.modules if item.changes_bias}
            kept = {item.tensor.name for item in placed.adapter.whole if item.parameter not in merged}
            for name, ref in placed.adapter.others.items():
                # A bias that the merge changes as well is written with it.
                if not self._has_own_biases or ref.name in kept:
                    blocks = reader.blocks(ref)
                    self._spool.append_blocks(TensorSpec(name, reader.dtype_of(ref), ref.shape), blocks)
            if placed.adapter.additions:
                self._keep_additions(reader)

    def _keep_additions(self, reader: TensorReader) -> None:
        """What a dialect adds to a base's vectors, as PEFT has it: the sums, which replace them."""
        target = self._placed.target
        adapted = {item.module.path for item in self._placed.modules}
        changed = {name for name, ref in target.tensors.items() if ref is not target.checkpoint.tensors[name]}
        for name in sorted({*changed, *target.biases}):
            value = reader.read(target.tensors[name]).float()
            for item in target.biases.get(name, ()):
                assert isinstance(item, BiasUpdate)  # no dialect that adds to vectors brings another method's layers
                value = value + item.scaling * reader.read(item.tensor).float().view(value.shape)
            path, _, leaf = name.rpartition(".")
            self._spool.append(f"{KEY_PREFIX}{path}{'.base_layer' * (path in adapted)}.{leaf}", value)


def measured(folder: Path, modules: Sequence[MapModule]) -> tuple[int, int]:
    """(parameters, bytes) of the adapter as written and as ``inspect`` counts it: α and β take the place of a low-rank
    module's magnitude, which is stored for stock PEFT alone."""
    derived = {f"{KEY_PREFIX}{module.path}.lora_magnitude_vector" for module in modules if module.direction != "dora"}
    own = [ref for ref in read_tensor_file(folder / WEIGHTS_FILE).tensors if ref.name not in derived]
    return sum(ref.numel for ref in own), sum(ref.nbytes for ref in own)


def _side_by_side(stack: Sequence[Converted]) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of a stack of experts: A has them in turn, B side by side, with the expert counting fastest."""
    if len(stack) == 1:
        return stack[0].A, stack[0].B
    return torch.cat([expert.A for expert in stack]), torch.stack([expert.B for expert in stack], dim=2).flatten(1)
