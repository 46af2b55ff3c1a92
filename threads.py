"""How many cores this process may use, and how its threads wait for each other.

Import this file before torch: OpenMP reads the environment when torch is imported. So there is no torch here.
"""

import math
import os
from collections.abc import MutableMapping
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
SPINS = 10_000


def wait_briefly(environment: MutableMapping[str, str]) -> None:
    """Let threads that wait for each other give up their cores soon. What the user has set counts more.

    An operation of torch is a loop that the threads share, and at its end they wait for the slowest one. GNU's OpenMP
    lets them spin 300,000 times before they sleep. Where another program needs a core, they hold the core that the
    slowest thread waits for. `benchmarks/waiting.py` measures what fewer spins cost alone, and gain there.
    """
    if not environment.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
        environment["GOMP_SPINCOUNT"] = str(SPINS)


wait_briefly(os.environ)


def num_cores() -> int:
    """The cores that this process may use. In a container or a batch job they are fewer than the machine has.

    Two limits count: the set of cores that the process may run on, and the quota of CPU time of its control group
    (`cpu.max` of version 2, `cpu.cfs_quota_us` of version 1; see the kernel's cgroup documentation).
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, cpu_quota())))


def cpu_quota() -> float:
    """CPU seconds a second that the control group grants, infinity where it sets no limit."""
    try:
        if (CGROUP / "cpu.max").is_file():
            quota, period = (CGROUP / "cpu.max").read_text().split()
        else:
            quota, period = ((CGROUP / f"cpu/cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return math.inf if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # no Linux, no control groups, or another layout
        return math.inf


if __name__ == "__main__":
    print(f"This process may use {num_cores()} cores. Other files import this one.")
