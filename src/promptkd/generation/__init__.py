"""Text from a model: how tokens are sampled, the decode loop, a conversation."""

from promptkd.generation.decode_loop import Mixture, generate
from promptkd.generation.sampling import Decoding, SamplingParams, row_seeds

__all__ = ["Decoding", "Mixture", "SamplingParams", "generate", "row_seeds"]
