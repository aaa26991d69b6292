"""Tests of operators and solvers against dense matrices in float64."""
