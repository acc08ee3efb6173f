"""The command line. Importing it imports no torch: each command loads its work when it runs."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import io
import os
import sys
import warnings
from difflib import get_close_matches
from importlib import import_module
from typing import NoReturn

import click

from mapconv.cli.errors import errors_as_sentences
from mapconv.version import __version__

#: In the order of a user's day, which is the order of the help page.
COMMANDS = (
    "inspect", "upgrade", "rebase", "extract", "combine", "statistics", "calibrate", "verify", "report", "merge",
    "export", "push", "catalog", "demo", "env",
)  # fmt: skip

#: ``M_ARENA_MAX`` in glibc's malloc.h.
_ARENA_MAX = -8

_EPILOG = """\
Errors are one sentence and exit 1; wrong usage exits 2. MAPCONV_DEBUG=1 shows tracebacks, NO_COLOR=1 turns colour off.

\b
Completion by the Tab key, in bash (zsh and fish likewise):
  echo 'eval "$(_MAPCONV_COMPLETE=bash_source mapconv)"' >> ~/.bashrc
"""


class _Commands(click.Group):
    """Finds the command ``x`` in the module ``mapconv.cli.x``."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        return getattr(import_module(f"mapconv.cli.{name}"), name) if name in COMMANDS else None

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0] if args else ""
        if name and not name.startswith("-") and name not in COMMANDS:
            near = get_close_matches(name, COMMANDS, 1)
            hint = f" Did you mean {near[0]!r}?" if near else f" Commands are {', '.join(COMMANDS)}."
            context.fail(f"No such command {name!r}.{hint}")
        return super().resolve_command(context, args)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=_EPILOG,
)
@click.version_option(__version__, prog_name="mapconv")
def cli() -> None:
    """Convert LoRA and DoRA adapters to MAP form, check, merge and publish them.

    MAP (arXiv 2505.23094) writes an adapted weight as W' = α·W0/‖W0‖ + β·Δ/‖Δ‖: a direction and two scalars.
    """


def main() -> None:
    """Run the command line in this process; ends with SystemExit only where the status is not 0."""
    for stream in (sys.stdout, sys.stderr):
        # A name that this terminal's encoding lacks is spelled out, and never the end of a command.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with errors_as_sentences():
        cli(standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where what it raises becomes a sentence


def run() -> NoReturn:
    """Entry point of the console script: ``main``, without what a process that is about to end can spare.

    A third of a second of a short command would go to looking for garbage while torch is imported and to taking
    torch down again. Everything registered for exit still runs, and both streams are flushed.
    """
    gc.set_threshold(100_000, 50, 50)
    _share_heaps()
    _open_closed_streams()
    _leave_warnings_to_developers()
    status: object = 0
    try:
        main()
    except SystemExit as request:
        status = request.code
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            status = status or 1
    os._exit(status if isinstance(status, int) else 0)


def _leave_warnings_to_developers() -> None:
    """What Python and libraries warn the writers of code of is not for users: of their files, commands speak."""
    if not sys.warnoptions and os.environ.get("MAPCONV_DEBUG") != "1":
        warnings.simplefilter("ignore")


def _share_heaps() -> None:
    """Let threads share two heaps: of glibc each has its own, which keeps what it freed.

    Passes in lockstep take turns, so that all but one of their heaps would lie idle: with eight of them a quarter of a
    gigabyte. Only before the first thread starts does the allocator listen, and a user's own setting stands.
    """
    if sys.platform == "linux" and not {"MALLOC_ARENA_MAX", "GLIBC_TUNABLES"} & os.environ.keys():
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(_ARENA_MAX, 2)


def _open_closed_streams() -> None:
    """Give standard streams that the caller closed (``>&-``) to nobody: the next file that is opened would be one."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
