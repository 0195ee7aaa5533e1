"""Prompts, examples and preferences; sequences as arrays, packed into micro-batches."""
