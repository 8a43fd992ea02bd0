"""What a solve computes once, and what it leaves out: prepared conditions, and first-block caching."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import genflow.config
from genflow.cli import main
from genflow.data.pictures import read_settings
from genflow.errors import UserError
from genflow.flows.paths import CosinePath
from genflow.flows.prepared import PreparedVelocity
from genflow.flows.rectified import RectifiedFlow, RectifiedFlowConfig
from genflow.flows.sampling import SolveConfig, into_picture
from genflow.flows.store import save_model
from genflow.networks.caching import FirstBlockCache
from genflow.networks.mmdit import MMDiT, MMDiTConfig
from genflow.registry import resolve
from genflow.samplers import cfg
from genflow.text.trained import LearnedTextConfig

TEXT = LearnedTextConfig(dim=8, heads=2, layers=1, max_tokens=8)
DEPTH = 3
PROMPTS, SEEDS = ["apple", "a cat", "rain"], [3, 4, 5]


def network(**options: object) -> MMDiTConfig:
    base = {"depth": DEPTH, "hidden": 32, "heads": 2, "patch_size": 2, "in_channels": 3, "context_dim": 8}
    return MMDiTConfig(**{**base, "pooled_dim": 8, "sample_size": 4, **options})


def make(model: MMDiTConfig | None = None, std: float = 0.2, **config: object) -> RectifiedFlow:
    torch.manual_seed(0)
    flow = RectifiedFlowConfig(**config).build((model or network()).build(), TEXT.build(), shape=(3, 8, 8))
    for p in flow.network.parameters():
        torch.nn.init.normal_(p, std=std)
    return flow.eval()


@pytest.fixture
def flow() -> RectifiedFlow:
    return make()


@pytest.fixture
def smooth() -> RectifiedFlow:
    """A network that changes little from step to step."""
    return make(std=0.05)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def counted(flow: RectifiedFlow, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each part of the network is called."""
    calls: dict[str, int] = {}
    for name, module in flow.network.named_modules():
        calls[name] = 0

        def hook(_module: object, _inputs: object, name: str = name) -> None:
            calls[name] += 1

        module.register_forward_pre_hook(hook)
    return calls


# ------------------------------------------------------------------------------------------------------------- prepared


@pytest.mark.parametrize("options", [{}, {"dual_attention_layers": (0, 2)}, {"qk_norm": False}], ids=str)
@torch.no_grad()
def test_a_prepared_network_is_the_network(options):
    net = make(network(**options)).network
    assert isinstance(net, MMDiT)
    x, context, pooled = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 8), torch.randn(2, 8)
    times, mask = [0.9, 0.5, 0.1], torch.tensor([[True] * 5, [True, True, False, False, False]])
    inner, vector = net.prepare(context, pooled)
    table = net.modulations(vector, torch.tensor(times))
    for i, time in enumerate(times):
        t = torch.full((2,), time)
        for m in (None, mask):
            expected = net(x, t, context, pooled, context_mask=m)
            close(net.denoise(x, t, inner, vector, context_mask=m), expected)
            close(net.denoise(x, t, inner, vector, context_mask=m, modulation=table[:, i]), expected)


def test_gradients_pass_through_what_was_prepared():
    net = make(network()).network
    assert isinstance(net, MMDiT)
    x, context, pooled = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 8), torch.randn(2, 8, requires_grad=True)
    inner, vector = net.prepare(context, pooled)
    table = net.modulations(vector, torch.tensor([0.9, 0.5]))
    inputs = [pooled, *net.parameters()]
    got = net.denoise(x, torch.full((2,), 0.5), inner, vector, modulation=table[:, 1])
    expected = net(x, torch.full((2,), 0.5), context, pooled)
    found, wanted = (torch.autograd.grad(y.square().sum(), inputs) for y in (got, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("config", [{}, {"prediction": "x", "t_min": 0.2}, {"prediction": "eps"}, {"text_mask": True}])
@pytest.mark.parametrize("sampler", ["euler", "heun", "midpoint"])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.8)])
def test_a_sample_is_the_solve_of_the_plain_velocity(config, sampler, interval):
    flow = make(**config)
    got = flow.sample(PROMPTS, seeds=SEEDS, steps=5, sampler=sampler, guidance=3.0, interval=interval, record=True)
    assert got.trajectory is not None

    def velocity(z, t, *rows):
        return flow.velocity(z, t, type(condition)(*rows))

    with torch.no_grad():
        condition, null = (flow.embed(c) for c in (flow.text.encode(PROMPTS), flow.text.null()))
        parts = [(c.tokens, c.mask, c.pooled) for c in (condition, null)]
        plain = cfg(velocity, *parts, 3.0, interval=interval)
        solve = resolve("sampler", sampler)
        if flow.config.prediction == "x":
            solve = into_picture(sampler, solve, flow.t_min)
        expected = solve(plain, got.trajectory.states[0], got.trajectory.times).x.clamp(-1, 1)
    close(got.x, expected, 1e-5 if flow.config.prediction == "v" else 1e-4)  # over t: what is small becomes large


