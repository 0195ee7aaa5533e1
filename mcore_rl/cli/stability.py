"""moe-stability with what mcore_rl has: vLLM as the rollout engine, and its converter for Megatron checkpoints."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

# as torchrun does: threads of several processes on the same cores wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

from mcore_rl.types import Trajectory  # noqa: E402
from moe import cli  # noqa: E402
from moe.measure.probe import Tokens  # noqa: E402
from moe.studies.engine import EngineAnswer  # noqa: E402


def vllm_answers(
    model: str, dtype: str, prompts: Sequence[Tokens], num_answers: int, max_tokens: int, seed: int, rounds: int
) -> list[list[list[EngineAnswer]]]:
    """A `moe.studies.commands.Engine`: vLLM in a child process that returns routes."""
    from mcore_rl.config import RolloutConfig, WeightSyncConfig
    from mcore_rl.rollout.vllm.engine import open_engine
    from mcore_rl.types import Prompt, SamplingParams

    engine = open_engine(
        RolloutConfig(placement="child", max_response_tokens=max_tokens, group_size=num_answers),
        WeightSyncConfig(),
        model_path=model,
        model_dtype=dtype,
        max_prompt_tokens=max(map(len, prompts)),
        world_size=1,
        seed=seed,
        return_routes=True,
    )
    with closing(engine):
        asked = [Prompt(str(i), tuple(tokens), "") for i, tokens in enumerate(prompts)]
        params = SamplingParams(n=num_answers, max_tokens=max_tokens)
        generated = [engine.generate(asked, params, seed=seed) for _ in range(rounds)]
    return [[[_answer(t) for t in g.trajectories] for g in groups] for groups in generated]


def _answer(trajectory: Trajectory) -> EngineAnswer:
    tokens, logprobs = (tuple(x.tolist()) for x in (trajectory.response_ids, trajectory.rollout_logprobs))
    return EngineAnswer(tokens, logprobs, torch.from_numpy(trajectory.expert_ids))


def as_hf(path: Path) -> Path:
    """A Megatron checkpoint of any layout as a Hugging Face folder, which is removed when the program ends.

    Raises:
        ValueError: it is neither.
    """
    from mcore_rl.weights.convert import to_hf

    folder = Path(tempfile.mkdtemp(prefix="moe-stability-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return to_hf(path, folder / "hf")


def main() -> None:
    cli.main(cli.Bridges(vllm_answers, as_hf))


if __name__ == "__main__":
    main()
