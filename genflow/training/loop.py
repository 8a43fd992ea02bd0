"""The training loop: one run from its config to its last checkpoint, resumable at any step."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Generator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from genflow.config import to_dict
from genflow.data.latents import LatentDataset
from genflow.data.loading import Batch, PreparedConditions, StreamSampler, in_order, loader, of_one_shape
from genflow.data.pictures import Picture, caption_grid
from genflow.data.points import point_picture
from genflow.errors import UserError
from genflow.flows.store import check_base, newest_checkpoint, weights_of
from genflow.flows.trained import fill_trained
from genflow.functional import Rng
from genflow.training.apply import check_shapes, checkpointed, compile_blocks, record_steps, train_in_float8
from genflow.training.checkpoint import check_data, checkpoint_tensors, load_checkpoint, save_checkpoint, told_of
from genflow.training.config import RunConfig, fit_to, shape_of
from genflow.training.ema import EMA
from genflow.training.log import T_BINS, Log, LossByTime
from genflow.training.lora import adapted
from genflow.training.precision import DTYPES, verified
from genflow.training.ranks import all_or_none, from_main, same_on_all
from genflow.training.sharding import shard, unreduced, whole
from genflow.training.signals import Interrupted, stop_signal
from genflow.training.warm import begin_with

POINTS = 4096  # of a preview of vectors
MAX_HALVINGS = 24  # of the fp16 loss scale for one batch, before the run is given up


def learning_rate(step: int, *, steps: int, warmup: int, decay: float) -> float:
    """The factor on the base learning rate for step (counted from 0): linear up, flat, linear to zero at the end."""
    up = min(1.0, (step + 1) / max(warmup, 1))
    down = 1.0 if decay == 0 else min(1.0, (1 - step / steps) / decay)
    return up * down


class Trainer:
    """Everything one run holds. `run()` trains to the last step. hold: makes sure that the folder is still its own."""

    def __init__(self, config: RunConfig, run: Path, accelerator: Accelerator, hold: Callable[[], None]) -> None:
        train = config.train
        self.run_folder, self.accelerator, self.hold = run, accelerator, hold
        with all_or_none():
            network = self._prepare(config)
        same_on_all({"the number of training samples": len(self.dataset)})
        self.sharded = train.parallel == "fsdp" and accelerator.num_processes > 1
        if self.sharded:
            self.model: nn.Module = shard(self.flow, network, DTYPES[train.precision])
            self.optimizer = accelerator.prepare(train.optimizer.build(self.flow))
        else:
            self.model, self.optimizer = accelerator.prepare(self.flow, train.optimizer.build(self.flow))
        self.base_lr = [group["lr"] for group in self.optimizer.param_groups]
        self.ema = EMA(self.flow, train.ema) if train.ema else None
        self.step, self.by_time = 0, LossByTime()
        self.checked = False  # whether the first forward has shown the precision that was asked
        self.caught: list[int] = []  # signals that ask the run to stop
        self.bad: dict[str, str] = {}
        self.parts: list[dict[str, Tensor]] = []  # of this process's micro-batches of the last step
        with all_or_none():
            self._resume()
        self.log = Log(run, accelerator, steps=train.steps, start=self.step, batch_size=train.batch_size)

    def _prepare(self, config: RunConfig) -> nn.Module:
        """What every rank builds alike and alone: data, conditions and the flow. Returns the flow's network."""
        train, accelerator = config.train, self.accelerator
        self.dataset = config.data.build("train")
        self.told = told_of(self.dataset)
        torch.manual_seed(config.seed)  # the initial weights hang on nothing else
        self.text = config.text.build()
        self.shape = shape_of(config.data)
        self.config = config = replace(config, model=fit_to(config.model, self.text, self.shape, config.flow))
        per_micro = accelerator.num_processes * train.accumulation
        if train.batch_size % per_micro:
            near = max(round(train.batch_size / per_micro), 1) * per_micro
            raise UserError(
                f"train.batch_size={train.batch_size} does not divide among {accelerator.num_processes} processes x "
                f"{train.accumulation} micro-batches; try {near}"
            )
        network = config.model.build()
        if train.checkpointing:
            network = checkpointed(network)
        self.flow = config.flow.build(network, self.text, shape=self.shape)
        check_shapes(self.dataset, self.flow, network, self.shape)
        saved = newest_checkpoint(self.run_folder)
        if train.lora is not None and saved is not None:
            check_base(saved, config.init)
        if config.init is not None and (saved is None or train.lora is not None):
            begin_with(self.flow, config.init)
        fill_trained(self.flow, needed=saved is None)
        if isinstance(self.dataset, LatentDataset):
            self.dataset.check(self.flow)
        self.base: dict[str, Any] = {}  # what a LoRA run's updates are of
        if train.lora is not None:
            assert config.init is not None
            self.base = {"base": weights_of(config.init, ema=True)}
            adapted(self.flow, network, train.lora)
        if train.precision == "fp8":
            train_in_float8(network)
        if train.compile:
            compile_blocks(network)
        self.conditions = PreparedConditions.prepare(self.dataset, self.text)
        self.validation = self._validation_batches() if train.validate_every else []
        self.flow.to(accelerator.device).prepare_training()
        if config.init is None:  # else what was fitted to the data goes with the weights
            self.flow.initialise(self.conditions.table, self._first_batch)
        if train.graphs:
            record_steps(network, processes=accelerator.num_processes, one_shape=of_one_shape(self.dataset))
        return network

    def _resume(self) -> None:
        folder = newest_checkpoint(self.run_folder)
        if folder is None:
            return
        state = load_checkpoint(folder, model=self.flow, optimizer=self.optimizer.optimizer, ema=self.ema)
        self.step = state["step"]
        check_data(state, self.told, folder, self.run_folder)
        if self.accelerator.is_main_process:
            self.by_time = LossByTime(state["by_time"])
        self.bad = dict(state.get("bad", {}))
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def _first_batch(self) -> Batch:
        """The samples of the first step, of all ranks and micro-batches together."""
        sampler = StreamSampler.over(
            self.dataset, seed=self.config.seed, batch_size=self.config.train.batch_size, steps=1
        )
        batch = next(loader(self.dataset, self.conditions, sampler, shape=self.shape, own_shapes=True))
        return batch.to(self.accelerator.device)

    def batches(self) -> Generator[Batch, None, None]:
        """The run's micro-batches from the present step on."""
        train, accelerator = self.config.train, self.accelerator
        sampler = StreamSampler.over(
            self.dataset,
            seed=self.config.seed,
            batch_size=train.batch_size,
            accumulation=train.accumulation,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            start_step=self.step,
            steps=train.steps,
        )
        yield from loader(
            self.dataset,
            self.conditions,
            sampler,
            shape=self.shape,
            own_shapes=True,
            flip=getattr(self.config.data, "flip", False),
            seed=self.config.seed,
            workers=train.workers,
        )

    def run(self) -> None:
        """Train to the last step. Raises Interrupted after a signal, UserError where the run cannot go on."""
        train = self.config.train
        # An error's traceback would keep the workers, which ignore signals, and Python waits for them when it ends.
        with stop_signal() as self.caught, contextlib.closing(self.batches()) as batches:
            self.catch_up()
            while self.step < train.steps:
                micro = [next(batches).to(self.accelerator.device) for _ in range(train.accumulation)]
                self._note_bad(micro)
                loss, norm, stop = self._optimise(micro)
                self.step += 1
                self.log.advance()
                if self.step % train.log_every == 0 or self.step == train.steps:
                    self._log(loss, norm)
                if self.step % train.save_every == 0 or self.step == train.steps or stop:
                    self.save()
                if stop:
                    raise Interrupted
                if self._due(train.validate_every):
                    self._aside(self._validate)
                if self._due(train.preview_every):
                    self._aside(self._preview)

    def _due(self, every: int) -> bool:
        """Whether what is done every so many steps, and at the last one, is to be done now."""
        return bool(every and (self.step % every == 0 or self.step == self.config.train.steps))

    def catch_up(self) -> None:
        """Validate and draw what was to come after the checkpoint's step, where the run ended before it did."""
        train = self.config.train
        if not self.step:
            return
        if self._due(train.validate_every) and not from_main(self.log.tells(self.step, "validation_loss")):
            self._aside(self._validate)
        if self._due(train.preview_every) and not from_main(self._picture().exists()):
            self._aside(self._preview)

    def _optimise(self, micro: list[Batch]) -> tuple[Tensor, Tensor, bool]:
        """One optimiser step over its micro-batches: the mean loss, the gradient's norm before clipping, whether to stop.

        Of a game's sides it is the largest norm. A gradient that overflows fp16 halves the loss scale, and the same step is
        done again: nothing else has moved.
        """
        train, accelerator = self.config.train, self.accelerator
        factor = learning_rate(self.step, steps=train.steps, warmup=train.warmup, decay=train.decay)
        for group, lr in zip(self.optimizer.param_groups, self.base_lr, strict=True):
            group["lr"] = lr * factor
        rng = Rng(self.config.seed, self.step)
        kept = [b.clone() for b in self.flow.buffers()] if accelerator.scaler is not None else []
        for _ in range(MAX_HALVINGS):
            loss = torch.zeros((), device=accelerator.device)
            times, self.parts = [], []
            for i, batch in enumerate(micro):
                torch.manual_seed(int(rng.bits("dropout", batch.position[:1])))  # of a network that has any
                check = contextlib.nullcontext() if self.checked else verified(self.flow, train.precision)
                with unreduced(self.model) if i < len(micro) - 1 else contextlib.nullcontext():
                    with check, accelerator.autocast():
                        out = self.model(batch, rng)
                    self.checked = True
                    accelerator.backward(out.loss / len(micro))
                loss += out.loss.detach() / len(micro)
                times.append((out.per_sample, out.t))
                self.parts.append(out.parts)
            accelerator.unscale_gradients()
            norms = [nn.utils.clip_grad_norm_(side, train.clip or math.inf) for side in self.flow.sides()]
            norm = torch.stack([whole(each) for each in norms]).amax()
            bad_loss, bad_norm, stop = self._outcome(loss, norm)
            overflow = accelerator.scaler is not None and bad_norm and not bad_loss
            if (bad_loss or bad_norm) and not overflow:
                self._refuse_nan(float(loss), float(norm), micro)
            if self.ema is None or overflow:
                self.optimizer.step()
            else:
                self.ema.step(self.optimizer, self.step + 1)
            self.optimizer.zero_grad()
            if not overflow:
                for per_sample, t in times:
                    if t is not None:
                        self.by_time.add(per_sample, t)
                return loss, norm, stop
            for buffer, old in zip(self.flow.buffers(), kept, strict=True):  # what a forward counts, as a codebook does
                buffer.copy_(old)
        raise UserError(f"step {self.step}: gradients overflow fp16 at every loss scale; train with bf16 or fp32")

    def _outcome(self, loss: Tensor, norm: Tensor) -> list[bool]:
        """On any rank: whether the loss is not finite, whether the gradient is not, whether a signal asks to stop.

        The one message of a step beyond its gradients, and the one wait for the device.
        """
        asked = loss.new_full((), float(bool(self.caught)))
        flags = torch.stack([(~loss.isfinite()).float(), (~norm.isfinite()).float(), asked])
        return (self.accelerator.reduce(flags) > 0).tolist()  # type: ignore[operator]

    def _refuse_nan(self, loss: float, norm: float, micro: list[Batch]) -> NoReturn:
        """Tells of the ranks whose own loss is not finite, and of all where it is the gradient alone."""
        ranks = gather_object([(loss, [name for batch in micro for name in batch.ids])])
        wrong = [rank for rank in ranks if not math.isfinite(rank[0])] or ranks
        loss, names = wrong[0][0], [name for _, ids in wrong for name in ids]
        last = newest_checkpoint(self.run_folder)
        raise UserError(
            f"step {self.step + 1}: loss {loss}, gradient norm {norm}; the weights were left as they were before it. "
            f"Samples: {', '.join(names[:16])}{' ...' if len(names) > 16 else ''}. "
            f"{f'Last good checkpoint: {last}' if last else 'No checkpoint had been written yet'}. To go on, take a lower "
            "train.optimizer.lr or train.clip, or fp32"
        )

    def _note_bad(self, micro: list[Batch]) -> None:
        for batch in micro:
            self._add_bad(dict(batch.bad))
        if len(self.bad) > max(self.config.train.max_bad * len(self.dataset), 1):
            raise UserError(
                f"{len(self.bad)} of {len(self.dataset)} pictures cannot be read, more than train.max_bad="
                f"{self.config.train.max_bad}; the last: {next(reversed(self.bad))}"
            )

    def _share_bad(self) -> None:
        """What any process could not read, to all of them."""
        for theirs in gather_object([self.bad]):
            self._add_bad(theirs)

    def _add_bad(self, bad: dict[str, str]) -> None:
        for name, reason in bad.items():
            if name not in self.bad:
                self.bad[name] = reason
                self.log.say(f"skipped {name}: {reason} ({len(self.bad)} so far)")

    def _log(self, loss: Tensor, norm: Tensor) -> None:
        self._share_bad()
        names = self.parts[0] if len(self.parts[0]) > 1 else {}
        means = {name: torch.stack([each[name] for each in self.parts]).mean() for name in names}
        told: Any = self.accelerator.reduce({"loss": loss, **means}, reduction="mean")
        numbers = {name: float(value) for name, value in told.items()}
        sums = self.by_time.reduced(self.accelerator)
        self.by_time = LossByTime()
        rate = self.log.progress(self.step, numbers["loss"])
        by_time = {
            f"loss_t{i / T_BINS:.3f}": float(total / count) for i, (total, count) in enumerate(sums.T) if count > 0
        }
        lr = self.optimizer.param_groups[0]["lr"]
        values = {**numbers, "grad_norm": float(norm), "lr": lr, **by_time}
        if self.accelerator.scaler is not None:
            values["loss_scale"] = self.accelerator.scaler.get_scale()
        self.log.write(self.step, {**values, "images_per_s": rate, "bad_images": len(self.bad)})

    def save(self) -> None:
        self._share_bad()
        sums, main = self.by_time.reduced(self.accelerator), self.accelerator.is_main_process
        tensors = checkpoint_tensors(self.flow, self.optimizer.optimizer, self.ema, main=main)
        if main:
            scaler = self.accelerator.scaler
            self.hold()
            save_checkpoint(
                self.run_folder,
                self.step,
                config={**to_dict(self.config), "shape": list(self.shape), **self.base},
                tensors=tensors,
                state={
                    "by_time": sums.tolist(),
                    "scaler": scaler and scaler.state_dict(),
                    "bad": self.bad,
                    **self.told,
                },
                keep=self.config.train.keep,
            )
        self.accelerator.wait_for_everyone()

    def _aside(self, work: Any) -> None:
        """Do something that is not training, on the averaged weights: on the main process; on all where each has a part."""
        if self.accelerator.is_main_process or self.sharded:
            begun = time.monotonic()
            with self.ema.swapped() if self.ema is not None else contextlib.nullcontext(), torch.no_grad():
                self.flow.eval()
                with self.accelerator.autocast():
                    work()
                self.flow.train()
                if isinstance(self.flow, FSDPModule):
                    self.flow.reshard()  # it would go on with the average
            self.log.pause(time.monotonic() - begun)
        self.accelerator.wait_for_everyone()

    def _validation_batches(self) -> list[Batch]:
        """Read once, and before the first step: a split that is not there is said at once."""
        train = self.config.train
        dataset = self.config.data.build(train.validation_split)
        conditions = PreparedConditions.prepare(dataset, self.text)
        batches = in_order(dataset, min(len(dataset), train.validation_images), train.batch_size)
        return list(loader(dataset, conditions, batches, shape=self.shape, own_shapes=True))

    def _validate(self) -> None:
        sums: dict[str, float] = {}
        for batch in self.validation:
            for name, value in self.flow.validate(batch.to(self.accelerator.device)).items():
                sums[name] = sums.get(name, 0.0) + float(value) * len(batch.ids)
        values = {name: total / sum(len(batch.ids) for batch in self.validation) for name, total in sums.items()}
        split = self.config.train.validation_split
        self.log.say(f"step {self.step}: validation loss {values['validation_loss']:.4f} ({split})")
        self.log.write(self.step, values)

    def _preview(self) -> None:
        if hasattr(self.flow, "preview"):  # a flow that draws nothing from prompts
            batch = self.validation[0] if self.validation else self._first_batch()
            x, captions, columns = self.flow.preview(batch.to(self.accelerator.device))
            return self._show(caption_grid(x, captions, columns=columns))
        train, sample = self.config.train, self.config.sample
        captions = list(dict.fromkeys(self.dataset.captions)) if self.text.max_tokens else [""]
        prompts = list(train.preview_prompts) or captions[:: max(len(captions) // 16, 1)][:16]
        n = len(prompts)
        if len(self.shape) == 1:  # points are looked at by the thousand
            prompts, n = [prompts[i % n] for i in range(POINTS)], POINTS
        elif n == 1:
            prompts, n = prompts * 16, 16
        try:
            how = {f.name: getattr(sample, f.name) for f in fields(sample)}
            x = self.flow.sample(prompts, seeds=list(range(n)), **how).x
        except UserError as error:  # a picture that cannot be drawn is no reason to lose the run
            self.log.say(f"step {self.step}: no preview: {error}")
            return
        if x.dim() == 2:
            rows = self.dataset.rows[torch.arange(min(POINTS, len(self.dataset)))]
            self._show(point_picture({"data": rows, "samples": x.cpu()}, getattr(self.dataset, "log_prob", None)))
        else:
            self._show(caption_grid(x, prompts))

    def _show(self, picture: Picture) -> None:
        if self.accelerator.is_main_process:
            picture.save_atomic(self._picture())
            self.log.say(f"step {self.step}: {self._picture()}")

    def _picture(self) -> Path:
        """The file of this step's preview."""
        return self.run_folder / "previews" / f"step-{self.step:08d}.png"
