import io
import json
import math
import os
import random
import statistics
import subprocess
import sys
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path

import pytest

import report
from report import Line, loss_curve_svg, smooth, thin, write_report

REPO = Path(__file__).resolve().parents[1]
BATCH = 1000  # tokens a step
CONFIG = {
    "hellaswag_path": "data/sample/sample_continuations.jsonl",
    "max_lr": 6e-4,
    "betas": [0.9, 0.95],
    "model": {"dim": 64, "ffn_dim_multiplier": None},
}
PLOTS = ["Loss", "Validation", "sample continuations", "Learning rate", "Gradient norm", "Throughput", "MFU"]


def rows_of(steps, *, val_every=10, seed=0, floor=3.0):
    """What train.py writes: a loss that falls from 9 to `floor`, with noise."""
    rng, rows = random.Random(seed), []
    for step in range(steps + 1):
        at = {"step": step, "tokens": step * BATCH}
        loss = floor + (9 - floor) * math.exp(-12 * step / steps)
        if step:
            speed = 5000 + rng.gauss(0, 100)
            train = {"train_loss": loss + rng.gauss(0, 0.1), "lr": 6e-4, "grad_norm": 1 + rng.random()}
            rows.append({**at, **train, "tokens_per_sec": speed, "mfu": speed / 2e4})
        if step % val_every == 0:
            rows.append({**at, "val_loss": loss + 0.1, "val_bpb": loss / 3})
            rows.append({**at, "hellaswag_acc": 0.26, "hellaswag_acc_norm": 0.26 + step / 1e5, "hellaswag_examples": 9})
    return rows


def write_run(folder, rows=(), *, config=CONFIG, samples="", tail=""):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "samples.txt").write_text(samples, encoding="utf-8")
    return folder


def page_of(*folders):
    """The page, parsed as XML. A stray < or & from a file would not parse."""
    out = folders[0].parent / "page.html"
    write_report(folders, out)
    return ET.fromstring(out.read_text(encoding="utf-8"))


def text_of(element):
    return "".join(element.itertext())


def plots_of(page):
    return {figure.find("figcaption").text.strip(): figure.find("svg") for figure in page.iter("figure")}


def facts_of(page, index=0):
    return {text_of(div.find("dt")): text_of(div.find("dd")) for div in list(page.iter("dl"))[index]}


def table_of(page, index=0):
    return [[text_of(cell) for cell in row] for row in list(page.iter("table"))[index].iter("tr")]


def axis(plot, x_or_y):
    """A function that turns a position in percent into a value, by the labels of the axis."""
    sizes = {"K": 1e3, "M": 1e6, "%": 0.01}
    labels = []
    for text in plot.findall("./text[@dy='18']" if x_or_y == "x" else "./text[@dy='4']"):
        value = float(text.text.rstrip("KM%")) * sizes.get(text.text[-1], 1)
        labels.append((float(text.get(x_or_y).rstrip("%")), value))
    (p0, v0), (p1, v1) = labels[0], labels[-1]
    return lambda position: v0 + (position - p0) * (v1 - v0) / (p1 - p0)


def marks(plot):
    """(tokens, value) of the marked points, computed from their positions."""
    x, y = axis(plot, "x"), axis(plot, "y")
    circles = plot.findall("./circle")
    return [(x(float(c.get("cx").rstrip("%"))), y(float(c.get("cy").rstrip("%")))) for c in circles]


def corners(polyline):
    return [tuple(map(float, pair.split(","))) for pair in polyline.get("points").split()]


def drawn(plot):
    return [[tuple(v / 10 for v in corner) for corner in corners(p)] for p in plot.findall("./svg/polyline")]


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "one", rows_of(500), samples="===== step 250\nold\n\n===== step 500\nclass Foo:\n\n")


