"""The policy under Megatron-Core."""

import mcore_rl.parallel  # noqa: F401  installs the CPU backend before a module of this package imports megatron
