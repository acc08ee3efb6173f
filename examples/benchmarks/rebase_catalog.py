"""A catalog of adapters of one base, all rebased onto another from one folder of statistics.

    python examples/benchmarks/rebase_catalog.py FOLDER ONTO [--count 20] [--workers 2] [--tokens 8192]

FOLDER is what ``smollm2_dora.py`` writes: base, lora and train.txt; ONTO is another copy of the base, such as one that
``rebase.py`` rounds. The adapters are the LoRA with its factors scaled and disturbed. Prints the time of the
statistics, which are kept, and of the catalog.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import mapconv

LENGTH = 256


def write_variants(adapter: Path, out: Path, count: int) -> list[Path]:
    """``count`` adapters with factors of their own."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    folders = []
    for number in range(count):
        draw = torch.Generator().manual_seed(number)
        folder = out / f"adapter-{number:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(adapter / "adapter_config.json", folder)
        changed = {
            name: value * (0.7 + 0.6 * number / count)
            + 0.05 * value.float().std().item() * torch.randn(value.shape, generator=draw).to(value.dtype)
            for name, value in tensors.items()
        }
        save_file(changed, folder / "adapter_model.safetensors")
        folders.append(folder)
    return folders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("onto", type=Path)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=8192)
    options = parser.parse_args()
    folder, work = options.folder, options.folder / "rebase-catalog"
    statistics = work / f"statistics-{options.tokens}"
    if not statistics.exists():
        work.mkdir(exist_ok=True)
        made = mapconv.statistics(
            folder / "base", statistics, data=folder / "train.txt", samples=options.tokens // LENGTH,
            sequence_length=LENGTH,
        )  # fmt: skip
        print(f"statistics of {made.tokens:,} tokens, once: {made.seconds:.0f} s, {made.nbytes / 1e6:.0f} MB")
    sources = write_variants(folder / "lora", work / "adapters", options.count)
    given = {"onto": str(options.onto), "statistics_from": str(statistics)}
    catalog = {
        "defaults": {"base": str(folder / "base"), "rebase": given},
        "adapters": [{"source": str(source), "output": source.name} for source in sources],
    }
    (work / "catalog.yaml").write_text(json.dumps(catalog))
    shutil.rmtree(work / "rebased", ignore_errors=True)
    started = time.perf_counter()
    engine = "process" if options.workers > 1 else "serial"
    mapconv.convert_catalog(work / "catalog.yaml", work / "rebased", engine=engine, workers=options.workers)
    seconds = time.perf_counter() - started
    processor = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    done = len(list((work / "rebased").glob("*/map_config.json")))
    print(f"{done} of {options.count} adapters rebased by {options.workers} workers in {seconds:.1f} s")
    print(f"{seconds / options.count:.2f} s each; {processor:.0f} s of processor, making the adapters included")


if __name__ == "__main__":
    main()
