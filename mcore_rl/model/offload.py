"""Tensors that wait in the host's memory and are on the device only while they are used.

What waits: the weights of a frozen model between two times that it scores, and an optimizer's state (with a bf16 model
also its fp32 main weights) between two steps. On a CPU both memories are the same and nothing is gained; the copies are
made all the same, so that a run without a GPU takes the same path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from torch.nn import Module


class HostMemory:
    """Moves the memory of tensors; the tensors stay the same objects.

    Args:
        tensors: gives those to move, anew every time: an optimizer makes its state in its first step.
        device: where they are used.
    """

    def __init__(self, tensors: Callable[[], Iterable[Tensor]], device: torch.device) -> None:
        self._tensors, self._device = tensors, device
        self._hosts: dict[Tensor, Tensor] = {}
        self.park()

    @contextmanager
    def on_device(self, *, change: bool) -> Iterator[None]:
        """Have them there for as long as the block takes, whatever happens in it.

        Args:
            change: whether what is done with them is to be kept; otherwise they are copied one way.
        """
        for tensor, host in self._hosts.items():
            tensor.data = host.to(self._device, non_blocking=True, copy=True)
        try:
            yield
        finally:
            self.park(change=change)

    @property
    def nbytes(self) -> int:
        """Of the host's memory, pinned where there is a GPU."""
        return sum(host.nbytes for host in self._hosts.values())

    @torch.no_grad()
    def park(self, *, change: bool = True) -> None:
        """Take all of them to the host; needed where others have put tensors in their place, as loading does."""
        pinned = self._device.type == "cuda"
        hosts = {}
        for tensor in self._tensors():
            host = self._hosts.get(tensor)
            if host is None or change:
                if host is None:
                    host = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
                host.copy_(tensor, non_blocking=True)
            hosts[tensor] = host
        if pinned:
            torch.cuda.synchronize(self._device)  # a checkpoint reads the host's memory next
        for tensor, host in hosts.items():
            tensor.data = host
        self._hosts = hosts


def in_use(memory: HostMemory | None, *, change: bool = False) -> AbstractContextManager[None]:
    """`on_device` of what may never have left it."""
    return nullcontext() if memory is None else memory.on_device(change=change)


def frozen_weights(chunks: Sequence[Module], device: torch.device) -> HostMemory:
    """Of a model that is only read."""
    return HostMemory(lambda: (p for chunk in chunks for p in chunk.parameters()), device)
