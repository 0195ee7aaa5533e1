"""What the frozen reference says of responses, in whatever layout it has, and how it follows the policy.

Given responses are scored once, kept on disk and read by every later run. A file holds the log-probs of all pairs of a
data set under one key: weights, tokenizer and template, data, and whatever decides the last bit of a log-prob. Settings
of the algorithm, the optimizer and the seed are not part of it, so a sweep over them scores once. A file that is found
saves loading the reference at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mcore_rl.config import due
from mcore_rl.data.packing import Sample
from mcore_rl.model.forward import Policy, forward_only
from mcore_rl.model.offload import in_use
from mcore_rl.parallel.collectives import gather_objects, max_over_ranks, on_rank_0
from mcore_rl.phases import largest, pack_parts, pair_samples, reports
from mcore_rl.policies import load_reference, precomputes_reference
from mcore_rl.run import Plan, Run
from mcore_rl.types import PackedBatch
from mcore_rl.weights.reshard import reshard

PAIRS_AT_ONCE = 512  # whose tensors exist at the same time
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "chat_template*", "vocab*", "merges.txt")


@dataclass(frozen=True)
class GivenLogprobs:
    """Log-probs of responses, found by the tokens of their sequences.

    Attributes:
        rows: digest of a sequence -> [num_response] float32.
    """

    rows: Mapping[bytes, Tensor]

    def of(self, batch: PackedBatch) -> Tensor:
        """[T], 0 where nothing was sampled."""
        out = torch.zeros(batch.token_ids.numel())
        for tokens, places in sequences(batch):
            out[places] = self.rows[digest_of(tokens, len(places))]
        return out.to(batch.token_ids.device)


def sequences(batch: PackedBatch) -> Iterator[tuple[Tensor, Tensor]]:
    """(tokens, places of the response tokens in the batch) of every sequence that has any."""
    token_ids, targets, mask = (x.cpu() for x in (batch.token_ids, batch.targets, batch.loss_mask))
    bounds = batch.cu_seqlens.tolist()
    for a, b in zip(bounds, bounds[1:]):
        places = a + mask[a:b].nonzero()[:, 0]
        if len(places):
            end = int(places[-1]) + 1  # what follows fills the segment up
            yield torch.cat([token_ids[a:end], targets[end - 1 : end]]), places


def digest_of(tokens: Tensor, num_response: int) -> bytes:
    """16 bytes that name a sequence."""
    content = tokens.int().numpy().tobytes() + num_response.to_bytes(4, "little")
    return hashlib.blake2b(content, digest_size=16).digest()


def with_reference(run: Run) -> Run:
    """The run with the reference's log-probs of all its pairs, where they are known before training.

    Raises:
        ValueError: the policy starts as its own reference, and they give other log-probs.
    """
    if precomputes_reference(run.plan.config, run.plan.algorithm):
        started = time.perf_counter()
        description = on_rank_0(run.groups, lambda: describe(run.plan))
        path = cache_file(run.plan, description)
        rows = on_rank_0(run.groups, lambda: read(path))
        how = "read from"
        if rows is None:
            rows, how = score_all(run), "computed and kept in"
            on_rank_0(run.groups, lambda: write(path, rows, description))
        run = replace(run, reference_logprobs=GivenLogprobs(rows))
        if run.log is not None:
            took = time.perf_counter() - started
            print(f"reference log-probs of {len(rows)} responses {how} {path} in {took:.1f} s", flush=True)
    if "pairs" in run.plan.algorithm.needs and run.plan.config.reference.path is None and run.start.step == 0:
        check_start(run)
    return run


def check_start(run: Run) -> None:
    """Policy and reference are one model before the first step, so every margin must be exactly 0."""
    (batches,) = pack_parts(run, [held_out_samples(run)])
    policy = [o.logprobs for o in forward_only(run.policy, batches)]
    reference = reference_logprobs(run, batches)
    worst = max_over_ranks(run.groups, largest([p - r for p, r in zip(policy, reference)]) if reports(run) else 0.0)
    limit = run.plan.config.reference.max_logprob_diff
    if not worst <= limit:
        raise ValueError(
            "the policy starts as its reference, but their log-probs of the held-out pairs differ by up to "
            f"{worst:.3g}; allowed is reference.max_logprob_diff={limit:g}. Kernels that are not deterministic do so, "
            "and other layouts: raise it to what they may do. If the policy is meant to start elsewhere, name the "
            "reference in reference.path"
        )


def held_out_samples(run: Run) -> list[Sample]:
    """Of the pairs that `evaluate` takes, each sequence once."""
    pairs = run.plan.task.eval_pairs(run.plan.config.evaluate.prompts)
    return list(dict.fromkeys(sample for pair in pairs for sample in pair_samples(pair)))


def reference_logprobs(run: Run, batches: list[PackedBatch]) -> list[Tensor]:
    """[T] of each of this rank's batches; an empty list where there is no reference, or another stage knows them."""
    reference = run.reference
    if run.reference_logprobs is not None:
        return [run.reference_logprobs.of(b) for b in batches]
    if reference is None:
        return []
    if reference.groups is run.groups:
        return [o.logprobs for o in forward_only(reference, batches)]
    mine = [(tokens.tolist(), len(places)) for b in batches for tokens, places in sequences(b)]
    everyone = gather_objects(run.groups, mine if reports(run) else [])
    samples = [Sample(tuple(tokens), n, 0.0, (0.0,) * n) for part in everyone for tokens, n in part]
    given = GivenLogprobs(score(run, reference, samples))
    return [given.of(b) for b in batches]


