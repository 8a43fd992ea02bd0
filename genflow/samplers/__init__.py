"""Samplers for any velocity v(x, t): solvers, time grids, guidance, editing. Nothing of genflow's models is needed."""

from genflow.samplers.adams import ab2, ab3, ab4, ipndm
from genflow.samplers.adaptive import bosh3, dopri5, tsit5
from genflow.samplers.editing import flowedit, image_to_image, inpaint, invert, psnr, rf_inversion, round_trip
from genflow.samplers.exponential import deis, dpmpp_2m, dpmpp_3m, unipc
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
from genflow.samplers.guidance import Conditioned, autoguidance, cfg, reversed
from genflow.samplers.guides import APG, CFG, CFGZero, Guide
from genflow.samplers.interpolation import blend, slerp
from genflow.samplers.parallel import picard
from genflow.samplers.paths import Path, model_from, velocity_from
from genflow.samplers.runge_kutta import euler, heun, midpoint, rk4
from genflow.samplers.solution import Progress, Solution, Solve, Trajectory, Velocity, bound_sampler, check_grid
from genflow.samplers.stochastic import ancestral, euler_maruyama, restart, stochastic_heun

__all__ = [
    "APG",
    "CFG",
    "CFGZero",
    "Conditioned",
    "Guide",
    "Path",
    "Progress",
    "Solution",
    "Solve",
    "Trajectory",
    "Velocity",
    "ab2",
    "ab3",
    "ab4",
    "ancestral",
    "autoguidance",
    "beta",
    "blend",
    "bosh3",
    "bound_sampler",
    "cfg",
    "check_grid",
    "cosine",
    "deis",
    "dopri5",
    "double_shifted",
    "dpmpp_2m",
    "dpmpp_3m",
    "euler",
    "euler_maruyama",
    "exponential",
    "flowedit",
    "heun",
    "image_to_image",
    "inpaint",
    "invert",
    "ipndm",
    "karras",
    "log_snr_uniform",
    "midpoint",
    "model_from",
    "picard",
    "psnr",
    "restart",
    "reversed",
    "rf_inversion",
    "rk4",
    "round_trip",
    "shifted",
    "slerp",
    "stochastic_heun",
    "tsit5",
    "uniform",
    "unipc",
    "velocity_from",
]
