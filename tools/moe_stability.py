"""python -m tools.moe_stability COMMAND ...: as `moe-stability COMMAND ...`."""

from mcore_rl.cli.stability import main

if __name__ == "__main__":
    main()
