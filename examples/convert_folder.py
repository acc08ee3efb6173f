"""Convert every adapter in a folder, check each against its source, and open a pull request for each on the Hub.

    python examples/convert_folder.py FOLDER OUT [--to OWNER] [--base-id ID] [--license ID] [--max-kl X] [--workers N]

Run it again after an interruption: what is done is passed over. Without --to nothing is sent. What differs from its
source by more than --max-kl is named, and stays here.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import mapconv


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert, verify and publish a folder of adapters.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--to", metavar="OWNER")
    parser.add_argument("--base-id")
    parser.add_argument("--license")
    parser.add_argument("--max-kl", type=float, default=0.05)
    parser.add_argument("--workers", type=int)
    arguments = parser.parse_args()

    result = mapconv.convert_catalog(
        arguments.folder, arguments.out, workers=arguments.workers, verify=True, quiet=not sys.stderr.isatty()
    )
    print(f"{result.done} of {result.entries} converted, {result.failed} failed")
    for failure in result.failures:
        print(f"  {failure.entry}: {failure.kind}: {failure.error}")

    refused = 0
    for name, line in last_lines(arguments.out / "ledger.jsonl").items():
        if line["status"] != "done":
            continue
        far = line["kl"] is not None and line["kl"] > arguments.max_kl
        refused += far
        print(f"  {name}: {line['method']}, worst ε {line['worst_error']:.4f}, KL {line['kl']}{' is too far' * far}")
        if arguments.to and not far:
            pushed = mapconv.push(
                arguments.out / line["output"],
                f"{arguments.to}/{name.replace('/', '-')}-map",
                base_id=arguments.base_id,
                license=arguments.license,
                create_pr=True,
            )
            print(f"    {pushed.pull_request or pushed.url}")
    sys.exit(1 if result.failed or refused else 0)


def last_lines(ledger: Path) -> dict[str, dict]:
    """What became of each entry: its last line counts."""
    _, *lines = ledger.read_text(encoding="utf-8").splitlines()
    return {line["entry"]: line for line in map(json.loads, lines)}


if __name__ == "__main__":
    main()
