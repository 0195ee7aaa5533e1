"""Ranks of one node or of many through torchrun's agent, one a node, and how a run that fails says why.

python -m mcore_rl.launch TORCHRUN_OPTIONS -- CONFIG.yaml key.sub=value ...
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import traceback
from dataclasses import dataclass


class RunFailure(Exception):
    """The run has failed and the user knows why: this rank has told it, or another rank does. `__cause__` is why.

    Attributes:
        exit_code: that the rank ends with.
    """

    def __init__(self, exit_code: int):
        super().__init__("the run failed, for a cause that has been told")
        self.exit_code = exit_code


class FailureInWordsError(RuntimeError):
    """A failure whose message is all that its reader needs; other failures are shown with their traceback."""


def tell(error: BaseException) -> None:
    """Print a failure to standard error: what the user can act on in its own words, our own bugs as a traceback.

    Prints nothing of a `RunFailure`.
    """
    if isinstance(error, RunFailure):
        return
    rank = f"rank {os.environ['RANK']}: " if os.environ.get("RANK", "0") != "0" else ""
    if _is_in_words(error):
        print(f"error: {rank}{error}", file=sys.stderr, flush=True)
    else:
        text = "".join(traceback.format_exception(error))
        print(f"{text}error: {rank}{type(error).__name__}: {error}", file=sys.stderr, flush=True)


def exit_code(error: BaseException) -> int:
    """2 for a user's mistake, 1 for a failure."""
    if isinstance(error, RunFailure):
        return error.exit_code
    return 2 if isinstance(error, ValueError) else 1


def _is_in_words(error: BaseException) -> bool:
    if isinstance(error, (ValueError, OSError, FailureInWordsError)):
        return True
    return isinstance(error, RuntimeError) and error.__cause__ is not None  # raised from a cause: already explained


@dataclass(frozen=True)
class Nodes:
    """Where the ranks of a run are started; one such description a node.

    Attributes:
        endpoint: host:port where the nodes meet.
        node_rank: of this node, from 0, which is the endpoint's. None: the nodes agree on an order among themselves.

    Raises:
        ValueError: several nodes and no endpoint, or a node rank outside of them.
    """

    nproc_per_node: int
    nnodes: int = 1
    endpoint: str | None = None
    node_rank: int | None = None

    def __post_init__(self) -> None:
        host, _, port = (self.endpoint or "").rpartition(":")
        if self.nnodes > 1 and not (host and port.isdigit()):
            raise ValueError(
                f"--nnodes={self.nnodes} needs --rdzv-endpoint HOST:PORT, the same on every node; got {self.endpoint!r}"
            )
        if self.node_rank is not None and not 0 <= self.node_rank < self.nnodes:
            raise ValueError(
                f"--node-rank={self.node_rank} must be from 0 to {self.nnodes - 1} (--nnodes={self.nnodes})"
            )

    @property
    def world_size(self) -> int:
        return self.nproc_per_node * self.nnodes

    def torchrun_options(self, run_name: str, timeout_s: float) -> list[str]:
        """For the agent of this node. No rank is started again: a run is continued by hand, with resume=true."""
        options = [f"--nproc-per-node={self.nproc_per_node}", "--max-restarts=0"]
        if self.nnodes == 1:
            return [*options, "--standalone"]
        options += [f"--nnodes={self.nnodes}", f"--rdzv-id={run_name}"]
        if self.node_rank is None:
            meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={self.endpoint}"]
            return [*options, *meeting, f"--rdzv-conf=join_timeout={timeout_s:.0f}"]
        host, _, port = self.endpoint.rpartition(":")
        return [*options, f"--node-rank={self.node_rank}", f"--master-addr={host}", f"--master-port={port}"]


def main() -> None:
    """Start this node's ranks, wait for them and end as the run did."""
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import parse_args, run

    divide = sys.argv.index("--")
    options, arguments = sys.argv[1:divide], sys.argv[divide + 1 :]
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks say themselves what failed
    with tempfile.TemporaryDirectory(prefix="mcore_rl_launch_") as logs:
        try:
            run(parse_args([*options, f"--log-dir={logs}", "-m", "mcore_rl.train", *arguments]))
        except ChildFailedError as error:
            raise SystemExit(_explain(error.failures)) from None
        except SignalException as error:
            print(f"error: stopped by {error.sigval.name}", file=sys.stderr)
            raise SystemExit(128 + error.sigval) from None
        except (RendezvousError, DistError) as error:
            print(
                f"error: this node lost the others, or they did not come: {error or type(error).__name__}. Look at "
                "their output first; examples/launch/multi_node.sh checks the nodes beforehand",
                file=sys.stderr,
            )
            raise SystemExit(1) from None


def _explain(failures: dict) -> int:
    """The exit code of a run whose ranks failed; names those that were killed and so could say nothing.

    Where one ended by itself it has told why, and torchrun then ended the others: by SIGTERM, which does not count
    here, and by SIGKILL those that hang. (After a rank is killed the others find no time to end by themselves.)
    """
    told = any(failure.exitcode > 0 for failure in failures.values())
    for rank, failure in sorted(failures.items()):
        ended = (-signal.SIGTERM, -signal.SIGKILL) if told else (-signal.SIGTERM,)
        if failure.exitcode < 0 and failure.exitcode not in ended:
            hint = " (out of memory?)" if failure.exitcode == -signal.SIGKILL else ""
            print(
                f"error: rank {rank} (process {failure.pid}) was killed by {failure.signal_name()}{hint}",
                file=sys.stderr,
            )
    return max(1, *(failure.exitcode for failure in failures.values()))


if __name__ == "__main__":
    main()
