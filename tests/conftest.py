"""Tiny models and adapters, built once a session; the command line in this process; no network, one thread."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# huggingface_hub reads this when it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
# bitsandbytes compiles functions when it is imported, for which torch loads its whole compiler.
os.environ["TORCHDYNAMO_DISABLE"] = "1"

import pytest
from hypothesis import settings
from jinja2 import Environment

from mapconv.cli import main
from tests import QUICK, THOROUGH
from tests.environments import ReadEnvironment, marked_environment
from tests.files import copy
from tests.forked import ForkedPython, use_large_pages

#: Open until all libraries are imported.
_marked = ExitStack()
_marked.enter_context(marked_environment())
_importing = pytest.MonkeyPatch()
_FORKED, _ENVIRONMENT = pytest.StashKey[ForkedPython](), pytest.StashKey[ReadEnvironment]()

# The same examples in each run: a failure is one that anybody can repeat.
settings.register_profile("quick", derandomize=True, deadline=None, max_examples=QUICK)
settings.register_profile("thorough", derandomize=True, deadline=None, max_examples=THOROUGH)
settings.load_profile("quick")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        _quieten()
    else:
        _marked.close()
        # In the order of the folders, a long file is not the last one, which the other workers would wait for.
        config.option.loadscopereorder = False
    # transformers' own call of its own deprecated name.
    config.addinivalue_line("filterwarnings", "ignore:.is_gradient_checkpointing:FutureWarning")


def _quieten() -> None:
    """Load the slow libraries, which the process that only hands out the tests need not have."""
    # Until all is collected: imports make a million objects that stay, and the collector would go through them.
    gc.disable()
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    # bitsandbytes, which PEFT imports, has functions compiled that no processor's kernel of it calls; torch would load
    # its whole compiler for that.
    _importing.setattr(torch, "compile", lambda function, **settings: function)
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def pytest_collection(session: pytest.Session) -> None:
    """Rewriting the asserts takes ten seconds: each worker begins with its share of the files and reads the others."""
    worker = getattr(session.config, "workerinput", None)
    if worker and session.config.getini("testpaths") == session.config.args:
        sys.dont_write_bytecode = False
        root = session.config.rootpath
        files = sorted(path for folder in session.config.args for path in (root / folder).rglob("test_*.py"))
        for path in files[int(worker["workerid"].removeprefix("gw")) :: worker["workercount"]]:
            with suppress(Exception, pytest.skip.Exception):  # which the collection will meet again, and report
                importlib.import_module(".".join(path.relative_to(root).with_suffix("").parts))


def pytest_collection_finish() -> None:
    # What is imported by now stays: the garbage collector need not go through a million objects again and again. A
    # model is thousands of objects, of which it would look through the youngest after every 700.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()
    _importing.undo()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Everything is imported, and nothing has run yet: fork what tests fork their processes from."""
    if "huggingface_hub" in sys.modules:
        if any("forked" in getattr(item, "fixturenames", ()) for item in session.items):
            server = ExitStack()
            session.config.stash[_FORKED] = server.enter_context(ForkedPython())
            session.config.add_cleanup(server.close)
        environment = session.config.stash[_ENVIRONMENT] = ReadEnvironment()
        _marked.close()
        environment.enter(dict(os.environ))
    if hasattr(session.config, "workerinput"):
        use_large_pages()


@pytest.fixture(scope="session", autouse=True)
def _compiled_once() -> Iterator[None]:
    """PEFT and the Hub's client compile the same template of a model card for each adapter that is saved."""
    compiled = Environment.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Environment, "compile", cache(compiled))
        yield


@pytest.fixture(scope="session", autouse=True)
def _disks_not_waited_for() -> Iterator[None]:
    """No test cuts the power. Whether and when files are flushed, the tests of that see; forks wait for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "fdatasync"):
            if hasattr(os, name):
                patch.setattr(os, name, lambda descriptor: os.fstat(descriptor) and None)
        patch.setattr("mapconv.checkpoint.flushing._sync_file_range", None)
        yield


def pytest_terminal_summary(terminalreporter) -> None:
    """One line for each thing that is missing here, instead of one for each test that needs it."""
    skipped = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.getreports("skipped"))
    for reason, count in skipped.items():
        terminalreporter.write_line(f"{count} skipped: {reason}")


@dataclass(frozen=True)
class Run:
    """What one command gave back."""

    status: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """Run ``mapconv …`` in this process."""

    def command(*arguments: object) -> Run:
        monkeypatch.setattr(sys, "argv", ["mapconv", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = stop.code
        captured = capsys.readouterr()
        return Run(status, captured.out, captured.err)

    return command


@pytest.fixture(scope="session")
def forked(pytestconfig: pytest.Config) -> ForkedPython:
    """For what needs a process of its own: a fork has the libraries loaded, a subprocess loads them for seconds."""
    return pytestconfig.stash[_FORKED]


@pytest.fixture(scope="session")
def environment(pytestconfig: pytest.Config) -> ReadEnvironment:
    """To run something in this process with another environment, which the Hub's client reads when it is imported."""
    return pytestconfig.stash[_ENVIRONMENT]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the session's models and adapters live in; tests must not write there."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def base(models: Path) -> Path:
    """A Llama in float32, one file."""
    from tests.models import save_base

    return save_base(models / "base")


@pytest.fixture(scope="session")
def sharded(models: Path) -> Path:
    """The same weights in several shards with an index."""
    from tests.models import save_base

    return save_base(models / "sharded", max_shard_size="30KB")


@pytest.fixture(scope="session")
def half_base(models: Path) -> Path:
    """The same model in bfloat16."""
    import torch

    from tests.models import save_base

    return save_base(models / "half-base", dtype=torch.bfloat16)


@pytest.fixture(scope="session")
def other_base(models: Path) -> Path:
    """Another model of the same shape."""
    from tests.models import save_base

    return save_base(models / "other-base", seed=5)


@pytest.fixture(scope="session")
def lora(models: Path, base: Path) -> Path:
    from tests.models import save_adapter

    return save_adapter(base, models / "lora")


@pytest.fixture(scope="session")
def dora(models: Path, base: Path) -> Path:
    from tests.models import save_adapter

    return save_adapter(base, models / "dora", use_dora=True)


@pytest.fixture(scope="session")
def text(models: Path) -> Path:
    """The sample of prose that ships with mapconv."""
    from mapconv.data.shipped import packaged_text

    path = models / "sample.txt"
    path.write_text(packaged_text("sample.txt"))
    return path


@pytest.fixture
def own_lora(lora: Path, tmp_path: Path) -> Path:
    """A LoRA adapter that the test may break."""
    return copy(lora, tmp_path / "lora")


@pytest.fixture
def own_dora(dora: Path, tmp_path: Path) -> Path:
    """A DoRA adapter that the test may break."""
    return copy(dora, tmp_path / "dora")


@pytest.fixture
def own_base(base: Path, tmp_path: Path) -> Path:
    """A base model that the test may break."""
    return copy(base, tmp_path / "base")
