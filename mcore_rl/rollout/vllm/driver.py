"""Who may touch a vLLM engine: its caller where it is in this process, else the one thread that owns its sockets."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
Request = tuple[str, dict[str, Any], Any]  # id, prompt and sampling parameters as vLLM has them


class Direct:
    """An engine in this process, for one caller at a time."""

    def __init__(self, llm: Any):
        self.llm = llm

    def call(self, work: Callable[[Any], T]) -> T:
        return work(self.llm)

    def run(self, requests: Sequence[Request], begin: Callable[[Any], None]) -> list[Any]:
        """The finished outputs of some requests. `begin(llm)` comes first where nothing else is being generated."""
        begin(self.llm)
        ids, finished = [], {}
        try:
            for name, prompt, params in requests:
                ids.append(name)
                self.llm.add_request(name, prompt, params)
            while self.llm.has_unfinished_requests():
                finished.update((output.request_id, output) for output in self.llm.step() if output.finished)
        except BaseException:
            self.llm.abort_request(ids)
            raise
        return [finished[name] for name in ids]

    def pause(self) -> None:
        """Nothing is generated while its caller does something else."""

    def resume(self) -> None: ...

    def close(self) -> None: ...


class OwnThread:
    """An engine in another process. Any number of threads may call at once; they are served between two steps.

    Args:
        is_alive: whether the engine's process lives; a dead one is not asked to forget its requests.
    """

    def __init__(self, llm: Any, is_alive: Callable[[], bool]):
        self._llm, self._is_alive = llm, is_alive
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        self._waiting: dict[str, Future] = {}  # by request; only the thread below changes it
        self._paused = self._closed = False
        self._thread = threading.Thread(target=self._serve, name="rollout engine", daemon=True)
        self._thread.start()

    def call(self, work: Callable[[Any], T]) -> T:
        future: Future = Future()
        self._tasks.put((future, work))
        if self._closed:
            self._fail(_ClosedError())
        return future.result()

    def run(self, requests: Sequence[Request], begin: Callable[[Any], None]) -> list[Any]:
        ids = [name for name, _, _ in requests]
        try:
            return [future.result() for future in self.call(lambda llm: self._add(llm, requests, begin))]
        except BaseException:
            if self._is_alive() and not self._closed:
                self.call(lambda llm: self._forget(llm, ids))
            raise

    def pause(self) -> None:
        """Stop between two tokens; requests in flight stay."""
        self.call(self._pause)

    def resume(self) -> None:
        self.call(self._resume)

    def close(self) -> None:
        """End the thread; whoever waits for it is told."""
        from vllm.v1.engine.exceptions import EngineDeadError

        if self._waiting and self._is_alive():  # vLLM gives a busy process five seconds to end
            self.call(lambda llm: self._forget(llm, list(self._waiting), _ClosedError()))
        self._closed = True
        self._tasks.put(None)
        self._llm.engine_core.outputs_queue.put(EngineDeadError())  # wakes a step that waits for the engine
        self._thread.join(10)

    def _pause(self, llm: Any) -> None:
        llm.engine_core.call_utility("pause_scheduler", "keep", False)
        self._paused = True

    def _resume(self, llm: Any) -> None:
        llm.engine_core.call_utility("resume_scheduler")
        self._paused = False

    def _add(self, llm: Any, requests: Sequence[Request], begin: Callable[[Any], None]) -> list[Future]:
        if not self._waiting:
            begin(llm)
        added = []
        for name, prompt, params in requests:
            llm.add_request(name, prompt, params)
            self._waiting[name] = Future()
            added.append(self._waiting[name])
        return added

    def _forget(self, llm: Any, ids: Sequence[str], told: Exception | None = None) -> None:
        for name in ids:
            future = self._waiting.pop(name, None)
            if future is not None and told is not None:
                future.set_exception(told)
        llm.abort_request(list(ids))

    def _serve(self) -> None:
        while not self._closed:
            try:
                task = self._tasks.get(block=self._paused or not self._waiting)
            except queue.Empty:
                self._step()
                continue
            if task is not None:
                _fulfil(*task, self._llm)
        self._fail(_ClosedError())

    def _step(self) -> None:
        try:
            outputs = self._llm.step()
        except Exception as error:  # noqa: BLE001  raised where the outputs are waited for
            waiting, self._waiting = self._waiting, {}
            for future in waiting.values():
                future.set_exception(error)
            return
        for output in outputs:
            if output.finished and output.request_id in self._waiting:
                self._waiting.pop(output.request_id).set_result(output)

    def _fail(self, error: Exception) -> None:
        """Everything that nobody will serve any more."""
        with contextlib.suppress(queue.Empty):
            while True:
                if (task := self._tasks.get(block=False)) is not None:
                    task[0].set_exception(error)
        while self._waiting:
            self._waiting.popitem()[1].set_exception(error)


class _ClosedError(RuntimeError):
    def __init__(self) -> None:
        super().__init__("it was closed")


def _fulfil(future: Future, work: Callable[[Any], Any], llm: Any) -> None:
    try:
        future.set_result(work(llm))
    except BaseException as error:  # noqa: BLE001  raised in the caller's thread
        future.set_exception(error)
