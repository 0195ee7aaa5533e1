"""python -m tools.megatron_to_hf CHECKPOINT OUT: as `mcore-rl convert --to hf`."""

import sys

from mcore_rl.cli import main

if __name__ == "__main__":
    main(["convert", "--to", "hf", *sys.argv[1:]])
