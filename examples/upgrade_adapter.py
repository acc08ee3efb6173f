"""Convert a LoRA or DoRA adapter to MAP form, and look at its scalars.

python examples/upgrade_adapter.py ADAPTER OUT [BASE]
"""

import sys

import mapconv


def main(adapter: str, out: str, base: str | None = None) -> None:
    result = mapconv.upgrade(adapter, out, base=base)
    for module in result.modules[:5]:
        print(f"{module.path}: α/‖W0‖ {module.base_gain:.4f}, β {module.beta:.4f}, ε {module.error:.2e}")
    print(f"{len(result.modules)} modules in {result.out}, worst ε {result.worst_error:.2e}")


if __name__ == "__main__":
    main(*sys.argv[1:])
