"""The registry: one name per thing, an index that is the golden file of the public API."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from functools import partial

import pytest

import genflow
from genflow import registry
from genflow.errors import UserError, nearest
from genflow.samplers import heun


@pytest.fixture
def clean(monkeypatch):
    monkeypatch.setattr(registry, "_live", dict(registry._live))


def test_public_json_is_what_the_code_exports():
    """On a change of the public API: python -m genflow.registry --update, and look at the diff."""
    result = subprocess.run([sys.executable, "-m", "genflow.registry"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_golden_test_can_fail(tmp_path, monkeypatch):
    golden = json.loads(registry.INDEX.read_text())
    golden["sampler"].pop("heun")
    (tmp_path / "public.json").write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n")
    monkeypatch.setattr(registry, "INDEX", tmp_path / "public.json")
    monkeypatch.setattr(sys, "argv", ["registry"])
    with pytest.raises(SystemExit, match="--update"):
        registry.main()


def test_a_decorator_tags_and_returns_the_same_object(clean):
    def thing():
        """A thing."""

    assert registry.sampler_export("one", "other")(thing) is thing
    assert registry.resolve("sampler", "one") is registry.resolve("sampler", "other") is thing
    assert registry.tag_of(thing).names == ("one", "other")
    assert {"one", "other"} <= set(registry.names("sampler"))


def test_two_things_with_one_name_name_both_places(clean):
    @registry.sampler_export("twice")
    def first(): ...

    with pytest.raises(UserError, match=r"test_registry:\d+ and .*test_registry:\d+"):

        @registry.sampler_export("twice")
        def second(): ...

    @registry.grid_export("twice")  # another kind is another name
    def third(): ...


def test_a_reloaded_module_is_no_second_thing(clean):
    source = "from genflow.registry import grid_export\n@grid_export('again')\nclass again: ...\n"
    module = types.ModuleType("reloaded")
    for _ in range(2):
        exec(source, module.__dict__)  # no source file, as at a prompt
    assert registry.resolve("grid", "again") is module.again
    assert registry.tag_of(module.again).place == "reloaded:2"


def test_a_third_party_cannot_take_a_name_of_genflow(clean):
    """Also before genflow's own thing has been imported."""
    registry._live.pop(("sampler", "heun"), None)
    with pytest.raises(UserError, match=r"sampler 'heun': genflow.samplers.runge_kutta and .*test_registry:\d+"):

        @registry.sampler_export("heun")
        def mine(): ...


def test_an_export_needs_a_name():
    with pytest.raises(TypeError):
        registry.sampler_export()


def test_signatures_are_as_written():
    from dataclasses import dataclass, field

    def function(a, /, x: Tensor | None, *rest: int, scale: float = 1e-4, f=nearest) -> dict[str, Tensor]: ...  # noqa: F821

    @dataclass
    class Config:
        depth: int
        parts: list[str] = field(default_factory=list)

    assert registry.signature_of(function) == (
        "(a, /, x: Tensor | None, *rest: int, scale: float = 0.0001, f=...) -> dict[str, Tensor]"
    )
    assert registry.signature_of(Config) == "(depth: int, parts: list[str] = list())"


def test_a_subclass_does_not_inherit_its_parents_name():
    from genflow import MMDiT

    class Mine(MMDiT): ...

    assert registry.tag_of(MMDiT) is not None and registry.tag_of(Mine) is None


def test_unknown_names_get_the_nearest():
    with pytest.raises(UserError, match="Did you mean 'heun'"):
        registry.resolve("sampler", "huen")
    assert nearest("zzz", ["a", "b"]) == " Choose from: a, b."


def test_plugins_add_their_own(clean, monkeypatch):
    class Entry:
        name, value = "extra", "extra_module"

        def load(self):
            @registry.sampler_export("from_a_plugin")
            def plugged(): ...

    class Broken(Entry):
        def load(self):
            raise ImportError("no such thing")

    monkeypatch.setattr(
        registry, "entry_points", lambda group: [Broken(), Entry()] if group == "genflow.plugins" else []
    )
    registry._load_plugins.cache_clear()
    try:
        assert "from_a_plugin" in registry.names("sampler")
        assert registry.resolve("sampler", "from_a_plugin").__name__ == "plugged"
    finally:
        registry._load_plugins.cache_clear()


def test_the_package_serves_every_public_name():
    for group in registry.index().values():
        for entry in group.values():
            assert getattr(genflow, entry["attr"]).__module__ == entry["module"], entry
    assert {"MMDiT", "heun", "load", "RectifiedFlow"} <= set(dir(genflow))
    with pytest.raises(AttributeError):
        genflow.no_such_thing  # noqa: B018


def test_the_package_serves_its_rooms():
    code = "import genflow; print(genflow.registry.resolve('sampler', 'heun').__name__, genflow.functional.__name__)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert told.stdout == "heun genflow.functional\n", told.stderr


def test_two_threads_may_begin_in_one_room():
    code = """
import genflow, threading
start, got = threading.Barrier(2), []
def take(name):
    start.wait()
    got.append(getattr(genflow, name).__name__)
threads = [threading.Thread(target=take, args=(name,)) for name in ("cfg", "flowedit")]
for each in threads: each.start()
for each in threads: each.join()
print(*sorted(got))
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert told.stdout == "cfg flowedit\n", told.stderr


def test_every_export_is_described():
    for kind, group in registry.index().items():
        for name, entry in group.items():
            written = entry["summary"] and not entry["summary"].startswith(f"{entry['attr']}(")  # as dataclass makes it
            assert written, f"{kind} {name} has no docstring"


def test_two_partials_of_one_name_are_refused_by_the_places_that_export_them(clean):
    registry.sampler_export("mine")(partial(heun))
    with pytest.raises(
        UserError, match=r"two things are called sampler 'mine': test_registry:\d+ and test_registry:\d+"
    ):
        registry.sampler_export("mine")(partial(heun))
