"""Runs every benchmark of the model, writes its table in benchmarks/README.md, and reports rows that got slower.

    python benchmarks/all.py                     all rows: hours on two cores
    python benchmarks/all.py --only generation   the rows with this word in their name; the other rows do not change

There is a table for each kind of machine: processor, instructions, dtype, torch version. A run rewrites rows of its own
machine's table only. On a new kind of machine it begins a table.

A row compares our fastest way with the peer's fastest way. The new row replaces the old one in the table. But if the
ratio has fallen by more than a tenth, the old row stays, the new row is only printed, and the exit status is 1. With
--accept the new row replaces the old one even then.
"""

import argparse
import datetime
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from common import DEVICE, machine

from files import atomic_write

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"
BEGIN, END = "<!-- benchmarks/all.py writes from here -->", "<!-- to here -->"
HEAD = "| what | command | ours | peer | ratio | of the matmul rate | peak memory, GiB, ours / peer | measured |"


@dataclass(frozen=True)
class Row:
    """How to measure a row of the table. A way is one method of doing a benchmark's work: see common.py."""

    command: str  # script and flags
    peers: str = "Hugging Face"  # the names of the peer's ways begin with this
    figure: str = "tokens_per_sec"  # the figure to compare
    unit: str = "tokens/s"


HELLASWAG = "hellaswag.py --rows 24 --turns 2"
SMALL = "train_step.py --shape small --seq_len 256"
ROWS = {
    "training step, original shape, 4 x 1,024": Row("train_step.py --turns 2"),
    "training step, original shape, 2 x 512": Row("train_step.py --batch_size 2 --seq_len 512 --turns 2"),
    "training step, small shape, 16 x 256": Row(f"{SMALL} --batch_size 16 --steps 4 --turns 7"),
    "training step, small shape, 4 micro-steps of 4 x 256": Row(f"{SMALL} --batch_size 4 --accumulation 4 --steps 4"),
    "training step, small shape, 1 x 4,096": Row(f"{SMALL.replace('256', '4096')} --batch_size 1 --steps 4"),
    "generation, greedy": Row("generate.py --sampling greedy --turns 2"),
    "generation, sampled": Row("generate.py --sampling sampled --turns 2"),
    "generation, greedy, one prompt": Row("generate.py --sampling greedy --batch_size 1 --turns 2"),
    "generation, greedy, 16 prompts": Row("generate.py --sampling greedy --batch_size 16 --turns 2"),
    "HellaSwag, one example at a time": Row(HELLASWAG, "one example", "examples_per_sec", "examples/s"),
    "HellaSwag, Hugging Face": Row(HELLASWAG, "Hugging Face", "examples_per_sec", "examples/s"),
    "two processes, against one": Row("data_parallel.py", "1 process", "tokens_per_sec_a_device"),
}


@cache
def measure(command: str) -> dict[str, dict]:
    """Run a benchmark. Returns the figures of each way, by the name of the way."""
    print(f"+ python benchmarks/{command}", file=sys.stderr, flush=True)
    script, *flags = command.split()
    call = [sys.executable, str(HERE / script), *flags, "--json"]
    output = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True).stdout
    ways = json.loads(output.splitlines()[-1])["ways"]
    for way, figures in ways.items():  # the table shows two of them
        print(f"  {way}: " + ", ".join(f"{key} {value:,.3g}" for key, value in figures.items()), file=sys.stderr)
    return ways


def as_line(name: str) -> str:
    """Measure a row, and format it as a line of the table."""
    row, figure = ROWS[name], ROWS[name].figure
    ways = measure(row.command)
    of_peer = {way: figures for way, figures in ways.items() if way.startswith(row.peers)}
    of_ours = {way: figures for way, figures in ways.items() if way.startswith("ours") or "processes" in way}
    ours, peer = (max(group.values(), key=lambda figures: figures[figure]) for group in (of_ours, of_peer))
    peer_name = next(way for way, figures in of_peer.items() if figures is peer)

    def pair(key: str, form: str) -> str:
        return " / ".join(format(figures[key], form) if key in figures else "-" for figures in (ours, peer))

    form = ",.0f" if ours[figure] >= 100 else ".2f"
    cells = [
        name,
        f"`{row.command}`",
        f"{ours[figure]:{form}} {row.unit}",
        f"{peer[figure]:{form}} ({peer_name})",
        f"{ours[figure] / peer[figure]:.2f}",
        pair("share_of_peak", ".0%"),
        pair("peak_gib", ".1f"),
        datetime.date.today().isoformat(),
    ]
    return f"| {' | '.join(cells)} |"


def read_tables() -> tuple[str, dict[str, str], str]:
    """Read benchmarks/README.md. Returns the text above BEGIN, the tables by machine, and the text below END.

    A table begins with the line that names its machine. Raises SystemExit if BEGIN or END is missing.
    """
    text = README.read_text(encoding="utf-8")
    parts = re.split(f"({BEGIN}|{END})", text)
    if parts[1::2] != [BEGIN, END]:
        sys.exit(f'benchmarks/README.md needs the lines "{BEGIN}" and "{END}", once each, with the tables between them')
    above, _, block, _, below = parts
    tables = [table.strip("\n") for table in re.split(r"^(?=[^|\n])", block, flags=re.MULTILINE)]
    return above, {table.partition("\n")[0]: table for table in tables if table}, below


def rows_of(table: str) -> dict[str, str]:
    """The lines of a table by the names of its rows."""
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines[2:]}  # below HEAD


def write_row(name: str, line: str) -> None:
    """Write `line` to this machine's table. Its rows have the order of ROWS, and those that ROWS does not name are
    dropped. Other tables stay as they are."""
    above, tables, below = read_tables()
    heading = f"{machine()}:"
    rows = rows_of(tables.get(heading, "")) | {name: line}
    lines = [heading, "", HEAD, re.sub(r"[^|]+", " --- ", HEAD), *(rows[name] for name in ROWS if name in rows)]
    tables[heading] = "\n".join(lines)
    with atomic_write(README, "w") as file:
        file.write("\n".join([above + BEGIN, "\n\n".join(tables.values()), END + below]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="measure the rows with this word in their name (default: all)")
    parser.add_argument("--accept", action="store_true", help="take rows that have become slower into the table")
    args = parser.parse_args()
    names = [name for name in ROWS if args.only in name]
    if DEVICE.type == "cuda" and torch.cuda.device_count() < 2:
        names = [name for name in names if "processes" not in name]
    if not names:
        parser.error(f"--only {args.only}: this machine can measure no row of that name; rows: {'; '.join(ROWS)}")
    rows = rows_of(read_tables()[1].get(f"{machine()}:", ""))
    slower = False
    for name in names:
        line = as_line(name)
        print(line, flush=True)
        if name in rows and not args.accept:
            before, now = (float(text.split(" | ")[4]) for text in (rows[name], line))  # the ratios
            if now < 0.9 * before:
                print(f"slower: {name}: {before} times the peer before, {now} now", file=sys.stderr)
                slower = True
                continue
        write_row(name, line)
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
