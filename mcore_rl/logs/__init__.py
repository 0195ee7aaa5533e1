"""What a run leaves to read: metrics, memory, the report."""
