"""Models on disk: what is saved comes back, and whatever is broken is told in one line."""

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file, save_file

import genflow.config
from genflow.conditions import Condition
from genflow.data.pairs import write_pairs
from genflow.errors import UserError
from genflow.flows.densities import Mixed, Uniform
from genflow.flows.rectified import RectifiedFlowConfig
from genflow.flows.store import (
    checkpoints,
    find_model,
    finish_checkpoint,
    is_whole,
    load,
    newest_checkpoint,
    normalise_keys,
    save_model,
)
from genflow.networks.mmdit import MMDiTConfig
from genflow.training.checkpoint import save_checkpoint


class TinyText(torch.nn.Module):
    context_dim, pooled_dim, max_tokens = 6, 4, 2

    def __init__(self, trainable):
        super().__init__()
        self.trainable = trainable
        self.table = torch.nn.Embedding(8, 6).requires_grad_(trainable)

    def encode(self, prompts):
        ids = torch.tensor([[len(p) % 8, 1] for p in prompts])
        return Condition(ids, torch.ones_like(ids).bool(), torch.zeros(len(prompts), 0))

    def null(self):
        return self.encode([""])

    def forward(self, condition):
        tokens = self.table(condition.tokens)
        return dataclasses.replace(condition, tokens=tokens, pooled=tokens.mean(1)[:, :4])


@dataclass(frozen=True)
class TinyTextConfig:
    trainable: bool = True

    def build(self):
        torch.manual_seed(5)  # a frozen encoder is known by its config
        return TinyText(self.trainable)


MODEL = MMDiTConfig(
    depth=1, hidden=32, heads=2, patch_size=2, in_channels=3, context_dim=6, pooled_dim=4, sample_size=4
)
FLOW = RectifiedFlowConfig(density=Mixed(Uniform(), 0.25), prediction="x", text_mask=False)


@pytest.fixture(autouse=True)
def tiny_text(monkeypatch):
    names, resolve = genflow.config.names, genflow.config.resolve
    monkeypatch.setattr(genflow.config, "names", lambda kind: [*names(kind), "tiny"] if kind == "text" else names(kind))
    monkeypatch.setattr(
        genflow.config,
        "resolve",
        lambda kind, name: TinyTextConfig if name == "tiny" else resolve(kind, name),
    )


def make_flow(trainable=True, seed=0):
    torch.manual_seed(seed)
    flow = FLOW.build(MODEL.build(), TinyTextConfig(trainable).build(), shape=(3, 8, 8))
    with torch.no_grad():
        for i, p in enumerate(p for p in flow.parameters() if p.requires_grad):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * seed + i)) * 0.05)
    return flow


def config_of(trainable=True):
    to_dict = genflow.config.to_dict
    return {
        "model": {"name": "mmdit", **{k: v for k, v in to_dict(MODEL).items() if k != "name"}},
        "flow": to_dict(FLOW),
        "text": {"name": "tiny", "trainable": trainable},
        "data": {"name": "emoji", "size": 8},
        "sample": {"steps": 3},
        "shape": [3, 8, 8],
    }


@pytest.fixture
def exported(tmp_path):
    flow = make_flow()
    ema = {k: v * 0.5 for k, v in flow.state_dict().items()}
    save_model(tmp_path / "model", config=config_of(), state=flow.state_dict(), ema=ema)
    return flow, tmp_path / "model"


def make_run(run, steps):
    for step in steps:
        folder = run / "checkpoints" / f"step-{step:08d}"
        save_model(folder, config=config_of(), state=make_flow(seed=step).state_dict())
        (folder / "state.json").write_text("{}")
        finish_checkpoint(folder)
    return run


# ----------------------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("trainable", [True, False])
def test_what_is_saved_comes_back(tmp_path, trainable):
    flow = make_flow(trainable).eval()
    save_model(tmp_path / "m", config=config_of(trainable), state=flow.state_dict())
    again = load(tmp_path / "m")
    assert not again.training and again.config == FLOW and again.shape == (3, 8, 8)
    assert again.recipe == config_of(trainable)
    for key, value in flow.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    options = {"seeds": [1, 2], "steps": 3, "guidance": 2.0}
    picture = flow.sample(["a", "bcd"], **options).x
    assert picture.std() > 0.05 and torch.equal(again.sample(["a", "bcd"], **options).x, picture)
    text_saved = any(key.startswith("text.") for key in load_file(tmp_path / "m" / "model.safetensors"))
    assert text_saved == trainable
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]


def test_averaged_weights_are_the_default(exported):
    flow, folder = exported
    key = "network.final.weight"
    assert torch.equal(load(folder).state_dict()[key], flow.state_dict()[key] * 0.5)
    assert torch.equal(load(folder, ema=False).state_dict()[key], flow.state_dict()[key])
    # an average of some weights only: the others come from the model
    save_model(
        folder,
        config=config_of(),
        state=flow.state_dict(),
        ema={key: torch.zeros_like(flow.state_dict()[key])},
    )
    again = load(str(folder)).state_dict()
    assert again[key].abs().max() == 0 and torch.equal(
        again["network.final.bias"], flow.state_dict()["network.final.bias"]
    )
    # saved anew without one: no old average is left behind
    save_model(folder, config=config_of(), state=flow.state_dict())
    assert torch.equal(load(folder).state_dict()[key], flow.state_dict()[key])


