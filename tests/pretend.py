"""An accelerator that is none, for tests without a GPU.

Its tensors hold CPU tensors and compute with them, but are of another device: as a GPU's, they refuse to meet those of the
CPU, and what a GPU would make the program wait for is noted. Where functional.NARROW has its name, it has no float64, as
Apple's has none. torch calls such a device PrivateUse1; once begun, it is there for the whole process.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from genflow import functional

NAME = "pretend"
HERE = torch.device("cpu")
aten = torch.ops.aten
MEETS = {aten._to_copy.default, aten.copy_.default}  # what may take tensors of both devices
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}  # by indices of the CPU as well
ANSWERS = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default}
# What autocast takes in short precision, of all that it does.
SHORT = {aten.linear, aten.matmul, aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.conv2d, aten.convolution}
SHORT |= {aten.scaled_dot_product_attention}
waits: Counter[str] = Counter()
"""What made the program wait for the device so far: by the name of the operator."""


class Pretend(Tensor):
    """A tensor of the device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Pretend:
        if held.dtype is torch.float64 and NAME in functional.NARROW:
            raise TypeError(f"{NAME} has no float64")
        like = {"dtype": held.dtype, "layout": held.layout, "device": torch.device(NAME, 0)}
        self = torch.Tensor._make_wrapper_subclass(cls, held.shape, held.stride(), held.storage_offset(), **like)
        self.held = held
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, *args, **(kwargs or {}))


def dispatch(func: Any, *args: Any, **kwargs: Any) -> Any:
    """An operator on what the tensors hold. Raises RuntimeError where tensors of both devices meet."""
    flat, spec = pytree.tree_flatten((args, kwargs))
    ours = [x for x in flat if isinstance(x, Pretend)]
    theirs = [x for x in flat if isinstance(x, Tensor) and not isinstance(x, Pretend) and x.dim()]
    if ours and theirs and func not in MEETS | INDEXING:
        raise RuntimeError(f"{func}: a tensor on the CPU of {tuple(theirs[0].shape)} meets one on {NAME}")
    device = kwargs.get("device")
    there = bool(ours) if device is None else _is_ours(device)
    _note(func, args, kwargs, bool(ours), there)
    held = [HERE if isinstance(x, torch.device) and _is_ours(x) else getattr(x, "held", x) for x in flat]
    args, kwargs = pytree.tree_unflatten(held, spec)
    out = func(*args, **kwargs)
    known = {id(x.held): x for x in ours}  # what an operator in place gives back

    def wrapped(x: Any) -> Any:
        if not (there and isinstance(x, Tensor)):
            return x
        return known[id(x)] if id(x) in known else Pretend(x)

    return pytree.tree_map(wrapped, out)


def _is_ours(device: Any) -> bool:
    return torch.device(device).type == NAME


def _note(func: Any, args: Any, kwargs: Any, ours: bool, there: bool) -> None:
    if ours and func in ANSWERS:
        waits[str(func)] += 1
    if ours and func in INDEXING and any(isinstance(i, Tensor) and i.dtype is torch.bool for i in args[1]):
        waits["a mask as an index"] += 1
    if func is aten._to_copy.default and ours != there and not kwargs.get("non_blocking"):
        waits["a copy from the CPU" if there else "a copy to the CPU"] += 1


class _Everywhere(TorchDispatchMode):
    """Operators without a tensor among their arguments, such as torch.eye, which torch would take apart first."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, *args, **(kwargs or {}))


class _Module:
    """What torch asks of a device beyond tensors."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def begin() -> Any:
    """Make it the process's accelerator. The result is to be kept."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    library, short = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    library.fallback(dispatch, "PrivateUse1")
    library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for packet in SHORT:
        short.impl(packet._qualified_op_name, _in_short(packet.default), "AutocastPrivateUse1")
    mode = _Everywhere()
    mode.__enter__()
    _go_around()
    return library, short, mode


def _in_short(operator: Any) -> Any:
    """As autocast does it."""

    def cast(x: Any) -> Any:
        floats = isinstance(x, Pretend) and x.is_floating_point() and x.dtype is not torch.float64
        return x.to(torch.get_autocast_dtype(NAME)) if floats else x

    def kernel(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = pytree.tree_map(cast, (args, kwargs))
        without = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
        with torch._C._ExcludeDispatchKeyGuard(without):
            return operator(*args, **kwargs)

    return kernel


def _go_around() -> None:
    """What torch does in C++ with real memory in hand, by way of the CPU."""
    make, new = torch.tensor, Tensor.new_tensor
    get, put = Tensor.__getitem__, Tensor.__setitem__
    as_list, as_numpy, save = Tensor.tolist, Tensor.numpy, safetensors.torch.save_file

    def tensor(data: Any, *, device: Any = None, **how: Any) -> Tensor:
        ours = device is not None and _is_ours(device)
        made = make(data, device="cpu" if ours else device, **how)
        return made.to(device) if ours else made

    def new_tensor(x: Tensor, data: Any, **how: Any) -> Tensor:
        return (
            tensor(data, **{"dtype": x.dtype, "device": x.device, **how})
            if isinstance(x, Pretend)
            else new(x, data, **how)
        )

    def index(i: Any) -> Any:
        if isinstance(i, tuple):
            return tuple(map(index, i))
        return make(list(i)).to(NAME, non_blocking=True) if isinstance(i, list | range) else i

    def getitem(x: Tensor, i: Any) -> Tensor:
        return get(x, index(i) if isinstance(x, Pretend) else i)

    def setitem(x: Tensor, i: Any, value: Any) -> None:
        if isinstance(x, Pretend):
            value = value if isinstance(value, Tensor) else make(value, dtype=x.dtype).to(NAME, non_blocking=True)
            i = index(i)
        put(x, i, value)

    def tolist(x: Tensor) -> Any:
        if isinstance(x, Pretend):
            waits["tolist"] += 1
        return as_list(x.detach().held if isinstance(x, Pretend) else x)

    def numpy(x: Tensor, **how: Any) -> Any:
        if isinstance(x, Pretend):
            raise TypeError(f"can't convert {x.device} device type tensor to numpy. Use Tensor.cpu() first")
        return as_numpy(x, **how)

    def save_file(tensors: dict[str, Tensor], *args: Any, **how: Any) -> None:
        save({name: each.cpu() for name, each in tensors.items()}, *args, **how)

    torch.tensor, Tensor.new_tensor = tensor, new_tensor
    Tensor.__getitem__, Tensor.__setitem__ = getitem, setitem
    Tensor.tolist, Tensor.numpy, safetensors.torch.save_file = tolist, numpy, save_file
