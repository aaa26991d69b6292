"""Every outlet fails alone: the measurement is taken, the law acts, and the other outlets get what is theirs."""

from __future__ import annotations

import io
import logging
import shutil
import sys
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from journals import read_actions, read_journal
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from steered import unbalanced
from tiny_run import LitGPT, fit

from lightning_spectral import History, SpectralMonitor
from lightning_spectral.errors import ConfigurationError
from lightning_spectral.linalg import RandomizedSVD
from lightning_spectral.watch.telling import inform, warn

STEPS = [0, 2, 4, 6]
pytestmark = pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty")


class Keeping(Logger):
    """Keeps what it gets."""

    name, version = "keeping", "0"

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__()
        self.folder, self.seen, self.pictures = folder, [], []

    @property
    def log_dir(self) -> str | None:
        return None if self.folder is None else str(self.folder)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if "spectral/ratio_max" in metrics:
            self.seen.append(step)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_image(self, key: str, images: Sequence[Any], step: int | None = None) -> None:
        self.pictures.append(key)


class Full(Keeping):
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if "spectral/ratio_max" in metrics:
            raise TimeoutError("the server does not answer")


class NoPictures(Keeping):
    def log_image(self, *args: Any, **kwargs: Any) -> None:
        raise TimeoutError("the server does not answer")


class Closed(Keeping):
    log_image = None

    @property
    def experiment(self) -> Any:
        if self.seen:
            raise RuntimeError("the run is closed")
        return None


class Homeless(Keeping):
    @property
    def log_dir(self) -> str | None:
        raise NotImplementedError("ask the server")


class Greedy(Keeping):
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        metrics.clear()  # type: ignore[attr-defined]


class FrozenMetrics(Trainer):
    @property
    def callback_metrics(self) -> Any:
        return types.MappingProxyType(super().callback_metrics)


def raising(module: LitGPT, *args: Any, **kwargs: Any) -> None:
    if not str(args[0]).startswith("train/"):
        raise KeyError(args[0])


def own(module: LitGPT, name: str, value: Any) -> None:
    LightningModule.log(module, f"gpt/{name}", value)


class Removing(Callback):
    """Removes the folder of the run while it is going."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 3:
            shutil.rmtree(self.folder)


def told(action: Callable[[], Any]) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        result = action()
    return result, [text for warning in warned if "SpectralMonitor" in (text := str(warning.message))]


def steered(folder: Path, loggers: Sequence[Logger], module: LitGPT, *others: Callback, **flags: Any) -> Trainer:
    monitor = SpectralMonitor(2, True, geometry=False, on_error="raise")
    return fit(folder, [*others, monitor], module=module, logger=loggers, max_steps=6, **flags)


def steps(path: Path) -> list[int]:
    return [record["step"] for record in read_journal(path)[1]]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> LitGPT:
    module = unbalanced()
    steered(tmp_path_factory.mktemp("healthy"), [Keeping()], module)
    return module


BROKEN: dict[str, tuple[type[Keeping], str]] = {
    "metrics": (Full, "logging to Full (TimeoutError: the server does not answer)"),
    "pictures": (NoPictures, "sending the picture to NoPictures (TimeoutError: the server does not answer)"),
    "experiment": (Closed, "sending the picture to Closed (RuntimeError: the run is closed)"),
    "folder": (Homeless, "asking Homeless for its folder (NotImplementedError: ask the server)"),
    "values": (Greedy, ""),
}


def test_everything_breaks_at_once_and_the_run_is_the_run(
    tmp_path: Path, healthy: LitGPT, monkeypatch: pytest.MonkeyPatch
):
    """Loggers, callback metrics, the module's own log, the picture, the journal; and warnings are errors elsewhere."""
    monkeypatch.setattr(tiny_run, "Trainer", FrozenMetrics)
    monkeypatch.setattr(LitGPT, "log", raising)
    (tmp_path / "run" / "spectral.png").mkdir(parents=True)
    (tmp_path / "run" / "spectral.jsonl").write_text("")
    good, module = Keeping(tmp_path / "run"), unbalanced()
    bad = [kind() for kind, _ in BROKEN.values()]
    trainer, said = told(lambda: steered(tmp_path, [*bad, good], module))
    assert trainer.global_step == 6
    assert module.losses == healthy.losses
    assert steps(tmp_path / "run" / "spectral.jsonl") == good.seen == STEPS
    assert read_actions(tmp_path / "run" / "spectral.jsonl")
    assert good.pictures == ["spectral/heatmap"]
    wanted = [message for _, message in BROKEN.values() if message]
    wanted += ["publishing to callback_metrics (AttributeError: 'mappingproxy' object has no attribute 'update')"]
    wanted += ["drawing (IsADirectoryError: [Errno 21] Is a directory: '{}')".format(tmp_path / "run" / "spectral.png")]
    kept = f"{tmp_path / 'run' / 'spectral.jsonl'} is empty. It is kept as"
    assert sum(kept in text for text in said) == 1
    failures = [f"SpectralMonitor failed in {what}; training goes on" for what in wanted]
    assert sorted(text for text in said if kept not in text) == sorted(failures)  # each of them once


