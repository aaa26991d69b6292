"""The report in a real browser: it draws, answers the pointer and the keyboard, and reaches no network."""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from browser import Page, chromium
from made_runs import HOSTILE, STEPS, append_measurement, measurements, ratio, steered_run, watched_run
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from lightning_spectral.pages import report, write_checkpoint_page
from lightning_spectral.pages.run import write_run_page

CHARTS = [
    "heatmap", "ratio", "mlp_norm", "attention_norm", "mlp_scale", "attention_scale", "typical_token_residual",
    "effective_rank", "events", "actions",
]  # fmt: skip
DRAWN = """
const canvas = deep(view(arguments[0]).el.shadowRoot).find((el) => el.localName === "canvas");
const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
let colours = new Set();
for (let i = 0; i < pixels.length; i += 4) if (pixels[i + 3]) colours.add(pixels[i] + "," + pixels[i + 1]);
return colours.size;
"""
ACTIVE = """
let el = document.activeElement;
while (el.shadowRoot?.activeElement) el = el.shadowRoot.activeElement;
return el.title || el.innerText || el.getAttribute("aria-label") || el.localName;
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def page(folder: Path) -> Iterator[Page]:
    with chromium(folder / "profile") as started:
        yield started


@pytest.fixture(scope="module")
def steered(folder: Path) -> Path:
    return report(steered_run(folder / "steered.jsonl"))


@pytest.fixture
def opened(page: Page, steered: Path) -> Page:
    page.open(steered)
    return page


def test_every_chart_is_drawn_without_a_complaint_or_a_request(opened: Page):
    names = opened.run("return [...Bokeh.index.roots].map((v) => v.model.name).filter((name) => name)")
    assert names == CHARTS
    assert all(opened.run(DRAWN, name) > 3 for name in CHARTS)
    assert opened.console() == []
    assert set(opened.requests()) == {"file", "data"}


def test_hover_shows_the_value_of_a_cell(opened: Page):
    for block, column in ((4, 5), (0, 6), (2, 1)):
        shown = opened.hover("heatmap", STEPS[column], block)
        found = re.fullmatch(rf"block {block} model\.blocks\.{block} step {STEPS[column]} ρ (\S+)", shown)
        assert found, shown
        assert float(found[1]) == pytest.approx(ratio(block, column), rel=5.1e-4)


def test_hover_shows_the_value_and_the_name_of_a_line(opened: Page):
    shown = opened.hover("ratio", 60, ratio(4, 5))
    found = re.fullmatch(r"block 4 model\.blocks\.4 step 60 ρ = .* (\S+)", shown)
    assert found, shown
    assert float(found[1]) == pytest.approx(ratio(4, 5), rel=5.1e-4)


def test_hover_shows_a_value_that_has_no_neighbours_in_time(opened: Page):
    """Tokens were seen in pairs of measurements, except where the gap of block 1 leaves one alone."""
    assert "step 80" not in opened.hover("effective_rank", 80, 8.0, 0.5)  # column 6: no tokens
    assert opened.hover("effective_rank", 20, 8.0).startswith("block 1 model.blocks.1 step 20")


def test_hover_shows_what_was_said_and_done(opened: Page):
    assert opened.hover("events", 60, "failure") == "step 60 tokens become one vector"
    assert opened.hover("actions", 40, 0.5) == "step 40 blocks moved 1 blocks at the bounds 1"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_hover_shows_stays_in_the_window_and_stands_out(page: Page, folder: Path, scheme: str):
    run = steered_run(folder / "talk.jsonl")
    run.write_text(run.read_text().replace("is above the zone at 1.9", "is above the zone at 1.9; " * 20))
    page.open(report(run), scheme=scheme, width=900)
    assert "1.9; is above" in page.hover("events", 20, "note")
    left, right, paper, ink = page.run("""
    const [tip] = deep(document).filter((el) => el.classList.contains("bk-Tooltip") && el.checkVisibility());
    const box = tip.getBoundingClientRect(), style = getComputedStyle(tip);
    return [box.left, box.right, style.backgroundColor, style.color];
    """)
    assert 0 <= left < right <= 900
    lightness = [sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 765 for colour in (paper, ink)]
    assert abs(lightness[0] - lightness[1]) > 0.6
    assert (lightness[0] < 0.2) is (scheme == "dark")


def test_a_gap_is_a_gap(opened: Page):
    assert opened.hover("ratio", 20, ratio(1, 2)).startswith("block 1 ")
    assert opened.hover("ratio", 30, ratio(1, 3), 0.5) == ""


def test_charts_zoom_together_from_the_keyboard(opened: Page):
    span = "return ['ratio', 'heatmap', 'events'].map((n) => view(n).model.x_range.end - view(n).model.x_range.start)"
    before = opened.run(span)
    opened.run("document.getElementById('section-1').scrollIntoView()")
    seen: list[str] = []
    for _ in range(40):
        ActionChains(opened.driver).send_keys(Keys.TAB).perform()
        seen.append(opened.run(ACTIVE))
        if seen[-1].lower().startswith("zoom in"):
            break
    assert seen[0] == "Skip to the report"
    assert seen[-1].lower().startswith("zoom in"), seen
    ActionChains(opened.driver).send_keys(Keys.ENTER).perform()
    after = opened.wait(f"const now = (() => {{ {span} }})(); return now[0] < {0.99 * before[0]} ? now : null")
    assert after is not None
    assert len(set(after)) == len(set(before)) == 1


def test_headings_landmarks_and_labels_are_in_order(opened: Page):
    levels = opened.run("return [...document.querySelectorAll('h1,h2,h3,h4')].map((h) => Number(h.localName[1]))")
    assert levels[0] == 1
    assert set(levels[1:]) == {2, 3}
    for landmark in ("header", "nav[aria-label]", "main", "footer", "html[lang=en]", "title"):
        assert opened.run("return document.querySelectorAll(arguments[0]).length", landmark) == 1, landmark
    labelled = opened.run("""return [...document.querySelectorAll('.chart')].map((c) =>
      ['aria-labelledby', 'aria-describedby'].map((a) => document.getElementById(c.getAttribute(a)).innerText.length)
    );""")
    assert len(labelled) == len(CHARTS)
    assert all(title > 5 and caption > 20 for title, caption in labelled)
    assert opened.run("return [...document.querySelectorAll('thead th')].every((th) => th.scope === 'col')")
    assert opened.run("const ids = [...document.querySelectorAll('[id]')].map((e) => e.id);"
                      "return ids.length === new Set(ids).size")  # fmt: skip
    assert opened.run("return [...document.querySelectorAll('nav a')].every((a) => document.querySelector(a.hash))")


def test_whatever_takes_the_focus_says_what_it_is(opened: Page):
    assert opened.wait("return document.body.dataset.drawn")
    silent = opened.run("""
    const stops = deep(document).filter((el) => el.tabIndex === 0 && el.checkVisibility());
    const nameless = stops.filter((el) => !(el.ariaLabel || el.innerText?.trim()));
    const roleless = stops.filter((el) => !el.role && !["a", "summary", "button"].includes(el.localName));
    return [stops.length, nameless.length, roleless.map((el) => el.outerHTML.slice(0, 80))];
    """)
    assert silent == [silent[0], 0, []]
    assert silent[0] > 8 * len(CHARTS)


CONTRAST = """
function luminance(colour) {
  const parts = colour.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255);
  const [r, g, b] = parts.map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function paper(el) {
  const colour = getComputedStyle(el).backgroundColor;
  return /, 0\\)$/.test(colour) ? paper(el.parentElement) : luminance(colour);
}
const written = [...document.querySelectorAll("body *")].filter((el) => el.checkVisibility() &&
  [...el.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim()));
