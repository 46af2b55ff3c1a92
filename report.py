"""Writes a page of plots from the records of one or more runs. Open it in any browser; it needs no network.

    python report.py runs/llama3                          writes runs/llama3/report.html
    python report.py runs/a runs/b                        compares two runs: writes runs/compare_a_b.html
    python report.py runs/a runs/b --out page.html        the same, into another file
    python report.py runs/llama3 --svg loss.svg           the loss curve alone, as a picture

`report_page.html` is the page without its values. Its script draws the plots.
"""

import html
import json
import math
import os
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from operator import itemgetter
from pathlib import Path

from command_line import FlagParser
from files import allow_any_text_in_output, atomic_write
from run_folders import COLOURS, NONE, Run, kept, read_runs, smooth

TEMPLATE = Path(__file__).with_name("report_page.html")
GREY = "#7b8087"  # has the same contrast on a white page and on a dark page
MOST_POINTS = 4000  # of a line, or of the lines of all runs together: a page of 20,000 rows stays below a megabyte
CHANCE = "share of right answers; chance is 25%"
LOSS_NOTE = "nats per token; faint: each step, firm: running median, dots: validation"


@dataclass(frozen=True)
class Plot:
    """One plot of the page."""

    title: str
    field: str  # of the rows
    note: str = ""
    unit: str = ""  # how numbers are shown: "%" as a percentage, "k" 1,000 as 1K
    noisy: bool = False  # there is a value for each step: a faint line, and a firm line of medians
    include: tuple[float, ...] = ()  # values that the y axis always shows


LOSS = Plot("Loss", "train_loss", LOSS_NOTE, noisy=True)
VALIDATION = Plot("Validation", "val_bpb", "bits per byte")
STEPS = (
    Plot("Learning rate", "lr", "of the blocks' matrices", include=(0,)),
    Plot("Gradient norm", "grad_norm", "before clipping", noisy=True, include=(0,)),
    Plot("Throughput", "tokens_per_sec", "tokens per second", "k", noisy=True, include=(0,)),
    Plot("MFU", "mfu", "share of the device's peak speed", "%", noisy=True, include=(0,)),
)


def number(value: float, unit: str = "") -> str:
    """`value` as a short text. `unit` "%" shows a share as a percentage, "k" writes 1,000 as 1K."""
    if unit == "%":
        return f"{100 * value:.4g}%"
    sizes = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")) if unit == "k" else ()
    size, suffix = next((pair for pair in sizes if value >= pair[0]), (1, ""))
    return f"{value / size:.4g}{suffix}"


