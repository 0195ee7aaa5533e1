"""From a configuration to its estimate: reads config.json and nothing else of the model."""

from __future__ import annotations

from mcore_rl import algorithms
from mcore_rl.config import RunConfig
from mcore_rl.model.build import read_hf_config, transformer_config
from mcore_rl.model.heads import as_scorer
from mcore_rl.parallel.layout import ParallelLayout
from mcore_rl.planning.advice import Change, advice
from mcore_rl.planning.estimate import Estimate, Hardware, Models
from mcore_rl.planning.needs import estimate
from mcore_rl.planning.parameters import model_parameters
from mcore_rl.planning.plan import holds_reference, reference_layout
from mcore_rl.rollout.placement import resolve
from mcore_rl.weights.families import is_scorer


def plan_run(config: RunConfig, world_size: int, hardware: Hardware) -> tuple[Estimate, list[Change]]:
    """What a run on `world_size` GPUs needs, and what to change where that does not fit.

    Raises:
        ValueError: the layout, the model or the placement of the engine is invalid; the message has the fix.
    """
    models = _models(config)

    def plan(config: RunConfig, world_size: int) -> Estimate:
        layout = ParallelLayout.from_config(config.parallel, world_size)
        for hf_config in (models.policy, *models.scorers.values(), *models.frozen.values()):
            layout.validate_model(hf_config)
        if "reference" in models.frozen:
            reference_layout(config, models.policy, world_size)
        placement, backend = resolve(config.rollout, config.weight_sync, world_size, cuda=True)
        return estimate(config, layout, models, hardware, placement, backend)

    layout = ParallelLayout.from_config(config.parallel, world_size)
    transformer_config(models.policy, config.model, layout)  # refuses what cannot be built or cut
    planned = plan(config, world_size)
    return planned, advice(planned, plan)


def _models(config: RunConfig) -> Models:
    algorithm = algorithms.load(config.algorithm.name, **config.algorithm.fields)
    policy, scorers, frozen = read_hf_config(config.model.path), {}, {}
    for role, section in (("critic", config.critic), ("discriminator", config.discriminator)):
        if role in algorithm.needs:
            scorer = read_hf_config(section.path or config.model.path, f"{role}.path")
            scorers[role] = scorer if is_scorer(scorer) else as_scorer(scorer)
    if holds_reference(config, algorithm):
        frozen["reference"] = policy
    if config.reward_model.path is not None:
        frozen["reward model"] = read_hf_config(config.reward_model.path, "reward_model.path")
    shape = transformer_config(policy, config.model, ParallelLayout())
    return Models(algorithm, policy, shape, scorers, frozen, *model_parameters(policy))