return [luminance(getComputedStyle(document.body).backgroundColor), written.map((el) => {
  const ink = luminance(getComputedStyle(el).color), around = paper(el);
  return (Math.max(ink, around) + 0.05) / (Math.min(ink, around) + 0.05);
})];
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_schemes(page: Page, steered: Path, scheme: str):
    page.open(steered, scheme=scheme)
    paper, contrasts = page.run(CONTRAST)
    assert len(contrasts) > 100
    assert min(contrasts) >= 4.5  # WCAG 2.2, 1.4.3
    assert (paper < 0.1) is (scheme == "dark")
    turned = page.run("return getComputedStyle(document.querySelector('.chart')).filter")
    assert ("invert" in turned) is (scheme == "dark")
    assert page.console() == []


def test_a_narrow_window_needs_no_scrolling_sideways(page: Page, steered: Path):
    page.open(steered, width=360)
    assert page.run("return document.documentElement.scrollWidth") <= 360
    widths = page.run("return [...document.querySelectorAll('.chart')].map((c) => c.getBoundingClientRect().right)")
    assert max(widths) <= 360


def test_labels_do_not_reach_over_the_left_edge_of_a_chart_that_has_no_room(opened: Page):
    """Bokeh clears its canvas from half a pixel on, so their ink would stay there when the chart has room again."""
    opened.run("for (const chart of document.querySelectorAll('.chart')) chart.style.width = '60px'")
    time.sleep(0.5)
    over = opened.run(
        """
    const ink = (c) => c.getContext("2d").getImageData(0, 0, 1, c.height).data.some((value, i) => i % 4 === 3 && value);
    const drawn = (v) => deep(v.el.shadowRoot).find((el) => el.localName === "canvas");
    return arguments[0].filter((name) => ink(drawn(view(name))));
    """,
        CHARTS,
    )
    assert over == []


