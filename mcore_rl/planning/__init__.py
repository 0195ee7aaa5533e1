"""All that is known of a run before anything is started: its checked plan, warnings, memory, process groups, nodes."""
