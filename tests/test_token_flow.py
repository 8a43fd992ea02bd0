"""Token flows: losses, likelihoods, samples by every decoder and draft, training, and what does not fit."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from toy_tokens import CLASSES, GreyConfig, model, run_config

from genflow.ar.decoders import Ancestral, GumbelCoupled, Speculative, SpeculativeTree
from genflow.ar.drafts import MTPDraft
from genflow.ar.flow import DecodeConfig, TokenFlowConfig
from genflow.ar.law import TokenLaw
from genflow.cli import main
from genflow.config import from_dict
from genflow.data.pictures import read_settings
from genflow.data.prepared import PreparedConditions
from genflow.errors import UserError
from genflow.evaluation.likelihood import likelihood
from genflow.evaluation.plots_tokens import plot_passes
from genflow.flows.rectified import RectifiedFlowConfig
from genflow.flows.store import load
from genflow.functional import Rng
from genflow.networks.token_transformer import TokenTransformerConfig
from genflow.networks.unet import UNetConfig
from genflow.networks.velocity import MLPVelocityConfig
from genflow.text.none import NoTextConfig
from genflow.text.trained import LabelsConfig, LearnedTextConfig
from genflow.training.precision import verified
from genflow.training.run import train

ROOT = Path(__file__).parents[1]
LAWS = [{}, {"guidance": 1.7, "temperature": 0.9, "top_k": 5, "top_p": 0.95}]
PROMPTS = ["dark", "light", "mixed", "dark", "light", "mixed"]


def batch(flow, rows=6, seed=0):
    x = torch.rand(rows, *flow.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    condition = flow.text.encode([CLASSES[i % 3] for i in range(rows)])
    return SimpleNamespace(x=x, condition=condition, position=torch.arange(rows))


# ----------------------------------------------------------------------------------------------------- losses and density


def test_the_loss_is_the_next_tokens_and_a_weighted_mean_of_those_further_ahead():
    flow = model(mtp=2)
    b = batch(flow)
    out = flow.loss(b, Rng(0))
    keep = Rng(0).uniform("drop", b.position) >= flow.config.drop_condition
    condition = flow.embed(b.condition.where(keep, flow.text.null()))
    tokens = flow.tokenizer.encode(b.x).flatten(1)
    logits = flow.network(tokens, condition.tokens, condition.mask)
    each = [F.cross_entropy(a.flatten(0, 1), tokens[:, k:].flatten()) for k, a in enumerate(logits)]
    torch.testing.assert_close(out.loss, each[0] + 0.3 / 2 * (each[1] + each[2]))
    assert list(out.parts) == ["nll", "mtp1", "mtp2"] and out.per_sample.shape == (6,)
    torch.testing.assert_close(out.per_sample.mean(), each[0].detach())


def test_dropped_conditions_are_the_empty_one_and_hang_on_the_position():
    flow = model()
    object.__setattr__(flow.config, "drop_condition", 1.0)
    b = batch(flow)
    other = SimpleNamespace(**{**vars(b), "condition": flow.text.encode(["dark"] * 6)})
    assert torch.equal(flow.loss(b, Rng(0)).loss, flow.loss(other, Rng(0)).loss)


def test_every_trained_parameter_has_a_gradient_as_several_processes_need():
    text = LearnedTextConfig(dim=8, layers=1, max_tokens=6).build()
    net = TokenTransformerConfig(6, (3, 4), width=32, layers=1, context_dim=8).build()
    flow = TokenFlowConfig(GreyConfig()).build(net, text, shape=(3, 6, 8))
    flow.loss(batch(flow), Rng(0)).loss.backward()
    assert not [name for name, p in flow.named_parameters() if p.requires_grad and p.grad is None]


def test_the_tokenizer_is_frozen_and_stays_in_eval_mode():
    flow = model().train()
    assert not flow.tokenizer.training and flow.training
    assert not any(p.requires_grad for p in flow.tokenizer.parameters())


def test_log_prob_is_a_distribution_over_all_pictures_of_tokens():
    """All 3^4 = 81 grids, with and without a condition."""
    flow = model(tokenizer=GreyConfig(levels=3), grid=(2, 2))
    every = torch.cartesian_prod(*[torch.arange(3)] * 4)
    x = flow.to_pictures(every)
    assert torch.equal(flow.to_tokens(x), every)
    for condition in (None, flow.text.encode(["light"])):
        assert float(flow.log_prob(x, condition).exp().sum()) == pytest.approx(1, abs=1e-9)
    note = flow.likelihood_note(1)
    assert "of a picture's 4 tokens of 3" in note and "exact" in note


def test_bits_per_dim_and_noise_are_refused_with_the_reason():
    flow = model()
    x = batch(flow).x
    with pytest.raises(UserError, match="bits_per_dim: the probability is of tokens, which many pictures share"):
        flow.bits_per_dim(x)
    with pytest.raises(UserError, match="encode: tokens are drawn one after another"):
        flow.encode(x)
    with pytest.raises(UserError, match="rtol is for likelihoods of a velocity"):
        flow.likelihood_note(1, rtol=1e-3)


def test_evaluation_says_nats_of_tokens(tmp_path):
    run = train(run_config(tmp_path / "run"))
    flow = load(run)
    data = run_config(run).data
    found = likelihood(flow, data, name="emoji", split="test", n=4)
    dataset = data.build("test")
    conditions = PreparedConditions.prepare(dataset, flow.text)
    assert found.unit == "nats of tokens" and "tokens of 6" in str(found) and len(conditions.row) >= 4
    with pytest.raises(UserError, match="k = 2: tokens are counted, and there is no"):
        likelihood(flow, data, name="emoji", k=2)


# ---------------------------------------------------------------------------------------------------------------- samples


DECODERS = [
    "ancestral",
    "sjd",
    {"name": "gumbel", "window": 3},
    {"name": "speculative", "window": 5},
    "relaxed",
]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("decoder", DECODERS, ids=str)
def test_a_sample_does_not_hang_on_its_batch_mates(decoder, law):
    flow = model(mtp=1)
    together = flow.sample(PROMPTS, seeds=range(6), decoder=decoder, **law)
    assert together.x.shape == (6, 3, 6, 8) and together.x.dtype == torch.float32 and together.x.abs().max() <= 1
    for i in (0, 3):
        alone = flow.sample([PROMPTS[i]], seeds=[i], decoder=decoder, **law)
        assert torch.equal(alone.x[0], together.x[i])
    assert together.lossless == (decoder != "relaxed")
    assert together.nfe == together.decoded.nfe <= 12


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("draft", [None, "mtp", "small"])
def test_gumbel_is_token_for_token_ancestral_whatever_the_draft(draft, law):
    flow = model(mtp=1)
    expected = flow.sample(PROMPTS, seeds=range(6), **law)
    draft = model(1, layers=1) if draft == "small" else draft
    found = flow.sample(PROMPTS, seeds=range(6), decoder=GumbelCoupled(3), draft=draft, **law)
    assert torch.equal(found.decoded.tokens, expected.decoded.tokens) and torch.equal(found.x, expected.x)


def test_prompts_and_guidance_are_heard():
    flow = model()
    dark, light = (flow.sample([p], seeds=range(8)).decoded.tokens for p in ("dark", "light"))
    guided = flow.sample(["dark"], seeds=range(8), guidance=3.0).decoded.tokens
    assert not torch.equal(dark, light) and not torch.equal(dark, guided)


def test_temperature_zero_is_greedy_for_every_seed():
    flow = model(mtp=1)
    a = flow.sample(["dark"], seeds=range(5), temperature=0).decoded.tokens
    b = flow.sample(["dark"], seeds=range(5, 10), temperature=0, decoder="speculative").decoded.tokens
    assert (a == a[0]).all() and torch.equal(a, b)


def test_heads_of_its_own_are_no_draft_of_a_model_without_them():
    with pytest.raises(UserError, match="draft medusa: this model has no heads of its own; give the run of heads"):
        model().sample(PROMPTS, seeds=range(6), decoder="gumbel", draft="medusa")


def test_a_model_of_the_same_weights_as_a_draft_is_always_right():
    flow = model()
    solution = flow.sample(PROMPTS, seeds=range(6), decoder=SpeculativeTree((2, 1, 1)), draft=model())
    assert solution.decoded.acceptance == 1 and solution.nfe == 3


# ------------------------------------------------------------------------------------------- modules of mtp, as drafts


@pytest.mark.parametrize("law", [TokenLaw(), TokenLaw(guidance=1.6)])
@pytest.mark.parametrize("modules", [1, 2, 3])
def test_the_guesses_of_the_modules_are_those_of_training(modules, law, monkeypatch):
    """The d-th guess, up to the modules there are, is drawn from module d's law after all settled tokens and guesses."""
    flow = model(mtp=modules)
    asked = []
    original = MTPDraft.propose

    def spied(self, symbols, done, shape, noise, stream):
        guess = original(self, symbols, done, shape, noise, stream)
        if guess is not None:
            asked.append((symbols.clone(), done.clone(), guess))
        return guess

    monkeypatch.setattr(MTPDraft, "propose", spied)
    flow.sample(PROMPTS, seeds=range(6), decoder=Speculative(4), draft="mtp", guidance=law.guidance)
    condition, null = flow.embed_prompts(PROMPTS, 6), flow.embed(flow.text.null()).expand(6)
    assert len({int(n) for _, done, _ in asked for n in done}) > 4
    checked = 0
    for symbols, done, guess in asked:
        for row, n in enumerate(done.tolist()):
            width = min(guess.tokens.shape[1], 12 - n)
            known = torch.cat([symbols[row, 1 : n + 1], guess.tokens[row, :width]])
            known = F.pad(known, (0, 12 - len(known)))[None]
            laws = [flow.network(known, c.tokens[row : row + 1], c.mask[row : row + 1]) for c in (condition, null)]
            for d in range(min(modules, width)):
                p = law(*(a[d + 1][0, n - 1] for a in laws[: 1 if law.guidance == 1 else 2]))
                torch.testing.assert_close(guess.q[row, d], p, rtol=1e-6, atol=1e-9)
                checked += 1
    assert checked > 20


