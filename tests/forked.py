"""Python code in processes of its own that need not load torch, transformers and PEFT again: forks of one process.

That process, the server, is itself a fork of the tests' process before the first test, when all is loaded and nothing
has run. Each fork has an environment of its own (``tests/environments.py``).
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import hashlib
import importlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from tests.environments import ReadEnvironment

ROOT = Path(__file__).resolve().parents[1]
_PRELOADED = (
    "click", "jinja2", "yaml", "torch", "safetensors.torch", "httpx", "matplotlib.figure",
    "matplotlib.backends.backend_agg", "huggingface_hub.hf_api", "huggingface_hub.file_download",
    "huggingface_hub.repocard", "huggingface_hub._snapshot_download", "transformers.modeling_utils",
    "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto", "peft", "mapconv.cli.merge",
    "mapconv.cli.push", "mapconv.cli.startup", "mapconv.cli.upgrade", "mapconv.cli.verify",
    "mapconv.commands.merge", "mapconv.commands.push", "mapconv.commands.upgrade", "mapconv.commands.verify",
)  # fmt: skip


class Process:
    """A fork at work, as far as ``subprocess.Popen`` is needed."""

    def __init__(self, server: ForkedPython, pid: int, out: Path, errors: Path) -> None:
        self.pid, self.returncode = pid, None
        self._server, self._out, self._errors = server, out, errors

    def kill(self) -> None:
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.returncode = self._server.ask(wait=self.pid, timeout=timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(f"fork {self.pid}", timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return self._out.read_text(), self._errors.read_text()


class ForkedPython:
    """Runs code in forks; use it as a context manager, under the marks and before anything but imports has happened."""

    def __enter__(self) -> ForkedPython:
        for name in _PRELOADED:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        environment = ReadEnvironment()
        # No TemporaryDirectory, which whatever fork ends as a program does would remove.
        self.pictures = Path(tempfile.mkdtemp())
        requests, answers = os.pipe(), os.pipe()
        self._server = os.fork()
        if self._server == 0:
            os.close(requests[1])
            os.close(answers[0])
            try:
                _serve(os.fdopen(requests[0]), os.fdopen(answers[1], "w"), environment, self.pictures)
            finally:
                os._exit(0)
        os.close(requests[0])
        os.close(answers[1])
        self._requests, self._answers = os.fdopen(requests[1], "w"), os.fdopen(answers[0])
        return self

    def __exit__(self, *exception: object) -> None:
        self._requests.close()  # the server ends
        os.waitpid(self._server, 0)
        self._answers.close()
        shutil.rmtree(self.pictures)

    def ask(self, **request: Any) -> Any:
        self._requests.write(json.dumps(request) + "\n")
        self._requests.flush()
        return json.loads(self._answers.readline())

    def start(self, code: str, arguments: list[str], env: dict[str, str], folder: Path, stdin: str = os.devnull):
        """Run ``code`` with ``sys.argv = arguments`` and the environment ``env``, its output in the new ``folder``."""
        folder.mkdir(parents=True)
        out, errors = folder / "stdout", folder / "stderr"
        files = {"stdin": stdin, "out": str(out), "errors": str(errors)}
        return Process(self, self.ask(code=code, arguments=arguments, env=env, **files), out, errors)

    def run(self, code: str, arguments: list[str], env: dict[str, str], folder: Path) -> subprocess.CompletedProcess:
        process = self.start(code, arguments, env, folder)
        return subprocess.CompletedProcess(arguments, process.wait(), *process.communicate())


def wait_for_ending_threads() -> None:
    """Let the threads that are about to end do so, whoever began them: to be called before a fork.

    mapconv waits for its own (``mapconv.runtime.threads``). One of a test or a library, once joined, still gives its
    memory back to MKL, under a lock: a fork in that moment has it held for ever, and its first product waits for it.
    """
    own, tasks, end = str(threading.get_native_id()), Path("/proc/self/task"), time.monotonic() + 1
    while tasks.is_dir() and time.monotonic() < end:
        states = []
        for task in tasks.iterdir():
            with contextlib.suppress(OSError):  # it has ended
                states += [(task / "stat").read_text().rpartition(")")[2].split()[0]] * (task.name != own)
        if all(state == "S" for state in states):
            return
        time.sleep(0.0005)


def _serve(requests: IO[str], answers: IO[str], environment: ReadEnvironment, pictures: Path) -> None:
    _forget_pytest()
    with contextlib.suppress(ImportError):
        from mapconv.publishing import picture

        picture.scalars_png = draw_once(pictures)
    gc.freeze()  # or each fork's collections copy all pages of what never changes
    for line in requests:
        request = json.loads(line)
        if "wait" in request:
            answer = _wait(request["wait"], request["timeout"])
        else:
            answer = os.fork()
            if answer == 0:
                _run(request, environment)
        print(json.dumps(answer), file=answers, flush=True)


def _forget_pytest() -> None:
    """Undo what pytest and its workers change in a process."""
    faulthandler.disable()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.excepthook, sys.unraisablehook = sys.__excepthook__, sys.__unraisablehook__
    threading.excepthook = threading.__excepthook__
    sys.modules["__main__"] = ModuleType("__main__")


def draw_once(folder: Path) -> Callable[[Any], bytes | None]:
    """``scalars_png`` for all processes: a picture depends on its modules' values alone, and is kept in a file."""
    from mapconv.publishing import picture

    draw = picture.scalars_png

    def scalars_png(modules: Any) -> bytes | None:
        values = [(module.path, module.alpha, module.beta, module.base_gain) for module in modules]
        path = folder / hashlib.sha256(repr(values).encode()).hexdigest()
        if path.exists():
            return path.read_bytes()
        content = draw(modules)
        if content is not None:
            partial = path.with_suffix(f".{os.getpid()}")
            partial.write_bytes(content)
            partial.rename(path)
        return content

    return scalars_png


def _wait(pid: int, timeout: float | None) -> int | None:
    end = time.monotonic() + (float("inf") if timeout is None else timeout)
    while True:
        found, status = os.waitpid(pid, 0 if timeout is None else os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.002)


def _run(request: dict[str, Any], environment: ReadEnvironment) -> None:
    status = 1
    try:
        for number, path, flags in (
            (0, request["stdin"], os.O_RDWR),
            (1, request["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
            (2, request["errors"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        ):
            os.dup2(os.open(path, flags, 0o600), number)
        _open_streams()
        environment.enter(request["env"])
        environment.forget()
        sys.path[:0] = request["env"].get("PYTHONPATH", "").split(os.pathsep)
        sys.argv = request["arguments"]
        # Nothing of this file is seen by the code, as in a new process.
        exec(compile(request["code"], "<test>", "exec"), {"__name__": "__main__"})
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _open_streams() -> None:
    """Standard streams on the descriptors 0 to 2, as a new process has them; the libraries' loggers write there."""
    sys.stdin = sys.__stdin__ = os.fdopen(0, closefd=False)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
    loggers = [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    for handler in (handler for logger in (logging.root, *loggers) for handler in logger.handlers):
        if type(handler) is logging.StreamHandler:
            handler.stream = sys.stderr
