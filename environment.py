"""The variables that torchrun sets: the place of this process, known before any process group exists.

A variable that is no number counts as not set, because train.py asks for the number of processes when it is imported.
`environment_errors` refuses it after that.
"""

import os
import re

from command_line import shown

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # set by srun and by mpirun


def whole_number(name: str, default: int) -> int:
    """The variable `name`, or `default` where it is not a whole number."""
    word = os.environ.get(name, "")
    return int(word) if re.fullmatch(r"[0-9]{1,9}", word) else default


def world_size() -> int:
    return max(1, whole_number("WORLD_SIZE", 1))


def rank() -> int:
    return whole_number("RANK", 0)


def local_rank() -> int:
    """0 where the place makes no sense: train.py prints an error at local rank 0, and each process may have its own."""
    return 0 if place_errors() else whole_number("LOCAL_RANK", 0)


def local_world_size() -> int:
    return whole_number("LOCAL_WORLD_SIZE", world_size())


def place_errors() -> list[str]:
    """A sentence for every variable that gives this process no place among the others."""
    cure = "start the processes with torchrun, or unset it to train alone"
    errors = [
        f"{name}={shown(value)}: must be a whole number, {least} or more; {cure}"
        for name in PLACE
        if (value := os.environ.get(name)) is not None
        and whole_number(name, -1) < (least := 1 if name.endswith("SIZE") else 0)
    ]
    if not errors and rank() >= world_size():
        errors.append(f"RANK={rank()}: must be below the number of processes, WORLD_SIZE={world_size()}; {cure}")
    if not errors and (number := whole_number("LOCAL_RANK", 0)) >= local_world_size():
        errors.append(
            f"LOCAL_RANK={number}: must be below the number of processes here, LOCAL_WORLD_SIZE={local_world_size()}; "
            f"{cure}"
        )
    return errors


def environment_errors() -> list[str]:
    """A sentence for every reason why this process would wait for others in vain, or train beside them alone."""
    errors = place_errors()
    if world_size() > 1:
        missing = [name for name in (*PLACE, "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if missing:
            errors.append(
                f"WORLD_SIZE={world_size()}: {', '.join(missing)} must be set too; start the processes with torchrun"
            )
        elif not 0 < whole_number("MASTER_PORT", 0) < 2**16:
            port = shown(os.environ["MASTER_PORT"])
            errors.append(f"MASTER_PORT={port}: must be 1 to 65535; start the processes with torchrun")
    tasks = next((name for name in TASKS if whole_number(name, 1) > 1), None)
    if tasks and "WORLD_SIZE" not in os.environ:
        errors.append(
            f"{tasks}={os.environ[tasks]}: so many tasks have no torchrun, and each would train alone; start one "
            "torchrun a node, as launch/slurm.sbatch does; for separate runs set WORLD_SIZE=1"
        )
    return errors


if __name__ == "__main__":
    print("\n".join(environment_errors()) or f"This is process {rank()} of {world_size()}.")
