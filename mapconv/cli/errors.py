"""Errors become one sentence on stderr and an exit status: 1 for what went wrong, 2 for wrong usage."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import click

from mapconv.errors import MapconvError

#: What to say of an operating system's refusal, by its number.
_SYSTEM_ERRORS = {
    errno.ENOSPC: "no space left on the disk: make room and run the command again",
    errno.EDQUOT: "the disk quota is used up: make room and run the command again",
    errno.EACCES: "permission denied: change its permissions, or give another folder",
    errno.EPERM: "not permitted: change its permissions, or give another folder",
    errno.EROFS: "the file system is read-only: choose another output folder",
    errno.EFBIG: "the file is larger than this file system or a limit of this shell allows",
}


@contextmanager
def errors_as_sentences() -> Iterator[None]:
    """Run a command; on an error print one sentence and exit. ``MAPCONV_DEBUG=1`` lets the traceback through."""
    try:
        yield
    except click.exceptions.Exit as exit_request:
        sys.exit(exit_request.exit_code)
    except click.UsageError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        _fail(error.format_message())
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted: nothing was written.", status=130)
    except BrokenPipeError:
        # The reader of our output has left (`mapconv inspect … | head`): leave too, without a complaint at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if os.environ.get("MAPCONV_DEBUG") == "1":
            traceback.print_exc()
        _fail(sentence(error))


def sentence(error: Exception) -> str:
    """What to tell a user of any error."""
    if isinstance(error, MapconvError):
        return str(error)
    if isinstance(error, OSError):
        reason = _SYSTEM_ERRORS.get(error.errno) or error.strerror or str(error)
        return f"{error.filename}: {reason}." if error.filename else f"{reason}."
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out of memory: close other programs, use --device cpu, or convert on a larger machine."
    if isinstance(error, ValueError):
        return f"{error}."
    lines = str(error).strip().splitlines() or [""]
    return (
        f"unexpected {type(error).__name__} ({lines[0][:200]}): this is a bug in mapconv; run again with "
        "MAPCONV_DEBUG=1 and report the traceback."
    )


def _fail(message: str, *, status: int = 1) -> None:
    click.echo(f"mapconv: error: {message}", err=True)
    sys.exit(status)