def test_beyond_the_modules_the_last_one_goes_on_and_every_pass_begins_anew():
    """A longer window does not change what the first guesses are drawn from."""
    flow = model(mtp=1)
    for window in (1, 6):
        solution = flow.sample(PROMPTS, seeds=range(6), decoder=GumbelCoupled(window), draft="mtp")
        assert torch.equal(solution.decoded.tokens, flow.sample(PROMPTS, seeds=range(6)).decoded.tokens)
    assert solution.decoded.accepted.sum() > 0


# ------------------------------------------------------------------------------------------------------------ training


def test_train_resume_load_and_sample(tmp_path):
    straight = load(train(run_config(tmp_path / "a", steps=4)))
    train(run_config(tmp_path / "b", steps=2))
    config = run_config(tmp_path / "b", steps=4)
    resumed = load(train(replace(config, train=replace(config.train, save_every=2))))
    for (name, a), b in zip(straight.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert straight.network.vocabulary == 6 and straight.network.config.grid == (4, 4)
    a, b = (flow.sample(["otter"], seeds=[3]).x for flow in (straight, resumed))
    assert torch.equal(a, b)


def test_a_frozen_part_in_float32_is_no_breach_of_half_precision():
    parts = torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(4)])
    for part in parts[1:]:
        part.requires_grad_(False)
    x = torch.randn(2, 4)
    with verified(parts, "bf16"):
        with torch.autocast("cpu", torch.bfloat16):
            parts[0](x)
        for part in parts[1:]:
            part(x)


