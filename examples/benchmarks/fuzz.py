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

from fuzz_dialects import (
    write_gguf_lora,
    write_image,
    write_litgpt,
    write_mlx,
    write_nemo,
    write_tinker,
    write_torchtune,
)
from fuzz_files import CATALOG, CHATS, LEDGER, README, TEXTS, write_adapter, write_base, write_sharded
from mutations import mutated_header, mutated_json, mutated_lines, mutated_text

import mapconv
from mapconv.catalog.ledger import LEDGER_FILE, read_lines
from mapconv.catalog.reading import read_catalog
from mapconv.catalog.run import OWN_FOLDER, RUN_FILE
from mapconv.catalog.status import read_status
from mapconv.checkpoint.index import read_checkpoint
from mapconv.checkpoint.model_config import read_model_config
from mapconv.data.rows import read_rows
from mapconv.errors import MapconvError, sentence
from mapconv.fidelity.saved import read_report, save_report
from mapconv.formats import read_adapter
from mapconv.metadata.card import card_facts
from mapconv.metadata.readme import check_card, parse_readme
from mapconv.placement.adapters import place_adapter
from mapconv.placement.skeleton import LiveModel
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
    share: int = 1


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
    target.read()  # as it is, or every mutation would end at the same fault
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
    base, sharded = write_base(folder / "base"), write_sharded(folder / "sharded")
    LiveModel(read_model_config(base), "LlamaForCausalLM")  # imports transformers, which takes seconds
    lora = write_adapter(folder / "lora", base)
    converted, merged = folder / "lora-map", folder / "merged"
    mapconv.upgrade(lora, converted)
    mapconv.merge(lora, merged)
    module = {"path": "model.layers.0.self_attn.q_proj", "error": 0.01}
    names = ("kl", "kl_base", "kl_largest", "top1_agreement", "perplexity_base", "perplexity_source")
    numbers = dict.fromkeys(names, 0.5)
    for result in (converted, merged):
        save_report(result, {"tokens": 100, "modules": [module], "perplexity_result": 2.0, **numbers})
    (converted / "README.md").write_text(README)
    catalog, lines, ledger = folder / "catalog.yaml", folder / "catalog.jsonl", folder / "run" / LEDGER_FILE
    catalog.write_text(CATALOG)
    lines.write_text('{"defaults": {"base": "base", "upgrade": {"rank": 4}}}\n{"source": "lora", "output": "a"}\n')
    ledger.parent.mkdir()
    ledger.write_text("".join(f"{json.dumps(line)}\n" for line in LEDGER))
    state = ledger.parent / OWN_FOLDER / RUN_FILE
    state.parent.mkdir()
    state.write_text(json.dumps({"entries": 3, "due": 3, "engine": "serial", "workers": 1, "started": "2025-01-01"}))
    texts, chats = folder / "texts.jsonl", folder / "chats.jsonl"
    for path, rows in ((texts, TEXTS), (chats, CHATS)):
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    config, record = lora / "adapter_config.json", converted / "map_config.json"
    report, readme, index = converted / "verify.json", converted / "README.md", sharded / "model.safetensors.index.json"
    push, push_merged = partial(_push, converted), partial(_push, merged)
    found = [
        Target("adapter_config.json", config, mutated_json, partial(read_adapter, lora), 30),
        Target("adapter_model.safetensors", lora / "adapter_model.safetensors", mutated_header, partial(read_adapter,
            lora), 30),
        Target("adapter_config.json, placed", config, mutated_json, partial(place_adapter, lora, base)),
        Target("config.json", base / "config.json", mutated_json, partial(read_model_config, base), 20),
        Target("config.json, placed on", base / "config.json", mutated_json, partial(place_adapter, lora, base)),
        Target("config.json, pushed", merged / "config.json", mutated_json, push_merged),
        Target("model.safetensors.index.json", index, mutated_json, partial(read_checkpoint, sharded), 20),
        Target("map_config.json", record, mutated_json, partial(read_adapter, converted), 20),
        Target("map_config.json, pushed", record, mutated_json, push),
        Target("map_merge.json, pushed", merged / "map_merge.json", mutated_json, push_merged),
        Target("verify.json", report, mutated_json, partial(read_report, converted), 20),
        Target("verify.json, pushed", report, mutated_json, push),
        Target("README.md, of a source", readme, mutated_text, partial(card_facts, converted), 20),
        Target("README.md, checked", readme, mutated_text, partial(_check_readme, readme), 20),
        Target("README.md, pushed", readme, mutated_text, push),
        Target("catalog.yaml", catalog, mutated_text, partial(read_catalog, catalog), 20),
        Target("catalog.jsonl", lines, mutated_lines, partial(read_catalog, lines), 20),
        Target("ledger.jsonl", ledger, mutated_lines, lambda: list(read_lines(ledger)), 20),
        Target("ledger.jsonl, reported", ledger, mutated_lines, partial(_report_ledger, ledger.parent)),
        Target("run.json, its status", state, mutated_json, partial(read_status, ledger.parent), 4),
        Target("ledger.jsonl, its status", ledger, mutated_lines, partial(read_status, ledger.parent), 4),
        Target("texts.jsonl", texts, mutated_lines, partial(read_rows, texts), 10),
        Target("chats.jsonl", chats, mutated_lines, partial(read_rows, chats), 10),
    ]  # fmt: skip
    return found + _dialects(folder / "dialects") + _parquet(folder / "rows.parquet")


def _dialects(folder: Path) -> list[Target]:
    """The adapters of other programs than PEFT."""
    folder.mkdir()
    mlx, gguf = write_mlx(folder / "mlx"), write_gguf_lora(folder / "lora.gguf")
    tinker, image = write_tinker(folder / "tinker"), write_image(folder / "style.safetensors")
    torchtune, litgpt, nemo = (write(folder) for write in (write_torchtune, write_litgpt, write_nemo))
    reading = {path: partial(read_adapter, path, allow_pickle=True) for path in (mlx, gguf, tinker, image)}
    reading |= {path: partial(read_adapter, path, allow_pickle=True) for path in (torchtune, litgpt, nemo)}
    weights = mlx / "adapters.safetensors", tinker / "adapter_model.safetensors"
    return [
        Target("MLX's adapter_config.json", mlx / "adapter_config.json", mutated_json, reading[mlx], 10),
        Target("MLX's adapters.safetensors", weights[0], mutated_header, reading[mlx], 10),
        Target("LoRA in GGUF", gguf, mutated_text, reading[gguf], 10),
        Target("Tinker's experts", weights[1], mutated_header, reading[tinker], 10),
        Target("image LoRA", image, mutated_header, reading[image], 10),
        Target("torchtune's configuration", torchtune / "adapter_config.json", mutated_json, reading[torchtune], 4),
        Target("LitGPT's hyperparameters.yaml", litgpt / "hyperparameters.yaml", mutated_text, reading[litgpt], 4),
        Target("LitGPT's model_config.yaml", litgpt / "model_config.yaml", mutated_text, reading[litgpt], 4),
        Target("NeMo's model_config.yaml", nemo / "model_config.yaml", mutated_text, reading[nemo], 4),
    ]


def _push(folder: Path) -> None:
    """All that a push does before its first connection."""
    pack(folder, base_id="owner/base").card("owner/x")


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
    return [Target("rows.parquet", path, mutated_text, partial(read_rows, path), 4)]


if __name__ == "__main__":
    main()
