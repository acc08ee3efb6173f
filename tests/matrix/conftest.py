"""One workshop for the whole session: bases and adapters are made once and shared by every test."""

from __future__ import annotations

import pytest
import torch
import transformers

from .oracle import Workshop


@pytest.fixture(scope="session", autouse=True)
def _quiet_and_single_threaded():
    """Matrices this small only lose time to threads, and 200 progress bars hide what failed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    torch.set_num_threads(threads)
    transformers.logging.enable_progress_bar()
    transformers.logging.set_verbosity_warning()


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("matrix"))
