"""The tutorials do what they say: every command and every line of Python in them is run, with fewer steps of training."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from genflow.cli import main

FOLDER = Path(__file__).parents[1] / "samples" / "tutorials"
BLOCK = re.compile(r"^```(\w+)[ ]?(\S*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COLOURS = {"otter": "brown", "pizza": "orange", "sky": "skyblue", "leaf": "green", "rose": "red", "night": "navy"}


def run(tutorial: str) -> None:
    """Every block in its order: files are written, commands given, Python executed in one namespace."""
    namespace: dict = {}
    for language, file, content in BLOCK.findall((FOLDER / tutorial).read_text()):
        content = re.sub(r"steps: 3000", "steps: 2", re.sub(r"train\.steps=6000", "train.steps=3", content))
        if language == "yaml":
            Path(file).write_text(content.replace("depth: 3, hidden: 256", "depth: 1, hidden: 32"))
        elif language == "bash":
            for line in content.splitlines():
                program, *arguments = shlex.split(line)
                assert program == "genflow"
                assert main(arguments) == 0, line
        else:
            assert language == "python"
            exec(content, namespace)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with pictures of one's own."""
    desk = tmp_path_factory.mktemp("desk")
    (desk / "my-pictures").mkdir()
    for i in range(24):
        name = list(COLOURS)[i % len(COLOURS)]
        Image.new("RGB", (40 + i, 48), COLOURS[name]).save(desk / "my-pictures" / f"{i}.png")
        (desk / "my-pictures" / f"{i}.txt").write_text(f"a {name} no. {i}")
    return desk


def test_train_then_sample(desk, monkeypatch):
    monkeypatch.chdir(desk)
    run("train.md")
    assert {"checkpoints", "previews", "eval", "metrics.jsonl"} <= {p.name for p in Path("runs/mine").iterdir()}
    assert Path("runs/mine/eval/nearest.png").exists() and list(Path("plots").iterdir())
    run("sample.md")
    for folder in ("pictures", "heun", "unipc", "tuned", "edited", "inverted"):
        assert Path(folder, "grid.png").exists(), folder


def test_import(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("import.md")
