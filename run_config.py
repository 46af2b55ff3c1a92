"""Which configuration a run has: the named one in force, with the flags, checked against what is on the disk."""

import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

from command_line import shown
from config import RATES, Config, config_errors, local_device, path_errors
from dataloaders import folder_quotas
from environment import environment_errors
from flags import Flag, field_types, read_flags, split_flags
from hardware import dtype_name, fastest_dtype
from model_folders import find_checkpoint, read_model_config
from optimizers import misfits, peak_of, with_recipe
from shards import is_prepared, read_manifest
from tokenizer import VOCAB_SIZES

# ---------------------------------------------------------------- the named configurations


def name_in_force(flags: list[Flag], configs: dict[str, Config]) -> str:
    """The name that --config gives. Without it: the original where its data is prepared, else the sample.

    Flags that name data or weights mean the original, because the sample has its own.
    """
    named = next((flag.values[0] for flag in flags if flag.name == "config" and flag.values), "")
    if named in configs:
        return named
    is_meant = any(flag.name in ("data_root", "init_from") for flag in flags)
    return "original" if is_meant or not data_errors(configs["original"].data_root) else "sample"


def command_that_prepares(cfg: Config) -> str:
    """The command that makes the data of a named configuration: text of FineWeb-Edu, in its vocabulary."""
    command = "python load_fineweb_dataset.py"
    if cfg.model.vocab_size != VOCAB_SIZES[-1]:
        command += f" --vocab_size {cfg.model.vocab_size}"
    return command if cfg.data_root == "data/fineweb-edu-10BT" else f"{command} --out_dir {cfg.data_root}"


# ---------------------------------------------------------------- what is on the disk


def data_errors(data_root: str | tuple[str, ...], cure: str = "load_fineweb_dataset.py makes one") -> list[str]:
    """A sentence for each folder of `data_root` that is not prepared, or for a mixture that cannot be."""
    if "" in (data_root, *data_root):
        return [f"data_root={data_root}: a folder has no name; give one that load_fineweb_dataset.py has prepared"]
    errors = []
    try:
        for folder in folder_quotas(data_root):
            with suppress(OSError):  # no folder has such a name, or it is not for us to read
                if is_prepared(folder):
                    continue
            errors.append(f"data_root={shown(folder)}: not a prepared folder; {cure}")
    except ValueError as error:
        errors.append(str(error))
    return errors


def vocabulary_errors(cfg: Config, configs: dict[str, Config]) -> list[str]:
    """A sentence for each prepared folder whose ids are of another vocabulary than the model's."""
    errors, size = [], cfg.model.vocab_size
    with suppress(ValueError):  # a mixture that cannot be: data_errors has a sentence for it
        for folder in folder_quotas(cfg.data_root):
            try:
                found = read_manifest(folder)["vocab_size"]
            except (OSError, ValueError):  # what is wrong with the file, the run says when it opens the data
                continue
            if found == size or size not in VOCAB_SIZES:
                continue
            cure = f"pass --model.vocab_size {found}"
            if cfg.init_from:  # its weights fix the vocabulary
                cure = f"prepare another folder with load_fineweb_dataset.py --vocab_size {size}"
            for name, other in configs.items():
                if name != cfg.config and (other.data_root, other.model.vocab_size) == (folder, found):
                    cure = f"pass --config {name}"
            errors.append(f"data_root={shown(folder)}: its vocabulary is {found}, the model's is {size}; {cure}")
    return errors


def with_model_of(cfg: Config, given: set[str]) -> tuple[Config, list[str]]:
    """`cfg` with the model that `init_from` names, and a sentence for each of the `given` flags that it contradicts.

    The sequence length stays that of the run.
    """
    try:
        model, _ = read_model_config(find_checkpoint(cfg.init_from))
    except (ValueError, OSError) as error:
        return cfg, [f"init_from={cfg.init_from}: {error}"]
    errors = [
        f"model.{name}={asked}: {cfg.init_from} has {value}; leave the flag out"
        for name, value in asdict(model).items()
        if name != "max_seq_len" and f"model.{name}" in given and (asked := getattr(cfg.model, name)) != value
    ]
    length = cfg.model.max_seq_len
    if length > model.max_seq_len:
        errors.append(f"model.max_seq_len={length}: {cfg.init_from} has only {model.max_seq_len} positions; lower it")
    return replace(cfg, model=replace(model, max_seq_len=length)), errors


