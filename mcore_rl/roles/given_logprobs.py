"""Log-probs of the reference for responses that are known before training: computed once, kept on disk.

A file holds the log-probs of all pairs of a data set under one key: weights, tokenizer and template, data, and whatever
decides the last bit of a log-prob. Settings of the algorithm, the optimizer and the seed are not part of it, so a sweep
over them scores once. A file that is found saves loading the reference at all.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mcore_rl.data.sequences import Sequences
from mcore_rl.planning.plan import Plan

TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "chat_template*", "vocab*", "merges.txt")


@dataclass(frozen=True)
class GivenLogprobs:
    """Log-probs of responses, found by the tokens of their sequences.

    Attributes:
        rows: digest of a sequence -> [num_response] float32.
    """

    rows: Mapping[bytes, Tensor]

    def of(self, sequences: Sequences) -> Tensor:
        """[response tokens] of the sequences."""
        found = [self.rows[digest] for digest in digests_of(sequences)]
        return torch.cat(found) if found else torch.zeros(0)


def digests_of(sequences: Sequences) -> list[bytes]:
    """Of every sequence."""
    responses = sequences.columns.num_response.tolist()
    return [digest_of(tokens, n) for tokens, n in zip(sequences.split("token_ids"), responses, strict=True)]


def digest_of(tokens: NDArray[np.int32], num_response: int) -> bytes:
    """16 bytes that name a sequence."""
    content = np.ascontiguousarray(tokens, np.int32).tobytes() + num_response.to_bytes(4, "little")
    return hashlib.blake2b(content, digest_size=16).digest()


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
