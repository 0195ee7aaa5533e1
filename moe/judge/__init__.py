"""What the numbers allow to be said."""
