"""Send figures and events to loggers that take them. The methods of the logger decide, not the name of its class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_spectral.records import Event

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["send_alert", "send_event", "send_figure"]

_LEVELS = {"note": "INFO", "warning": "WARN", "failure": "ERROR"}


def send_figure(logger: Any, figure: Figure, tag: str, step: int) -> bool:
    """Log a figure once.

    Args:
        logger: A Lightning logger, or an object with its methods.
        figure: The figure.
        tag: Name of the figure, such as ``"spectral/heatmap"``.
        step: Index on the logger's axis.

    Returns:
        Whether the logger takes pictures.
    """
    if callable(log_image := getattr(logger, "log_image", None)):  # Weights & Biases
        log_image(key=tag, images=[figure], step=step)
        return True
    experiment = getattr(logger, "experiment", None)
    if callable(add_figure := getattr(experiment, "add_figure", None)):  # TensorBoard
        add_figure(tag, figure, global_step=step, close=False)
        return True
    if callable(log_figure := getattr(experiment, "log_figure", None)):
        if (run_id := getattr(logger, "run_id", None)) is not None:  # MLflow keeps pictures as files of a run
            log_figure(run_id, figure, f"{tag}.png")
        else:  # Comet
            log_figure(figure_name=tag, figure=figure, step=step)
        return True
    return False


def send_event(logger: Any, event: Event, tag: str, step: int) -> bool:
    """Send an event once.

    Args:
        logger: A Lightning logger, or an object with its methods.
        event: The event.
        tag: Name of its text, such as ``"spectral/events"``.
        step: Index on the logger's axis.

    Returns:
        Whether the logger takes events.
    """
    experiment = getattr(logger, "experiment", None)
    if send_alert(experiment, event):
        return True
    if callable(add_text := getattr(experiment, "add_text", None)):  # TensorBoard
        add_text(tag, event.message, global_step=step)
        return True
    return False


def send_alert(service: Any, event: Event) -> bool:
    """Send an event as an alert to a service that tells people of alerts.

    Args:
        service: A run of Weights & Biases, or the module of that package or of Trackio.
        event: The event.

    Returns:
        Whether the service has alerts.
    """
    if not callable(alert := getattr(service, "alert", None)):
        return False
    levels = getattr(service, "AlertLevel", None)
    level = _LEVELS[event.level]
    title = f"{event.level} at step {event.step}: {event.name.replace('_', ' ')}"
    alert(title=title, text=event.message, level=level if levels is None else levels[level])
    return True