def test_it_prints_on_pages(opened: Page):
    printed = opened.driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": False})
    document = base64.b64decode(printed["data"])
    assert document.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", document)) <= 12


def test_tools_are_not_printed(opened: Page):
    shown = """return deep(document).filter((e) => e.className === "bk-Toolbar bk-above")
        .map((e) => getComputedStyle(e).display)"""
    assert set(opened.run(shown)) == {"flex"}
    opened.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert set(opened.run(shown)) == {"none"}
    finally:
        opened.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_hostile_names_do_no_harm(page: Page, folder: Path):
    page.open(report(steered_run(folder / "hostile.jsonl", HOSTILE)))
    shown = page.hover("ratio", 60, ratio(4, 5))
    assert "=HYPERLINK('http://example.com')" in shown
    assert "{{ 7 * 7 }}{% raw %}@name{safe}$x" in page.hover("ratio", 60, ratio(3, 5))
    assert "<script>window.harmed = 1</script>" in page.run("return document.body.innerText")
    assert page.run("return window.harmed ?? null") is None
    assert page.console() == []
    assert set(page.requests()) == {"file", "data"}
    assert (
        page.run("return document.querySelectorAll('script').length") == 3
    )  # the charts, what unpacks them, and the unpacked


@pytest.mark.parametrize(("steps", "linearization"), [((0,), "circuit"), ((0, 7), "jacobian"), ((3, 2**40), "paper")])
def test_small_and_odd_runs_are_drawn(page: Page, folder: Path, steps: tuple[int, ...], linearization: str):
    page.open(report(watched_run(folder / f"{linearization}.jsonl", steps, linearization)))
    assert page.run(DRAWN, "heatmap") > 3
    assert page.hover("ratio", steps[0], 1.0).startswith("block ")
    assert page.console() == []


def test_the_page_of_an_audit_shows_one_checkpoint_or_two(page: Page, folder: Path):
    names = ("a", "<b>", "c")
    items = measurements(names)
    write_checkpoint_page(folder / "one.html", ["<i>one</i>"], [items[5]])
    page.open(folder / "one.html")
    assert page.hover("ratio", 0, 0.5) == f"block 0 a ρ {ratio(0, 5):.4g}"
    assert page.console() == []
    write_checkpoint_page(folder / "two.html", ["one", "two"], [items[1], items[5]])
    page.open(folder / "two.html")
    shown = f"block 0 a ρ before {ratio(0, 1):.4g} ρ after {ratio(0, 5):.4g}"
    assert page.hover("ratio", 0, ratio(0, 5)) == shown
    assert page.hover("norms", 1, items[5].layers[1].mlp_norm).startswith("block 1 <b> MLP ")
    assert page.console() == []


