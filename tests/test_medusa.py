"""Medusa heads: fitted to a frozen model, exact as drafts of chains and trees, and bound to the model that they know."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from toy_tokens import CLASSES, GreyConfig, model, run_config

from genflow.ar.decoders import GumbelCoupled, MedusaTypical, Speculative, SpeculativeTree
from genflow.ar.drafts import HeadsDraft
from genflow.ar.law import TokenLaw
from genflow.ar.medusa import MedusaFlow, MedusaFlowConfig
from genflow.cli import main
from genflow.errors import UserError
from genflow.flows.store import load
from genflow.functional import Rng
from genflow.networks.token_transformer import MedusaHeads, MedusaHeadsConfig, TokenTransformerConfig
from genflow.text.trained import LearnedTextConfig
from genflow.training.run import train
from tests.noise import shaken

PROMPTS = ["dark", "light", "mixed", "dark", "light", "mixed"]


def heads(flow, n=3, seed=1):
    torch.manual_seed(seed)
    network = MedusaHeads(n, flow.network.config.width, flow.network.vocabulary)
    medusa = MedusaFlow(MedusaFlowConfig("base"), network, flow).double().eval()
    flow.tokenizer.float()
    shaken(network, 0.2)
    return medusa


def test_heads_have_weights_of_their_own_and_begin_as_the_models_head():
    flow = model()
    network = MedusaHeads(3, 32, 6)
    MedusaFlow(MedusaFlowConfig("base"), network, flow)
    assert sum(p.numel() for p in network.parameters()) == 3 * (32 * 32 + 32 + 6 * 32)
    h = torch.randn(2, 32)
    torch.testing.assert_close(network(h), (h @ flow.network.head.weight.float().T)[:, None].expand(-1, 3, -1))


def test_the_loss_is_that_of_the_tokens_after_the_next_and_moves_the_heads_alone():
    flow = model()
    medusa = heads(flow)
    x = torch.rand(6, *flow.shape) * 2 - 1
    b = SimpleNamespace(x=x, condition=flow.text.encode([CLASSES[i % 3] for i in range(6)]), position=torch.arange(6))
    out = medusa.loss(b, Rng(0))
    out.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in medusa.network.parameters())
    assert all(p.grad is None for p in flow.parameters())
    c = flow.heard(b, Rng(0))
    tokens = flow.to_tokens(x)
    h, _ = flow.network.hidden(tokens, c.tokens, c.mask)
    logits = medusa.network(flow.network.norm(h))
    each = [F.cross_entropy(logits[:, :-k, k - 1].flatten(0, 1), tokens[:, k:].flatten()) for k in (1, 2, 3)]
    torch.testing.assert_close(out.loss, 0.8 * each[0] + 0.64 * each[1] + 0.512 * each[2])
    torch.testing.assert_close(
        medusa.validate(b)["validation_head2"], medusa._nats(b, flow.embed(b.condition))[1].mean()
    )


@pytest.mark.parametrize("law", [TokenLaw(), TokenLaw(guidance=1.7, top_k=5)])
def test_each_guess_is_drawn_from_its_heads_law(law, monkeypatch):
    flow = model()
    medusa, asked, original = heads(flow), [], HeadsDraft.propose

    def spied(self, symbols, done, shape, noise, stream):
        guess = original(self, symbols, done, shape, noise, stream)
        if guess is not None:
            asked.append((symbols.clone(), done.clone(), shape, guess))
        return guess

    monkeypatch.setattr(HeadsDraft, "propose", spied)
    how = {"guidance": law.guidance, "top_k": law.top_k}
    medusa.sample(PROMPTS, seeds=range(6), decoder=SpeculativeTree((2, 2, 1)), **how)
    condition, null = flow.embed_prompts(PROMPTS, 6), flow.embed(flow.text.null())
    checked = 0
    for symbols, done, shape, guess in asked:
        for row, n in enumerate(done.tolist()):
            if n >= 12:
                continue
            known = F.pad(symbols[row, 1 : n + 1], (0, 12 - n))[None]
            states = [flow.network.hidden(known, c.tokens, c.mask)[0] for c in (condition[[row]], null)]
            logits = [medusa.network(flow.network.norm(h[:, n - 1])) for h in states]
            p = law(*logits[: 1 if law.guidance == 1 else 2])[0]
            for node in range(shape.inner):
                torch.testing.assert_close(guess.q[row, node], p[int(shape.depth[node])], rtol=1e-6, atol=1e-9)
                checked += 1
    assert checked > 20


@pytest.mark.parametrize("decoder", [Speculative(3), SpeculativeTree((2, 2, 1)), MedusaTypical((2, 2))])
def test_rows_do_not_hang_on_each_other(decoder):
    medusa = heads(model())
    together = medusa.sample(PROMPTS, seeds=range(6), decoder=decoder)
    for i in range(6):
        alone = medusa.sample([PROMPTS[i]], seeds=[i], decoder=decoder)
        assert torch.equal(alone.x[0], together.x[i])
    assert together.lossless == (not isinstance(decoder, MedusaTypical))
    assert together.decoded.accepted.sum() > 0


def test_with_the_heads_gumbel_is_token_for_token_ancestral():
    medusa = heads(model())
    expected = medusa.base.sample(PROMPTS, seeds=range(6))
    for draft in ("medusa", None):
        assert torch.equal(medusa.sample(PROMPTS, seeds=range(6), decoder=GumbelCoupled(3), draft=draft).x, expected.x)
    assert torch.equal(
        medusa.base.sample(PROMPTS, seeds=range(6), decoder=GumbelCoupled(2), draft=medusa).x, expected.x
    )


def test_chains_and_trees_of_heads_are_exact():
    """Two tokens of three symbols: the pairs are counted against the model's own probabilities."""
    flow = model(tokenizer=GreyConfig(levels=3), grid=(1, 3))
    medusa, n = heads(flow, 2), 6000
    every = torch.cartesian_prod(*[torch.arange(3)] * 3)
    p = flow.log_prob(flow.to_pictures(every), flow.text.encode(["light"])).exp()
    for decoder in (Speculative(2), SpeculativeTree((2, 2))):
        tokens = medusa.sample(["light"], seeds=range(n), decoder=decoder).decoded.tokens
        counts = torch.bincount(tokens @ torch.tensor([9, 3, 1]), minlength=27).double()
        z = (((counts - n * p) ** 2 / (n * p)).sum() - 26) / (2 * 26) ** 0.5
        assert abs(float(z)) < 4