def score(run: Run, policy: Policy, samples: list[Sample]) -> dict[bytes, Tensor]:
    """Log-probs of all samples by their digests, on every rank, from a policy in any layout of the run's ranks."""
    (batches,) = pack_parts(run, [samples], groups=policy.groups)
    mine: dict[bytes, Tensor] = {}
    for batch, out in zip(batches, forward_only(policy, batches)):
        logprobs = out.logprobs.cpu()
        mine |= {digest_of(tokens, len(places)): logprobs[places].clone() for tokens, places in sequences(batch)}
    rows: dict[bytes, Tensor] = {}
    for found in gather_objects(run.groups, mine if policy.groups.reports else {}):
        rows |= found
    return rows


def update_reference(run: Run, step: int) -> None:
    """Let the reference become the policy after `step` training steps, where that is due; collective."""
    if run.reference is not None and due(run.plan.config.reference.update_every, step):
        with in_use(run.reference.host, change=True):
            reshard(run.plan.hf_config, run.policy, run.reference)


def score_all(run: Run) -> dict[bytes, Tensor]:
    """Load the reference, score every pair, drop it; the same result on every rank."""
    policy = load_reference(run.plan, run.groups)
    pairs = run.plan.task.train_pairs()
    parts = [pairs[i : i + PAIRS_AT_ONCE] for i in range(0, len(pairs), PAIRS_AT_ONCE)]
    # packed as `check_start` packs them, and last, so that theirs are the numbers it sees
    samples = [[s for pair in part for s in pair_samples(pair)] for part in parts] + [held_out_samples(run)]
    rows: dict[bytes, Tensor] = {}
    for part in samples:
        rows |= score(run, policy, part)
    return rows


def describe(plan: Plan) -> dict[str, str]:
    """What the log-probs are a function of, as hashes and words."""
    config = plan.config
    folder, own = Path(config.reference.path or config.model.path), config.reference.parallel
    tokenizer = [f for pattern in TOKENIZER_FILES for f in Path(config.model.path).glob(pattern)]
    pairs = [*plan.task.train_pairs(), *plan.task.eval_pairs(config.evaluate.prompts)]
    arithmetic = {
        "dtype": config.model.dtype,
        "spec": config.model.spec,
        "layout": vars(plan.layout) | ({"reference": own.model_dump()} if own else {}),
        "tokens": (config.batch.micro_batch_tokens, config.batch.logprob_chunk_tokens),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "megatron-core")},
    }
    return {
        "weights": hash_files([folder / "config.json", *folder.glob("*.safetensors")]),
        "tokenizer": hash_files(tokenizer) + hash_text(str(plan.tokenizer.chat_template)),
        "data": hash_text(json.dumps(pairs)),
        "arithmetic": json.dumps(arithmetic, sort_keys=True),
    }


def cache_file(plan: Plan, description: Mapping[str, str]) -> Path:
    """Where the log-probs of a description are, or will be."""
    config = plan.config
    folder = Path(config.reference.cache_dir or Path(config.output_dir) / "reference_logprobs")
    return folder / f"{hash_text(json.dumps(description, sort_keys=True))[:24]}.safetensors"


def hash_files(files: Iterable[Path]) -> str:
    """Of names and contents."""
    whole = hashlib.sha256()
    for file in sorted(files):
        with file.open("rb") as content:
            whole.update(file.name.encode() + hashlib.file_digest(content, "sha256").digest())
    return whole.hexdigest()


def hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write(path: Path, rows: Mapping[bytes, Tensor], description: Mapping[str, str]) -> None:
    """Written beside and renamed. A folder that cannot be written costs the next run its time, and is told."""
    tensors = {
        "digests": torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).view(-1, 16),
        "lengths": torch.tensor([len(row) for row in rows.values()]),
        "logprobs": torch.cat(list(rows.values())),
    }
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(save(tensors, {**description, "checksum": checksum(tensors)}))
        partial.rename(path)
    except OSError as error:
        print(f"warning: the reference log-probs cannot be kept in {path}: {error.strerror}", flush=True)


def read(path: Path) -> dict[bytes, Tensor] | None:
    """What `write` wrote; None where there is no file, or a damaged one, which is told."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}
            intact = (file.metadata() or {}).get("checksum") == checksum(tensors)
    except (OSError, SafetensorError) as error:
        intact = False
        print(f"{path}: {error}", flush=True)
    if not intact:
        print(f"warning: {path} is damaged; the reference log-probs are computed again", flush=True)
        return None
    digests = [bytes(row.tolist()) for row in tensors["digests"]]
    return dict(zip(digests, tensors["logprobs"].split(tensors["lengths"].tolist()), strict=True))


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Of the contents in the order of their names."""
    whole = hashlib.sha256()
    for name in sorted(tensors):
        whole.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return whole.hexdigest()
