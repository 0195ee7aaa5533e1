"""One rank of test_hf_logits.py: arguments are a scratch folder and a JSON list of [HF folder, layout, free port].

Prints a line {"layout", "weights", "max_diff"} for the weights from HF files and, where the entry before has the same
folder, for those from the checkpoint that its layout has written.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM

from mcore_rl.config import ModelConfig
from mcore_rl.model.build import build_model, read_hf_config
from mcore_rl.model.heads import PolicyModel
from mcore_rl.parallel import groups
from mcore_rl.parallel.groups import Groups
from mcore_rl.parallel.layout import ParallelLayout
from mcore_rl.weights.hf_read import load_hf
from mcore_rl.weights.shards import megatron_shards

# after mcore_rl.parallel, which installs the CPU backend
from megatron.core import dist_checkpointing  # isort: skip
from megatron.core.packed_seq_params import PackedSeqParams  # isort: skip
from megatron.core.pipeline_parallel import get_forward_backward_func  # isort: skip

LENGTH, SEQUENCES = 32, 2


def held(x: Tensor, at: Groups) -> Tensor:
    """x [b, s], or under context parallelism, where sequences must be packed, this rank's tokens of them, [1, b*s/cp]:
    chunks r and 2*cp-1-r of each."""
    if at.layout.cp == 1:
        return x
    chunks = x.chunk(2 * at.layout.cp, dim=1)
    return torch.cat([chunks[at.coords.cp], chunks[-1 - at.coords.cp]], dim=1).flatten(0, 1)[None]


def all_gather(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim)


@torch.no_grad()
def max_difference(chunks: list[PolicyModel], at: Groups, ids: Tensor, expected: Tensor) -> float | None:
    """Of the logits to transformers' on the last stage, None elsewhere."""
    positions = torch.arange(LENGTH).expand(SEQUENCES, -1)
    local = [held(x, at) for x in (ids, positions)]
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=torch.arange(SEQUENCES + 1) * LENGTH,
        cu_seqlens_kv=torch.arange(SEQUENCES + 1) * LENGTH,
        max_seqlen_q=LENGTH,
        max_seqlen_kv=LENGTH,
    )
    found = []

    def collect(model: PolicyModel, hidden: Tensor):
        if at.layout.tp > 1:
            hidden = all_gather(hidden, at.tp, dim=0)
        logits = (hidden @ model.output_weight().T).transpose(0, 1)
        logits = all_gather(logits, at.tp, dim=2) if at.layout.tp > 1 else logits
        found.append((logits[..., :97] - held(expected, at)).abs().max().item())
        padding = model.output_weight()[97 - at.coords.tp * model.output_weight().shape[0] :]
        assert not padding.any(), "rows that pad the vocabulary must be zero"
        return logits.new_zeros(()), {}

    def step(batches, model: PolicyModel):
        hidden = model(*next(batches), packed_seq_params=packed if at.layout.cp > 1 else None)
        return hidden, lambda hidden: collect(model, hidden)

    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter([local] * 2) for _ in chunks] if len(chunks) > 1 else iter([local] * 2),
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=2,
        seq_length=LENGTH if at.layout.cp == 1 else LENGTH * SEQUENCES,
        micro_batch_size=SEQUENCES if at.layout.cp == 1 else 1,
        forward_only=True,
    )
    return max(found, default=None)


def state(chunks: list[PolicyModel], at: Groups) -> dict:
    metadata = {"dp_cp_group": at.dp_cp, "singleton_local_shards": False}
    return {f"chunk{i}": chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(chunks)}


def report(at: Groups, weights: str, difference: float | None) -> None:
    values = [None] * at.world_size
    dist.all_gather_object(values, difference)
    if at.rank == 0:
        largest = max(value for value in values if value is not None)
        print(json.dumps({"layout": vars(at.layout), "weights": weights, "max_diff": largest}))


def run(path: Path, at: Groups, load_from: Path | None, save_to: Path) -> None:
    hf_config = read_hf_config(path)
    ids = torch.randint(0, 97, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))
    expected = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits.detach()
    if load_from:
        chunks = build_model(hf_config, ModelConfig(path=str(path)), at)
        loaded = dist_checkpointing.load(state(chunks, at), str(load_from))
        for key, chunk in zip(loaded, chunks, strict=True):
            chunk.load_state_dict(loaded[key])
        report(at, "checkpoint", max_difference(chunks, at, ids, expected))
    chunks = build_model(hf_config, ModelConfig(path=str(path)), at)
    load_hf(path, megatron_shards(chunks, hf_config, at))
    report(at, "hf", max_difference(chunks, at, ids, expected))
    if at.rank == 0:
        save_to.mkdir()
    dist.barrier()
    dist_checkpointing.save(state(chunks, at), str(save_to))
    dist.barrier()


def main(scratch: Path, jobs: list[tuple[str, dict, int]]) -> None:
    # torchrun's store remembers a first world; a store of its own lets one process make several, one after another.
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    for i, (path, layout, port) in enumerate(jobs):
        os.environ["MASTER_PORT"] = str(port)
        at = groups.init(ParallelLayout(**layout), timeout_s=60, seed=0)
        run(Path(path), at, scratch / str(i - 1) if i and jobs[i - 1][0] == path else None, scratch / str(i))
        groups.destroy()


if __name__ == "__main__":
    faulthandler.dump_traceback_later(600, exit=True)
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
