"""The page of report.py in a real browser: what its script draws, and what a reader of any kind can do with it.

    apt install chromium
    pip install playwright
    python -m pytest -m browser -n 0

CHROMIUM names another browser than `chromium`. AXE names the file axe.min.js of the npm package axe-core.
"""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
from test_report import AGAIN, BATCH, CONFIG, START, rows_of, write_about, write_run

from report import write_report

pytestmark = pytest.mark.browser
WIDE, PHONE = {"width": 1400, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser():
    try:
        from playwright import sync_api
    except ImportError:
        pytest.fail("the browser tests need playwright: pip install playwright")
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if not path:
        pytest.fail("the browser tests need chromium: apt install chromium, or set CHROMIUM to its path")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def show(browser, tmp_path):
    """A function that writes the page of run folders and opens it. At the end no script may have failed."""
    errors, requests, pages = [], [], []

    def show(*folders, viewport=WIDE, **options):
        out = tmp_path / "page.html"
        write_report(folders, out)
        page = browser.new_page(viewport=viewport, **options)
        pages.append(page)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: requests.append(request.url))
        page.goto(out.as_uri())
        return page

    yield show
    for page in pages:
        page.close()
    assert errors == []
    assert {url.split(":")[0] for url in requests} == {"file"} and len(set(requests)) == 1


@pytest.fixture
def two(tmp_path):
    """Two runs of 500 and 250 steps. The first left out two updates and generated text that would end a script."""
    rows = [row for row in rows_of(500) if row["step"] not in (7, 8)]
    rows += [{"step": s, "tokens": s * BATCH, "lr": 1e-3, "skipped": s - 6, "tokens_per_sec": 5000} for s in (7, 8)]
    text = "===== step 500\n</script><script>document.title='broken'</script>"
    long_name = {**CONFIG, "max_lr": 1e-3, "prompts": ["a long word: " + "x" * 300]}
    one = write_run(tmp_path / "one", rows, samples=text)
    write_about(one, START, AGAIN)
    return one, write_run(tmp_path / "other", rows_of(250), config=long_name)


def svg(page, index=0):
    return page.locator("svg.plot").nth(index)


def point_at(page, share, index=0):
    """Move the pointer to a share of the width of a plot's frame."""
    svg(page, index).scroll_into_view_if_needed()
    box = svg(page, index).bounding_box()
    x = box["x"] + 54 + share * (box["width"] - 54 - 12)
    page.mouse.move(x, box["y"] + box["height"] / 2)
    return x, box["y"] + box["height"] / 2


def read(page):
    return page.locator("#values tr").evaluate_all(
        "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
    )


def axis_labels(page, index=0):
    texts = svg(page, index).locator("> text[text-anchor=middle]").all_text_contents()
    sizes = {"K": 1e3, "M": 1e6}
    return [float(text.rstrip("KM")) * sizes.get(text[-1], 1) for text in texts]


def test_the_values_of_the_tables_are_those_of_the_rows(show, tmp_path):
    rows = rows_of(300)
    page = show(write_run(tmp_path / "run", rows))
    pairs = (
        page.locator("dl").first.locator("div").evaluate_all("d => d.map(d => [...d.children].map(c => c.innerText))")
    )
    facts, losses = dict(pairs), [row["val_loss"] for row in rows if "val_loss" in row]
    assert facts["validation loss, best"] == f"{min(losses):.4f}"
    assert facts["validation loss, last"] == f"{losses[-1]:.4f}"
    assert facts["training loss, last"] == f"{[row['train_loss'] for row in rows if 'train_loss' in row][-1]:.4f}"
    assert facts["tokens"] == f"{rows[-1]['tokens']:,}"


@pytest.mark.parametrize("viewport", [WIDE, PHONE], ids=["wide", "phone"])
def test_the_head_shows_dates_device_and_parameters(show, two, viewport):
    page = show(two[0], viewport=viewport)
    head = page.locator("h1 + .state")
    for words in ("500 steps", "2026-01-02 03:04 UTC", "after step 1,200", "8 processes", "parameters 301,000,000"):
        assert words in head.inner_text()
    assert head.bounding_box()["y"] < 100 and head.evaluate("e => e.scrollWidth <= e.clientWidth")
    page = show(*two, viewport=viewport)
    row = page.get_by_role("row").filter(has=page.get_by_role("rowheader", name="parameters"))
    assert row.locator("td").all_inner_texts() == ["301,000,000", "–"]


