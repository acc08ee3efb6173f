"""The report of a catalog: seconds and megabytes for a ledger of 2,000 adapters, and for one large adapter.

    python examples/benchmarks/report.py [--entries 2000] [--repeat 3]

Seconds are the whole command's, with Python's start and the imports; the ledger is made up, its numbers as a run's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from measure import ROOT, mapconv, median

sys.path.insert(0, ROOT)
from tests.reporting.samples import entries, save_adapter, save_ledger

LAYERS = 80
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--entries", type=int, default=2000)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines = entries(options.entries)
        catalog = save_ledger(Path(folder) / "catalog", lines)
        for line in lines:
            if line["status"] == "done":
                (catalog / line["output"]).mkdir(parents=True)
        measure(f"catalog of {options.entries:,} entries", catalog, options.repeat)
        paths = [f"model.layers.{layer}.{target}" for layer in range(LAYERS) for target in TARGETS]
        measure(f"adapter of {len(paths)} modules", save_adapter(Path(folder) / "adapter", paths), options.repeat)


def measure(what: str, path: Path, repeat: int) -> None:
    out = path.parent / "report.html"
    runs = [mapconv("report", path, "-o", out, "--force", "--json") for _ in range(repeat)]
    found, within = median(runs), min(json.loads(run.output)["seconds"] for run in runs)
    print(
        f"{what}: {found.seconds:.1f} s ({within:.1f} s of it the report at best), {found.megabytes:.0f} MB of memory, "
        f"{out.stat().st_size / 1e6:.2f} MB of HTML"
    )


if __name__ == "__main__":
    main()