def with_data_on_disk(cfg: Config, given: set[str], sample: Config) -> tuple[Config, list[str], list[str]]:
    """`cfg` without HellaSwag where its file is missing; a sentence for all that is missing otherwise; and notes.

    train.py writes the data of the sample configuration. A dry run reads no data, so a folder that no flag names may be
    missing.
    """
    errors, notes = [], []
    is_written = cfg.config == "sample" and cfg.data_root == sample.data_root
    if "data_root" in given and not is_written:
        errors += data_errors(cfg.data_root)
    elif not (is_written or cfg.dry_run):
        cure = f"`{command_that_prepares(cfg)}` makes it; --config sample needs no preparation"
        errors += data_errors(cfg.data_root, cure)
    is_written = is_written and cfg.hellaswag_path == sample.hellaswag_path
    if cfg.hellaswag_every and not is_written and not os.path.isfile(cfg.hellaswag_path):
        fetch = "`python load_hellaswag_dataset.py` fetches"
        if "hellaswag_path" in given:
            cure = f"{fetch} HellaSwag; --hellaswag_every 0 goes without"
            errors.append(f"hellaswag_path={shown(cfg.hellaswag_path)}: no such file; {cure}")
        else:
            notes.append(f"without HellaSwag, which {fetch}")
            cfg = replace(cfg, hellaswag_every=0)
    return cfg, errors, notes


# ---------------------------------------------------------------- all together


def read_config(
    args: list[str], configs: dict[str, Config], description: str = "", say: Callable[[str], Any] = print
) -> Config:
    """The configuration in force, with the flags in `args`.

    Args:
        configs: the named configurations, with "original" and "sample" among them.
        description: what --help says before the flags.
        say: gets what the run is about to do, line by line. It gets nothing if the run is refused.

    Raises:
        ValueError: flags that cannot be read and fields that cannot be honoured, all of them in one message.
        SystemExit: --help.
    """
    types = dict(field_types(Config))
    flags = split_flags(args, types)
    given, name = {flag.name for flag in flags}, name_in_force(flags, configs)
    description += f"\n\nThe defaults below are those of --config {name}; others have their own."
    description += "\nWhere the optimizer's fields say None, RECIPES in optimizers.py has the value."
    cfg, wrong = read_flags(flags, replace(configs[name], config=name), types, description)
    if "config" not in wrong and cfg.config not in configs:
        wrong["config"] = f"config={shown(cfg.config)}: must be {' or '.join(configs)}"
        cfg = replace(cfg, config=name)
    note = f"configuration: {name}"
    if name == "sample" and "config" not in given:
        note += f"; `{command_that_prepares(configs['original'])}` prepares the original"
    cfg, errors, notes = with_data_on_disk(cfg, given, configs["sample"])
    if cfg.init_from:
        cfg, found = with_model_of(cfg, given)
        errors += found
    if "model.vocab_size" not in wrong:
        errors += vocabulary_errors(cfg, configs)
    errors += [*path_errors(cfg), *config_errors(cfg), *misfits(cfg)]
    # The field of a flag that cannot be read still has its default, so a sentence with that value would mislead.
    fields = "|".join(re.escape(field.rpartition(".")[2]) for field in wrong if field) or "(?!)"
    errors = [error for error in errors if not re.search(rf"(^|[ .])({fields})=", error)]
    errors = [*environment_errors(), *wrong.values(), *errors]
    if errors:
        raise ValueError("\n".join(errors))
    for line in (note, *notes):
        say(line)
    if cfg.dtype == "auto":  # the records of a run say which dtype it was
        cfg = replace(cfg, dtype=dtype_name(fastest_dtype(local_device(cfg.device))))
    if cfg.init_from and cfg.optimizer == "muon" and not given & set(RATES):
        say("the rates of muon suit new weights; `--optimizer adamw --max_lr 2e-5` changes trained ones less")
    cfg = with_recipe(cfg)
    if (peak := peak_of(cfg)) < peak_of(replace(cfg, warmup_steps=0)) - 0.01:
        say(
            f"the learning rates reach only {peak:.0%} of their peaks, because warmup_steps={cfg.warmup_steps} of "
            f"max_steps={cfg.max_steps} leaves no room; leave --warmup_steps out, and it follows the length of the run"
        )
    return cfg


if __name__ == "__main__":
    raise SystemExit(f"{__doc__}\n`python train.py --help` lists the flags.")