@torch.no_grad()
def test_guidance_repeats_rows_of_the_modulations_and_not_the_modulations(flow):
    velocity = PreparedVelocity(flow, [1.0, 0.5])
    strong, null = velocity.prepare(flow.embed(flow.text.encode(PROMPTS)), flow.embed(flow.text.null()))
    n = len(PROMPTS)
    assert strong[-1].tolist() == list(range(n)) and null[-1].tolist() == [n]
    velocity.at(torch.zeros(n, 3, 8, 8), 1.0, *strong)
    assert velocity._table.shape[:2] == (n + 1, 1)


def test_text_is_computed_once_and_modulation_for_several_steps_at_once(flow, monkeypatch):
    calls = counted(flow, monkeypatch)
    flow.sample(PROMPTS[:1], seeds=SEEDS[:1], steps=4, sampler="heun", guidance=3.0)
    assert calls["blocks.1.image_mlp.fc1"] == calls["final"] == 7  # both branches in one call
    assert calls["context_embed"] == calls["pooled_embed"] == 1  # of the prompt and the empty one together
    for each in ("time_embed", "blocks.1.image_modulation", "final_modulation"):
        assert calls[each] == 2, each  # two steps of two rows are an eighth of 32
    many = [*range(20)]
    flow.sample(["x"] * 20, seeds=many, steps=4, sampler="euler")  # more rows than that: each step's own
    assert calls["context_embed"] == 2 and calls["blocks.1.image_modulation"] == 2 + 4


@pytest.mark.parametrize("order", [range(7), [0, 0, 4, 3, 4, 6, 0, 1], [6]], ids=str)
@torch.no_grad()
def test_modulations_are_those_of_their_time_in_any_order(flow, order):
    flow.network.hidden *= 2  # slabs of 4
    times = [1.0, 0.9, 0.8, 0.5, 0.3, 0.1, 0.0]
    velocity = PreparedVelocity(flow, times)
    ((*_, pooled, _),) = velocity.prepare(flow.embed(flow.text.encode(PROMPTS[:2])))
    for step in order:
        close(velocity._modulations(step), flow.network.modulations(pooled, torch.tensor(times[step : step + 1]))[:, 0])
        assert velocity._table.shape[1] == 4


def test_blocks_that_are_shared_out_among_processes_are_only_called_whole(flow, monkeypatch):
    expected = flow.sample(PROMPTS, seeds=SEEDS, steps=4).x
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.tensor.DTensor", torch.nn.Parameter)
    calls = counted(flow, monkeypatch)
    close(flow.sample(PROMPTS, seeds=SEEDS, steps=4).x, expected)
    assert calls["blocks.1"] == calls["blocks.1.image_modulation"] == 7


def test_gradients_reach_the_condition_and_can_be_asked_for_at_every_step(flow):
    z, t = torch.randn(3, 3, 8, 8, requires_grad=True), torch.full((3,), 0.5)
    with torch.no_grad():
        condition = flow.embed(flow.text.encode(PROMPTS))
    flow.text.requires_grad_(False)
    tokens = condition.tokens.requires_grad_()
    velocity = flow.guided(condition, guidance=2.0)
    for _ in range(2):
        velocity(z, t).square().sum().backward()
    assert z.grad.abs().max() > 0 and tokens.grad.abs().max() > 0
    with torch.no_grad():
        prepared = flow.guided(condition, guidance=2.0)
    close(prepared(z, t), velocity(z, t))


def test_the_network_samples_in_its_own_dtype_and_the_solve_in_float32(flow, monkeypatch):
    exact = flow.sample(PROMPTS, seeds=SEEDS, steps=4).x
    flow.network.bfloat16()
    seen = []
    monkeypatch.setattr(
        flow.network, "denoise", lambda x, *a, f=flow.network.denoise, **k: seen.append(x) or f(x, *a, **k)
    )
    half = flow.sample(PROMPTS, seeds=SEEDS, steps=4, guidance=2.0, record=True)
    assert {x.dtype for x in seen} == {torch.bfloat16}
    assert {x.dtype for x in half.trajectory.states} == {torch.float32}
    assert 0 < (flow.sample(PROMPTS, seeds=SEEDS, steps=4).x - exact).square().mean().sqrt() < 0.05


# -------------------------------------------------------------------------------------------------------------- caching


