"""README.md: its lines are pasted here, in their order, in an empty folder; its flags and those of --help exist.

A line runs as it stands, with these exceptions. What needs a network gets files of the same name from here. What takes
hours gets the flags of a tiny model. torchrun's own flags are parsed, and its script runs as one process. The lines in
NOT_RUN are not run, for the reasons there.
"""

import ast
import importlib
import io
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch.distributed.run
from tiny_run import ROOT, write_questions

import train
from command_line import FlagParser
from config import Config
from flags import field_types, read_flags, split_flags

README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = ("load_fineweb_dataset", "load_hellaswag_dataset", "hellaswag_utils", "generate", "report")
SCRIPTS += ("convert_checkpoint",)

# How the lines begin that are not run, and why.
NOT_RUN = {
    "python3 -m venv .venv": "makes an environment",
    "pip install -r requirements.txt": "needs a network",
    "pip install -r tests/requirements.txt": "needs a network",
    "python -m pytest": "these tests",
    "python load_hellaswag_dataset.py": "needs a network; the test writes its file",
    "python load_fineweb_dataset.py --source roneneldan/TinyStories": "needs a network",
    "lm_eval ": "another program, which needs a network",
    "python train.py --init_from Llama-3.2-1B": "needs weights that the reader has downloaded",
}
# What a run of seconds has, instead of what a line says.
TINY = "--max_steps 2 --total_batch_size 64 --batch_size 2 --val_tokens 64 --hellaswag_limit 2 --generate_tokens 2 "
TINY += "--prompts a --device cpu --dtype float32 --compile False --model.dim 32 --model.n_layers 1 --model.n_heads 2 "
TINY += "--model.n_kv_heads 1 --model.multiple_of 32 --model.max_seq_len 32"


def commands(text: str) -> list[str]:
    """The commands of the fenced blocks of a page, without comments and without the folder of the environment."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)
    lines = [re.split(r"\s{2,}#|\s#\s", line)[0] for block in blocks for line in block.splitlines()]
    return [part.strip().replace(".venv/bin/", "") for line in lines for part in line.split("&&") if part.strip()]


def is_run(command: str) -> bool:
    return not any(command.startswith(start) for start in NOT_RUN)


def script_of(command: str) -> tuple[str, list[str]]:
    """The script that a command starts, and its words. torchrun's words are checked and left out."""
    words = shlex.split(command)
    if words[0] == "torchrun":
        given = torch.distributed.run.get_args_parser().parse_args(words[1:])  # ends the test at an unknown flag
        return given.training_script.removesuffix(".py"), given.training_script_args
    assert words[0] == "python" and words[1].endswith(".py"), command
    return words[1].removesuffix(".py"), words[2:]


def wrong_flags(script: str, words: list[str]) -> dict[str, str]:
    """Flags that train.py cannot read, with a sentence for each. Another script ends the test at such a flag."""
    if script == "train":
        types = dict(field_types(Config))
        return read_flags(split_flags(words, types), train.SAMPLE, types)[1]
    importlib.import_module(script).command_line().parse_args(words)
    return {}


# ---------------------------------------------------------------- every line


def write_texts(folder: Path) -> None:
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.txt").write_text(" ".join(f"word{i * j % 97}" for j in range(3000)))


def as_run_here(script: str, words: list[str]) -> list[str]:
    """The words of a command, with what stands in for a network and for hours."""
    if script == "load_fineweb_dataset":
        if "--source" not in words:
            words = ["--source", "texts/", *(words or ["--out_dir", "data/fineweb-edu-10BT"])]
        there = [word for word in words if word not in ("--stream", "more/*.jsonl.gz")]
        return [*there, "--val_fraction", "0.5", "--num_proc", "1"]
    if script != "train":
        return [*words, "--device", "cpu"] if script in ("generate", "hellaswag_utils") else words
    tiny = shlex.split(TINY)
    for name in set(words) & set(tiny[::2]):
        place = words.index(name)
        words = words[:place] + words[place + 2 :]
    return words + tiny


