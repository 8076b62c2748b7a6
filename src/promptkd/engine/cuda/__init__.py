"""CUDA: packed rows by varlen attention, fused layers, decoding under CUDA graphs, heads with float32 products."""

from promptkd.engine.base import Engine
from promptkd.engine.cuda.decoding import CudaDecoder
from promptkd.engine.cuda.scoring import HEAD, CudaPackedScorer
from promptkd.engine.reference import DECODERS, SCORERS

_MAX_TOKENS = 16_384

ENGINE = Engine(
    name="cuda",
    scorers=(CudaPackedScorer(_MAX_TOKENS, fused=True), CudaPackedScorer(_MAX_TOKENS), *SCORERS),
    decoders=(CudaDecoder(fused=True), CudaDecoder(fused=False), *DECODERS),
    head=HEAD,
    check_every=16,
    decode_rows=128,
    pass_tokens=8192,
)
