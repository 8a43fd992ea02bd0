"""genflow's samplers as diffusers schedulers, and diffusers' flow schedulers as samplers.

A diffusers pipeline pushes: it evaluates its model and hands the answer to scheduler.step. A sampler pulls: it calls the
velocity. The two meet by replay. A sampler of fixed steps is a function of the model's answers so far; every step() runs
it from the start on the answers known, to the first evaluation for which there is none, and hands that point out as the
next latents. There is no thread, and nothing is kept between two steps but the answers: gradients, devices, autocast and
errors are those of the caller. A run of N evaluations makes N^2 / 2 updates of latents, a small part of N model calls.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from genflow.errors import UserError, nearest
from genflow.functional import interpolate, shift_time
from genflow.registry import api_export, resolve, tag_of
from genflow.samplers.solution import Progress, Solution, Solve, Velocity, check_grid, check_seeds, state

Sampler = Callable[..., Solution]
# Settings of diffusers' schedulers that change the grid or the rule of a step, and are not a genflow grid or sampler.
FOREIGN = (
    "invert_sigmas",
    "shift_terminal",
    "stochastic_sampling",
    "use_beta_sigmas",
    "use_exponential_sigmas",
    "use_karras_sigmas",
    "use_lu_lambdas",
)


@api_export("as_scheduler")
def as_scheduler(
    sampler: str | Sampler,
    *,
    grid: str | Sequence[float] = "shifted",
    shift: float | None = None,
    options: Mapping[str, Any] | None = None,
    like: ConfigMixin | None = None,
) -> GenflowScheduler:
    """Any genflow sampler of fixed steps as the scheduler of an unchanged diffusers SD3 or FLUX pipeline.

        pipe.scheduler = as_scheduler("unipc", like=pipe.scheduler)

    like: a flow scheduler whose shift, fixed or by the size of the picture, is taken over; shift: one of your own. The
    rest as in `GenflowScheduler`, which says what is raised.
    """
    config = _config_of(like) if like is not None else {}
    # What set_shift has set is in no config.
    own = {"shift": like.shift} if like is not None and hasattr(like, "set_shift") else {}
    own |= {} if shift is None else {"shift": shift, "use_dynamic_shifting": False}
    return GenflowScheduler.from_config(config, sampler=sampler, grid=grid, options=options, **own)


@api_export("GenflowScheduler")
class GenflowScheduler(SchedulerMixin, ConfigMixin):
    """A diffusers scheduler whose rule is a genflow sampler.

    sampler: a name such as "heun", or the function; grid: a name, or the times themselves, N + 1 that fall from 1 to 0;
    shift: of a named grid; options: further arguments of the sampler. The others have diffusers' names and meaning:
    with use_dynamic_shifting the pipeline gives the shift, as mu. grid="double_shifted" has the times that diffusers' own
    FlowMatchEulerDiscreteScheduler makes for a number of steps. The state is float32 or wider, whatever the latents are.

    timesteps holds one entry per evaluation, so that a pipeline of N steps calls its model as often as the sampler does.
    Latents that the pipeline changes between two steps (inpainting, callbacks) are taken up: the sampler begins anew from
    there, a multistep one without its past.

    Raises UserError for a sampler that is not an ODE solver of fixed steps, for options it has not, and for a setting of
    another scheduler that has no meaning here.
    """

    # Whose settings diffusers is not to call ignored.
    _compatibles: ClassVar[list[str]] = ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"]
    order = 1  # evaluations per step; pipelines read it after set_timesteps
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        sampler: str | Sampler = "euler",
        grid: str | Sequence[float] = "shifted",
        shift: float = 1.0,
        options: Mapping[str, Any] | None = None,
        num_train_timesteps: int = 1000,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        base_shift: float = 0.5,
        max_shift: float = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
    ) -> None:
        self._sampler: Sampler = resolve("sampler", sampler) if isinstance(sampler, str) else sampler
        self._options = dict(options or {})
        _check_sampler(self._sampler, self._options)
        tag = tag_of(self._sampler)
        name = tag.names[0] if tag else f"{self._sampler.__module__}.{self._sampler.__qualname__}"
        self.register_to_config(sampler=name)  # a config is text
        self.timesteps: Tensor | None = None
        self.step_index: int | None = None
        self.begin_index: int | None = None

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: Any = False, **kwargs: Any) -> Any:
        """diffusers' own, from any flow scheduler's config. Raises UserError for a setting with no meaning here."""
        _check_flow(config, FOREIGN)
        if "flow_shift" in config:  # the multistep schedulers' name
            shift = kwargs.get("shift", config["flow_shift"])
            config = {**config, "shift": shift, "flow_shift": shift}  # which is saved too, and read again
        return super().from_config(dict(config), return_unused_kwargs=return_unused_kwargs, **kwargs)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Plan a run of that many steps, or along sigmas and then 0, which are shifted as the grid is.

        Equal steps 1, .., 1/N as sigmas are what FLUX pipelines always pass: they leave the choice to the grid. mu: the
        logarithm of the shift (with time_shift_type = "linear" the shift itself), read with use_dynamic_shifting only.
        """
        if (num_inference_steps is None) == (sigmas is None):
            raise UserError("set_timesteps takes num_inference_steps or sigmas, one of the two")
        self._grid = self._make_grid(num_inference_steps, sigmas, mu)
        self._times, self._starts = self._plan(self._grid)
        steps = len(self._starts)
        each = self._starts[1] if steps > 1 else len(self._times)
        self.order = each if self._starts == list(range(0, each * steps, each)) else 1
        self.num_inference_steps = steps
        self.sigmas = torch.tensor([*self._times, self._grid[-1]], dtype=torch.float32, device="cpu")
        self.timesteps = (self.sigmas[:-1] * self.config["num_train_timesteps"]).to(device)
        self.step_index = self.begin_index = None
        self._answers: list[Tensor] = []

    def _make_grid(self, steps: int | None, sigmas: Sequence[float] | None, mu: float | None) -> list[float]:
        shift = self.config["shift"]
        if self.config["use_dynamic_shifting"]:
            if mu is None:
                raise UserError("with use_dynamic_shifting the shift comes from the picture's size: give mu")
            shift = math.exp(mu) if self.config["time_shift_type"] == "exponential" else mu
        if sigmas is not None:
            given = np.asarray(sigmas, dtype=np.float64)
            if not len(given):
                raise UserError("sigmas is empty; give one for each step, falling from 1, or num_inference_steps")
            if not np.allclose(given, np.linspace(1, 1 / len(given), len(given)), rtol=0, atol=1e-6):
                return check_grid([*(shift_time(float(s), shift) for s in given), 0.0])
            steps = len(given)
        grid = self.config["grid"]
        if isinstance(grid, str):
            # diffusers shifts its last time twice only where the shift is fixed
            last = 1 / self.config["num_train_timesteps"]
            last = last if self.config["use_dynamic_shifting"] else shift_time(last, shift)
            return resolve("grid", grid)(steps, shift, **({"t_min": last} if grid == "double_shifted" else {}))
        if steps != len(grid) - 1:
            raise UserError(f"num_inference_steps = {steps}, but the grid given has {len(grid) - 1} steps")
        return check_grid(grid)

    def _plan(self, grid: Sequence[float]) -> tuple[list[float], list[int]]:
        """The times at which the sampler evaluates, and which of these are the first of a step."""
        probe, starts = _Probe(), [0]
        x = torch.zeros(1, 1, device="cpu")
        self._sampler(probe, x, grid, progress=lambda *_: starts.append(len(probe.times)), **self._options)
        return probe.times, starts[:-1]

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Where in timesteps the run will begin: at the first evaluation of a step (image-to-image)."""
        self.begin_index = begin_index

    def scale_noise(self, sample: Tensor, timestep: float | Tensor, noise: Tensor) -> Tensor:
        """A picture noised to a timestep: (1 - t) sample + t noise, t = timestep / num_train_timesteps, one or B."""
        t = torch.as_tensor(timestep, device=sample.device).float().reshape(-1) / self.config["num_train_timesteps"]
        return interpolate(state(sample), state(noise), t).to(sample.dtype)

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """Take in the model's answer; hand out where the next is wanted, at last the picture, in the dtype of sample."""
        if self.timesteps is None:
            raise UserError("step before set_timesteps: there is no plan of the run yet")
        if self.step_index is None:
            self._begin(self._first(timestep), sample)
        elif self.step_index == len(self._times):
            raise UserError(f"the run of {len(self._times)} evaluations is over; call set_timesteps for another")
        elif self._changed(sample):
            self._begin(self.step_index, sample)
        assert self.step_index is not None
        self._answers.append(model_output)
        self.step_index += 1
        planned = self._times[self.step_index - len(self._answers) :]
        try:
            x = self._sampler(_Replay(self._answers, planned), *self._run, **self._options).x
        except _Asked as asked:
            x = asked.x
        else:
            if self.step_index < len(self._times):
                raise UserError(_UNPLANNED)
            self._answers = []
        self._handed = x.to(sample.dtype)
        self._version = _version(self._handed)
        return SchedulerOutput(prev_sample=self._handed) if return_dict else (self._handed,)

    def _first(self, timestep: float | Tensor) -> int:
        """Where in timesteps the run begins: as told by set_begin_index, or else where timestep stands."""
        if self.begin_index is not None:
            return self.begin_index
        t = float(timestep) / self.config["num_train_timesteps"]
        at = min(self._starts, key=lambda i: abs(self._times[i] - t))
        if abs(self._times[at] - t) > 1e-6:
            raise UserError(f"timestep {float(timestep)} begins no step of this run; take one of scheduler.timesteps")
        return at

    def _begin(self, index: int, sample: Tensor) -> None:
        """Run the sampler from sample on, along the rest of the grid."""
        if index not in self._starts:
            at = f"at evaluation {index + 1} of {len(self._times)}, within a step of {self.config['sampler']}"
            raise UserError(f"the latents were set {at}; choose a sampler of one evaluation per step")
        rest = self._grid[self._starts.index(index) :]
        if index and self._plan(rest)[0] != self._times[index:]:
            raise UserError(f"{self.config['sampler']} evaluates at other times when it starts midway; choose another")
        self.step_index, self._run, self._answers = index, (sample, rest), []

    def _changed(self, sample: Tensor) -> bool:
        """Whether the latents are others than those handed out. Waits for the device where it is another tensor."""
        if sample is self._handed:
            return _version(sample) != self._version
        return not torch.equal(sample.to(self._handed.dtype), self._handed)


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version  # counts changes in place


