"""The report as a file: which run it draws, what it says, what it refuses."""

from __future__ import annotations

import ast
import base64
import gzip
import hashlib
import json
import math
import random
import re
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from made_runs import HOSTILE, STEPS, measurements, ratio, steered_run, watched_run
from tiny_run import LitGPT, fit
from zoo import example

from lightning_spectral import History, ResidualRescaler, SpectralMonitor, audit, report
from lightning_spectral.alarms import Event
from lightning_spectral.cli import main
from lightning_spectral.display.heatmap import LIMIT, step_edges
from lightning_spectral.errors import ConfigurationError
from lightning_spectral.pages import curves as charts
from lightning_spectral.pages.canvas import rounded
from lightning_spectral.pages.curves import QUANTITIES, run_charts
from lightning_spectral.pages.findings import summary_of
from lightning_spectral.pages.heat import SHADES, heat_chart, zone_palette
from lightning_spectral.pages.tables import event_table
from lightning_spectral.pages.words import block_list, clear, clear_name
from lightning_spectral.records import LayerMeasurement, Measurement
from lightning_spectral.runs.logged import NOTHING


class Reader(HTMLParser):
    """Collects the text of a page, and the tables, as a screen reader would."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self.sentences: list[str] = []
        self.charts: list[str] = []
        self.policy = ""
        self._into: list[str] | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        if tag == "meta" and values.get("http-equiv"):
            self.policy = values["content"] or ""
        if "data-chart" in values:
            self.charts.append(values["data-chart"] or "")
        if tag == "tr":
            self.rows.append([])
        told = self.sentences if tag == "li" or (values.get("class") or "").startswith("verdict") else None
        self._into = self.rows and self.rows[-1] if tag in ("td", "th") else told
        if self._into is not None:
            self._into.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th", "li", "p"):
            self._into = None

    def handle_data(self, data: str) -> None:
        if self._into is not None:
            self._into[-1] += data


def read(path: Path) -> Reader:
    return Reader(path.read_text(encoding="utf-8"))


def words(history: History) -> str:
    """Return the verdict, the findings and the advice as one text."""
    summary = summary_of(history, NOTHING)
    return " ".join(part.text for part in (summary.verdict, *summary.findings, *summary.advice))


def told(items: Sequence[Measurement], events: Sequence[Event] = (), **header: object) -> str:
    return words(History(header, tuple(items), tuple(events)))


# Which run.


def test_the_page_lies_beside_the_file_of_the_run(tmp_path: Path):
    run = steered_run(tmp_path / "version_0" / "spectral.jsonl")
    assert report(run) == report(run.parent) == report(tmp_path) == run.with_suffix(".html")
    assert "are in the source repository of lightning_spectral" in run.with_suffix(".html").read_text()  # no dead links
    assert report(run, tmp_path / "page.html") == tmp_path / "page.html"
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_same_run_gives_the_same_words(tmp_path: Path):
    run = steered_run(tmp_path / "spectral.jsonl")
    assert read(report(run)).rows == read(report(run, tmp_path / "other.html")).rows


def test_a_monitor_with_another_prefix_is_found(tmp_path: Path):
    watched_run(tmp_path / "logs" / "mine.jsonl")
    (tmp_path / "logs" / "notes.jsonl").write_text('{"a": 1}\n')
    assert report(tmp_path) == tmp_path / "logs" / "mine.html"


def test_what_a_monitor_has_set_aside_is_drawn_only_by_its_name(tmp_path: Path):
    for step in range(3):
        watched_run(tmp_path / "mine.jsonl", (step,))
    (tmp_path / "mine.jsonl").rename(tmp_path / "mine.damaged-1.jsonl")
    watched_run(tmp_path / "mine.jsonl", (7,))
    assert report(tmp_path) == tmp_path / "mine.html"
    assert "1 time, step 7, linearization" in (tmp_path / "mine.html").read_text()
    assert report(tmp_path / "mine.earlier-2.jsonl") == tmp_path / "mine.earlier-2.html"
    (tmp_path / "mine.jsonl").unlink()
    with pytest.raises(
        ConfigurationError, match=r"3 runs, expected one; name one.*: .*damaged-1.*earlier-1.*earlier-2"
    ):
        report(tmp_path)


def test_damaged_lines_are_counted_and_the_others_shown(tmp_path: Path):
    run = watched_run(tmp_path / "spectral.jsonl", tuple(range(20)))
    lines = run.read_bytes().splitlines(keepends=True)
    lines[3] = b"{}\xff\n"
    run.write_bytes(b"".join(lines))
    page = read(report(run))
    assert "Line 4 is damaged (it is not a JSON object). All other lines are shown." in page.sentences
    assert "19 times, steps 0 to 19" in run.with_suffix(".html").read_text()
    lines[5:18] = [b'{"layers": []}\n'] * 13
    run.write_bytes(b"".join(lines))
    (told,) = [sentence for sentence in read(report(run)).sentences if "damaged" in sentence]
    assert told.startswith("14 lines are damaged: 4, 6, 7, 8, 9, 10, 11, 12, 13, 14 and 4 more (line 4: it is not a")
    run.write_bytes(lines[0] + lines[5])
    with pytest.raises(ConfigurationError, match=r"spectral.jsonl: Line 2 is damaged \(KeyError: 'safe_zone'\)$"):
        report(run)


def test_several_runs_are_listed_and_none_is_drawn(tmp_path: Path):
    for number in range(12):
        watched_run(tmp_path / f"version_{number:02d}" / "spectral.jsonl")
    with pytest.raises(
        ConfigurationError, match=r"12 runs, expected one; name one.*: .*version_00.*version_09.*; and 2 more$"
    ):
        report(tmp_path)


def test_of_several_files_in_one_folder_the_usual_name_counts(tmp_path: Path):
    watched_run(tmp_path / "paper.jsonl", linearization="paper")
    watched_run(tmp_path / "spectral.jsonl")
    assert report(tmp_path) == tmp_path / "spectral.html"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path / "nothing", r"nothing: no such file or folder$"),
        (lambda path: path, r"no spectral.jsonl in this folder or below$"),
        (lambda path: _written(path / "spectral.jsonl", ""), "does not begin with the header"),
        (lambda path: _written(path / "spectral.jsonl", '{"lightning_spectral": 1}\n'), r"nothing was measured yet$"),
        (lambda path: _written(path / "spectral.jsonl", '{"lightning_spectral": 9}\n'), "this release reads format 1"),
        (lambda path: _written(path / "spectral.jsonl", "\x7fELF\x00\xff"), "does not begin with the header"),
    ],
    ids=range(6),
)
def test_what_cannot_be_drawn_is_one_error(tmp_path: Path, make, said: str, capsys: pytest.CaptureFixture[str]):
    place = make(tmp_path)
    with pytest.raises(ConfigurationError, match=said):
        report(place)
    assert main(["report", str(place)]) == 2
    assert re.search(said, capsys.readouterr().err.strip())
    assert not list(tmp_path.rglob("*.html"))


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_run_that_is_still_written_is_drawn_as_far_as_it_goes(tmp_path: Path):
    run = steered_run(tmp_path / "spectral.jsonl")
    whole = run.read_bytes()
    first_two = sum(len(line) + 1 for line in whole.split(b"\n")[:3])  # measurements, and the header
    for end in (first_two - 40, first_two, first_two + 1, first_two + 1500):
        run.write_bytes(whole[:end])
        page = read(report(run))
        assert "heatmap" in page.charts
        assert any("is incomplete" in sentence for sentence in page.sentences) is (end != first_two)


class Draw(Callback):
    """Draws the run at the end of one step, while it goes on."""

    def __init__(self, folder: Path, step: int) -> None:
        self.folder, self.step, self.drawn = folder, step, Reader("")

    def on_train_batch_end(self, trainer: Trainer, *args: object) -> None:
        if trainer.global_step == self.step:
            self.drawn = read(report(self.folder, self.folder / "early.html"))


def test_a_real_run_is_drawn_while_it_goes_and_afterwards(tmp_path: Path):
    module, draw = LitGPT(), Draw(tmp_path, 5)
    with torch.no_grad():
        for block in module.model.blocks:
            block.attention.proj.weight.mul_(30)
    fit(tmp_path, [SpectralMonitor(2, ResidualRescaler()), draw], module=module)
    assert "steps 0 to 4" in (tmp_path / "early.html").read_text()
    after = read(report(tmp_path))
    assert {"heatmap", "ratio", "mlp_scale", "typical_token_residual", "events", "actions"} <= set(after.charts)
    assert len(after.charts) >= len(draw.drawn.charts) > 0
    history = History.read(tmp_path / "spectral.jsonl")
    assert any(row[:2] == ["rescaler.gain", str(ResidualRescaler().gain)] for row in after.rows)
    names = [layer.name for layer in history.measurements[-1]]
    assert names == [row[1] for row in after.rows if row[0].isdigit() and row[2:] == _sites(row[1])]


def _sites(name: str) -> list[str]:
    return [f"{name}.attention", f"{name}.mlp", "yes"]


def test_the_command_line_says_where_the_page_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = steered_run(tmp_path / "spectral.jsonl")
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{run.with_suffix('.html')}\n"
    assert main(["report", str(run), "--output", str(tmp_path / "there.html")]) == 0
    assert (tmp_path / "there.html").exists()


@pytest.mark.parametrize("missing", ["bokeh", "jinja2"])
def test_without_the_extra_the_message_says_what_to_type(
    tmp_path: Path, missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run = steered_run(tmp_path / "spectral.jsonl")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModuleNotFoundError, match=rf"needs {missing}; type: pip install bokeh jinja2"):
        report(run)
    assert main(["report", str(run)]) == 2
    assert "type: pip install bokeh jinja2" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(Path(charts.__file__).parent.glob("*.py")), ids=lambda path: path.stem)
def test_the_package_is_imported_without_the_extra(path: Path):
    loaded = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not re.search(r"\b(bokeh|jinja2|matplotlib)\b", "\n".join(map(ast.unparse, loaded)))


def test_damaged_files_are_told_and_never_a_traceback(tmp_path: Path):
    run = steered_run(tmp_path / "spectral.jsonl")
    whole, rng = run.read_bytes(), random.Random(0)
    places = [match.span() for match in re.finditer(rb'(?<=[:\[ ])(-?\d[\d.e-]*|null|"[^"]*")(?=[,}\]])', whole)]
    values = [b"null", b"-1", b"1e308", b"5e-324", b"NaN", b"-Infinity", b'""', b"[]", b"{}", b"true", b"0", b"1e999"]
    drawn = told = refused = longest = 0
    for number in range(400):
        first, last = rng.choice(places)
        damaged = whole[:first] + rng.choice(values) + whole[last:]
        place = rng.randrange(len(damaged))
        run.write_bytes(damaged if number % 4 else damaged[:place] + rng.randbytes(1) + damaged[place + 1 :])
        try:
            history = History.read(run)
            text = words(history)
            assert text.isprintable()
            assert len(history.measurements) >= len(STEPS) - 3  # two places, and a lost line end
            drawn += 1
            assert ("is damaged" in text) == (len(history.damaged) == 1)
            told += bool(history.damaged)
            if number % 40 == 0:
                report(run)
        except ConfigurationError as error:
            refused += 1
            longest = max(longest, len(str(error)))
    assert min(drawn, told) > 60
    assert longest < 300 + len(str(run))
    assert 0 < refused < 40  # another format, other linearizations


# What stands in it.


def test_every_table_has_the_numbers_of_the_run(tmp_path: Path):
    page = read(report(steered_run(tmp_path / "spectral.jsonl")))
    (last,) = (row for row in page.rows if row[:2] == ["4", "model.blocks.4"] and row[-1] == "above the safe zone")
    assert float(last[4]) == pytest.approx(ratio(4, 6), rel=1e-3)
    extremes = next(row for row in page.rows if row[:2] == ["0", "model.blocks.0"] and len(row) == 6 and row[2] == "1")
    wanted = [1.0, ratio(0, 6), 1.0, ratio(0, 6)]
    assert [float(cell) for cell in extremes[2:]] == pytest.approx(wanted, rel=1e-3)
    assert ["60", "failure", "tokens become one vector"] in page.rows
    assert ["4", "model.blocks.4", "2", "0", "0.9048", "1.105", "above the zone"] in page.rows
    assert ["rescaler.gain", "0.3"] in page.rows
    assert ["rescaler.dry_run", "no"] in page.rows
    assert ["4", "model.blocks.4", "model.blocks.4.attn", "–", "yes"] in page.rows


def test_a_list_of_events_that_is_cut_says_so():
    events = tuple(Event("note", step, step, (0,), "crossed") for step in range(2001))
    table = event_table(events)
    assert (table.title, len(table.rows), table.rows[0][0]) == ("Events, the last 2,000 of 2,001", 2000, "2,000")


def test_a_watched_run_has_no_charts_of_what_it_did_not_do(tmp_path: Path):
    page = read(report(watched_run(tmp_path / "spectral.jsonl")))
    assert page.charts == ["heatmap", "ratio", "mlp_norm", "attention_norm"]


def test_a_norm_of_zero_is_a_gap_in_a_chart():
    layers = (LayerMeasurement(0, "a", 0.0, 1.0), LayerMeasurement(1, "b", 2.0, 1.0))
    history = History({}, (Measurement(0, "circuit", layers), Measurement(5, "circuit", layers)))
    drawn = run_charts(history)["mlp_norm"].renderers[0].data_source.data["mlp_norm"]
    np.testing.assert_array_equal(drawn, [[math.nan, math.nan], [2.0, 2.0]])


def test_a_run_without_a_single_ratio_still_has_its_tables():
    layers = (LayerMeasurement(0, "a", 2.0, None, attention_reason="packed 4-bit weights"),)
    history = History({}, (Measurement(0, "circuit", layers), Measurement(5, "circuit", layers)))
    assert list(run_charts(history)) == ["mlp_norm"]
    assert "Without a ratio: block 0." in words(history)


def test_the_page_runs_two_scripts_by_their_hash_and_reaches_nothing(tmp_path: Path):
    path = report(steered_run(tmp_path / "spectral.jsonl"))
    text = path.read_text(encoding="utf-8")
    policy = read(path).policy
    rules = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert set(rules) == {"default-src", "script-src", "style-src", "img-src", "connect-src", "base-uri", "form-action"}
    assert (rules["img-src"], rules["connect-src"]) == ("data: blob:", "data:")
    packed, loader = re.findall(r"<script[^>]*>(.*?)</script>", text, re.DOTALL)
    unpacked = gzip.decompress(base64.b64decode(packed)).decode()
    hashes = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in (loader, unpacked)]
    assert rules["script-src"] == " ".join(f"'sha256-{digest}'" for digest in hashes)
    assert "http" not in re.sub(
        r"<script type.*?</script>|Content-Security-Policy|http-equiv", "", text, flags=re.DOTALL
    )


def test_hostile_names_are_text_and_short(tmp_path: Path):
    path = report(steered_run(tmp_path / "spectral.jsonl", HOSTILE))
    page = read(path)
    assert page.tags.count("script") == 2
    assert page.tags.count("img") == 0
    names = [row[1] for row in page.rows if len(row) >= 6 and row[0].isdigit()]
    assert {HOSTILE[0], HOSTILE[1], HOSTILE[2], HOSTILE[3], HOSTILE[4]} <= set(names)
    assert all(name.isprintable() and len(name) <= 100 for name in names)


def test_hostile_headers_do_no_harm(tmp_path: Path):
    run = watched_run(tmp_path / "spectral.jsonl")
    first, rest = run.read_text().split("\n", 1)
    for strange in (
        {"blocks": 5},
        {"blocks": [1]},
        {"blocks": [{"name": ["<b>"]}]},
        {"rescaler": [[[]]]},
        {"<i>": {"<u>": "x" * 999}},
    ):
        run.write_text(json.dumps(json.loads(first) | strange) + "\n" + rest)
        assert not {"b", "i", "u"} & set(read(report(run)).tags)


# The words (see also test_summary.py).


def test_texts_are_cleared():
    assert clear("a\x00b\u202ec\nd\u2028") == "a�b�c�d�"
    assert clear("x" * 101) == "x" * 99 + "…"
    assert clear("ρ ‖W‖ 漢") == "ρ ‖W‖ 漢"


def test_names_of_blocks_that_are_cut_still_differ():
    name = "tower." + "x" * 200 + ".layers."
    short = clear_name(f"{name}11")
    assert len(short) == 100
    assert short.startswith("tower.x")
    assert short.endswith("x.layers.11")
    assert clear_name("a\x00b") == "a�b"
    assert clear_name("x" * 100) == "x" * 100
    assert block_list([3]) == "block 3"
    assert block_list([7, 0, 1, 2, 4]) == "blocks 0–2, 4, 7"


# The charts.


def test_images_have_the_ratios_and_steps_of_the_run_in_columns_of_one_width():
    history = History({}, tuple(measurements(tuple("abcde"))))
    (renderer,) = heat_chart(history, _range(), (0.5, 2.0)).renderers
    data = renderer.data_source.data
    np.testing.assert_array_equal(data["y"], np.asarray(data["block"]) - 0.5)
    for block, name in enumerate("abcde"):
        row = [place for place, index in enumerate(data["block"]) if index == block]
        painted = np.concatenate([data["image"][place] for place in row], axis=1)
        np.testing.assert_allclose(painted[0], history.values("ratio")[block], rtol=1e-4)
        assert np.isnan(painted[0, 3]) == (block == 1)
        np.testing.assert_array_equal(np.concatenate([data["step"][place] for place in row], axis=1)[0], STEPS)
        assert {data["name"][place] for place in row} == {name}
        edges = [
            data["x"][place] + data["dw"][place] * k / data["image"][place].shape[1]
            for place in row
            for k in range(data["image"][place].shape[1])
        ]
        np.testing.assert_allclose(edges, step_edges(STEPS)[:-1])


def _range():
    from bokeh.models import Range1d

    return Range1d(0, 1)


@pytest.mark.parametrize("zone", [(0.5, 2.0), (0.25, 3.0), (1.2, 3.0)])
def test_colours_are_white_at_one_jump_at_the_zone_and_grow_beyond(zone: tuple[float, float]):
    colours = np.array([[int(c[k : k + 2], 16) for k in (1, 3, 5)] for c in zone_palette(zone)], dtype=float)
    powers = (np.arange(SHADES) + 0.5) / SHADES * 2 * LIMIT - LIMIT
    lightness = colours @ [0.299, 0.587, 0.114]
    jumps = np.abs(np.diff(lightness))
    for edge in np.log2(zone):
        if abs(edge) > 0.3:
            near = int(np.argmin(np.abs((powers[1:] + powers[:-1]) / 2 - edge)))
            assert jumps[near - 1 : near + 2].max() > 5 * np.median(jumps)
    assert (np.diff(lightness[powers > 0]) <= 1e-9).all()
    assert (np.diff(lightness[powers < 0]) >= -1e-9).all()
    assert colours[-1][0] > colours[-1][2]  # red: the MLP
    assert colours[0][2] > colours[0][0]  # blue: attention


def test_values_of_a_chart_keep_four_digits_and_their_gaps():
    values = np.exp(np.linspace(-30, 30, 10_001))
    np.testing.assert_allclose(rounded(values), values, rtol=6.2e-5)
    assert np.isnan(rounded(np.array([math.nan]))).all()
    assert rounded(np.array([0.0, 1.0, 0.5])).tolist() == [0.0, 1.0, 0.5]


def test_labels_of_axes_and_of_the_ends_of_lines_do_not_collide(tmp_path: Path):
    drawn = run_charts(History.read(steered_run(tmp_path / "spectral.jsonl")))
    ends = {name: drawn[name].right[0] for name in QUANTITIES}
    assert set(ends["ratio"].major_label_overrides.values()) == {"0", "1", "2", "3", "4"}
    assert set(ends["attention_norm"].major_label_overrides.values()) == {"0–4"}
    for name, axis in ends.items():
        chart, logarithmic = drawn[name], QUANTITIES[name][1] == "log"
        reach = np.log if logarithmic else np.asarray
        pixel = (reach(chart.y_range.end) - reach(chart.y_range.start)) / (chart.height - 90)
        for ticks in (axis.ticker.ticks, chart.yaxis[0].ticker.ticks if logarithmic else []):
            assert (np.diff(reach(sorted(ticks))) >= 10 * pixel).all(), name
    assert {chart.xaxis[0].major_label_policy.__class__.__name__ for chart in drawn.values()} == {"NoOverlap"}
    edges = drawn["ratio"].yaxis[0].major_label_overrides
    assert (edges[0.5], edges[2.0]) == ("zone 1/2", "zone 2")


def test_steps_and_blocks_have_no_halves(tmp_path: Path):
    charts = run_charts(History.read(steered_run(tmp_path / "spectral.jsonl")))
    counted = [chart.xaxis[0] for chart in charts.values()] + [charts["heatmap"].yaxis[0], charts["actions"].yaxis[0]]
    assert [axis.ticker.min_interval for axis in counted] == [1] * len(counted)


def test_lines_share_their_steps_and_their_range(tmp_path: Path):
    charts = run_charts(History.read(steered_run(tmp_path / "spectral.jsonl")))
    assert len({id(chart.x_range) for chart in charts.values()}) == 1
    lines = [chart.renderers[0].data_source for name, chart in charts.items() if name.endswith(("ratio", "norm"))]
    assert len({id(source) for source in lines}) == 1


# The audit.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    example("llama").build().save_pretrained(folder)  # type: ignore[attr-defined]
    return folder


def test_an_audit_writes_a_page_with_the_numbers_of_its_table(checkpoint: Path, tmp_path: Path):
    path = tmp_path / "audit.html"
    assert main(["audit", str(checkpoint), "--html", str(path)]) == 0
    page = read(path)
    assert page.charts == ["ratio", "norms"]
    for layer in audit(checkpoint):
        norms = [format(value, ".4g") for value in (layer.mlp_norm, layer.attention_norm, layer.ratio) if value]
        assert any(row[:5] == [str(layer.index), layer.name, *norms] for row in page.rows)


def test_an_audit_of_two_checkpoints_writes_what_changed(checkpoint: Path, tmp_path: Path):
    path = tmp_path / "audit.html"
    assert main(["audit", str(checkpoint), str(checkpoint), "--html", str(path)]) == 0
    page = read(path)
    assert [row[-1] for row in page.rows] == ["change of ln ρ", "0", "0", "0"]
    assert any("before" in sentence and "now" in sentence for sentence in page.sentences)


def test_an_audit_without_the_extra_says_what_to_type(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "bokeh", None)
    assert main(["audit", str(checkpoint), "--html", str(tmp_path / "audit.html")]) == 2
    assert "type: pip install bokeh jinja2" in capsys.readouterr().err
