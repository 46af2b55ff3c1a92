"""The commands that a run prints at its end. They can be pasted as they stand, where the run was started."""

import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from command_line import joined
from environment import local_world_size, world_size
from flags import split_flags, words_of


def resume_command(config: str = "") -> str:
    """The command that has started this run, with --resume True. torchrun's flags are among its words.

    It names the configuration `config`, unless a flag settles that: without one, data that is prepared meanwhile would
    change the configuration (run_config.name_in_force).
    """
    kept = [flag for flag in split_flags(sys.argv[1:], {}) if flag.name != "resume"]
    is_settled = any(flag.name in ("config", "data_root", "init_from") for flag in kept)
    named = [] if is_settled or not config else ["--config", config]
    return joined([*start_of_command(), *words_of(kept), *named, "--resume", "True"])


def talk_command(run_dir: str, prompts: Sequence[str], device: str = "auto") -> str:
    """The command that lets the model of a run go on with one of its `prompts`; without one it asks for a text.

    It names the run's `device` if that is the CPU: where torch cannot use the GPU, nothing else would go on.
    """
    words = [python_as_typed(), str(Path(sys.argv[0]).with_name("generate.py")), "--checkpoint", run_dir]
    words += ["--device", device] if device == "cpu" else []
    plain = [prompt for prompt in prompts if prompt.isprintable() and prompt[:1] not in ("", "-")]
    return joined([*words, *(["--prompt", plain[0]] if plain else [])])


def start_of_command() -> list[str]:
    """The words that have started this process, up to and with train.py."""
    script, flags = sys.argv[0], sys.argv[1:]
    words = launcher_words() if is_launched() else list(sys.orig_argv)
    if words and words[len(words) - len(flags) :] == flags:
        return words[: len(words) - len(flags)]
    if is_launched():
        return ["torchrun", "--standalone", "--nproc_per_node", str(world_size()), script]
    return [sys.orig_argv[0], script]


def launcher_words() -> list[str]:
    """The command line of torchrun, which is the parent of each rank. Empty where it cannot be read, as on macOS."""
    words: list[str] = []
    with suppress(OSError):
        words = os.fsdecode(Path(f"/proc/{os.getppid()}/cmdline").read_bytes()).split("\0")[:-1]
    if "torch.distributed.run" in words:
        return words
    if len(words) < 2 or Path(words[1]).name != "torchrun":
        return []
    torchrun, found = words[1], shutil.which("torchrun")  # words[0] is the interpreter that torchrun names
    return ["torchrun" if found and Path(found).resolve() == Path(torchrun).resolve() else torchrun, *words[2:]]


def python_as_typed() -> str:
    """How the interpreter was called: python, .venv/bin/python and so on."""
    if not is_launched():
        return sys.orig_argv[0]
    first = Path(next(iter(launcher_words()), "torchrun"))
    return str(first.with_name("python")) if first.name == "torchrun" else str(first)


def is_launched() -> bool:
    """Whether torchrun, or something like it, has started this process."""
    return world_size() > 1 or "TORCHELASTIC_RUN_ID" in os.environ


def on_which_machines() -> str:
    """On several nodes: on each of them. `--node_rank` in the command is that of the node which prints it."""
    if world_size() <= local_world_size():
        return ""
    has_rank = any(word.lstrip("-").replace("-", "_").startswith("node_rank") for word in launcher_words())
    return " on each node, with its own --node_rank" if has_rank else " on each node"


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\nOther files import this one. Run train.py.")