class _Asked(BaseException):
    """Carries the point at which a sampler asks for an evaluation that is not there yet."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


_UNPLANNED = "a scheduler needs a sampler that evaluates all pictures at one time, known before; this one does not"


class _Probe:
    """A velocity of 0 that notes at which times it was evaluated."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def at(self, x: Tensor, time: float) -> Tensor:
        self.times.append(time)
        return torch.zeros_like(x)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        raise UserError(_UNPLANNED)


class _Replay(_Probe):
    """A velocity that answers from a list, at the times planned, and stops the solve where the list ends."""

    def __init__(self, answers: Sequence[Tensor], planned: Sequence[float]) -> None:
        self.answers, self.planned = iter(answers), iter(planned)

    def at(self, x: Tensor, time: float) -> Tensor:
        if next(self.planned, None) != time:
            raise UserError(_UNPLANNED)
        if (answer := next(self.answers, None)) is None:
            raise _Asked(x)
        return answer


def _check_sampler(sampler: Sampler, options: Mapping[str, Any]) -> None:
    tag = tag_of(sampler)
    if tag is not None and tag.metadata.get("family", "ode") != "ode":
        name = f"{tag.names[0]} ({tag.metadata['family']})"
        raise UserError(f"{name} cannot be a scheduler; choose an ODE sampler of fixed steps, such as 'heun'")
    keywords = {p.name for p in inspect.signature(sampler).parameters.values() if p.kind is p.KEYWORD_ONLY}
    known = keywords - {"progress", "record"}
    if unknown := [name for name in options if name not in known]:
        raise UserError(f"the sampler has no option {unknown[0]!r}.{nearest(unknown[0], known)}")


