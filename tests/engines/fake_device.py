"""A device that runs behind its host, without a device: what would make the host wait for it is noticed.

Within a FakeDevice, tensors on "meta" have values. Operations on them are queued, in order, as on a GPU (and, since
nobody can tell, computed at once). Copies from pinned memory are queued too. What a GPU can only answer by stopping the
host raises HostWaits: copies from ordinary memory, items, masks as indices, counting. One way of waiting is legal, that
of copying a tensor to the host: it is counted, and raises ReadTooEarly while the device is `busy`. Until then what was
sent may still be on its way: it must be found unchanged.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("meta")
_CPU = torch.device("cpu")
_ATEN = torch.ops.aten
_COUNTING = ("nonzero", "masked_select", "unique", "_unique2", "unique_dim", "repeat_interleave", "bincount", "equal")
_ITEMS = ("_local_scalar_dense", "item", "is_nonzero")


class HostWaits(AssertionError):
    """The host would stop until the device has done everything it was given."""


class ReadTooEarly(AssertionError):
    """The host reads what the device has not computed yet."""


class _Held(Tensor):
    """A tensor on DEVICE; `values` are on the CPU."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> _Held:
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset(), "dtype": values.dtype}
        with torch.inference_mode(False):  # so that those made within it and those made outside may meet
            held: _Held = Tensor._make_wrapper_subclass(cls, values.shape, **layout, device=DEVICE)
        held.values = values
        return held

    def __repr__(self) -> str:  # type: ignore[override]
        return f"_Held({self.values!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of the FakeDevice")


class FakeDevice(TorchDispatchMode):
    """See above. `num_reads` counts copies to the host, `num_sent` copies to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.num_reads = 0
        self.num_sent = 0
        self.busy = False
        self._on_the_way: list[tuple[Tensor, Tensor]] = []  # the memory it is sent from, and what that held
        self._pinned: dict[int, Tensor] = {}  # by address; kept, so that their memory is nobody else's

    def values(self, tensor: Tensor) -> Tensor:
        """What a tensor holds, for whoever plays the device's part."""
        return tensor.values if isinstance(tensor, _Held) else tensor

    def hold(self, values: Tensor) -> Tensor:
        """A result, left on the device."""
        return _Held(values)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                return func.decompose(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name == "is_pinned":
            return self._is_pinned(args[0])
        if name == "_pin_memory":
            return self._pin(args[0].clone())
        if kwargs.get("pin_memory"):
            return self._pin(func(*args, **kwargs | {"pin_memory": False}))
        tensors = _tensors((*args, *kwargs.values()))
        if not any(isinstance(tensor, _Held) for tensor in tensors) and kwargs.get("device") != DEVICE:
            return func(*args, **kwargs)
        if name == "_to_copy" and "device" in kwargs:
            return self._move(func, args[0], kwargs)
        _check(name, args, tensors)
        return _run(func, args, kwargs)

    def _move(self, func: Any, tensor: Tensor, kwargs: dict[str, Any]) -> Tensor:
        target = kwargs["device"]
        if isinstance(tensor, _Held) and target != DEVICE:
            self.num_reads += 1
            if self.busy:
                raise ReadTooEarly("the device has not come so far")
            assert all(torch.equal(memory, held) for memory, held in self._on_the_way), "changed on its way"
            self._on_the_way.clear()
            values: Tensor = func(tensor.values, **kwargs | {"device": _CPU})
            return values
        if not isinstance(tensor, _Held):
            self.num_sent += 1
            if not (kwargs.get("non_blocking") and self._is_pinned(tensor)):
                raise HostWaits("a copy from memory that is not pinned")
            self._on_the_way.append((tensor, tensor.clone()))
        moved: Tensor = _run(func, (tensor,), kwargs)
        return moved

    def _pin(self, tensor: Tensor) -> Tensor:
        self._pinned[tensor.data_ptr()] = tensor
        return tensor

    def _is_pinned(self, tensor: Tensor) -> bool:
        return tensor.data_ptr() in self._pinned


def _check(name: str, args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    if name in _ITEMS or name in _COUNTING:
        raise HostWaits(f"{name} of a tensor on the device")
    if name in ("index", "index_put", "index_put_") and any(
        index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
    ):
        raise HostWaits("a mask as index: the host has to know how many it picks")
    if name == "copy_" and not all(isinstance(tensor, _Held) for tensor in args[:2]):
        raise HostWaits("copy_ between host and device")
    for tensor in tensors:
        if not isinstance(tensor, _Held) and tensor.device == DEVICE:
            raise HostWaits("a tensor of the host's numbers, made on the device")
        if not isinstance(tensor, _Held) and tensor.ndim:  # a number travels with the kernel, a tensor does not
            raise HostWaits(f"{name} with a tensor of the host")


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    return _hold(func(*map(_to_cpu, args), **{name: _to_cpu(value) for name, value in kwargs.items()}))


def _to_cpu(argument: Any) -> Any:
    if isinstance(argument, list | tuple):
        return [_to_cpu(item) for item in argument]
    if isinstance(argument, torch.device):
        return _CPU
    return argument.values if isinstance(argument, _Held) else argument


def _hold(result: Any) -> Any:
    if isinstance(result, list | tuple):
        return type(result)(_hold(item) for item in result)
    return _Held(result) if isinstance(result, Tensor) else result


def _tensors(arguments: Any) -> list[Tensor]:
    """The tensors among an operation's arguments, at most one list deep."""
    items = chain.from_iterable(each if isinstance(each, list | tuple) else (each,) for each in arguments)
    return [item for item in items if isinstance(item, Tensor)]
