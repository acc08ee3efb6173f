"""Kill a run of a small catalog at 200 random moments, and compare what the next runs make of it, byte for byte.

    python examples/benchmarks/catalog_kill.py [--kills 200] [--seed 0] [--entries 8]

Each round kills three runs of one output folder in turn and lets the fourth end. The runs are forked from a process
that has torch in memory, so that the moments fall into the work.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import random
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save_file

import mapconv

KILLS_PER_ROUND = 3
WIDTH, RANK, TARGETS = 64, 4, ("q_proj", "v_proj")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--entries", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kill(Path(folder), options)


def kill(folder: Path, options: argparse.Namespace) -> None:
    adapters = write_adapters(folder, options.entries)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mapconv.commands.upgrade", "mapconv.commands.catalog"])
    mapconv.convert_catalog(adapters, folder / "expected")
    expected = contents(folder / "expected")

    def start(out: Path):
        process = context.Process(target=mapconv.convert_catalog, args=(adapters, out))
        process.start()
        return process

    start(folder / "warm").join()
    whole = start(folder / "whole")
    wait_for_its_lock(whole, folder / "whole")
    began = time.perf_counter()
    whole.join()
    duration = time.perf_counter() - began
    moments, fell, kills = random.Random(options.seed), Counter(), 0
    while kills < options.kills:
        out = folder / "out"
        for _ in range(min(KILLS_PER_ROUND, options.kills - kills)):
            victim = start(out)
            wait_for_its_lock(victim, out)
            victim.join(duration * moments.random())
            victim.kill()
            victim.join()
            kills += 1
            fell[where(out, victim.exitcode)] += 1
        result = mapconv.convert_catalog(adapters, out)
        if (result.done, result.failed) != (options.entries, 0) or contents(out) != expected:
            raise SystemExit(f"after {kills} kills (seed {options.seed}) the result differs from an uninterrupted run")
        shutil.rmtree(out)
    print(f"{kills} kills, every result has the bytes of an uninterrupted run; the kills fell")
    for place, count in fell.most_common():
        print(f"  {count:5}  {place}")


def wait_for_its_lock(process, out: Path) -> None:
    """Return when the run has begun: what comes before is the start of a process."""
    mark = f"{process.pid} on "
    while process.is_alive():
        with contextlib.suppress(OSError):
            if (out / ".mapconv" / "lock").read_text().startswith(mark):
                return
        time.sleep(0.0005)


def where(out: Path, status: int | None) -> str:
    """What the victim left behind."""
    if status == 0:
        return "after the end"
    if not (out / "ledger.jsonl").exists():
        return "before the ledger was begun"
    text = (out / "ledger.jsonl").read_text()
    said = {json.loads(line).get("entry") for line in text.splitlines(keepends=True)[1:] if line.endswith("\n")}
    if not text.endswith("\n"):
        return "into a line of the ledger"
    if any(out.glob(".*.partial-*")):
        return "while an output was written"
    made = {path.name for path in out.iterdir() if path.is_dir() and not path.name.startswith(".")}
    return "between an output and its line" if made - said else "between two entries"


def contents(out: Path) -> dict[str, bytes]:
    """Every file of every output."""
    files = {str(path.relative_to(out)): path for path in out.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith((".mapconv", "ledger"))}


def write_adapters(folder: Path, count: int) -> Path:
    generator = torch.Generator().manual_seed(0)
    names = [f"model.layers.{layer}.self_attn.{target}" for layer in range(4) for target in TARGETS]
    base = folder / "base"
    base.mkdir()
    weights = {f"{name}.weight": torch.randn(WIDTH, WIDTH, generator=generator) for name in names}
    save_file(weights, base / "model.safetensors")
    (base / "config.json").write_text("{}")
    for number in range(count):
        tensors, dora = {}, number % 3 == 2
        for name in names:
            key = f"base_model.model.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, WIDTH, generator=generator)
            tensors[f"{key}.lora_B.weight"] = torch.randn(WIDTH, RANK, generator=generator)
            if dora:
                tensors[f"{key}.lora_magnitude_vector"] = 8 + torch.rand(WIDTH, generator=generator)
        adapter = folder / "adapters" / f"a{number}"
        adapter.mkdir(parents=True)
        save_file(tensors, adapter / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "use_dora": dora}
        config |= {"target_modules": list(TARGETS), "base_model_name_or_path": str(base)}
        (adapter / "adapter_config.json").write_text(json.dumps(config))
    return folder / "adapters"


if __name__ == "__main__":
    main()
