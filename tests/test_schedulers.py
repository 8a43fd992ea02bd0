"""Samplers in unchanged diffusers pipelines, and diffusers' schedulers as samplers, on tiny random transformers."""

import threading

import numpy as np
import pytest
import torch

from genflow import registry
from genflow.errors import UserError
from genflow.functional import resolution_shift, shift_time
from genflow.samplers import double_shifted, euler, heun, midpoint, rk4, shifted, uniform
from genflow.samplers.solution import Solve

diffusers = pytest.importorskip("diffusers")

from genflow.interop.schedulers import GenflowScheduler, as_scheduler, from_scheduler  # noqa: E402

diffusers.utils.logging.set_verbosity_error()


@pytest.fixture(scope="module")
def sd3():
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=12,
        out_channels=4,
        pos_embed_max_size=8,
    )
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=1, latent_channels=4, shift_factor=0.0)
    nothing = dict.fromkeys(
        ["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"]
    )
    return quiet(
        diffusers.StableDiffusion3Pipeline(
            transformer=transformer, vae=vae, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), **nothing
        )
    )


@pytest.fixture(scope="module")
def flux():
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=12,
        axes_dims_rope=[4, 4, 8],
    )
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=1, latent_channels=4, shift_factor=0.0)
    nothing = dict.fromkeys(["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return quiet(diffusers.FluxPipeline(transformer=transformer, vae=vae, scheduler=scheduler, **nothing))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    for module in (pipe.transformer, pipe.vae):
        for p in module.parameters():
            torch.nn.init.normal_(p, std=0.1)
    return pipe


def draw(pipe, scheduler, steps=5, *, dtype=torch.float32, **extra):
    """The final latents of a pipeline, B x ..., of fixed noise and conditions."""
    g = torch.Generator().manual_seed(1)
    pipe.scheduler = scheduler
    pipe.to(dtype)
    if isinstance(pipe, diffusers.FluxPipeline):
        latents, guidance = torch.randn(2, 16, 16, generator=g), {}
    else:
        latents = torch.randn(2, 4, 8, 8, generator=g)
        guidance = {"guidance_scale": 3.0, "negative_prompt_embeds": torch.randn(2, 3, 16, generator=g).to(dtype)}
        guidance["negative_pooled_prompt_embeds"] = torch.randn(2, 12, generator=g).to(dtype)
    return pipe(
        prompt_embeds=torch.randn(2, 3, 16, generator=g).to(dtype),
        pooled_prompt_embeds=torch.randn(2, 12, generator=g).to(dtype),
        height=8,
        width=8,
        output_type="latent",
        return_dict=False,
        **({"num_inference_steps": steps, "latents": latents.to(dtype)} | guidance | extra),
    )[0]


class Recorded:
    """The scheduler that a pipeline drives by hand: remembers the latents and the time of every evaluation."""

    def __init__(self, pipe):
        self.calls = []
        self.hook = pipe.transformer.register_forward_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs, output):
        self.calls.append((kwargs["hidden_states"], float(kwargs["timestep"][0])))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.hook.remove()


def velocity_of(pipe, dtype=torch.float32):
    """The velocity that the SD3 pipeline of `draw` follows, guidance and all, written out."""
    g = torch.Generator().manual_seed(1)
    torch.randn(2, 4, 8, 8, generator=g)
    negative, pooled_negative, positive, pooled_positive = (
        torch.randn(*shape, generator=g).to(dtype) for shape in ((2, 3, 16), (2, 12), (2, 3, 16), (2, 12))
    )

    @torch.no_grad()
    def velocity(x, t):
        v = pipe.transformer(
            hidden_states=torch.cat([x, x]).to(dtype),
            timestep=1000 * torch.cat([t, t]),
            encoder_hidden_states=torch.cat([negative, positive]),
            pooled_projections=torch.cat([pooled_negative, pooled_positive]),
        ).sample
        return v[:2] + 3.0 * (v[2:] - v[:2])

    return velocity


NOISE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def near(a, b, atol=1e-5):
    torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=atol)


# ------------------------------------------------------------------------------------- samplers in diffusers' pipelines


