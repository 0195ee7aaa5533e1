"""What every command measures, without its command line."""
