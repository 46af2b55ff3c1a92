"""command_line.py: what the scripts do with flags that are wrong. The parsers of all scripts are tried."""

import importlib
from collections.abc import Iterator

import pytest

from command_line import SWITCH, FlagParser, at_least, results_of

# Each script, with words that it takes.
SCRIPTS = {
    "load_fineweb_dataset": [],
    "load_hellaswag_dataset": [],
    "hellaswag_utils": ["--checkpoint", "c", "--data", "d"],
    "generate": ["--checkpoint", "c"],
    "report": ["runs/a"],
    "convert_checkpoint": ["to-hf", "--checkpoint", "c", "--out", "o"],
}


def parser_of(script: str) -> FlagParser:
    return importlib.import_module(script).command_line()


def flags_of(parser: FlagParser) -> Iterator[str]:
    yield from (name for name in parser._option_string_actions if name.startswith("--") and name != "--help")


def refusal(parser: FlagParser, words: list[str], capsys) -> list[str]:
    """The lines that refuse a command line. Nothing else is printed."""
    with pytest.raises(SystemExit) as end:
        parser.parse_args(words)
    printed = capsys.readouterr()
    assert (end.value.code, printed.out) == (2, "")
    return printed.err.removeprefix(f"{parser.prog}: ").splitlines()


@pytest.fixture
def parser() -> FlagParser:
    parser = FlagParser(prog="x.py")
    parser.add_argument("files", nargs="*", metavar="FILE")
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--limit", type=at_least(1))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--style", choices=("gpt2", "lm-eval"))
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--stream", **SWITCH)
    one.add_argument("--copy")
    return parser


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_takes_an_abbreviation_or_a_typo_and_each_names_the_flag_that_was_meant(script, capsys):
    parser = parser_of(script)
    parser.parse_args(SCRIPTS[script])
    flags = ["--checkpoint", "--out", "--dtype"] if script == "convert_checkpoint" else list(flags_of(parser))
    for flag in flags:
        for typo in (flag[:-1], f"{flag}s", flag[1:], flag.replace("_", "-")):
            if typo not in flags and sum(other.startswith(typo) for other in flags) < 2:  # --top_ may be either
                [line] = refusal(parser, [*SCRIPTS[script], f"{typo}=1"], capsys)[:1]
                line = line.removeprefix(f"{parser.prog} to-hf: ")
                assert line == f"{typo}=1: no such flag; did you mean {flag}?"


def test_all_that_is_wrong_stands_in_one_message(parser, capsys):
    words = "--chekpoint c --limit 0 --steps x --rate y --style gtp --stream maybe"
    assert refusal(parser, words.split(), capsys) == [
        "--chekpoint: no such flag; did you mean --checkpoint?",
        "--limit 0: must be at least 1",
        "--steps x: must be a whole number",
        "--rate y: must be a number",
        "--style gtp: must be gpt2 or lm-eval",
        "--stream maybe: must be True or False",
        "--data: must be given",
    ]


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        ("--data d", ["--checkpoint: must be given"]),
        (
            "--limit",
            ["--limit: has no value; it must be a whole number", "--checkpoint: must", "--data: must"],
        ),
        ("--data --checkpoint c", ["--data: has no value; it must be a text, in quotes if it has spaces"]),
        ("--checkpoint c --data d --limit x", ["--limit x: must be a whole number"]),
        ("--checkpoint c --data d --limit 1.5", ["--limit 1.5: must be a whole number"]),
        (f"--checkpoint c --data d --limit {10**16}", [f"--limit {10**16}: must be at most 1,000,000,000,000,000"]),
        ("--checkpoint c --data d --quux", ["--quux: no such flag; `python x.py --help` lists them; a text that"]),
        ("--checkpoint c --data d --stream --copy e", ["--copy: not allowed with argument --stream"]),
    ],
)
def test_the_culprit_alone_is_named(parser, capsys, words, lines):
    said = refusal(parser, words.split(), capsys)
    assert len(said) == len(lines) and all(map(str.startswith, said, lines)), said


@pytest.mark.parametrize(
    ("words", "value"),
    [("", False), *((f"--stream {word}", True) for word in ("", "True", "true", "1", "1 file"))]
    + [(f"--stream {word}", False) for word in ("False", "false", "0")],
)
def test_a_switch_takes_the_words_for_true_and_false_or_nothing(parser, words, value):
    assert parser.parse_args(["--checkpoint", "c", "--data", "d", *words.split()]).stream is value


def test_right_values_arrive_as_they_are(parser):
    words = "a b --checkpoint=c --data d --limit 1_000 --steps -3 --rate -0.001 --style lm-eval --copy -5"
    found = parser.parse_args(words.split())
    assert (found.files, found.limit, found.steps, found.rate) == (["a", "b"], 1000, -3, -1e-3)
    assert (found.checkpoint, found.style, found.copy) == ("c", "lm-eval", "-5")


def test_a_word_that_belongs_to_no_flag_is_refused(capsys):
    assert refusal(parser_of("load_hellaswag_dataset"), ["stray"], capsys) == ["stray: belongs to no flag"]


def test_commands_of_a_script(capsys):
    parser = parser_of("convert_checkpoint")
    assert refusal(parser, ["to-h"], capsys) == ["to-h: no such command; did you mean to-hf?"]
    assert refusal(parser, [], capsys) == ["to-hf|to-meta|from-meta: must be given"]
    [line] = refusal(parser, ["to-meta", "--checkpoint", "c"], capsys)
    assert line.endswith(" to-meta: --out: must be given")


def test_calls_that_fail_are_reported_together():
    def fail(error):
        raise error

    assert results_of(lambda: 1, lambda: 2) == [1, 2]
    with pytest.raises(ValueError, match=r"^a\nb$"):
        results_of(lambda: fail(ValueError("a")), lambda: 1, lambda: fail(OSError("b")))