def test_a_run_learns_and_draws_previews(tmp_path):
    config = run_config(tmp_path / "run", steps=60, validate_every=30, validation_split="train", preview_every=60)
    run = train(config)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert losses[-1] < 1.5 < torch.tensor(6.0).log()
    assert any("validation_mtp1" in line for line in lines)
    assert list((run / "previews").glob("*.png"))


def test_a_run_of_a_smaller_model_is_a_draft_by_its_path(tmp_path):
    big = load(train(run_config(tmp_path / "big", model=TokenTransformerConfig(width=32, layers=2, heads=2))))
    small = train(run_config(tmp_path / "small", model=TokenTransformerConfig(width=16, layers=1, heads=1)))
    found = big.sample(["otter"], seeds=range(3), decoder="gumbel", draft=str(small))
    assert torch.equal(found.x, big.sample(["otter"], seeds=range(3)).x)
    other = train(run_config(tmp_path / "other", flow=TokenFlowConfig(GreyConfig(levels=7))))
    with pytest.raises(UserError, match="both must be of one tokenizer"):
        big.sample(["otter"], seeds=[0], decoder="speculative", draft=str(other))


# ---------------------------------------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"top_k": 0}, "top_k = 0 leaves no token"),
        ({"temperature": -0.5}, r"temperature = -0.5 must be 0 \(greedy\) or more"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"decoder": "specultive"}, "Did you mean 'speculative'"),
        ({"decoder": {"name": "sjd", "windw": 3}}, "Did you mean 'window'"),
        ({"decoder": "speculative"}, "no modules of mtp"),
        ({"decoder": "gumbel", "draft": "mtp"}, "no modules of multi-token prediction"),
        ({"decoder": "ancestral", "draft": "small"}, "ancestral takes no draft"),
        ({"seeds": [-1]}, "seed -1 is out of range"),
        ({"seeds": 3}, "seeds are a list of whole numbers"),
        ({"seeds": torch.arange(2)}, "seeds are a list of whole numbers"),
    ],
)
def test_what_cannot_be_sampled_is_refused(how, says):
    flow = model()
    if how.get("draft") == "small":
        how = {**how, "draft": model(1)}
    with pytest.raises(UserError, match=says):
        flow.sample(["dark"], **{"seeds": [0], **how})


