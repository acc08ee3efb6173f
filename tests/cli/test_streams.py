"""Where the output goes may be closed, full or of another encoding: an exit status, and no traceback."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.files import edit_json

MAPCONV = [sys.executable, "-m", "mapconv"]


def shell(line: str, *arguments: object) -> subprocess.CompletedProcess:
    command = ["bash", "-c", line, "bash", *MAPCONV, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ('"$@" >&-', 0),
        ('"$@" 2>&-', 0),
        ('"$@" >&- 2>&- <&-', 0),
        ('"$@" >/dev/full', 1),
        ('set -o pipefail; "$@" | true', None),  # 0 or 1, by whether the reader was gone before the text came
    ],
)
def test_a_stream_that_takes_nothing(line, status):
    done = shell(line, "--help")
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert done.returncode == status or (status is None and done.returncode in (0, 1))


def test_a_full_disk_is_named():
    assert shell('"$@" >/dev/full', "--help").stderr == (
        "mapconv: error: no space left on the disk: free some space and run the command again.\n"
    )


def test_an_encoding_that_lacks_a_character(forked, tmp_path):
    code = (
        "import sys\nfrom mapconv.cli import main\n"
        "sys.stdout, sys.stderr = (open(number, 'w', encoding='latin-1', closefd=False) for number in (1, 2))\n"
        "main()"
    )
    done = forked.run(code, ["mapconv", "inspect", "no-such-folder/α"], dict(os.environ), tmp_path / "process")
    assert done.returncode == 1
    assert "\\u03b1" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_name_that_is_no_text(forked, tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\n\x1b")
    code = "from mapconv.cli import run\nrun()"
    done = forked.run(code, ["mapconv", "inspect", name], dict(os.environ), tmp_path / "process")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "\\udcff\\n\\x1b does not exist" in done.stderr


@pytest.mark.parametrize("debug", [False, True])
def test_warnings_are_for_developers(own_lora, forked, tmp_path, debug):
    edit_json(own_lora / "adapter_config.json", rank_pattern={"[[q]_proj": 2})  # Python warns of "[["
    code = "from mapconv.cli import run\nrun()"
    env = dict(os.environ) | ({"MAPCONV_DEBUG": "1"} if debug else {})
    done = forked.run(code, ["mapconv", "inspect", str(own_lora)], env, tmp_path / "process")
    assert ("FutureWarning" in done.stderr) == debug