def test_pointing_shows_step_tokens_and_value_of_all_runs(show, two):
    page = show(*two)
    point_at(page, 0.4)  # step 200
    shown = {name: (value, step, tokens) for name, value, step, tokens, _ in read(page)}
    assert shown.keys() == {"one", "other", "one, validation", "other, validation"}
    for name, total in (("one", 500), ("other", 250)):
        value, step, tokens = shown[f"{name}, validation"]
        assert (step, tokens) == ("step 200", "200K tokens")
        assert float(value) == pytest.approx(3.1 + 6 * math.exp(-12 * 200 / total), rel=1e-3)
        row = next(row for row in rows_of(total) if row["step"] == 200 and "train_loss" in row)
        raw, median = shown[name][0].split(", median ")
        assert float(raw) == pytest.approx(row["train_loss"], rel=1e-3) and float(median) == pytest.approx(
            row["train_loss"], abs=0.4
        )
    point_at(page, 0.9)  # the shorter run has ended
    assert [name for name, *_ in read(page)] == ["one", "one, validation"]
    page.mouse.move(5, 5)
    assert not page.locator("#values").is_visible()


def test_runs_are_switched_off_and_on(show, two):
    page = show(*two)
    lines = svg(page).locator("polyline.firm")
    assert lines.count() == 2
    page.get_by_label("one", exact=True).uncheck()
    assert [line.get_attribute("stroke") for line in lines.all()] == ["#e0600f"]
    assert svg(page).locator(".left-out").count() == 0  # they are those of the run that is off
    assert max(axis_labels(page)) == 250_000
    page.get_by_label("other", exact=True).uncheck()
    assert "nothing to show" in svg(page).text_content()
    page.get_by_label("one", exact=True).check()
    assert lines.count() == 1 and svg(page).locator(".left-out").count() == 2


def test_tokens_steps_and_time_are_the_axis(show, two):
    page = show(*two)
    assert axis_labels(page)[-1] == 500_000 and "tokens" in svg(page).text_content()
    page.get_by_label("steps").check()
    assert axis_labels(page)[-1] == 500 and "steps" in svg(page).text_content()
    page.get_by_label("training time").check()
    assert (
        axis_labels(page)[-1] == pytest.approx(500 * BATCH / 5000, rel=0.15) and "time, s" in svg(page).text_content()
    )
    point_at(page, 0.5)
    assert any(cell.endswith(" s") for cell in read(page)[0])


def test_a_drag_zooms_all_plots_and_a_double_click_shows_the_whole_run(show, two):
    page = show(*two)
    point_at(page, 0.2)
    page.mouse.down()
    x, y = point_at(page, 0.4)
    page.mouse.up()
    for index in (0, 4):
        labels = axis_labels(page, index)
        assert min(labels) >= 99_000 and max(labels) <= 201_000
    heights = svg(page).locator("> text[text-anchor=end]").all_text_contents()
    assert max(float(text) for text in heights if text.replace(".", "").isdigit()) < 8  # not the 9 of the beginning
    page.mouse.dblclick(x, y)
    assert max(axis_labels(page)) == 500_000
    assert page.locator("#whole").is_disabled()


def test_the_keyboard_reads_zooms_and_scrolls(show, two):
    page = show(*two)
    svg(page).focus()
    page.keyboard.press("ArrowRight")
    steps = [row[2] for row in read(page) if row[0] == "one"]
    page.keyboard.press("ArrowRight")
    assert [row[2] for row in read(page) if row[0] == "one"] != steps
    page.keyboard.press("+")
    assert max(axis_labels(page)) - min(axis_labels(page)) <= 250_000
    page.keyboard.press("0")
    assert max(axis_labels(page)) == 500_000
    tables = page.locator(".scroll[tabindex='0'][role=region]")
    assert tables.count() == page.locator("main table").count() == 2
    page.set_viewport_size(PHONE)
    tables.first.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.querySelector('.scroll').scrollLeft > 0")


