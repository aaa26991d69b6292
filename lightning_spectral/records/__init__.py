"""The frozen records that travel between the rooms of this package.

A model is described by :class:`ResidualBlock`, :class:`Branch`, :class:`Path` and :class:`Factor`, which hold names and
layouts but never a tensor: they survive pickling, deepcopy, wrapping in DDP and a change of device. A measurement is
described by :class:`Measurement` and :class:`LayerMeasurement`, which hold plain numbers.
"""

from lightning_spectral.records.blocks import (
    Alternative,
    Blocks,
    Branch,
    BranchKind,
    End,
    Factor,
    FactorRole,
    Path,
    Projection,
    ResidualBlock,
    Scores,
    StreamAt,
    alternatives,
)
from lightning_spectral.records.comparison import Comparison, compare
from lightning_spectral.records.events import Event, Forecast
from lightning_spectral.records.measurements import (
    FunctionalMeasurement,
    LayerMeasurement,
    Linearization,
    Measurement,
    OutputMeasurement,
    WeightSignals,
)

__all__ = [
    "Alternative",
    "Blocks",
    "Branch",
    "BranchKind",
    "Comparison",
    "End",
    "Event",
    "Factor",
    "FactorRole",
    "Forecast",
    "FunctionalMeasurement",
    "LayerMeasurement",
    "Linearization",
    "Measurement",
    "OutputMeasurement",
    "Path",
    "Projection",
    "ResidualBlock",
    "Scores",
    "StreamAt",
    "WeightSignals",
    "alternatives",
    "compare",
]