def test_the_summary_is_computed_from_the_rows(run):
    rows = rows_of(500)
    losses = [row["train_loss"] for row in rows if "train_loss" in row]
    assert facts_of(page_of(run)) == {
        "steps": "500",
        "tokens": "500,000",
        "training loss, smoothed, last": f"{statistics.fmean(losses[-6:]):.4f}",
        "validation loss, best": f"{min(row['val_loss'] for row in rows if 'val_loss' in row):.4f}",
        "bits per byte, best": f"{min(row['val_bpb'] for row in rows if 'val_bpb' in row):.4f}",
        "sample continuations acc_norm, last": "26.5%",
        "sample continuations acc, last": "26.0%",
        "tokens/s, median": f"{statistics.median(r['tokens_per_sec'] for r in rows if 'mfu' in r):,.0f}",
    }


def test_the_best_need_not_be_the_last(tmp_path):
    rows = [{"step": s, "tokens": s, "val_loss": v, "val_bpb": v} for s, v in ((1, 5.0), (2, 4.0), (3, 6.0))]
    rows += [{"step": s, "tokens": s, "hellaswag_acc": a, "hellaswag_acc_norm": a} for s, a in ((2, 0.5), (3, 0.4))]
    facts = facts_of(page_of(write_run(tmp_path / "run", rows)))
    assert facts["validation loss, best"] == facts["bits per byte, best"] == "4.0000"
    assert facts["sample continuations acc_norm, last"] == "40.0%"


@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_plot_has_each_run_in_its_own_colour(tmp_path, count):
    page = page_of(*(write_run(tmp_path / f"run{i}", rows_of(60, seed=i)) for i in range(count)))
    plots = plots_of(page)
    assert list(plots) == PLOTS
    per_run = {"Validation": 1, "Learning rate": 1}  # the others have two: faint and smoothed, or acc and acc_norm
    for name, plot in plots.items():
        chance = name == "sample continuations"
        colours = [line.get("stroke") for line in plot.findall("./svg/polyline")][chance:]
        assert len(colours) == per_run.get(name, 2) * count
        assert len(set(colours)) == count
    names = [f"run{i}" for i in range(count)] if count > 1 else ["training", "validation"]
    legend = next(page.iter("figure")).findall(".//span")
    colours = [entry.find("i").get("style").split()[-1] for entry in legend]
    assert [text_of(entry) for entry in legend] == names
    assert len(set(colours)) == len(names)
    dots = {circle.get("fill") for circle in plots["Loss"].findall("./circle")}
    assert dots == (set(colours) if count > 1 else {colours[1]})


