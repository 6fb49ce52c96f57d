"""Which kernels and vendor products a call launches on a GPU that is not there.

Tensors have shapes, dtypes and a CUDA device, but no memory: the ops' own host code runs as it would, Triton's launches are
recorded instead of made, and so is every torch operation on such a tensor. What the host asks of a tensor's contents is answered as
if it held zeros, and counted, because on a GPU it would wait for the device.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from compile_kernels import Launch, Specialisation, recorded, specialise
from qdiff_kernels.gpu import configs, weights
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from triton.runtime.errors import OutOfResources

from .devices import Device

FAKE = FakeTensorMode(allow_non_fake_inputs=True)
PRODUCTS = {"mm", "addmm", "_scaled_mm", "_int_mm", "convolution", "bmm"}
FREE = {"empty", "empty_strided", "empty_like", "detach", "lift_fresh"}


class Kernel(NamedTuple):
    """A launch of ours.

    Attributes:
        bytes: of all tensors among its arguments, each counted once.
        sizes: its integer arguments and compile-time arguments by name, tuples' fields by ``argument.field``.
    """

    name: str
    specialisation: Specialisation
    grid: tuple[int, ...]
    bytes: int
    sizes: dict[str, Any]


class Vendor(NamedTuple):
    """A torch operation on the device: a product of ``[tokens, columns]`` and ``[columns, rows]``, or one that moves bytes."""

    name: str
    bytes: int
    product: tuple[int, int, int] | None  # tokens, rows, columns
    dtype: torch.dtype | None  # of the factors


Step = Kernel | Vendor


class _Recorder(TorchDispatchMode):
    """Runs operations on fake tensors and writes down those that launch something; leaves all other tensors to torch."""

    def __init__(self, steps: list[Step], device: Device) -> None:
        super().__init__()
        self.steps, self.device = steps, device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        device = kwargs.get("device")
        elsewhere = device is not None and torch.device(device).type == "cuda"
        if not elsewhere and not any(isinstance(leaf, FakeTensor) for leaf in leaves):
            return func(*args, **kwargs)
        if func is torch.ops.aten._scaled_mm.default and args[2].numel() > 1 and not self.device.row_scales:
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED: a scale per row on this device")
        args, kwargs = tree_map_only(Tensor, _without_contents, (args, kwargs))
        with FAKE:
            result = func(*args, **kwargs)
        self._see(func, [leaf for leaf in leaves if isinstance(leaf, Tensor)], result)
        return result

    def _see(self, func: Any, inputs: list[Tensor], result: Any) -> None:
        name = func._schema.name.split("::")[-1]
        aliases = any(out.alias_info is not None and not out.alias_info.is_write for out in func._schema.returns)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if name in FREE or aliases or not outputs or func.namespace == "prim":
            return
        size = sum(t.numel() * t.element_size() for t in (*inputs, *outputs))
        if name not in PRODUCTS:
            self.steps.append(Vendor(name, size, None, None))
            return
        y = outputs[0]
        factor = inputs[-1] if name == "addmm" else inputs[1]
        rows = y.shape[1]
        columns = factor.numel() // rows
        self.steps.append(Vendor(name, size, (y.numel() // rows, rows, columns), factor.dtype))


def _without_contents(tensor: Tensor) -> Tensor:
    """A tensor of the host on its way to the device; a fake one would take the contents along, to a device that is not there."""
    return tensor if isinstance(tensor, FakeTensor) else FAKE.from_tensor(tensor)


def _part(tensor: Tensor, index: Any) -> Tensor:
    """``tensor[index]`` for an index of integers, slices and ``None``."""
    index, dim = index if isinstance(index, tuple) else (index,), 0
    for item in index:
        if item is None:
            tensor = torch.ops.aten.unsqueeze(tensor, dim)
        elif isinstance(item, slice):
            tensor = torch.ops.aten.slice(tensor, dim, item.start, item.stop, item.step or 1)
        elif isinstance(item, int):
            tensor, dim = torch.ops.aten.select(tensor, dim, item), dim - 1
        else:
            raise LookupError(f"roofline/record.py does not follow the index {index!r}")
        dim += 1
    return tensor


def _copy(target: Tensor, value: Any) -> Tensor:
    """``target.copy_(value)``, past autograd, which would make the target's device current."""
    if not isinstance(value, Tensor):
        return torch.ops.aten.fill_(target, value)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.aten.copy_(target, value)


