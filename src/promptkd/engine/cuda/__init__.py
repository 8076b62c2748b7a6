"""CUDA: packed rows by varlen attention, fused layers, decoding under CUDA graphs, heads with float32 products."""

from promptkd.engine.base import Engine
from promptkd.engine.cuda.attention import CudaPackedScorer
from promptkd.engine.cuda.decoding import CudaDecoder
from promptkd.engine.cuda.head import CudaHeadBackend
from promptkd.engine.reference import DynamicCacheDecoder, PaddedScorer

_PACKED = CudaPackedScorer(max_tokens=16_384)
_HEAD = CudaHeadBackend()

ENGINE = Engine(
    name="cuda",
    scorers=(CudaPackedScorer(_PACKED.max_tokens, fused=True), _PACKED, PaddedScorer()),
    decoders=(CudaDecoder(_PACKED, _HEAD, fused=True), CudaDecoder(_PACKED, _HEAD, fused=False), DynamicCacheDecoder()),
    head=_HEAD,
    check_every=16,
    decode_rows=128,
    shares_passes=False,
    pass_tokens=8192,
)
