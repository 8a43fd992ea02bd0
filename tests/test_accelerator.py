"""Training and drawing where the tensors are not on the CPU: none meets one that is, and who waits for the device."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.test_float8 import emulated

pytest.importorskip("torch.utils.backend_registration")
if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
    pytest.skip("this torch takes no device written in Python", allow_module_level=True)

BEGIN = """
import json, shlex, sys
import torch
from accelerate.state import PartialState
from tests import pretend

kept = pretend.begin()
assert torch.accelerator.current_accelerator().type == pretend.NAME
init = PartialState.__init__

def here(self, *given, **how):
    init(self, *given, **how)
    self._shared_state["device"] = torch.device(pretend.NAME, 0)

PartialState.__init__ = here
"""
COMMANDS = """
from genflow import functional
from genflow.cli import main

functional.NARROW.add(pretend.NAME)  # as MPS
for line in json.loads(sys.argv[1]):
    print("$", line, file=sys.stderr)
    assert main(shlex.split(line)) == 0, line
"""
DATA = "data: {name: emoji, size: 16, limit: 30, caption: prompt}\n"
TEXT = "text: {name: learned, dim: 16, heads: 2, layers: 1, max_tokens: 24}\n"
MMDIT = "model: {name: mmdit, depth: 2, hidden: 32, heads: 2, patch_size: %d, dual_attention_layers: [0]}\n"
CODER = "model: {name: tiny_autoencoder, factor: %d, width: 8, blocks: 1}\nflow: {name: autoencoder, bottleneck: %s}\n"
UNET = "model: {name: unet, channels: 32, channel_mult: [1, 2], blocks: 1}\n"
RUNS = {
    "mmdit": DATA + TEXT + MMDIT % 8 + "flow: {name: rectified, prediction: x, whiten: 0.1, text_mask: true}\n",
    "unet": DATA + UNET + "flow: {name: rectified, coupling: sinkhorn, path: cosine, prediction: eps}\n",
    "glow": DATA + "model: {name: glow, levels: 2, steps: 1, hidden: 8}\nflow: normalizing\n",
    "tarflow": DATA
    + TEXT
    + "model: {name: tarflow, width: 32, blocks: 2, layers: 1, marginals: true}\nflow: normalizing\n",
    "points": "data: {name: toy2d, kind: moons, n: 64}\nmodel: {name: ffjord, divergence: exact}\nflow: normalizing\n",
    "coder": DATA + CODER % (2, "{name: gaussian, channels: 4}"),
    "codes": DATA + CODER % (4, "{name: vq, vocabulary: 16, channels: 4}"),
    "latent": DATA + TEXT + MMDIT % 2 + "flow: {name: latent, autoencoder: {name: trained, run: coder}}\n",
    "tokens": DATA + TEXT + "model: {name: token_transformer, width: 32, layers: 2, heads: 2, mtp: 2}\n"
    "flow: {name: tokens, tokenizer: {name: trained, run: codes}}\n",
}
TRAIN = (
    "train.steps=3 train.batch_size=8 train.warmup=1 train.preview_every=3 train.save_every=2 train.precision=fp32 "
    "'train.trackers=[]' train.validate_every=3 train.validation_split=train train.validation_images=4"
)
DRAWN = {
    "mmdit": [
        "sample mmdit --prompt pizza -n 2 --steps 4 --sampler %s --out drawn",
        "edit mmdit black.png --prompt otter --mask mask.png --steps 4 --repeats 2 --out drawn",
        "edit mmdit black.png --prompt otter --from pizza --steps 4 --out drawn",
        "edit mmdit black.png --prompt otter --rf --steps 4 --out drawn",
        "edit mmdit black.png --into mask.png --steps 4 --frames 3 --out drawn",
        "invert mmdit black.png --steps 4 --out drawn",
        "tune mmdit --steps 2 --samplers euler --images 3 --prompt otter",
        "plot mmdit --prompt otter --what strip trajectories --out drawn",
        "eval mmdit --features pixels -n 8 --batch 4 --out drawn",
        "train mmdit.yaml init=mmdit 'train.lora={rank: 2}' train.accumulation=2 train.checkpointing=true out=lora "
        + TRAIN,
        "sample mmdit --lora lora:0.5 --prompt pizza --guide apg --guidance 3 --steps 4 --out drawn",
    ],
    "unet": ["sample unet -n 2 --steps 4 --out drawn", "eval unet --metrics likelihood -n 2 --out drawn"],
    "glow": [
        "sample glow -n 2 --out drawn",
        "edit glow black.png --into mask.png --out drawn",
        "eval glow --metrics likelihood -n 4 --out drawn",
    ],
    "tarflow": ["sample tarflow --prompt pizza -n 2 --inverse jacobi --guidance 2 --out drawn"],
    "points": ["sample points -n 2 --out drawn", "plot points --what warp --out drawn"],
    "coder": ["edit coder black.png --into mask.png --out drawn", "eval coder -n 4 --out drawn"],
    "codes": ["eval codes -n 4 --out drawn"],
    "latent": ["sample latent --prompt a -n 2 --steps 4 --out drawn", "data cache latent.yaml --out cache"],
    "tokens": [
        "sample tokens --prompt a -n 2 --guidance 2 --top-k 5 --out drawn",
        "sample tokens --prompt a -n 2 --decoder speculative --out drawn",
        "sample tokens --prompt a -n 2 --decoder sjd --out drawn",
    ],
}


def in_a_process(code: str, *arguments: str, folder: Path) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    words = [sys.executable, "-c", BEGIN + code, *arguments]
    result = subprocess.run(words, capture_output=True, text=True, env=env, cwd=folder)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.mark.parametrize(
    "names",
    [
        ["mmdit"],
        ["codes", "tokens"],
        pytest.param(["unet", "glow", "tarflow"], marks=pytest.mark.slow),
        pytest.param(["points", "coder", "latent"], marks=pytest.mark.slow),
    ],
    ids="-".join,
)
def test_no_tensor_of_an_accelerator_meets_one_of_the_cpu(tmp_path, names):
    for name, text in RUNS.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    Image.new("L", (16, 16)).save(tmp_path / "black.png")
    mask = Image.new("L", (16, 16))
    mask.paste(255, (8, 0, 16, 16))
    mask.save(tmp_path / "mask.png")
    lines = [f"train {name}.yaml out={name} {TRAIN}" for name in names]
    for line in (line for name in names for line in DRAWN[name]):
        lines += [line % sampler for sampler in SAMPLERS] if "%s" in line else [line]
    in_a_process(COMMANDS, json.dumps(lines), folder=tmp_path)


SAMPLERS = ("unipc", "restart", "speculative", "picard")
STEPS = """
from collections import Counter
from dataclasses import replace
from genflow.config import load
from genflow.networks import mmdit
from genflow.training import loop
from genflow.training.config import RunConfig
from genflow.training.run import train

