"""Tiny models, trainers, servers and records that several test files share."""