@torch.no_grad()
def test_threshold_zero_is_exact(flow):
    net, cache = flow.network, FirstBlockCache(0.0)
    inner, vector = net.prepare(torch.randn(2, 5, 8), torch.randn(2, 8))
    x = torch.randn(2, 3, 8, 8)
    for time in (0.8, 0.7, 0.7):  # the same again: even then nothing is below zero
        t = torch.full((2,), time)
        assert torch.equal(net.denoise(x, t, inner, vector, cache=cache), net.denoise(x, t, inner, vector))
    assert cache.skipped == 0 and cache.blocks == 3 * 2 * DEPTH
    assert not hasattr(flow.sample(PROMPTS, seeds=SEEDS, steps=3), "skipped")


def test_a_large_threshold_computes_the_other_blocks_only_once(flow, monkeypatch):
    calls = counted(flow, monkeypatch)
    got = flow.sample(PROMPTS, seeds=SEEDS, steps=5, sampler="euler", guidance=3.0, cache=1e6)
    assert [calls[f"blocks.{i}"] for i in range(DEPTH)] == [5, 1, 1]
    assert got.skipped == pytest.approx(4 / 5 * 2 / 3) and got.nfe == 5
    assert not torch.equal(got.x, flow.sample(PROMPTS, seeds=SEEDS, steps=5, sampler="euler", guidance=3.0).x)


def test_the_error_falls_with_the_threshold(smooth):
    how = {"seeds": SEEDS, "steps": 12, "sampler": "euler", "guidance": 2.0}
    exact = smooth.sample(PROMPTS, **how).x
    found = [smooth.sample(PROMPTS, **how, cache=threshold) for threshold in (1e-6, 0.2, 0.5)]
    errors = [float((s.x - exact).square().mean()) for s in found]
    skipped = [s.skipped for s in found]
    assert skipped == sorted(skipped) and skipped[0] == 0 and skipped[-1] > 0.2
    assert errors == sorted(errors) and errors[0] < 1e-10 and errors[-1] > errors[0]


def test_what_is_skipped_is_the_formula():
    def rest(rows):
        computed.append(rows)
        return first[rows] + 10 * step

    cache, x = FirstBlockCache(0.1), torch.zeros(3, 2, 4)
    base = torch.ones(3, 2, 4)
    changes = [(0.0, 0.0, 0.0), (0.05, 0.2, float("nan")), (0.15, 0.2, 0.0), (0.15, 0.25, 0.05)]
    rests = []
    for change in changes:
        step, computed = len(rests) + 1, []
        first = base + torch.tensor(change).view(3, 1, 1)
        out = cache(x, first, rest, 1)
        rests.append((out - first)[:, 0, 0].nan_to_num(-1).round().tolist())
    # Against what was last computed, not last seen: 0.15 is 0.15 from 0, and 0.25 but 0.05 / 1.2 from 0.2.
    assert (
        rests[0] == [10, 10, 10] and rests[1][:2] == [10, 20] and rests[2] == [30, 20, 30] and rests[3] == [30, 20, 30]
    )
    assert computed == [] and cache.skipped == 1 + 1 + 3 and cache.blocks == 4 * 3 * 2


def test_a_sample_with_a_cache_does_not_depend_on_its_batch_mates(smooth):
    how = {"steps": 10, "sampler": "euler", "guidance": 2.0, "cache": 0.2}
    together = smooth.sample(PROMPTS, seeds=SEEDS, **how)
    alone = [smooth.sample([p], seeds=[s], **how) for p, s in zip(PROMPTS, SEEDS, strict=True)]
    close(together.x, torch.cat([each.x for each in alone]))
    assert together.skipped == pytest.approx(sum(each.skipped for each in alone) / 3) and together.skipped > 0


def test_every_solve_and_every_network_begins_anew(flow):
    how = {"seeds": SEEDS, "steps": 6, "sampler": "heun", "guidance": 2.0, "cache": 0.2}
    first = flow.sample(PROMPTS, **how, interval=(0.3, 0.8))
    assert torch.equal(flow.sample(PROMPTS, **how, interval=(0.3, 0.8)).x, first.x) and first.skipped > 0
    weak = make()
    with torch.no_grad():
        weak.network.final.weight.mul_(0.5)
    assert 0 < flow.sample(PROMPTS, **how, weak=weak).skipped < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache": -0.1}, "cache = -0.1 is not a threshold; 0 is no caching"),
        ({"cache": float("nan")}, "cache = nan is not a threshold"),
        (
            {"cache": 0.1, "sampler": "dopri5"},
            "sampler 'dopri5' takes steps by what the network says; choose one such as",
        ),
        ({"cache": 0.1, "sampler": "picard"}, "'picard'"),
    ],
)
def test_impossible_caching_is_refused(options, message, flow):
    with pytest.raises(UserError, match=message):
        flow.sample(PROMPTS, seeds=SEEDS, steps=2, **options)


