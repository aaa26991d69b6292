"""Watch the spectral balance of MLP and attention in any Transformer that PyTorch Lightning trains.

.. code-block:: python

    Trainer(callbacks=[SpectralMonitor(every_n_steps=50)])                     # watch a run
    Trainer(callbacks=[SpectralMonitor(every_n_steps=50, auto_rescale=True)])  # watch and steer
    print(measure(model))                                                      # or measure once, without a Trainer
"""

from lightning_spectral.analysis.lyapunov import lyapunov_exponents
from lightning_spectral.analysis.zero_data import covariance_trajectory
from lightning_spectral.balance import balance_init_, balance_penalty
from lightning_spectral.checkpoints import audit
from lightning_spectral.control import GainCeiling, ResidualRescaler
from lightning_spectral.discovery import find_blocks
from lightning_spectral.errors import (
    BlocksNotFoundError,
    CheckpointError,
    ConfigurationError,
    ExampleInputError,
    SpectralError,
)
from lightning_spectral.linalg import ExactSVD, RandomizedSVD
from lightning_spectral.measuring.meter import measure
from lightning_spectral.metrics import EffectiveRank, SpectralRatio, StableRank, TokenResidual, TokenSimilarity
from lightning_spectral.monitor import SpectralMonitor
from lightning_spectral.pages import report
from lightning_spectral.records import Branch, LayerMeasurement, Measurement, ResidualBlock
from lightning_spectral.runs.history import History, heatmap
from lightning_spectral.runs.journal import read_actions, read_events, read_journal
from lightning_spectral.scales import ResidualScales, attach_scales, fuse_scales
from lightning_spectral.watch import Watch

__version__ = "0.1.0.dev0"

__all__ = [
    "BlocksNotFoundError",
    "Branch",
    "CheckpointError",
    "ConfigurationError",
    "EffectiveRank",
    "ExactSVD",
    "ExampleInputError",
    "GainCeiling",
    "History",
    "LayerMeasurement",
    "Measurement",
    "RandomizedSVD",
    "ResidualBlock",
    "ResidualRescaler",
    "ResidualScales",
    "SpectralError",
    "SpectralMonitor",
    "SpectralRatio",
    "StableRank",
    "TokenResidual",
    "TokenSimilarity",
    "Watch",
    "attach_scales",
    "audit",
    "balance_init_",
    "balance_penalty",
    "covariance_trajectory",
    "find_blocks",
    "fuse_scales",
    "heatmap",
    "lyapunov_exponents",
    "measure",
    "read_actions",
    "read_events",
    "read_journal",
    "report",
]
