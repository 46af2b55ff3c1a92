"""For all tests."""

import os
import signal

import pytest

# A job in the background of a script ignores Ctrl-C, and so would every process that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# On a machine with a GPU, too, the tests need only the CPU. Those that pretend a GPU set this variable.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

# Two files of tests run at a time (pyproject.toml). With more threads than cores, torch's threads wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture
def no_syncs(monkeypatch):
    """test_files.py tests that files reach the disk. Where hundreds are written, syncs would only take time."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture(scope="session")
def compiler():
    """Leaves out a test of compiled code where torch.compile does not work, as without a C++ compiler."""
    import torch

    from hardware import can_compile

    if not can_compile(torch.device("cpu")):
        pytest.skip("torch.compile does not work here")


@pytest.fixture
def small_batches(monkeypatch):
    """Give two documents at a time to the tokenizer. A real corpus gives two hundred."""
    import readers

    monkeypatch.setattr(readers, "BATCH_DOCUMENTS", 2)
