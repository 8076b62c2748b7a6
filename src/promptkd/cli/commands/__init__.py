"""The commands themselves: `run` of each."""
