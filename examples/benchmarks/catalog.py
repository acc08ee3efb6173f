"""Convert 200 LoRA adapters on one base: against ``cp``, against PEFT, and over engines and workers; and a long resume.

    python examples/benchmarks/catalog.py BASE FOLDER [--adapters 200] [--peers 5] [--entries 100000] [--no-ray]

BASE is a model of SmolLM2-135M's shapes. The adapters (r = 16, float32, 7 targets in 30 layers, 20 MB each) are made in
FOLDER, which takes twice their size and is emptied again. Copies and conversions flush alike: ``cp`` is followed by
``sync``, and mapconv flushes each file.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path

import torch
from measure import Run, mapconv, python, run
from safetensors.torch import save_file

RANK, LAYERS = 16, 30
SHAPES = {
    "self_attn.q_proj": (576, 576), "self_attn.k_proj": (192, 576), "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576), "mlp.gate_proj": (1536, 576), "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}  # fmt: skip
PEFT = """
import shutil, sys, time, torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
base, out, *adapters = sys.argv[1:]
started = time.perf_counter()
for adapter in adapters:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
    shutil.rmtree(out)
print(time.perf_counter() - started)
"""
START_UP = "import mapconv.commands.upgrade"
#: An entry of the long resume has files of its own, as small as they can be.
RESUME = """
import json, os, sys
from pathlib import Path
from mapconv.catalog.fingerprints import done_fingerprint, source_signatures
from mapconv.catalog.ledger import Ledger
from mapconv.catalog.reading import read_catalog
folder, count = Path(sys.argv[1]), int(sys.argv[2])
with open(folder / "catalog.jsonl", "w") as file:
    print(json.dumps({"defaults": {"base": sys.argv[3], "upgrade": {"dtype": "bfloat16"}}}), file=file)
    for number in range(count):
        name = f"{number // 1000}/{number}"
        print(json.dumps({"source": f"in/{name}", "output": name}), file=file)
        source, out = folder / "in" / name, folder / "out" / name
        for file_ in (source / "adapter_config.json", source / "adapter_model.safetensors", out / "map_config.json"):
            file_.parent.mkdir(parents=True, exist_ok=True)
            file_.touch()
(folder / "out" / ".mapconv").mkdir()
facts = {"method": "LoRA", "rank": 16, "modules": 210, "worst_error": 0.0, "median_error": 0.0, "nbytes": 19700818}
lines, content = [], "sha256:" + "0" * 64
for entry in read_catalog(folder / "catalog.jsonl"):
    lines.append(facts | {
        "entry": entry.name, "fingerprint": done_fingerprint(entry, [content], entry.base), "status": "done",
        "kind": None, "source": entry.sources[0], "base": entry.base, "output": entry.name,
        "stat": source_signatures(entry)[0],
        "content": content, "seconds": 0.3, "attempts": 1, "parameters": 4884900,
    })
with Ledger(folder / "out" / "ledger.jsonl") as ledger:
    ledger.append(lines)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--adapters", type=int, default=200)
    parser.add_argument("--peers", type=int, default=5)
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--no-ray", action="store_true")
    options = parser.parse_args()
    if options.folder.exists():
        parser.error(f"{options.folder} exists already: it is going to be removed at the end, so name a new one.")
    need = int(2.2 * options.adapters * 19.7e6) + 2 * 10**9
    options.folder.mkdir(parents=True)
    os.environ["MAPCONV_CACHE"] = str(options.folder / "cache")
    try:
        if shutil.disk_usage(options.folder).free < need:
            parser.error(f"{options.folder} needs {need / 1e9:.0f} GB: name a folder with more room, or --adapters.")
        measure(options)
    finally:
        shutil.rmtree(options.folder)


