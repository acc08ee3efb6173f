"""Convert an adapter, measure what the conversion cost, and publish the result with the numbers in its card.

    python examples/publish.py ADAPTER OWNER/NAME [--base BASE] [--base-id HUB_ID] [--license ID] [--private]

ADAPTER and BASE are folders or names on the Hub. Without --yes nothing is sent: the script shows what would be.
"""

from __future__ import annotations

import argparse

import mapconv


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert, verify and publish an adapter.")
    parser.add_argument("adapter")
    parser.add_argument("repo_id")
    parser.add_argument("--out", default="published-map")
    parser.add_argument("--base")
    parser.add_argument("--base-id")
    parser.add_argument("--license")
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--yes", action="store_true")
    arguments = parser.parse_args()

    result = mapconv.upgrade(arguments.adapter, arguments.out, base=arguments.base, force=True)
    print(f"{len(result.modules)} modules, worst ε {result.worst_error:.4f}")

    # Stored beside the result, from where the model card takes it.
    report = mapconv.verify(result.out, result.source, base=result.base, samples=2, save=True)
    print(f"KL {report.kl:.2e} nats per token (the base itself is {report.kl_base:.2e} away)")

    pushed = mapconv.push(
        result.out,
        arguments.repo_id,
        base_id=arguments.base_id,
        license=arguments.license,
        private=arguments.private,
        dry_run=not arguments.yes,
    )
    for file in pushed.files:
        print(f"  {file.name:28} {file.nbytes:>12,} bytes  {file.note}")
    print(f"{pushed.url} at {pushed.commit}" if arguments.yes else "nothing was sent: pass --yes")


if __name__ == "__main__":
    main()