def test_euler_in_an_sd3_pipeline_is_diffusers_own(sd3):
    theirs = draw(sd3, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    ours = draw(sd3, as_scheduler("euler", grid="double_shifted", shift=3.0))
    near(ours, theirs)
    assert (ours - NOISE).abs().max() > 0.1
    single = draw(sd3, as_scheduler("euler", shift=3.0))  # the shift once: other times, other pictures
    assert (single - theirs).abs().max() > 1e-3


@pytest.mark.parametrize("guided", [False, True])
def test_euler_in_a_flux_pipeline_is_diffusers_own(flux, guided):
    """FLUX gives its own equal sigmas and a shift by the picture's size, which there is applied once."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=guided)
    theirs = draw(flux, scheduler)
    ours = draw(flux, as_scheduler("euler", like=scheduler))
    near(ours, theirs)
    np.testing.assert_allclose(flux.scheduler.sigmas, scheduler.sigmas, atol=1e-6)
    custom = [1.0, 0.7, 0.2]
    near(draw(flux, flux.scheduler, sigmas=custom), draw(flux, scheduler, sigmas=custom))
    np.testing.assert_allclose(flux.scheduler.sigmas, scheduler.sigmas, atol=1e-6)


def test_a_named_grid_holds_in_a_flux_pipeline_too(flux):
    draw(flux, as_scheduler("euler", grid="double_shifted", shift=2.0))
    np.testing.assert_allclose(flux.scheduler.sigmas, double_shifted(5, 2.0), atol=1e-6)
    like = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    draw(flux, as_scheduler("euler", grid="karras", like=like))
    shift = resolution_shift(16)
    np.testing.assert_allclose(flux.scheduler.sigmas, registry.resolve("grid", "karras")(5, shift), atol=1e-6)


@pytest.mark.parametrize("sampler", [euler, heun, midpoint, rk4])
def test_any_sampler_in_a_pipeline_is_the_sampler_on_the_velocity(sd3, sampler):
    name = registry.tag_of(sampler).names[0]
    with Recorded(sd3) as recorded:
        through = draw(sd3, as_scheduler(name, shift=3.0))
    alone = sampler(velocity_of(sd3), NOISE, shifted(5, 3.0))
    near(through, alone.x)
    assert len(recorded.calls) == alone.nfe == len(sd3.scheduler.timesteps)


def test_every_ode_sampler_there_is_runs_in_a_pipeline(sd3):
    for name in registry.names("sampler"):
        sampler = registry.resolve("sampler", name)
        if registry.tag_of(sampler).metadata["family"] == "ode":
            near(draw(sd3, as_scheduler(name), 6), sampler(velocity_of(sd3), NOISE, uniform(6)).x)


def test_a_function_of_ones_own_and_its_options_will_do(sd3):
    def damped(velocity, x, grid, *, factor=1.0, progress=None, record=False):
        solve = Solve(velocity, x, grid, progress, record)
        for t, t_next in solve:
            solve.x = solve.x + factor * (t_next - t) * solve.v(solve.x, t)
        return solve.solution()

    near(draw(sd3, as_scheduler(damped)), draw(sd3, as_scheduler("euler")))
    half = draw(sd3, as_scheduler(damped, options={"factor": 0.5}))
    near(half, damped(velocity_of(sd3), NOISE, uniform(5), factor=0.5).x)
    times = [1.0, 0.8, 0.3, 0.0]
    near(draw(sd3, as_scheduler(euler, grid=times), 3), euler(velocity_of(sd3), NOISE, times).x)


def test_a_scheduler_serves_run_after_run(sd3):
    scheduler = as_scheduler("heun", shift=2.0)
    first = draw(sd3, scheduler, 4)
    draw(sd3, scheduler, 7)
    sd3.scheduler.set_timesteps(3)  # a run that is planned and left
    sd3.scheduler.step(NOISE, sd3.scheduler.timesteps[0], NOISE)
    threads = threading.active_count()
    assert torch.equal(draw(sd3, scheduler, 4), first)
    assert threading.active_count() == threads


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_state_stays_float32_in_a_pipeline_of_low_precision(sd3, dtype):
    out = draw(sd3, as_scheduler("heun"), 12, dtype=dtype)
    alone = heun(velocity_of(sd3, dtype), NOISE.to(dtype), uniform(12)).x
    sd3.to(torch.float32)
    assert out.dtype == dtype
    near(out, alone.to(dtype), atol=3e-2)
    # and exactly: a tiny velocity that a state of low precision would lose
    scheduler, x = as_scheduler("euler"), torch.ones(1, 1, dtype=dtype)
    scheduler.set_timesteps(100)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.ones_like(x), t, x).prev_sample
    assert x.dtype == dtype and abs(x.item()) < 1e-3


# ------------------------------------------------------------------------------- what a pipeline does between two steps


def image_to_image(sd3, scheduler, strength=0.6):
    pipe = diffusers.StableDiffusion3Img2ImgPipeline(**{**sd3.components, "scheduler": scheduler})
    pipe.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(5)
    return pipe(
        prompt_embeds=torch.randn(2, 3, 16, generator=g),
        pooled_prompt_embeds=torch.randn(2, 12, generator=g),
        image=torch.randn(2, 4, 8, 8, generator=g),
        strength=strength,
        guidance_scale=1.0,
        height=8,
        width=8,
        num_inference_steps=5,
        generator=g,
        output_type="latent",
    ).images


def test_image_to_image_begins_within_the_grid(sd3):
    theirs = image_to_image(sd3, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    near(image_to_image(sd3, as_scheduler("euler", grid="double_shifted", shift=3.0)), theirs)
    with Recorded(sd3) as recorded:
        image_to_image(sd3, as_scheduler("heun"))
    np.testing.assert_allclose([t for _, t in recorded.calls], [600, 400, 400, 200, 200], rtol=1e-6)


def test_noise_is_scaled_to_a_timestep_as_diffusers_does():
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    x, noise = torch.randn(2, 4), torch.randn(2, 4)
    theirs.set_timesteps(5)
    t = theirs.timesteps[2]
    theirs.set_begin_index(2)
    for timestep in (t, t.expand(2), float(t)):
        near(as_scheduler("euler").scale_noise(x, timestep, noise), theirs.scale_noise(x, t.expand(2), noise))


def test_latents_changed_between_steps_are_taken_up(sd3):
    def replace(pipe, i, t, kwargs):
        return {"latents": kwargs["latents"] * 0.5} if i == 2 else {}

    def in_place(pipe, i, t, kwargs):
        if i == 2:
            kwargs["latents"].mul_(0.5)
        return {}

    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    expected = draw(sd3, theirs, callback_on_step_end=replace)
    for callback in (replace, in_place):
        ours = draw(sd3, as_scheduler("euler", grid="double_shifted", shift=3.0), callback_on_step_end=callback)
        near(ours, expected)
    copied = lambda pipe, i, t, kwargs: {"latents": kwargs["latents"].clone()}  # the same latents, another tensor
    near(draw(sd3, as_scheduler("heun"), callback_on_step_end=copied), draw(sd3, as_scheduler("heun")))
    with pytest.raises(UserError, match="within a step of rk4"):
        draw(sd3, as_scheduler("rk4"), callback_on_step_end=replace)


def test_errors_of_the_model_reach_the_caller_and_leave_nothing_behind(sd3):
    scheduler = as_scheduler("heun")
    good = draw(sd3, scheduler)

    def fail(module, args, kwargs):
        raise RuntimeError("no memory")

    hook = sd3.transformer.register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(RuntimeError, match="no memory"):
        draw(sd3, scheduler)
    hook.remove()
    assert torch.equal(draw(sd3, scheduler), good)
    scheduler.set_timesteps(3)
    with pytest.raises(UserError, match=r"\(2, 1\).*\(2, 3\)"):
        scheduler.step(torch.zeros(2, 1), scheduler.timesteps[0], torch.zeros(2, 3))


def test_gradients_inference_mode_and_autocast_are_the_callers():
    scale = torch.tensor(0.3, requires_grad=True)

    def solved(field, x):
        scheduler = as_scheduler("rk4")
        scheduler.set_timesteps(3)
        for t in scheduler.timesteps:
            x = scheduler.step(field(x, t / 1000), t, x, return_dict=False)[0]
        return x

    field = lambda x, t: scale * x * t
    x = torch.ones(2, 3)
    through, alone = solved(field, x), rk4(lambda x, t: field(x, t.view(-1, 1)), x, uniform(3)).x
    torch.testing.assert_close(through, alone)
    (a,), (b,) = (torch.autograd.grad(out.sum(), scale) for out in (through, alone))
    torch.testing.assert_close(a, b)
    with torch.inference_mode():
        out = solved(field, x)
        assert out.is_inference()
    torch.testing.assert_close(out, alone.detach())
    with torch.autocast("cpu", torch.bfloat16):
        assert solved(lambda x, t: x @ torch.eye(3), x).dtype == torch.float32


# --------------------------------------------------------------------------------------------------- settings and files


def test_a_scheduler_goes_to_a_file_and_back_also_within_its_pipeline(sd3, tmp_path):
    scheduler = as_scheduler("heun", grid="double_shifted", shift=3.0)
    scheduler.save_pretrained(tmp_path / "scheduler")
    again = GenflowScheduler.from_pretrained(tmp_path / "scheduler")
    assert {k: v for k, v in again.config.items() if k[0] != "_"} == {
        k: v for k, v in scheduler.config.items() if k[0] != "_"
    }
    expected = draw(sd3, scheduler)
    assert torch.equal(draw(sd3, again), expected)
    own = as_scheduler("euler", grid=[1.0, 0.5, 0.0], options={})
    own.save_pretrained(tmp_path / "own")
    assert GenflowScheduler.from_pretrained(tmp_path / "own").config["grid"] == [1.0, 0.5, 0.0]
    sd3.scheduler = scheduler
    sd3.save_pretrained(tmp_path / "pipe")
    nothing = dict.fromkeys(name for name, part in sd3.components.items() if part is None)
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path / "pipe", **nothing)
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.scheduler, GenflowScheduler)
    assert torch.equal(draw(pipe, pipe.scheduler), expected)


def test_shift_and_sizes_come_from_the_scheduler_in_place():
    flux = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=1.3, base_image_seq_len=64)
    ours = as_scheduler("heun", like=flux)
    for name in ("use_dynamic_shifting", "max_shift", "base_image_seq_len", "base_shift", "num_train_timesteps"):
        assert ours.config[name] == flux.config[name]
    assert as_scheduler("heun", like=flux, shift=2.0).config["use_dynamic_shifting"] is False
    multistep = diffusers.UniPCMultistepScheduler(**FLOW, flow_shift=5.0)
    assert as_scheduler("heun", like=multistep).config["shift"] == 5.0
    idiom = GenflowScheduler.from_config(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config, sampler="rk4")
    assert idiom.config["shift"] == 3.0 and idiom.config["sampler"] == "rk4"


def test_a_shift_of_ones_own_over_a_multistep_schedulers_is_still_there_when_it_is_read_again(tmp_path):
    multistep = diffusers.UniPCMultistepScheduler(**FLOW, flow_shift=3.0)
    ours = as_scheduler("heun", like=multistep, shift=5.0)
    ours.save_pretrained(tmp_path)
    assert GenflowScheduler.from_pretrained(tmp_path).config["shift"] == 5.0
    assert as_scheduler("euler", like=ours).config["shift"] == 5.0
    assert diffusers.UniPCMultistepScheduler.from_config(ours.config).config["flow_shift"] == 5.0


@pytest.mark.parametrize("how", [{"shift": 3.0}, {}])
def test_a_shift_that_was_set_on_a_scheduler_is_the_one_that_is_taken_over(how):
    euler = diffusers.FlowMatchEulerDiscreteScheduler(**how)
    euler.set_shift(5.0)
    assert as_scheduler("heun", like=euler).config["shift"] == 5.0
    solution = from_scheduler(euler)(lambda x, t: torch.ones_like(x), torch.zeros(1, 1, 2, 2), 4, record=True)
    euler.set_timesteps(4)
    assert solution.trajectory.times == euler.sigmas.tolist()


def test_settings_that_a_scheduler_takes_over_are_not_said_to_be_ignored(monkeypatch):
    said = []
    monkeypatch.setattr(diffusers.configuration_utils.logger, "warning", said.append)
    as_scheduler("heun", like=diffusers.UniPCMultistepScheduler(**FLOW, flow_shift=3.0))
    assert said == []


def adaptive_by_hand(velocity, x, grid, *, progress=None, record=False):
    solve = Solve(velocity, x, grid, progress, record)
    for t, t_next in solve:
        v = solve.v(solve.x, t)
        if v.abs().max() > 0:
            solve.v(solve.x, (t + t_next) / 2)
        solve.x = solve.x + (t_next - t) * v
    return solve.solution()


def run(scheduler, steps=3, value=1.0):
    scheduler.set_timesteps(steps)
    x = torch.ones(1, 2)
    for t in scheduler.timesteps:
        x = scheduler.step(value * torch.ones_like(x), t, x).prev_sample
    return scheduler, x


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
Flow = diffusers.FlowMatchEulerDiscreteScheduler


@pytest.mark.parametrize(
    ("make", "near"),
    [
        (lambda: as_scheduler("huen"), "'heun'"),
        (lambda: as_scheduler("heun", options={"ordre": 2}), "'ordre'"),
        (lambda: as_scheduler("heun", like=Flow(use_karras_sigmas=True)), "use_karras_sigmas"),
        (lambda: as_scheduler("heun", like=Flow(shift_terminal=0.1)), "shift_terminal = 0.1"),
        (lambda: as_scheduler("heun", like=diffusers.DDIMScheduler()), "flow_prediction"),
        (lambda: run(as_scheduler("heun"), 0), "nearest possible number is 1"),
        (lambda: run(as_scheduler("heun", grid="shiftd")), "'shifted'"),
        (lambda: run(as_scheduler("heun", grid=[1.0, 0.5, 0.0])), "has 2 steps"),
        (lambda: run(as_scheduler("heun", grid=[0.0, 0.5, 0.7, 0.1])), "step 3"),
        (lambda: run(as_scheduler("heun", like=Flow(use_dynamic_shifting=True))), "mu"),
        (lambda: as_scheduler("heun").step(NOISE, 1000.0, NOISE), "set_timesteps"),
        (lambda: run(as_scheduler("heun"))[0].step(NOISE, 1.0, NOISE), "is over"),
        (lambda: run(as_scheduler(adaptive_by_hand)), "known before"),
        (lambda: as_scheduler("heun").set_timesteps(3, sigmas=[1.0, 0.5]), "one of the two"),
        (lambda: from_scheduler(diffusers.DPMSolverMultistepScheduler()), "flow_prediction"),
        (lambda: from_scheduler(diffusers.IPNDMScheduler()), "a IPNDMScheduler is no diffusers scheduler of flows"),
        (
            lambda: as_scheduler("heun", like=diffusers.CMStochasticIterativeScheduler()),
            "no diffusers scheduler of flows",
        ),
        (lambda: from_scheduler(None), "a NoneType is no diffusers scheduler of flows"),
        (lambda: from_scheduler(Flow(invert_sigmas=True)), "invert_sigmas"),
        (lambda: from_scheduler(Flow(use_dynamic_shifting=True))(velocity, NOISE, 3), "grid of times"),
        (lambda: from_scheduler(diffusers.FlowMatchHeunDiscreteScheduler())(velocity, NOISE, uniform(3)), "steps, 3"),
        (lambda: from_scheduler(diffusers.DEISMultistepScheduler(**FLOW))(velocity, NOISE, 5), "step 5 goes"),
        (lambda: from_scheduler(Flow(use_karras_sigmas=True))(velocity, NOISE, [1.0, 0.9, 0.1, 0.0]), "bends"),
        (lambda: from_scheduler(Flow())(velocity, NOISE, -2), "steps = -2 is too few"),
        (lambda: from_scheduler(Flow())(velocity, NOISE, 3, seeds=[1]), "1 seeds for 2 pictures"),
        (
            lambda: from_scheduler(diffusers.UniPCMultistepScheduler(**FLOW))(velocity, NOISE, 3, seeds=[1, 2]),
            "no noise",
        ),
    ],
)
def test_what_cannot_be_is_said_in_one_line(make, near):
    with pytest.raises(UserError, match=near) as error:
        make()
    assert "\n" not in str(error.value)


def test_adaptive_and_stochastic_samplers_are_refused_by_name():
    for name in registry.names("sampler"):
        if (family := registry.tag_of(registry.resolve("sampler", name)).metadata["family"]) != "ode":
            with pytest.raises(UserError, match=f"{name}.*{family}"):
                as_scheduler(name)


def test_a_run_may_begin_at_any_step_but_at_no_other_time():
    scheduler = as_scheduler("heun")
    scheduler.set_timesteps(4)
    scheduler.step(NOISE, scheduler.timesteps[2], NOISE)
    assert scheduler.step_index == 3
    scheduler.set_timesteps(4)
    with pytest.raises(UserError, match=r"timestep 990\.0 begins no step"):
        scheduler.step(NOISE, torch.tensor(990.0), NOISE)
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(1)
    with pytest.raises(UserError, match="within a step of heun"):
        scheduler.step(NOISE, scheduler.timesteps[1], NOISE)


# ---------------------------------------------------------------------------------------- diffusers' schedulers, driven


def velocity(x, t):
    return x * t.view(-1, 1, 1, 1) + 0.5


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [(diffusers.FlowMatchEulerDiscreteScheduler, euler), (diffusers.FlowMatchHeunDiscreteScheduler, heun)],
)
def test_our_samplers_in_compatibility_mode_are_diffusers_flow_schedulers(sd3, theirs, ours):
    field, seen = velocity_of(sd3), []
    expected = ours(field, NOISE, double_shifted(8, 3.0), record=True)
    solution = from_scheduler(theirs(shift=3.0))(field, NOISE, 8, record=True, progress=lambda *done: seen.append(done))
    near(solution.x, expected.x)
    assert solution.nfe == expected.nfe and seen == [(i, 8) for i in range(1, 9)]
    np.testing.assert_allclose(solution.trajectory.times, double_shifted(8, 3.0), atol=1e-6)
    for a, b in zip(solution.trajectory.states, expected.trajectory.states, strict=True):
        near(a, b)


def test_a_grid_given_is_not_shifted_again():
    grid = [1.0, 0.8, 0.35, 0.1, 0.0]
    for scheduler in (Flow(shift=3.0), Flow(use_dynamic_shifting=True)):
        near(from_scheduler(scheduler)(velocity, NOISE, grid).x, euler(velocity, NOISE, grid).x)


@pytest.mark.parametrize(
    "name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DPMSolverSinglestepScheduler"]
)
def test_multistep_schedulers_see_their_own_sigmas(name):
    """Step by step by hand, at the scheduler's sigmas; their timesteps are rounded to whole numbers."""
    make = lambda: getattr(diffusers, name)(**FLOW, flow_shift=3.0)
    times = []

    def noted(x, t):
        times.append(t[0].item())
        return velocity(x, t)

    used = make()
    used.set_timesteps(9)
    used.step(NOISE, used.timesteps[0], NOISE)  # a scheduler in use serves as well, and is left as it is
    solution = from_scheduler(used)(noted, NOISE, 7)
    assert len(used.timesteps) == 9 and used.step_index == 1
    scheduler, x = make(), NOISE
    scheduler.set_timesteps(7)
    for i, t in enumerate(scheduler.timesteps):
        v = velocity(x, scheduler.sigmas[i].expand(2))
        x = scheduler.step(v, t, x).prev_sample
    near(solution.x, x)
    np.testing.assert_allclose(times, scheduler.sigmas[:-1], rtol=1e-6)
    assert shift_time(0.5, 3.0) < times[3] < 1 and solution.nfe == 7 and solution.ok


@pytest.mark.parametrize(
    "scheduler",
    [
        Flow(stochastic_sampling=True),
        diffusers.DPMSolverMultistepScheduler(**FLOW, algorithm_type="sde-dpmsolver++"),
        diffusers.FlowMatchLCMScheduler(),
    ],
)
def test_the_noise_of_a_scheduler_hangs_on_the_seed_of_its_picture_alone(scheduler):
    sampler, grid = from_scheduler(scheduler), 5
    both, first = sampler(velocity, NOISE, grid, seeds=[3, 4]).x, sampler(velocity, NOISE[:1], grid, seeds=[3]).x
    near(both[:1], first)
    assert not torch.allclose(both, sampler(velocity, NOISE, grid, seeds=[5, 6]).x)


def test_unipc_takes_a_grid():
    scheduler = diffusers.UniPCMultistepScheduler(**FLOW, flow_shift=3.0)
    grid = shifted(40, 2.0)
    solution = from_scheduler(scheduler)(velocity, NOISE, grid, record=True)
    np.testing.assert_allclose(solution.trajectory.times, grid, atol=1e-5)
    near(solution.x, rk4(velocity, NOISE, uniform(100)).x, atol=5e-3)
