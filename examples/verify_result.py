"""Check a MAP adapter or a merged model against the adapter that it was made from.

python examples/verify_result.py RESULT SOURCE [BASE]
"""

import sys

import mapconv


def main(result: str, source: str, base: str | None = None) -> None:
    report = mapconv.verify(result, source, base=base)
    print(
        f"KL {report.kl:.2e} nats per token (base: {report.kl_base:.2e}), top-1 agreement {report.top1_agreement:.2%}"
    )
    print(f"worst weight: {report.worst_module.path}, ε {report.worst_module.error:.2e}")


if __name__ == "__main__":
    main(*sys.argv[1:])
