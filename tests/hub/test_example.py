"""The example that publishes runs as it stands."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.hub.conftest import BASE_ID, ROOT, adapter_files, files_of


def test_publish(models, python, hub, tmp_path):
    hub.repo(BASE_ID, files_of(models.base))
    hub.repo("artist/poems", adapter_files(models.dora, BASE_ID))
    code = (ROOT / "examples" / "publish.py").read_text()
    out = tmp_path / "out"
    done = python(hub, code, "artist/poems", "me/poems-map", "--out", out, "--license", "mit", "--yes")
    assert done.returncode == 0, done.stderr
    assert f"{hub.url}/me/poems-map at {hub.store.repos['me/poems-map'].branches['main']}" in done.stdout
    card = hub.content("me/poems-map", "README.md").decode()
    assert "KL(source ‖ model)" in card
    assert "source_adapter: artist/poems" in card


def test_the_command_line_loads_neither_torch_nor_the_hubs_client():
    code = (
        "import sys; from click.testing import CliRunner; from mapconv.cli import cli\n"
        "assert CliRunner().invoke(cli, ['push', '--help']).exit_code == 0\n"
        "assert not {'torch', 'huggingface_hub', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )
    env = dict(os.environ) | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
