"""Devices, layouts and process groups. Import this package before anything that imports `megatron`."""

from mcore_rl.parallel import device

device.install()
