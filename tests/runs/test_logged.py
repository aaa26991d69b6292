"""Loss and learning rate beside the file of a run: which columns, which steps, which files."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_spectral.runs.logged import MOST_POINTS, Curve, read_logged


def journal_of(folder: Path) -> Path:
    return folder / "spectral.jsonl"


def log(logger: CSVLogger | TensorBoardLogger, *, several: int = 1) -> Path:
    """Log three losses as Lightning does, where a batch takes several steps of an optimizer."""
    for step in range(6):
        logger.log_metrics({"train/loss": 3.0 - step / 10, "lr-AdamW": 1e-3, "val_acc": 0.5}, step=step)
        if step % 2 == 0:
            logger.log_metrics({"spectral/ratio_max": 1.0}, step=step)
            logger.log_metrics({"val_loss": math.nan if step == 4 else 2.0}, step=step)
    logger.save()
    logger.finalize("success")
    return journal_of(Path(logger.log_dir))


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
@pytest.mark.parametrize("steps", [(0, 2, 4), (0, 4, 8), (0, 2)])
def test_what_lightning_logs_is_read_at_the_steps_of_the_run(tmp_path: Path, kind: type, steps: tuple[int, ...]):
    logged = read_logged(log(kind(tmp_path, name="a", version="")), steps)
    assert [curve.name for curve in logged.losses] == ["train/loss", "val_loss"]
    assert [curve.name for curve in logged.rates] == ["lr-AdamW"]
    train, val = logged.losses
    np.testing.assert_allclose(train.values, 3.0 - np.arange(6) / 10, rtol=1e-6)
    # Two steps of an optimizer in a batch; without as many measurements as logged ones, nothing is known of that.
    wanted = np.array([0, 2, 4, 6, 8, 9]) if steps == (0, 4, 8) else np.arange(6)
    np.testing.assert_allclose(train.steps, wanted)
    assert (train.broke_at, val.broke_at) == (None, int(wanted[4]))
    assert logged.missing is None


def test_a_table_comes_before_event_files(tmp_path: Path):
    journal = log(CSVLogger(tmp_path, name="a", version=""))
    (journal.parent / "events.out.tfevents.1").write_bytes(b"broken")
    assert read_logged(journal, (0,)).losses


def test_without_the_package_for_event_files_the_page_says_what_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "events.out.tfevents.1").write_bytes(b"")
    assert read_logged(journal_of(tmp_path), (0,)).missing is None
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    logged = read_logged(journal_of(tmp_path), (0,))
    assert (logged.losses, logged.rates) == ((), ())
    assert logged.missing is not None
    assert logged.missing.endswith("pip install tensorboard")


def test_odd_tables_are_read_as_far_as_they_go(tmp_path: Path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss,loss\x00x,closs\n0,1.0,2\n1,x,\n,3\n2,inf\nnan,4\n3,5.0,6,7,8,9\n2,2.5,1\n4,")
    losses = {curve.name: curve for curve in read_logged(journal_of(tmp_path), (0,)).losses}
    assert losses["loss"].steps.tolist() == [0, 2, 3]
    assert losses["loss"].values.tolist() == [1.0, 2.5, 5.0]
    path.write_bytes(b"")
    assert read_logged(journal_of(tmp_path), (0,)).losses == ()


def test_thinning_keeps_every_spike():
    values = np.ones(100_003)
    values[[7, 50_000, 100_002]] = 9.0, -3.0, 5.0
    values[60_000:60_500] = np.nan
    curve = Curve("loss", np.arange(100_003.0), values).thinned()
    assert len(curve.steps) <= MOST_POINTS
    assert (np.diff(curve.steps) > 0).all()
    assert {(7.0, 9.0), (50_000.0, -3.0), (100_002.0, 5.0)} <= set(zip(curve.steps, curve.values, strict=True))
    assert np.isnan(curve.values).any()
