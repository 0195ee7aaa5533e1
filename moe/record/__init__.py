"""Which experts a model takes: traces, and how they are read off transformers, Megatron and vLLM."""
