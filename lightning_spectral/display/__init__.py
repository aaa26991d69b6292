"""What records look like, as text and as figures: the ground floor, since records draw themselves.

Nothing here needs a record to exist. Drawing needs the extra ``plot``; importing this package does not.
"""

from lightning_spectral.display.heatmap import heatmap_figure
from lightning_spectral.display.profile import profile_figure
from lightning_spectral.display.table import measurement_table

__all__ = ["heatmap_figure", "measurement_table", "profile_figure"]
