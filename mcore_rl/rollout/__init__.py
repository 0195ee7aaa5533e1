"""Generation, rewards and weight updates of the rollout engine."""
