"""What Megatron-Core finds in place of `torch.cuda` on a host without CUDA.

Streams and events are always complete, memory counters read zero, the random state is the CPU generator's.
Whatever is not defined here is `torch.cuda`'s own (types, feature tests), so nothing in torch itself changes.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import torch

FloatTensor, HalfTensor, BFloat16Tensor = torch.FloatTensor, torch.HalfTensor, torch.BFloat16Tensor


class Event:
    """An event that has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, stream: Stream | None = None) -> None: ...
    def wait(self, stream: Stream | None = None) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Event) -> float:
        return 0.0


class Stream:
    """A stream without pending work; all streams are the same one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, stream: Stream) -> None: ...
    def wait_event(self, event: Event) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: object) -> None: ...

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return hash(Stream)


ExternalStream = Stream


def current_stream(device: Any = None) -> Stream:
    return Stream()


default_stream = current_stream


def stream(stream: Stream | None) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext()


def device(device: Any) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext()


def current_device() -> torch.device:
    """Megatron only ever passes it on as a `device=` argument."""
    return torch.device("cpu")


def set_device(device: Any) -> None: ...
def synchronize(device: Any = None) -> None: ...
def empty_cache() -> None: ...


def is_available() -> bool:
    return False


def is_current_stream_capturing() -> bool:
    return False


def memory_allocated(device: Any = None) -> int:
    return 0


max_memory_allocated = memory_reserved = max_memory_reserved = memory_allocated


def memory_stats(device: Any = None) -> dict[str, int]:
    return {}


def get_rng_state(device: Any = None) -> torch.Tensor:
    return torch.get_rng_state()


def set_rng_state(new_state: torch.Tensor, device: Any = None) -> None:
    torch.set_rng_state(new_state)


def manual_seed(seed: int) -> None:
    torch.manual_seed(seed)


manual_seed_all = manual_seed
initial_seed = torch.initial_seed


random = SimpleNamespace(get_rng_state=get_rng_state, set_rng_state=set_rng_state, manual_seed=manual_seed)
nvtx = SimpleNamespace(
    range_push=lambda message: 0,
    range_pop=lambda: 0,
    mark=lambda message: None,
    range=lambda message, *args, **kwargs: contextlib.nullcontext(),
)


def __getattr__(name: str) -> Any:
    return getattr(torch.cuda, name)
