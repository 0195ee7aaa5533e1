"""python -m mcore_rl.cli: as `mcore-rl`."""

from mcore_rl.cli import main

main()