@pytest.mark.parametrize("steps", [30, 3000])
def test_marks_stand_where_the_rows_say(tmp_path, steps):
    rows = rows_of(steps, val_every=steps // 10)
    plots = plots_of(page_of(write_run(tmp_path / "run", rows)))
    for name, field in (("Loss", "val_loss"), ("Validation", "val_bpb")):
        points = [(row["tokens"], row[field]) for row in rows if field in row]
        found = marks(plots[name])
        assert len(found) >= 9  # marks of the first steps may lie above the frame
        for (x, y), (tokens, value) in zip(found, points[-len(found) :], strict=True):
            assert x == pytest.approx(tokens, abs=steps * BATCH / 1000)
            assert y == pytest.approx(value, abs=0.005)
    assert marks(plots["sample continuations"])[0] == pytest.approx((0, 0.26), abs=0.001)


def test_lines_stand_where_the_rows_say(run):
    plots = plots_of(page_of(run))
    rows = [row for row in rows_of(500) if "lr" in row]
    for name, field in (("Throughput", "tokens_per_sec"), ("MFU", "mfu"), ("Gradient norm", "grad_norm")):
        raw, smoothed = drawn(plots[name])
        x, y = axis(plots[name], "x"), axis(plots[name], "y")
        assert [x(at) for at, _ in raw] == pytest.approx([row["tokens"] for row in rows], abs=100)
        assert [y(at) for _, at in raw] == pytest.approx([row[field] for row in rows], rel=0.01)
        assert y(smoothed[-1][1]) == pytest.approx(statistics.fmean(row[field] for row in rows[-6:]), rel=0.01)
        assert y(100) == 0
    (rate,) = drawn(plots["Learning rate"])
    assert axis(plots["Learning rate"], "y")(rate[0][1]) == pytest.approx(6e-4, rel=0.01)


def test_chance_is_a_line_at_a_quarter(run):
    plot = plots_of(page_of(run))["sample continuations"]
    chance = drawn(plot)[0]
    assert [axis(plot, "y")(y) for _, y in chance] == pytest.approx([0.25, 0.25])
    assert [x for x, _ in chance] == [0, 100]


def test_first_steps_and_a_spike_do_not_flatten_the_rest(tmp_path):
    rows = rows_of(5000, val_every=100)
    next(row for row in rows if row["step"] == 3000 and "train_loss" in row)["train_loss"] = 80.0
    plot = plots_of(page_of(write_run(tmp_path / "run", rows)))["Loss"]
    low, high = axis(plot, "y")(100), axis(plot, "y")(0)
    assert 2 <= low < 3
    assert 5 < high <= 8  # after a twentieth of the steps the loss is 3 + 6 exp(-0.6) = 6.3
    assert "up to 80" in text_of(plot)
    assert min(float(circle.get("cy").rstrip("%")) for circle in plot.findall("./circle")) >= 0


def test_all_of_a_few_values_are_shown(tmp_path):
    plots = plots_of(page_of(write_run(tmp_path / "run", rows_of(30))))
    assert [x for x, _ in marks(plots["Validation"])] == pytest.approx([0, 10_000, 20_000, 30_000], abs=10)


def test_a_validation_loss_far_above_the_training_loss_is_seen(tmp_path):
    rows = rows_of(1000, val_every=250)
    next(row for row in rows if row["step"] == 1000 and "val_loss" in row)["val_loss"] = 9.5
    plot = plots_of(page_of(write_run(tmp_path / "run", rows)))["Loss"]
    assert marks(plot)[-1] == pytest.approx((1_000_000, 9.5), rel=0.01)


def test_the_separate_curve_is_the_plot_of_the_page(run, tmp_path):
    other = write_run(tmp_path / "o<t>her", rows_of(30))
    svg = "{http://www.w3.org/2000/svg}"
    for folders in ([run], [run, other]):
        root = ET.fromstring(loss_curve_svg(folders))
        assert root.tag == f"{svg}svg"
        alone = [line.get("points") for line in root.iter(f"{svg}polyline")]
        assert alone == [line.get("points") for line in plots_of(page_of(*folders))["Loss"].iter("polyline")]
    texts = [text.text for text in root.iter(f"{svg}text")]
    assert {"tokens", "one", "o<t>her"} < set(texts)
    assert any("nats per token" in text for text in texts)


def test_several_runs_show_where_their_configurations_differ(tmp_path):
    configs = [CONFIG, {**CONFIG, "max_lr": 1e-3, "model": {"dim": 128}}, {**CONFIG, "seed": 7}]
    page = page_of(*(write_run(tmp_path / f"run{i}", rows_of(9), config=c) for i, c in enumerate(configs)))
    assert table_of(page, 1) == [
        ["", "run0", "run1", "run2"],
        ["max_lr", "0.0006", "0.001", "0.0006"],
        ["model.dim", "64", "128", "64"],
        ["model.ffn_dim_multiplier", "null", "–", "null"],
        ["seed", "–", "–", "7"],
    ]
    summary = table_of(page)
    assert summary[1] == ["steps", "9", "9", "9"]
    assert len(summary) == 9
    same = page_of(*(write_run(tmp_path / f"same{i}", rows_of(9)) for i in range(2)))
    assert len(list(same.iter("table"))) == 1


def test_one_run_shows_its_configuration(run):
    assert facts_of(page_of(run), 1) == {
        "hellaswag_path": "data/sample/sample_continuations.jsonl",
        "max_lr": "0.0006",
        "betas": "[0.9, 0.95]",
        "model.dim": "64",
        "model.ffn_dim_multiplier": "null",
    }


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("data/hellaswag/hellaswag_val.jsonl", "HellaSwag"),
        ("x/HellaSwag.jsonl", "HellaSwag"),
        ("data/sample/sample_continuations.jsonl", "sample continuations"),
        ("data/hellaswag/mine.jsonl", "mine"),
        ("", "Multiple choice"),
    ],
)
def test_a_benchmark_has_its_own_name(tmp_path, path, name):
    page = page_of(write_run(tmp_path / "run", rows_of(20), config={"hellaswag_path": path}))
    assert list(plots_of(page))[2] == name
    assert f"{name} acc, last" in facts_of(page)
    assert ("HellaSwag" in text_of(page)) == (name == "HellaSwag" or "HellaSwag" in path)


