"""Each finding appears for the configuration it is about, and not for its repair."""

import pytest

from mcore_rl import algorithms
from mcore_rl.config import parse_config
from mcore_rl.planning.lint import lint

BASE = {"name": "x", "model": {"path": "m"}, "batch": {"mini_batches": 4}}
QUIET = {"weight_sync": {"max_logprob_diff": 2.0}}


def findings(algorithm: dict, **sections) -> list[tuple[str, str]]:
    config = parse_config(BASE | {"algorithm": algorithm} | sections)
    of_config = algorithms.load(config.algorithm.name, **config.algorithm.fields)
    return [(f.level, f.key) for f in lint(config, of_config)]


BF16 = {"path": "m", "dtype": "bfloat16"}
GSPO, GRPO, PPO, GAPO, SFT = ({"name": name} for name in ("gspo", "grpo", "ppo", "gapo", "sft"))
REWARD_MODEL = {"reward_model": {"path": "r"}}
ALONE, ALL_WARMUP = {"rollout": {"group_size": 1}}, {"critic": {"warmup_steps": 100}}
WAITS, UNASKED = {"evaluate": {"stop_at_accuracy": 0.2}}, {"evaluate": {"stop_at_accuracy": 0.2, "sample": False}}
AUX = {"model": {"path": "m", "moe_aux_loss_coef": 0.01}}
ONE_STEP, R2 = {"batch": {"mini_batches": 1}}, {"moe": {"routing_replay": "old"}}
BF16_ENGINE = {"rollout": {"dtype": "bfloat16"}} | QUIET
MASK = GRPO | {"correction": "mask_seq_geo"}
DAPO = {"name": "dapo", "overlong_cache": 64}
KL, OFFLOAD, LOADED = GRPO | {"kl_coef": 0.1}, {"reference": {"offload": True}}, {"reward_model": {"offload": True}}
COLD, FROZEN = {"discriminator": {"warmup_rounds": 0}}, {"discriminator_steps": 0}
TRAINED = {"discriminator": {"warmup_rounds": 0, "path": "d"}}
SMOOTH, PAIRS = {"label_smoothing": 0.1}, {"discriminator_objective": "bradley_terry"}
NO_FAKES, NO_BUFFER = {"discriminator": {"fake_share": 0.0}}, {"discriminator": {"buffer_size": 0}}
NO_OLD = {"discriminator": {"buffer_size": 0, "old_share": 0.0}}
STOP, STOP_ID = {"rollout": {"stop": ["."]}}, {"rollout": {"stop_token_ids": [7]}}
BEHAVIOUR, ONE_OFF = GRPO | {"old_logprobs": "rollout"}, {"rollout": {"max_staleness": 1}}
FOUR_OFF, FOUR_OFF_PARTIAL = {"rollout": {"max_staleness": 4}}, {"rollout": {"max_staleness": 4, "partial": True}}