def test_wrappers_leave_no_trace_in_the_names(tmp_path):
    flow = make_flow()
    wrapped = {
        "module._orig_mod." + k.replace("blocks.0.", "blocks.0._orig_mod."): v for k, v in flow.state_dict().items()
    }
    assert normalise_keys(wrapped).keys() == flow.state_dict().keys()
    for prefix in ("module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."):  # whichever went on first
        assert normalise_keys({f"{prefix}network.a": torch.ones(1)}).keys() == {"network.a"}, prefix
    save_model(tmp_path / "m", config=config_of(), state=wrapped)
    assert load_file(tmp_path / "m" / "model.safetensors").keys() == flow.state_dict().keys()
    save_file(wrapped, tmp_path / "m" / "model.safetensors")  # as written by somebody else
    assert torch.equal(load(tmp_path / "m").network.final.weight, flow.network.final.weight)


def test_shared_and_strided_memory_is_saved(tmp_path):
    a = torch.arange(12.0).view(3, 4)
    save_model(tmp_path, config={}, state={"a": a, "b": a, "t": a.T, "row": a[1], "empty": torch.empty(0)})
    back = load_file(tmp_path / "model.safetensors")
    assert torch.equal(back["b"], a) and torch.equal(back["t"], a.T) and torch.equal(back["row"], a[1])


def test_a_table_that_only_some_models_have(tmp_path):
    flow = make_flow().eval()
    flow.network.position_table = torch.randn(16, 32)
    save_model(tmp_path / "m", config=config_of(), state=flow.state_dict())
    again = load(tmp_path / "m")
    assert torch.equal(again.network.position_table, flow.network.position_table)
    assert torch.equal(again.sample(["a"], seeds=[1], steps=2).x, flow.sample(["a"], seeds=[1], steps=2).x)


# ---------------------------------------------------------------------------------------------------------- checkpoints


def test_a_run_gives_its_newest_whole_checkpoint(tmp_path):
    run = make_run(tmp_path / "run", [900, 1000, 20])
    steps = [run / "checkpoints" / f"step-{n:08d}" for n in (20, 900, 1000)]
    assert checkpoints(run) == steps and newest_checkpoint(run) == steps[2] == find_model(run)
    assert torch.equal(load(run).network.final.weight, make_flow(seed=1000).network.final.weight)
    assert torch.equal(load(steps[0]).network.final.weight, make_flow(seed=20).network.final.weight)

    (steps[2] / "state.json").write_text("{} ")  # another size than its guard file says
    with pytest.warns(UserWarning, match=r"step-00001000 is passed over: state\.json has \d+ bytes instead of"):
        assert newest_checkpoint(run) == steps[1]
    (steps[1] / "complete.json").unlink()  # killed before the guard file
    with pytest.warns(UserWarning, match="step-00000900 is passed over: it was not written to the end"):
        assert newest_checkpoint(run) == steps[0]
    shutil.copytree(steps[0], run / "checkpoints" / ".step-00002000.partial")
    shutil.copytree(steps[0], run / "checkpoints" / "step-old")
    assert checkpoints(run) == [steps[0]]
    (steps[0] / "model.safetensors").unlink()
    assert newest_checkpoint(run) is None and newest_checkpoint(tmp_path / "nowhere") is None
    with pytest.raises(UserError, match="no whole checkpoint"):
        load(run)


@pytest.mark.parametrize(
    "guard",
    ["", "{", "[]", '{"files": 3}', '{"files": ["a"]}', '{"other": {}}', '{"files": {"gone": 1}}', "\xff"],
)
def test_a_mangled_guard_file_is_not_whole(tmp_path, guard):
    folder = make_run(tmp_path, [1]) / "checkpoints" / "step-00000001"
    assert is_whole(folder)
    (folder / "complete.json").write_bytes(guard.encode("latin-1"))
    assert not is_whole(folder)


def test_a_broken_checkpoint_named_itself_is_refused_with_another_one(tmp_path):
    run = make_run(tmp_path, [1, 2])
    broken = run / "checkpoints" / "step-00000002"
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"model\.safetensors has \d+ bytes instead of \d+; use .*step-00000001"):
        load(broken)
    (broken / "complete.json").unlink()
    with pytest.raises(UserError, match=r"not written to the end.*step-00000001"):
        load(broken)


# --------------------------------------------------------------------------------------------------------------- damage


