"""One training step, a file a phase; `mcore_rl.train` calls them in their order."""
