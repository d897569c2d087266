"""What every test shares: one torch thread (tests run in parallel by process), and quiet, offline libraries."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from claims import loaded


@pytest.fixture
def experiment(request):
    """The script that a test asks for, or that its file names as EXPERIMENT, as a module."""
    with loaded(getattr(request, "param", None) or request.module.EXPERIMENT) as module:
        yield module
