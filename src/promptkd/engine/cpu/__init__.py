"""CPUs: packed rows by attention row by row, fused layers, decoding with weights laid out anew."""

from promptkd.engine.base import Engine
from promptkd.engine.cpu.attention import CpuPackedScorer
from promptkd.engine.cpu.decoding import CpuDecoder
from promptkd.engine.cpu.head import CpuHeadProducts
from promptkd.engine.fused_layers import FusedScorer
from promptkd.engine.reference import CacheDecoder, PaddedScorer

__all__ = ["ENGINE"]

_PACKED = CpuPackedScorer(longest=2048)  # tokens: more make the matrix products no faster

ENGINE = Engine(
    name="cpu",
    scorers=(FusedScorer(_PACKED), _PACKED, PaddedScorer()),
    decoders=(CpuDecoder(fused=True), CpuDecoder(fused=False), CacheDecoder()),
    head=CpuHeadProducts(),
    check_every=1,
    decode_rows=32,
    shares_passes=True,
    pass_tokens=1536,
)
