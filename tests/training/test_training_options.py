"""Training, by its options, and sampling from what it leaves: what each does, and what is refused."""

from __future__ import annotations

import json
import math
import multiprocessing
import re
import shutil
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from genflow.cli import main
from genflow.config import load
from genflow.data.locks import lock
from genflow.errors import UserError
from genflow.flows.store import finish_checkpoint, newest_checkpoint
from genflow.training.config import RunConfig
from genflow.training.run import train

# -------------------------------------------------------------------------------------------------------------- sampling


def test_sample_writes_pictures_that_say_how_they_were_made(tiny, tmp_path, capsys):
    from PIL import Image

    from genflow.data.pictures import read_settings

    run, out = train(tiny()), tmp_path / "out"
    (tmp_path / "prompts.txt").write_text("\ufeffowl\n\nfox 🦊\n")
    arguments = ["sample", str(run), "--prompt", "", "--prompt-file", str(tmp_path / "prompts.txt"), "-n", "2"]
    assert main([*arguments, "--seed", "5", "--guidance", "2", "--out", str(out)]) == 0
    files = sorted(p.name for p in out.iterdir())
    assert len(files) == 7 and "grid.png" in files and "0002-owl-7.png" in files
    settings = read_settings(out / "0002-owl-7.png")
    assert settings["prompt"] == "owl" and settings["seed"] == 7 and settings["guidance"] == 2 and settings["nfe"] == 2
    assert (
        main(
            [
                "sample",
                str(run),
                "--prompt",
                "owl",
                "--seed",
                "7",
                "--guidance",
                "2",
                "--batch",
                "1",
                "--out",
                str(tmp_path / "b"),
            ]
        )
        == 0
    )
    pictures = [Image.open(out / "0002-owl-7.png"), Image.open(tmp_path / "b" / "0000-owl-7.png")]
    a, b = (torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8).int() for p in pictures)
    assert (a - b).abs().max() <= 1


def test_guidance_is_set_in_the_config_and_by_options(tiny, tmp_path):
    from genflow.data.pictures import read_settings

    run = train(
        tiny(
            "sample.guidance=2.0",
            "sample.guide=apg",
            "sample.guide.eta=0.25",
            "sample.rescale=0.5",
            "train.save_every=2",
        )
    )
    weak = run / "checkpoints" / "step-00000002"

    def drawn(*arguments):
        out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        assert main(["sample", str(run), "--prompt", "owl", "--out", str(out), *arguments]) == 0
        settings = read_settings(out / "0000-owl-0.png")
        return (out / "0000-owl-0.png").read_bytes(), {k: settings.get(k) for k in ("guide", "rescale", "weak")}

    apg = {"name": "apg", "eta": 0.25, "threshold": None, "momentum": 0.0}
    given = {"name": "apg", "threshold": 1e-1, "momentum": -0.5}
    pictures = []
    for arguments, expected in (
        ((), {"guide": apg, "rescale": 0.5, "weak": None}),
        (
            ("--guide", "apg", "threshold=1e-1", "momentum=-.5", "--rescale", "0"),
            {"guide": given, "rescale": 0.0, "weak": None},
        ),
        (("--guide", "cfg", "--weak", str(weak)), {"guide": {"name": "cfg"}, "rescale": 0.5, "weak": str(weak)}),
    ):
        picture, settings = drawn(*arguments)
        assert settings == expected
        pictures.append(picture)
    assert len({*pictures}) == 3