def test_a_draft_of_another_vocabulary_or_another_tokenizer_is_refused():
    flow = model()
    for other in (model(tokenizer=GreyConfig(levels=7)), model(grid=(4, 4))):
        with pytest.raises(UserError, match="both must be of one tokenizer"):
            flow.sample(["dark"], seeds=[0], decoder="speculative", draft=other)
    other = model()
    other.tokenizer.centres.mul_(1.01)  # the same sizes, other weights
    with pytest.raises(UserError, match="both must be of one tokenizer"):
        flow.sample(["dark"], seeds=[0], decoder="speculative", draft=other)


def test_a_sequence_longer_than_the_model_is_refused():
    flow = model()
    c = flow.embed_prompts(["dark"], 1)
    with pytest.raises(UserError, match="13 tokens are too many; the model has 12"):
        flow.network(torch.zeros(1, 13, dtype=torch.int64), c.tokens, c.mask)


def test_what_are_no_tokens_of_the_model_is_refused():
    flow, tokens = model(), torch.zeros(2, 12, dtype=torch.int64)
    assert flow.log_prob_of(tokens[:, :3]).shape == (2,) and flow.to_pictures(tokens).shape == (2, *flow.shape)
    for go in (flow.log_prob_of, flow.to_pictures):
        for bad in (tokens.view(2, 3, 4), tokens.int(), tokens.float(), tokens[0], tokens.repeat(1, 2)):
            with pytest.raises(UserError, match="tokens must be B x "):
                go(bad)
        for bad in (tokens - 1, tokens + 6):
            with pytest.raises(UserError, match=r"tokens are 0 \.\. 5, and these"):
                go(bad)


