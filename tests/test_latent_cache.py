"""Cached latents and texts: what training sees of them is what it sees of the pictures; a shard is whole or absent."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from genflow.cli import main
from genflow.conditions import Condition
from genflow.data import latents_cache, locks
from genflow.data.buckets import Buckets
from genflow.data.folders import FolderConfig
from genflow.data.latents import LatentDataset, LatentsConfig
from genflow.data.latents_cache import cache_latents
from genflow.data.loading import StreamSampler, loader
from genflow.data.locks import lock
from genflow.data.prepared import PreparedConditions
from genflow.errors import UserError
from genflow.flows.latent import LatentFlow, LatentFlowConfig
from genflow.flows.store import save_model
from genflow.functional import Rng
from genflow.interop.autoencoder import KLAutoencoderConfig
from genflow.networks.identity import identity
from genflow.networks.mmdit import MMDiTConfig
from genflow.text.none import NoTextConfig
from genflow.text.trained import LearnedText, LearnedTextConfig

VAE = KLAutoencoderConfig(channels=(32, 32), latent_channels=4, layers=1, scale=1.3, shift=0.1, middle_attention=False)
CONFIG = """
data: {{name: folder, path: {pictures}, size: 16}}
text: {{name: learned, dim: 8, layers: 1, heads: 2, max_tokens: 4}}
model: {{name: mmdit, depth: 1, hidden: 16, heads: 2, in_channels: 4, sample_size: 4, context_dim: 8, pooled_dim: 8}}
flow:
  name: latent
  autoencoder: {{name: kl, channels: [32, 32], latent_channels: 4, layers: 1, scale: 1.3, shift: 0.1,
                middle_attention: false}}
