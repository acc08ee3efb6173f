"""One entry's work, in whichever process it runs: convert, then calibrate, verify, merge and push if it asks for that.

What comes back is a table of the ledger's fields, never an exception: one broken adapter fails alone.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from mapconv.catalog import faults
from mapconv.catalog.entries import Job
from mapconv.errors import AdapterError, sentence


@dataclass(frozen=True)
class Outcome:
    """What became of a job: fields of its line in the ledger; ``stop`` where no other job can succeed either."""

    table: dict[str, Any]
    stop: bool = False

    @property
    def done(self) -> bool:
        return self.table["status"] == "done"


def prepare(cores: int | None = None) -> None:
    """Load what the work needs, and let it use ``cores`` cores of this machine; None: all of them."""
    import_module("mapconv.commands.upgrade")  # the second that torch takes is not an entry's own
    if cores is not None:
        import_module("mapconv.runtime.cores").limit_cores(cores)


def run_job(job: Job) -> Outcome:
    """Do everything that the job asks for; what may pass is tried again after a wait."""
    started = time.perf_counter()
    for attempt in range(1, faults.ATTEMPTS + 1):
        table: dict[str, Any] = {"stage": job.command}
        try:
            _convert(job, table)
        except Exception as error:
            if faults.is_transient(error) and attempt < faults.ATTEMPTS:
                time.sleep(faults.FIRST_WAIT * 2 ** (attempt - 1))
                continue
            table |= {"status": "failed", "kind": type(error).__name__, "error": sentence(error)}
            return Outcome(_finished(table, attempt, started), faults.stops_the_run(error))
        table |= {"status": "done", "stage": None}
        return Outcome(_finished(table, attempt, started))
    raise AssertionError("the last attempt returns")


def _finished(table: dict[str, Any], attempts: int, started: float) -> dict[str, Any]:
    return table | {"attempts": attempts, "seconds": round(time.perf_counter() - started, 4)}


def _convert(job: Job, table: dict[str, Any]) -> None:
    """Run the stages in turn; ``table`` tells at any time how far it came."""
    import mapconv
    from mapconv.hub.reference import shown
    from mapconv.jsonfile import read_object

    stages = job.stages
    # What a result of ``rebase`` is measured against runs on another base than the result itself.
    apart: dict[str, Any] = {}
    source = job.sources[0]
    if job.command == "rebase":
        result = mapconv.rebase(source, job.output, base=job.base, force=True, **stages["rebase"])
        base, modules, apart = result.onto, result.modules, {"against_base": result.base}
        if result.served is not None:
            table["kl"] = result.served.rebased.kl
    elif job.command == "extract":
        assert job.base is not None  # the catalog file's rules ask for it
        result = mapconv.extract(source, job.output, base=job.base, force=True, **stages["extract"])
        base, modules = result.base, result.modules
    elif job.command == "combine":
        result = mapconv.combine(job.sources, job.output, base=job.base, force=True, **stages["combine"])
        base, modules = result.base, result.modules
    else:
        result = mapconv.upgrade(source, job.output, base=job.base, force=True, **stages["upgrade"])
        base, modules = result.base, result.modules
    if "calibrate" in stages:
        table["stage"] = "calibrate"
        trained = mapconv.calibrate(
            job.output, against=source, base=base, out=job.output, force=True, **stages["calibrate"]
        )
        assert trained is not None  # a job is the only process of its training
        modules = trained.modules
    errors = [module.measured_error for module in modules]
    record = read_object(result.out / "map_config.json", AdapterError)
    table |= {
        "base": shown(base),
        "method": result.method,
        "rank": max(module.rank for module in modules),
        "modules": len(errors),
        "worst_error": max(errors),
        "median_error": statistics.median(errors),
        "parameters": result.parameters,
        "nbytes": sum(path.stat().st_size for path in result.out.rglob("*") if path.is_file()),
        "content": [item["fingerprint"] for item in (record["source"], *record.get("more_sources", ()))],
    }
    if "verify" in stages:
        table["stage"] = "verify"
        if job.command == "combine":
            asked = stages["verify"]
            table["kl"] = mapconv.verify_combination(job.output, job.sources, stages["combine"], base=base, **asked).kl
        else:
            table["kl"] = mapconv.verify(job.output, source, base=base, **apart, **stages["verify"]).kl
    if job.merged is not None:
        table["stage"] = "merge"
        merged = mapconv.merge(job.output, job.merged, base=base, force=True, **stages["merge"])
        table["nbytes"] += merged.nbytes
    if "push" in stages:
        table["stage"] = "push"
        pushed = mapconv.push(Path(job.merged or job.output), **stages["push"])
        table["pushed"] = pushed.pull_request or pushed.commit_url or pushed.url
