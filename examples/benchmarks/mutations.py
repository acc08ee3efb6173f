"""Broken, odd and hostile versions of a file: values replaced, removed, nested; bytes flipped, cut, repeated."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

#: What readers of JSON trip over.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308, 5e-324, float("nan"), float("inf"), "",
    "0", "1", "nan", "LORA", "q_proj", "a/b", "../x", "/etc/passwd", "~", "C:\\x", "file:///x", "x" * 300, "\0", "\n",
    "mapconv: error: forged", "\x1b[2J", "\u202e", "\ud800", "é", "<img src=x onerror=alert(1)>", "javascript:alert(1)",
    "<!-- mapconv:end -->", "`|*_[](x)", "(a+)+b", "(", "(?i)q", ".*" * 9, "-->", "---", [], {}, [[]], [None], [1.5],
    [{}],
    {"a": {}}, {"": ""}, ["q_proj", 3], [[0, 4], [2, 5]], {"q_proj": 4}, {"0": [1]}, [1] * 50, 1.5,
)  # fmt: skip
#: What readers of YAML, of Markdown and of lines trip over.
TOKENS = (
    "---\n", "---", "...\n", "\n", "\r\n", "\t", " ", ": ", "- ", "? ", "[", "]", "{", "}", ",", "#", "&a ", "*a",
    "<<: *a\n",
    "!!bool maybe", "!!int x", "!!float x", "!!timestamp x", "!!binary x", "!!set {a}", "!!omap [a]",
    "!!python/name:os.x ",
    "!x ", "!!null x", "!!str [a]", "!!pairs [a]", "2023-02-30", "2023-01-01T99:99:99Z", "0x" + "f" * 5000, "1" * 5000,
    "190:20:30.15", ".nan", ".inf", "-.inf", "~", "yes", "|\n  x\n", ">\n  x\n", "%YAML 9.9\n", "\"\\ud800\"",
    "\"\\x\"",
    "'", '"', "\x00", "\x85", "\u2028", "\ufeff", "\ud800".encode("utf-8", "surrogatepass"), b"\xff\xfe", "[" * 300,
    "{a: " * 60,
    "<!-- mapconv:begin own=x -->", "<!-- mapconv:end -->", "<!-- mapconv:begin own=", "-->", "license: ", "tags: ",
    "base_model: ",
    "defaults: ", "adapters: ", "source: ", "output: ", "upgrade: {rank: 4}", "rank: ", "../x", "/", "text: ",
    "messages: ",
)  # fmt: skip


def mutated_json(content: bytes, random_: random.Random) -> bytes:
    """A JSON file with one to three parts replaced, removed or nested; one in six has broken bytes as well."""
    table = json.loads(content)
    for _ in range(random_.choice((1, 1, 1, 2, 3))):
        table = _with_change(table, random_)
    result = json.dumps(table).encode()
    return mutated_text(result, random_) if random_.random() < 1 / 6 else result


def mutated_lines(content: bytes, random_: random.Random) -> bytes:
    """JSON lines, some of them changed as ``mutated_json`` does."""
    lines = [mutated_json(x, random_) if random_.random() < 0.5 else x for x in content.splitlines() if x.strip()]
    result = b"\n".join(random_.sample(lines, len(lines))) + b"\n"
    return mutated_text(result, random_) if random_.random() < 1 / 6 else result


def mutated_text(content: bytes, random_: random.Random) -> bytes:
    """A file with up to four tokens put in, bytes flipped, pieces cut out or repeated."""
    data = bytearray(content)
    for _ in range(random_.choice((1, 1, 2, 4))):
        start = random_.randrange(len(data) + 1)
        stop = min(len(data), start + random_.choice((1, 2, 8, 40, 400)))
        kind = random_.randrange(6)
        if kind <= 2:
            token = random_.choice(TOKENS)
            data[start : stop if kind == 2 else start] = token if isinstance(token, bytes) else token.encode()
        elif kind == 3:
            del data[start:stop]
        elif kind == 4:
            data[start:start] = data[start:stop] * random_.choice((1, 2, 30))
        elif start < len(data):
            data[start] = random_.randrange(256)
    return bytes(data)


def mutated_header(content: bytes, random_: random.Random) -> bytes:
    """A safetensors file with a changed header, or with broken bytes anywhere."""
    length = int.from_bytes(content[:8], "little")
    if random_.random() < 0.3:
        return mutated_text(content, random_)
    header = mutated_json(content[8 : 8 + length], random_)
    claimed = len(header) if random_.random() < 0.9 else random_.choice((0, 2**40, 2**63, len(header) + 1))
    return claimed.to_bytes(8, "little") + header + content[8 + length :]


def _with_change(value: Any, random_: random.Random) -> Any:
    """One change at a random place below a value."""
    children: Sequence[Any] = (
        list(value) if isinstance(value, dict) else range(len(value) if isinstance(value, list) else 0)
    )
    if not children or random_.random() < 0.15:
        return _replacement(value, random_)
    key = random_.choice(children)
    if random_.random() < 0.12:
        return _without(value, key, random_)
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[key] = _with_change(value[key], random_)
    return copy


def _without(value: Any, key: Any, random_: random.Random) -> Any:
    """Without a part, or with its name changed."""
    copy = dict(value) if isinstance(value, dict) else list(value)
    taken = copy.pop(key)
    if isinstance(copy, dict) and random_.random() < 0.5:
        copy[str(random_.choice(VALUES))] = taken
    return copy


def _replacement(value: Any, random_: random.Random) -> Any:
    kind = random_.random()
    if kind < 0.04:
        for _ in range(random_.choice((2, 30, 70, 400))):
            value = [value] if random_.random() < 0.5 else {"a": value}
        return value
    if kind < 0.1:
        return [value] * random_.choice((1, 2, 50))
    return random_.choice(VALUES)
