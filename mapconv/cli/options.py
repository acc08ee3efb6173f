"""The command line's view of the option records: each becomes a click parameter, and rules become usage errors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from mapconv.cli.output import talk
from mapconv.options.kinds import (
    Choice,
    File,
    Flag,
    Folder,
    Kind,
    Real,
    Reals,
    Repository,
    Size,
    Source,
    Text,
    Whole,
)
from mapconv.options.records import Command, Option


class Chosen(Mapping[str, Any]):
    """What a user chose: every option by its name, and ``arguments``, those that the command's function takes."""

    def __init__(self, record: Command, values: dict[str, Any]) -> None:
        self._values = values
        self.arguments = {name: value for name, value in values.items() if record.options[name].in_python}

    def pop(self, name: str) -> Any:
        """A value that is not kept: a secret must not lie about."""
        self.arguments.pop(name, None)
        return self._values.pop(name)

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def command(
    record: Command, short_help: str, group: click.Group | None = None
) -> Callable[[Callable[[Chosen], None]], click.Command]:
    """Make a function of the chosen options a command with all options of its record; its docstring is the help."""

    def decorate(function: Callable[[Chosen], None]) -> click.Command:
        @functools.wraps(function)
        def callback(**values: Any) -> None:
            for _, fault in record.faults(values, record.spelled):
                raise click.UsageError(f"{fault}.")
            talk(verbose=values.get("verbose", False))
            function(Chosen(record, values))

        name = record.name.rpartition(" ")[2]
        parameters = [_parameter(option) for option in record.options.values()]
        made = click.Command(name, callback=callback, params=parameters, help=function.__doc__, short_help=short_help)
        if group is not None:
            group.add_command(made)
        return made

    return decorate


def _parameter(option: Option) -> click.Parameter:
    kind = _click_type(option.kind)
    # To click a default of None is a value, with which nothing is missing.
    default = {} if option.default is None else {"default": option.default}
    if option.positional:
        return click.Argument(
            [option.name],
            type=kind,
            nargs=-1 if option.many else 1,
            required=option.required,
            **default,
            metavar=f"{option.metavar}..." if option.many else option.metavar,
        )
    names = [option.name, option.flag, *([option.short] if option.short else [])]
    if isinstance(option.kind, Flag):
        return click.Option(names, is_flag=True, help=option.help)
    return click.Option(
        names,
        type=kind,
        **default,
        required=option.required,
        show_default=option.default is not None,
        metavar=option.metavar,
        help=option.help if option.fallback is None else f"{option.help}  [default: {option.fallback}]",
    )


def _click_type(kind: Kind) -> click.ParamType:
    """click's own type where it says the range or the choices in help; else one that asks the kind."""
    if isinstance(kind, Whole):
        return click.IntRange(min=kind.least)
    if isinstance(kind, Real):
        low = kind.least if kind.above is None else kind.above
        return _Number(low, kind.below, min_open=kind.above is not None, max_open=kind.below is not None)
    if isinstance(kind, Choice):
        return _Words(kind)
    if isinstance(kind, Folder | File):
        return _PathType("file" if isinstance(kind, File) else "dir")
    if isinstance(kind, Source):
        return _SourceType()
    return click.STRING if isinstance(kind, Text) else _Parsed(kind)


class _Number(click.FloatRange):
    """A number in a range, in which NaN, which compares with nothing, would pass."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        if found != found:
            self.fail(f"{value!r} is not a number.", param, ctx)
        return found


class _Words(click.Choice):
    """Choices, and what the kind takes besides them."""

    def __init__(self, kind: Choice) -> None:
        super().__init__(kind.choices)
        self._kind = kind

    def convert(self, value, param, context):
        try:
            return self._kind.read(value)
        except ValueError:
            return super().convert(value, param, context)


class _PathType(click.ParamType):
    """A path, completed as a file or as a folder; the functions say what is wrong with one."""

    def __init__(self, completion: str) -> None:
        self.name = "file" if completion == "file" else "folder"
        self._completion = completion

    def convert(self, value, param, context):
        return Path(value)

    def shell_complete(self, context, param, incomplete):
        return [CompletionItem(incomplete, type=self._completion)]


class _SourceType(click.ParamType):
    """A folder or a Hub reference, as it was typed."""

    name = "source"

    def convert(self, value, param, context):
        return value

    def shell_complete(self, context, param, incomplete):
        return [CompletionItem(incomplete, type="dir")]


class _Parsed(click.ParamType):
    """A text that the kind reads, or the number that it spells."""

    def __init__(self, kind: Kind) -> None:
        self.name = kind.expected
        self._kind = kind

    def convert(self, value, param, context):
        try:
            return self._kind.read(value if isinstance(self._kind, Size | Reals | Repository) else _number(value))
        except ValueError as error:
            self.fail(f"{value!r} is not {error}.", param, context)


def _number(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    for number in (int, float):
        try:
            return number(value)
        except ValueError:
            continue
    return value
