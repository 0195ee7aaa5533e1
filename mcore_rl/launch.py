"""Ranks of one machine through torchrun's agent, and how a run that fails says why.

python -m mcore_rl.launch NPROC_PER_NODE CONFIG.yaml key.sub=value ...
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import traceback


def tell(error: BaseException) -> None:
    """Print a failure to standard error, once: what the user can act on in its own words, our own bugs as a traceback.

    A second call with the same error prints nothing, nor does one with an error that another rank tells.
    """
    if getattr(error, "told", False):
        return
    error.told = True
    rank = f"rank {os.environ['RANK']}: " if os.environ.get("RANK", "0") != "0" else ""
    if _is_in_words(error):
        print(f"error: {rank}{error}", file=sys.stderr, flush=True)
    else:
        text = "".join(traceback.format_exception(error))
        print(f"{text}error: {rank}{type(error).__name__}: {error}", file=sys.stderr, flush=True)


def exit_code(error: BaseException) -> int:
    """2 for a user's mistake, 1 for a failure."""
    return 2 if isinstance(error, ValueError) else 1


def _is_in_words(error: BaseException) -> bool:
    if isinstance(error, (ValueError, OSError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    from mcore_rl.rollout.engine import RolloutError  # only now: it imports much, and a mistake must be told at once

    return isinstance(error, RolloutError) or error.__cause__ is not None  # raised from a cause: already explained


def main() -> None:
    """Start the ranks, wait for them and end as the run did."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    ranks, *arguments = sys.argv[1:]
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks say themselves what failed
    with tempfile.TemporaryDirectory(prefix="mcore_rl_launch_") as logs:
        options = ["--standalone", f"--nproc-per-node={ranks}", f"--log-dir={logs}", "-m", "mcore_rl.train"]
        try:
            run(parse_args([*options, *arguments]))
        except ChildFailedError as error:
            raise SystemExit(_explain(error.failures)) from None
        except SignalException as error:
            print(f"error: stopped by {error.sigval.name}", file=sys.stderr)
            raise SystemExit(128 + error.sigval) from None


def _explain(failures: dict) -> int:
    """The exit code of a run whose ranks failed; names those that were killed and so could say nothing."""
    for rank, failure in sorted(failures.items()):
        if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:  # SIGTERM: ended because another had failed
            hint = " (out of memory?)" if failure.exitcode == -signal.SIGKILL else ""
            print(
                f"error: rank {rank} (process {failure.pid}) was killed by {failure.signal_name()}{hint}",
                file=sys.stderr,
            )
    return max(1, *(failure.exitcode for failure in failures.values()))


if __name__ == "__main__":
    main()
