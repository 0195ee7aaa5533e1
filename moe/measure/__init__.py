"""From traces and log-probs to numbers with intervals."""