def test_what_does_not_fit_the_tokenizer_is_refused():
    config, text = TokenFlowConfig(GreyConfig()), LabelsConfig(CLASSES, dim=5).build()
    sizes = {"width": 32, "layers": 1, "context_dim": 5}
    net = TokenTransformerConfig(vocabulary=6, grid=(4, 4), **sizes).build()
    with pytest.raises(UserError, match="the model has 6 tokens on 4 x 4, the tokenizer 6 on 3 x 4; leave model.vocab"):
        config.build(net, text, shape=(3, 6, 8))
    with pytest.raises(UserError, match="7 x 8 is no multiple of the tokenizer's 2; try 8 x 8"):
        config.fits((3, 7, 8))
    with pytest.raises(UserError, match="pictures of 3 channels, not of samples of"):
        config.fits((1, 8, 8))
    with pytest.raises(UserError, match="take model token_transformer"):
        config.build(MLPVelocityConfig(shape=(2,), pooled_dim=0).build(), text, shape=(3, 6, 8))
    with pytest.raises(UserError, match="no tokenizer to tell them"):
        TokenTransformerConfig(**sizes).build()


def test_pictures_of_another_size_are_refused():
    with pytest.raises(UserError, match=r"pictures of \(3, 8, 6\); this model has the grid of \(3, 6, 8\)"):
        model().log_prob(torch.zeros(1, 3, 8, 6))


def test_bytes_are_no_pictures_to_a_tokenizer():
    flow = model()
    with pytest.raises(UserError, match="not torch.uint8; scale levels as k / 127.5 - 1"):
        flow.log_prob(torch.zeros(1, *flow.shape, dtype=torch.uint8))


def test_a_model_without_a_text_cannot_be_guided():
    torch.manual_seed(0)
    net = TokenTransformerConfig(vocabulary=6, grid=(3, 4), width=32, layers=1, context_dim=0).build()
    flow = TokenFlowConfig(GreyConfig()).build(net, NoTextConfig().build(), shape=(3, 6, 8)).eval()
    assert flow.sample([""], seeds=[0]).x.shape == (1, 3, 6, 8)
    with pytest.raises(UserError, match="this model has no condition"):
        flow.sample([""], seeds=[0], guidance=2.0)


def test_settings_of_a_config_are_checked_when_it_is_read():
    read = lambda **how: from_dict(DecodeConfig, how)
    assert read(decoder={"name": "sjd", "window": 3}).decoder.window == 3 and read().decoder == Ancestral()
    with pytest.raises(UserError, match="top_k = 0"):
        read(top_k=0)
    with pytest.raises(UserError, match="does nothing for Ancestral"):
        read(draft="mtp")
    with pytest.raises(UserError, match="mtp_weight = -1"):
        TokenFlowConfig(GreyConfig(), mtp_weight=-1)


# -------------------------------------------------------------------------------------------- a trained model's samples


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 80 steps, with two modules."""
    folder = tmp_path_factory.mktemp("tokens")
    network = TokenTransformerConfig(width=32, layers=2, heads=2, mtp=2)
    return train(run_config(folder / "run", model=network, steps=80))


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_decoders", ROOT / "scripts" / "bench_decoders.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        yield module


def drawn(flow, decoder, first, n=800):
    tokens = flow.sample(["sun"], seeds=range(first, first + n), decoder=decoder).decoded.tokens
    return tokens, flow.log_prob_of(tokens, flow.text.encode(["sun"]))


def test_accelerated_samples_of_a_trained_model_are_its_ancestral_ones(trained, bench):
    """Two-sample tests of the mean log-probability and of the tokens' histogram; a lossy decoder fails them."""
    flow = load(trained)
    base, known = drawn(flow, "ancestral", 0)
    for i, decoder in enumerate(("speculative", {"name": "sjd", "window": 4}, "gumbel"), start=1):
        tokens, said = drawn(flow, decoder, 10_000 * i)
        assert abs(bench.mean_z(said, known)) < 4 and abs(bench.histogram_z(tokens, base, 6)) < 4, decoder
    lossy, said = drawn(flow, {"name": "relaxed", "lenience": 0.2}, 90_000)
    assert max(abs(bench.mean_z(said, known)), bench.histogram_z(lossy, base, 6)) > 4


