"""The accelerator that is none (pretend.py), taken for a CUDA device, so that tests of a card are tried without one:

pytest -p tests.pretend_cuda -m gpu tests/test_gpu.py
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests import pretend

kept = [pretend.begin()]
CUDA, THERE = torch.device("cuda", 0), torch.device(pretend.NAME, 0)


def there(device: Any) -> Any:
    """The pretended device for one of CUDA's; anything else as it is."""
    named = isinstance(device, torch.device | str) and str(device).partition(":")[0] == "cuda"
    return THERE if named else device


class _Names(TorchFunctionMode):
    """Calls that name cuda are given the pretended device, and its tensors say that they are on cuda."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asked = getattr(func, "__self__", None)
        if asked is Tensor.is_cuda:
            return isinstance(args[0], pretend.Pretend)
        if asked is Tensor.device:
            return CUDA if (device := func(*args)) == THERE else device
        if func is Tensor.cuda:
            return args[0].to(THERE)
        if func is Tensor.pin_memory:
            return args[0]
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        return func(*map(there, args), **{key: there(value) for key, value in (kwargs or {}).items()})


def _kind(device_type: str) -> str:
    return pretend.NAME if device_type == "cuda" else device_type


class _Autocast(torch.autocast):
    def __init__(self, device_type: str, *args: Any, **how: Any) -> None:
        super().__init__(_kind(device_type), *args, **how)


def _named(function: Any) -> Any:
    return lambda *kind, **how: function(*(_kind(each) if isinstance(each, str) else each for each in kind), **how)


def pytest_configure() -> None:
    kept.append(_Names())
    kept[1].__enter__()
    torch.autocast = _Autocast  # type: ignore[misc]
    for name in ("is_autocast_enabled", "get_autocast_dtype", "set_autocast_enabled", "set_autocast_dtype"):
        setattr(torch, name, _named(getattr(torch, name)))
    told = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "_lazy_init": None,
        "set_device": None,
        "get_device_name": "a pretended card",
        "get_device_capability": (9, 0),
        "is_bf16_supported": True,
        "synchronize": None,
        "empty_cache": None,
        "manual_seed": None,
        "manual_seed_all": None,
        "set_sync_debug_mode": None,
    }
    for name, answer in told.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.accelerator.synchronize = lambda *_: None
    torch.accelerator.current_accelerator = lambda *_, **__: torch.device("cuda")