def test_a_config_refuses_what_a_sample_would():
    assert SolveConfig().cache == 0
    with pytest.raises(UserError, match="cache = -1 is not a threshold"):
        SolveConfig(cache=-1)


def test_a_network_without_blocks_has_nothing_to_cache(flow):
    flow.network = torch.nn.Conv2d(3, 3, 1)
    with pytest.raises(UserError, match="skips blocks of an MMDiT; this network is a Conv2d"):
        flow.sample(PROMPTS, seeds=SEEDS, steps=2, cache=0.1)
    assert PreparedVelocity(flow).prepare(flow.text.null().to("cpu"))  # and nothing to prepare


# -------------------------------------------------------------------------------------------------------------- the CLI


@pytest.fixture
def common(flow, tmp_path: Path) -> list[str]:
    """The words that draw one picture of a model folder."""
    sections = {"model": ("mmdit", network()), "flow": ("rectified", flow.config), "text": ("learned", TEXT)}
    config = {key: {"name": name, **genflow.config.to_dict(each)} for key, (name, each) in sections.items()}
    config |= {"sample": {"sampler": "euler", "steps": 4}, "shape": [3, 8, 8]}
    save_model(tmp_path / "model", config=config, state=flow.state_dict())
    return ["sample", str(tmp_path / "model"), "--prompt", "rain", "--out", str(tmp_path / "out"), "--device", "cpu"]


def test_genflow_sample_compiles_the_blocks_it_draws_with(common, tmp_path: Path, monkeypatch):
    def compiled(block, **how):
        seen.append(type(block).__name__)
        block._compiled_call_impl = torch.compile(block._call_impl, backend="aot_eager", **how)

    def pictures():
        return {p.name: Image.open(p).tobytes() for p in (tmp_path / "out").glob("*.png")}

    seen: list[str] = []
    assert main(common) == 0
    plain = pictures()
    monkeypatch.setattr(torch.nn.Module, "compile", compiled)
    torch._dynamo.reset()
    assert main([*common, "--compile"]) == 0
    assert seen == ["JointBlock"] * len(seen) and len(seen) == network().depth
    assert pictures().keys() == plain.keys()
    for name, there in pictures().items():
        off = np.frombuffer(there, np.uint8).astype(int) - np.frombuffer(plain[name], np.uint8)
        assert abs(off).max() <= 1


def test_genflow_sample_says_what_was_skipped_and_in_which_dtype(common, tmp_path: Path, capsys):
    assert main([*common, "--cache", "1e6", "--dtype", "bf16"]) == 0
    assert "LOSSY cache: 50% of the blocks skipped" in capsys.readouterr().out
    about = read_settings(tmp_path / "out" / "grid.png")
    assert about["cache"] == 1e6 and about["dtype"] == "bf16"
    assert main(common) == 0
    assert "LOSSY" not in capsys.readouterr().out and "dtype" not in read_settings(tmp_path / "out" / "grid.png")
    assert main([*common, "--cache", "-1"]) == 2
    assert "cache = -1.0 is not a threshold" in capsys.readouterr().err


@torch.no_grad()
def test_padding_is_hidden_from_every_block_also_with_a_cache(flow):
    net, cache = flow.network, FirstBlockCache(0.0)
    context, vector = net.prepare(torch.randn(2, 5, 8), torch.randn(2, 8))
    x, mask = torch.randn(2, 3, 8, 8), torch.tensor([[True, True, False, False, False], [True] * 5])
    for time in (0.8, 0.7):
        t = torch.full((2,), time)
        expected = net.denoise(x, t, context, vector, context_mask=mask)
        assert torch.equal(net.denoise(x, t, context, vector, context_mask=mask, cache=cache), expected)


@pytest.mark.parametrize("config", [{}, {"path": CosinePath()}, {"prediction": "eps"}], ids=str)
def test_a_sample_from_the_table_of_modulations_is_the_solve_of_the_plain_velocity(config):
    flow = make(**config)
    got = flow.sample(PROMPTS, seeds=SEEDS, steps=5, record=True)
    assert bool(PreparedVelocity(flow, got.trajectory.times).times) == (config == {})
    with torch.no_grad():
        condition = flow.embed(flow.text.encode(PROMPTS))
        solve = resolve("sampler", "heun")
        velocity = lambda z, t: flow.velocity(z, t, condition)
        expected = solve(velocity, got.trajectory.states[0], got.trajectory.times).x.clamp(-1, 1)
    close(got.x, expected, 1e-4)