def test_different_benchmarks_do_not_share_a_plot(tmp_path):
    folders = [
        write_run(tmp_path / name, rows_of(20), config={"hellaswag_path": f"{name}.jsonl"}) for name in ("a", "b")
    ]
    page = page_of(*folders)
    plots = plots_of(page)
    assert [len(drawn(plots[name])) for name in ("a", "b")] == [3, 3]
    assert ["a acc, last", "26.0%", "–"] in table_of(page)


def test_the_last_sample_is_shown(run):
    page = page_of(run)
    assert [pre.text.strip() for pre in page.iter("pre")] == ["class Foo:"]
    assert "Text generated by one, step 500" in [h2.text for h2 in page.iter("h2")]


HOSTILE = "</pre><script>alert('&amp;')</script>\x00\x1b[31m\"東京\ufffe"


def test_text_from_files_is_escaped(tmp_path):
    folders = [
        write_run(
            tmp_path / f"{name}<img src=x>&'",
            rows_of(20),
            config={"prompts": [HOSTILE, "\ud800", name], "hellaswag_path": f"{HOSTILE}.jsonl", f"<b>{name}": HOSTILE},
            samples=f"===== step 20\n{HOSTILE}",
        )
        for name in ("a", "b")
    ]
    shown = HOSTILE.replace("\x00", "\ufffd").replace("\x1b", "\ufffd").replace("\ufffe", "\ufffd")
    for chosen in (folders[:1], folders):
        page = page_of(*chosen)
        assert not {"script", "img", "b"} & {element.tag for element in page.iter()}
        assert [pre.text.strip() for pre in page.iter("pre")] == [shown] * len(chosen)
        assert "<b>a" in text_of(page)
    ET.fromstring(loss_curve_svg(folders))


def test_rows_that_are_not_whole_are_left_out(tmp_path):
    whole = rows_of(40)
    tail = "\n".join(
        [
            '{"step": 41, "tokens": 41000, "train_loss": NaN, "lr": Infinity, "grad_norm": -Infinity}',
            '{"step": 41, "tokens": 41000, "train_loss": null, "lr": "6e-4", "grad_norm": [1], "mfu": {}}',
            '{"step": 41, "tokens": null, "train_loss": 1e30, "val_loss": 0.1}',
            '{"step": 41, "tokens": NaN, "val_loss": 0.1}',
            '{"step": 41, "tokens": -5, "val_loss": 0.1}',
            f'{{"step": 41, "tokens": 40000, "val_loss": {10**400}, "val_bpb": -1e999}}',
            '{"step": 41}',
            "7",
            "[1, 2]",
            "null",
            "",
            '{"step": 42, "tokens": 42000, "train_lo',
        ]
    )
    good, bad = write_run(tmp_path / "good", whole), write_run(tmp_path / "bad", whole, tail=tail)
    expected, found = facts_of(page_of(good)), facts_of(page_of(bad))
    assert found == {**expected, "steps": "41", "tokens": "41,000"}
    assert plots_of(page_of(bad)).keys() == plots_of(page_of(good)).keys()


