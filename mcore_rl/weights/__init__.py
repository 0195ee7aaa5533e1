"""Weights as shards: one table a model family serves loading, saving, converting, resharding and syncing."""
