"""Weights into rollout engines, and the checks that they arrived."""
