"""Where jobs run: in this process, in several of this machine, or on a Ray cluster; the same bytes from all three."""

from __future__ import annotations

from mapconv.catalog.engines.base import Engine


def make_engine(name: str, *, workers: int, ray_address: str | None = None, lock: int | None = None) -> Engine:
    """The engine of that name; ``lock`` is a descriptor that its processes keep open for as long as they live."""
    if name == "serial":
        from mapconv.catalog.engines.serial import SerialEngine

        return SerialEngine()
    if name == "process":
        from mapconv.catalog.engines.process import ProcessEngine

        return ProcessEngine(workers, lock)
    from mapconv.catalog.engines.ray import RayEngine

    return RayEngine(workers, ray_address)
