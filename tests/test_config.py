"""Configs: typed, and errors that name file, line and the nearest key."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from genflow.config import Choice, Named, dump, from_dict, load, to_dict
from genflow.errors import UserError
from genflow.flows.densities import LogitNormal, Mode


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    flag: bool = False
    kind: Literal["a", "b"] = "a"
    pair: tuple[int, int] = (1, 2)
    names: tuple[str, ...] = ()
    maybe: int | None = None
    text: str = ""
    switch: Literal["no", "auto"] = "auto"
    level: Literal[1, 3] = 1
    place: Path = Path("here")
    anything: Any = None
    table: dict[str, tuple[float, ...]] = field(default_factory=dict)
    loose: dict | list | None = None

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError(f"rate must not be negative, as {self.rate} is")


@dataclass(frozen=True)
class Outer:
    steps: int
    inner: Inner = field(default_factory=Inner)
    density: Annotated[Any, Choice("density")] = field(default_factory=LogitNormal)
    sampler: Annotated[str, Named("sampler")] = "heun"


def read(tmp_path, text, *overrides):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return load(path, overrides, schema=Outer)


def test_values_arrive_typed(tmp_path):
    text = (
        "steps: 5\ninner: {rate: 1e-4, flag: true, kind: b, pair: [3, 4], names: [x, '7'], maybe: 2}\n"
        "density: {name: mode, scale: 1}\n"
    )
    got = read(tmp_path, text)
    assert got == Outer(5, Inner(1e-4, True, "b", (3, 4), ("x", "7"), 2), Mode(1.0))
    assert isinstance(got.density.scale, float)
    assert read(tmp_path, "steps: 5\ndensity: mode\n").density == Mode()
    assert read(tmp_path, "steps: 5\ninner:\n").inner == Inner()


def test_a_dict_holds_values_and_no_parts_of_a_file(tmp_path):
    got = read(tmp_path, "steps: 5\ninner: {table: {a: [1]}, loose: {b: [c, {d: 2}]}}\n")
    assert got.inner.table == {"a": (1.0,)} and got.inner.loose == {"b": ["c", {"d": 2}]}
    assert read(tmp_path, "steps: 5\ninner: {loose: [1, [2]]}\n").inner.loose == [1, [2]]
    assert from_dict(Outer, to_dict(got)) == got and to_dict(got)["inner"]["table"] == {"a": [1.0]}
    with pytest.raises(UserError, match=r"inner\.table\.a\[0\] must be a number, not 'x'"):
        read(tmp_path, "steps: 5\ninner: {table: {a: [x]}}\n")


def test_text_is_what_is_written(tmp_path):
    """No number or switch is made of what a field takes as text."""
    for text in ("007", "1.10", "no", "1e-4", "2024-01-01", "2024-13-45", "12:30", "'null'"):
        inner = read(tmp_path, f"steps: 5\ninner: {{text: {text}, switch: no, place: 1.10}}\n").inner
        assert (inner.text, inner.switch, inner.place) == (text.strip("'"), "no", Path("1.10"))
        assert read(tmp_path, "steps: 5\n", f"inner.text={text}").inner.text == text.strip("'")
    assert read(tmp_path, "steps: 5\ninner: {anything: {a: [1, x]}}\n").inner.anything == {"a": [1, "x"]}


def test_numbers_are_what_they_look_like(tmp_path):
    """None is read as of base eight or sixty."""
    for text in ("010", "1:30", "09", "#3"):
        with pytest.raises(UserError, match=f"steps must be a whole number, not '{text}'"):
            read(tmp_path, "steps: 5\n", f"steps={text}")
    assert read(tmp_path, "steps: 5\n", "inner.text=#x", "inner.level='3'").inner == Inner(text="#x", level=3)
    with pytest.raises(UserError, match="inner.rate must be a number, not 1000"):
        read(tmp_path, "steps: 5\n", f"inner.rate=1{'0' * 400}")


def test_a_choice_given_by_its_fields_is_the_default_one(tmp_path):
    assert read(tmp_path, "steps: 5\n", "density.mean=1").density == LogitNormal(mean=1.0)
    assert read(tmp_path, "steps: 5\ndensity: {std: 2}\n").density == LogitNormal(std=2.0)


@pytest.mark.parametrize("text", ["*.tar", "**/*.parquet", "%d.png", "@home", "`x`"])
def test_an_override_may_begin_with_what_yaml_has_for_itself(tmp_path, text):
    assert read(tmp_path, "steps: 5\n", f"inner.text={text}").inner.text == text


def test_overrides(tmp_path):
    assert read(tmp_path, "steps: 5\ninner:\n", "inner.rate=2").inner == Inner(rate=2.0)
    got = read(
        tmp_path, "steps: 5\n", "inner.rate=1e-3", "inner.names=[u, v]", "density=mode", "density.scale=0.5", "steps=7"
    )
    assert got == Outer(7, Inner(rate=1e-3, names=("u", "v")), Mode(0.5))
    got = read(tmp_path, "steps: 5\ndensity: {name: logit_normal, mean: 1}\n", "density=mode", "inner.maybe=null")
    assert got.density == Mode()


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("steps: 5\nstesp: 6\n", [], r"c.yaml:2: unknown key 'stesp'. Did you mean 'steps'"),
        (
            "steps: 5\ninner:\n  rate: 1\n  flg: true\n",
            [],
            r"c.yaml:4: unknown key 'flg' in inner. Did you mean 'flag'",
        ),
        ("steps: five\n", [], r"c.yaml:1: steps must be a whole number, not 'five'"),
        ("steps: 5.5\n", [], r"c.yaml:1: steps must be a whole number"),
        ("steps: true\n", [], r"c.yaml:1: steps must be a whole number"),
        ("steps: 5\ninner: {flag: 1}\n", [], r"c.yaml:2: inner.flag must be true or false"),
        ("steps: 5\ninner: {kind: c}\n", [], r"c.yaml:2: inner.kind is 'c'. Choose from: a, b"),
        ("steps: 5\ninner: {pair: [1]}\n", [], r"c.yaml:2: inner.pair must have 2 values"),
        ("steps: 5\ninner: 3\n", [], r"c.yaml:2: inner must be a section"),
        ("steps: 5\ninner:\n  - 3\n", [], r"c.yaml:2: inner must be a section"),
        ("steps: 5\ninner: {text: null}\n", [], r"c.yaml:2: inner.text must be text, not nothing"),
        ("steps: 5\ninner:\n  flag: false\n  rate: -1\n", [], r"c.yaml:4: inner: rate must not be negative"),
        ("steps: 5\ninner:\n  flag: true\n", ["inner.rate=-1"], r"^override 'inner.rate=-1': inner: rate must not"),
        ("steps: 5\nno: 3\n", [], r"c.yaml:2: unknown key 'no'"),
        ("steps: 5\n? [a]\n: 3\n", [], r"c.yaml:2: a key must be a word"),
        ("steps: 5\ninner: &x [*x]\n", [], r"c.yaml: not YAML: an alias"),
        ("steps: 5\x07\n", [], r"c.yaml: not YAML: unacceptable character"),
        ("steps: !!int foo\n", [], r"c.yaml: not YAML: invalid literal"),
        ("steps: !!bool maybe\n", [], r"c.yaml: not YAML: 'maybe'"),
        ("steps: !!timestamp x\n", [], r"c.yaml: not YAML: "),
        ("steps: !!python/object:os.system x\n", [], r"c.yaml:1: not YAML: could not determine a constructor"),
        ("steps: 5\nsteps: 6\n", [], r"c.yaml:2: key 'steps' is given twice"),
        ("inner: {}\n", [], r"steps is missing"),
        ("- 1\n", [], r"c.yaml:1: a config is a mapping"),
        ("steps: [1\n", [], r"c.yaml:\d: not YAML"),
        ("steps: 5\ndensity: {name: mod}\n", [], r"c.yaml:2: density: no density is named 'mod'. Did you mean 'mode'"),
        ("steps: 5\ndensity: {scale: 1}\n", [], r"c.yaml:2: unknown key 'scale' in density. Choose from: mean, std"),
        ("steps: 5\ndensity: {name: mode, mean: 1}\n", [], r"c.yaml:2: unknown key 'mean' in density"),
        ("steps: 5\nsampler: huen\n", [], r"c.yaml:2: sampler: no sampler is named 'huen'. Did you mean 'heun'"),
        ("steps: 5\n", ["rate=1"], r"override 'rate=1': unknown key 'rate'. Did you mean 'inner.rate'"),
        ("steps: 5\n", ["std=1"], r"override 'std=1': unknown key 'std'. Did you mean 'density.std'"),
        ("steps: 5\ndensity: mode\n", ["scale=1"], r"unknown key 'scale'. Did you mean 'density.scale'"),
        ("steps: 5\ndensity: {name: mode}\n", ["std=1"], r"unknown key 'std'. Choose from: density, inner"),
        ("steps: 5\n", ["inner.rte=1"], r"override 'inner.rte=1': unknown key 'rte' in inner. Did you mean 'rate'"),
        ("steps: 5\n", ["steps=x"], r"override 'steps=x': steps must be a whole number"),
        ("steps: 5\n", ["steps"], r"override 'steps': write key=value"),
    ],
)
def test_mistakes_are_named(tmp_path, text, overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, text, *overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("guidance", "sample.guidance"),
        ("lr", "train.optimizer.lr"),
        ("train.learning_rate", "train.optimizer.lr"),
        ("epochs", "train.steps"),
        ("train.epochs", "train.steps"),
        ("steps", "train.steps' or 'sample.steps"),
    ],
)
def test_a_key_is_found_in_the_sections_within_and_by_what_others_call_it(tmp_path, key, place):
    from genflow.training.config import RunConfig

    (tmp_path / "c.yaml").write_text("data: toy2d\nmodel: mlp\n")
    with pytest.raises(UserError, match=rf"unknown key '{key.split('.')[-1]}'.* Did you mean '{place}'\?$"):
        load(tmp_path / "c.yaml", [f"{key}=3"], schema=RunConfig)


def test_a_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "quickstart.yaml").write_text("steps: 1")
    with pytest.raises(UserError, match="Did you mean 'quickstart.yaml'"):
        load(tmp_path / "quikstart.yaml", schema=Outer)
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"c.yaml: not UTF-8 text\.$"):
        load(tmp_path / "c.yaml", schema=Outer)


def test_a_name_that_no_disk_takes_is_told(tmp_path):
    with pytest.raises(UserError, match=r"^cannot read config .*a: File name too long\.$"):
        load(tmp_path / ("a" * 300), schema=Outer)


def test_the_folder_of_a_run_is_answered_with_its_config(tmp_path):
    with pytest.raises(UserError, match=r"Is a directory\.$"):
        load(tmp_path, schema=Outer)
    (tmp_path / "config.yaml").write_text("steps: 1")
    with pytest.raises(UserError, match=r"Is a directory\. Did you mean '.*config.yaml'\?$"):
        load(tmp_path, schema=Outer)


def test_round_trip(tmp_path):
    inner = Inner(rate=1e-7, names=("é", "null", "1e-4", "no"), text="2024-01-01", switch="no", place=Path("7"))
    config = Outer(3, inner, Mode(0.25), "euler")
    dump(config, tmp_path / "c.yaml")
    assert load(tmp_path / "c.yaml", schema=Outer) == config
    assert from_dict(Outer, to_dict(config)) == config
    assert to_dict(config)["density"] == {"name": "mode", "scale": 0.25}


def test_the_shipped_configs_load():
    from genflow.training.config import RunConfig

    shipped = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
    assert shipped
    for path in shipped:
        assert from_dict(RunConfig, to_dict(load(path, schema=RunConfig))) == load(path, schema=RunConfig)
