"""Samplers for any velocity v(x, t): solvers, time grids, guidance. Nothing of genflow's models is needed."""

from genflow.samplers.grids import double_shifted, shifted, uniform
from genflow.samplers.guidance import cfg, reversed
from genflow.samplers.solution import Progress, Solution, Velocity, evaluate, state
from genflow.samplers.solvers import euler, heun

__all__ = [
    "Progress",
    "Solution",
    "Velocity",
    "cfg",
    "double_shifted",
    "euler",
    "evaluate",
    "heun",
    "reversed",
    "shifted",
    "state",
    "uniform",
]