def test_every_line_of_the_readme_runs_in_an_empty_folder(tmp_path, monkeypatch, capsys):
    """In their order: the first line trains the sample, and later ones need what earlier ones have written."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path / "texts")
    ran = []
    for command in filter(is_run, commands(README)):
        script, words = script_of(command)
        words = as_run_here(script, words)
        if "runs/other" in words:
            shutil.copytree("runs/llama3", "runs/other")
        if script == "hellaswag_utils":
            Path("data/hellaswag").mkdir()
            write_questions(Path("data/hellaswag"))
        module = importlib.import_module(script)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *words])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\n")))  # a reader types a prompt, and leaves
        status = module.main()
        assert status == 0, f"{command}\n{capsys.readouterr().err}"
        ran.append(script)
    assert {"train", "load_fineweb_dataset", "report", "hellaswag_utils", "convert_checkpoint"} <= set(ran)
    for run in ("runs/sample", "runs/llama3"):
        assert Path(run, "report.html").is_file()


def test_the_list_of_lines_that_are_not_run_has_no_line_too_many():
    for start in NOT_RUN:
        assert any(command.startswith(start) for command in commands(README)), start


# ---------------------------------------------------------------- every flag


def code_spans() -> list[str]:
    """What stands between backticks outside of the blocks: commands, and flags with their values."""
    text = re.sub(r"^```.*?^```", "", README, flags=re.M | re.S)
    return [span.replace("\\|", "|").replace(".venv/bin/", "") for span in re.findall(r"`([^`\n]+)`", text)]


def takers(flag: str) -> list[str]:
    """The scripts that know a flag."""
    found = ["train"] if flag.removeprefix("--") in dict(field_types(Config)) else []
    for script in SCRIPTS:
        parser: FlagParser = importlib.import_module(script).command_line()
        found += [script] if flag in parser._option_string_actions else []
    return found


@pytest.mark.parametrize("command", [c for c in commands(README) if c.startswith(("python ", "torchrun "))])
def test_the_flags_of_a_line_exist(command):
    if "-m " not in command:
        script, words = script_of(command)
        assert wrong_flags(script, words) == {}


def test_the_flags_in_tables_and_sentences_exist_and_take_their_values():
    flags = [span for span in code_spans() if span.startswith("--")]
    lines = [span for span in code_spans() if re.match(r"python \w+\.py", span)]
    assert len(flags) > 15 and len(lines) > 1
    for span in flags:
        name, *values = shlex.split(span)
        if name == "--signals-to-handle":  # torchrun's
            torch.distributed.run.get_args_parser().parse_args([name, *values, "train.py"])
            continue
        known = takers(name)
        assert known, f"{span}: no script has this flag"
        value_free = {"--val_source": ["--val_source", "FILE"], "--skip_nonfinite": ["--skip_nonfinite", "3"]}
        for script in known[:1]:
            needed = {"hellaswag_utils": "--checkpoint c --data d", "generate": "--checkpoint c"}.get(script, "")
            words = [name, *values] if values else value_free.get(name, [name])
            if values or "train" in known or script == "load_fineweb_dataset":
                assert wrong_if_bare_is_allowed(script, words + needed.split(), bare=not values) == {}, span
    for line in lines:
        script, words = script_of(line)
        if script in (*SCRIPTS, "train") and not {"...", "--help"} & set(words):
            assert wrong_flags(script, words) == {}, line


def wrong_if_bare_is_allowed(script: str, words: list[str], *, bare: bool) -> dict[str, str]:
    """`wrong_flags`; of a flag that a sentence names without its value, only the name is looked at."""
    if script == "train":
        wrong = wrong_flags(script, words)
        return {name: text for name, text in wrong.items() if not (bare and "has no value" in text)}
    return {} if bare else wrong_flags(script, words)


@pytest.mark.parametrize("script", ["train", *SCRIPTS])
def test_the_lines_that_help_shows_can_be_pasted(script):
    """The docstring of a script is what its --help begins with."""
    docstring = ast.get_docstring(ast.parse((ROOT / f"{script}.py").read_text(encoding="utf-8"))) or ""
    lines = [line.strip() for line in docstring.splitlines() if re.match(r" {4}(python|torchrun) ", line)]
    assert lines
    for line in lines:
        command = re.split(r"\s{2,}|\s#\s", line)[0]
        name, words = script_of(command)
        assert name == script
        assert wrong_flags(script, words) == {}, command
