"""python tools/moe_stability.py COMMAND ...: as `moe-stability COMMAND ...`."""

from mcore_rl.cli.stability import main

if __name__ == "__main__":
    main()
