"""CUDA: packed rows by varlen attention, fused layers, decoding under CUDA graphs, heads multiplied into float32."""

from promptkd.engine.base import Engine
from promptkd.engine.cuda.attention import CudaPackedScorer
from promptkd.engine.cuda.decoding import CudaDecoder
from promptkd.engine.cuda.head import CudaHeadProducts
from promptkd.engine.fused_layers import FusedScorer
from promptkd.engine.reference import CacheDecoder, PaddedScorer

__all__ = ["ENGINE"]

_PACKED = CudaPackedScorer(longest=16_384)
_HEAD = CudaHeadProducts()

ENGINE = Engine(
    name="cuda",
    scorers=(FusedScorer(_PACKED), _PACKED, PaddedScorer()),
    decoders=(CudaDecoder(_PACKED, _HEAD, fused=True), CudaDecoder(_PACKED, _HEAD, fused=False), CacheDecoder()),
    head=_HEAD,
    check_every=16,
    decode_rows=128,
    shares_passes=False,
    pass_tokens=8192,
)