def test_the_table_of_decoders_has_every_figure_and_the_marks(trained, bench, capsys, monkeypatch):
    monkeypatch.setattr(
        sys,
        "argv",
        ["bench", str(trained), "--draft", str(trained), "--batch", "1", "2", "--rounds", "1", "--check", "4"],
    )
    bench.main()
    out = capsys.readouterr().out
    for words in ("batch 1: ancestral", "speculative 2 mtp", "speculative-tree (3,2,1) small", "relaxed", "LOSSY"):
        assert words in out
    assert out.count("the mark is") == 2 and "z of the mean log-probability" in out


@pytest.mark.parametrize("options", [("--rounds", "0"), ("--check", "1")])
def test_too_few_rounds_or_pictures_for_a_table_are_refused(bench, capsys, monkeypatch, options):
    monkeypatch.setattr(sys, "argv", ["bench", "run", *options])
    with pytest.raises(SystemExit):
        bench.main()
    assert "the least is" in capsys.readouterr().err


def test_histograms_of_pictures_that_are_all_alike_tell_nothing(bench):
    same = torch.ones(8, 4, dtype=torch.int64)
    assert bench.histogram_z(same, same, 3) != bench.histogram_z(same, same, 3)  # NaN


# ------------------------------------------------------------------------------------------------------------ commands


def command(capsys, *arguments, code=0):
    assert main([str(each) for each in arguments]) == code
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.err.strip().splitlines()[-1]


def test_genflow_sample_says_what_decoding_took(trained, tmp_path, capsys):
    ask = ("sample", trained, "--prompt", "sun", "-n", 3, "--out", tmp_path)
    assert "(16 tokens in 16.0 passes a picture, 16 at most; lossless)" in command(capsys, *ask)
    out = command(capsys, *ask, "--decoder", "speculative", "window=3", "--temperature", 0.9, "--top-k", 5)
    assert "% of the tested guesses held; lossless" in out
    about = read_settings(tmp_path / "grid.png")
    assert about["decoder"] == {"name": "speculative", "window": 3} and about["top_k"] == 5 and about["nfe"] < 16
    assert "LOSSY: not samples of the model" in command(capsys, *ask, "--decoder", "relaxed", "--draft", "mtp")
    assert "of the tested guesses held" in command(capsys, *ask, "--decoder", "gumbel", "--draft", trained)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--top-k", 0], "top_k = 0 leaves no token"),
        (["--temperature", -1], "temperature = -1.0 must be 0 (greedy) or more"),
        (["--decoder", "sdj"], "Did you mean 'sjd'"),
        (["--decoder", "sjd", "window=0"], "window = 0 is too few"),
        (["--decoder", "sjd", "--draft", "mtp"], "decoder sjd takes no draft"),
        (["--decoder", "gumbel", "--draft", "nowhere"], "nowhere does not exist"),
        (["--sampler", "heun"], "--sampler does nothing for a TokenFlow"),
        (["--size", 16], "--size is for models of a velocity"),
    ],
)
def test_genflow_sample_refuses_in_one_line(trained, tmp_path, capsys, options, says):
    assert says in command(capsys, "sample", trained, "--prompt", "sun", "--out", tmp_path, *options, code=2)


def test_options_of_tokens_do_nothing_for_a_velocity(tmp_path, capsys):
    run = train(run_config(tmp_path / "unet", model=UNetConfig(channels=8), flow=RectifiedFlowConfig(), steps=1))
    says = command(capsys, "sample", run, "--prompt", "sun", "--top-k", 3, code=2)
    assert "--top-k does nothing for a RectifiedFlow" in says


