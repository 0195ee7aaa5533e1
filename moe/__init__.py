"""Measures what the router of a mixture-of-experts model does to importance ratios; imports nothing of mcore_rl."""