mmdit.untransformed = lambda: True  # which the device, a mode of torch's, hides: positions are kept
each = []
optimise = loop.Trainer._optimise

def noted(self, micro):
    pretend.waits.clear()
    found = optimise(self, micro)
    each.append(dict(pretend.waits))
    return found

loop.Trainer._optimise = noted
train(load(sys.argv[1], ["out=run", *sys.argv[2:]], schema=RunConfig))
print(json.dumps(each))
"""


@pytest.mark.parametrize("name", ["mmdit", "unet"])
def test_a_training_step_waits_once(tmp_path, name):
    """Once: to know whether loss and gradient are finite before anything has moved."""
    text = RUNS[name].replace("coupling: sinkhorn, ", "")
    (tmp_path / "run.yaml").write_text(text)
    how = ["steps=4", "batch_size=8", "warmup=1", "preview_every=0", "precision=fp32", "trackers=[]", "log_every=4"]
    said = in_a_process(STEPS, "run.yaml", *[f"train.{each}" for each in how], folder=tmp_path)
    each = json.loads(said.splitlines()[-1])
    assert len(each) == 4 and all(waits == {"tolist": 1} for waits in each[1:]), each


SOLVES = """
from genflow.registry import names, resolve, tag_of
from genflow.samplers import cfg, uniform

