"""Send a figure to a logger that takes pictures. The methods of the logger decide, not the name of its class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["send_figure"]


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
