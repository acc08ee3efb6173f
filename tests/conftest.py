"""Tiny models and adapters, built once a session; the command line in this process; no network, one thread."""

from __future__ import annotations

import gc
import importlib
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

# huggingface_hub reads this when it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
# bitsandbytes compiles functions when it is imported, for which torch loads its whole compiler.
os.environ["TORCHDYNAMO_DISABLE"] = "1"

import pytest
from hypothesis import settings

from mapconv.cli import main
from tests import QUICK, THOROUGH
from tests.environments import ReadEnvironment, marked_environment
from tests.files import copy
from tests.forked import ForkedPython, wait_for_ending_threads
from tests.savings import while_importing, while_testing, without_authorities

#: Open until all libraries are imported.
_marked = ExitStack()
_marked.enter_context(marked_environment())
_importing = ExitStack()
_numbers = count()
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
    for ignored in (
        ".is_gradient_checkpointing:FutureWarning",  # transformers' own call of its own deprecated name
        # Of a class of PEFT's own: the process that hands out the tests would load PEFT to show them.
        ".lora_bias=True. was passed",
        "Adapter .* tensor.s. have invalid shape",
    ):
        config.addinivalue_line("filterwarnings", f"ignore:{ignored}")


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: tests wait for browsers, for servers that say nothing and for other processes."""
    return 1 + len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))


def _quieten() -> None:
    """Load the slow libraries, which the process that only hands out the tests need not have."""
    # Until all is collected: imports make a million objects that stay, and the collector would go through them.
    gc.disable()
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    os.register_at_fork(before=wait_for_ending_threads)
    _importing.enter_context(while_importing())
    without_authorities()
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
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()
    _importing.close()


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


@pytest.fixture(scope="session", autouse=True)
def _spared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What ``tests/savings.py`` says; and norms of base weights are not left in the cache of whoever runs the tests."""
    with while_testing(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAPCONV_CACHE", str(tmp_path_factory.mktemp("norms")))
        yield


@pytest.fixture
def tmp_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A new folder, which is gone after the test if that passed: before the disk has written what lay in it.

    pytest's own keeps those of three runs, 600 MB in 30,000 files each, and removes an older one at the end of a run.
    """
    failures = request.session.testsfailed
    name = re.sub(r"\W", "_", request.node.name)[:30]
    folder = tmp_path_factory.mktemp(f"{name}-{next(_numbers)}", numbered=False)
    yield folder
    if request.session.testsfailed == failures:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish() -> None:
    # pytest collects ten times more, for objects whose end raises an error.
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter) -> None:
    """One line for each thing that is missing here, instead of one for each test that needs it."""
    skipped = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.getreports("skipped"))
    for reason, tests in skipped.items():
        terminalreporter.write_line(f"{tests} skipped: {reason}")


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