def escape(text: str) -> str:
    """Any `text`, made safe for HTML and XML. A character that XML forbids becomes U+FFFD."""
    return html.escape(re.sub("[^\t\n -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text))


# ---------------------------------------------------------------- plots


def line_of(run: Run, field: str, style: str, limit: int, name: str = "", colour: str = "") -> dict:
    """A line of a plot, as the script of the page takes it. `style` is noisy, line or dots.

    `columns` are steps, tokens, seconds and values, `medians` the smoothed values of a noisy line. About `limit` points
    are kept.
    """
    points = run.points(field)
    medians = smooth([y for *_, y in points]) if style == "noisy" else []
    chosen = kept([y for *_, y in points], limit)
    short = [
        [*points[i][:2], *(float(f"{x:.6g}") for x in points[i][2:])] for i in chosen
    ]  # 6 digits: a screen's worth
    return {
        "run": run.index,
        "name": name or run.name,
        "style": style,
        "colour": colour or run.colour,
        "dash": run.dash,
        "columns": [[point[i] for point in short] for i in range(4)],
        "medians": [float(f"{medians[i]:.6g}") for i in chosen] if medians else None,
    }


def drawing(plot: Plot, runs: Sequence[Run], limit: int) -> dict | None:
    """A plot of `runs`, as the script of the page takes it; None where there are no values."""
    lines = [line_of(run, plot.field, "noisy" if plot.noisy else "line", limit) for run in runs]
    if plot is LOSS and len(runs) == 1:
        lines = [line_of(runs[0], "train_loss", "noisy", limit, "training")]
        lines.append(line_of(runs[0], "val_loss", "dots", limit, "validation", COLOURS[1]))
    elif plot is LOSS:
        lines += [line_of(run, "val_loss", "dots", limit, f"{run.name}, validation") for run in runs]
    lines = [line for line in lines if line["columns"][0]]
    left_out = [
        {"run": run.index, "columns": list(zip(*places, strict=True))} for run in runs if (places := run.left_out)
    ]
    marks = left_out if plot.field in ("train_loss", "grad_norm") else []
    return {**asdict(plot), "lines": lines, "left_out": marks} if lines else None


def drawings(runs: Sequence[Run]) -> list[dict]:
    """All plots of the page. Results on different files cannot be compared, so each benchmark has its own plots."""
    plots = [(LOSS, runs), (VALIDATION, runs)]
    for name in dict.fromkeys(run.benchmark for run in runs):
        for kind in ("acc_norm", "acc"):
            plot = Plot(f"{name} {kind}", f"hellaswag_{kind}", CHANCE, "%", include=(0.25,))
            plots.append((plot, [run for run in runs if run.benchmark == name]))
    plots += [(plot, runs) for plot in STEPS]
    limit = max(200, MOST_POINTS // len(runs))
    return [drawn for plot, shown in plots if (drawn := drawing(plot, shown, limit))]


def in_words(plot: dict) -> str:
    """The last values of a plot, for those who do not see it."""
    note = f", {plot['note']}" if plot["note"] else ""
    ends = [
        f"{line['name']} {number((line['medians'] or line['columns'][3])[-1], plot['unit'])} at step "
        f"{line['columns'][0][-1]:,}"
        for line in plot["lines"]
    ]
    return f"{plot['title']}{note}. Last values: {'; '.join(ends)}."


def swatch(colour: str, dash: str = "") -> str:
    """A short piece of a run's line. It is drawn, not a background, so every printer prints it."""
    stroke = f'stroke="{colour}" stroke-width="3" stroke-dasharray="{dash}"'
    return f'<svg class="swatch" width="22" height="10" aria-hidden="true"><path d="M0 5h22" {stroke}/></svg>'


def figure(plot: dict, is_single: bool) -> str:
    """The frame of a plot. The script draws into it."""
    legend = ""
    if is_single and len(plot["lines"]) > 1:
        legend = "".join(f"<span>{swatch(line['colour'])}{escape(line['name'])}</span>" for line in plot["lines"])
    return (
        f"<figure><figcaption>{escape(plot['title'])} <small>{escape(plot['note'])}</small> {legend}</figcaption>"
        f'<svg class="plot" role="img" tabindex="0" aria-label="{escape(in_words(plot))}"></svg></figure>'
    )


# ---------------------------------------------------------------- the picture


def ticks(low: float, high: float) -> list[float]:
    """About six round values for an axis from `low` to `high`. They are 1, 2 or 5 times a power of ten apart."""
    power = 10.0 ** math.floor(math.log10((high - low) / 6))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= (high - low) / 6 * 0.999)
    return [i * step for i in range(math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6) + 1)]


def loss_curve_svg(run_dirs: Sequence[str | Path]) -> str:
    """The loss curve of the runs as a complete SVG document, readable on white and on dark pages.

    Raises ValueError if one of `run_dirs` is not a run directory.
    """
    runs = read_runs(run_dirs)
    lines = (drawing(LOSS, runs, max(200, 1000 // len(runs))) or {"lines": []})["lines"]
    x_max = max((line["columns"][1][-1] for line in lines), default=0) or 1
    # A loss that starts at 11 would flatten the curve from 4 to 3. So the first twentieth may lie above the frame.
    calm = [
        y
        for line in lines
        for x, y in zip(line["columns"][1], line["medians"] or line["columns"][3], strict=True)
        if x >= 0.05 * line["columns"][1][-1]
    ]
    low, high = min(calm, default=0), max(calm, default=1)
    y_ticks = ticks(low, high if high - low > 1e-6 * abs(high) else low + (abs(low) or 1) / 10)
    low, high = y_ticks[0], y_ticks[-1]
    left, top, width, height = 56, 36, 884, 336

    def corner(x: float, y: float) -> tuple[float, float]:
        return width * x / x_max, height * (high - y) / (high - low)

    parts, frame = [], []
    for tick in y_ticks:
        y = top + corner(0, tick)[1]
        parts.append(f'<path d="M{left} {y:.1f}h{width}" stroke="{GREY}" stroke-opacity="0.3"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in (tick for tick in ticks(0, x_max) if tick <= 1.001 * x_max):
        x = left + corner(tick, 0)[0]
        parts.append(f'<text x="{x:.1f}" y="{top + height + 18}" text-anchor="middle">{number(tick, "k")}</text>')
    for line in lines:
        style = f'fill="none" stroke="{line["colour"]}" stroke-linejoin="round" stroke-dasharray="{line["dash"]}"'
        for values, stroke in (
            (line["columns"][3], 'stroke-width="1.2" stroke-opacity="0.4"'),
            (line["medians"], 'stroke-width="2"'),
        ):
            corners = [corner(x, y) for x, y in zip(line["columns"][1], values or (), strict=bool(values))]
            if line["style"] == "dots" or len(corners) == 1:
                frame += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{line["colour"]}"/>' for x, y in corners]
            elif corners:
                path = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
                frame.append(f'<polyline points="{path}" {style} {stroke}/>')
    names = [(line["colour"], line["name"]) for line in lines if len(runs) == 1 or line["style"] == "noisy"]
    for i, (colour, name) in enumerate(names):
        parts.append(f'<circle cx="930" cy="{52 + 20 * i}" r="5" fill="{colour}"/>')
        parts.append(f'<text x="916" y="{56.5 + 20 * i}" text-anchor="end">{escape(name)}</text>')
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 420" width="960" height="420" font-size="13" '
        f'font-family="system-ui, sans-serif" fill="{GREY}"><text x="16" y="20">loss, {LOSS_NOTE}</text>'
        f'<text x="940" y="408" text-anchor="end">tokens</text>{"".join(parts)}'
        f'<svg x="{left}" y="{top}" width="{width}" height="{height}">{"".join(frame)}</svg></svg>\n'
    )


# ---------------------------------------------------------------- the page


def table(runs: Sequence[Run], facts: Sequence[dict[str, str]], label: str) -> str:
    """A table with a column for each run and a row for each key of `facts` that some run has. A single run has a list.

    A printer repeats the head of the table, with the names and colours of the runs, on each page.
    """
    if len(runs) == 1:
        pairs = [f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>\n" for key, value in facts[0].items()]
        return f"<dl>{''.join(pairs)}</dl>"
    head = "".join(f'<th scope="col">{swatch(run.colour, run.dash)}{escape(run.name)}</th>' for run in runs)
    rows = ""
    for key in dict.fromkeys(key for fact in facts for key in fact):
        cells = [fact.get(key, NONE) for fact in facts]
        if set(cells) != {NONE}:
            rows += f'<tr><th scope="row">{escape(key)}</th>{"".join(f"<td>{escape(c)}</td>" for c in cells)}</tr>\n'
    scroll = f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">'
    return f"{scroll}<table><thead><tr><td></td>{head}</tr></thead>\n{rows}</table></div>"


def summary(run: Run) -> dict[str, str]:
    """The most important figures of a run, by name, as text."""

    def pick(choose: Callable, field: str, form: str) -> str:
        values = [y for *_, y in run.points(field)]
        return format(choose(values), form) if values else NONE

    last, steps = itemgetter(-1), [f"{step:,}" for step, *_ in run.left_out]
    return {
        "tokens": pick(max, "tokens", ","),
        "training loss, last": pick(last, "train_loss", ".4f"),
        "training loss, running median, last": pick(lambda values: smooth(values)[-1], "train_loss", ".4f"),
        "validation loss, last": pick(last, "val_loss", ".4f"),
        "validation loss, best": pick(min, "val_loss", ".4f"),
        "bits per byte, best": pick(min, "val_bpb", ".4f"),
        f"{run.benchmark} acc_norm, last": pick(last, "hellaswag_acc_norm", ".1%"),
        f"{run.benchmark} acc, last": pick(last, "hellaswag_acc", ".1%"),
        "tokens/s, median": pick(statistics.median, "tokens_per_sec", ",.0f"),
        "updates left out": f"{len(steps)}: step {', '.join(steps[:5])}{' …' * (len(steps) > 5)}" if steps else "0",
    }


def settings(runs: Sequence[Run]) -> str:
    """The settings of a run; of several runs those that differ. Where a run lies is no setting of its training."""
    configs = [{key: value for key, value in run.config.items() if key != "out_dir"} for run in runs]
    if len(runs) == 1:
        return f"<h2>Settings</h2>{table(runs, [runs[0].config], 'Settings')}" if runs[0].config else ""
    same = {key for key, value in configs[0].items() if all(config.get(key) == value for config in configs)}
    configs = [{key: value for key, value in config.items() if key not in same} for config in configs]
    title = "Settings that differ"
    return f"<h2>{title}</h2>{table(runs, configs, title) if any(configs) else '<p>None.</p>'}"


def state(facts: dict[str, str]) -> str:
    """The facts of a run in a line, without those that it does not have. A fact that fits in a line is not broken."""
    words = [text if key == "state" else f"{key} {text}" for key, text in facts.items() if text != NONE]
    return f'<p class="state">{" · ".join(f"<span>{escape(word)}</span>" for word in words)}</p>'


def page_parts(runs: Sequence[Run], plots: Sequence[dict]) -> dict[str, str]:
    """What the comments of the template stand for. Several runs show first where their settings differ."""
    facts, samples = [run.facts() for run in runs], []
    if is_single := len(runs) == 1:
        top = state(facts[0]) + table(runs, [summary(runs[0])], "Summary")
    else:
        figures = [fact | summary(run) for fact, run in zip(facts, runs, strict=True)]
        top = f"{settings(runs)}<h2>Summary</h2>{table(runs, figures, 'Summary')}"
    switches = [
        f'<label><input type="checkbox" checked="checked" data-run="{run.index}"/>'
        f"{swatch(run.colour, run.dash)}{escape(run.name)}</label>"
        for run in runs
    ]
    for run in runs:
        step, _, text = run.sample.partition("\n")
        if text := text.strip()[: 30_000 // len(runs)]:  # enough to judge; keeps the page small
            samples.append(f"<h2>{escape(f'Text generated by {run.name}, {step}')}</h2><pre>\n{escape(text)}</pre>")
    more = f" and {len(runs) - 3} more" if len(runs) > 3 else ""
    frames = "".join(figure(plot, is_single) for plot in plots)
    drawn = [{key: plot[key] for key in ("unit", "include", "lines", "left_out")} for plot in plots]
    return {
        "title": escape(", ".join(run.name for run in runs[:3]) + more),
        "paper": "; size: landscape" if len(runs) > 5 else "",  # a table of many columns
        "top": top,
        "runs": "" if is_single else f"<fieldset><legend>Runs</legend>{''.join(switches)}</fieldset>",
        "plots": frames or "<h2>No losses in metrics.jsonl yet</h2>",
        "bottom": "".join(samples) + (settings(runs) if is_single else ""),
        "written": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "data": json.dumps(drawn, separators=(",", ":")).replace("<", "\\u003c").replace("&", "\\u0026"),
    }


def write_report(run_dirs: Sequence[str | Path], out: str | Path, *, is_end: bool = False) -> None:
    """Write the page of the runs in `run_dirs` to the file `out`. At its end a run writes its page itself (`is_end`).

    Raises:
        ValueError: one of `run_dirs` is not a run directory, or `out` is the page of another run. Nothing is written.
        OSError: the page cannot be written.
    """
    out = Path(out)
    others = len(run_dirs) > 1 or not out.parent.exists() or not out.parent.samefile(run_dirs[0])
    if out.name == "report.html" and others and (out.parent / "metrics.jsonl").exists():
        raise ValueError(f"{out}: is the page of the run in that folder; give another file with --out")
    runs = read_runs(run_dirs)
    for run in runs:
        run.is_alive &= not is_end
    parts = page_parts(runs, drawings(runs))
    page = re.sub(r"<!--(\w+)-->", lambda comment: parts[comment[1]], TEMPLATE.read_text("utf-8"))
    with atomic_write(out, "w") as file:
        file.write(page)


def default_out(run_dirs: Sequence[str]) -> Path:
    """The page of a run lies in its folder. A comparison lies beside the first run's folder and names the runs."""
    if len(run_dirs) == 1:
        return Path(run_dirs[0], "report.html")
    names = [Path(folder).resolve().name[:40] for folder in run_dirs]
    more = [f"and_{len(names) - 3}_more"] if len(names) > 3 else []
    return Path(run_dirs[0], "..") / f"compare_{'_'.join(names[:3] + more)}.html"


def command_line() -> FlagParser:
    parser = FlagParser(description=__doc__)
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="out_dir of a run of train.py")
    where = "report.html in RUN_DIR; of several runs compare_NAMES.html beside the first RUN_DIR"
    parser.add_argument("--out", metavar="FILE", help=f"the page (default: {where})")
    parser.add_argument("--svg", metavar="FILE", help="the loss curve alone, as a picture; no page then without --out")
    return parser


def main() -> int:
    allow_any_text_in_output()
    args = command_line().parse_args()
    try:
        if args.svg:
            picture = loss_curve_svg(args.run_dirs)
            with atomic_write(args.svg, "w") as file:
                file.write(picture)
            print(f"wrote {args.svg}")
        if args.out or not args.svg:
            out = Path(args.out or default_out(args.run_dirs))
            write_report(args.run_dirs, out)
            print(f"wrote {os.path.normpath(out)}")
    except (ValueError, OSError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