def _config_of(scheduler: Any) -> Mapping[str, Any]:
    """Raises UserError for what is no scheduler, and for one whose config has nothing of those for flows."""
    config = getattr(scheduler, "config", {})
    if not {"shift", "flow_shift", "prediction_type"} & {*config}:
        what = f"a {type(scheduler).__name__} is no diffusers scheduler of flows"
        raise UserError(f"{what}; FlowMatchEulerDiscreteScheduler is one")
    return config


def _check_flow(config: Mapping[str, Any], foreign: Sequence[str]) -> None:
    prediction = config.get("prediction_type", "flow_prediction")  # those for flows only have no such setting
    if prediction != "flow_prediction" or not config.get("use_flow_sigmas", True):
        needed = "prediction_type='flow_prediction' and use_flow_sigmas=True"
        raise UserError(f"the diffusers scheduler is not set for flows: it needs {needed}")
    if found := [name for name in foreign if config.get(name)]:
        setting = f"{found[0]} = {config[found[0]]} of the diffusers scheduler"
        raise UserError(f"{setting} is not known here; choose a sampler and a grid of genflow's")


@api_export("from_scheduler")
def from_scheduler(scheduler: ConfigMixin) -> Sampler:
    """A diffusers flow scheduler as a sampler: sampler(velocity, x, grid, *, seeds=(), progress=None, record=False).

    FlowMatchEuler, FlowMatchHeun, and with use_flow_sigmas DPMSolver and UniPC. grid: the number of steps, on the
    scheduler's own times; or N + 1 times down to 0, which are not shifted again, if its set_timesteps takes sigmas. The
    velocity is evaluated at the scheduler's sigmas, not at its timesteps, which some round to whole numbers. seeds: one
    per picture, of the noise of a scheduler that draws some; without them it is torch's own. The scheduler is copied for
    every solve and computes in float32 at best.

    Raises UserError for a scheduler that is not for flows, for a grid that it does not take, and for seeds of one that
    never draws noise.
    """
    _check_flow(_config_of(scheduler), ["invert_sigmas"])

    def sampler(
        velocity: Velocity,
        x: Tensor,
        grid: Sequence[float] | int,
        *,
        seeds: Sequence[int] = (),
        progress: Progress | None = None,
        record: bool = False,
    ) -> Solution:
        solver, how = _planned(scheduler, grid), dict[str, Any]()
        if len(seeds):
            check_seeds(seeds, x)
            if "generator" not in inspect.signature(solver.step).parameters:
                raise UserError(f"a {type(solver).__name__} draws no noise; leave the seeds out")
            how["generator"] = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        sigmas, order = solver.sigmas.tolist(), solver.order
        last = len(solver.timesteps)
        solve = Solve(velocity, x, [*sigmas[:last:order], sigmas[-1]], progress, record)
        for step, _ in enumerate(solve):
            for i in range(order * step, min(order * (step + 1), last)):
                v = solve.v(solve.x, sigmas[i])
                solve.x = state(solver.step(v, solver.timesteps[i], solve.x, return_dict=False, **how)[0])
        return solve.solution()

    return sampler


