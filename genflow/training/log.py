"""What a run tells: a progress bar, metrics.jsonl, trackers, loss by time."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from genflow.errors import UserError
from genflow.saving import replacing

T_BINS = 8
SAY_EVERY = 10  # seconds between lines where there is no terminal for a bar


class LossByTime:
    """Sums of the per-sample loss in equal bins of t, since the last line of the log."""

    def __init__(self, sums: list[list[float]] | None = None) -> None:
        self._sums = torch.tensor(sums, dtype=torch.float64) if sums else torch.zeros(2, T_BINS, dtype=torch.float64)
        self._added: list[tuple[Tensor, Tensor]] = []

    def add(self, per_sample: Tensor, t: Tensor) -> None:
        """per_sample, t: B. Does not wait for their device."""
        self._added.append((per_sample, t))

    @property
    def sums(self) -> Tensor:
        """2 x T_BINS float64 on the CPU: loss, count."""
        for per_sample, t in self._added:
            bins = (t.cpu().double() * T_BINS).long().clamp(0, T_BINS - 1)
            self._sums[0].index_add_(0, bins, per_sample.cpu().double())
            self._sums[1].index_add_(0, bins, torch.ones_like(bins, dtype=torch.float64))
        self._added.clear()
        return self._sums

    def reduced(self, accelerator: Accelerator) -> Tensor:
        """The sums of all ranks."""
        if accelerator.num_processes == 1:
            return self.sums
        total = accelerator.reduce(self.sums.to(accelerator.device, torch.float32), reduction="sum")
        assert isinstance(total, Tensor)
        return total.cpu().double()


class Log:
    """metrics.jsonl, the trackers and the terminal of the main process; silent on the others."""

    def __init__(self, run: Path, accelerator: Accelerator, *, steps: int, start: int, batch_size: int) -> None:
        self.accelerator = accelerator
        self.path = run / "metrics.jsonl"
        self.main = accelerator.is_main_process
        self.batch_size = batch_size
        self.bar = tqdm(
            total=steps,
            initial=start,
            unit="step",
            disable=not (self.main and sys.stderr.isatty()),
            dynamic_ncols=True,
        )
        self.steps, self.begun, self.start = steps, time.monotonic(), start
        self.mark = (time.monotonic(), start)
        self.said, self.tracking = 0.0, False
        if self.main:
            for left in (
                *run.glob(".*.partial"),
                *(run / "previews").glob(".*.partial"),
            ):  # by a process that was killed
                left.unlink()
            self._cut_after(start)

    def _cut_after(self, step: int) -> None:
        """Drop the lines of steps that the run is about to do again."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):  # such as the last line of a run that was killed while writing
                continue
        with replacing(self.path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept))

    def tells(self, step: int, name: str) -> bool:
        """Whether metrics.jsonl has a number of that name for a step: the main process's word, which keeps the file."""
        if not self.main or not self.path.exists():
            return False
        return any(
            line["step"] == step and name in line for line in map(json.loads, self.path.read_text().splitlines())
        )

    def track(self) -> None:
        """Open the trackers, once."""
        if self.main and self.accelerator.log_with and not self.tracking:
            self.tracking = True
            again = {"purge_step": self.start + 1}  # steps that a killed run had told of
            self.accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": again})

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl and the trackers."""
        if not self.main:
            return
        try:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise UserError(f"could not write {self.path}: {error.strerror}") from error
        self.track()
        self.accelerator.log({k: v for k, v in values.items() if isinstance(v, int | float)}, step=step)

    def advance(self) -> None:
        self.bar.update(1)

    def progress(self, step: int, loss: float) -> float:
        """Show the state on the terminal; returns samples/s since the last call."""
        now, last = time.monotonic(), self.mark
        rate = (step - last[1]) * self.batch_size / max(now - last[0], 1e-9)
        self.mark = (now, step)
        self.bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} samples/s")
        if self.main and self.bar.disable and now - self.said >= SAY_EVERY:
            self.said = now
            left = (now - self.begun) / max(step - self.start, 1) * (self.steps - step)
            self.say(f"step {step}/{self.steps}  loss {loss:.4f}  {rate:.0f} samples/s  {left / 60:.1f} min left")
        return rate

    def pause(self, seconds: float) -> None:
        """Leave out of the rate what was not training."""
        self.mark = (self.mark[0] + seconds, self.mark[1])

    def say(self, text: str) -> None:
        if self.main:
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        self.bar.close()
