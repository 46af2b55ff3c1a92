"""For all tests."""

import os
import signal

# A job in the background of a script ignores Ctrl-C, and so would every process that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Two files of tests run at a time (pyproject.toml). With more threads than cores, torch's threads wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
