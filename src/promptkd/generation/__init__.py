"""Text from a model: how tokens are sampled, the decode loop, a conversation."""

from promptkd.generation.decode_loop import generate
from promptkd.generation.sampling import Decoding, SamplingParams, row_seeds

__all__ = ["Decoding", "SamplingParams", "generate", "row_seeds"]
