"""How a model stretches directions, block after block: Lyapunov exponents on real inputs, spectra without data."""

from lightning_spectral.analysis.lyapunov import EmpiricalExponents, empirical_exponents, lyapunov_exponents
from lightning_spectral.analysis.zero_data import covariance_trajectory

__all__ = ["EmpiricalExponents", "covariance_trajectory", "empirical_exponents", "lyapunov_exponents"]
