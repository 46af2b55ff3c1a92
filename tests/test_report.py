import io
import json
import math
import os
import random
import statistics
import subprocess
import sys
import xml.etree.ElementTree as ET
from itertools import accumulate, chain, combinations, pairwise
from pathlib import Path

import pytest

import report
from report import loss_curve_svg, write_report
from run_folders import COLOURS, DASHES, kept, smooth

REPO = Path(__file__).resolve().parents[1]
BATCH = 1000  # tokens a step
CONFIG = {
    "hellaswag_path": "data/sample/sample_continuations.jsonl",
    "max_lr": 6e-4,
    "betas": [0.9, 0.95],
    "model": {"dim": 64, "ffn_dim_multiplier": None},
}
PLOTS = [
    *("Loss", "Validation", "sample continuations acc_norm", "sample continuations acc", "Learning rate"),
    *("Gradient norm", "Throughput", "MFU"),
]


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
    """The page, parsed as XML. A stray < or & from a file would not parse. The script is a section of CDATA."""
    out = folders[0].parent / "page.html"
    write_report(folders, out)
    return ET.fromstring(out.read_text(encoding="utf-8"))


def text_of(element):
    return "".join(element.itertext())


def plots_of(page):
    """The plots by title, as the script of the page gets them."""
    titles = [caption.text.strip() for caption in page.iter("figcaption")]
    (data,) = (script.text for script in page.iter("script") if script.get("id") == "data")
    return dict(zip(titles, json.loads(data), strict=True))


def words_of(page):
    """The label of each plot."""
    return [svg.get("aria-label") for svg in page.iter("svg") if svg.get("role") == "img"]


def facts_of(page, index=0):
    return {text_of(div.find("dt")): text_of(div.find("dd")) for div in list(page.iter("dl"))[index]}


def table_of(page, index=0):
    return [[text_of(cell) for cell in row] for row in list(page.iter("table"))[index].iter("tr")]


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "one", rows_of(500), samples="===== step 250\nold\n\n===== step 500\nclass Foo:\n\n")


def test_the_summary_is_computed_from_the_rows(run):
    rows = rows_of(500)
    losses = [row["train_loss"] for row in rows if "train_loss" in row]
    assert facts_of(page_of(run)) == {
        "tokens": "500,000",
        "training loss, last": f"{losses[-1]:.4f}",
        "training loss, running median, last": f"{statistics.median(losses[-6:]):.4f}",
        "validation loss, last": f"{[row['val_loss'] for row in rows if 'val_loss' in row][-1]:.4f}",
        "validation loss, best": f"{min(row['val_loss'] for row in rows if 'val_loss' in row):.4f}",
        "bits per byte, best": f"{min(row['val_bpb'] for row in rows if 'val_bpb' in row):.4f}",
        "sample continuations acc_norm, last": "26.5%",
        "sample continuations acc, last": "26.0%",
        "tokens/s, median": f"{statistics.median(r['tokens_per_sec'] for r in rows if 'mfu' in r):,.0f}",
        "updates left out": "0",
    }


def test_the_best_need_not_be_the_last(tmp_path):
    rows = [{"step": s, "tokens": s, "val_loss": v, "val_bpb": v} for s, v in ((1, 5.0), (2, 4.0), (3, 6.0))]
    rows += [{"step": s, "tokens": s, "hellaswag_acc": a, "hellaswag_acc_norm": a} for s, a in ((2, 0.5), (3, 0.4))]
    facts = facts_of(page_of(write_run(tmp_path / "run", rows)))
    assert facts["validation loss, best"] == facts["bits per byte, best"] == "4.0000"
    assert facts["sample continuations acc_norm, last"] == "40.0%"


