"""Quantised bottlenecks and the tokenizers that runs of them become."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from genflow.data.emoji import EmojiConfig
from genflow.errors import UserError
from genflow.flows.autoencoder import AutoencoderFlowConfig
from genflow.flows.store import find_model
from genflow.flows.trained import TrainedAutoencoderConfig, TrainedTokenizerConfig, resolved
from genflow.functional import Rng
from genflow.networks.autoencoders import TinyAutoencoderConfig
from genflow.networks.quantizers import FSQConfig, VQConfig, perplexity, straight_through
from genflow.training.config import RunConfig, TrainConfig
from genflow.training.run import train
from tests.processes import together


def places(*columns):
    """B x C x 1 x 1 of rows of numbers."""
    return torch.tensor(columns)[..., None, None]


# ------------------------------------------------------------------------------------------------------------------- FSQ


def test_fsq_rounds_known_values_to_known_codes():
    """Three levels -1, 0, 1 and four levels -2 .. 1: digits 0 .. 2 and 0 .. 3, the first counting fastest."""
    fsq = FSQConfig((3, 4)).build()
    h = places([0.0, 0.0], [9.0, 9.0], [-9.0, -9.0], [9.0, 0.0])
    assert fsq.codes(h).flatten().tolist() == [1 + 3 * 2, 2 + 3 * 3, 0, 2 + 3 * 2]
    z = fsq(h).z[..., 0, 0]
    torch.testing.assert_close(z, torch.tensor([[0.0, 0.0], [1.0, 0.5], [-1.0, -1.0], [1.0, 0.0]]))


def test_fsq_bounds_zero_to_zero_and_stays_within_its_levels():
    fsq = FSQConfig((8, 5, 3)).build()
    torch.testing.assert_close(fsq.bound(torch.zeros(1, 3, 1, 1)), torch.zeros(1, 3, 1, 1), atol=1e-6, rtol=0)
    for sign, ends in ((1, [3.0, 2.0, 1.0]), (-1, [-4.0, -2.0, -1.0])):
        assert fsq.bound(sign * torch.full((1, 3, 1, 1), 50.0)).round().flatten().tolist() == ends


def test_the_gradient_of_fsq_is_that_of_its_bound():
    fsq = FSQConfig((5,)).build()
    h = torch.tensor([0.3, -1.2]).view(2, 1, 1, 1).requires_grad_()
    fsq(h).z.sum().backward()
    half = 4 * (1 - 1e-3) / 2
    torch.testing.assert_close(h.grad, half * (1 - h.detach().tanh() ** 2) / 2)


def test_latents_that_are_not_numbers_reach_the_loss():
    h = torch.zeros(2, 4, 3, 3)
    h[1, 0, 0, 0] = math.nan
    squeezed = FSQConfig().build()(h)
    assert squeezed.z[0].isfinite().all() and squeezed.penalty[0] == 0
    assert squeezed.z[1, 0, 0, 0].isnan() and squeezed.penalty[1].isnan()


@pytest.mark.parametrize("levels", [(3, 4), (8, 5, 5), (7, 3, 6, 4)])
def test_every_code_of_fsq_has_its_own_embedding_and_comes_back(levels):
    fsq = FSQConfig(levels).build()
    codes = torch.arange(fsq.vocabulary).view(1, 1, -1)
    z = fsq.embed(codes)
    assert len({tuple(row) for row in z[0, :, 0].T.tolist()}) == fsq.vocabulary
    digits = torch.tensor(list(itertools.product(*map(range, reversed(levels))))).flip(1)
    half = torch.tensor(levels) // 2
    torch.testing.assert_close(z[0, :, 0].T, (digits - half) / half)
    back = z * half.view(-1, 1, 1)  # the bounded value of which it is the rounding
    assert torch.equal(fsq._count(back.round()), codes)


@given(st.lists(st.floats(-20, 20), min_size=3, max_size=3))
def test_the_codes_of_what_the_decoder_reads_are_the_codes(row):
    fsq = FSQConfig((8, 6, 5)).build()
    h = places(row)
    torch.testing.assert_close(fsq.embed(fsq.codes(h)), fsq(h).z, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: FSQConfig(()), "3 levels or more"),
        (lambda: FSQConfig((8, 2)), "3 levels or more"),
        (lambda: FSQConfig((1000,) * 3), "too many"),
        (lambda: FSQConfig((1002, 5)), "never reached; give fewer"),
        (lambda: VQConfig(1), "vocabulary = 1"),
        (lambda: VQConfig(decay=1.0), "decay"),
        (lambda: VQConfig(channels=0), "channels = 0"),
    ],
)
def test_quantisers_that_cannot_be_are_refused(make, says):
    with pytest.raises(UserError, match=says):
        make()


# ---------------------------------------------------------------------------------------------------------------- VQ-EMA


def vq(**config):
    torch.manual_seed(1)
    quantizer = VQConfig(**{"vocabulary": 4, "channels": 2, "decay": 0.9, **config}).build()
    quantizer.initialise(torch.randn(3, 2, 4, 4))
    return quantizer


@pytest.mark.parametrize("places", [16, 3])  # more than codes, and fewer
def test_codes_begin_as_latents_or_near_them(places):
    quantizer = VQConfig(vocabulary=8, channels=2).build()
    quantizer.counts.fill_(7)
    h = 50 + 5 * torch.randn(1, 2, 1, places)
    quantizer.initialise(h)
    near = torch.cdist(quantizer.codebook, h[0, :, 0].T).min(1)
    assert near.values.max() < 0.25 and len(near.indices.unique()) == min(places, 8)
    assert len(quantizer.codebook.unique(dim=0)) == 8
    assert torch.equal(quantizer.sums, quantizer.codebook) and (quantizer.counts == 1).all()


def test_vq_takes_the_nearest_code():
    quantizer = vq()
    h = torch.randn(2, 2, 3, 3)
    rows = h.permute(0, 2, 3, 1).reshape(-1, 2)
    expected = torch.cdist(rows, quantizer.codebook).argmin(1).view(2, 3, 3)
    assert torch.equal(quantizer.codes(h), expected)
    assert torch.equal(quantizer.codes(quantizer.embed(expected)), expected)


def test_vq_takes_the_nearest_code_far_from_zero_too():
    quantizer = vq(vocabulary=32).eval()
    quantizer.codebook.copy_((64 * quantizer.codebook).round() / 64)
    h = (64 * torch.randn(2, 2, 8, 8)).round() / 64  # so that what is added rounds nothing
    near = quantizer.codes(h)
    quantizer.codebook += 2**13
    assert torch.equal(quantizer.codes(h + 2**13), near)


def test_the_codes_of_vq_follow_the_closed_formula():
    """N_T = g^T N_0 + (1 - g) sum_t g^(T-t) n_t, and so the sums; e = m / N (van den Oord 2017, eq. 6-8)."""
    quantizer = vq().train()
    counts, sums = quantizer.counts.clone(), quantizer.sums.clone()
    for step in range(3):
        h = torch.randn(4, 2, 3, 3)
        codes = quantizer.codes(h)
        rows, flat = h.permute(0, 2, 3, 1).reshape(-1, 2), codes.flatten()
        n = torch.bincount(flat, minlength=4).float()
        m = torch.stack([rows[flat == k].sum(0) for k in range(4)])
        counts, sums = 0.9 * counts + 0.1 * n, 0.9 * sums + 0.1 * m
        quantizer(h, Rng(0, step))
        torch.testing.assert_close(quantizer.counts, counts)
        torch.testing.assert_close(quantizer.codebook, sums / counts[:, None])


def test_a_code_that_nothing_is_near_is_put_where_a_latent_is():
    quantizer = vq(decay=0.0).train()
    quantizer.codebook[2] = torch.tensor([90.0, 90.0])
    h = torch.randn(4, 2, 3, 3)
    quantizer(h, Rng(0))
    assert (torch.cdist(quantizer.codebook[2:3], h.permute(0, 2, 3, 1).reshape(-1, 2)) < 1e-5).any()


def test_a_code_of_a_small_part_of_its_even_share_is_put_elsewhere():
    quantizer = vq(decay=0.0).train()
    quantizer.codebook[2] = torch.tensor([90.0, 90.0])
    h = torch.randn(1, 2, 20, 20)
    h[..., -1, -1] = 90.0  # one of 400, where 100 would be even
    quantizer(h, Rng(0))
    assert quantizer.codebook[2].abs().max() < 10 and quantizer.counts[2] == 100


def test_codes_do_not_move_in_evaluation():
    quantizer = vq()
    before = quantizer.codebook.clone()
    quantizer.eval()(torch.randn(4, 2, 3, 3), Rng(0))
    quantizer.train()(torch.randn(4, 2, 3, 3))
    assert torch.equal(quantizer.codebook, before)


def test_vq_hands_the_gradient_through_and_pulls_latents_to_their_codes():
    quantizer = vq()
    h = torch.randn(2, 2, 3, 3, requires_grad=True)
    out = quantizer(h)
    weight = torch.randn_like(h)
    (through,) = torch.autograd.grad((out.z * weight).sum(), h, retain_graph=True)
    assert torch.equal(through, weight)
    (pull,) = torch.autograd.grad(out.penalty.sum(), h)
    torch.testing.assert_close(pull, 2 * 0.25 * (h - quantizer.embed(quantizer.codes(h))).detach())


def test_straight_through_has_the_value_of_one_and_the_gradient_of_the_other():
    z = torch.tensor([0.3], requires_grad=True)
    out = straight_through(z, z.detach().round())
    out.sum().backward()
    assert out.item() == 0 and z.grad.item() == 1


def test_perplexity_counts_the_codes_in_even_use():
    assert perplexity(torch.tensor([5, 5, 0, 0])).item() == pytest.approx(2)
    assert perplexity(torch.tensor([7, 0, 0, 0])).item() == pytest.approx(1)


# ------------------------------------------------------------------------------------------------------------- trained runs


def run_config(out, bottleneck, **how):
    return RunConfig(
        data=EmojiConfig(size=16, limit=24),
        model=TinyAutoencoderConfig(width=8, blocks=1, factor=4),
        flow=AutoencoderFlowConfig(bottleneck),
        train=TrainConfig(
            **{"steps": 2, "batch_size": 8, "precision": "fp32", "trackers": (), "preview_every": 0, **how}
        ),
        out=str(out),
    )


@pytest.fixture(scope="module", params=["fsq", "vq"])
def run(request, tmp_path_factory):
    bottleneck = {"fsq": FSQConfig((5, 4)), "vq": VQConfig(12, 3)}[request.param]
    return train(run_config(tmp_path_factory.mktemp("run") / "tokens", bottleneck))


def test_a_trained_tokenizer_encodes_alike_alone_and_in_a_batch_and_decodes_what_training_saw(run):
    tokenizer = TrainedTokenizerConfig(str(run)).build().eval()
    x = torch.rand(5, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        codes = tokenizer.encode(x)
        assert codes.shape == (5, 4, 4) and codes.dtype == torch.int64
        assert int(codes.min()) >= 0 and int(codes.max()) < tokenizer.vocabulary
        assert torch.equal(codes, torch.cat([tokenizer.encode(each[None]) for each in x]))
        flow = TrainedTokenizerConfig(str(run)).flow()
        torch.testing.assert_close(tokenizer.decode(codes).clamp(-1, 1), flow.reconstruct(x))


def test_a_tokenizer_that_is_cast_to_half_precision_still_codes_and_decodes(run):
    tokenizer, flow = (
        TrainedTokenizerConfig(str(run)).build().eval().bfloat16(),
        TrainedTokenizerConfig(str(run)).flow(),
    )
    x = torch.rand(5, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        codes = flow.codes(x)
        assert float((tokenizer.encode(x) == codes).float().mean()) > 0.9
        torch.testing.assert_close(
            tokenizer.decode(codes).float(), flow.decode(tokenizer.bottleneck.embed(codes)), rtol=0, atol=0.05
        )


def test_a_resolved_tokenizer_needs_its_run_for_its_weights_only(run, tmp_path):
    config = resolved(TrainedTokenizerConfig(str(run)))
    assert set(config.recipe) == {"model", "bottleneck"} and len(config.sha256) == 64
    gone = type(config)(str(tmp_path / "gone"), config.recipe, config.sha256)
    assert resolved(gone) == gone
    bare = gone.build()
    full = TrainedTokenizerConfig(str(run)).build()
    bare.load_state_dict(full.state_dict())
    assert bare.vocabulary == full.vocabulary


def test_a_run_of_a_tokenizer_is_no_autoencoder(run):
    with pytest.raises(UserError, match="holds a tokenizer; take it as tokenizer"):
        TrainedAutoencoderConfig(str(run)).build()


def test_training_tells_how_many_codes_are_in_use(run, tmp_path):
    config = run_config(tmp_path / "told", FSQConfig((5, 4)), validate_every=2, validation_images=4)
    lines = (train(config) / "metrics.jsonl").read_text()
    assert '"validation_perplexity"' in lines and '"validation_psnr"' in lines


def test_perplexity_of_a_batch_is_that_of_its_histogram():
    fsq = FSQConfig((5, 4)).build()
    h = torch.randn(3, 2, 4, 4)
    p = torch.bincount(fsq.codes(h).flatten(), minlength=20) / 48
    entropy = -(p[p > 0] * p[p > 0].log()).sum()
    torch.testing.assert_close(fsq(h).told["perplexity"], entropy.exp())


def test_what_leaves_the_slope_of_fsqs_bound_is_pulled_back():
    fsq = FSQConfig((5, 4), saturation=0.5).build()
    h = places([1.9, -1.9], [3.0, -4.0]).requires_grad_()
    penalty = fsq(h).penalty
    torch.testing.assert_close(penalty, torch.tensor([0.0, 0.5 * (1 + 4)]))
    penalty.sum().backward()
    assert h.grad.flatten().tolist() == [0, 0, 1, -2]
    assert set(fsq.codes(places([2.0, 2.0], [-2.0, -2.0])).flatten().tolist()) == {4 + 5 * 3, 0}  # all levels within


CONFIG = """
data: {name: emoji, size: 16, limit: 24}
model: {name: tiny_autoencoder, width: 8, blocks: 1, factor: 4}
flow: {name: autoencoder, bottleneck: {name: vq, vocabulary: 12, channels: 3}}
train: {steps: 3, batch_size: 8, precision: fp32, trackers: [], preview_every: 0}
"""


def test_two_ranks_have_the_codebook_of_one(tmp_path):
    """Counts and sums are those of all ranks, and so are the codes."""
    (tmp_path / "vq.yaml").write_text(CONFIG)
    names = "import genflow.networks.quantizers, genflow.networks.autoencoders, genflow.flows.autoencoder"
    ended = together(2, [tmp_path / "vq.yaml", f"out={tmp_path / 'two'}"], before=names)
    assert [each.code for each in ended] == [0, 0], ended[0].said
    train(tmp_path / "vq.yaml", [f"out={tmp_path / 'one'}"])
    one, two = (load_file(find_model(tmp_path / name) / "model.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=2e-5, rtol=1e-4, msg=name)


def test_a_revived_code_is_where_the_first_rank_puts_it(monkeypatch):
    monkeypatch.setattr("genflow.networks.quantizers.of_first_rank", lambda rows: torch.full_like(rows, 7.0))
    quantizer = vq(decay=0.0).train()
    quantizer.codebook[2] = torch.tensor([90.0, 90.0])
    quantizer(torch.randn(4, 2, 3, 3), Rng(0))
    torch.testing.assert_close(quantizer.codebook[2], torch.tensor([7.0, 7.0]))