def test_runs_are_laid_over_each_other(page: Page, folder: Path):
    one = steered_run(folder / "one" / "spectral.jsonl")
    other = steered_run(folder / "other" / "spectral.jsonl")
    (folder / "one" / "metrics.csv").write_text("step,loss\n" + "".join(f"{k},{9 - k / 10}\n" for k in range(80)))
    page.open(report([one, other, one]))
    names = page.run("return [...Bokeh.index.roots].map((v) => v.model.name).filter((name) => name)")
    assert names == ["loss", "ratio", "blocks", "difference_B", "difference_C", "tokens"]
    assert all(page.run(DRAWN, name) > 3 for name in names)
    assert [page.run("return view(arguments[0]).model.title.text", name) for name in names[3:5]] == [
        "ρ, B / A",
        "ρ, C / A",
    ]
    assert page.hover("loss", 40, 5.0).startswith("A loss step 40 loss 5")
    assert page.hover("difference_B", 40, 3) == "block 3 model.blocks.3 step 40 ρ, B / A 1"
    assert "A, step 80 block 4 model.blocks.4" in page.hover("blocks", 4, ratio(4, 6))
    assert page.console() == []
    assert set(page.requests()) == {"file", "data"}


def test_a_page_that_is_watched_loads_itself_again_and_keeps_its_place(page: Page, folder: Path):
    run, path = steered_run(folder / "watched.jsonl"), folder / "watched.html"
    write_run_page(run, path, reload=1000.0)
    page.open(path)
    assert page.wait("return document.body.dataset.drawn")
    page.run("""
    document.getElementById("table-1-1").open = true;
    const range = view("ratio").model.x_range;
    [range.start, range.end] = [10, 50];
    document.querySelector("#table-1-1 summary").focus();
    scrollTo({top: 900, behavior: "instant"});
    """)
    append_measurement(run)
    write_run_page(run, path, reload=1000.0)
    page.run("window.before = true; keep(); location.reload();")  # what the page does after 1,000 seconds
    assert settled(page, "window.before === undefined && document.body.dataset.drawn")
    kept = page.run("""
    const range = view("ratio").model.x_range, fold = document.getElementById("table-1-1");
    return [scrollY, fold.open, range.start, range.end, document.activeElement === fold.querySelector("summary")];
    """)
    assert kept == [900, True, 10, 50, True]
    assert "steps 0 to 90" in page.run("return document.body.innerText")
    page.run("document.getElementById('reload').click(); window.before = true; keep(); location.reload();")
    assert settled(page, "window.before === undefined && document.body.dataset.drawn")
    assert (
        page.run("return document.getElementById('reload').ariaPressed") == "false"
    )  # told to stop, and still stopped
    write_run_page(run, path)
    page.run("window.before = true; location.reload();")
    assert settled(page, "window.before === undefined && document.body.dataset.drawn")
    assert page.run("return document.getElementById('reload')") is None
    assert page.console() == []
    write_run_page(run, folder / "often.html", reload=0.5)
    page.open(folder / "often.html")
    assert settled(page, "performance.getEntriesByType('navigation')[0].type === 'reload'")
    assert set(page.requests()) == {"file", "data"}


def settled(page: Page, condition: str, patience: float = 60.0) -> bool:
    """Whether a condition comes true, of a page that may be on its way to the next one."""
    began = time.perf_counter()
    while time.perf_counter() - began < patience:
        with suppress(WebDriverException):
            if page.run(f"return Boolean({condition})"):
                return True
        time.sleep(0.05)
    return False
