"""What a run needs before it is started: parameters, memory, process groups. Integers only; nothing is allocated."""
