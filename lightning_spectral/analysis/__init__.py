"""What a model does to directions, block after block: Lyapunov exponents on real inputs, and without any data."""

from lightning_spectral.analysis.exponents import LyapunovSpectrum
from lightning_spectral.analysis.lyapunov import EmpiricalExponents, empirical_exponents, lyapunov_exponents
from lightning_spectral.analysis.zero_data import CovarianceTrajectory, covariance_trajectory

__all__ = [
    "CovarianceTrajectory",
    "EmpiricalExponents",
    "LyapunovSpectrum",
    "covariance_trajectory",
    "empirical_exponents",
    "lyapunov_exponents",
]
