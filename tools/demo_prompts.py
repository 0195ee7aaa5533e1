"""Write held-out prompts of a task for moe-stability; those of digit_sort with their answers, so that it has rewards.

python -m tools.demo_prompts MODEL [--task digit_sort] [--n 768] [--seed 0] [--out prompts.jsonl]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="HF folder, for its tokenizer")
    parser.add_argument("--task", default="digit_sort", help="or reasoning_gym/NAME")
    parser.add_argument("--n", type=int, default=768)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("prompts.jsonl"))
    args = parser.parse_args()

    from transformers import AutoTokenizer

    from mcore_rl.config import DataConfig
    from mcore_rl.data.tasks import build_task

    task = build_task(DataConfig(task=args.task), AutoTokenizer.from_pretrained(args.model), args.seed)
    prompts = task.eval_prompts(args.n)
    answers = [{"answer": f"#{p.answer}"} if args.task == "digit_sort" else {} for p in prompts]
    rows = [{"prompt": p.text} | answer for p, answer in zip(prompts, answers, strict=True)]
    args.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{args.out}: {len(rows)} prompts")


if __name__ == "__main__":
    main()