def measure(options: argparse.Namespace) -> None:
    adapters, out = options.folder / "adapters", options.folder / "out"
    for number in range(options.adapters):
        write_adapter(adapters / f"a{number:04d}", options.base, seed=number)
    nbytes = sum(path.stat().st_size for path in adapters.rglob("*") if path.is_file())
    print(f"{options.adapters} LoRA adapters, {nbytes / 1e9:.2f} GB; {len(os.sched_getaffinity(0))} cores, "
          f"load {os.getloadavg()[0]:.1f}")  # fmt: skip
    start_up = python(START_UP).seconds
    copies = [copy(adapters, out)]
    mapconv("catalog", "run", adapters, "-o", out, "--limit", "1", "-q")  # the norms are cached from here on
    shutil.rmtree(out)
    engines = [("serial", 1), ("process", 1), ("process", 2)] + [("ray", 2)] * (not options.no_ray)
    runs = {(engine, workers): convert(adapters, out, engine, workers) for engine, workers in engines}
    copies.append(copy(adapters, out))
    cp = sum(copies) / len(copies)
    chosen = [str(adapters / f"a{number:04d}") for number in range(min(options.peers, options.adapters))]
    peer = float(python(PEFT, options.base, out, *chosen).output) / len(chosen)

    print(f"\nstart-up (imports alone)        {start_up:8.2f} s")
    print(f"cp -r and sync, before, after   {copies[0]:8.2f} s {copies[1]:8.2f} s")
    print(f"PEFT load, merge, save          {peer:8.2f} s an adapter, in one process, from {len(chosen)} adapters\n")
    print("engine    workers   seconds   s/adapter   s/adapter/core   MB/s   × cp   × cp net of start-up   × PEFT")
    for (engine, workers), done in runs.items():
        each, net = done.seconds / options.adapters, done.seconds - start_up
        print(
            f"{engine:8} {workers:8} {done.seconds:9.1f} {each:11.3f} {each * workers:16.3f} "
            f"{nbytes / done.seconds / 1e6:6.0f} {done.seconds / cp:6.1f} {net / cp:22.1f} {peer / each:8.1f}"
        )
    two, one = runs["process", 2].seconds - start_up, runs["process", 1].seconds - start_up
    print(f"\ntwo workers / one worker: {one / two:.2f} x the throughput, net of start-up")
    stages(options, adapters, nbytes)
    resume(options)


def convert(adapters: Path, out: Path, engine: str, workers: int) -> Run:
    words = [] if engine == "serial" else ["--workers", str(workers)]
    os.sync()
    done = mapconv("catalog", "run", adapters, "-o", out, "--engine", engine, *words, "-q")
    shutil.rmtree(out)
    return done


def copy(adapters: Path, out: Path) -> float:
    os.sync()
    started = time.perf_counter()
    run("cp", "-r", adapters, out)
    os.sync()
    seconds = time.perf_counter() - started
    shutil.rmtree(out)
    return seconds


def stages(options: argparse.Namespace, adapters: Path, nbytes: int) -> None:
    """Where the limit lies: what one adapter costs in processor time and on the disk."""
    code = (
        "import os, sys, time, shutil, mapconv\n"
        "from mapconv.metadata.provenance import source_fingerprint\n"
        "mapconv.upgrade(sys.argv[2], sys.argv[1])\n"
        "flushed, flush = [0.0], os.fsync\n"
        "def timed(file):\n"
        "    started = time.perf_counter(); flush(file); flushed[0] += time.perf_counter() - started\n"
        "os.fsync = timed\n"
        "started, cpu = time.perf_counter(), time.process_time()\n"
        "for source in sys.argv[2:]: mapconv.upgrade(source, sys.argv[1], force=True)\n"
        "wall, cpu, n = time.perf_counter() - started, time.process_time() - cpu, len(sys.argv) - 2\n"
        "started = time.process_time()\n"
        "for source in sys.argv[2:]: source_fingerprint(__import__('pathlib').Path(source))\n"
        "print(f'{wall / n:.3f} s: {cpu / n:.3f} s of processor ({(time.process_time() - started) / n:.3f} s of it '\n"
        "      f'SHA-256), {flushed[0] / n:.3f} s waiting for the disk to flush')"
    )
    chosen = [adapters / f"a{number:04d}" for number in range(min(20, options.adapters))]
    print(f"one adapter, {nbytes / options.adapters / 1e6:.1f} MB in and out:",
          python(code, options.folder / "one", *chosen).output)  # fmt: skip


def resume(options: argparse.Namespace) -> None:
    folder = options.folder / "long"
    folder.mkdir()
    python(RESUME, folder, options.entries, options.base)
    done = mapconv("catalog", "run", folder / "catalog.jsonl", "-o", folder / "out", "--workers", "2", "--json")
    table = json.loads(done.output)
    assert (table["done"], table["converted"]) == (options.entries, 0), table
    print(f"resume of {options.entries:,} done entries: {done.seconds:.1f} s, {done.megabytes:.0f} MB")


def write_adapter(folder: Path, base: Path, *, seed: int) -> None:
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for layer in range(LAYERS):
        for name, (height, width) in SHAPES.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, width, generator=generator) / 24
            tensors[f"{key}.lora_B.weight"] = torch.randn(height, RANK, generator=generator) / 100
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK}
    config |= {"target_modules": [name.partition(".")[2] for name in SHAPES], "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main()
