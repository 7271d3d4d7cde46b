"""A GPU that is simulated: tensors of the CPU with a tag, to see where a program would wait for the device.

Without a CUDA driver, torch's FakeTensorMode has no backward pass, and it stops at the first wait.
"""

from __future__ import annotations

import traceback
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rkd_cli

CUDA = torch.device("cuda", 0)
_SOURCE = Path(rkd_cli.__file__).parent
_WAITS = {  # operators whose CUDA kernels return a size or a number to the CPU
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "masked_select",
    "multinomial",
    "nonzero",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
}
_CHECKED_ON_CPU = {"one_hot"}  # functions that look at their numbers on the CPU only
_READS = {"__array__", "numpy", "tolist"}  # methods that read a tensor without an operator


class SimulatedGpu:
    """While it is entered, ``.to(CUDA)`` tags a tensor. ``waits`` are {operator: its lines of rkd_cli}.

    What is computed of tagged tensors is tagged. Mixing them with CPU tensors raises an AssertionError.
    """

    def __init__(self) -> None:
        self.waits: dict[str, list[str]] = defaultdict(list)
        self.launches = 0  # operators that are no views
        self.is_silent = False
        self._tagged: dict[int, torch.UntypedStorage] = {}  # kept, so that no other storage takes the address
        self._host: dict[int, torch.UntypedStorage] = {}
        self._modes = ExitStack()

    def __enter__(self) -> Self:
        self._modes.enter_context(_Operators(self))
        self._modes.enter_context(_Functions(self))
        return self

    def __exit__(self, *error: object) -> None:
        self._modes.close()

    def has(self, tensor: Tensor) -> bool:
        """Whether it is on the GPU."""
        return tensor.untyped_storage()._cdata in self._tagged

    def is_host(self, tensor: Tensor) -> bool:
        """Whether Python made it on the CPU: what an operator makes for itself is on the right device."""
        return tensor.untyped_storage()._cdata in self._host

    def put(self, tensor: Tensor, there: bool) -> Tensor:
        """Tag a tensor, or take the tag away."""
        storage = tensor.untyped_storage()
        where, other = (self._tagged, self._host) if there else (self._host, self._tagged)
        other.pop(storage._cdata, None)
        where[storage._cdata] = storage
        return tensor

    def wait(self, what: str) -> None:
        """Record a wait and the line that causes it."""
        if self.is_silent:
            return
        inside = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(_SOURCE)]
        last = f"{Path(inside[-1].filename).relative_to(_SOURCE)}:{inside[-1].lineno}" if inside else "?"
        self.waits[what].append(last)


class _Functions(TorchFunctionMode):
    """What of the simulation Python sees: devices, copies between them, and reads."""

    def __init__(self, gpu: SimulatedGpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        gpu, kwargs, name = self._gpu, dict(kwargs or {}), getattr(func, "__name__", "")
        here = isinstance(args[0], Tensor) and gpu.has(args[0]) if args else False
        if name == "__get__" and here:
            known = {Tensor.device: CUDA, Tensor.is_cuda: True, Tensor.is_cpu: False}
            for attribute, value in known.items():
                if func == attribute.__get__:  # type: ignore[attr-defined]
                    return value
        if name in ("to", "cpu", "cuda"):
            return self._copied(name, here, *args, **kwargs)
        if name == "pin_memory":
            return args[0]
        if here and name in _READS:
            gpu.wait(name)
        there = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda"
        if there:
            kwargs["device"] = "cpu"
            if name in ("tensor", "as_tensor"):
                gpu.wait(name)
        gpu.is_silent = name in _CHECKED_ON_CPU
        found = func(*args, **kwargs)
        gpu.is_silent = False
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and not gpu.has(tensor):
                gpu.put(tensor, there)
        return found

    def _copied(self, name: str, here: bool, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        gpu, there = self._gpu, here
        if name == "to" and args and isinstance(args[0], Tensor):
            there, dtype, non_blocking, layout = (
                gpu.has(args[0]),
                args[0].dtype,
                kwargs.get("non_blocking", False),
                None,
            )
        elif name == "to":
            copy = kwargs.pop("copy", False)
            device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
            there = here if device is None else device.type == "cuda"
            kwargs = {"copy": copy}
        else:
            there, dtype, non_blocking, layout = name == "cuda", tensor.dtype, False, None
        if there != here and not (non_blocking and there):
            gpu.wait("copy to the GPU" if there else "copy from the GPU")
        copy = bool(kwargs.get("copy")) or there != here
        found = tensor.to(dtype=dtype or tensor.dtype, copy=copy, memory_format=layout or torch.preserve_format)
        return gpu.put(found, there)


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What the operators see, of the backward pass too."""

    def __init__(self, gpu: SimulatedGpu) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        gpu, kwargs, name = self._gpu, kwargs or {}, func.overloadpacket.__name__
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = any(map(gpu.has, given))
        if there:
            self._check(func, name, given, args, kwargs)
            gpu.launches += not func.is_view
        found = func(*args, **kwargs)
        if there:
            for tensor in tree_leaves(found):
                if isinstance(tensor, Tensor):
                    gpu.put(tensor, True)
        return found

    def _check(self, func: Any, name: str, given: list[Tensor], args: Any, kwargs: Any) -> None:
        gpu = self._gpu
        if name in _WAITS:
            gpu.wait(name)
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                gpu.wait("index by a mask")
            if not all(map(gpu.has, indices)):
                gpu.wait("index from the CPU")
            given = [tensor for tensor in given if not any(tensor is index for index in indices)]
        if name in ("copy_", "_to_copy"):
            if not all(map(gpu.has, given)) and not (gpu.has(args[0]) and kwargs.get("non_blocking")):
                gpu.wait("copy")
            return
        on_cpu = [tensor for tensor in given if tensor.ndim and not gpu.has(tensor) and gpu.is_host(tensor)]
        assert not on_cpu, f"{func}: tensors of the CPU beside those of the GPU"
