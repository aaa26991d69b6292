"""The file of a run survives crashes, resumes and changes of mind."""

from __future__ import annotations

import json
import math
import platform
import shutil
import threading
import time
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from full_disk import full_disk
from torch import nn

from lightning_spectral.alarms import Event
from lightning_spectral.errors import ConfigurationError
from lightning_spectral.records import Forecast, FunctionalMeasurement, LayerMeasurement, Measurement
from lightning_spectral.runs import journal as room
from lightning_spectral.runs.entries import LONGEST, entries
from lightning_spectral.runs.history import History, history_of
from lightning_spectral.runs.journal import Journal, described_model

HEADER = {"linearization": "circuit"}
EVENT = {"level": "note", "step": 5, "since": 5, "blocks": [0], "message": "block 0 leaves", "forecast": None}
ACTION = {"step": 5, "action": "hold", "block": 0, "ratio": 2.0, "mlp_log_change": 0.0, "attention_log_change": 0.0}
ACTION |= {"reason": "at its bound"}


def measurement(step: int, linearization: Any = "circuit", norm: float = 2.0) -> Measurement:
    layers = (LayerMeasurement(0, "blöck", norm, 1.0), LayerMeasurement(1, "b", None, 1.0))
    return Measurement(step, linearization, layers)


def read_journal(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    lines = list(entries(path))
    return lines[0].header, [line.entry for line in lines if line.entry is not None and "layers" in line.entry]


def read_actions(path: Path) -> list[dict[str, Any]]:
    return [dict(action) for action in History.read(path).actions]


def read_events(path: Path) -> list[dict[str, Any]]:
    return [plain(event) for event in History.read(path).events]


def plain(event: Event) -> dict[str, Any]:
    return {**asdict(event), "blocks": list(event.blocks)}


def measured(journal: Journal) -> list[dict[str, Any]]:
    """Return the measurements in a journal as plain values, without the time of writing."""
    found = [line.entry for line in journal.lines() if line.entry is not None and "layers" in line.entry]
    return [{name: value for name, value in entry.items() if name != "time"} for entry in found]


def steps(journal: Journal | Path) -> list[int]:
    records = measured(journal) if isinstance(journal, Journal) else read_journal(journal)[1]
    return [record["step"] for record in records]


def written(path: Path, *at: int, **header: str) -> Journal:
    journal = Journal(path, HEADER | header)
    for step in at:
        journal.append(measurement(step))
    return journal


def told(journal: Journal) -> list[str]:
    return [news.text for news in journal.take_news()]


def everything(folder: Path) -> dict[str, list[int]]:
    return {path.name: steps(path) for path in sorted(folder.glob("*.jsonl"))}


@pytest.mark.parametrize("in_memory", [True, False])
def test_what_is_appended_is_read_back(tmp_path: Path, in_memory: bool):
    journal = Journal(None if in_memory else tmp_path / "new" / "spectral.jsonl", HEADER)
    journal.append(measurement(0))
    journal.append(measurement(5), [EVENT, ACTION])
    assert measured(journal) == [measurement(step).to_dict() | {"safe_zone": [0.5, 2.0]} for step in (0, 5)]
    history = history_of(journal.lines())
    assert history.measurements == (measurement(0), measurement(5))
    assert [event.message for event in history.events] == ["block 0 leaves"]
    assert (history.actions, history.header["linearization"], told(journal)) == ((ACTION,), "circuit", [])


def test_every_line_is_complete_as_soon_as_it_is_written(tmp_path: Path):
    journal = Journal(tmp_path / "spectral.jsonl", HEADER)
    for step in range(3):
        journal.append(measurement(step))
        assert (tmp_path / "spectral.jsonl").read_text().count("\n") == step + 2


def test_a_torn_last_line_is_ignored_and_mended_on_resume(tmp_path: Path):
    path = tmp_path / "spectral.jsonl"
    journal = Journal(path, HEADER)
    for step in (0, 5):
        journal.append(measurement(step))
    path.write_text(path.read_text()[:-40])
    assert steps(journal) == [0]
    journal = Journal(path, HEADER, resume_step=5)
    assert told(journal) == [f"the last line of {path} was torn by a crash and is left out"]
    journal.append(measurement(10))
    assert steps(journal) == [0, 10]
    assert not History.read(path).torn
    assert not History.read(path).damaged


# A resume.


def test_a_resume_drops_what_will_be_measured_again(tmp_path: Path):
    path = tmp_path / "spectral.jsonl"
    written(path, 0, 5, 10, 15)
    assert steps(Journal(path, HEADER, resume_step=10)) == [0, 5, 10]


def test_what_a_resume_drops_lies_beside_until_it_has_been_measured_again(tmp_path: Path):
    path, beside = tmp_path / "spectral.jsonl", tmp_path / "spectral.from-10-1.jsonl"
    written(path, 0, 5).append(measurement(10), [EVENT | {"step": 10}])
    journal = Journal(path, HEADER, resume_step=10)
    journal.append(measurement(15))
    assert everything(tmp_path) == {"spectral.jsonl": [0, 5, 10, 15]}
    journal = Journal(path, HEADER, resume_step=5)
    assert told(journal) == [f"lines of {path} after step 5 are kept in {beside}"]
    assert everything(tmp_path) == {"spectral.from-10-1.jsonl": [10, 15], "spectral.jsonl": [0, 5]}
    assert (len(read_events(beside)), len(read_events(path))) == (1, 0)
    journal.append(measurement(10, norm=2.0001))
    assert beside.exists()
    journal.append(measurement(15))
    assert everything(tmp_path) == {"spectral.jsonl": [0, 5, 10, 15]}


def test_a_run_that_takes_another_way_after_a_resume_keeps_both(tmp_path: Path):
    path = tmp_path / "spectral.jsonl"
    written(path, 0, 5, 10)
    for norm in (3.0, 4.0):
        journal = Journal(path, HEADER, resume_step=0)
        for step in (5, 10):
            journal.append(measurement(step, norm=norm))
    assert [record["layers"][0]["mlp_norm"] for record in measured(journal)] == [2.0, 4.0, 4.0]
    names = ["spectral.from-5-1.jsonl", "spectral.from-5-2.jsonl"]
    norms = [[record["layers"][0]["mlp_norm"] for record in read_journal(tmp_path / name)[1]] for name in names]
    assert norms == [[2.0, 2.0], [3.0, 3.0]]


DAMAGE = {
    "cut in the middle": lambda line: line[:50] + b"\n",
    "bytes that are no text": lambda line: b"\xff\xfe\x00garbage\n",
    "a name that is no text": lambda line: line.replace("blöck".encode(), b"bl\xffck"),
    "nothing but NUL": lambda line: b"\0" * 512 + b"\n",
    "two objects": lambda line: line[:-1] + line,
    "no object": lambda line: b"[1, 2]\n",
    "nested without end": lambda line: b"[" * 100_000 + b"\n",
    "as long as no line is": lambda line: b" " * LONGEST + line,
    "a number that is too long": lambda line: line.replace(b"2.0", b"1" * 5000),
}
HARMLESS = {
    "line ends of another system": lambda line: line[:-1] + b"\r\n",
    "NUL bytes in front": lambda line: b"\0" * 99 + line,
    "an empty line": lambda line: b"\n" + line + b"  \n",
    "an entry without a step": lambda line: line + b'{"weather": "fine"}\n',
    "an entry of an unknown kind": lambda line: line + b'{"weather": "fine", "step": "soon"}\n',
}


@pytest.mark.parametrize("what", [*DAMAGE, *HARMLESS])
def test_one_bad_line_hides_one_line(tmp_path: Path, what: str):
    path = tmp_path / "spectral.jsonl"
    written(path, 0, 5, 10, 15)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = (DAMAGE | HARMLESS)[what](lines[2])
    path.write_bytes(b"".join(lines))
    seen = [0, 10, 15] if what in DAMAGE else [0, 5, 10, 15]
    damaged = [3] if what in DAMAGE else []
    assert steps(path) == list(History.read(path).steps) == seen
    assert list(History.read(path).damaged) == damaged
    journal = Journal(path, HEADER, resume_step=15)
    assert told(journal) == [f"line {number} of {path} is damaged" for number in damaged]
    journal.append(measurement(20))
    assert steps(path) == list(History.read(path).steps) == [*seen, 20]
    assert list(History.read(path).damaged) == damaged  # it is still there, for whoever can mend it


def test_a_header_in_front_of_which_an_editor_has_put_a_mark_is_a_header(tmp_path: Path):
    path = tmp_path / "spectral.jsonl"
    written(path, 0)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_journal(path)[0]["linearization"] == "circuit"
    assert steps(Journal(path, HEADER, resume_step=0)) == [0]


def test_a_damaged_header_hides_the_header(tmp_path: Path):
    path = tmp_path / "spectral.jsonl"
    written(path, 0).append(measurement(5), [EVENT, ACTION])
    path.write_bytes(b"\0\0\0" + path.read_bytes()[20:])
    history = History.read(path)
    assert (history.header, history.steps, list(history.damaged)) == ({}, (0, 5), [1])
    assert read_journal(path)[0] == {}
    assert [len(read(path)) for read in (read_events, read_actions)] == [1, 1]


# Another file has the name.


@pytest.mark.parametrize("resume_step", [None, 5])
@pytest.mark.parametrize(
    ("content", "name", "why"),
    [
        (b"", "damaged", "is empty"),
        (b'{"loss": 1}\n', "damaged", "does not begin with the header"),
        (b"[1]\n", "damaged", "does not begin with the header"),
        (b'{"lightning_spectral": 1, "lineariz', "damaged", "does not begin with the header"),
        (b"\x7fELF\x00\xff", "damaged", "does not begin with the header"),
        (b'{"lightning_spectral": 1}\n', "damaged", "does not say its linearization"),
        (b'{"lightning_spectral": 1, "linearization": "../x"}\n', "damaged", "does not say its linearization"),
        (b'{"lightning_spectral": 1, "linearization": ["circuit"]}\n', "damaged", "does not say its linearization"),
        (b'{"lightning_spectral": 2}\n', "newer", "is of format '2'"),
        (None, "damaged", "is not a file"),
    ],
    ids=range(10),
)
def test_what_is_no_journal_is_moved_aside_and_never_overwritten(
    tmp_path: Path, content: bytes | None, name: str, why: str, resume_step: int | None
):
    path = tmp_path / "spectral.jsonl"
    for number in (1, 2):
        if content is None:
            (path / str(number)).mkdir(parents=True)
        else:
            path.write_bytes(content)
        journal = Journal(path, HEADER, resume_step=resume_step)
        aside = tmp_path / f"spectral.{name}-{number}.jsonl"
        (news,) = journal.take_news()
        assert news.grave
        assert news.text.startswith(f"{path} {why}")
        assert f"It is kept as {aside}, and a new file begins" in news.text
        journal.append(measurement(10))
        assert steps(path) == [10]
        assert aside.is_dir() if content is None else aside.read_bytes() == content
        path.unlink()


def test_a_new_run_leaves_the_file_of_the_run_before(tmp_path: Path):
    path = tmp_path / "spectral.jsonl"
    for number in range(3):
        written(path, number)
    assert everything(tmp_path) == {
        "spectral.earlier-1.jsonl": [0],
        "spectral.earlier-2.jsonl": [1],
        "spectral.jsonl": [2],
    }
    assert steps(Journal(path, HEADER)) == []


@pytest.mark.parametrize(("before", "now", "goes_on"), [("a", "a", True), ("a", "b", False), ("", "b", True)])
def test_a_file_of_another_run_does_not_go_on(tmp_path: Path, before: str, now: str, goes_on: bool):
    path = tmp_path / "spectral.jsonl"
    written(path, 0, run=before)
    journal = Journal(path, HEADER | {"run": now}, resume_step=5)
    assert steps(journal) == ([0] if goes_on else [])
    assert steps(path if goes_on else tmp_path / "spectral.earlier-1.jsonl") == [0]


def test_another_linearization_moves_the_old_file_aside(tmp_path: Path):
    path = tmp_path / "spectral.jsonl"
    Journal(path, HEADER).append(measurement(0))
    assert steps(Journal(path, {"linearization": "paper"}, resume_step=10)) == []
    assert len(read_journal(tmp_path / "spectral-circuit.jsonl")[1]) == 1


@pytest.mark.parametrize("order", ["cpcp", "cpcpcp", "ccpppcpc", "pccp"])
@pytest.mark.parametrize("resumes", [True, False])
def test_both_series_are_kept_however_often_the_linearization_changes(tmp_path: Path, order: str, resumes: bool):
    path = tmp_path / "spectral.jsonl"
    for number, letter in enumerate(order):
        linearization = {"c": "circuit", "p": "paper"}[letter]
        journal = Journal(path, {"linearization": linearization}, resume_step=10 * number if resumes else None)
        journal.append(measurement(10 * number, linearization))
    series: dict[str, list[int]] = {"circuit": [], "paper": []}
    for file in tmp_path.iterdir():
        (linearization,) = {record["linearization"] for record in read_journal(file)[1]}
        series[linearization] += steps(file)
    for letter, linearization in (("c", "circuit"), ("p", "paper")):
        assert sorted(series[linearization]) == [10 * number for number, this in enumerate(order) if this == letter]
    if resumes:  # each in one file
        other = {"c": "paper", "p": "circuit"}[order[-1]]
        assert {file.name for file in tmp_path.iterdir()} == {"spectral.jsonl", f"spectral-{other}.jsonl"}


# The disk.


def test_a_full_disk_costs_nothing_once_it_has_room_again(tmp_path: Path):
    path = tmp_path / "spectral.jsonl"
    journal = written(path, 0)
    with full_disk(path.stat().st_size + 100):
        for step in (5, 10):
            journal.append(measurement(step), [EVENT])
        assert steps(path) == [0]
        assert steps(journal) == [0, 5, 10]  # to be drawn
    (news,) = journal.take_news()
    assert news.grave
    assert news.text.startswith(f"writing {path} failed (OSError: [Errno 27] File too large); training goes on")
    journal.append(measurement(15))
    assert steps(path) == [0, 5, 10, 15]
    assert len(read_events(path)) == 2
    assert told(journal) == [f"{path} is written again, with the lines that were kept"]


@pytest.mark.parametrize("resume_step", [None, 5])
def test_a_file_that_cannot_be_begun_is_begun_later(tmp_path: Path, resume_step: int | None):
    folder = tmp_path / "logs"
    path = folder / "spectral.jsonl"
    if resume_step is not None:
        written(path, 0, 5, 10)
    with full_disk(20):
        journal = Journal(path, HEADER, resume_step=resume_step)
        for step in (10, 15):
            journal.append(measurement(step))
        assert steps(journal) == [10, 15]
    assert len(told(journal)) == 1
    assert list(everything(folder)) == ([] if resume_step is None else ["spectral.jsonl"])
    journal.append(measurement(20))
    kept = [] if resume_step is None else [0, 5]
    assert steps(path) == [*kept, 10, 15, 20]


def test_a_folder_that_is_away_for_a_while_gets_all_lines(tmp_path: Path):
    path = tmp_path / "disk" / "logs" / "spectral.jsonl"
    journal = written(path, 0)
    path.parents[1].rename(tmp_path / "away")
    journal.append(measurement(5))
    assert not path.parents[1].exists()  # an empty mount point is no place for a file
    (tmp_path / "away").rename(path.parents[1])
    journal.append(measurement(10))
    assert everything(path.parent) == {"spectral.jsonl": [0, 5, 10]}


def test_a_file_that_somebody_empties_is_left_to_them(tmp_path: Path):
    path = tmp_path / "spectral.jsonl"
    journal = written(path, 0)
    path.write_text("")
    journal.append(measurement(5))
    assert (path.read_text(), steps(tmp_path / "spectral.other-1.jsonl"), steps(journal)) == ("", [5], [5])


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_a_file_that_somebody_removes_begins_anew(tmp_path: Path, levels: int):
    path = tmp_path / "logs" / "version_0" / "spectral.jsonl"
    journal = written(path, 0)
    path.unlink()
    if levels:
        shutil.rmtree(path.parents[levels - 1])
    journal.append(measurement(5), [EVENT])
    journal.append(measurement(10))
    journal.close()
    assert everything(path.parent) == {"spectral.jsonl": [5, 10]}
    assert History.read(path).header["linearization"] == "circuit"
    assert any("is gone; this run goes on in a new file" in text for text in told(journal))


def test_what_is_kept_in_memory_is_bounded_and_what_is_lost_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(room, "MOST_KEPT", 3000)
    (tmp_path / "blocked").write_text("")
    journal = Journal(tmp_path / "blocked" / "spectral.jsonl", HEADER)
    for step in range(20):
        journal.append(measurement(step))
    kept = steps(journal)
    assert kept == list(range(20 - len(kept), 20))
    assert 1 < len(kept) < 10
    journal.close()
    assert told(journal)[1:] == [f"20 lines were never written to {journal.path}"]


# Two runs in one folder.


def test_two_runs_in_one_folder_leave_each_other_alone(tmp_path: Path):
    path = tmp_path / "spectral.jsonl"
    first = written(path, 0)
    second = written(path, 100)
    for step in (1, 2):
        first.append(measurement(step))
        second.append(measurement(100 + step))
    third = Journal(path, HEADER, resume_step=101)  # of the second
    third.append(measurement(202))
    second.append(measurement(103))
    third.append(measurement(102))
    assert sorted(everything(tmp_path).values()) == [[0, 1, 2], [100, 101, 202, 102], [102, 103]]
    assert [steps(journal)[-1] for journal in (first, second, third)] == [2, 103, 102]


def test_many_runs_at_once_lose_no_line(tmp_path: Path):
    path, count = tmp_path / "spectral.jsonl", 10

    def run(number: int) -> None:
        journal = Journal(path, HEADER)
        for step in range(count):
            journal.append(measurement(100 * number + step))
        journal.close()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = list(everything(tmp_path).values())
    assert sorted(step for series in found for step in series) == [100 * n + s for n in range(4) for s in range(count)]
    assert all(len({step // 100 for step in series}) <= 1 for series in found)  # and none mixes two runs


# What a line is.


def test_every_line_is_json_by_the_standard(tmp_path: Path):
    path, nan, inf = tmp_path / "spectral.jsonl", float("nan"), float("inf")
    layer = LayerMeasurement(0, "half \udc80", nan, 1.0, nan, inf, error_bound=inf, token_residual=nan)
    layer = replace(layer, functional=FunctionalMeasurement(update_ratio=inf, update_cosine=nan))
    coming = {"at": 9.0, "earliest": 7.0, "latest": inf}
    journal = Journal(path, HEADER | {"safe_zone": (0.5, inf), "odd": {1, 2}, "scalar": np.float32(0.5)})
    journal.append(Measurement(0, "circuit", (layer,)), [EVENT | {"forecast": coming}, ACTION | {"ratio": nan}])

    def refuse(word: str) -> None:
        raise AssertionError(word)

    header, entry, event, _ = [json.loads(line, parse_constant=refuse) for line in path.read_bytes().splitlines()]
    assert header["scalar"] == 0.5
    (found,) = entry["layers"]
    assert found["name"] == layer.name
    assert [found[key] for key in ("mlp_norm", "mlp_scale", "attention_scale", "error_bound", "ratio")] == [None] * 5
    assert found["reason"] == "mlp: its residual scale is nan; attention: its residual scale is inf"
    assert event["forecast"]["latest"] is None
    assert read_events(path)[0]["forecast"] == coming
    history = History.read(path)
    assert history.damaged == {}
    assert history.events[0].forecast == Forecast(9.0, 7.0, inf)
    assert math.isnan(history.measurements[0].layers[0].mlp_scale)


@pytest.mark.parametrize("text", ["", "not json\n", "[1]\n", '{"step": 0}\n'])
def test_other_files_are_refused(tmp_path: Path, text: str):
    path = tmp_path / "other.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=r"other.jsonl' does not begin with the header"):
        read_journal(path)


def test_the_file_says_when_and_by_what_it_was_written(tmp_path: Path):
    began = time.time()
    journal = Journal(tmp_path / "spectral.jsonl", HEADER)
    for step in (0, 5):
        journal.append(measurement(step))
    history = History.read(tmp_path / "spectral.jsonl")
    assert history.header["versions"]["python"] == platform.python_version()
    assert history.header["versions"]["torch"] == version("torch")
    assert list(history.times) == [0, 5]
    assert began - 1 < history.times[0] <= history.times[5] < time.time() + 1


@pytest.mark.parametrize("wrong", [None, "noon", -1, 1e18, [1]])
def test_a_wrong_time_spoils_no_measurement(tmp_path: Path, wrong: object):
    entry = measurement(0).to_dict() | {"time": wrong}
    (tmp_path / "spectral.jsonl").write_text(json.dumps(entry) + "\n")
    history = History.read(tmp_path / "spectral.jsonl")
    assert (history.steps, history.times, history.damaged) == ((0,), {}, {})


def test_a_model_is_described_by_its_class_and_size():
    tied = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    tied[1].weight = tied[0].weight
    assert described_model(tied) == {"name": "Sequential", "parameters": 9}
    assert described_model(nn.LazyLinear(3)) == {"name": "LazyLinear", "parameters": None}
