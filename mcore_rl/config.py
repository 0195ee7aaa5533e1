"""One run is one RunConfig: YAML file + dotted overrides, checked before anything starts.

Every section forbids unknown keys; the error names the nearest key. The resolved config is written into the
run's folder and is itself a valid config file.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(Section):
    path: str  # HF folder (config.json, safetensors, tokenizer), or what `mcore-rl convert` made of one
    dtype: Literal["float32", "bfloat16"] = "float32"
    spec: Literal["auto", "local", "transformer_engine"] = "auto"  # auto: TransformerEngine where it is installed
    moe_aux_loss_coef: float = Field(0.0, ge=0)  # load-balancing loss; 0 in RL, 0.01 is usual for SFT
    recompute: Literal["none", "selective", "full"] = "none"
    fp32_head: bool = False  # bf16 models: logits are multiplied out in fp32
    freeze_router: bool = False  # router weights keep their values; gradients still flow through the gates


class LayoutConfig(Section):
    tp: int = Field(1, ge=1)  # tensor; >1 turns sequence parallelism on
    pp: int = Field(1, ge=1)  # pipeline
    vpp: int = Field(1, ge=1)  # model chunks a pipeline stage (interleaved schedule)
    cp: int = Field(1, ge=1)  # context
    ep: int = Field(1, ge=1)  # expert
    etp: int = Field(1, ge=1)  # expert tensor


Threads = Annotated[int, Field(ge=1)] | Literal["auto"]  # auto: the cores, see planning/threads.py


class ParallelConfig(LayoutConfig):
    distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False  # gradients are reduced over data-parallel ranks while the backward pass goes on
    threads: Threads = "auto"  # CPU: of each rank
    timeout_s: float = Field(600, gt=0)  # a collective that waits longer ends the run with a message


class OptimizerConfig(Section):
    lr: float = Field(1e-6, gt=0)
    min_lr: float = Field(0.0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)  # optimizer steps
    decay_steps: int | None = Field(None, gt=0)  # optimizer steps; None: until the end of the run
    name: Literal["adam", "sgd"] = "adam"
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    clip_grad: float = Field(1.0, ge=0)  # global norm; 0 turns clipping off
    offload: bool = False  # its state waits in the host's memory between steps; critic and discriminator too


class BatchConfig(Section):
    prompts_per_step: int = Field(32, ge=1)  # prompts of one rollout (SFT: examples of one step)
    mini_batches: int = Field(1, ge=1)  # optimizer steps a rollout
    epochs: int = Field(1, ge=1)  # passes over a rollout
    micro_batch_tokens: int = Field(4096, ge=1)  # token budget of one forward pass on one rank
    logprob_chunk_tokens: int = Field(1024, ge=1)  # positions whose logits exist at once


class RolloutConfig(Section):
    group_size: int = Field(8, ge=1)  # responses a prompt
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(-1, ge=-1)  # -1 and 0 keep the whole vocabulary
    max_response_tokens: int = Field(256, ge=1)
    stop: list[str] = []
    stop_token_ids: list[int] = []
    placement: Literal["auto", "in_process", "child", "server"] = "auto"  # auto: in_process for one rank, else child
    server_url: str | list[str] | None = None  # placement=server: http://host:port, of one or several
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: model.dtype
    max_model_len: int | None = None  # None: longest prompt + max_response_tokens
    tensor_parallel_size: int = Field(1, ge=1)
    num_engines: int = Field(1, ge=1)  # placement=child on CPU: processes that share the prompts
    max_staleness: int = Field(0, ge=0)  # weight updates between sampling a token and training on it; 0: synchronous
    partial: bool = False  # responses in flight at a weight update go on under the new weights; else it waits for them
    kv_cache_gb: float = Field(0.5, gt=0)  # CPU
    threads: Threads = "auto"  # CPU: of each worker of an engine in a process of its own
    return_routes: bool = False  # every response comes with its experts; moe.routing_replay=rollout does it anyway
    gpu_memory_utilization: float = Field(0.4, gt=0, le=1)  # GPU
    sleep: bool = False  # GPU: the engine gives its memory to the trainer while that works
    startup_timeout_s: float = Field(300, gt=0)


class WeightSyncConfig(Section):
    backend: Literal["auto", "shm", "gloo", "nccl", "ipc"] = (
        "auto"  # auto: shm on CPU; on GPU ipc if colocated, else nccl
    )
    probe_prompts: int = Field(
        8, ge=0
    )  # sequences generated after each sync and scored by the trainer; 0: not verified
    probe_tokens: int = Field(16, ge=1)
    probe_every: int = Field(10, ge=1)  # syncs between probes; also where mismatch/abs_max is above max_logprob_diff
    check_packing_every: int = Field(16, ge=1)  # syncs in which each packed matrix is probed once; the first probes all
    max_logprob_diff: float = Field(1e-3, gt=0)  # above it the run stops; bf16 needs about 1.0


class ReferenceConfig(Section):
    path: str | None = None  # HF folder of the frozen policy; None: model.path
    parallel: LayoutConfig | None = None  # over the same ranks; None: the policy's
    offload: bool = False  # its weights wait in the host's memory until it scores
    update_every: int = Field(0, ge=0)  # training steps after which it becomes the policy of then; 0: never
    precompute: bool = True  # preference pairs: score all of them before training, then hold no reference model
    cache_dir: str | None = None  # of precomputed log-probs; None: OUTPUT_DIR/reference_logprobs
    max_logprob_diff: float = Field(0.0, ge=0)  # of policy and reference before the first step on pairs


class MoeConfig(Section):
    # Experts of the policy's forward passes: those it chooses, those it chose before the step (R2), the engine's (R3)
    routing_replay: Literal["none", "old", "rollout"] = "none"
    router_shift: bool = False  # RSPO: weigh tokens by how little their routers have moved since before the step
    router_shift_floor: float = Field(0.7, ge=0, le=1)  # tokens below it weigh 0
    log_every: int = Field(0, ge=0)  # training steps between statistics of the routers; 0: none
    record_every: int = Field(0, ge=0)  # training steps between routes kept in the run's folder; 0: none
    export_every: int = Field(0, ge=0)  # training steps between those whose every optimizer step leaves an HF folder

    @property
    def watches(self) -> bool:
        return self.log_every > 0 or self.record_every > 0


class CriticConfig(Section):
    path: str | None = None  # HF folder of a policy or a sequence classifier; None: model.path. A new head starts at 0
    lr: float = Field(1e-5, gt=0)  # everything else as `optimizer`
    warmup_steps: int = Field(0, ge=0)  # training steps in which only the critic learns


class DiscriminatorConfig(Section):
    path: str | None = None  # HF folder of a policy or a sequence classifier; None: model.path. A new head starts at 0
    lr: float = Field(1e-5, gt=0)  # constant; everything else as `optimizer`
    batch_size: int = Field(128, ge=2, multiple_of=2)  # sequences of one update, half of them real
    fake_share: float = Field(0.5, ge=0, le=1)  # of the others: generated; the rest are rejected ones of the data
    old_share: float = Field(0.2, ge=0, le=1)  # of the generated ones: from earlier steps
    buffer_size: int = Field(1024, ge=0)  # generated responses kept
    warmup_rounds: int = Field(10, ge=0)  # at most, before the first step: responses of the policy, then updates
    warmup_steps: int = Field(20, ge=1)  # updates a round of the warm-up
    warmup_accuracy: float = Field(0.75, gt=0, le=1)  # held out, at which the warm-up ends
    eval_examples: int = Field(64, ge=1)  # held-out ones of the data that it is measured on


class RewardModelConfig(Section):
    path: str | None = None  # HF folder of a sequence classifier with one label: its score is the reward
    offload: bool = False  # its weights wait in the host's memory until it scores


class DataConfig(Section):
    task: str = "digit_sort"  # digit_sort, digit_constraints, reasoning_gym/<name>, or file
    params: dict[str, Any] = {}  # arguments of the task's generator
    train_file: str | None = None  # task=file: .jsonl or .parquet
    eval_file: str | None = None
    prompt_key: str = "prompt"  # or "messages": a chat, rendered with the tokenizer's template
    answer_key: str = "answer"
    max_prompt_tokens: int | None = None  # None: whatever fits the model
    system_prompt: str | None = None


class EvaluateConfig(Section):
    every: int = Field(10, ge=0)  # training steps; 0: only at the start and the end
    prompts: int = Field(256, ge=1)  # held-out prompts
    sample: bool = True  # answer them; without, SFT and DPO need no rollout engine
    temperature: float = Field(1.0, ge=0)
    stop_at_accuracy: float | None = Field(None, ge=0, le=1)  # end the run once eval/accuracy reaches it


class CheckpointConfig(Section):
    every: int = Field(0, ge=0)  # training steps; 0: only at the end
    keep_last: int = Field(2, ge=1)
    asynchronous: bool = False  # write while training goes on, from a copy of the state in the CPU's memory
    export_hf: bool = True  # write hf/ at the end


class LoggingConfig(Section):
    tensorboard: bool = True
    wandb: bool = False
    report: bool = True  # write report.png at the end


class AlgorithmConfig(BaseModel):
    """The algorithm's name and whatever fields of it are set; `algorithms.load` knows which there are."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = "grpo"

    @property
    def fields(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class RunConfig(Section):
    name: str
    model: ModelConfig
    algorithm: AlgorithmConfig = AlgorithmConfig()
    output_dir: str = "runs"
    steps: int = Field(100, ge=1)
    seed: int = Field(0, ge=0)
    resume: bool = False
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    batch: BatchConfig = BatchConfig()
    rollout: RolloutConfig = RolloutConfig()
    weight_sync: WeightSyncConfig = WeightSyncConfig()
    reference: ReferenceConfig = ReferenceConfig()
    moe: MoeConfig = MoeConfig()
    critic: CriticConfig = CriticConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    data: DataConfig = DataConfig()
    reward: str | list[str] = (
        "auto"  # the task's own; or names of rollout/rewards.py or module:function, several are added
    )
    reward_model: RewardModelConfig = RewardModelConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir) / self.name


