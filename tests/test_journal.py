"""The file of a run survives crashes, resumes and changes of mind."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_spectral.errors import ConfigurationError
from lightning_spectral.journal import Journal, read_journal
from lightning_spectral.records import LayerMeasurement, Measurement

HEADER = {"linearization": "circuit"}


def measurement(step: int) -> Measurement:
    return Measurement(step, "circuit", (LayerMeasurement(0, "blöck", 2.0, 1.0), LayerMeasurement(1, "b", None, 1.0)))


def steps(journal: Journal) -> list[int]:
    return [record["step"] for record in journal.records()]


@pytest.mark.parametrize("in_memory", [True, False])
def test_what_is_appended_is_read_back(tmp_path: Path, in_memory: bool):
    journal = Journal(None if in_memory else tmp_path / "new" / "spectral.jsonl", HEADER)
    for step in (0, 5):
        journal.append(measurement(step))
    assert journal.records() == [measurement(step).to_dict() | {"safe_zone": [0.5, 2.0]} for step in (0, 5)]


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
    journal.append(measurement(10))
    assert steps(journal) == [0, 10]


def test_a_resume_drops_what_will_be_measured_again(tmp_path: Path):
    path = tmp_path / "spectral.jsonl"
    journal = Journal(path, HEADER)
    for step in (0, 5, 10, 15):
        journal.append(measurement(step))
    assert steps(Journal(path, HEADER, resume_step=10)) == [0, 5, 10]


def test_a_new_run_begins_a_new_file(tmp_path: Path):
    Journal(tmp_path / "spectral.jsonl", HEADER).append(measurement(0))
    assert steps(Journal(tmp_path / "spectral.jsonl", HEADER)) == []


def test_another_linearization_moves_the_old_file_aside(tmp_path: Path):
    path = tmp_path / "spectral.jsonl"
    Journal(path, HEADER).append(measurement(0))
    assert steps(Journal(path, {"linearization": "paper"}, resume_step=10)) == []
    assert len(read_journal(tmp_path / "spectral-circuit.jsonl")[1]) == 1


@pytest.mark.parametrize("text", ["", "not json\n", "[1]\n", '{"step": 0}\n'])
def test_other_files_are_refused(tmp_path: Path, text: str):
    path = tmp_path / "other.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=r"other.jsonl' does not begin with the header"):
        read_journal(path)
