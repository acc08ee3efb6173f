"""Python code in processes of its own that need not load torch, transformers and PEFT again: forks of one process.

That process, the server, is itself a fork of the tests' process before the first test, when all is loaded and nothing
has run. The Hub's client reads its environment when it is imported. It is imported under an environment of marks, and
each fork puts its own values wherever a mark is: ``tests/hub/test_forked.py`` finds no mark in a fork.
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
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
#: What the environment says while libraries are imported, and no path or address in a fork may.
MARK = "environment-of-the-server"
_MARKS = {"HF_HOME": f"/{MARK}/home", "HF_ENDPOINT": f"http://{MARK}.invalid"}
Places = list[tuple[ModuleType | object, str]]
_PRELOADED = (
    "click", "jinja2", "yaml", "torch", "safetensors.torch", "httpx", "matplotlib.figure",
    "matplotlib.backends.backend_agg", "huggingface_hub.hf_api", "huggingface_hub.file_download",
    "huggingface_hub.repocard", "huggingface_hub._snapshot_download", "transformers.modeling_utils",
    "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto", "peft", "mapconv.cli",
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


@contextlib.contextmanager
def marked_environment() -> Iterator[None]:
    """Put the marks into the environment, for as long as the libraries that read it are imported."""
    own = {name: os.environ.get(name) for name in _MARKS}
    os.environ.update(_MARKS)
    yield
    for name, value in own.items():
        os.environ.pop(name)
        if value is not None:
            os.environ[name] = value


def adopt_environment() -> None:
    """Put this process's own environment wherever a mark is."""
    _adopt_environment(list(_places()))


class ForkedPython:
    """Runs code in forks; use it as a context manager, under the marks and before anything but imports has happened."""

    def __enter__(self) -> ForkedPython:
        for name in _PRELOADED:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        places = list(_places())
        # No TemporaryDirectory, which whatever fork ends as a program does would remove.
        self._pictures = Path(tempfile.mkdtemp())
        requests, answers = os.pipe(), os.pipe()
        self._server = os.fork()
        if self._server == 0:
            os.close(requests[1])
            os.close(answers[0])
            try:
                _serve(os.fdopen(requests[0]), os.fdopen(answers[1], "w"), places, self._pictures)
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
        shutil.rmtree(self._pictures)

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


def _serve(requests: IO[str], answers: IO[str], places: Places, pictures: Path) -> None:
    _forget_pytest()
    with contextlib.suppress(ImportError):
        _draw_once(pictures)
    gc.collect()
    gc.freeze()  # or each fork's collections copy all pages of what never changes
    for line in requests:
        request = json.loads(line)
        if "wait" in request:
            answer = _wait(request["wait"], request["timeout"])
        else:
            answer = os.fork()
            if answer == 0:
                _run(request, places)
        print(json.dumps(answer), file=answers, flush=True)


def _forget_pytest() -> None:
    """Undo what pytest and its workers change in a process."""
    faulthandler.disable()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.excepthook, sys.unraisablehook = sys.__excepthook__, sys.__unraisablehook__
    threading.excepthook = threading.__excepthook__
    sys.modules["__main__"] = ModuleType("__main__")


def _draw_once(folder: Path) -> None:
    """A card's picture depends on its modules' values alone: the first fork that has these draws it for all."""
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

    picture.scalars_png = scalars_png


def _wait(pid: int, timeout: float | None) -> int | None:
    end = time.monotonic() + (float("inf") if timeout is None else timeout)
    while True:
        found, status = os.waitpid(pid, 0 if timeout is None else os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.002)


def _places() -> Iterator[tuple[ModuleType | object, str]]:
    """Where the environment is kept: the client's constants in modules that import them by name, and marks."""
    from huggingface_hub import constants, hf_api

    for module in list(sys.modules.values()):
        if module is constants or not isinstance(module, ModuleType) or module.__name__ == __name__:
            continue
        for name, value in list(vars(module).items()):
            marked = issubclass(type(value), str | Path) and MARK in str(value)
            copied = name.isupper() and module.__name__.startswith("huggingface_hub") and name in vars(constants)
            if marked or (copied and value is getattr(constants, name)):
                yield module, name
    yield hf_api.api, "endpoint"


def _adopt_environment(places: Places) -> None:
    from huggingface_hub import constants

    importlib.reload(constants)
    for owner, name in places:
        value = getattr(owner, name)
        if name in vars(constants):
            value = getattr(constants, name)
        else:
            kind = type(value)
            for mark, new in ((_MARKS["HF_HOME"], constants.HF_HOME), (_MARKS["HF_ENDPOINT"], constants.ENDPOINT)):
                value = kind(str(value).replace(mark, new)) if mark in str(value) else value
        setattr(owner, name, value)


def _run(request: dict[str, Any], places: Places) -> None:
    status = 1
    try:
        for number, path, flags in (
            (0, request["stdin"], os.O_RDWR),
            (1, request["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
            (2, request["errors"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        ):
            os.dup2(os.open(path, flags, 0o600), number)
        _open_streams()
        os.environ.clear()
        os.environ.update(request["env"])
        sys.path[:0] = request["env"].get("PYTHONPATH", "").split(os.pathsep)
        sys.argv = request["arguments"]
        _adopt_environment(places)
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
