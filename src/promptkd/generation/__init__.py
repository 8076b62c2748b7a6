"""Text from a model: the decode loop, which token follows, one response as it is written, a conversation."""

from promptkd.generation.decode_loop import generate, row_seeds

__all__ = ["generate", "row_seeds"]
