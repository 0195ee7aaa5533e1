"""Keeps an engine and the trainer out of each other's process state: environment, random generators, process groups."""

from __future__ import annotations

import os
import random
import signal
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy
import torch

CHILD_FLAG = "MCORE_RL_ENGINE_OF"  # process id of the trainer that the engine is to end with
TORCHRUN_VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
    *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"),
    *("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_ERROR_FILE"),
)


def prepare_environment(backend: str = "") -> None:
    """Variables that vLLM reads at import, where the user has not set them. Call before importing vllm."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    warnings.filterwarnings("ignore", "`torch.distributed.reduce_op` is deprecated", FutureWarning)  # vLLM's imports
    if backend == "ipc":
        os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # IPC handles travel pickled
    if not torch.cuda.is_available():
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # cores are shared with the trainer


@contextmanager
def start_environment(child: bool, timeout_s: float, threads: int) -> Iterator[None]:
    """Variables that only a starting engine may see, and no trace of those that vLLM sets for its own children.

    A child must not see torchrun's: it would take itself for a trainer rank.
    """
    # 0 leaves the choice of thread or process to the caller's argument, and keeps the child from a child of its own.
    variables = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_ENGINE_READY_TIMEOUT_S": str(int(timeout_s)),
        "PYTHONWARNINGS": os.environ.get("PYTHONWARNINGS", "ignore::FutureWarning"),
    }
    if child:
        variables["OMP_NUM_THREADS"] = str(threads)
        # threads that spin while they wait take the cores from the ranks: a third of the tokens a second on a busy host
        variables["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "passive")
    touched = (*TORCHRUN_VARIABLES, *variables, CHILD_FLAG, "TORCHDYNAMO_DISABLE", "LD_PRELOAD", "NUMEXPR_MAX_THREADS")
    before = {name: os.environ.get(name) for name in touched}
    os.environ.update(variables)
    if child:
        os.environ[CHILD_FLAG] = str(os.getpid())
        if not torch.cuda.is_available():  # on CPU vLLM runs eagerly but for helpers whose compilation takes longer
            os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        for name in TORCHRUN_VARIABLES:
            os.environ.pop(name, None)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def empty_main_module() -> Iterator[None]:
    """A spawned process imports its parent's main module again; the engine needs nothing of the trainer's."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextmanager
def generators_kept() -> Iterator[None]:
    """An engine in this process draws from torch's default generators; the trainer must not notice."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def process_state_kept() -> Iterator[None]:
    """A worker that starts in this process seeds every generator, replaces torch.set_num_threads and, where there is no
    default process group, makes one; with a single worker it never communicates, so the place is left to the trainer.
    """
    python_state, numpy_state, set_num_threads = random.getstate(), numpy.random.get_state(), torch.set_num_threads
    has_group = torch.distributed.is_initialized()
    try:
        with generators_kept():
            yield
    finally:
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
        torch.set_num_threads = set_num_threads
        if not has_group and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@contextmanager
def default_group_kept() -> Iterator[None]:
    """vLLM's shutdown destroys the default process group, which is the trainer's, beside groups of its own."""
    destroy = torch.distributed.destroy_process_group

    def destroy_subgroup(group=None):
        if group is not None:
            with suppress(ValueError):  # gone already where the default group went first
                destroy(group)

    torch.distributed.destroy_process_group = destroy_subgroup
    try:
        yield
    finally:
        torch.distributed.destroy_process_group = destroy


def exit_cause(exitcode: int | None) -> str:
    """Why a child process ended, from `multiprocessing.Process.exitcode`."""
    if exitcode is None or exitcode >= 0:
        return f"exit status {exitcode}, its own message is in this process's error output"
    return f"killed by {signal.Signals(-exitcode).name}" + (" (out of memory?)" if exitcode == -9 else "")
