"""Read mutated files of every kind that mapconv takes from strangers, and count how each reading ends.

    python examples/benchmarks/fuzz.py [--inputs 250000] [--seed 0] [--only NAME] [--show]

An input ends *fine* (it is read), *refused* (one sentence that names the file), or *unexpected*: any other exception,
a sentence of several lines or one that no stream can encode, or five seconds of processor time. The same seed makes the
same inputs; ``--show`` prints each unexpected one with its number.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from mutations import mutated_header, mutated_json, mutated_lines, mutated_text
from safetensors.torch import save_file

import mapconv
from mapconv.catalog.ledger import LEDGER_FILE, read_lines
from mapconv.catalog.reading import read_catalog
from mapconv.checkpoint.index import read_checkpoint
from mapconv.checkpoint.model_config import read_model_config
from mapconv.data.rows import read_rows
from mapconv.errors import MapconvError, sentence
from mapconv.fidelity.saved import read_report, save_report
from mapconv.formats import read_adapter
from mapconv.metadata.card import card_facts
from mapconv.metadata.readme import check_card, parse_readme
from mapconv.placement.adapters import place_adapter
from mapconv.publishing.package import pack
from mapconv.reporting.catalog_page import catalog_page
from mapconv.reporting.ledger import read_ledger
from mapconv.untrusted.printable import printable_message

SLOW = 5.0
Mutation = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True)
class Target:
    """A file, how it is mutated, and what reads it; ``share`` of the inputs."""

    name: str
    file: Path
    mutate: Mutation
    read: Callable[[], object]
    share: int = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=250_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only")
    parser.add_argument("--show", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        chosen = [target for target in targets(Path(folder)) if options.only in (None, target.name)]
        shares = sum(target.share for target in chosen)
        print(f"{'file':32}{'inputs':>9}{'fine':>9}{'refused':>9}{'unexpected':>12}{'seconds':>9}")
        total: Counter[str] = Counter()
        for target in chosen:
            started = time.perf_counter()
            found = run(target, options.inputs * target.share // shares, options.seed, show=options.show)
            total += found
            _print_row(target.name, found, time.perf_counter() - started)
        _print_row("all", total, 0.0)
    sys.exit(1 if total["unexpected"] else 0)


def run(target: Target, inputs: int, seed: int, *, show: bool = False) -> Counter[str]:
    """Read ``inputs`` mutations of one file, and put the file back."""
    content, counts = target.file.read_bytes(), Counter(fine=0, refused=0, unexpected=0)
    for number in range(inputs):
        target.file.write_bytes(target.mutate(content, random.Random(f"{target.name} {seed} {number}")))
        end, error = outcome(target.read)
        counts[end] += 1
        if show and end == "unexpected":
            print(f"{target.name} {number}: {error!r:.300}")
            traceback.print_exception(error, limit=-3)
    target.file.write_bytes(content)
    return counts


def outcome(read: Callable[[], object]) -> tuple[str, BaseException | None]:
    """How a reading ends, and the error that it ended with."""
    started, error = time.process_time(), None
    try:
        read()
        end = "fine"
    except (MapconvError, OSError) as refusal:
        error = refusal
        message = sentence(refusal)
        shown = printable_message(message)
        named = isinstance(refusal, MapconvError) or refusal.filename is not None
        own = all(line.startswith("  ") for line in shown.splitlines()[1:])
        end = "refused" if named and own and _is_text(shown) else "unexpected"
    except Exception as accident:
        end, error = "unexpected", accident
    if time.process_time() - started > SLOW:
        end, error = "unexpected", error or TimeoutError(f"more than {SLOW} s")
    return end, error


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _print_row(name: str, found: Counter[str], seconds: float) -> None:
    print(
        f"{name:32}{found.total():9,}{found['fine']:9,}{found['refused']:9,}{found['unexpected']:12,}{seconds:9.0f}",
        flush=True,
    )


def targets(folder: Path) -> list[Target]:
    """Sound files of every kind below ``folder``, to start from."""
    base, lora, sharded = (
        _base(folder / "base"),
        _adapter(folder / "lora", folder / "base"),
        _sharded(folder / "sharded"),
    )
    converted, merged = folder / "lora-map", folder / "merged"
    mapconv.upgrade(lora, converted)
    mapconv.merge(lora, merged)
    module = {"path": "model.layers.0.self_attn.q_proj", "error": 0.01}
    numbers = dict.fromkeys(
        ("kl", "kl_base", "kl_largest", "top1_agreement", "perplexity_base", "perplexity_source"), 0.5
    )
    for result in (converted, merged):
        save_report(result, {"tokens": 100, "modules": [module], "perplexity_result": 2.0, **numbers})
    (converted / "README.md").write_text(_README)
    catalog, lines, ledger = folder / "catalog.yaml", folder / "catalog.jsonl", folder / "run" / LEDGER_FILE
    catalog.write_text(_CATALOG)
    lines.write_text('{"defaults": {"base": "base", "upgrade": {"rank": 4}}}\n{"source": "lora", "output": "a"}\n')
    ledger.parent.mkdir()
    ledger.write_text("".join(f"{json.dumps(line)}\n" for line in _LEDGER))
    rows = folder / "rows.jsonl"
    rows.write_text("".join(f"{json.dumps(row)}\n" for row in _ROWS))
    packed, again = partial(pack, converted, base_id="owner/base"), partial(pack, merged, base_id="owner/base")
    found = [
        Target("adapter_config.json", lora / "adapter_config.json", mutated_json, partial(read_adapter, lora), 8),
        Target("adapter_model.safetensors", lora / "adapter_model.safetensors", mutated_header, partial(read_adapter, lora), 8),
        Target("adapter on its base", lora / "adapter_config.json", mutated_json, partial(place_adapter, lora, base), 2),
        Target("config.json", base / "config.json", mutated_json, partial(read_model_config, base), 4),
        Target("config.json, placed on", base / "config.json", mutated_json, partial(place_adapter, lora, base), 1),
        Target("model.safetensors.index.json", sharded / "model.safetensors.index.json", mutated_json, partial(read_checkpoint, sharded), 6),
        Target("map_config.json", converted / "map_config.json", mutated_json, partial(read_adapter, converted), 6),
        Target("map_config.json, pushed", converted / "map_config.json", mutated_json, lambda: packed().card("owner/x"), 2),
        Target("map_merge.json, pushed", merged / "map_merge.json", mutated_json, lambda: again().card("owner/x"), 2),
        Target("config.json, pushed", merged / "config.json", mutated_json, lambda: again().card("owner/x"), 2),
        Target("verify.json", converted / "verify.json", mutated_json, partial(read_report, converted), 6),
        Target("verify.json, pushed", converted / "verify.json", mutated_json, lambda: packed().card("owner/x"), 2),
        Target("README.md, of a source", converted / "README.md", mutated_text, partial(card_facts, converted), 6),
        Target("README.md, checked", converted / "README.md", mutated_text, partial(_check_readme, converted / "README.md"), 6),
        Target("README.md, pushed", converted / "README.md", mutated_text, lambda: packed().card("owner/x"), 2),
        Target("catalog.yaml", catalog, mutated_text, partial(read_catalog, catalog), 8),
        Target("catalog.jsonl", lines, mutated_lines, partial(read_catalog, lines), 6),
        Target("ledger.jsonl", ledger, mutated_lines, lambda: list(read_lines(ledger)), 6),
        Target("ledger.jsonl, reported", ledger, mutated_lines, partial(_report_ledger, ledger.parent), 2),
        Target("rows.jsonl", rows, mutated_lines, partial(read_rows, rows), 6),
    ]  # fmt: skip
    return found + _parquet(folder / "rows.parquet")


def _check_readme(path: Path) -> None:
    text = path.read_bytes().decode(errors="replace")
    parse_readme(text, str(path))
    check_card(text, str(path))


def _report_ledger(folder: Path) -> None:
    catalog_page(read_ledger(folder), folder / "report.html").encode()


def _parquet(path: Path) -> list[Target]:
    """None where pyarrow, which reads Parquet, is absent."""
    try:
        import pyarrow
        from pyarrow.parquet import write_table
    except ImportError:
        return []
    write_table(pyarrow.table({"text": ["one text", "another"], "n": [1, 2]}), path)
    return [Target("rows.parquet", path, mutated_text, partial(read_rows, path), 2)]


def _base(folder: Path) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {f"model.layers.{n}.self_attn.q_proj.weight": torch.randn(8, 8, generator=generator) for n in range(2)}
    save_file(
        {**tensors, "model.embed_tokens.weight": torch.randn(20, 8, generator=generator)}, folder / "model.safetensors"
    )
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 20, "hidden_size": 8,
        "num_hidden_layers": 2, "dtype": "float32", "num_attention_heads": 2, "intermediate_size": 8, "rope_theta": 1e4,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _sharded(folder: Path) -> Path:
    folder.mkdir()
    save_file({"a": torch.ones(2)}, folder / "model-1.safetensors")
    save_file({"b": torch.ones(2)}, folder / "model-2.safetensors")
    index = {"metadata": {"total_size": 16}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _adapter(folder: Path, base: Path) -> Path:
    folder.mkdir()
    tensors = {}
    for number in range(2):
        prefix = f"base_model.model.model.layers.{number}.self_attn.q_proj"
        tensors |= {f"{prefix}.lora_A.weight": torch.ones(2, 8), f"{prefix}.lora_B.weight": torch.ones(8, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": 2, "lora_alpha": 4,
        "target_modules": ["q_proj"], "rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {}, "bias": "none",
        "use_dora": False, "use_rslora": False, "modules_to_save": None, "init_lora_weights": True, "revision": None,
        "layer_replication": None, "trainable_token_indices": None, "target_parameters": None, "peft_version": "0.21.0",
        "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None, "fan_in_fan_out": False,
        "auto_mapping": None, "loftq_config": {}, "inference_mode": True, "lora_dropout": 0.1,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


_README = """---
license: apache-2.0
language: [en, de]
tags:
- map
- text-generation
base_model: owner/base
datasets:
- owner/data
date: 2023-02-01
model-index:
- name: x
  results: [{task: {type: text}, metrics: [{type: kl, value: 0.5}]}]