pretended = lambda *shape: torch.ones(*shape).to(pretend.NAME)
condition, null = pretended(4, 1), pretended(1, 1)
velocity = cfg(lambda x, t, c: x * t[:, None] + c, (condition,), (null,), 2.0, interval=(0.2, 0.8))
ode = [name for name in names("sampler") if tag_of(resolve("sampler", name)).metadata["family"] == "ode"]
found = {}
for name in ode:
    pretend.waits.clear()
    x = resolve("sampler", name)(velocity, pretended(4, 3), uniform(12)).x
    found[name] = pretend.waits.total() - 1  # its own beginning
print(json.dumps(found))
"""


def test_a_fixed_step_never_waits_for_the_device(tmp_path):
    found = json.loads(in_a_process(SOLVES, folder=tmp_path).splitlines()[-1])
    assert len(found) > 8 and not any(found.values()), found


DRAFTS = """
sys.path.append(sys.argv[1])
from toy_tokens import model

flow = model()
flow._drafts["run"] = model(1).float()  # as `draft="run"` leaves it
flow.float().to(pretend.NAME)
flow.sample(["dark"], seeds=[0], decoder="speculative", draft="run")
"""


def test_a_draft_of_a_run_follows_the_model_to_another_device(tmp_path):
    in_a_process(DRAFTS, str(Path(__file__).parent), folder=tmp_path)


NORMALS = """
from genflow.functional import Rng

index = torch.tensor([5, 2**40, 7])
draw = lambda index, shape=(3, 7): Rng(3, 11).normal("noise", index, shape, device=pretend.NAME)
assert torch.equal(draw(index)[1:2].cpu(), draw(index[1:2]).cpu()) and draw(index[:0]).shape == (0, 3, 7)
many = draw(torch.arange(64), (3, 999)).cpu()
print(json.dumps([Rng(3, 11).bits("noise", index).tolist(), draw(index).cpu().tolist(), many.flatten().tolist()]))
"""


def test_normal_numbers_made_on_the_device_are_box_s_and_muller_s(tmp_path):
    states, found, many = json.loads(in_a_process(NORMALS, folder=tmp_path).splitlines()[-1])
    for state, row in zip(states, found, strict=True):
        words = []
        for i in range(1, 12):  # splitmix64, in whole numbers of any length
            z = (state + i * 0x9E3779B97F4A7C15) % 2**64
            z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
            z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
            words.append(z ^ z >> 31)
        radii = [math.sqrt(-2 * math.log(((z >> 32) + 0.5) / 2**32)) for z in words]
        angles = [2 * math.pi * (z % 2**32) / 2**32 for z in words]
        pairs = list(zip(radii, angles, strict=True))
        expected = [r * math.cos(a) for r, a in pairs] + [r * math.sin(a) for r, a in pairs]
        torch.testing.assert_close(torch.tensor(row).flatten(), torch.tensor(expected[:21]), rtol=1e-5, atol=1e-5)
    x = torch.tensor(many, dtype=torch.float64)
    error = len(x) ** -0.5
    assert abs(x.mean()) < 4 * error and abs(x.square().mean() - 1) < 4 * 2**0.5 * error
    assert abs(x.pow(4).mean() - 3) < 4 * 96**0.5 * error and abs((x[1:] * x[:-1]).mean()) < 4 * error


@emulated
def test_what_a_card_is_tested_for_is_tried_on_a_pretended_one():
    """Else nothing would tell that a test of a card is wrong where there is none."""
    words = [sys.executable, "-m", "pytest", "-p", "tests.pretend_cuda", "-p", "no:cacheprovider", "-m", "gpu", "-q"]
    folder = Path(__file__).parent
    result = subprocess.run([*words, str(folder / "test_gpu.py")], capture_output=True, text=True, cwd=folder.parent)
    last = result.stdout.splitlines()[-1]
    assert result.returncode == 0 and "passed" in last and "skipped" not in last, result.stdout[-4000:]
