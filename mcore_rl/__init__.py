"""RL post-training of mixture-of-experts language models: Megatron-Core trains, vLLM generates."""
