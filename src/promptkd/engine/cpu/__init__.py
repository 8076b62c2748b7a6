"""CPU: packed rows attended to one by one, fused layers, decoding with weights reordered for oneDNN."""

from promptkd.engine.base import Engine
from promptkd.engine.cpu.decoding import CpuDecoder
from promptkd.engine.cpu.scoring import HEAD, CpuPackedScorer
from promptkd.engine.reference import DECODERS, SCORERS

_MAX_TOKENS = 2048  # beyond, matrix products get no faster

ENGINE = Engine(
    name="cpu",
    scorers=(CpuPackedScorer(_MAX_TOKENS, fused=True), CpuPackedScorer(_MAX_TOKENS), *SCORERS),
    decoders=(CpuDecoder(fused=True), CpuDecoder(fused=False), *DECODERS),
    head=HEAD,
    shares_passes=True,
    pass_tokens=1536,
)