def test_a_preview_that_cannot_be_drawn_does_not_end_the_run(tiny, capsys, monkeypatch):
    from genflow.flows.rectified import RectifiedFlow

    def refused(*_, **__):
        raise UserError("not finite")

    monkeypatch.setattr(RectifiedFlow, "sample", refused)
    run = train(tiny("train.preview_every=2"))
    assert newest_checkpoint(run).name == "step-00000004"
    assert "step 2: no preview: not finite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=0", "train: steps = 0 is too few; the least is 1"),
        ("train.log_every=0", "log_every = 0 is too few"),
        ("train.accumulation=0", "accumulation = 0 is too few"),
        ("train.workers=-1", "workers = -1 is too few"),
        ("train.decay=2", "decay = 2.0 is not within 0 .. 1"),
        ("train.clip=.nan", "clip = nan is not within 0 .. inf"),
        ("train.ema=2", "ema = 2.0 is not within 0 .. 0.28"),
        ("train.optimizer.lr=-1", "train.optimizer: lr = -1.0 must be a finite number"),
        ("train.optimizer.betas=[0.9, 1]", "must be 0 or more and below 1"),
        ("train.trackers=[tensorbord]", "Did you mean 'tensorboard'"),
        ("seed=-1", "seed = -1 is out of range"),
        ("sample.steps=0", "sample: steps = 0 is too few"),
        ("sample.guidance=.nan", "guidance = nan is not a finite number"),
        ("sample.interval=[0.9, 0.1]", "is not 0 <= lo < hi <= 1"),
        ("sample.options={rtol: 1}", "sampler euler has no option 'rtol'"),
        ("sample.options=rtol", "options = 'rtol' must be a section"),
        ("train.validation_split=nowhere", "no split"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_step(tiny, tmp_path, override, message):
    with pytest.raises(UserError) as caught:
        train(tiny("train.validate_every=4", override))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "config.json"])
def test_a_damaged_checkpoint_is_named(tiny, name):
    run = train(tiny())
    file = newest_checkpoint(run) / name
    file.write_bytes(b"x" * file.stat().st_size)
    with pytest.raises(UserError, match=r"step-00000004.* is damaged"):
        train(tiny("train.steps=8"))