def due(every: int, done: int) -> bool:
    """Whether what happens every `every` training steps (0: never) happens after `done` of them."""
    return every > 0 and done % every == 0


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a YAML file, lay `key.sub=value` overrides over it and validate.

    `extends: other.yaml` in a file means: everything of that file (beside it) first, then what this one says.

    Raises:
        ValueError: missing file, files that extend each other in a circle, broken YAML, malformed override, unknown key
            (names the nearest), wrong type or value out of range (names the value got and what is allowed).
    """
    for override in overrides:
        if "=" not in override:
            raise ValueError(f"override {override!r} is not of the form key.sub=value")
    try:
        merged = OmegaConf.merge(_read(Path(path)), OmegaConf.from_dotlist(list(overrides)))
        values = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"config {str(path)!r} with overrides {list(overrides)} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"config {str(path)!r} must be a mapping of sections, got {type(values).__name__}")
    return parse_config(values)


def _read(path: Path, extending: tuple[Path, ...] = ()) -> Any:
    path = path.resolve()
    if not path.is_file():
        raise ValueError(f"{str(path)!r} does not exist; pass the path of a YAML file such as examples/demo/grpo.yaml")
    if path in extending:
        raise ValueError(f"{str(path)!r} extends itself, through {[p.name for p in extending]}; drop one 'extends'")
    content = OmegaConf.load(path)
    if not OmegaConf.is_dict(content) or "extends" not in content:
        return content
    base = _read(path.parent / content.pop("extends"), (*extending, path))
    return OmegaConf.merge(base, content)


def parse_config(values: dict[str, Any]) -> RunConfig:
    """Validate a nested dict. Raises ValueError listing every mistake at once."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        lines = [_explain(e) for e in error.errors()]
        raise ValueError("invalid config:\n" + "\n".join(f"  - {line}" for line in lines)) from None


def dump_config(config: RunConfig) -> str:
    """The resolved config as YAML, itself readable by `load_config`."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


def _explain(error: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        allowed = _fields_at(error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), allowed, n=1, cutoff=0.0)
        meant = ".".join([*map(str, error["loc"][:-1]), near[0]])
        return f"unknown key {where!r}; did you mean {meant!r}? allowed: {', '.join(allowed)}"
    if error["type"] == "missing":
        return f"missing key {where!r}; set it in the file or as {where}=VALUE"
    return f"{where}={error['input']!r}: {error['msg']}"


def _fields_at(loc: tuple[Any, ...]) -> list[str]:
    section: Any = RunConfig
    for part in loc:
        section = section.model_fields[part].annotation
    return list(section.model_fields)
