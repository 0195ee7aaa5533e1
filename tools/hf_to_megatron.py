"""python -m tools.hf_to_megatron SOURCE OUT --tp 2 --pp 2 --ep 2 --etp 1: as `mcore-rl convert --to megatron`.

SOURCE is a Hugging Face folder, or a Megatron checkpoint that is to be cut in another way.
"""

import sys

from mcore_rl.cli import main

if __name__ == "__main__":
    main(["convert", "--to", "megatron", *sys.argv[1:]])
