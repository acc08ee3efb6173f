"""Foreign text made printable, at each border where it leaves: the terminal, a model card, an HTML page.

Names come from files: of tensors, modules, models, folders. One may hold an escape sequence that repaints the terminal,
a line break that forges a line of ours, a mark that turns the text around it, or half a surrogate pair that no stream
can encode. Records and messages keep such a name as it is, because it must still be found in its file; whoever prints
it calls one of these.
"""

from __future__ import annotations

import html
import re

#: A further line of one of our messages is indented; a line that begins at the margin is a message's first.
_OWN_BREAK = "\n  "
#: What may begin a construct of Markdown within a line, or end a cell of a table; an underscore within a word does not.
_MARKDOWN = re.compile(r"([\\`*\[\]|~#!]|(?<![^\W_])_|_(?![^\W_]))")
#: What HTML cannot hold (controls, halves of surrogate pairs), and what turns the text around it (bidirectional marks).
_UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069\ufeff]")
#: What the Hub and others turn into a link on sight.
_BARE_LINK = re.compile(r"(?i)\b(https?|ftp|www|mailto|javascript|data)(?=[:.])")


def printable(text: object) -> str:
    r"""One line: each character that does not print as itself becomes its Python escape (``\x1b``, ``\n``)."""
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable_message(text: object) -> str:
    """A sentence and its indented details; any other line break is escaped, so that no name forges a line of ours."""
    return _OWN_BREAK.join(map(printable, str(text).split(_OWN_BREAK)))


def markdown_text(text: object) -> str:
    """Text that Markdown shows as itself, within a paragraph or a cell: no HTML, link, picture, comment or code."""
    escaped = _MARKDOWN.sub(r"\\\1", printable(text))
    return _BARE_LINK.sub(r"\1&#8203;", html.escape(escaped, quote=False))


def markdown_code(text: object) -> str:
    """Text as code within a line or a cell of a table."""
    return f"`{printable(text).replace('`', chr(0x2BC)).replace('|', chr(0x2223)).replace('<!--', '<! --')}`"


def page_text(text: str) -> str:
    """Text for an HTML page, not yet escaped: U+FFFD in place of each character that a page cannot show as itself."""
    return _UNFIT.sub("\N{REPLACEMENT CHARACTER}", text)
