"""Write held-out prompts of a task with their answers, for moe-stability.

python -m tools.demo_prompts MODEL [--n 768] [--seed 0] [--out prompts.jsonl]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="HF folder of the demo, for its tokenizer")
    parser.add_argument("--n", type=int, default=768)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("prompts.jsonl"))
    args = parser.parse_args()

    from transformers import AutoTokenizer

    from mcore_rl.data.tasks import DigitSort

    task = DigitSort(AutoTokenizer.from_pretrained(args.model), args.seed, limit=None)
    rows = [{"prompt": p.text, "answer": f"#{p.answer}"} for p in task.eval_prompts(args.n)]
    args.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{args.out}: {len(rows)} prompts")


if __name__ == "__main__":
    main()
