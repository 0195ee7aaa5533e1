"""Configurations that run and learn nothing, or something else than meant: said before the run starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mcore_rl.algorithms.base import Algorithm
from mcore_rl.algorithms.dapo import DAPO
from mcore_rl.algorithms.gapo import GAPO
from mcore_rl.algorithms.gspo import GSPO
from mcore_rl.config import RunConfig
from mcore_rl.planning.plan import holds_reference
from mcore_rl.types import Prompt, RolloutGroup, Trajectory


@dataclass(frozen=True)
class Finding:
    """One thing to look at. An error stops the run, a warning is printed."""

    level: Literal["error", "warning"]
    key: str  # of the configuration
    message: str

    def __str__(self) -> str:
        return f"{self.level}: {self.key}: {self.message}"


def lint(config: RunConfig, algorithm: Algorithm) -> list[Finding]:
    """Everything suspicious in a configuration whose values are all allowed one by one."""
    found = _gradients(config, algorithm) + _ratios(config, algorithm) + _mismatch(config, algorithm)
    found += _staleness(config, algorithm) + _frozen(config, algorithm)
    if isinstance(algorithm, GAPO):
        found += _discriminator(config, algorithm)
    return sorted(found, key=lambda finding: finding.level)


def _gradients(config: RunConfig, algorithm: Algorithm) -> list[Finding]:
    found = []
    rollout, rl = config.rollout, algorithm.needs_rollouts
    if rl and rollout.group_size == 1 and not _teaches_alone(algorithm):
        message = "with one response a prompt every group-relative advantage is 0 and nothing is learned; use 2 or more"
        found.append(Finding("error", "rollout.group_size", message))
    if config.reward_model.path is not None and not rl:
        message = f"{type(algorithm).__name__} trains on given responses and asks for no reward; drop it"
        found.append(Finding("error", "reward_model.path", message))
    if config.evaluate.stop_at_accuracy is not None and not config.evaluate.sample:
        message = "nobody samples the answers whose accuracy it waits for; set evaluate.sample=true, or drop it"
        found.append(Finding("error", "evaluate.stop_at_accuracy", message))
    if rl and config.model.moe_aux_loss_coef > 0:
        message = "the load-balancing loss pulls the router away from what is rewarded; 0 is usual in RL"
        found.append(Finding("warning", "model.moe_aux_loss_coef", message))
    if isinstance(algorithm, GSPO) and algorithm.aggregation == "token_mean":
        message = "token_mean weighs a GSPO sequence by its length; sequence_mean is the paper's"
        found.append(Finding("warning", "algorithm.aggregation", message))
    if isinstance(algorithm, DAPO) and algorithm.overlong_max_length > rollout.max_response_tokens:
        message = (
            f"responses end at rollout.max_response_tokens={rollout.max_response_tokens}, so the punishment up to "
            f"{algorithm.overlong_max_length} is never complete; make them equal"
        )
        found.append(Finding("warning", "algorithm.overlong_max_length", message))
    if "critic" in algorithm.needs and config.critic.warmup_steps >= config.steps:
        message = f"the critic learns alone for all steps={config.steps}; the policy never moves"
        found.append(Finding("error", "critic.warmup_steps", message))
    return found


def _frozen(config: RunConfig, algorithm: Algorithm) -> list[Finding]:
    """What is said of models that are never loaded."""
    held = holds_reference(config, algorithm)
    asked = (
        ("reference.offload", config.reference.offload and not held),
        ("reference.update_every", config.reference.update_every and not held),
        ("reward_model.offload", config.reward_model.offload and config.reward_model.path is None),
    )
    return [Finding("warning", key, "the run holds no such model; it does nothing") for key, idle in asked if idle]


def _teaches_alone(algorithm: Algorithm) -> bool:
    """Whether one response to a prompt has an advantage, or is only compared with the others."""
    alone = Trajectory((0,), (0,), (0.0,), "stop", 0, reward=1.0)
    return bool(algorithm.advantages(RolloutGroup(Prompt("lint", (0,), ""), (alone,))).any())


def _ratios(config: RunConfig, algorithm: Algorithm) -> list[Finding]:
    found = []
    if config.batch.mini_batches * config.batch.epochs == 1 and config.moe.routing_replay == "old":
        message = "one optimizer step a rollout takes the routes from before the step anyway; none is the same"
        found.append(Finding("warning", "moe.routing_replay", message))
    if config.batch.mini_batches * config.batch.epochs == 1 and config.moe.router_shift:
        message = "one optimizer step a rollout: no router has moved yet and every weight is 1; false saves a pass"
        found.append(Finding("warning", "moe.router_shift", message))
    high = getattr(algorithm, "clip_high", None)
    if high is None:
        return found
    if isinstance(algorithm, GSPO):
        if high >= 0.1:
            message = f"{high:g} is the clip of a token ratio; a mean over n tokens moves about sqrt(n) less"
            found.append(Finding("warning", "algorithm.clip_high", message))
        if config.model.dtype == "bfloat16" and high < 0.01:
            message = f"bf16 log-probs are not exact to {high:g}: rounding decides what is clipped; use float32"
            found.append(Finding("warning", "algorithm.clip_high", message))
    elif high < 0.01:
        message = f"{high:g} is the clip of a sequence ratio; token ratios leave it at once and lose their gradient"
        found.append(Finding("warning", "algorithm.clip_high", message))
    if config.batch.mini_batches * config.batch.epochs == 1 and algorithm.old_logprobs == "trainer":
        message = "one optimizer step a rollout: every ratio is 1 and the clip never acts (which may be what you want)"
        found.append(Finding("warning", "batch.mini_batches", message))
    return found


def _mismatch(config: RunConfig, algorithm: Algorithm) -> list[Finding]:
    found = []
    rollout, bf16 = config.rollout, "bfloat16" in (config.model.dtype, config.rollout.dtype)
    if rollout.top_p < 1 or rollout.top_k > 0:
        message = "tokens are drawn from a cut distribution, while the trainer's log-probs are of the whole one"
        found.append(Finding("warning", "rollout.top_p" if rollout.top_p < 1 else "rollout.top_k", message))
    if rollout.dtype not in ("auto", config.model.dtype):
        message = (
            f"the engine computes in {rollout.dtype}, the trainer in {config.model.dtype}: expect routing to differ"
        )
        found.append(Finding("warning", "rollout.dtype", message))
    if bf16 and config.weight_sync.probe_prompts and config.weight_sync.max_logprob_diff < 0.5:
        message = "in bf16 log-probs of a correct sync differ by up to 1 where an expert flips; 1 to 2 is usual"
        found.append(Finding("warning", "weight_sync.max_logprob_diff", message))
    if bf16 and algorithm.old_logprobs == "rollout":
        message = "every ratio then holds the rounding of bf16 and the experts it flips, and is clipped for it"
        found.append(Finding("warning", "algorithm.old_logprobs", message))
    if bf16 and algorithm.correction == "mask_seq_geo" and algorithm.correction_bounds[1] < 1.01:
        message = "in bf16 nearly every short response lies outside these bounds and has no gradient; widen them"
        found.append(Finding("warning", "algorithm.correction", message))
    return found


def _discriminator(config: RunConfig, algorithm: GAPO) -> list[Finding]:
    found, own = [], config.discriminator
    learns = algorithm.discriminator_steps > 0
    if own.path is None and own.warmup_rounds == 0:
        message = "a new head scores 0 everywhere: the first batch has no rewards; warm it up, or load a trained one"
        if not learns:
            message = "a new head scores 0 everywhere and discriminator_steps=0 leaves it so: there is no reward at all"
        found.append(Finding("warning" if learns else "error", "discriminator.warmup_rounds", message))
    if config.reward_model.path is not None:
        message = "the discriminator is the reward, so this one is never asked; drop it, or train with PPO on it"
        found.append(Finding("error", "reward_model.path", message))
    if algorithm.label_smoothing > 0 and algorithm.discriminator_objective != "bce":
        message = "bradley_terry has no targets to smooth, it is ignored; set it to 0"
        found.append(Finding("error", "algorithm.label_smoothing", message))
    if learns and own.fake_share == 0:
        message = "it never learns from what the policy writes, which will find what it overlooks; 0.5 is usual"
        found.append(Finding("warning", "discriminator.fake_share", message))
    if learns and own.fake_share * own.old_share > 0 and own.buffer_size == 0:
        message = f"old_share={own.old_share:g} of the generated responses come from a buffer that holds none"
        found.append(Finding("warning", "discriminator.buffer_size", message))
    if algorithm.band_high == 1:
        message = "it is trained on however good it is: its log-odds saturate, and rewards differ by noise only"
        found.append(Finding("warning", "algorithm.band_high", message))
    if config.rollout.stop or config.rollout.stop_token_ids:
        message = "generated responses end as this says, real ones with the end token: it need only look there"
        found.append(Finding("warning", "rollout.stop" if config.rollout.stop else "rollout.stop_token_ids", message))
    return found


def _staleness(config: RunConfig, algorithm: Algorithm) -> list[Finding]:
    found, bound = [], config.rollout.max_staleness
    if bound > 0 and not algorithm.needs_rollouts:
        message = f"{type(algorithm).__name__} trains on given responses, nothing is generated ahead; set it to 0"
        found.append(Finding("error", "rollout.max_staleness", message))
    elif bound > 0 and algorithm.old_logprobs == "trainer" and algorithm.correction == "none":
        message = (
            "responses are older than old_logprobs, which are of the weights before the step: no ratio holds what "
            "changed in between; use tis_token or another correction, or algorithm.old_logprobs=rollout"
        )
        found.append(Finding("warning", "algorithm.correction", message))
    if bound > 1 and not config.rollout.partial:
        message = (
            f"all that is in flight is finished before every weight update, so the engine gains nothing by {bound} "
            "steps over 1, and the rollouts are older; set it to 1, or rollout.partial=true"
        )
        found.append(Finding("warning", "rollout.max_staleness", message))
    return found