ROWS = {
    "no rows": [],
    "the first validation alone": rows_of(10)[:1],
    "one step": rows_of(10)[2:3],
    "training alone": [row for row in rows_of(10) if "train_loss" in row],
    "constants": [{"step": s, "tokens": s, "train_loss": 2.0, "lr": 0.0, "mfu": -1.0} for s in range(1, 9)],
    "tiny and huge": [{"step": s, "tokens": 10**17 * s, "train_loss": 10.0 ** (17 - 30 * s)} for s in range(1, 9)],
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_few_or_odd_rows_make_a_page(tmp_path, rows):
    folder = write_run(tmp_path / "run", rows)
    page = page_of(folder)
    assert ("No losses" in text_of(page)) == (not rows)
    assert "nan" not in ET.tostring(page, encoding="unicode") and "inf%" not in ET.tostring(page, encoding="unicode")
    for plot in plots_of(page).values():
        assert plot.findall(".//circle") or any(len(line) > 1 for line in drawn(plot))  # something is seen
    assert facts_of(page)["steps"] == (str(rows[-1]["step"]) if rows else "–")
    ET.fromstring(loss_curve_svg([folder]))


@pytest.mark.parametrize("config", [None, "", "[1]", '{"model": 3, "hellaswag_path": 5}', '{"max_lr": '])
def test_config_and_samples_may_be_missing_or_broken(tmp_path, config):
    folder = write_run(tmp_path / "run", rows_of(20))
    (folder / "samples.txt").unlink()
    (folder / "config.json").unlink()
    if config is not None:
        (folder / "config.json").write_text(config)
    page = page_of(folder)
    assert facts_of(page)["steps"] == "20"
    assert not list(page.iter("pre"))


def test_bytes_that_are_no_text_do_no_harm(run):
    for name in ("metrics.jsonl", "samples.txt", "config.json"):
        with open(run / name, "ab") as file:
            file.write(b"\xff\xfe")
    page = page_of(run)
    assert facts_of(page)["steps"] == "500"
    assert next(page.iter("pre")).text.strip() == "class Foo:\n\n\ufffd\ufffd"


def test_thinning_keeps_ends_and_extremes():
    rng = random.Random(0)
    points = [(x, rng.random()) for x in range(20_000)]
    extremes = {(7777, 50.0), (12_345, -50.0), (19_990, 60.0)}
    for x, y in extremes:
        points[x] = (x, y)
    thinned = thin(points, 1000)
    assert 900 <= len(thinned) <= 1002
    assert thinned == sorted(thinned) and set(thinned) <= set(points)
    assert thinned[0] == points[0] and thinned[-1] == points[-1]
    assert extremes < set(thinned)
    assert max(b[0] - a[0] for a, b in pairwise(thinned)) < 80  # no gaps
    assert thin(points[:1000], 1000) == points[:1000]


def test_smoothing_is_a_running_mean_that_keeps_a_line_straight():
    points = [(x, 2.0 * x) for x in range(1000)]
    smoothed = smooth(points)
    assert [y for _, y in smoothed[:990]] == pytest.approx([y for _, y in points[:990]])
    assert smoothed[-1] == (999, statistics.fmean(y for _, y in points[-11:]))
    assert [x for x, _ in smoothed] == [x for x, _ in points]
    assert smooth([]) == [] and smooth([(3, 4.0)]) == [(3, 4.0)]
    assert smooth([(1, 0.0), (2, 3.0), (3, 6.0), (4, 0.0)]) == [(1, 0.0), (2, 3.0), (3, 3.0), (4, 3.0)]


@pytest.mark.parametrize(
    "low, high", [(0, 1), (3.01, 9.2), (0.2, 0.3), (-7, 12), (2.9998, 3.0001), (0, 6e-4), (0, 1e10)]
)
def test_ticks_are_round_and_span_the_values(low, high):
    found = report.ticks(low, high)
    step = found[1] - found[0]
    assert 4 <= len(found) <= 9
    assert -1e-5 <= (low - found[0]) / step < 1 and -1e-5 <= (found[-1] - high) / step < 1
    assert f"{step:.0e}"[0] in "125" and step == pytest.approx(float(f"{step:.0e}"))
    assert all(tick / step == pytest.approx(round(tick / step)) for tick in found)


def test_the_strips_show_the_values_under_the_pointer(run):
    plot = plots_of(page_of(run))["Loss"]
    titles = [title.text.split("\n") for title in plot.findall("./rect/title")]
    assert len(titles) == 50
    assert titles[0][0] == "5K tokens" and titles[-1][0] == "495K tokens"
    for i, expected in ((12, 3.3), (-1, 3.0)):  # 3 + 6 exp(-12 * 0.25) = 3.3
        for text, name, above in zip(titles[i][1:], ("one", "one, validation"), (0, 0.1), strict=True):
            assert text.endswith(f" {name}")
            assert float(text.split()[0]) == pytest.approx(expected + above, abs=0.08)


def test_no_values_are_shown_after_the_end_of_a_run(run, tmp_path):
    plot = plots_of(page_of(run, write_run(tmp_path / "half", rows_of(250))))["Throughput"]
    told = ["half" in title.text for title in plot.findall("./rect/title")]
    assert told == [True] * 26 + [False] * 24


def test_a_page_of_eight_long_runs_stays_small_and_needs_no_other_file(tmp_path):
    folders = [
        write_run(tmp_path / f"run-{i}", rows_of(1500, val_every=5, seed=i), samples="===== step 1\n" + "<x>" * 10**5)
        for i in range(8)
    ]
    write_report(folders, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert len(text.encode()) < 500_000
    assert not any(word in text for word in ("http:", "https:", "//", "@import", "url(", "src=", "href=", "<script"))
    assert loss_curve_svg(folders).replace('xmlns="http://www.w3.org/2000/svg"', "").count("http") == 0


def test_runs_with_the_same_name_are_shown_with_their_paths(tmp_path):
    folders = [write_run(tmp_path / sub / "llama3", rows_of(9)) for sub in ("a", "b")]
    assert table_of(page_of(*folders))[0][1:] == [str(folder) for folder in folders]


def call(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, args)])
    return report.main()


