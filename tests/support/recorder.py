"""A logger that keeps what it is given."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.loggers import Logger


class Recorder(Logger):
    """A logger that remembers what it is given, and takes pictures like Weights & Biases."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, dict[str, float]]] = []
        self.pictures: list[tuple[str, int]] = []

    name = "recorder"
    version = "0"
    save_dir = None

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.calls.append((-1 if step is None else step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_image(self, key: str, images: list[Any], step: int) -> None:
        assert len(images) == 1
        self.pictures.append((key, step))

    @property
    def measured(self) -> list[tuple[int, dict[str, float]]]:
        return [(step, values) for step, values in self.calls if any(key.startswith("spectral") for key in values)]
