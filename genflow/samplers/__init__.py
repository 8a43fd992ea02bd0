"""Samplers for any velocity v(x, t): solvers, time grids, guidance. Nothing of genflow's models is needed."""

from genflow.samplers.grids import (
    beta,
    cosine,
    double_shifted,
    exponential,
    karras,
    log_snr_uniform,
    shifted,
    uniform,
)
from genflow.samplers.guidance import cfg, reversed
from genflow.samplers.runge_kutta import euler, heun, midpoint, rk4
from genflow.samplers.solution import Progress, Solution, Solve, Trajectory, Velocity, evaluate, state

__all__ = [
    "Progress",
    "Solution",
    "Solve",
    "Trajectory",
    "Velocity",
    "beta",
    "cfg",
    "cosine",
    "double_shifted",
    "euler",
    "evaluate",
    "exponential",
    "heun",
    "karras",
    "log_snr_uniform",
    "midpoint",
    "reversed",
    "rk4",
    "shifted",
    "state",
    "uniform",
]