def test_genflow_info_shows_which_decoders_are_lossless(capsys):
    lines = {line.split()[0]: line for line in command(capsys, "info", "decoder").splitlines()[1:] if line.strip()}
    assert "lossless" in lines["sjd"] and "LOSSY" in lines["relaxed"] and "LOSSY" not in lines["gumbel"]


def test_genflow_plot_shows_which_tokens_each_pass_settled(trained, tmp_path, capsys):
    out = command(capsys, "plot", trained, "--what", "strip", "--decoder", "sjd", "--out", tmp_path)
    assert "the tokens that each pass of the model settled" in out and (tmp_path / "strip.png").stat().st_size > 2000
    says = command(capsys, "plot", trained, "--what", "grid", "--out", tmp_path, code=2)
    assert "a TokenFlow has no velocity" in says


def test_genflow_edit_does_not_send_a_model_of_tokens_into_another_mistake(trained, tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "p.png")
    for way in (["--prompt", ""], ["--into", tmp_path / "p.png"]):
        says = command(capsys, "edit", trained, tmp_path / "p.png", *way, "--out", tmp_path / "e", code=2)
        assert "a TokenFlow, which draws pictures and edits none" in says


def test_a_strip_outlines_guesses_and_own_draws_apart():
    passes = torch.tensor([[1, 2, 2, 2, 3, 3]])
    figure = plot_passes(torch.zeros(1, 3, 4, 6), passes, (2, 3), ["an otter"])
    inks = [[patch.get_edgecolor() for patch in axes.patches] for axes in figure.axes]
    assert [len(each) for each in inks] == [1, 3, 2]
    assert len(set(inks[0])) == 1 and inks[1][0] == inks[1][1] == inks[2][0] != inks[1][2] == inks[2][1] == inks[0][0]
    shown = figure.axes[1].images[0].get_array()
    assert float(shown[0, 0, 0]) == 0.5 and float(shown[3, 5, 0]) == pytest.approx(0.93)
    with pytest.raises(UserError, match="1 or 3 channels"):
        plot_passes(torch.zeros(1, 4, 4, 6), passes, (2, 3), ["an otter"])


@pytest.mark.parametrize("passes", [1, 3])
def test_the_words_beside_a_strip_are_all_within_it(passes):
    when = torch.arange(256)[None] % passes + 1
    figure = plot_passes(torch.zeros(1, 3, 16, 16), when, (16, 16), ["a caption of some length"])
    figure.draw_without_rendering()
    assert figure.axes[0].texts[0].get_window_extent().x0 >= 0


def test_genflow_eval_reports_nats_of_tokens_and_distances(trained, capsys, tmp_path):
    out = command(
        capsys, "eval", trained, "--metrics", "likelihood", "fd", "--features", "pixels", "-n", 8, "--out", tmp_path
    )
    assert "nats of tokens" in out and "of a picture's 16 tokens of 6" in out and "FD" in out


def test_a_sample_does_not_hang_on_the_autocast_of_who_asks():
    flow, seen = model().float(), []
    flow.network.blocks[0].qkv.register_forward_hook(lambda _layer, _inputs, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        flow.sample(["dark"], seeds=[0])
    assert set(seen) == {torch.float32}


def test_a_draft_of_another_text_hears_prompts_alone():
    """A prepared condition of the model would be another class to it."""
    flow, other = model(), model(1, text=LabelsConfig(CLASSES[::-1], dim=5))
    how = {"seeds": [0], "decoder": "speculative", "draft": other}
    assert flow.sample(["dark"], **how).x.shape == (1, *flow.shape)
    with pytest.raises(UserError, match="the draft has another text encoder than the model; give prompts"):
        flow.sample(flow.text.encode(["dark"]), **how)
