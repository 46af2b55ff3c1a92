"""Plots metrics.jsonl of one or more runs on one HTML page.

    python report.py runs/llama3                          writes runs/llama3/report.html
    python report.py runs/a runs/b --out compare.html     two runs on one page, and where their settings differ
    python report.py runs/llama3 --svg loss.svg           the loss curve alone, as a picture

The page needs no network and no JavaScript. Point at a plot to read its values.
"""

import argparse
import html
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

from files import allow_any_text_in_output, atomic_write

Point = tuple[float, float]  # tokens trained on, value

# Colour-blind readers can tell these apart: Paul Tol's "vibrant" scheme, with a lighter blue for dark pages, and two
# colours of his "muted" scheme.
COLOURS = ("#2a86cc", "#ee7733", "#009988", "#ee3377", "#33bbee", "#cc3311", "#999933", "#aa4499")
GREY = "#7b8087"  # has the same contrast on a white page and on a dark page
FAINT, FIRM = 'stroke-width="1.2" stroke-opacity="0.4"', 'stroke-width="2"'
DASHED = 'stroke-width="1.5" stroke-dasharray="6 4"'
LOSS_KEY = "nats per token; faint: each step, firm: smoothed, dots: validation"
NONE = "–"  # in place of a value that a run does not have

CSS = """
:root { color-scheme: light dark; --page: #fff; --ink: #1d2125; --muted: #68707a; --rule: #e2e5e8; --soft: #f6f7f8 }
@media (prefers-color-scheme: dark) {
  :root { --page: #15181c; --ink: #e3e6e9; --muted: #98a0aa; --rule: #2d3339; --soft: #1c2025 } }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", sans-serif }
main { max-width: 1040px; margin: auto; padding: 24px 16px 48px; overflow-wrap: anywhere }
h1 { font-size: 24px; margin: 0 0 16px } h2 { font-size: 16px; margin: 36px 0 8px } h1, h2 { font-weight: 600 }
small, dt, th, span { color: var(--muted); font-size: 13px; font-weight: 400 } span { margin-right: 20px }
dl { columns: 290px; column-gap: 40px; margin: 0 } dd { margin: 0; text-align: right } dt { overflow-wrap: normal }
dl div { display: flex; justify-content: space-between; gap: 16px; padding: 4px 0; break-inside: avoid }
dl div, td, th { border-bottom: 1px solid var(--rule); font-variant-numeric: tabular-nums }
h2 + dl dd { font-size: 13px } .scroll { overflow-x: auto } table { border-collapse: collapse; overflow-wrap: normal }
td, th { padding: 4px 32px 4px 0; text-align: left; min-width: 90px } td, dd, pre { white-space: pre-wrap }
i { display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin-right: 7px }
figure { margin: 32px 0 28px; min-width: 0 } figcaption { font-weight: 600 } section figure { margin: 0 }
section { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 28px 40px }
.plot { display: block; box-sizing: border-box; width: 100%; height: 400px; padding: 24px 14px 42px 54px;
  overflow: visible; font-size: 12px; fill: var(--muted); color: var(--muted) } section .plot { height: 270px }
rect:hover { fill: currentColor; fill-opacity: 0.12 }
pre { background: var(--soft); border-radius: 6px; padding: 14px; margin: 0; font: 13px/1.5 ui-monospace, monospace }
"""


@dataclass
class Run:
    """The contents of a run directory."""

    name: str
    colour: str
    rows: list[dict]
    config: dict[str, str]  # flat: "model.dim" -> "768"
    sample: str  # the last entry of samples.txt

    @property
    def benchmark(self) -> str:
        """The run's benchmark. A copy of hellaswag_utils.benchmark_name, because this file does without torch."""
        stem = Path(self.config.get("hellaswag_path", "")).stem
        return "HellaSwag" if stem.lower().startswith("hellaswag") else stem.replace("_", " ") or "Multiple choice"

    def points(self, field: str) -> list[Point]:
        """The points (tokens, value of `field`), sorted, of all rows where both are finite numbers."""
        pairs = ((row.get("tokens"), row.get(field)) for row in self.rows)
        return sorted((x, y) for x, y in pairs if is_number(x) and is_number(y) and x >= 0)


