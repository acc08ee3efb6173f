"""Say what an adapter is, without reading its values.

python examples/inspect_adapter.py ADAPTER [BASE]
"""

import sys

import mapconv


def main(adapter: str, base: str | None = None) -> None:
    found = mapconv.inspect(adapter, base=base)
    print(f"{found.method}, {found.modules} modules, {found.parameters:,} parameters; upgrade: {found.upgrade}")
    for group in found.targets:
        print(f"  {group.module_type}: {group.count} × rank {group.ranks}, layers {group.layers}")


if __name__ == "__main__":
    main(*sys.argv[1:])
