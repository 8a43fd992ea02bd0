"""Combinations of backend, torch and device that crash or give wrong numbers, each with the public issue that says so.

A row goes when the oldest torch that genflow supports has the mend; tests/test_known_bad.py tells when.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from genflow.attention.dispatch import Call

HALF = frozenset({torch.float16, torch.bfloat16})


@dataclass(frozen=True)
class KnownBad:
    """One row: these backends are not to serve such a call.

    since, fixed: torch versions, from and up to but not including; None: from the first, and until it is known to be
    mended. capability: of the CUDA card, None: any. when: also for the lengths None of a compiled graph.
    """

    backends: frozenset[str]
    device: str
    when: Callable[[Call], bool]
    issue: str
    reason: str
    since: tuple[int, int] | None = None
    fixed: tuple[int, int] | None = None
    capability: tuple[int, int] | None = None

    def hits(self, backend: str, call: Call) -> bool:
        """Whether this call is one of them."""
        return (
            backend in self.backends
            and call.device == self.device
            and (self.since is None or torch_version() >= self.since)
            and (self.fixed is None or torch_version() < self.fixed)
            and (self.capability is None or capability() == self.capability)
            and self.when(call)
        )


KNOWN_BAD = (
    KnownBad(
        frozenset({"sdpa", "sdpa_cudnn"}),
        "cuda",
        lambda call: (
            "backward" in call.needs
            and call.mask != "none"
            and (call.mask != "causal" or call.lq != call.lk)  # there it is a flag
            and (call.lk is None or call.lk % 128 == 64)
            and call.dtype in HALF  # others are not cuDNN's
            and call.head_dim % 8 == 0
        ),
        "pytorch/pytorch#196678",
        "cuDNN's backward gives NaN under a mask where the number of keys is 64 more than a multiple of 128",
        since=(2, 11),
        capability=(9, 0),
    ),
    KnownBad(
        frozenset({"sdpa", "sdpa_efficient"}),
        "cuda",
        lambda call: call.mask != "none" and call.lq is not None and max(call.lq, call.lk or 0) > 65536,
        "pytorch/pytorch#162588",
        "wrong values under a mask beyond 65536 tokens",
    ),
    KnownBad(
        frozenset({"sdpa"}),
        "mps",
        lambda call: call.mask == "causal" and call.dtype in HALF,
        "pytorch/pytorch#195910",
        "the causal mask lets the future through in half precision",
    ),
    KnownBad(
        frozenset({"sdpa"}),
        "mps",
        lambda call: call.dtype in HALF,
        "pytorch/pytorch#174861",
        "reads out of bounds in half precision before torch 2.11",
        fixed=(2, 11),
    ),
)


def known_bad(backend: str, call: Call) -> list[str]:
    """Why this backend is known to go wrong on such a call, each reason with its issue."""
    return [f"{row.reason} ({row.issue})" for row in KNOWN_BAD if row.hits(backend, call)]


@cache
def torch_version() -> tuple[int, int]:
    """Major and minor."""
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


@cache
def capability() -> tuple[int, int]:
    """Of the current CUDA card; (0, 0) without one."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
