"""Errors become one sentence on stderr and an exit status: 1 for what went wrong, 2 for wrong usage."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import click

from mapconv.cli.output import coloured
from mapconv.errors import sentence
from mapconv.untrusted.printable import printable_message


@contextmanager
def errors_as_sentences() -> Iterator[None]:
    """Run a command; on an error print one sentence and exit. ``MAPCONV_DEBUG=1`` lets the traceback through."""
    try:
        yield
    except click.UsageError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        _fail(error.format_message())
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted: no output was written or replaced.", status=130)
    except BrokenPipeError:
        # The reader of our output has left (`mapconv inspect … | head`): leave too, without a complaint at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if os.environ.get("MAPCONV_DEBUG") == "1":
            traceback.print_exc()
        _fail(sentence(error))


def _fail(message: str, *, status: int = 1) -> None:
    click.echo(f"{coloured('mapconv: error:', 'red', err=True)} {printable_message(message)}", err=True)
    sys.exit(status)