@pytest.mark.parametrize(
    ("level", "key", "wrong", "repaired"),
    [
        ("error", "rollout.group_size", (GRPO, ALONE), (PPO, ALONE)),
        ("error", "reward_model.path", (SFT, REWARD_MODEL), (GRPO, REWARD_MODEL)),
        ("error", "rollout.group_size", (GAPO | {"baseline": "group"}, ALONE), (GAPO, ALONE)),
        ("error", "critic.warmup_steps", (PPO, ALL_WARMUP), (GRPO, ALL_WARMUP)),
        ("error", "evaluate.stop_at_accuracy", (SFT, UNASKED), (SFT, WAITS)),
        ("warning", "model.moe_aux_loss_coef", (GRPO, AUX), (SFT, AUX)),
        ("warning", "reference.offload", (GRPO, OFFLOAD), (KL, OFFLOAD)),
        ("warning", "reward_model.offload", (GRPO, LOADED), (GRPO, {"reward_model": {"offload": True, "path": "r"}})),
        (
            "warning",
            "algorithm.aggregation",
            (GSPO | {"aggregation": "token_mean"}, {}),
            (GRPO | {"aggregation": "token_mean"}, {}),
        ),
        ("warning", "algorithm.clip_high", (GSPO | {"clip_high": 0.2}, {}), (GRPO | {"clip_high": 0.2}, {})),
        ("warning", "algorithm.clip_high", (GRPO | {"clip_high": 4e-4}, {}), (GSPO | {"clip_high": 4e-4}, {})),
        (
            "warning",
            "algorithm.clip_high",
            (GSPO, {"model": BF16} | QUIET),
            (GSPO | {"clip_high": 0.02}, {"model": BF16} | QUIET),
        ),
        (
            "warning",
            "batch.mini_batches",
            (GRPO, {"batch": {"mini_batches": 1}}),
            (GRPO, {"batch": {"mini_batches": 1, "epochs": 2}}),
        ),
        ("warning", "moe.routing_replay", (GRPO, ONE_STEP | R2), (GRPO, R2)),
        ("warning", "batch.mini_batches", (GRPO, ONE_STEP), (BEHAVIOUR, ONE_STEP)),
        ("warning", "algorithm.old_logprobs", (BEHAVIOUR, {"model": BF16} | QUIET), (BEHAVIOUR, {})),
        ("warning", "algorithm.correction", (GRPO, ONE_OFF), (GRPO | {"correction": "tis_token"}, ONE_OFF)),
        ("warning", "algorithm.correction", (GRPO, ONE_OFF), (BEHAVIOUR, ONE_OFF)),
        ("warning", "rollout.max_staleness", (BEHAVIOUR, FOUR_OFF), (BEHAVIOUR, FOUR_OFF_PARTIAL)),
        ("error", "rollout.max_staleness", (SFT, ONE_OFF), (BEHAVIOUR, ONE_OFF)),
        ("warning", "rollout.top_p", (GRPO, {"rollout": {"top_p": 0.9}}), (GRPO, {})),
        ("warning", "rollout.top_k", (GRPO, {"rollout": {"top_k": 20}}), (GRPO, {})),
        ("warning", "rollout.dtype", (GRPO, BF16_ENGINE), (GRPO, {"model": BF16} | BF16_ENGINE)),
        ("warning", "weight_sync.max_logprob_diff", (GRPO, {"model": BF16}), (GRPO, {"model": BF16} | QUIET)),
        ("warning", "algorithm.correction", (MASK, {"model": BF16} | QUIET), (MASK, {})),
        ("error", "discriminator.warmup_rounds", (GAPO | FROZEN, COLD), (GAPO | FROZEN, TRAINED)),
        ("warning", "discriminator.warmup_rounds", (GAPO, COLD), (GAPO, {})),
        ("error", "reward_model.path", (GAPO, REWARD_MODEL), (PPO, REWARD_MODEL)),
        ("error", "algorithm.label_smoothing", (GAPO | SMOOTH | PAIRS, {}), (GAPO | SMOOTH, {})),
        ("warning", "discriminator.fake_share", (GAPO, NO_FAKES), (GAPO | FROZEN, NO_FAKES)),
        ("warning", "discriminator.buffer_size", (GAPO, NO_BUFFER), (GAPO, NO_OLD)),
        ("warning", "algorithm.band_high", (GAPO | {"band_high": 1.0}, {}), (GAPO | {"band_high": 0.95}, {})),
        ("warning", "rollout.stop", (GAPO, STOP), (GRPO, STOP)),
        ("warning", "rollout.stop_token_ids", (GAPO, STOP_ID), (GRPO, STOP_ID)),
        (
            "warning",
            "algorithm.overlong_max_length",
            (DAPO | {"overlong_max_length": 512}, {}),
            (DAPO | {"overlong_max_length": 256}, {}),
        ),
    ],
)
def test_finding(level, key, wrong, repaired):
    assert (level, key) in findings(wrong[0], **wrong[1])
    assert (level, key) not in findings(repaired[0], **repaired[1])


@pytest.mark.parametrize("name", ["grpo", "gspo", "sapo", "dapo", "cispo", "ppo", "gapo", "dpo", "sft"])
def test_papers_defaults_are_clean(name):
    assert findings({"name": name}) == []