def _planned(scheduler: Any, grid: Sequence[float] | int) -> Any:
    """A fresh copy of a scheduler, with its steps set."""
    name, config = type(scheduler).__name__, scheduler.config
    if isinstance(grid, int | np.integer):
        if config.get("use_dynamic_shifting"):
            raise UserError(f"the shift of this {name} depends on the picture's size; give a grid of times instead")
        if grid < 1:
            raise UserError(f"steps = {grid} is too few; the nearest possible number is 1")
        solver = deepcopy(scheduler)
        solver.set_timesteps(grid)
    else:
        times = check_grid(grid)
        if "sigmas" not in inspect.signature(scheduler.set_timesteps).parameters:
            raise UserError(f"{name} makes its own times only: give the number of steps, {len(times) - 1}, not a grid")
        unshifted = {"shift": 1.0, "flow_shift": 1.0, "use_dynamic_shifting": False}
        solver = type(scheduler).from_config(
            config, **{key: value for key, value in unshifted.items() if key in config}
        )
        solver.set_timesteps(sigmas=np.array(times[:-1]))
        if not np.allclose(solver.sigmas.tolist(), times, rtol=0, atol=1e-5):
            raise UserError(f"{name} bends the grid: it becomes {[round(s, 4) for s in solver.sigmas.tolist()]}")
    solver.set_begin_index(0)
    return solver
