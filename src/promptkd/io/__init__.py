"""Reading and writing on the disk: regular files alone, atomic writes, resumable JSONL, locks, redaction."""