def _half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _without(path, part):
    save_file({k: v for k, v in load_file(path).items() if part not in k}, path)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda m: shutil.rmtree(m), "does not exist"),
        (lambda m: (m / "config.json").unlink(), r"no config\.json.*cut short"),
        (lambda m: _half(m / "config.json"), r"config\.json is damaged"),
        (lambda m: (m / "config.json").write_bytes(b"\xff\xfe"), r"config\.json is damaged"),
        (lambda m: (m / "config.json").write_text("[1]"), r"config\.json has no 'model'"),
        (lambda m: _json(m / "config.json", lambda c: c.pop("text")), "no 'text'"),
        (lambda m: _json(m / "config.json", lambda c: c.update(shape=[8, 8])), r"\[3, 32, 32\]"),
        (
            lambda m: _json(m / "config.json", lambda c: c["model"].update(depht=3)),
            "config.json.*depht.*'depth'",
        ),
        (lambda m: _json(m / "config.json", lambda c: c["model"].update(name="mmditt")), "'mmdit'"),
        (
            lambda m: _json(m / "config.json", lambda c: c["model"].update(hidden=64)),
            r"is \[.*wants \[.*belong together",
        ),
        (lambda m: _without(m / "model.safetensors", "final.bias"), r"lacks 'network\.final\.bias'; save"),
        (lambda m: _without(m / "model.safetensors", "network."), r"lacks 'network\.\S+' and \d+ more"),
        (lambda m: (m / "model.safetensors").unlink(), r"model\.safetensors is missing"),
        (lambda m: _half(m / "model.safetensors"), r"model\.safetensors is damaged or cut short"),
        (lambda m: (m / "model.safetensors").write_bytes(b""), r"model\.safetensors is damaged or cut short"),
        (
            lambda m: (m / "model.safetensors").write_bytes(b"\x80\x04pickle" * 9),
            r"model\.safetensors is damaged",
        ),
        (lambda m: _half(m / "ema.safetensors"), r"ema\.safetensors is damaged or cut short"),
        (
            lambda m: save_file({"else": torch.zeros(1)}, m / "ema.safetensors"),
            "'else'.*do not belong together",
        ),
    ],
)
def test_damage_is_told_in_one_line(exported, harm, message):
    _, folder = exported
    harm(folder)
    with pytest.raises(UserError, match=message) as error:
        load(folder, ema="ema" in message or "else" in message)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_a_file_is_not_a_folder(exported):
    _, folder = exported
    with pytest.raises(UserError, match=f"not a folder.*try {folder}"):
        load(folder / "model.safetensors")


def test_a_missing_folder_names_the_nearest(exported):
    _, folder = exported
    with pytest.raises(UserError, match=rf"does not exist.*Did you mean '{folder}'"):
        load(f"{folder}s")


def test_a_device_that_is_not_there_is_told(exported):
    _, folder = exported
    with pytest.raises(UserError, match=r"^device 'cuda:93' cannot take the model: [^\n]*$"):
        load(folder, device="cuda:93")


def test_saving_cut_short_leaves_no_model(exported, monkeypatch):
    flow, folder = exported
    before = (folder / "model.safetensors").read_bytes()

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("genflow.flows.store.save_file", full)
    with pytest.raises(UserError, match=r"No space left on device: .*; free some space"):
        save_model(folder, config=config_of(), state=flow.state_dict())
    assert (folder / "model.safetensors").read_bytes() == before
    assert not [p for p in folder.iterdir() if "partial" in p.name]
    with pytest.raises(UserError, match="cut short"):
        load(folder)
    with pytest.raises(UserError, match="cannot write the model"):
        save_model(folder / "model.safetensors" / "inside", config={}, state={})


def test_a_config_that_is_no_json_leaves_the_model_that_is_there(exported):
    flow, folder = exported
    with pytest.raises(UserError, match="is plain dicts, lists, numbers and words: .*Path"):
        save_model(folder, config={**config_of(), "data": {"path": folder}}, state=flow.state_dict())
    load(folder)


def test_a_model_saved_over_another_leaves_no_average_of_the_other(tmp_path):
    weights = {"a": torch.ones(2)}
    save_model(tmp_path, config={}, state=weights, ema=weights)
    save_model(tmp_path, config={}, state=weights)
    assert not (tmp_path / "ema.safetensors").exists()


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_weights_can_be_read_by_whom_their_config_can(tmp_path, umask):
    before = os.umask(umask)
    try:
        weights = {"a": torch.ones(2)}
        save_model(tmp_path / "model", config={}, state=weights, ema=weights)
        save_checkpoint(tmp_path, 1, config={}, tensors={"model": weights}, state={}, keep=1)
        write_pairs(
            tmp_path / "pairs", lambda rows: (torch.ones(1, 2), torch.zeros(1, 2)), captions=[""], shape=[2], about={}
        )
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*.*") if path.is_file()}
    assert len(modes) == 9 and set(modes.values()) == {0o666 & ~umask}, modes


def test_files_are_on_the_disk_before_they_are_called_whole(tmp_path, monkeypatch):
    from genflow import saving
    from genflow.flows import store

    flush, flushed = saving.flush, []

    def spied(path):
        flushed.append((path.name, (tmp_path / "complete.json").exists()))
        flush(path)

    for module in (store, saving):
        monkeypatch.setattr(module, "flush", spied)
    for name in ("a.safetensors", "b.json"):
        (tmp_path / name).write_text("x")
    finish_checkpoint(tmp_path)
    assert flushed[:2] == [("a.safetensors", False), ("b.json", False)] and (tmp_path.name, True) in flushed