init: {init}
train: {{batch_size: 4, steps: 2, warmup: 1, preview_every: 2, trackers: [], precision: fp32}}
sample: {{steps: 1}}
"""


class Heard(LearnedText):
    """A text encoder that a cache has to keep."""

    trainable = False
    name = "one"

    def encode(self, prompts):
        tokens = torch.stack([torch.full((4, 8), float(len(p))) for p in prompts])
        return Condition(tokens, torch.ones(len(prompts), 4, dtype=torch.bool), tokens[:, 0] * 2)

    def forward(self, condition):
        return condition

    def fingerprint(self):
        return self.name * 4


def text() -> Heard:
    return Heard(LearnedTextConfig(dim=8, layers=1, heads=2, max_tokens=4))


def flow_of(vae=None, text=None) -> LatentFlow:
    torch.manual_seed(0)
    text = text or Heard(LearnedTextConfig(dim=8, layers=1, heads=2, max_tokens=4))
    network = MMDiTConfig(depth=1, hidden=16, heads=2, in_channels=4, sample_size=4, context_dim=8, pooled_dim=8)
    flow = LatentFlowConfig(VAE).build(network.build(), text, shape=(3, 16, 16))
    with torch.no_grad():
        for p in flow.flow.network.parameters():
            p.copy_(torch.randn(p.shape) * 0.1)
    return flow


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0)
    for i in range(10):
        size = (16, 16) if i % 2 else (12, 20)
        Image.fromarray(noise.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("word " * (i % 3))
    (folder / "5.png").write_bytes(b"broken")
    return folder


@pytest.fixture()
def small(monkeypatch):
    monkeypatch.setattr(latents_cache, "SHARD", 4)


def cached(folder: Path, pictures: Path, flow: LatentFlow, **how) -> LatentDataset:
    data = FolderConfig(str(pictures), size=16, buckets=how.pop("buckets", None))
    cache_latents(
        folder / "train", data.build(), flow.autoencoder, flow.text, shape=(3, 16, 16), **{"dtype": "float32", **how}
    )
    return LatentsConfig(str(folder)).build()


def batch_of(dataset, text, indices, **how):
    conditions = PreparedConditions.prepare(dataset, text)
    return next(loader(dataset, conditions, [[(i, p) for p, i in enumerate(indices)]], shape=(3, 16, 16), **how))


# ------------------------------------------------------------------------------------------------- what training sees


@pytest.mark.parametrize("flip", [False, True])
def test_the_loss_on_a_cache_is_the_loss_on_the_pictures(tmp_path, pictures, small, flip):
    flow = flow_of()
    dataset = cached(tmp_path, pictures, flow, flip=flip)
    assert len(dataset) == 9 and "5.png" not in dataset.identifiers
    source = FolderConfig(str(pictures), size=16).build()
    numbers = [source.identifiers.index(name) for name in dataset.identifiers]
    assert dataset.captions == [source.captions[i] for i in numbers]
    ours = batch_of(dataset, flow.text, range(9), flip=flip)
    theirs = batch_of(source, flow.text, numbers, flip=flip)
    assert ours.x.shape == (9, 4, 8, 8) and theirs.x.shape == (9, 3, 16, 16)
    for name in ("tokens", "mask", "pooled"):
        assert torch.equal(getattr(ours.condition, name), getattr(theirs.condition, name))
    a, b = flow.loss(ours, Rng(1)), flow.loss(theirs, Rng(1))
    assert torch.allclose(a.per_sample, b.per_sample, rtol=1e-4)
    again = flow.loss(ours, Rng(2))
    assert not torch.allclose(a.per_sample, again.per_sample)  # drawn anew
    assert torch.allclose(flow.validate(ours)["validation_loss"], flow.validate(theirs)["validation_loss"], rtol=1e-4)


def test_the_moments_are_those_of_drawn_latents(tmp_path, pictures, small):
    dataset = cached(tmp_path, pictures, flow_of(), flip=True)
    drawn = []
    for i in range(len(dataset)):
        for mirrored in (False, True):
            mean, std = dataset.posterior(i, mirrored)
            drawn += [mean + std * torch.randn(200, *mean.shape)]
    drawn = torch.cat(drawn)
    assert dataset.moments == pytest.approx((float(drawn.mean()), float(drawn.std())), rel=0.02, abs=0.01)


def test_latents_are_drawn_from_the_cached_posterior(tmp_path, pictures):
    flow = flow_of()
    dataset = cached(tmp_path, pictures, flow)
    picture = batch_of(FolderConfig(str(pictures), size=16).build(), flow.text, [0]).x
    mean, std = flow.autoencoder.posterior(picture)
    ours = batch_of(dataset, flow.text, [0])
    assert torch.allclose(ours.x, mean, atol=1e-5) and torch.allclose(ours.spread, std, rtol=1e-4)
    assert ours.to("meta").spread.is_meta
    assert torch.allclose(flow.latents_of(ours, 0.5), (mean + 0.5 * std - 0.1) * 1.3, atol=1e-4)


@pytest.mark.parametrize(("dtype", "error"), [("float16", 1e-3), ("bfloat16", 1e-2)])
def test_smaller_dtypes_are_near(tmp_path, pictures, dtype, error):
    flow = flow_of()
    exact = cached(tmp_path / "a", pictures, flow).posterior(0)
    near = cached(tmp_path / "b", pictures, flow, dtype=dtype)
    assert near._shards[0]["mean"].dtype == getattr(torch, dtype)
    for a, b in zip(near.posterior(0), exact, strict=True):
        assert a.dtype == torch.float32 and ((a - b).abs() / b.abs().clamp(min=0.1)).max() < error


def test_an_autoencoder_without_chance_keeps_no_variance(tmp_path, pictures, monkeypatch):
    flow = flow_of()
    plain = flow.autoencoder.posterior
    monkeypatch.setattr(flow.autoencoder, "posterior", lambda x: (plain(x)[0], torch.zeros_like(plain(x)[1])))
    dataset = cached(tmp_path, pictures, flow)
    assert set(dataset._shards[0]) == {"mean"} and not dataset.posterior(3)[1].any()


def test_buckets_keep_their_shapes(tmp_path, pictures, small):
    flow = flow_of()
    dataset = cached(tmp_path, pictures, flow, buckets=Buckets(step=4, upscale=1.5))
    assert {tuple(s) for s in dataset.shapes.tolist()} == {(8, 8), (6, 10)}
    conditions = PreparedConditions.prepare(dataset, flow.text)
    for batch in loader(dataset, conditions, StreamSampler.over(dataset, seed=0, batch_size=3, steps=6), shape=()):
        assert len({tuple(dataset.shapes[i].tolist()) for i in batch.index}) == 1
        assert torch.isfinite(flow.loss(batch, Rng(0)).loss)


# --------------------------------------------------------------------------------------------- whole shards, or none


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def work(folder: Path, pictures: Path, delay: float) -> None:
    """In a process of its own: cache, slowly."""
    latents_cache.SHARD = 4
    flow = flow_of()
    plain = flow.autoencoder.posterior

    def posterior(x):
        time.sleep(delay)
        return plain(x)

    flow.autoencoder.posterior = posterior
    with contextlib.suppress(UserError):  # the other process has not done its part yet
        cached(folder, pictures, flow, batch=1)


def test_a_killed_process_leaves_whole_shards_and_the_next_goes_on(tmp_path, pictures, small):
    cached(tmp_path / "whole", pictures, flow_of(), batch=1)
    folder = tmp_path / "killed" / "train"
    process = multiprocessing.get_context("fork").Process(target=work, args=(folder.parent, pictures, 0.05))
    process.start()
    while not (folder / "latents-00000.safetensors").exists():
        time.sleep(0.01)
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    before = {p: p.stat().st_mtime_ns for p in folder.glob("*.safetensors")}
    assert 1 <= len(before) < 4
    (folder / f".latents-00002.safetensors.{process.pid}.partial").write_text("half a shard")
    with pytest.raises(UserError, match="is missing, and 1 more; the caching was cut short|is missing, and 2 more"):
        LatentsConfig(str(folder.parent)).build()
    cached(folder.parent, pictures, flow_of(), batch=1)
    assert all(p.stat().st_mtime_ns == when for p, when in before.items())
    assert files(folder) == files(tmp_path / "whole" / "train")


def test_several_processes_share_out_the_shards(tmp_path, pictures, small):
    whole = tmp_path / "whole" / "train"
    cached(whole.parent, pictures, flow_of(), batch=1)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=work, args=(tmp_path / "many", pictures, 0.02)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert files(tmp_path / "many" / "train") == files(whole)


def test_a_shard_that_another_process_is_at_is_left_to_it(tmp_path, pictures, small):
    import fcntl

    folder = tmp_path / "train"
    folder.mkdir()
    with (folder / ".latents-00001.safetensors.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        flow, data = flow_of(), FolderConfig(str(pictures), size=16).build()
        report = cache_latents(folder, data, flow.autoencoder, flow.text, shape=(3, 16, 16))
    assert (report.written, report.there, report.elsewhere) == (3, 0, 1)
    report = cache_latents(folder, data, flow.autoencoder, flow.text, shape=(3, 16, 16))
    assert (report.written, report.there, report.elsewhere) == (1, 3, 0)
    assert report.samples == 3 and report.bad[0][0] == "5.png"


def test_a_lock_that_was_taken_away_as_it_was_opened_holds_no_shard(tmp_path, pictures, small, monkeypatch):
    """By one who failed: a third process takes a new file by then, and two would write the shard."""

    def late(file, *, wait):
        Path(file.name).unlink()
        return lock(file, wait=wait)

    monkeypatch.setattr(latents_cache, "lock", late)
    flow, data = flow_of(), FolderConfig(str(pictures), size=16).build()
    report = cache_latents(tmp_path / "train", data, flow.autoencoder, flow.text, shape=(3, 16, 16))
    assert (report.written, report.there, report.elsewhere) == (0, 0, 4)


def test_a_file_system_without_locks_is_written_to_all_the_same(tmp_path, pictures, small, monkeypatch):
    import errno

    def refused(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", refused)
    flow, data = flow_of(), FolderConfig(str(pictures), size=16).build()
    report = cache_latents(tmp_path / "train", data, flow.autoencoder, flow.text, shape=(3, 16, 16))
    assert report.written == 4 and report.elsewhere == 0


def test_names_and_captions_that_are_no_text_are_kept(tmp_path):
    folder, caption = tmp_path / "pictures", "broken \ud83d half"
    folder.mkdir()
    for name in (b"caf\xe9.png", b"plain.png"):
        Image.new("RGB", (16, 16)).save(folder / "new.png")
        os.rename(folder / "new.png", os.fsencode(folder) + b"/" + name)
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "plain.png", "caption": caption}) + "\n")
    held = cached(tmp_path / "cache", folder, flow_of())
    assert held.captions == [caption]
    (folder / "metadata.jsonl").unlink()
    held = cached(tmp_path / "other", folder, flow_of())
    assert held.identifiers == [os.fsdecode(b"caf\xe9.png"), "plain.png"]


# --------------------------------------------------------------------------------------------------- what is refused


def test_another_autoencoder_is_refused(tmp_path, pictures):
    flow = flow_of()
    dataset = cached(tmp_path, pictures, flow)
    dataset.check(flow)
    with torch.no_grad():
        next(flow.autoencoder.parameters()).view(-1)[0] += 1e-3
    with pytest.raises(UserError, match="was made by another autoencoder .* than the flow's"):
        dataset.check(flow)
    with pytest.raises(UserError, match="holds a cache with autoencoder .* choose another folder"):
        cached(tmp_path, pictures, flow)
    other = KLAutoencoderConfig(channels=(32, 32), latent_channels=8, layers=1).build()
    flow.autoencoder = other
    with pytest.raises(UserError, match="latents of 4 channels, the flow's autoencoder makes 8"):
        dataset.check(flow)
    with pytest.raises(UserError, match="RectifiedFlow takes no latents; take flow latent"):
        dataset.check(flow.flow)


def test_an_identity_hangs_on_weights_and_not_on_where_they_came_from():
    torch.manual_seed(0)
    a = VAE.build()
    b = VAE.build()
    assert identity(a) != identity(b)
    b.load_state_dict(a.state_dict())
    assert identity(a) == identity(b)
    assert identity(b.double()) == identity(a)  # compared in float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "bfloat16"}, "holds a cache with dtype float32, not bfloat16"),
        ({"flip": True}, "holds a cache with flip False, not True"),
        ({"about": {"data": 1}}, "holds a cache with data None, not 1"),
        ({"buckets": Buckets(step=4, upscale=1.5)}, "holds a cache with"),
        ({"dtype": "int8"}, "dtype = 'int8' is unknown"),
        ({"batch": 0}, "batch = 0 is too few"),
    ],
)
def test_a_folder_takes_one_cache(tmp_path, pictures, change, message):
    flow = flow_of()
    cached(tmp_path, pictures, flow)
    with pytest.raises(UserError, match=message):
        cached(tmp_path, pictures, flow, **change)


def test_of_a_section_the_key_that_differs_is_told(tmp_path, pictures):
    flow = flow_of()
    section = {"name": "folder", "path": "p" * 60, "limit": 8}
    cached(tmp_path, pictures, flow, about={"data": section})
    with pytest.raises(UserError, match=r"holds a cache with data\.limit 8, not 7;"):
        cached(tmp_path, pictures, flow, about={"data": {**section, "limit": 7}})


def test_another_text_encoder_is_refused_and_one_that_is_trained_needs_no_cache(tmp_path, pictures):
    flow, other = flow_of(), text()
    dataset = cached(tmp_path, pictures, flow)
    other.name = "two"
    with pytest.raises(UserError, match="has texts of another encoder .oneoneoneone., the run's is twotwotwotwo"):
        PreparedConditions.prepare(dataset, other)
    learned = LearnedTextConfig(dim=8, heads=2).build()
    assert PreparedConditions.prepare(dataset, learned).table.tokens.shape == (3, 32)
    silent = cached(tmp_path / "silent", pictures, flow_of(text=NoTextConfig().build()))
    with pytest.raises(UserError, match="has no texts"):
        PreparedConditions.prepare(silent, flow.text)


def test_a_text_encoder_is_the_same_wherever_it_lies(tmp_path):
    import shutil

    from genflow.text.sd3 import SD3TextConfig
    from tests.tiny_sd3 import pipeline

    pipeline().save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)  # with other times
    one, two = (SD3TextConfig(folder=str(tmp_path / name), drop=0.1 * (name == "b")).build() for name in "ab")
    assert one.fingerprint() == two.fingerprint() and len(one.fingerprint()) == 64
    assert one.fingerprint() != SD3TextConfig(folder=str(tmp_path / "a"), t5_tokens=7).build().fingerprint()
    assert one.fingerprint() != SD3TextConfig(folder=str(tmp_path / "a"), encoders=("t5",)).build().fingerprint()
    weights = tmp_path / "b" / "text_encoder" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert one.fingerprint() != two.fingerprint()
    assert SD3TextConfig().build().fingerprint() is None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "latents-00001.safetensors").unlink(), "latents-00001.safetensors is missing; the caching"),
        (lambda f: (f / "text-00000.safetensors").write_bytes(b"x"), "text-00000.safetensors is damaged"),
        (lambda f: (f / "cache.json").write_text("{}"), "cache.json is damaged .it has no shape"),
        (lambda f: (f / "cache.json").write_text("{"), "cache.json is damaged"),
        (
            lambda f: save_file(
                {"mean": load_file(f / "latents-00000.safetensors")["mean"].half()},
                f / "latents-00000.safetensors",
                metadata={"about": json.dumps({"rows": [[i, "", ""] for i in range(4)], "moments": [1, 1, 1]})},
            ),
            "is of torch.float16, its cache.json says torch.float32",
        ),
    ],
)
def test_a_damaged_cache_costs_one_line(tmp_path, pictures, small, spoil, message):
    cached(tmp_path, pictures, flow_of())
    spoil(tmp_path / "train")
    with pytest.raises(UserError, match=message) as caught:
        LatentsConfig(str(tmp_path)).build()
    assert "\n" not in str(caught.value)


def test_latents_that_overflow_are_refused(tmp_path, pictures, monkeypatch):
    flow = flow_of()
    plain = flow.autoencoder.posterior
    monkeypatch.setattr(flow.autoencoder, "posterior", lambda x: (plain(x)[0] * 1e6, plain(x)[1]))
    with pytest.raises(UserError, match="not finite in torch.float16; take dtype float32"):
        cached(tmp_path, pictures, flow, dtype="float16")


def test_buckets_that_the_autoencoder_does_not_divide_are_refused(tmp_path, pictures):
    with pytest.raises(UserError, match="no multiple of the autoencoder's 2"):
        cached(tmp_path, pictures, flow_of(), buckets=Buckets(step=3, upscale=1.5))


# ------------------------------------------------------------------------------------------------------- the command


def model_folder(folder: Path) -> Path:
    flow = flow_of(text=LearnedTextConfig(dim=8, layers=1, heads=2, max_tokens=4).build())
    config = {"model": {}, "flow": {}, "text": {}, "shape": [3, 16, 16]}
    save_model(folder, config=config, state=flow.state_dict())
    return folder


def test_a_run_trains_on_what_the_command_wrote(tmp_path, pictures, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(CONFIG.format(pictures=pictures, init=model_folder(tmp_path / "model")))
    cache = tmp_path / "cache"
    assert main(["data", "cache", str(config), "data.flip=true", "--out", str(cache), "--dtype", "float32"]) == 0
    printed = capsys.readouterr().out
    assert "left out 5.png: not a picture" in printed and "9 pictures encoded, 1 broken" in printed
    assert "latents as the flow sees them: mean" in printed
    assert main(["data", "cache", str(config), "data.flip=true", "--out", str(cache), "--dtype", "float32"]) == 0
    assert "0 pictures encoded" in capsys.readouterr().out
    data = [f"data={{name: latents, path: {cache}}}", f"out={tmp_path / 'run'}"]
    assert main(["train", str(config), *data]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite(lines[-1]["loss"])
    with Image.open(tmp_path / "run" / "previews" / "step-00000002.png") as preview:
        assert preview.size[0] > 16
    capsys.readouterr()
    assert main(["train", str(config), *data[:1], f"out={tmp_path / 'no'}", "init=null"]) == 2
    assert "made by another autoencoder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["init=null"], "the config's autoencoder has random weights; set `init`"),
        (["init=null", "flow=rectified"], "the config's flow has no autoencoder"),
        (["data=toy2d"], "its data are no pictures but a VectorDataset"),
        (["flow.autoencoder.latent_channels=8"], "has not the autoencoder of the config: size mismatch"),
        (["flow.autoencoder.layers=2"], "has not the autoencoder of the config: Missing key"),
    ],
)
def test_mistakes_cost_one_line(tmp_path, pictures, capsys, change, message):
    config = tmp_path / "run.yaml"
    config.write_text(CONFIG.format(pictures=pictures, init=model_folder(tmp_path / "model")))
    assert main(["data", "cache", str(config), *change, "--out", str(tmp_path / "cache")]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1 and len(told) < 500, told


def test_the_shipped_config_goes_from_a_folder_to_a_picture(tmp_path, capsys):
    """configs/imagefolder-latent.yaml, small: an autoencoder, a cache with buckets and mirror images, a run, a picture."""
    shipped, noise = str(Path(__file__).parents[1] / "configs" / "imagefolder-latent.yaml"), np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for i in range(8):
        size = (40, 40) if i % 2 else (64, 36)
        Image.fromarray(noise.integers(0, 255, (*size, 3), dtype=np.uint8)).save(tmp_path / "pictures" / f"{i}.png")
        (tmp_path / "pictures" / f"{i}.txt").write_text(f"picture {i}")
    quick = [
        "train.steps=2",
        "train.batch_size=2",
        "train.preview_every=0",
        "train.trackers=[]",
        "train.precision=fp32",
    ]
    data = f"{{name: folder, path: {tmp_path / 'pictures'}, size: 32, flip: true"
    autoencoder = tmp_path / "autoencoder.yaml"
    autoencoder.write_text(
        f"data: {data}}}\nmodel: {{name: tiny_autoencoder, width: 8, blocks: 1, factor: 4}}\n"
        "flow: {name: autoencoder, bottleneck: {name: gaussian, channels: 4}, perceptual: null}\n"
    )
    assert main(["train", str(autoencoder), *quick, f"out={tmp_path / 'vae'}"]) == 0, capsys.readouterr().err
    how = [f"flow.autoencoder.run={tmp_path / 'vae'}", f"data={data}, buckets: {{step: 8}}}}"]
    cache, run = tmp_path / "cache", tmp_path / "run"
    assert main(["data", "cache", shipped, *how, "--out", str(cache)]) == 0, capsys.readouterr().err
    about = json.loads((cache / "train" / "cache.json").read_text())
    assert (about["flip"], about["channels"], about["shape"]) == (True, 4, [3, 32, 32]) and about["text"]
    latent = [how[0], f"data={{name: latents, path: {cache}}}", "model.depth=1", "train.workers=1"]
    assert main(["train", shipped, *latent, *quick, f"out={run}"]) == 0, capsys.readouterr().err
    how = ["--prompt", "picture 3", "--steps", "2", "--out", str(tmp_path / "drawn")]
    assert main(["sample", str(run), *how]) == 0, capsys.readouterr().err
    assert list((tmp_path / "drawn").glob("*.png"))


def test_a_cache_is_of_the_contents_of_the_pictures_and_not_of_their_dates(tmp_path, pictures):
    import os
    import shutil

    copy, flow = tmp_path / "copy", flow_of()
    shutil.copytree(pictures, copy)
    cached(tmp_path / "cache", copy, flow)
    for file in copy.iterdir():
        os.utime(file, (1, 1))
    cached(tmp_path / "cache", copy, flow)  # as after a copy: nothing to do
    Image.new("RGB", (16, 16)).save(copy / "1.png")
    with pytest.raises(UserError, match="holds a cache with listing"):
        cached(tmp_path / "cache", copy, flow)


def test_the_autoencoder_is_not_in_training_while_it_encodes(tmp_path, pictures, monkeypatch):
    flow, modes = flow_of(), []
    plain = flow.autoencoder.posterior
    monkeypatch.setattr(flow.autoencoder, "posterior", lambda x: modes.append(flow.autoencoder.training) or plain(x))
    flow.autoencoder.train()
    cached(tmp_path, pictures, flow)
    assert modes and not any(modes)


def test_a_picture_that_was_replaced_by_one_as_long_is_no_longer_the_cached_one(tmp_path):
    (pictures := tmp_path / "pictures").mkdir()
    Image.new("RGB", (16, 16), "red").save(pictures / "a.bmp")
    flow = flow_of()
    cached(tmp_path / "cache", pictures, flow)
    Image.new("RGB", (16, 16), "blue").save(pictures / "a.bmp")
    with pytest.raises(UserError, match="holds a cache with listing"):
        cached(tmp_path / "cache", pictures, flow)