---

# A model

Words before.

<!-- mapconv:begin own=none (written again by each `mapconv push`: put your own text outside) -->

what mapconv wrote

<!-- mapconv:end -->

Words after.
"""
_CATALOG = """defaults:
  base: base
  upgrade: {rank: 4, dtype: float32}
adapters:
- source: lora
  output: a
  verify: {max_tokens: 100}
- source: owner/name@main
  base: owner/base
  output: b
  merge: true
  push: {repo_id: owner/b, private: true}
- {source: ./lora, output: c, upgrade: {direction: dora}}
"""
_LEDGER = (
    {"ledger": 1, "mapconv_version": "1.0"},
    {
        "entry": "a", "fingerprint": "f", "status": "done", "source": "lora", "base": "base", "output": "a",
        "method": "LoRA", "rank": 4, "modules": 2, "worst_error": 0.1, "median_error": 0.05, "parameters": 100,
        "nbytes": 400, "kl": 0.01, "seconds": 1.5, "attempts": 1, "finished": "2025-01-01T00:00:00", "stat": "s",
        "content": "c", "merged": None, "pushed": None, "stage": None, "kind": None, "error": None,
    },
    {"entry": "b", "fingerprint": "g", "status": "failed", "kind": "AdapterError", "error": "broken.", "stage": "upgrade"},
)  # fmt: skip
_ROWS = (
    {"text": "one text"},
    {"text": "another", "source": "x"},
    {
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
        ]
    },
    {"input": "a text", "label": 1},
)


if __name__ == "__main__":
    main()