def test_one_folder_is_trained_by_one_process(tiny, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is being trained by another process"):
            train(tiny())
    assert newest_checkpoint(train(tiny())).name == "step-00000004"


def test_workers_end_with_the_run_also_where_an_error_is_kept(tiny, monkeypatch):
    """Else Python would wait for them for good when it ends: they ignore the signal to."""
    from genflow.training.loop import Trainer

    def killed(self, micro):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_optimise", killed)
    with pytest.raises(KeyboardInterrupt) as kept:
        train(tiny("train.workers=1"))
    left = multiprocessing.active_children()
    for each in left:
        each.kill()
    assert not left and kept.tb is not None


def test_a_worker_that_was_killed_is_told_in_one_line(tiny, monkeypatch):
    from genflow.training.loop import Trainer

    def killing(self, micro):
        for worker in multiprocessing.active_children():
            worker.kill()
        time.sleep(60)  # torch's word comes into whatever the main process does

    monkeypatch.setattr(Trainer, "_optimise", killing)
    with pytest.raises(
        UserError, match=r"^DataLoader worker .* is killed by signal: Killed\. .*goes on from its newest"
    ):
        train(tiny("train.workers=1"))


@pytest.mark.parametrize("lost", ["precision", "validate_every"])
def test_a_run_of_a_version_that_knew_less_goes_on(tiny, lost):
    folder = newest_checkpoint(train(tiny()))
    config = json.loads((folder / "config.json").read_text())
    del config["train"][lost]
    (folder / "config.json").write_text(json.dumps(config))
    finish_checkpoint(folder)
    assert newest_checkpoint(train(tiny("train.steps=8", "train.precision=auto"))).name == "step-00000008"


@pytest.mark.parametrize(
    "key, default, now",
    [
        ("train.ema", 0.05, "0.2"),
        ("flow.drop_condition", 0.1, "0.3"),
        ("model.qk_norm", True, "False"),
        ("data.flip", False, "True"),
        ("text.layers", 2, "1"),
    ],
)
def test_what_an_older_version_did_not_know_had_its_default(tiny, key, default, now):
    folder = newest_checkpoint(train(tiny()))
    config = json.loads((folder / "config.json").read_text())
    section, name = key.split(".")
    del config[section][name]
    (folder / "config.json").write_text(json.dumps(config))
    finish_checkpoint(folder)
    with pytest.raises(UserError, match=rf"holds a run with {key}={default}, this config says {now};"):
        train(tiny("train.steps=8", f"{key}={now}"))


def test_a_run_does_not_go_into_a_checkpoint_of_another(tiny):
    folder = newest_checkpoint(train(tiny()))
    with pytest.raises(UserError, match=r"step-00000004 is a checkpoint; name its run's folder"):
        train(tiny(f"out={folder}"))


def test_a_link_to_nothing_is_no_place_for_a_run(tiny, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "unmounted")
    for out in ("link", "link/run"):
        with pytest.raises(UserError, match="is a link to what is not there, or below one; name another folder"):
            train(tiny(f"out={tmp_path / out}"))


def test_a_worker_does_not_hold_what_its_parent_did(tmp_path):
    """As where the main process was killed, and its workers have not noticed yet."""
    context = multiprocessing.get_context("fork")
    begun = context.Event()
    worker = context.Process(target=lambda: (begun.set(), time.sleep(60)))
    with (tmp_path / "lock").open("a") as mine:
        assert lock(mine, wait=False)
        worker.start()
        assert begun.wait(60)
        with (tmp_path / "lock").open("a") as other:
            assert not lock(other, wait=False)
    with (tmp_path / "lock").open("a") as other:
        free = lock(other, wait=False)
    worker.kill()
    assert free


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "steps = 0"),
        (["--seed", "-1"], "seed"),
        (["--sampler", "huen"], "Did you mean 'heun'"),
        (["--guidance", "nan"], "not a finite number"),
        (["--size", "17"], "try 16 x 16"),
        (["-n", "0"], "-n must be 1 or more, not 0"),
        (["--batch", "0"], "--batch must be 1 or more, not 0"),
        (["--interval", "0.9", "0.1"], "interval"),
        (["--guidance", "2", "--guide", "agp"], "Did you mean 'apg'?"),
        (["--guidance", "2", "--guide", "apg", "eta"], "--guide: 'eta' is not KEY=VALUE, such as eta=0.5"),
        (["--guidance", "2", "--guide", "apg", "etta=0"], "unknown key 'etta' in guide. Did you mean 'eta'?"),
        (["--guidance", "2", "--guide", "apg", "eta=much"], "guide.eta must be a number, not 'much'"),
        (["--guidance", "2", "--weak", "nowhere"], "nowhere does not exist"),
        (["--guidance", "2", "--rescale", "1.5"], "rescale = 1.5"),
        (["--weak", "nowhere"], "--weak does nothing without guidance; add --guidance 2"),
        (["--guide", "apg"], "--guide does nothing"),
        (["--size", "1000000"], "out of memory"),
        (["--steps", "1000000000"], "is too many"),
        (["--prompt", "\udcff"], "not UTF-8 text"),
        (["--out", __file__], "is a file; name a folder"),
    ],
)
def test_sampling_mistakes(tiny, tmp_path, arguments, message, capsys):
    run = train(tiny("train.steps=1"))
    assert main(["sample", str(run), "--prompt", "x", "--out", str(tmp_path / "o"), *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and error.startswith("genflow: ")


def test_a_run_does_not_go_on_with_more_data_than_it_had(tmp_path, capsys):
    rows = tmp_path / "rows.csv"
    rows.write_text("a,b\n" + "".join(f"{i},{i * i % 7}\n" for i in range(20)))
    config = tmp_path / "c.yaml"
    config.write_text(
        f"data: {{name: table, path: {rows}}}\nout: {tmp_path / 'run'}\n"
        "text: none\nmodel: {name: mlp, hidden: 8, depth: 1}\n"
        "train: {steps: 2, batch_size: 4, preview_every: 0, validate_every: 0, trackers: [], precision: fp32}\n"
    )
    assert main(["train", str(config)]) == 0
    rows.write_text(rows.read_text() + "30,1\n")
    assert main(["train", str(config), "train.steps=3"]) == 2
    assert " samples, but 15 when" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- what the options do


@pytest.fixture
def losses(monkeypatch):
    """(batch, rng, whether in training mode) of each loss that a run of a rectified flow asks for."""
    from genflow.flows.rectified import RectifiedFlow

    seen, loss = [], RectifiedFlow.loss

    def spied(self, batch, rng):
        seen.append((batch, rng, self.training))
        return loss(self, batch, rng)

    monkeypatch.setattr(RectifiedFlow, "loss", spied)
    return seen


def test_gradients_are_clipped_and_averaged_as_asked(tiny):
    run = train(tiny("train.steps=1", "train.clip=1e-3", "train.optimizer.betas=[0.5, 0.8]"))
    state = load_file(newest_checkpoint(run) / "optimizer.safetensors")
    first = {name.removesuffix("/exp_avg"): 2 * m for name, m in state.items() if name.endswith("/exp_avg")}
    assert math.isclose(float(torch.stack([g.norm() for g in first.values()]).norm()), 1e-3, rel_tol=1e-3)
    for name, g in first.items():
        torch.testing.assert_close(state[f"{name}/exp_avg_sq"], 0.2 * g**2)
    average, weights = (load_file(newest_checkpoint(run) / f"{name}.safetensors") for name in ("ema", "model"))
    assert all(torch.equal(average[name], weights[name]) for name in average)  # the profile of one step is that step


def test_gradients_are_those_of_the_config_whatever_accelerate_is_told(tiny, monkeypatch):
    runs = []
    for steps in ("1", "4"):
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", steps)
        run = train(tiny("train.steps=1", "train.clip=0"))
        runs.append(load_file(newest_checkpoint(run) / "optimizer.safetensors"))
        shutil.rmtree(run)
    assert all(torch.equal(tensor, runs[1][name]) for name, tensor in runs[0].items())


def test_what_a_loss_is_made_of_is_told_of_all_micro_batches(tiny, tmp_path):
    told = []
    for accumulation in (1, 4):
        run = train(
            tiny(
                "text=none", "model={name: tiny_autoencoder, factor: 4, width: 8, blocks: 1}", "train.steps=1",
                "flow={name: autoencoder, bottleneck: {name: gaussian, channels: 2}}", "sample={}",
                "train.log_every=1", f"train.accumulation={accumulation}", f"out={tmp_path / str(accumulation)}",
            )
        )  # fmt: skip
        told.append(json.loads((run / "metrics.jsonl").read_text()))
    for name in ("loss", "l1", "kl", "grad_norm"):
        assert math.isclose(told[0][name], told[1][name], rel_tol=1e-5), name


def test_matrices_decay_and_vectors_do_not():
    from genflow.training.optimizers import AdamWConfig

    model = torch.nn.Linear(3, 3)
    before = [p.detach().clone() for p in (model.weight, model.bias)]
    optimizer = AdamWConfig(lr=0.1, weight_decay=0.3).build(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(model.weight, before[0] * 0.97)
    assert torch.equal(model.bias, before[1])


def test_the_validation_loss_is_that_of_the_averaged_weights_on_so_many_samples(tiny):
    from genflow.evaluation.likelihood import held_out_loss
    from genflow.flows.store import load as load_flow

    config = tiny("train.steps=3", "train.ema=0.25", "train.validate_every=3", "train.validation_images=11")
    run = train(replace(config, train=replace(config.train, validation_split="train")))
    told = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines() if "validation_loss" in x][-1]
    means = [held_out_loss(load_flow(run, ema=ema), config.data.build("train"), 11, batch=11) for ema in (True, False)]
    assert told.pop("step") == 3 and told == pytest.approx(means[0], rel=1e-5)
    assert told["validation_loss"] != pytest.approx(means[1]["validation_loss"], rel=1e-5)


def test_previews_are_of_the_prompts_and_leave_training_as_it_was(tiny, losses, monkeypatch):
    from genflow.flows.rectified import RectifiedFlow

    asked = []

    def sample(self, prompts, *, seeds, steps, **_):
        asked.append((list(prompts), list(seeds), steps, self.training))
        raise UserError("enough")

    monkeypatch.setattr(RectifiedFlow, "sample", sample)
    train(tiny("train.steps=2", "train.preview_every=1", "train.preview_prompts=[a cat, a dog]", "sample.steps=3"))
    assert asked == [(["a cat", "a dog"], [0, 1], 3, False)] * 2
    assert [training for *_, training in losses] == [True, True]


def test_the_seed_is_of_weights_and_of_chance(tiny, losses, tmp_path):
    still = ("train.steps=2", "train.optimizer.lr=0")
    runs = [train(tiny(*still, f"seed={seed}", f"out={tmp_path / str(seed)}")) for seed in (0, 5)]
    a, b = (load_file(newest_checkpoint(run) / "model.safetensors") for run in runs)
    assert any(not torch.equal(value, b[name]) for name, value in a.items() if value.dim() > 1)
    assert [(rng.seed, rng.step) for _, rng, _ in losses] == [(0, 0), (0, 1), (5, 0), (5, 1)]


def test_flips_are_those_of_the_seed(tiny, losses, tmp_path):
    from genflow.functional import Rng

    for flip in ("true", "false"):
        train(tiny("train.steps=2", "seed=5", f"data.flip={flip}", f"out={tmp_path / flip}"))
    x, plain = (torch.cat([batch.x for batch, *_ in part]) for part in (losses[:2], losses[2:]))
    turned = Rng(5).uniform("flip", torch.arange(16)) < 0.5
    assert turned.any() and torch.equal(x, torch.where(turned[:, None, None, None], plain.flip(-1), plain))


def test_what_could_not_be_read_is_still_known_after_a_restart(tmp_path, config, capsys, with_a_bad_one):
    more = [f"data={{name: folder, path: {with_a_bad_one}, size: 16}}", f"out={tmp_path / 'run'}", "train.log_every=1"]
    train(load(config, [*more, "train.steps=4"], schema=RunConfig))
    assert capsys.readouterr().err.count("skipped bad.png") == 1
    run = train(load(config, [*more, "train.steps=8"], schema=RunConfig))
    assert "skipped bad.png" not in capsys.readouterr().err
    assert [json.loads(x)["bad_images"] for x in (run / "metrics.jsonl").read_text().splitlines()][-4:] == [1] * 4


def test_what_is_not_training_is_left_out_of_the_rate(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from genflow.training import log

    now = [100.0]
    monkeypatch.setattr(log, "time", SimpleNamespace(monotonic=lambda: now[0]))
    told = log.Log(tmp_path, SimpleNamespace(is_main_process=True), steps=20, start=0, batch_size=8)
    now[0] += 10
    told.pause(6.0)
    assert math.isclose(told.progress(5, 0.1), 10.0)  # 40 pictures in 4 seconds


def test_a_tracker_forgets_the_steps_that_are_done_again(tiny, monkeypatch):
    import accelerate

    told = []
    monkeypatch.setattr(accelerate.Accelerator, "init_trackers", lambda self, name, **how: told.append(how))
    for steps in (2, 4):
        train(tiny(f"train.steps={steps}", "train.trackers=[tensorboard]"))
    assert [each["init_kwargs"]["tensorboard"] for each in told] == [{"purge_step": 1}, {"purge_step": 3}]


def test_a_tracker_hears_of_a_validation_that_a_finished_run_had_left_to_do(tiny, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from genflow.training.loop import Trainer

    def killed(self):
        raise KeyboardInterrupt

    config = tiny("train.validate_every=4", "train.validation_split=train", "train.trackers=[tensorboard]")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_validate", killed)
        train(config)
    told = EventAccumulator(str(train(config) / "tensorboard")).Reload()
    assert [each.step for each in told.Scalars("validation_loss")] == [each.step for each in told.Scalars("lr")] == [4]


def test_a_run_goes_on_in_its_own_precision_where_auto_is_asked(tiny, monkeypatch, capsys):
    from genflow.training import precision

    monkeypatch.setattr(precision, "matmul_tflops", lambda name, device: {"bf16": 9.0, "fp32": 1.0}[name])
    train(tiny("train.steps=2"))
    assert "precision fp32 (as asked)" in capsys.readouterr().err
    run = train(tiny("train.steps=3", "train.precision=auto"))
    assert load(run / "config.yaml", schema=RunConfig).train.precision == "fp32"
    assert "precision fp32 (auto: the run began in it)" in capsys.readouterr().err


def test_what_may_change_when_a_run_goes_on_and_what_may_not(tiny, capsys):
    train(tiny("train.steps=1"))
    free = ["clip=2", "accumulation=2", "optimizer.lr=1e-4", "parallel=fsdp", "checkpointing=true", "save_every=1"]
    free += ["log_every=1", "keep=1", "preview_every=9", "preview_prompts=[owl]", "validate_every=9", "max_bad=0.5"]
    run = train(tiny("train.steps=2", "sample.steps=3", *(f"train.{each}" for each in free)))
    assert newest_checkpoint(run).name == "step-00000002" and "resuming at step 1 of 2" in capsys.readouterr().err
    assert load(run / "config.yaml", schema=RunConfig).train.keep == 1
    for change in (
        *("seed=1", "data.limit=29", "data.limit=null", "train.precision=bf16", "train.batch_size=6", "train.ema=0.1"),
        *("train.warmup=3", "train.decay=0.5", "train.optimizer.weight_decay=0.5", "flow.prediction=v"),
        *("train.validation_split=train", "init=elsewhere"),
    ):
        key, value = change.replace("null", "None").split("=")
        with pytest.raises(
            UserError, match=rf"holds a run with {key}=.*, this config says {value}; choose another `out`, or remove "
        ):
            train(tiny("train.steps=3", change))


def test_a_run_that_was_not_validated_yet_may_be_on_any_split(tiny, capsys):
    train(tiny("train.steps=1"))
    train(tiny("train.steps=2", "train.validate_every=1", "train.validation_split=train", "train.validation_images=4"))
    assert "step 2: validation loss" in capsys.readouterr().err
    with pytest.raises(UserError, match="holds a run with train.validation_images=4, this config says 5"):
        train(
            tiny("train.steps=3", "train.validate_every=1", "train.validation_split=train", "train.validation_images=5")
        )


@pytest.mark.parametrize(("theirs", "mine"), [("prediction=x", "prediction=v"), ("whiten=0.1", "whiten=null")])
def test_weights_begin_no_flow_that_reads_them_otherwise(tiny, tmp_path, theirs, mine):
    first = train(tiny("train.steps=1", f"flow.{theirs}"))
    for out in ("train.lora={rank: 2}", "train.steps=2"):
        with pytest.raises(UserError, match=rf"init .*; set flow\.{theirs}$"):
            train(tiny(f"init={first}", f"out={tmp_path / 'o'}", f"flow.{mine}", out))


def test_where_a_run_goes(tiny, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(train(config, ["train.steps=1"])) == "runs/tiny"
    with pytest.raises(UserError, match="`out` is not set; name the run's folder"):
        train(replace(tiny(), out=None))
    with pytest.raises(UserError, match=r"tiny\.yaml is a file; name another folder as `out`"):
        train(tiny(f"out={config}"))
    with pytest.raises(UserError, match=r"cannot make the run's folder .*tiny\.yaml/run: Not a directory"):
        train(tiny(f"out={config}/run"))


def test_a_tracker_that_is_not_there_is_refused_and_one_that_is_gets_its_end(tiny, tmp_path, monkeypatch):
    from accelerate.tracking import TensorBoardTracker

    from genflow.training import run

    ended, end = [], TensorBoardTracker.finish
    monkeypatch.setattr(TensorBoardTracker, "finish", lambda self: ended.append(1) or end(self))
    train(tiny("train.steps=1", "train.trackers=[tensorboard]"))
    assert ended == [1]
    monkeypatch.setattr(run, "get_available_trackers", lambda: [])
    with pytest.raises(UserError, match=r"train\.trackers: tensorboard is not installed; install it, or leave it out"):
        train(tiny("train.trackers=[tensorboard]", f"out={tmp_path / 'other'}"))
    assert not (tmp_path / "other").exists()


def test_a_warm_start_is_a_flow_and_its_average_and_leaves_a_run_as_it_is(tiny, tmp_path):
    from genflow.flows.store import load as load_flow
    from genflow.training.warm import warm_start

    flow, out = load_flow(train(tiny())), tmp_path / "next"
    config = tiny(f"out={out}", "train.steps=1", "train.optimizer.lr=0")
    warm_start(config, flow, out)
    for name in ("model", "ema"):
        held = load_file(newest_checkpoint(out) / f"{name}.safetensors")
        assert held and all(torch.equal(value, flow.state_dict()[key]) for key, value in held.items())
    train(config)
    shutil.rmtree(out / "checkpoints" / "step-00000000")
    warm_start(config, flow, out)
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-00000001"]
    warm_start(tiny("train.ema=0"), flow, tmp_path / "bare")
    assert not (newest_checkpoint(tmp_path / "bare") / "ema.safetensors").exists()


def test_a_run_begins_with_the_average_of_the_one_that_init_names(tiny, tmp_path):
    first = newest_checkpoint(train(tiny("train.ema=0.25")))
    still = ("train.steps=1", "train.optimizer.lr=0", "train.ema=0")
    begun = load_file(
        newest_checkpoint(train(tiny(*still, f"init={first}", f"out={tmp_path / 'o'}"))) / "model.safetensors"
    )
    average, raw = (load_file(first / f"{name}.safetensors") for name in ("ema", "model"))
    assert all(torch.equal(begun[name], value) for name, value in average.items())
    assert any(not torch.equal(raw[name], value) for name, value in average.items())


def test_what_only_the_config_says_may_not_be_left_out_when_a_run_goes_on(tiny):
    """Another number of heads is another network, of the same weights."""
    train(tiny("model.qk_norm=false"))
    with pytest.raises(UserError, match=r"holds a run with model\.heads=2, this config says None"):
        train(tiny("model.qk_norm=false", "model.heads=null", "train.steps=8"))


@pytest.mark.parametrize(
    ("model", "given"),
    [
        ("{name: mlp, hidden: 8, depth: 1, shape: [7]}", "shape = (7,)"),
        ("{name: mlp, hidden: 8, depth: 1, pooled_dim: 7}", "pooled_dim = 7"),
        ("{name: mmdit, depth: 1, hidden: 32, heads: 2, context_dim: 7}", "context_dim = 7"),
        ("{name: mmdit, depth: 1, hidden: 32, heads: 2, in_channels: 7}", "in_channels = 7"),
        ("{name: unet, channels: 8, channel_mult: [1, 2], shape: []}", "shape = ()"),
    ],
)
def test_a_model_of_other_data_or_another_text_is_refused(tmp_path, model, given):
    plane = "mlp" in model
    data = "{name: toy2d, kind: moons, n: 64}" if plane else "{name: emoji, size: 16, limit: 8}"
    text = "none" if plane else "{name: learned, dim: 16, max_tokens: 4}"
    (tmp_path / "run.yaml").write_text(f"data: {data}\nmodel: {model}\ntext: {text}\nflow: rectified\n")
    config = load(tmp_path / "run.yaml", [f"out={tmp_path / 'run'}"], schema=RunConfig)
    with pytest.raises(UserError, match=re.escape(f"model.{given} does not fit") + ".*leave it out"):
        train(config)