@dataclass
class Line:
    """A line of a plot. `style` is FAINT, FIRM, DASHED, or empty for marks only. Tooltips show lines with a label."""

    points: list[Point]
    colour: str
    style: str
    label: str = ""
    marked: bool = False


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and -1e18 < value < 1e18  # False for NaN; the limits keep sums finite


def read_json(text: str) -> dict:
    """The JSON object in `text`, or an empty dict if there is none: a killed run may leave an incomplete line."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # RecursionError: nested deeper than the parser goes
        return {}
    return value if isinstance(value, dict) else {}


def read_runs(run_dirs: Sequence[str | Path]) -> list[Run]:
    """Read run directories, with or without config.json and samples.txt. Raises ValueError without metrics.jsonl."""
    runs, names = [], [Path(folder).resolve().name for folder in run_dirs]
    for i, folder in enumerate(map(Path, run_dirs)):
        if not (folder / "metrics.jsonl").is_file():
            problem = "holds no metrics.jsonl" if folder.is_dir() else "no such run directory"
            raise ValueError(f"{folder}: {problem}; give the out_dir of a run that train.py has begun")
        files = (folder / name for name in ("metrics.jsonl", "config.json", "samples.txt"))
        metrics, config, samples = (f.read_text("utf-8", errors="replace") if f.is_file() else "" for f in files)
        fields = read_json(config)
        if isinstance(fields.get("model"), dict):
            fields |= {f"model.{key}": value for key, value in fields.pop("model").items()}
        run = Run(
            name=names[i] if names.count(names[i]) == 1 else str(folder),
            colour=COLOURS[i % len(COLOURS)],
            rows=[row for line in metrics.splitlines() if (row := read_json(line))],
            config={k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in fields.items()},
            sample=re.split(r"^===== (?=step \d+$)", samples, flags=re.MULTILINE)[-1],  # model_utils.py heads them
        )
        runs.append(run)
    return runs


def smooth(points: Sequence[Point]) -> list[Point]:
    """Running mean over 1% of the points on each side. At the start the window is narrower, because the loss is steep
    there. The last value is the mean of the last 1% of the points, or of the last two if 1% is fewer."""
    reach, sums = max(1, len(points) // 100), [0, *accumulate(y for _, y in points)]
    smoothed = []
    for i, (x, _) in enumerate(points):
        begin, end = max(0, i - reach), min(2 * i, i + reach, len(points) - 1) + 1
        smoothed.append((x, (sums[end] - sums[begin]) / (end - begin)))
    return smoothed


def thin(points: Sequence[Point], limit: int) -> list[Point]:
    """About `limit` points that draw the same line: the first, the last, and the extremes of bins of equal size. Means
    of the bins would lose the spikes."""
    if len(points) <= limit:
        return list(points)
    kept = {points[0], points[-1]}
    for begin, end in pairwise(len(points) * i // (limit // 2) for i in range(limit // 2 + 1)):
        kept |= {extreme(points[begin:end], key=itemgetter(1)) for extreme in (min, max)}
    return sorted(kept)


def y_range(lines: Sequence[Line]) -> Point:
    """The lowest and the highest value to show. A loss that starts at 11, or a spike, would flatten the curve from 4 to
    3. So the range is that of all lines but FAINT ones, after 5% of the run. Other values extend it on each side by at
    most half its height."""
    values = [y for line in lines for _, y in line.points]
    early = 0.05 if any(len(line.points) > 5 for line in lines) else 0  # show a few points whole
    calm = [y for line in lines if line.style != FAINT for x, y in line.points if x >= early * line.points[-1][0]]
    margin = (max(calm) - min(calm)) / 2
    return max(min(values), min(calm) - margin), min(max(values), max(calm) + margin)


def ticks(low: float, high: float) -> list[float]:
    """About six round values for an axis from `low` to `high`. They are 1, 2 or 5 times a power of ten apart. The first
    may lie just below `low`, the last just above `high`."""
    power = 10.0 ** math.floor(math.log10((high - low) / 6))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= (high - low) / 6 * 0.999)
    return [i * step for i in range(math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6) + 1)]


def number(value: float, unit: str = "k") -> str:
    """`value` as a short text. `unit` "%" shows a share as a percentage, "k" writes 1,000 as 1K, "" does neither."""
    if unit == "%":
        return f"{100 * value:.5g}%"
    sizes = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")) if unit == "k" else ()
    size, suffix = next((pair for pair in sizes if value >= pair[0]), (1, ""))
    return f"{value / size:.5g}{suffix}"


def escape(text: str) -> str:
    """Any `text`, made safe for HTML and XML. A character that XML forbids becomes U+FFFD."""
    return html.escape(re.sub("[^\t\n -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text))


def plot(lines: Sequence[Line], unit: str = "", at_least: Sequence[float] = ()) -> str:
    """Axes and lines as SVG elements. The y axis includes the values `at_least`. Positions are percentages of a frame,
    and the caller sets the frame's size. So text and strokes keep their size on any screen."""
    lines = [line for line in lines if line.points]
    if not lines:
        return '<text x="50%" y="50%" text-anchor="middle">no rows yet</text>'
    x_max = max(line.points[-1][0] for line in lines) or 1
    low, high = y_range(lines)
    low, high = min(low, *at_least, high), max(high, *at_least, low)
    # A constant has a range of 0, so give it a height.
    y_ticks = ticks(low, high if high - low > 1e-6 * abs(high) else low + (abs(low) or 1) / 10)
    low, high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float, scale: float = 100) -> Point:
        return scale * x / x_max, scale * (high - y) / (high - low)

    parts = []
    for tick in y_ticks:
        y = place(0, tick)[1]
        parts.append(f'<line x2="100%" y1="{y:.2f}%" y2="{y:.2f}%" stroke="currentColor" stroke-opacity="0.2"/>')
        parts.append(f'<text x="-8" y="{y:.2f}%" dy="4" text-anchor="end">{number(tick, unit)}</text>')
    for tick in ticks(0, x_max):
        if tick <= 1.001 * x_max:
            x = place(tick, 0)[0]
            parts.append(f'<text x="{x:.2f}%" y="100%" dy="18" text-anchor="middle">{number(tick)}</text>')
    parts.append('<text x="100%" y="100%" dy="35" text-anchor="end">tokens</text>')
    if (top := max(y for line in lines for _, y in line.points)) > high:
        parts.append(f'<text x="100%" y="-8" text-anchor="end">\u2191 up to {number(top, unit)}</text>')

    # A corner takes 12 bytes and a mark 55. This limit keeps a page of half a dozen plots of eight runs under 500 KB.
    limit = max(10, min(1000, 3000 // len(lines)))
    drawn = [(line, thin(line.points, limit // 4 if line.marked else limit)) for line in lines]
    parts.append('<svg width="100%" height="100%" viewBox="0 0 1000 1000" preserveAspectRatio="none">')
    for line, points in drawn:
        if line.style:
            corners = " ".join("{:.1f},{:.1f}".format(*place(x, y, 1000)) for x, y in points)
            parts.append(f'<polyline points="{corners}" fill="none" stroke="{line.colour}" {line.style}')
            parts.append('stroke-linejoin="round" vector-effect="non-scaling-stroke"/>')
    parts.append("</svg>")
    for line, points in drawn:
        for x, y in points if line.marked or len(points) == 1 else ():
            if low <= y <= high:
                x, y = place(x, y)
                parts.append(f'<circle cx="{x:.2f}%" cy="{y:.2f}%" r="3" fill="{line.colour}"/>')
    return "\n".join(parts) + readings(drawn, x_max, unit)


def readings(drawn: Sequence[tuple[Line, list[Point]]], x_max: float, unit: str) -> str:
    """Invisible strips over a plot. Each strip has a tooltip with the values of the labelled lines at its middle."""
    count = max(10, min(50, 800 // len(drawn)))
    strips = ""
    for i in range(count):
        middle = (i + 0.5) / count * x_max
        texts = [f"{number(middle)} tokens"]
        for line, points in drawn:
            x, y = min(points, key=lambda point: abs(point[0] - middle))
            if line.label and abs(x - middle) <= x_max / count:
                texts.append(f"{number(y, unit)} {line.label}")
        frame = f'x="{100 * i / count:.2f}%" width="{100 / count:.2f}%" height="100%" fill-opacity="0"'
        strips += f"<rect {frame}><title>{escape(chr(10).join(texts))}</title></rect>\n"
    return strips


def noisy(runs: Sequence[Run], field: str) -> list[Line]:
    """Two lines for each run: a faint line of all values, and on top a firm line of the smoothed values."""
    faint = [Line(run.points(field), run.colour, FAINT) for run in runs]
    return faint + [Line(smooth(raw.points), raw.colour, FIRM, run.name) for raw, run in zip(faint, runs, strict=True)]


def loss_lines(runs: Sequence[Run]) -> tuple[list[Line], list[tuple[str, str]]]:
    """The lines of the loss plot, and its legend as (colour, name). A single run has a second colour for validation."""
    colours, names = [run.colour for run in runs], [run.name for run in runs]
    if len(runs) == 1:
        colours, names = list(COLOURS[:2]), ["training", "validation"]
    marks = [
        Line(run.points("val_loss"), colour, "", f"{run.name}, validation", marked=True)
        for run, colour in zip(runs, colours[-len(runs) :], strict=True)
    ]
    return noisy(runs, "train_loss") + marks, list(zip(colours, names, strict=True))


def loss_curve_svg(run_dirs: Sequence[str | Path]) -> str:
    """The loss curve of the runs as a complete SVG document, readable on white and on dark pages.

    Raises ValueError if one of `run_dirs` is not a run directory.
    """
    lines, legend = loss_lines(read_runs(run_dirs))
    keys = "".join(
        f'<circle cx="930" cy="{52 + 20 * i}" r="5" fill="{colour}"/>'
        f'<text x="916" y="{56.5 + 20 * i}" text-anchor="end">{escape(name)}</text>'
        for i, (colour, name) in enumerate(legend)
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 420" width="960" height="420" font-size="13" '
        f'font-family="system-ui, sans-serif" fill="{GREY}" color="{GREY}"><text x="16" y="20">loss, {LOSS_KEY}</text>'
        f'<svg x="56" y="36" width="884" height="336" overflow="visible">{plot(lines)}</svg>{keys}</svg>\n'
    )


def figure(title: str, what: str, lines: Sequence[Line], unit: str = "", at_least: Sequence[float] = ()) -> str:
    """A plot below its title and `what`, an explanation in HTML. An empty string if no line has points."""
    if not any(line.points for line in lines):
        return ""
    caption = f"<figcaption>{escape(title)} <small>{what}</small></figcaption>"
    return f'<figure>{caption}<svg class="plot">{plot(lines, unit, at_least)}</svg></figure>'


def accuracy(runs: Sequence[Run], benchmark: str) -> str:
    """The plot of one benchmark. Results on different files cannot be compared, so each benchmark has its own plot."""
    lines, runs = [], [run for run in runs if run.benchmark == benchmark]
    for kind, style in (("acc_norm", FIRM), ("acc", DASHED)):
        lines += [Line(r.points(f"hellaswag_{kind}"), r.colour, style, f"{r.name}, {kind}", marked=True) for r in runs]
    end = max((x for line in lines for x, _ in line.points), default=0)
    chance = Line([(0, 0.25), (end, 0.25)] if end else [], GREY, DASHED)
    return figure(benchmark, "firm: acc_norm, dashed: acc, grey: chance", [chance, *lines], "%", (0.2, 0.3))


def legend(pairs: Sequence[tuple[str, str]]) -> str:
    """A dot and a name for each pair (colour, name)."""
    return "".join(f'<span><i style="background: {colour}"></i>{escape(name)}</span>' for colour, name in pairs)


def table(runs: Sequence[Run], facts: Sequence[dict[str, str]]) -> str:
    """A table with a column for each run and a row for each key of `facts`. A single run is a compact list instead."""
    if len(runs) == 1:
        pairs = [f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>\n" for key, value in facts[0].items()]
        return f"<dl>{''.join(pairs)}</dl>"
    rows = "".join(f"<th>{legend([(run.colour, run.name)])}</th>" for run in runs)
    for key in dict.fromkeys(key for fact in facts for key in fact):
        cells = "".join(f"<td>{escape(fact.get(key, NONE))}</td>" for fact in facts)
        rows += f"</tr>\n<tr><th>{escape(key)}</th>{cells}"
    return f'<div class="scroll"><table><tr><th></th>{rows}</tr></table></div>'


def summary(run: Run) -> dict[str, str]:
    """The most important figures of a run, by name, as text."""

    def pick(choose: Callable, field: str, form: str) -> str:
        values = [y for _, y in run.points(field)]
        return format(choose(values), form) if values else NONE

    trend = smooth(run.points("train_loss"))
    return {
        "steps": pick(max, "step", ","),
        "tokens": pick(max, "tokens", ","),
        "training loss, smoothed, last": f"{trend[-1][1]:.4f}" if trend else NONE,
        "validation loss, best": pick(min, "val_loss", ".4f"),
        "bits per byte, best": pick(min, "val_bpb", ".4f"),
        f"{run.benchmark} acc_norm, last": pick(itemgetter(-1), "hellaswag_acc_norm", ".1%"),
        f"{run.benchmark} acc, last": pick(itemgetter(-1), "hellaswag_acc", ".1%"),
        "tokens/s, median": pick(statistics.median, "tokens_per_sec", ",.0f"),
    }


def write_report(run_dirs: Sequence[str | Path], out: str | Path) -> None:
    """Write the page of the runs in `run_dirs` to the file `out`.

    Raises ValueError if one of `run_dirs` is not a run directory. Then nothing is written.
    """
    runs = read_runs(run_dirs)
    loss, colours = loss_lines(runs)
    configs, configuration = [run.config for run in runs], "Configuration"
    if len(runs) > 1:
        same = {key for key, value in configs[0].items() if all(config.get(key) == value for config in configs)}
        configs = [{key: value for key, value in config.items() if key not in same} for config in configs]
        configuration = "Where the configurations differ"
    title = escape(", ".join(run.name for run in runs))
    parts = [
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/><title>{title}</title>',
        f'<meta name="viewport" content="width=device-width, initial-scale=1"/><style>{CSS}</style></head><body><main>',
        f"<h1>{title}</h1>",
        table(runs, [summary(run) for run in runs]),
        figure("Loss", f"{LOSS_KEY}<br/>{legend(colours)}", loss) or "<h2>No losses in metrics.jsonl yet</h2>",
        "<section>",
        figure("Validation", "bits per byte", [Line(r.points("val_bpb"), r.colour, FIRM, r.name, True) for r in runs]),
        *(accuracy(runs, benchmark) for benchmark in dict.fromkeys(run.benchmark for run in runs)),
        figure("Learning rate", "", [Line(r.points("lr"), r.colour, FIRM, r.name) for r in runs], "", [0]),
        figure("Gradient norm", "before clipping", noisy(runs, "grad_norm"), "", [0]),
        figure("Throughput", "tokens per second", noisy(runs, "tokens_per_sec"), "k", [0]),
        figure("MFU", "share of the device's peak", noisy(runs, "mfu"), "%", [0]),
        "</section>",
    ]
    for run in runs:
        step, _, text = run.sample.partition("\n")
        if text := text.strip()[: 30_000 // len(runs)]:  # enough to judge; keeps the page small
            heading = escape(f"Text generated by {run.name}, {step}")
            parts.append(f"<h2>{heading}</h2><pre>\n{escape(text)}</pre>")
    if any(configs):
        parts += [f"<h2>{configuration}</h2>", table(runs, configs)]
    with atomic_write(out, "w") as file:
        file.write("\n".join([*parts, "</main></body></html>\n"]))


def main() -> int:
    allow_any_text_in_output()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="out_dir of a run of train.py")
    parser.add_argument("--out", metavar="FILE", help="the page (default: report.html in the first RUN_DIR)")
    parser.add_argument("--svg", metavar="FILE", help="the loss curve alone, as a picture; no page then without --out")
    args = parser.parse_args()
    try:
        if args.svg:
            picture = loss_curve_svg(args.run_dirs)
            with atomic_write(args.svg, "w") as file:
                file.write(picture)
        if args.out or not args.svg:
            write_report(args.run_dirs, args.out or Path(args.run_dirs[0], "report.html"))
    except (ValueError, OSError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
