"""What a model is worth, in figures that say what they hang on: one evaluation of one flow on one data set."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from genflow.ar.flow import TokenFlow
from genflow.data.pictures import Picture
from genflow.data.prepared import PreparedConditions
from genflow.errors import UserError
from genflow.evaluation.alignment import caption_ranks, fit_caption_probe, recall_at
from genflow.evaluation.distances import distance_figures
from genflow.evaluation.features import FeatureNetwork, as_bytes, as_samples, features_of
from genflow.evaluation.likelihood import held_out_loss, likelihood
from genflow.evaluation.neighbours import copying, own_found, picture_beside_nearest
from genflow.evaluation.plan import DISTANCES, METRICS, SAMPLES, Bar, Evaluation, Figure, Plan, no_bar
from genflow.evaluation.reals import HASHED, MOST, RealSamples, overlap, read_real
from genflow.evaluation.reconstruction import reconstruction
from genflow.flows.base import Flow
from genflow.flows.couplings import Paired
from genflow.flows.normalizing import NormalizingFlow
from genflow.registry import api_export, resolve

QUERIES = 256
# What `reconstruction` tells of all pictures at once.
RECONSTRUCTED = {"validation_psnr", "validation_ssim", "validation_perplexity"}


@api_export("Reals")
@dataclass
class Reals:
    """Real samples of one data set at one shape, and their features by one network, which several evaluations share."""

    datasets: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, RealSamples] = field(default_factory=dict)
    asked: dict[str, tuple[int, int]] = field(default_factory=dict)  # by split: samples and hashes that were read for
    features: dict[str, Tensor] = field(default_factory=dict)


@api_export("evaluate")
def evaluate(
    flow: Flow,
    data: Any,
    plan: Plan,
    *,
    name: str,
    features: FeatureNetwork,
    bar: Bar = no_bar,
    reals: Reals | None = None,
    strict: bool = True,
) -> Evaluation:
    """Measure a flow. data: a data set's config, called `name`. reals: what earlier evaluations on it have read.

    strict: refuse a metric of the plan that the model cannot honestly have, with the reason (UserError); else, as where
    none is asked for by name, it is left out with a remark.
    """
    return _Run(flow, data, plan, name, features, bar, reals or Reals(), strict).evaluation()


class _Run:
    """What several metrics share, made once: real samples, their features, the model's samples."""

    def __init__(
        self,
        flow: Flow,
        data: Any,
        plan: Plan,
        name: str,
        network: FeatureNetwork,
        bar: Bar,
        reals: Reals,
        strict: bool,
    ) -> None:
        self.flow: Any = flow
        self.data, self.plan, self.name, self.network, self.bar = data, plan, name, network, bar
        self.reals, self.strict = reals, strict
        self.pictures = len(flow.shape) == 3
        self.remarks: list[str] = []
        self.left_out: dict[str, str] = {}
        self.counts: dict[str, int] = {}
        self.nfe, self.drawing = 0, 0.0
        self.held_out, self.reference = plan.held_out(flow), plan.split or "train"

    def evaluation(self) -> Evaluation:
        begun = time.monotonic()
        self.metrics = self._chosen()
        measure: dict[str, Callable[[], list[Figure]]] = {
            "likelihood": self._likelihood,
            "loss": self._loss,
            "reconstruction": self._reconstruction,
            **{metric: partial(self._distance, metric) for metric in DISTANCES},
            "alignment": self._alignment,
            "nearest": self._nearest,
        }
        figures: list[Figure] = []
        self.picture: Picture | None = None
        for metric in METRICS:
            if metric in self.metrics:
                figures += measure[metric]()
        if self.hashing:
            self._report_overlap()
        seconds = {"sampling": round(self.drawing, 3), "all": round(time.monotonic() - begun, 1)}
        by_reason: dict[str, list[str]] = {}
        for metric, why in self.left_out.items():
            by_reason.setdefault(why, []).append(metric)
        remarks = [f"{', '.join(metrics)}: left out, {why}" for why, metrics in by_reason.items()] + self.remarks
        return Evaluation(figures, remarks, self.left_out, self.picture, self.metrics, self.counts, self.nfe, seconds)

    # -------------------------------------------------------------------------------------------------- what can be had

    def _chosen(self) -> list[str]:
        if self.plan.split:
            self._dataset(self.plan.split)
        velocity, asked = hasattr(self.flow, "velocity"), self.plan.k > 1 or bool(self.plan.likelihood)
        if self.plan.metrics:
            if asked and self.strict and "likelihood" not in self.plan.metrics:
                option = next(iter(self.plan.likelihood), "k")
                raise UserError(f"{option} is of likelihoods, and none is asked for; add the metric likelihood")
            for metric in self.plan.metrics:
                if why := self._unable(metric):
                    if self.strict:
                        raise UserError(f"{metric}: {why}")
                    self.left_out[metric] = why
            return [metric for metric in dict.fromkeys(self.plan.metrics) if metric not in self.left_out]
        chosen = []
        for metric in METRICS:
            if metric == "likelihood" and velocity and self.pictures and not asked:
                self.left_out[metric] = "an ODE solve for each picture; it must be named"
            elif metric == "loss" and "likelihood" in chosen and self._loss_is_likelihood:
                continue
            elif metric == "reconstruction" and not hasattr(self.flow, "no_samples"):
                continue  # a figure of the autoencoder, and not of a model of its latents
            elif why := self._unable(metric):
                if metric == "likelihood" and asked:
                    raise UserError(f"{metric}: {why}")
                self.left_out[metric] = why
            else:
                chosen.append(metric)
        if not chosen:
            metric = "reconstruction" if "reconstruction" in self.left_out else list(self.left_out)[-1]
            why = self.left_out[metric]
            raise UserError(f"there is nothing to measure this model with; {metric}: left out, {why}")
        return chosen

    @property
    def _loss_is_likelihood(self) -> bool:
        """Whether they are one figure, if on two scales."""
        if isinstance(self.flow, TokenFlow):
            return not self.flow.network.mtp
        return isinstance(self.flow, NormalizingFlow)

    def _unable(self, metric: str) -> str | None:
        """Why this model, on this data, cannot honestly have a metric."""
        if metric == "reconstruction" and not hasattr(self.flow, "reconstruct"):
            return f"a {type(self.flow).__name__} has no autoencoder"
        if metric in (*DISTANCES, "alignment", "nearest") and hasattr(self.flow, "no_samples"):
            return self.flow.no_samples
        if metric == "loss" and isinstance(getattr(self.flow.config, "coupling", None), Paired):
            return "the model was trained on samples with their own noise, which held-out ones have not"
        try:
            if metric in ("likelihood", "loss", "reconstruction", "alignment"):
                self._dataset(self.held_out)
            if metric == "likelihood":
                self.flow.likelihood_note(self.plan.k, **self.plan.likelihood)
            if metric == "reconstruction" and min(self.plan.n or SAMPLES, len(self._dataset(self.held_out))) < 2:
                return f"one picture of the {self.held_out} split is too few; 2 are the least"
            if metric == "nearest" and min(self.n, known := len(self._dataset("train"))) < 2:
                return f"{self.n} samples and {known} training ones are too few; 2 of each are the least"
            if (least := DISTANCES.get(metric, 0)) > (count := min(self.n, len(self._dataset(self.reference)) // 2)):
                return f"{count} samples, and as many real ones twice, are too few; {least} are the least"
        except UserError as error:
            return str(error).removeprefix(f"{metric}: ")
        if metric == "alignment":
            if not self.pictures:
                return "vectors show no caption"
            if not self.flow.text.max_tokens:
                return "the model hears no condition, so that its pictures answer no caption"
            if not self.network.channels:
                return "pixels know no words; give --features, such as a graph of convolutions"
            if len(set(self._dataset(self.held_out).captions)) < 2:
                return f"all captions of the {self.held_out} split are alike"
        return None

    def _dataset(self, split: str) -> Any:
        if split not in self.reals.datasets:
            self.reals.datasets[split] = self.data.build(split)
        return self.reals.datasets[split]

    # ---------------------------------------------------------------------------------------------- what they are made of

    @cached_property
    def n(self) -> int:
        there = len(self._dataset(self.reference))
        return min(SAMPLES, max(there // 2, 2)) if self.plan.n is None else self.plan.n

    @property
    def hashing(self) -> bool:
        """Whether anything is asked of held-out samples, which should then be no training samples."""
        return bool({"likelihood", "loss", "reconstruction", "alignment", "nearest"} & set(self.metrics))

    @property
    def searched(self) -> bool:
        """Whether all of the training samples are wanted, or as many as can be kept."""
        return bool({"alignment", "nearest"} & set(self.metrics))

    def _real(self, split: str) -> RealSamples:
        dataset = self._dataset(split)
        most = max(2 * self.n, QUERIES, MOST if split == "train" and self.searched else 0)
        hashed = HASHED if self.hashing and split in ("train", self.held_out) else 0
        before = self.reals.asked.get(split, (0, 0))
        if before[0] < most or before[1] < hashed:
            asked = most, hashed = max(most, before[0]), max(hashed, before[1])
            with self.bar(f"real samples, {split}", min(max(asked), len(dataset))) as progress:
                found = read_real(dataset, self.flow.shape, most=most, hashed=hashed, progress=progress)
            self.reals.samples[split], self.reals.asked[split] = found, asked
        samples = self.reals.samples[split]
        if samples.bad:
            said = f"{samples.bad} picture{'s' * (samples.bad > 1)} of the {split} split cannot be read: passed over"
            self.remarks += [said] * (said not in self.remarks)
        return samples

    def _features(self, split: str, count: int) -> Tensor:
        """Of the first `count` real samples of a split."""
        asked = count
        if split == "train" and self.searched:  # which will be asked for all of them
            count = max(count, MOST)
        known = self.reals.features
        if len(known.get(split, ())) < min(count, len(self._real(split))):
            x = self._real(split).x[:count]
            with self.bar(f"features, {split}", len(x)) as progress:
                known[split] = features_of(self.network, x, device=self.flow.device, keep=True, progress=progress)
        return known[split][:asked]

    def _draw(self, prompts: Sequence[str], seed: int, what: str) -> tuple[Tensor, Tensor]:
        """Samples, pictures as the bytes that a file would hold, and their features."""
        begun, made, short = time.monotonic(), [], self.plan.dtype == "bf16"
        if not self.flow.text.max_tokens:
            prompts = [""] * len(prompts)
        parts = torch.arange(len(prompts)).split(self.plan.batch)
        heard: Iterator[Any]
        if self.plan.sampling.get("draft"):  # which may have a text encoder of its own
            heard = ([prompts[i] for i in part] for part in parts)
        else:
            conditions = PreparedConditions.prepare(SimpleNamespace(captions=list(prompts)), self.flow.text)
            heard = (conditions[part] for part in parts)
        with self.bar(f"sampling, {what}", len(prompts)) as progress:
            for part, condition in zip(parts, heard, strict=True):
                seeds = (seed + part).tolist()
                with torch.autocast(self.flow.device.type, torch.bfloat16, enabled=short):
                    solution = self.flow.sample(condition, seeds=seeds, **self.plan.sampling)
                self.nfe = max(self.nfe, solution.nfe)
                x = solution.x.float().cpu()
                made.append(as_bytes(x) if self.pictures else x)
                progress(len(part))
        self.drawing += time.monotonic() - begun
        x = torch.cat(made)
        with self.bar("features, samples", len(x)) as progress:
            return x, features_of(self.network, x, device=self.flow.device, progress=progress)

    @cached_property
    def _samples(self) -> tuple[Tensor, Tensor]:
        """n samples of the captions of the reference's first real samples."""
        captions = self._real(self.reference).captions[: self.n]
        self.counts["samples"] = self.n
        return self._draw([captions[i % len(captions)] for i in range(self.n)], self.plan.seed, self.reference)

    # ------------------------------------------------------------------------------------------------------- likelihoods

    def _likelihood(self) -> list[Figure]:
        total = len(self._dataset(self.held_out)) if self.plan.n is None else self.plan.n
        what: dict[str, Any] = {"name": self.name, "split": self.held_out, "n": self.plan.n, "k": self.plan.k}
        with self.bar("likelihood", total) as progress:
            found = likelihood(
                self.flow, self.data, **what, batch=self.plan.batch, progress=progress, **self.plan.likelihood
            )
        self.counts["likelihood"] = found.n
        on = f"{self.name} {found.split}, {found.n} sample{'s' * (found.n > 1)}; {found.how}"
        return [Figure(found.unit, found.mean, on, error=None if found.n < 2 else found.error)]

    def _loss(self) -> list[Figure]:
        dataset = self._dataset(self.held_out)
        n = min(self.plan.n or SAMPLES, len(dataset))
        with self.bar("loss", n) as progress:
            told = held_out_loss(self.flow, dataset, n, batch=self.plan.batch, progress=progress)
        self.counts["loss"] = n
        on = f"{self.name} {self.held_out}, {n} sample{'s' * (n > 1)}"
        names = {key: key.replace("validation_loss", "loss").replace("validation_t", "loss at t = ") for key in told}
        return [
            Figure(names[key], value, on if key == "validation_loss" else "")
            for key, value in told.items()
            if key not in RECONSTRUCTED
        ]

    def _reconstruction(self) -> list[Figure]:
        x = self._real(self.held_out).x[: self.plan.n or SAMPLES]
        with self.bar("reconstruction", len(x)) as progress:
            found = reconstruction(self.flow, x, self.network, batch=self.plan.batch, progress=progress)
        self.counts["reconstruction"] = len(x)
        return found.figures(f"{len(x)} of {self.name} {self.held_out} and their reconstructions")

    # --------------------------------------------------------------------------------------------------------- distances

    def _distance(self, metric: str) -> list[Figure]:
        features = self._features(self.reference, 2 * self.n)
        samples = self._samples[1]
        real, half = features[: self.n], len(features) // 2
        found = distance_figures(metric, real, samples)
        base = distance_figures(metric, features[:half], features[half : 2 * half])
        on = f"{len(samples)} samples, {len(real)} of {self.name} {self.reference}"
        if half < self.n:  # the split is too small for twice as many
            on += f"; real to real of {half} each"
        if metric == "fd" and min(len(samples), len(real)) <= samples.shape[1]:
            what = f"fd: {min(len(samples), len(real))} samples do not span {samples.shape[1]} features: "
            self.remarks.append(f"{what}biased upwards; read it beside real to real only, or take kid")
        self.counts["real"] = len(real)
        return [Figure(key, value, on, error, base.get(key, (None,))[0]) for key, (value, error) in found.items()]

    # --------------------------------------------------------------------------------------------------------- alignment

    def _alignment(self) -> list[Figure]:
        judge = resolve("text", "minilm")().build()
        train, held = self._real("train"), self._real(self.held_out)
        count = min(QUERIES, len(held))
        probe = fit_caption_probe(self._features("train", MOST), judge.encode(train.captions[:MOST]).pooled)
        captions = held.captions[:count]
        gallery = list(dict.fromkeys(captions))
        vectors = judge.encode(gallery).pooled.double() - probe.centre
        own = torch.tensor([gallery.index(caption) for caption in captions])
        _, drawn = self._draw(captions, self.plan.seed + self.n, "captions")
        self.counts["alignment"] = count
        ranks, real = (caption_ranks(probe(x), vectors, own) for x in (drawn, self._features(self.held_out, count)))
        which = f"{count} pictures, {len(gallery)} captions of {self.name} {self.held_out}"
        on = f"{which}; ridge from features to all-MiniLM-L6-v2"
        return [
            Figure(f"R@{k}", recall_at(*ranks, k), on if k == 1 else "", real=recall_at(*real, k))
            for k in (1, 10)
            if k < len(gallery)
        ]

    # ----------------------------------------------------------------------------------------------------------- nearest

    def _nearest(self) -> list[Figure]:
        train, (x, features) = self._real("train"), self._samples
        known = self._features("train", MOST)
        searched = f"the {len(known)} of {self.name} train" + (
            f"'s {train.total} that were searched" if len(known) < train.total else ""
        )
        figures = []
        try:
            held = self._features(self.held_out, self.n) if self.held_out != "train" else known[:0]
            why = f"one sample of the {self.held_out} split is too few" if len(held) == 1 else ""
        except UserError as error:
            held, why = known[:0], str(error)
        if why:
            self.remarks.append(f"copying: left out, {why}")
        if len(held) > 1:
            on = f"nearer to {searched} than {len(held)} of {self.held_out} are; 0.5 as new, 1 copies"
            figures.append(Figure("copying", copying(features, held, known), on, real=0.5))
        captions = train.captions[: min(self.n, len(known))]
        if self.reference == "train" and self.flow.text.max_tokens and 2 * len(set(captions)) > len(captions) > 1:
            rows = len(captions)
            on = f"nearest of {min(QUERIES, rows)} training samples is that of its prompt, {len(x[:rows])} samples"
            figures.append(Figure(f"own found, {self.network.name}", own_found(features[:rows], known[:rows]), on))
            if self.network.channels:
                mine, theirs = (as_samples(each).flatten(1) for each in (x[:rows], train.x[:rows]))
                figures.append(Figure("own found, pixels", own_found(mine, theirs), ""))
        if self.pictures:
            pixels, real = not self.network.channels, train.x[: len(known)]
            self.picture = picture_beside_nearest(x, features, real, known, pixels=pixels)
        return figures

    def _report_overlap(self) -> None:
        if self.held_out == "train":
            self.remarks.append("the training split is no held-out one: what is asked of it flatters the model")
            return
        try:
            training, held = self._real("train"), self._real(self.held_out)
        except UserError:  # no such split: said already
            return
        if same := overlap(held, training):
            what = (
                f"{len(same)} of {len(held.hashes)} samples of the {self.held_out} split are in the training split too"
            )
            self.remarks.append(f"overlap: {what}, such as {same[0]}; figures of that split flatter the model")
        self.counts["overlap"] = len(same)
