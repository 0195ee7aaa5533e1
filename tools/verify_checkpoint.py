"""python -m tools.verify_checkpoint A B: as `mcore-rl verify`. Exit code 0: the same, 1: not, 2: not comparable."""

import sys

from mcore_rl.cli import main

if __name__ == "__main__":
    main(["verify", *sys.argv[1:]])
