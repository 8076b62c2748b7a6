"""Text from a model: how tokens are sampled, the decode loop, a conversation."""

from promptkd.generation.decode_loop import Mixture, generate
from promptkd.generation.sampling import Decoding, SamplingParams, row_seeds
from promptkd.generation.speculative import Corrected, generate_corrected

__all__ = ["Corrected", "Decoding", "Mixture", "SamplingParams", "generate", "generate_corrected", "row_seeds"]
