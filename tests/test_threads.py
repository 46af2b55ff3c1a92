"""threads.py: the cores that a process may use, and how threads wait."""

import os
import subprocess
import sys
from pathlib import Path

import threads

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def limits(monkeypatch, tmp_path):
    """Pretend that the process may run on 6 of 64 cores, and that its control group holds `files`."""

    def pretend(files: dict[str, str]):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: 64)
        monkeypatch.setattr(threads, "CGROUP", tmp_path)
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)

    return pretend


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 6),
        ({"cpu.max": "max 100000\n"}, 6),
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "250000 100000\n"}, 3),  # two cores and a half keep three threads busy
        ({"cpu.max": "10000 100000\n"}, 1),
        ({"cpu.max": "3200000 100000\n"}, 6),
        ({"cpu.max": "nonsense"}, 6),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 6),
    ],
)
def test_cores_are_those_of_the_process_and_of_its_quota(limits, files, cores):
    limits(files)
    assert threads.num_cores() == cores


def test_threads_give_up_their_cores_soon_unless_the_user_decides():
    for given in ({"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}):
        environment = dict(given)
        threads.wait_briefly(environment)
        assert environment == given
    environment = {}
    threads.wait_briefly(environment)
    assert environment == {"GOMP_SPINCOUNT": str(threads.SPINS)}


@pytest.mark.parametrize("script", ["train", "generate", "hellaswag_utils"])
def test_a_script_that_computes_sets_it_before_torch_is_imported(script):
    """A finder of modules that comes first sees the environment at the moment when torch is looked up."""
    code = f"""
import os, runpy, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"))
            sys.exit()
sys.meta_path.insert(0, Finder())
sys.path.insert(0, {str(ROOT)!r})
runpy.run_path({str(ROOT / f"{script}.py")!r})
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split() == [str(threads.SPINS)]