@pytest.mark.parametrize("log", [own, raising])
def test_the_bar_gets_its_numbers_past_a_log_of_the_users_own(
    tmp_path: Path, healthy: LitGPT, log: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(LitGPT, "log", log)
    module, bar = unbalanced(), []

    class Look(Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            bar.append(sorted(trainer.progress_bar_metrics))

    trainer, said = told(lambda: steered(tmp_path, [Keeping()], module, Look()))
    assert said == []
    assert module.losses == healthy.losses
    assert bar[-1] == ["ρ"]
    assert "ρ" not in trainer.callback_metrics


@pytest.mark.parametrize("how", ["no place", "removed", "in memory"])
def test_without_its_file_the_run_is_watched_steered_logged_and_drawn(tmp_path: Path, healthy: LitGPT, how: str):
    folder = tmp_path / "run"
    logger, module = Keeping(None if how == "in memory" else folder), unbalanced()
    if how == "no place":
        folder.write_text("a file where the folder should be")
    others = [Removing(folder)] if how == "removed" else []
    trainer, said = told(lambda: steered(tmp_path, [logger], module, *others))
    assert (trainer.global_step, module.losses) == (6, healthy.losses)
    assert (logger.seen, logger.pictures) == (STEPS, ["spectral/heatmap"])
    if how == "in memory":
        assert said == []
    elif how == "removed":
        (message,) = said
        assert "spectral.jsonl is gone; this run goes on in a new file" in message
        assert History.read(folder / "spectral.jsonl").steps[-1] == 6
        assert (folder / "spectral.png").exists()
    else:
        first, last, picture = said
        assert "spectral.jsonl failed (FileExistsError" in first
        assert "training goes on, and lines are kept until they can be written" in first
        assert "lines were never written to" in last
        assert "failed in drawing (NotADirectoryError" in picture


@pytest.mark.parametrize("broken", [None, types.ModuleType("matplotlib.figure")], ids=["missing", "broken"])
def test_without_matplotlib_the_run_ends_as_it_should(
    tmp_path: Path, broken: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", broken)
    _, said = told(lambda: fit(tmp_path, SpectralMonitor(2), max_steps=2))
    assert steps(tmp_path / "spectral.jsonl") == [0, 2]
    if broken is None:
        assert said == []
        assert "no heatmap; drawing needs matplotlib: pip install" in caplog.text
    else:
        assert len(said) == 1
        assert "failed in drawing (ImportError: cannot import name 'Figure'" in said[0]
    assert "spectral ratio ‖mlp‖₂/‖attention‖₂" in caplog.text  # the table


def test_a_picture_needs_no_screen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import matplotlib as mpl

    monkeypatch.delenv("DISPLAY", raising=False)
    with mpl.rc_context({"backend": "TkAgg", "savefig.format": "pdf"}):
        _, said = told(lambda: fit(tmp_path, SpectralMonitor(2), max_steps=2))
    assert said == []
    assert (tmp_path / "spectral.png").read_bytes().startswith(b"\x89PNG")


class Close(Callback):
    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        trainer.loggers[0].experiment.close()


def test_a_closed_tensorboard_and_a_rich_bar_are_no_trouble(tmp_path: Path):
    loggers = [TensorBoardLogger(tmp_path / "tb"), CSVLogger(tmp_path, name="", version="")]
    callbacks = [Close(), RichProgressBar(), SpectralMonitor(2)]
    trainer, said = told(lambda: fit(tmp_path, callbacks, logger=loggers, max_steps=2, enable_progress_bar=True))
    assert (trainer.global_step, said) == (2, [])
    (journal,) = tmp_path.rglob("spectral.jsonl")
    assert steps(journal) == [0, 2]


def test_of_several_loggers_the_first_with_a_folder_gives_it(tmp_path: Path):
    remote, local = Keeping(), CSVLogger(tmp_path, name="", version="")
    bucket = Keeping(Path("s3://bucket/run"))
    fit(tmp_path, SpectralMonitor(2), logger=[remote, bucket, local], max_steps=2)
    assert steps(tmp_path / "spectral.jsonl") == [0, 2]
    assert not Path("s3:").exists()


class Anywhere(Keeping):
    """Knows only where the runs of a user are: here."""

    log_dir, save_dir = None, ""


def test_a_logger_of_many_runs_gives_each_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    fit(tmp_path, SpectralMonitor(2), logger=Anywhere(), max_steps=2)
    assert steps(tmp_path / "keeping" / "0" / "spectral.jsonl") == [0, 2]


class Odd(RandomizedSVD):
    """A solver that finds that the user has made a mistake, in the middle of a run."""

    calls = 0

    def compute(self, *args: Any) -> Any:
        object.__setattr__(self, "calls", self.calls + 1)
        if self.calls == 2:
            raise ConfigurationError("line one\nline two")
        return super().compute(*args)


def test_a_mistake_that_shows_only_in_the_middle_of_a_run_does_not_end_it(tmp_path: Path):
    trainer, said = told(lambda: fit(tmp_path, SpectralMonitor(2, solver=Odd()), max_steps=4))
    assert (trainer.global_step, steps(tmp_path / "spectral.jsonl")) == (4, [0, 4])
    assert said == ["SpectralMonitor failed in measuring (ConfigurationError: line one\nline two); training goes on"]
    with pytest.raises(ConfigurationError, match="line one"):
        fit(tmp_path, SpectralMonitor(2, solver=Odd(), on_error="raise"), max_steps=4)


# Messages.


@pytest.mark.parametrize(
    ("filters", "logged"),
    [
        ([{}], True),  # the first line of many scripts and notebooks: filterwarnings("ignore")
        ([{"category": UserWarning}], True),
        ([{"category": DeprecationWarning}, {}], True),
        ([{"message": "heard"}], False),
        ([{"module": ".*"}], False),
        ([{"category": DeprecationWarning}], False),
    ],
    ids=str,
)
def test_who_ignores_the_warnings_of_others_hears_ours(
    filters: list[dict[str, Any]], logged: bool, caplog: pytest.LogCaptureFixture
):
    lightning = logging.getLogger("lightning.pytorch")
    before = lightning.level
    lightning.setLevel(logging.ERROR)  # as many do, too
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for given in reversed(filters):
                warnings.filterwarnings("ignore", **given)
            warn("heard")
    finally:
        lightning.setLevel(before)
    records = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert records == ([("WARNING", "heard")] if logged else [])
    assert [str(item.message) for item in seen] == (["heard"] if filters == [{"category": DeprecationWarning}] else [])


def test_who_ignores_warnings_and_disables_logging_hears_nothing(caplog: pytest.LogCaptureFixture):
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warn("heard")
    finally:
        logging.disable(logging.NOTSET)
    assert not caplog.records


def test_messages_can_be_muted_by_the_name_of_the_package(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    package = logging.getLogger("lightning_spectral")
    inform("heard")
    with pytest.warns(UserWarning, match="heard too"):
        warn("heard too")
    package.setLevel(logging.ERROR)
    try:
        inform("muted")
        warn("muted")
    finally:
        package.setLevel(logging.NOTSET)
    assert [record.name for record in caplog.records if record.getMessage() == "heard"] == ["lightning_spectral"]
    assert "muted" not in caplog.text
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    try:
        inform("muted")
    finally:
        logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
    assert "muted" not in caplog.text


def test_nobody_to_talk_to_is_no_failure(monkeypatch: pytest.MonkeyPatch):
    closed = io.StringIO()
    closed.close()
    handler = logging.StreamHandler(closed)
    package = logging.getLogger("lightning_spectral")
    package.addHandler(handler)
    monkeypatch.setattr(sys, "stderr", closed)
    try:
        inform("into the void")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            monkeypatch.setattr(warnings, "showwarning", lambda message, *args: closed.write(str(message)))
            warn("into the void")
    finally:
        package.removeHandler(handler)
    with pytest.raises(UserWarning, match="not swallowed"):  # warnings are errors here
        warn("not swallowed")
