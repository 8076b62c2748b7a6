"""The options of each command, without an import of what the command runs: its help reads nothing else."""
