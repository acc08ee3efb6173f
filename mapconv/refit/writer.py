"""Write a MAP directory: every module of a placed adapter converted, block by block, and all that it brings besides."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mapconv.adapter import MapModule
from mapconv.algebra.moments import InputRoot
from mapconv.checkpoint.reader import SAFETENSORS_DTYPES, TensorReader
from mapconv.checkpoint.sidecars import copy_tokenizer
from mapconv.checkpoint.staging import write_file
from mapconv.checkpoint.writer import SpooledFile, TensorSpec
from mapconv.data import Dataset, Rows, read_dataset, read_rows
from mapconv.formats.mapdir import needs_magnitude, peft_config, peft_factors, peft_magnitude, write_configs
from mapconv.formats.peft import KEY_PREFIX, WEIGHTS_FILE
from mapconv.hub.ranges import prefetch
from mapconv.metadata.card import CARD_FILE, local_card
from mapconv.metadata.provenance import base_name, base_revision, map_config
from mapconv.placement.adapters import PlacedAdapter
from mapconv.placement.skeleton import read_model_config
from mapconv.placement.target_model import TargetModel
from mapconv.placement.weights import PlacedModule
from mapconv.refit.activations import input_roots
from mapconv.refit.converter import Converted, Converter
from mapconv.refit.norms import BaseNorms
from mapconv.refit.plan import UpgradePlan
from mapconv.runtime.devices import resolve_device
from mapconv.runtime.models import load_tokenizer, stored_text_classes
from mapconv.runtime.progress import work_bar
from mapconv.runtime.threads import in_order

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """The sequences that refits look at, the data that they are from, and what the result records of them."""

    sequences: Dataset
    rows: Rows
    record: dict[str, Any]


def read_data(path: Path, target: TargetModel, *, samples: int, length: int) -> Sample:
    """The first sequences of the training part: what a calibration holds out of the same file stays unseen."""
    rows = read_rows(path)
    config = target.source_config or read_model_config(target.folder)
    classes = stored_text_classes(target.class_name or "", config)
    train, _ = read_dataset(rows, load_tokenizer(target.folder), length=length, samples=samples, classes=classes)
    record = {"name": path.name, "fingerprint": train.fingerprint, "sequences": len(train), "tokens": train.tokens}
    return Sample(train, rows, record)


def write_map_directory(
    plan: UpgradePlan,
    norms: BaseNorms,
    sample: Sample | None,
    staging: Path,
    *,
    quiet: bool,
) -> tuple[MapModule, ...]:
    """Convert every module into ``staging``; returns their scalars."""
    placed, options = plan.placed, plan.options
    spool = SpooledFile(staging / WEIGHTS_FILE, _expected(plan))
    try:
        converted = _convert(plan, norms, sample, spool, quiet=quiet)
        modules = tuple(result.scalars for result in converted)
        if needs_magnitude(modules):
            for item, result in zip(placed.modules, converted, strict=True):
                spool.append(*peft_magnitude(item.module, result.magnitude))
        _keep_the_rest(placed, spool)
        spool.finish()
    finally:
        spool.close()
    copy_tokenizer(placed.adapter.path, staging)
    base = base_name(placed)
    names = {item.module.path: item.parameter if item.experts > 1 else item.module.path for item in placed.modules}
    own_paths = {module.path for module in placed.adapter.modules}
    respelled = any(item.module.path not in own_paths for item in placed.modules)
    config = peft_config(placed.adapter.config, modules, names, base=base, respelled=respelled)
    config["revision"] = base_revision(placed)
    record = map_config(placed, asdict(options), modules, data=None if sample is None else sample.record)
    write_file(staging / CARD_FILE, local_card(config, record))
    write_configs(staging, config, record)
    return modules


def _convert(
    plan: UpgradePlan,
    norms: BaseNorms,
    sample: Sample | None,
    spool: SpooledFile,
    *,
    quiet: bool,
) -> list[Converted]:
    """Spool the factors of every module; returns what is left of each."""
    placed, tokens = plan.placed, 0 if sample is None else sample.sequences.tokens
    # A module takes its refit and its share of the passes that find its inputs.
    costs = {job.placed.key: job.work + 2 * tokens * job.placed.weight.numel for job in plan.jobs}
    converted = {}
    source = placed.target.checkpoint.source
    light, needed = ([item.weight for item in items] for items in (plan.light, plan.reading))
    prefetch(source, [piece.tensor for w in (*needed, *norms.missing(light)) for piece in w.pieces], quiet=quiet)
    with TensorReader(source) as reader, work_bar(costs.values(), "upgrading", unit="module", quiet=quiet) as advance:
        norms.load(light, reader)
        converter = Converter(reader, plan, norms)
        for modules, roots in _groups(plan, sample):
            stack: list[Converted] = []
            jobs = [(item, roots.get(item.module.path)) for item in modules]
            results = in_order(lambda job: converter.convert(*job), jobs, plan.workers)
            for item, result in zip(modules, results, strict=True):
                stack.append(result)
                if len(stack) == item.experts:
                    # Experts follow one another: A has them in turn, B side by side, with the expert counting fastest.
                    A = torch.cat([expert.A for expert in stack])
                    B = torch.stack([expert.B for expert in stack], dim=2).flatten(1)
                    for name, tensor in peft_factors(item.module, A, B):
                        spool.append(name, tensor)
                    stack.clear()
                converted[item.key] = result.without_factors()
                advance(costs[item.key])
                log.info("%s: %s, rank %d, ε %.3g", *_told(item, plan, result))
    return [converted[item.key] for item in placed.modules]


def _told(item: PlacedModule, plan: UpgradePlan, result: Converted) -> tuple[str, str, int, float]:
    expert = "" if item.expert is None else f", expert {item.expert}"
    return f"{item.module.path}{expert}", plan.kind_of(item), result.scalars.rank, result.scalars.error or 0.0


def _groups(
    plan: UpgradePlan, sample: Sample | None
) -> Iterable[tuple[Sequence[PlacedModule], Mapping[str, InputRoot | None]]]:
    """The modules that are converted together, and what is known of their inputs."""
    placed, options = plan.placed, plan.options
    if sample is None or options.statistics is None:
        return [(placed.modules, {})]
    return input_roots(placed, sample.sequences, statistics=options.statistics, device=resolve_device(options.device))


def _expected(plan: UpgradePlan) -> list[TensorSpec]:
    """The tensors of the result in their order, where that is known before any is computed: a LoRA of linear layers."""
    placed, options = plan.placed, plan.options
    simple = all(
        job.kind == "keep-lora" and job.placed.experts == 1 and job.placed.module.bias is None for job in plan.jobs
    )
    if not simple or placed.adapter.others:
        return []
    specs = []
    for item in placed.modules:
        dtype, (height, width) = options.stored_dtype(item), item.weight.shape
        A, B = (
            torch.empty(shape, dtype=dtype, device="meta")
            for shape in ((item.effective_rank, width), (height, item.effective_rank))
        )
        specs += [
            TensorSpec(name, SAFETENSORS_DTYPES[dtype], tuple(t.shape)) for name, t in peft_factors(item.module, A, B)
        ]
    return specs


def _keep_the_rest(placed: PlacedAdapter, spool: SpooledFile) -> None:
    """Carry over what is no low-rank update: heads, rows and biases as they are, LoRA biases with their scaling."""
    with TensorReader() as reader:
        for item in {item.module.path: item for item in placed.modules}.values():
            if item.module.bias is not None:
                bias = reader.read(item.module.bias).float() * item.scaling
                spool.append(f"{KEY_PREFIX}{item.module.path}.lora_B.bias", bias)
        for name, ref in placed.adapter.others.items():
            spool.append(name, reader.read(ref))
