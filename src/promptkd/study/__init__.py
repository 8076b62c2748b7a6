"""Studies: methods x settings x seeds, each run an ordinary command in a process of its own."""