class _Event:
    """A CUDA event of work that has been done."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Takes what torch's takes."""

    def record(self, *_: Any) -> None:
        """Nothing runs."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        """Nothing to wait for."""


READS: dict[Any, Callable[[Tensor], Any]] = {
    Tensor.__float__: lambda _: 0.0,
    Tensor.__int__: lambda _: 0,
    Tensor.__index__: lambda _: 0,
    Tensor.__bool__: lambda _: False,
    Tensor.item: lambda tensor: 0.0 if tensor.is_floating_point() else 0,
    torch.equal: lambda *_: True,
}


class _Reader(TorchFunctionMode):
    """Answers what the host asks of the contents of fake tensors."""

    waits = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: value for name, value in (kwargs or {}).items() if name != "pin_memory"}  # which takes a driver
        if func is Tensor.pin_memory:
            return args[0]
        if not (args and isinstance(args[0], FakeTensor)):
            return func(*args, **kwargs)
        if func in READS:
            self.waits += 1
            return READS[func](*args)
        if func is Tensor.data_ptr:
            return id(args[0]) << 4
        name = getattr(func, "__name__", "")  # those below look for a driver
        if name == "__getitem__":
            return _part(args[0], args[1])
        if name == "__setitem__":
            return _copy(_part(args[0], args[1]), args[2])
        if name == "copy_":
            return _copy(args[0], args[1])
        return func(*args, **kwargs)


@contextmanager
def device_present(device: Device) -> Iterator[None]:
    """torch answers as with this GPU; what the kernels' host code remembers of devices is forgotten before and after."""

    class Properties:
        name, multi_processor_count = device.name, device.multiprocessors
        major, minor = device.capability
        shared_memory_per_block_optin = device.shared

    properties = Properties()
    with ExitStack() as stack:
        for owner, name, value in (
            (torch.cuda, "get_device_capability", lambda *_: device.capability),
            (torch.cuda, "get_device_properties", lambda *_: properties),
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "_lazy_init", lambda: None),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "Event", _Event),
            (torch.cuda, "is_current_stream_capturing", lambda: False),
            (torch.accelerator, "current_accelerator", lambda *_, **__: torch.device("cuda")),
            (torch, "get_device_module", lambda *_: torch.cuda),
            (weights, "no_nan", lambda _: True),  # no quantizer writes one; it is looked for once in a weight's life
        ):
            stack.enter_context(patch.object(owner, name, value))
        _forget()
        try:
            yield
        finally:
            _forget()


def _forget() -> None:
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "qdiff_kernels":
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear"):
                    value.cache_clear()
    configs._fitting.clear()


class Recording(NamedTuple):
    """What one call does to the device, in order."""

    steps: list[Step]
    waits: int  # times the host would have waited for the device


def record(
    device: Device,
    prepare: Callable[[Callable[..., Tensor]], Callable[[], Any]],
    too_large: Callable[[Specialisation], str | None] = lambda _: None,
) -> Recording:
    """Record a call, not the first, after which caches hold what they can.

    Args:
        prepare: gets a function that makes tensors on the device, ``(shape, dtype) -> Tensor``, and returns what to call.
        too_large: says of a kernel why the device refuses to launch it, as Triton then says to the launcher.
    """
    steps: list[Step] = []

    def see(launch: Launch) -> None:
        wanted = specialise(launch)
        if reason := too_large(wanted):
            raise OutOfResources(0, 0, reason)
        steps.append(_kernel(launch, wanted))

    recorder = _Recorder(steps, device)

    def make(shape: Collection[int], dtype: torch.dtype) -> Tensor:
        with FAKE:
            return torch.empty(tuple(shape), dtype=dtype, device="cuda:0")

    reader = _Reader()
    with device_present(device), torch.no_grad(), recorded(see), recorder, reader:
        call = prepare(make)
        call()
        steps.clear()
        reader.waits = 0
        call()
    return Recording(steps, reader.waits)


def _kernel(launch: Launch, wanted: Specialisation) -> Kernel:
    tensors: dict[int, int] = {}
    sizes: dict[str, Any] = {}

    def visit(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            tensors[id(value)] = value.numel() * value.element_size()
        elif isinstance(value, tuple):
            names = getattr(value, "_fields", range(len(value)))
            for field, item in zip(names, value, strict=True):
                visit(f"{name}.{field}", item)
        elif isinstance(value, int) and not isinstance(value, bool):
            sizes[name] = value

    for name, value in launch.arguments.items():
        visit(name, value)
    sizes |= {name: value for name, value in launch.options.items() if isinstance(value, int)}
    return Kernel(wanted.name.strip("_").removesuffix("_kernel"), wanted, launch.grid, sum(tensors.values()), sizes)
