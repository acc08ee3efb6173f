"""What lies beside the weights of a merged model, or of each model of a pipeline: configurations, indexes."""

from __future__ import annotations

import json
import os
from pathlib import Path

from mapconv.checkpoint.codecs import plain_dtype
from mapconv.checkpoint.codecs.base import EncodedTensor
from mapconv.checkpoint.filenames import PIPELINE_FILE
from mapconv.checkpoint.gguf.header import is_gguf
from mapconv.checkpoint.index import Checkpoint
from mapconv.checkpoint.sidecars import brings_tokenizer, copy_model_files, copy_pipeline_files, write_model_config
from mapconv.checkpoint.staging import write_file
from mapconv.errors import CheckpointError, DataError, DependencyError
from mapconv.jsonfile import read_object
from mapconv.merging.plan import MergePlan
from mapconv.runtime.models import load_tokenizer


def write_companions(plan: MergePlan, adapter: Path, staging: Path, dtype: str, *, copied: bool) -> list[str]:
    """Write all but the weights into ``staging``; returns notes for the user. A single file has nothing beside it.

    Args:
        plan: what was merged.
        adapter: the first adapter, whose tokenizer is taken where it brings one.
        staging: the folder that becomes the model.
        dtype: of the merged weights, or ``auto``.
        copied: whether the weights of a quantized base stay in codes.
    """
    checkpoint = plan.target.checkpoint
    if checkpoint.is_file:
        return []
    if not checkpoint.models:
        _write_index(plan, checkpoint, "", staging)
        written = plain_dtype(checkpoint) if dtype == "auto" and not copied else dtype
        notes = copy_model_files(checkpoint.folder, adapter, staging)
        notes += _write_tokenizer(plan.target.tokenizer, staging)
        lifted = plan.target.lifted
        plain = [] if isinstance(checkpoint.tensors.get("lm_head.weight"), EncodedTensor) else ["lm_head"]
        return notes + write_model_config(
            checkpoint.folder, staging, written, plan.target.config, quantized=copied, lifted=lifted, plain=plain
        )
    copy_pipeline_files(checkpoint.folder, staging)
    for model in checkpoint.models:
        target = staging / model.folder.name
        _write_index(plan, model, f"{model.folder.name}/", target)
        copy_model_files(model.folder, target, target)
        write_model_config(model.folder, target, dtype)
    for part in _parts_without_weights(checkpoint):
        copy_pipeline_files(part, staging / part.name)
    return []


def _write_tokenizer(place: Path, staging: Path) -> list[str]:
    """Write the tokenizer of a GGUF file, where nothing else brought one; returns notes for the user."""
    if not is_gguf(place) or brings_tokenizer(staging):
        return []
    try:
        load_tokenizer(place).save_pretrained(staging)
    except (DataError, DependencyError) as error:
        return [f"the merged folder has no tokenizer: {error}"]
    return [f"the tokenizer is made of the vocabulary in {place.name}: the original model's own is better, if at hand"]


def _write_index(plan: MergePlan, model: Checkpoint, prefix: str, target: Path) -> None:
    """The index of the model's shards, where there are several or the base had one."""
    files = [file for file in plan.files if file.name.startswith(prefix)]
    if len(files) < 2 and model.index_metadata is None:
        return
    size = sum(file.nbytes - len(file.header) for file in files)
    weight_map = {tensor: file.name.removeprefix(prefix) for file in files for tensor in file.tensors}
    table = {
        "metadata": dict(model.index_metadata or {}) | {"total_size": size},
        "weight_map": dict(sorted(weight_map.items())),
    }
    write_file(target / model.index_file, json.dumps(table, indent=2) + "\n")


def _parts_without_weights(checkpoint: Checkpoint) -> list[Path]:
    """A pipeline's schedulers and tokenizers: the folders that its list names and that hold no model."""
    models = {model.folder for model in checkpoint.models}
    listed = read_object(checkpoint.folder / PIPELINE_FILE, CheckpointError)
    folders = (checkpoint.folder / name for name in listed if name == os.path.basename(name))
    return sorted(folder for folder in folders if folder.is_dir() and folder not in models)
