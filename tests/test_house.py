"""The house: arrows run downwards, the door is light, files are short."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import genflow

ROOT = Path(genflow.__file__).parent
# A room may import from floors below its own, and from itself.
FLOORS = [
    {"errors"},
    {"registry"},
    {"config", "cachedir", "saving", "versions"},
    {"functional", "native"},
    {"attention", "conditions"},
    {"layers"},
    {"networks", "samplers"},
    {"text"},
    {"flows", "data"},
    {"ar"},
    {"training", "evaluation", "interop"},
    {"cli"},
]
FLOOR = {room: i for i, floor in enumerate(FLOORS) for room in floor}
MODULES = sorted(ROOT.rglob("*.py"))
PUBLIC = genflow._public()


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Every module imported anywhere in a file, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            if node.module == "genflow":  # a public name is an arrow to where it lives
                found |= {PUBLIC.get(alias.name, f"genflow.{alias.name}") for alias in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "genflow":
            found.add(PUBLIC.get(node.attr, "genflow"))
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_arrow_runs_upwards(path):
    room = room_of(path)
    if room in ("__init__", "__main__"):
        return
    for name in imports(path):
        if name.startswith("genflow.") and (target := name.split(".")[1]) in FLOOR and target != room:
            assert FLOOR[target] < FLOOR[room], f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_libraries_stay_in_their_rooms(path):
    owners = {"accelerate": {"training"}, "diffusers": {"interop"}, "transformers": {"text"}, "datasets": {"data"}}
    for name in imports(path):
        top = name.split(".")[0]
        if top in owners:
            assert room_of(path) in owners[top], f"{path.relative_to(ROOT)} imports {top}"


def test_samplers_need_torch_and_functional_only():
    code = (
        "import sys, genflow.samplers; "
        "bad = [m for m in sys.modules if m.split('.')[0] in ('diffusers', 'accelerate', 'transformers', 'datasets')"
        " or (m.startswith('genflow.') and m.split('.')[1] not in ('samplers', 'functional', 'registry', 'errors'))]; "
        "sys.exit(' '.join(bad) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_drawing_starts_without_the_compiler():
    code = (
        "import sys, genflow.flows.store, genflow.flows.latent, genflow.cli.options, genflow.training.apply; "
        "sys.exit(' '.join({'torch._dynamo', 'torch.distributed.tensor', 'sympy', 'accelerate'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_importing_genflow_is_light():
    code = "import sys, genflow; dir(genflow); sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_room_has_a_floor_and_every_file_a_reason():
    for path in MODULES:
        assert room_of(path) in {*FLOOR, "__init__", "__main__"}
        text = path.read_text()
        assert len(text.splitlines()) <= 400, path
        if text.strip():
            assert ast.get_docstring(ast.parse(text)), f"{path} does not say what it is for"