def test_the_command_line_writes_the_page_and_the_curve(run, tmp_path, monkeypatch):
    before = set(run.iterdir())
    assert call(monkeypatch, run, "--svg", tmp_path / "loss.svg") == 0
    assert (tmp_path / "loss.svg").read_text(encoding="utf-8") == loss_curve_svg([run])
    assert set(run.iterdir()) == before
    assert call(monkeypatch, run) == 0
    assert set(run.iterdir()) - before == {run / "report.html"}
    other = write_run(tmp_path / "other", rows_of(9))
    assert call(monkeypatch, other, run, "--out", tmp_path / "new" / "two.html") == 0
    assert table_of(ET.parse(tmp_path / "new" / "two.html"))[0] == ["", "other", "one"]
    assert not (other / "report.html").exists()


def test_a_folder_whose_name_is_no_text_has_its_page_and_its_curve(tmp_path, monkeypatch):
    run = write_run(tmp_path / os.fsdecode("東京".encode() + b"\xff"), rows_of(9))
    assert call(monkeypatch, run, "--out", run / "report.html", "--svg", run / "loss.svg") == 0
    assert "東京\N{REPLACEMENT CHARACTER}" in (run / "report.html").read_text(encoding="utf-8")
    assert ET.parse(run / "loss.svg")


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_help_and_errors_are_shown_in_any_encoding(tmp_path, monkeypatch, encoding):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding, errors="strict") for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert call(monkeypatch, tmp_path / "東京") == 1
    with pytest.raises(SystemExit):
        call(monkeypatch, "--help")
    out.flush(), err.flush()
    assert b"RUN_DIR" in out.buffer.getvalue()
    assert b"\\u6771\\u4eac" in err.buffer.getvalue()


@pytest.mark.parametrize("flags", [[], ["--svg", "loss.svg"], ["--svg", "loss.svg", "--out", "page.html"]])
@pytest.mark.parametrize("what", ["no such run directory", "holds no metrics.jsonl"])
def test_a_folder_that_is_no_run_is_refused(run, tmp_path, monkeypatch, capsys, what, flags):
    monkeypatch.chdir(tmp_path)
    bad = tmp_path / "bad"
    if what == "holds no metrics.jsonl":
        bad.mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert call(monkeypatch, run, bad, *flags) == 1
    captured = capsys.readouterr()
    assert captured.err == f"report.py: {bad}: {what}; give the out_dir of a run that train.py has begun\n"
    assert captured.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_report_starts_without_torch(run):
    script = "import sys, report; sys.argv[0] = 'report.py'; report.main(); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script, run], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (run / "report.html").is_file()


def test_a_line_without_points_draws_no_plot():
    assert report.figure("Loss", "", [Line([], "#000", report.FIRM)]) == ""