@pytest.mark.parametrize("count", [1, 2, 9])
def test_a_phone_scrolls_down_alone_and_keeps_the_first_column(show, two, tmp_path, count):
    runs = [*two, *(write_run(tmp_path / f"run{i}", rows_of(20)) for i in range(7))][:count]
    page = show(*runs, viewport=PHONE, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.evaluate("visualViewport.scale") == 1
    if count > 2:  # two columns fit
        page.evaluate("document.querySelectorAll('.scroll').forEach(table => table.scrollLeft = 200)")
        assert page.locator(".scroll").nth(1).evaluate("e => e.scrollLeft") > 0
        cell, table = (page.locator(f".scroll {what}").nth(3).bounding_box() for what in ("th[scope=row]", "tr"))
        assert 0 <= cell["x"] <= 16 and cell["width"] < 390 / 2 and table["x"] < 0
    svg(page).scroll_into_view_if_needed()
    box = svg(page).bounding_box()
    page.touchscreen.tap(box["x"] + 200, box["y"] + 100)
    values = page.locator("#values").bounding_box()
    assert values["x"] >= 0 and values["x"] + values["width"] <= 390
    assert values["height"] < 844 / 2  # also of nine runs


def test_a_wide_screen_shows_all_columns_of_nine_runs(show, tmp_path):
    folders = [tmp_path / f"run{i}-warmup200-batch512k" for i in range(9)]
    page = show(*(write_run(folder, rows_of(20), config={"seed": i}) for i, folder in enumerate(folders)))
    for table in page.locator(".scroll").all():
        assert table.evaluate("e => e.scrollWidth <= e.clientWidth")


def test_a_dark_screen_has_a_dark_page_and_a_printer_a_white_one(show, two):
    page = show(*two, color_scheme="dark")
    background = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(background) == "rgb(21, 24, 28)"
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate(background) == "rgb(255, 255, 255)"
    swatch = page.locator("form .swatch").first
    assert swatch.is_visible() and swatch.locator("path").get_attribute("stroke") == "#2578cf"
    for name in ("figure", "tr"):
        assert page.locator(name).first.evaluate("e => getComputedStyle(e).breakInside") == "avoid"
    assert page.locator("thead").first.evaluate("e => getComputedStyle(e).display") == "table-header-group"  # repeated
    assert page.locator("form").evaluate("e => getComputedStyle(e).breakAfter") == "avoid"
    page.set_viewport_size({"width": 718, "height": 1047})  # an A4 page without its margins
    assert page.locator("table").first.evaluate("e => e.getBoundingClientRect().right") <= 718


def test_plots_have_a_role_a_label_and_marks_of_what_was_left_out(show, two):
    page = show(*two)
    plots = page.locator("svg.plot[role=img]")
    assert plots.count() == page.locator("figure").count() == 8
    assert all("Last values: one" in plot.get_attribute("aria-label") for plot in plots.all())
    assert [svg(page, index).locator(".left-out").count() for index in range(8)] == [2, 0, 0, 0, 0, 2, 0, 0]
    assert page.title() == "one, other"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(show, two, scheme):
    path = os.environ.get("AXE")
    if not path:
        pytest.fail("set AXE to the file axe.min.js of the npm package axe-core: npm install axe-core")
    for runs in (two[:1], two):
        page = show(*runs, color_scheme=scheme)
        page.add_script_tag(content=Path(path).read_text(encoding="utf-8"))
        found = page.evaluate("axe.run()")["violations"]
        assert [entry["id"] for entry in found if entry["impact"] in ("serious", "critical")] == []


ODD = {
    "no rows": "",
    "one row": json.dumps({"step": 1, "tokens": 10, "train_loss": 5.0, "lr": 0.1}),
    "NaN alone": '{"step": 1, "tokens": 10, "train_loss": NaN}',
    "a constant": "\n".join(json.dumps({"step": s, "tokens": s, "train_loss": 2.0, "lr": 0}) for s in range(9)),
    "tiny and huge": "\n".join(
        json.dumps({"step": s, "tokens": 10**17 * s, "train_loss": 10.0 ** (17 - 30 * s)}) for s in range(1, 9)
    ),
}


@pytest.mark.parametrize("rows", ODD.values(), ids=ODD)
def test_odd_rows_draw_no_nonsense(show, tmp_path, rows):
    page = show(write_run(tmp_path / "run", tail=rows))
    for word in ("NaN", "Infinity", "undefined"):
        assert not any(
            word in text for text in page.locator("svg.plot").evaluate_all("all => all.map(e => e.innerHTML)")
        )


def test_a_long_run_is_a_small_page_that_is_drawn(show, tmp_path):
    page = show(write_run(tmp_path / "run", rows_of(20_000, val_every=250)))
    assert (tmp_path / "page.html").stat().st_size < 5_000_000
    corners = svg(page).locator("polyline.firm").get_attribute("points").split()
    assert 3500 < len(corners) <= 4100
