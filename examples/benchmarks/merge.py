"""Merge a 1.24-billion-parameter model: mapconv against PEFT and against ``cp``, alternating in one run.

A LoRA, a DoRA, and the MAP folder of the LoRA, whose base is fingerprinted on the way. mapconv's files are on the disk
when it ends; PEFT's are in the system's cache, so that ``cp`` is timed with ``sync`` and without.

    python examples/benchmarks/merge.py /tmp/bench [--runs 3] [--twice] [--cold] [--no-peer]

``--cold`` takes the model out of the system's cache before each run, copies included. ``--twice`` repeats mapconv's
merge on a model of twice as many layers, to show that memory does not grow.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from llama_shape import write_adapter, write_model
from measure import Run, mapconv, median, python, run

PEFT = """
import sys, torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
model.save_pretrained(out, max_shard_size="700MB")
"""
START_UP = "import mapconv.commands.merge"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--twice", action="store_true")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--no-peer", action="store_true")
    options = parser.parse_args()
    base, out = write_model(options.folder / "base"), options.folder / "out"
    start_up = median([python(START_UP) for _ in range(options.runs)])
    print(f"start-up (imports alone)      {start_up.seconds:6.2f} s  {start_up.megabytes:6.0f} MB")
    copies: list[Run] = []
    synced: list[Run] = []
    for method in ("lora", "dora", "map"):
        if method == "map":
            adapter = options.folder / "map"
            mapconv("upgrade", options.folder / "lora", "--base", base, "-o", adapter, "--force", "-q")
        else:
            adapter = write_adapter(options.folder / method, base, use_dora=method == "dora")
        ours, theirs = [], []
        for _ in range(options.runs):
            cold = base if options.cold else None
            ours.append(_fresh(out, lambda a=adapter: mapconv("merge", a, "--base", base, "-o", out, "-q"), cold))
            if not options.no_peer:
                theirs.append(_fresh(out, lambda a=adapter: python(PEFT, base, a, out), cold))
            copies.append(_fresh(out, lambda: run("cp", "-r", base, out), cold))
            synced.append(_fresh(out, lambda: run("sh", "-c", f"cp -r {base} {out} && sync -f {out}"), cold))
        _report(method, median(ours), median(theirs) if theirs else None)
        _against_copy(median(ours), start_up, median(copies), median(synced))
    if options.twice:
        big = write_model(options.folder / "base-twice", layers=32)
        adapter = write_adapter(options.folder / "lora-twice", big, use_dora=False, layers=32)
        twice = _fresh(out, lambda: mapconv("merge", adapter, "--base", big, "-o", out, "-q"))
        print(f"twice the layers: mapconv     {twice.seconds:6.2f} s  {twice.megabytes:6.0f} MB")


def _fresh(out: Path, action, cold: Path | None = None) -> Run:
    shutil.rmtree(out, ignore_errors=True)
    for file in [] if cold is None else cold.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    result = action()
    shutil.rmtree(out, ignore_errors=True)
    return result


def _report(method: str, ours: Run, theirs: Run | None) -> None:
    print(f"{method}: mapconv                 {ours.seconds:6.2f} s  {ours.megabytes:6.0f} MB  {ours.cpu:6.2f} s CPU")
    if theirs is not None:
        print(f"{method}: PEFT load, merge, save  {theirs.seconds:6.2f} s  {theirs.megabytes:6.0f} MB")
        print(f"{method}: PEFT / mapconv          {theirs.seconds / ours.seconds:6.2f} x")


def _against_copy(ours: Run, start_up: Run, copy: Run, synced: Run) -> None:
    net = ours.seconds - start_up.seconds
    print(f"      net of start-up {net:.2f} s = {net / copy.seconds:.2f} x cp ({copy.seconds:.2f} s)")
    print(f"                             = {net / synced.seconds:.2f} x cp and sync ({synced.seconds:.2f} s)")


if __name__ == "__main__":
    main()