def test_more_guesses_than_heads_are_refused():
    with pytest.raises(UserError, match="looks 3 tokens ahead, and 5 are asked"):
        heads(model()).sample(["dark"], seeds=[0], decoder=Speculative(5))


# ------------------------------------------------------------------------------------------------------------- as a run


def base_run(tmp_path, **changes):
    network = TokenTransformerConfig(width=32, layers=2, heads=2)
    return train(run_config(tmp_path / "base", **{"model": network, "steps": 30, **changes}))


def heads_config(tmp_path, base, **changes):
    config = {"model": MedusaHeadsConfig(3), "flow": MedusaFlowConfig(str(base)), **changes}
    return run_config(tmp_path / "heads", **config)


def test_heads_are_trained_saved_without_the_base_loaded_and_resumed(tmp_path):
    base = base_run(tmp_path)
    config = heads_config(tmp_path, base, steps=40, validate_every=40, validation_split="train")
    run = train(config)
    flow = load(run)
    assert isinstance(flow, MedusaFlow)
    assert not [name for name in flow.state_dict() if name.startswith("base.")]
    values = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert values[-1]["validation_loss"] < 1.7 and "validation_head3" in values[-1]
    owner, how = load(base), {"seeds": range(3), "decoder": "gumbel"}
    expected = owner.sample(["otter"], seeds=range(3)).x
    assert torch.equal(owner.sample(["otter"], draft=str(run), **{**how, "decoder": GumbelCoupled(3)}).x, expected)
    assert flow.sample(["otter"], seeds=range(3), decoder=Speculative(3)).lossless
    more = train(replace(config, train=replace(config.train, steps=42)))
    assert sorted(p.name for p in (more / "checkpoints").iterdir())[-1] == "step-00000042"


def test_genflow_sample_of_a_run_of_heads_guesses_with_them(tmp_path, capsys):
    base = base_run(tmp_path, steps=5)
    run = train(heads_config(tmp_path, base, model=MedusaHeadsConfig(4)))
    for options in ((), ("--decoder", "speculative-tree"), ("--decoder", "gumbel", "window=4", "--draft", "medusa")):
        assert main(["sample", str(run), "--prompt", "sun", "--out", str(tmp_path / "out"), *options]) == 0
        assert "of the tested guesses held; lossless" in capsys.readouterr().out
    assert main(["sample", str(run), "--prompt", "sun", "--decoder", "sjd", "--draft", "medusa"]) == 2
    assert "decoder sjd takes no draft" in capsys.readouterr().err
    Image.new("RGB", (8, 8)).save(tmp_path / "p.png")
    assert main(["edit", str(run), str(tmp_path / "p.png"), "--prompt", "sun", "--out", str(tmp_path / "out")]) == 2
    assert "a MedusaFlow, which draws pictures and edits none" in capsys.readouterr().err


def test_heads_of_a_base_that_has_changed_are_refused(tmp_path):
    base = base_run(tmp_path, steps=2)
    config = heads_config(tmp_path, base)
    run = train(config)
    before = load(base)
    base_run(tmp_path, steps=4)
    with pytest.raises(UserError, match="the heads were fitted to model [0-9a-f]{12}, and .* is now [0-9a-f]{12}"):
        load(run)
    with pytest.raises(UserError, match="the heads were fitted to model"):
        train(replace(config, train=replace(config.train, steps=5)))
    config = replace(config, out=str(tmp_path / "anew"))
    with pytest.raises(UserError, match="the heads were fitted to model .*, and this is"):
        before.sample(["otter"], seeds=[0], decoder="gumbel", draft=load(train(config)))


def test_what_does_not_fit_the_base_is_refused(tmp_path):
    base = base_run(tmp_path, steps=2)
    with pytest.raises(UserError, match="hears another text; take its own, text: "):
        train(heads_config(tmp_path, base, text=LearnedTextConfig(dim=16, layers=1, heads=2, max_tokens=7)))
    with pytest.raises(UserError, match=r"pictures are \(3, 4, 4\)"):
        train(heads_config(tmp_path, base, size=4))
    with pytest.raises(UserError, match="take model medusa_heads"):
        train(heads_config(tmp_path, base, model=TokenTransformerConfig(width=32, layers=1, grid=(4, 4))))
    with pytest.raises(UserError, match="heads = 0"):
        MedusaHeadsConfig(0)
    with pytest.raises(UserError, match="no base to tell them"):
        MedusaHeadsConfig().build()


def test_the_base_stays_in_eval_mode_while_the_heads_train():
    medusa = heads(model()).train()
    assert medusa.training and medusa.network.training
    assert not any(part.training for part in medusa.base.modules())
