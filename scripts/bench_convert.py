"""What memory `genflow convert` takes of a checkpoint of SD3-medium's size: 2 billion random weights in bfloat16, 4 GB.

The file is written tensor by tensor, converted in a process of its own, and removed. Of that process two peaks are
told: all of its resident memory, as the kernel keeps it (VmHWM: the program and its libraries, what it allocated, and the
pages of files that are mapped, which the kernel may take back at any time), and, sampled, what it allocated (RssAnon).

    python scripts/bench_convert.py            # needs 8 GB of disk
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from claims.common import told

from genflow.interop.layouts import STABILITY, from_genflow
from genflow.interop.tensors import Lazy, write_file
from genflow.networks.mmdit import MMDiTConfig

MEDIUM = MMDiTConfig(
    depth=24, qk_norm=False, in_channels=16, context_dim=4096, pooled_dim=2048, sample_size=64, pos_embed_max_size=192
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to put the files (the system's place for temporary ones)")
    parser.add_argument("--to", nargs="+", default=["genflow", "diffusers"], help="layouts, one after the other")
    return parser.parse_args()


def write_medium(path: Path) -> None:
    """SD3-medium's transformer under Stability's names, one tensor in memory at a time."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in MEDIUM.build().named_parameters()}

    def random(shape: tuple[int, ...]) -> Lazy:
        return Lazy(
            shape, torch.bfloat16, lambda: torch.empty(shape, dtype=torch.bfloat16).normal_(generator=generator)
        )

    tensors = from_genflow({name: random(shape) for name, shape in shapes.items()}, MEDIUM, STABILITY)
    write_file(path, {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()})


def status(pid: int) -> dict[str, int]:
    """The memory of a process in bytes, by the names of /proc; empty when it has gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {
        key: 1024 * int(rest.split()[0]) for key, _, rest in (line.partition(":") for line in lines) if "kB" in rest
    }


def peak(command: list[str]) -> tuple[dict[str, int], float]:
    """The largest values of `status` of a command, looked at a hundred times a second, and its seconds."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    most: dict[str, int] = {}

    def watch() -> None:
        while process.poll() is None:
            most.update({key: max(value, most.get(key, 0)) for key, value in status(process.pid).items()})
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    if process.wait():
        sys.exit(f"{' '.join(command)} failed")
    watcher.join()
    return most, time.perf_counter() - began


def main() -> None:
    args = parse()
    nothing, _ = peak([sys.executable, "-c", "import genflow.interop.convert"])
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source = Path(folder, "sd3-medium.safetensors")
        write_medium(source)
        size = source.stat().st_size
        print(f"{source.name}: {size / 1e9:.2f} GB; the imports alone: {nothing['VmHWM'] / 1e9:.2f} GB")
        for to in args.to:
            out = Path(folder, to)
            most, seconds = peak([sys.executable, "-m", "genflow", "convert", str(source), str(out), "--to", to])
            print(
                f"to {to}: peak resident {most['VmHWM'] / 1e9:.2f} GB = {most['VmHWM'] / size:.2f} x the file, of it "
                f"allocated {most['RssAnon'] / 1e9:.2f} GB = {most['RssAnon'] / size:.2f} x; {seconds:.0f} s"
            )
            for file in sorted(out.rglob("*"), reverse=True):
                file.rmdir() if file.is_dir() else file.unlink()


if __name__ == "__main__":
    told(main)
