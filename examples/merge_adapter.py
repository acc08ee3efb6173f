"""Merge a MAP, LoRA or DoRA adapter into its base model.

python examples/merge_adapter.py ADAPTER OUT [BASE]
"""

import sys

import mapconv


def main(adapter: str, out: str, base: str | None = None) -> None:
    result = mapconv.merge(adapter, out, base=base)
    worst = max(module.rounding_error for module in result.merged)
    print(f"{len(result.merged)} tensors merged into {result.out}; rounding costs at most {worst:.2%} of an update")


if __name__ == "__main__":
    main(*sys.argv[1:])