@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_plot_has_a_line_for_each_run_in_its_own_colour(tmp_path, count):
    page = page_of(*(write_run(tmp_path / f"run{i}", rows_of(60, seed=i)) for i in range(count)))
    plots = plots_of(page)
    assert list(plots) == PLOTS
    for name, plot in plots.items():
        lines = [line for line in plot["lines"] if line["style"] != "dots"]
        assert [line["colour"] for line in lines] == list(COLOURS[:count])
        assert [bool(line["medians"]) for line in lines] == [name in ("Loss", *PLOTS[5:])] * count
    dots = [line for line in plots["Loss"]["lines"] if line["style"] == "dots"]
    assert [line["colour"] for line in dots] == (list(COLOURS[:count]) if count > 1 else [COLOURS[1]])
    switches = [text_of(label) for label in page.iter("label") if label.find("input").get("type") == "checkbox"]
    assert switches == ([f"run{i}" for i in range(count)] if count > 1 else [])


def test_the_ninth_run_has_the_first_colour_and_a_dash(tmp_path):
    page = page_of(*(write_run(tmp_path / f"run{i}", rows_of(9)) for i in range(17)))
    styles = [(line["colour"], line["dash"]) for line in plots_of(page)["Throughput"]["lines"]]
    assert styles[8] == (COLOURS[0], DASHES[1]) and styles[16] == (COLOURS[0], DASHES[2]) and DASHES[0] == ""
    assert len(set(styles)) == 17
    assert "size: landscape" in text_of(page.find("head"))
    assert page.find("head/title").text == text_of(next(page.iter("h1"))) == "run0, run1, run2 and 14 more"


