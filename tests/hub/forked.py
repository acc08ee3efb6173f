"""Python code in fresh processes that need not load torch again: forks of one process that has the slow libraries.

The Hub's client reads its environment when it is imported, so it is the one library that this process must not have:
each fork imports it anew, with an environment of its own, as a command that a user types would.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

_SLOW = ("click", "numpy", "yaml", "tqdm.auto", "torch", "safetensors.torch", "httpx2", "httpx")


class ForkedPython:
    """Runs code in forks; use it as a context manager."""

    def __enter__(self) -> ForkedPython:
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.stdin.close()
        try:
            self._server.wait(10)
        finally:
            self._server.kill()

    def run(self, code: str, arguments: list[str], env: dict[str, str], folder: Path) -> subprocess.CompletedProcess:
        """Run ``code`` with ``sys.argv[1:] = arguments`` and the environment ``env``; ``folder`` takes the output."""
        out, errors = folder / "stdout", folder / "stderr"
        request = {"code": code, "arguments": arguments, "env": env, "out": str(out), "errors": str(errors)}
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        status = int(self._server.stdout.readline())
        return subprocess.CompletedProcess(arguments, status, out.read_text(), errors.read_text())


def _serve() -> None:
    for name in _SLOW:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    if "huggingface_hub" in sys.modules:
        raise SystemExit("a preloaded library brings the Hub's client along: forks would share its environment")
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _run(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _run(request: dict) -> None:
    for number, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, request["errors"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        os.dup2(os.open(path, flags, 0o600), number)
    os.environ.clear()
    os.environ.update(request["env"])
    sys.path[:0] = request["env"].get("PYTHONPATH", "").split(os.pathsep)
    sys.argv = ["python", *request["arguments"]]
    status = 0
    try:
        exec(compile(request["code"], "<test>", "exec"), {"__name__": "__main__"})
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _serve()