def linear(colour):
    """Red, green and blue light of a colour, 0 to 1 (IEC 61966-2-1)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]


def times(matrix, vector):
    return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]


def cielab(light):
    xyz = times([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]], light)
    ratios = [value / white for value, white in zip(xyz, (0.9505, 1, 1.089), strict=True)]
    x, y, z = (r ** (1 / 3) if r > 0.008856 else 7.787 * r + 16 / 116 for r in ratios)
    return [116 * y - 16, 500 * (x - y), 200 * (y - z)]


# Machado, Oliveira, Fernandes (2009): how a reader with deuteranopia sees red, green and blue light.
DEUTERANOPIA = [
    [0.367322, 0.860646, -0.227968],
    [0.280085, 0.672501, 0.047413],
    [-0.011820, 0.042940, 0.968881],
]


def test_colours_are_told_apart_under_deuteranopia_and_stand_out_on_white_and_black():
    assert len(set(COLOURS)) == 8
    for colour in COLOURS:
        brightness = times([[0.2126, 0.7152, 0.0722]], linear(colour))[0]
        assert 1.05 / (brightness + 0.05) >= 3 and (brightness + 0.05) / 0.05 >= 3
    seen = [cielab([min(1, max(0, c)) for c in times(DEUTERANOPIA, linear(colour))]) for colour in COLOURS]
    assert min(math.dist(a, b) for a, b in combinations(seen, 2)) >= 25


def test_points_stand_where_the_rows_say(run):
    plots, rows = plots_of(page_of(run)), [row for row in rows_of(500) if "lr" in row]
    seconds = list(accumulate(BATCH / row["tokens_per_sec"] for row in rows))
    fields = ("train_loss", "lr", "grad_norm", "tokens_per_sec", "mfu")
    for name, field in zip(("Loss", *PLOTS[4:]), fields, strict=True):
        line = plots[name]["lines"][0]
        steps, tokens, times, values = line["columns"]
        assert steps == [row["step"] for row in rows] and tokens == [row["tokens"] for row in rows]
        assert times == pytest.approx(seconds, rel=1e-5)
        assert values == pytest.approx([row[field] for row in rows], rel=1e-5)
        if line["medians"]:
            assert line["medians"][-1] == pytest.approx(statistics.median(values[-6:]), rel=1e-5)
    points = [(row["step"], row["val_loss"]) for row in rows_of(500) if "val_loss" in row]
    steps, _, _, values = plots["Loss"]["lines"][1]["columns"]
    assert list(zip(steps, values, strict=True)) == [(step, pytest.approx(loss, rel=1e-5)) for step, loss in points]


def test_a_repeated_step_counts_once_and_rows_of_resumes_are_sorted(tmp_path):
    rows = [{"step": s, "tokens": 10 * s, "train_loss": v} for s, v in ((1, 9.0), (2, 8.0), (3, 7.0), (2, 6.0))]
    (line,) = plots_of(page_of(write_run(tmp_path / "run", rows)))["Loss"]["lines"]
    assert line["columns"][0] == [1, 2, 3] and line["columns"][3] == [9, 6, 7]


def test_updates_that_were_left_out_are_marked_and_named(tmp_path):
    rows = [row for row in rows_of(40) if row["step"] not in (7, 8)]
    rows += [{"step": s, "tokens": s * BATCH, "lr": 1e-3, "skipped": s - 6, "tokens_per_sec": 5000} for s in (7, 8)]
    rows.append({"step": 41, "tokens": 41 * BATCH, "train_loss": math.nan})
    page = page_of(write_run(tmp_path / "run", rows))
    assert facts_of(page)["updates left out"] == "3: step 7, 8, 41"
    for name, plot in plots_of(page).items():
        marks = [mark["columns"][0] for mark in plot["left_out"]]
        assert marks == ([[7, 8, 41]] if name in ("Loss", "Gradient norm") else [])


def test_each_plot_says_its_last_values(run, tmp_path):
    page = page_of(run, write_run(tmp_path / "half", rows_of(250)))
    words = words_of(page)
    assert len(words) == len(PLOTS)
    assert words[3] == (
        "sample continuations acc, share of right answers; chance is 25%. "
        "Last values: one 26% at step 500; half 26% at step 250."
    )
    assert words[0].startswith("Loss, nats per token") and "one, validation 3.1 at step 500" in words[0]


def state_of(page):
    return next(text_of(p) for p in page.iter("p") if p.get("class") == "state")


def test_the_head_says_how_far_the_run_is_and_on_what(tmp_path):
    run = write_run(tmp_path / "run", rows_of(11), config={"max_steps": 60, "device": "cuda"})
    assert state_of(page_of(run)) == "11 of 60 steps, stopped · device cuda"
    (run / ".holder.json").write_text("{}")
    assert state_of(page_of(run)) == "11 of 60 steps, running when this was written · device cuda"
    write_report([run], tmp_path / "page.html", is_end=True)
    assert state_of(ET.parse(tmp_path / "page.html")) == "11 of 60 steps, stopped · device cuda"
    os.utime(run / ".holder.json", (0, 0))  # no heartbeat: the process was killed
    assert state_of(page_of(run)) == "11 of 60 steps, stopped · device cuda"


START = {"time": "2026-01-02T03:04:05+00:00", "after_step": None, "device": "AMD EPYC, 2 cores", "processes": 1}
START |= {"torch": "2.9.0"}
AGAIN = START | {"time": "2026-01-03T10:00:00+01:00", "after_step": 1200, "device": "NVIDIA H100", "processes": 8}


def write_about(run, *starts, parameters=301_000_000):
    (run / "run.json").write_text(json.dumps({"parameters": parameters, "starts": starts}))


def test_the_head_says_when_the_run_trained_on_what_and_how_large_it_is(tmp_path):
    run = write_run(tmp_path / "run", rows_of(11), config={"max_steps": 60, "device": "auto"})
    begun, size = "11 of 60 steps, stopped · started 2026-01-02 03:04 UTC", "parameters 301,000,000"
    write_about(run, START)
    assert state_of(page_of(run)) == f"{begun} · device AMD EPYC, 2 cores · {size}"
    devices = "device AMD EPYC, 2 cores; NVIDIA H100, 8 processes"
    write_about(run, START, AGAIN)
    resumed = "resumed once after step 1,200 on 2026-01-03 10:00 UTC+01:00"
    assert state_of(page_of(run)) == f"{begun} · {resumed} · {devices} · {size}"
    write_about(run, START, START | {"after_step": 9}, AGAIN)
    resumed = "resumed 2 times, last after step 1,200 on 2026-01-03 10:00 UTC+01:00"
    assert state_of(page_of(run)) == f"{begun} · {resumed} · {devices} · {size}"
    old = write_run(tmp_path / "old", rows_of(11), config={"device": "cuda"})  # without run.json
    summary = table_of(page_of(old, run), 1)
    assert summary[1:6] == [
        ["state", "11 steps", "11 of 60 steps, stopped"],
        ["started", "–", "2026-01-02 03:04 UTC"],
        ["resumed", "–", "2 times, last after step 1,200 on 2026-01-03 10:00 UTC+01:00"],
        ["device", "cuda", "AMD EPYC, 2 cores; NVIDIA H100, 8 processes"],
        ["parameters", "–", "301,000,000"],
    ]


WRONG_STARTS = [
    *(START | {key: value} for key in START for value in (5.5, [], -1)),
    *({name: value for name, value in START.items() if name != key} for key in START),
    *(START | wrong for wrong in ({"time": "2026-13-01T00:00:00"}, {"after_step": "5"}, {"processes": True})),
    *(None, "time", 7),
]
WRONG_ABOUT = [
    *("", "{", "[]", "7", "null", "[" * 10**5, '{"name": "another program"}', '{"starts": []}', "\ud800\0"),
    *('{"parameters": 1, "starts": {}}', '{"parameters": NaN, "starts": []}', '{"parameters": "1", "starts": []}'),
    *(json.dumps({"parameters": 1, "starts": [START, start]}) for start in WRONG_STARTS),
]


@pytest.mark.parametrize("text", [*WRONG_ABOUT, None], ids=lambda text: str(text)[:20])
def test_a_run_json_that_no_run_has_written_leaves_the_page_without_its_words(tmp_path, text):
    run = write_run(tmp_path / "run", rows_of(11), config={"max_steps": 60, "device": "cuda"})
    if text is None:
        (run / "run.json").mkdir()
    else:
        (run / "run.json").write_bytes(text.encode(errors="surrogatepass"))
    assert state_of(page_of(run)) == "11 of 60 steps, stopped · device cuda"


def test_first_steps_and_a_spike_do_not_flatten_the_picture(tmp_path):
    rows = rows_of(1000)
    next(row for row in rows if row["step"] == 500 and "train_loss" in row)["train_loss"] = 80.0
    root = ET.fromstring(loss_curve_svg([write_run(tmp_path / "run", rows)]))
    texts = [text for text in root.iter(f"{SVG}text") if text.get("text-anchor") == "end" and text.get("x") == "48"]
    values = [float(text.text) for text in texts]
    assert min(values) <= 3 and 6 <= max(values) <= 8  # after a twentieth the loss is 3 + 6 exp(-0.6) = 6.3


SVG = "{http://www.w3.org/2000/svg}"


def test_the_picture_shows_losses_and_medians_of_all_runs(run, tmp_path):
    other = write_run(tmp_path / "o<t>her", rows_of(30))
    for folders, dots in (([run], 51), ([run, other], 51 + 4)):
        root = ET.fromstring(loss_curve_svg(folders))
        assert len(list(root.iter(f"{SVG}polyline"))) == 2 * len(folders)
        assert len([circle for circle in root.iter(f"{SVG}circle") if circle.get("r") == "3"]) == dots
    raw, medians, _, _ = (
        [tuple(map(float, p.split(","))) for p in line.get("points").split()] for line in root.iter(f"{SVG}polyline")
    )
    assert raw[-1][0] == medians[-1][0] == 884 and len(raw) == len(medians) == 500
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert {"tokens", "one", "o<t>her"} < set(texts)
    assert any("nats per token" in text for text in texts)


def test_several_runs_show_where_their_configurations_differ(tmp_path):
    configs = [CONFIG, {**CONFIG, "max_lr": 1e-3, "model": {"dim": 128}}, {**CONFIG, "seed": 7}]
    configs = [config | {"out_dir": f"runs/{i}"} for i, config in enumerate(configs)]
    page = page_of(*(write_run(tmp_path / f"run{i}", rows_of(9), config=c) for i, c in enumerate(configs)))
    assert [h2.text for h2 in page.iter("h2")][:2] == ["Settings that differ", "Summary"]
    assert table_of(page) == [
        ["", "run0", "run1", "run2"],
        ["max_lr", "0.0006", "0.001", "0.0006"],
        ["model.dim", "64", "128", "64"],
        ["model.ffn_dim_multiplier", "null", "–", "null"],
        ["seed", "–", "–", "7"],
    ]
    summary = table_of(page, 1)
    assert summary[1] == ["state", "9 steps", "9 steps", "9 steps"]
    assert ["validation loss, best", *[f"{3 + 6 + 0.1:.4f}"] * 3] in summary
    for div in (div for div in page.iter("div") if div.get("class") == "scroll"):
        assert div.get("tabindex") == "0" and div.get("role") == "region" and div.get("aria-label")
    assert not {"resumed", "bits per byte, last"} & {row[0] for row in summary}  # no run has a value
    same = page_of(*(write_run(tmp_path / f"same{i}", rows_of(9), config={"out_dir": str(i)}) for i in range(2)))
    assert len(list(same.iter("table"))) == 2 and "Settings that differNone.Summary" in text_of(same)


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
    assert list(plots_of(page))[2:4] == [f"{name} acc_norm", f"{name} acc"]
    assert f"{name} acc, last" in facts_of(page)
    assert ("HellaSwag" in text_of(page)) == (name == "HellaSwag" or "HellaSwag" in path)


def test_different_benchmarks_do_not_share_a_plot(tmp_path):
    folders = [
        write_run(tmp_path / name, rows_of(20), config={"hellaswag_path": f"{name}.jsonl"}) for name in ("a", "b")
    ]
    page = page_of(*folders)
    plots = plots_of(page)
    assert [[line["run"] for line in plots[f"{name} acc"]["lines"]] for name in ("a", "b")] == [[0], [1]]
    assert ["a acc, last", "26.0%", "–"] in table_of(page, 1)


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
    for folder in folders:
        write_about(folder, START | {"device": HOSTILE})
    shown = HOSTILE.replace("\x00", "\ufffd").replace("\x1b", "\ufffd").replace("\ufffe", "\ufffd")
    for chosen in (folders[:1], folders):
        page = page_of(*chosen)
        assert not {"img", "b"} & {element.tag for element in page.iter()} and len(list(page.iter("script"))) == 2
        assert [pre.text.strip() for pre in page.iter("pre")] == [shown] * len(chosen)
        assert "<b>a" in text_of(page)
        devices = [state_of(page)] if len(chosen) == 1 else next(r[1:] for r in table_of(page, 1) if r[0] == "device")
        assert all(shown in device for device in devices)
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
            f'{{"step": 41, "tokens": 41000, "val_loss": {10**400}, "val_bpb": -1e999}}',
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
    assert found == {**expected, "tokens": "41,000", "updates left out": "1: step 41"}
    assert state_of(page_of(bad)).startswith("41 steps")
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
    for plot in plots_of(page).values() if rows else ():
        for line in plot["lines"]:
            assert line["columns"][0] and all(map(math.isfinite, chain(*line["columns"], line["medians"] or ())))
    assert state_of(page).startswith(f"{rows[-1]['step'] if rows else 0} steps")
    ET.fromstring(loss_curve_svg([folder]))


@pytest.mark.parametrize("config", [None, "", "[1]", '{"model": 3, "hellaswag_path": 5}', '{"max_lr": '])
def test_config_and_samples_may_be_missing_or_broken(tmp_path, config):
    folder = write_run(tmp_path / "run", rows_of(20))
    (folder / "samples.txt").unlink()
    (folder / "config.json").unlink()
    if config is not None:
        (folder / "config.json").write_text(config)
    page = page_of(folder)
    assert state_of(page).startswith("20 steps")
    assert not list(page.iter("pre"))


def test_bytes_that_are_no_text_do_no_harm(run):
    for name in ("metrics.jsonl", "samples.txt", "config.json"):
        with open(run / name, "ab") as file:
            file.write(b"\xff\xfe")
    page = page_of(run)
    assert state_of(page).startswith("500 steps")
    assert next(page.iter("pre")).text.strip() == "class Foo:\n\n\ufffd\ufffd"


def test_thinning_keeps_ends_and_extremes():
    rng = random.Random(0)
    values = [rng.random() for _ in range(20_000)]
    extremes = {7777: 50.0, 12_345: -50.0, 19_990: 60.0}
    for i, y in extremes.items():
        values[i] = y
    chosen = kept(values, 1000)
    assert 900 <= len(chosen) <= 1002 and chosen == sorted(set(chosen))
    assert chosen[0] == 0 and chosen[-1] == 19_999 and extremes.keys() < set(chosen)
    assert max(b - a for a, b in pairwise(chosen)) < 80  # no gaps
    assert kept(values[:1000], 1000) == list(range(1000))


def test_smoothing_is_a_running_median():
    rng = random.Random(0)
    values = [rng.choice([1.0, 2.0, rng.random()]) for _ in range(1234)]
    windows = [values[max(0, i - 12) : min(2 * i, i + 12, 1233) + 1] for i in range(1234)]
    assert smooth(values) == [statistics.median(window) for window in windows]
    assert smooth([]) == [] and smooth([4.0]) == [4.0]


def test_a_spike_leaves_no_trace_in_the_medians():
    values = [2.0 * x for x in range(1000)]
    spiked = [*values[:500], 1e6, *values[501:]]
    assert max(abs(a - b) for a, b in zip(smooth(values), smooth(spiked), strict=True)) <= 2


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


def test_a_page_of_eight_long_runs_stays_small_and_needs_no_other_file(tmp_path):
    folders = [
        write_run(tmp_path / f"run-{i}", rows_of(1500, val_every=5, seed=i), samples="===== step 1\n" + "<x>" * 10**5)
        for i in range(8)
    ]
    write_report(folders, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert len(text.encode()) < 2_000_000
    assert not any(word in text for word in ("http:", "https:", "@import", "url(", "src=", "href="))
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


def test_a_comparison_has_a_page_of_its_own_and_says_where(run, tmp_path, monkeypatch, capsys):
    write_report([run], run / "report.html")
    page, others = (run / "report.html").read_bytes(), [write_run(tmp_path / f"run{i}", rows_of(9)) for i in range(4)]
    assert call(monkeypatch, run, others[0]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'compare_one_run0.html'}\n"
    monkeypatch.chdir(run)
    assert call(monkeypatch, ".", *others) == 0
    assert capsys.readouterr().out == f"wrote {os.path.join('..', 'compare_one_run0_run1_and_2_more.html')}\n"
    for chosen in ([run, others[0]], [others[0]]):
        assert call(monkeypatch, *chosen, "--out", run / "report.html") == 1
        assert capsys.readouterr().err.endswith("is the page of the run in that folder; give another file with --out\n")
    assert (run / "report.html").read_bytes() == page
    assert {path.name for path in tmp_path.glob("*.html")} == {
        "compare_one_run0.html",
        "compare_one_run0_run1_and_2_more.html",
    }


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
    assert (done.returncode, done.stdout, done.stderr) == (0, f"wrote {run / 'report.html'}\n", "")
    assert (run / "report.html").is_file()
