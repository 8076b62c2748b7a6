"""Fused operations and attention of rows: against finite differences and plain formulas, in float64."""

from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn.functional import silu
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from promptkd.engine import fused_layers
from promptkd.engine.backbone import AttentionSettings
from promptkd.engine.cpu.scoring import varlen_attention
from promptkd.engine.fused_layers import ApplyRotary, RMSNorm, SwiGLU, rms_norm, rotate, rotation, swiglu
from promptkd.engine.packed import pack_rows

CLOSE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def values(*shape, seed=0, device="cpu"):
    drawn = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return drawn.to(device).requires_grad_()


def gap(got, expected):
    return float((got.detach().double() - expected.detach()).norm() / expected.detach().norm())


def angles_of(heads):
    """Cosines and sines at five positions, longer by 1.3 as YaRN has them, and the angles."""
    angles = values(1, 5, 3, seed=2, device=heads.device).detach().repeat(1, 1, 2)
    made = rotation(lambda *_: (1.3 * angles.cos(), 1.3 * angles.sin()), heads, angles)
    return *(each[0] for each in made), angles


def test_norms(device):
    def norm(x, w):
        return RMSNorm.apply(x, w, 1e-5)

    assert gradcheck(norm, (values(4, 6, device=device), values(6, seed=1, device=device)))
    assert gradcheck(norm, (values(3, 2, 4, device=device), values(4, seed=1, device=device)))  # of heads


def test_rotary_positions(device):
    heads = values(5, 2, 6, device=device)
    cosines, sines, angles = angles_of(heads)
    assert gradcheck(lambda x: ApplyRotary.apply(x, cosines, sines), (heads,))
    (expected, _) = apply_rotary_pos_emb(heads, heads, 1.3 * angles[0].cos(), 1.3 * angles[0].sin())
    torch.testing.assert_close(ApplyRotary.apply(heads, cosines, sines), expected)


def test_gates(device):
    assert gradcheck(SwiGLU.apply, (values(4, 5, device=device), values(4, 5, seed=1, device=device)))


def plain_norm(x, w):
    return w * x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()


def plain_rotation(x, cosines, sines):
    first, second = x.chunk(2, -1)
    return x * cosines + torch.cat([second, first], -1) * sines  # the sines of the first half are negative


def plain_gates(gate, up):
    return silu(gate) * up


def rotary_inputs(device):
    cosines, sines, _ = angles_of(heads := values(5, 2, 6, device=device))
    return heads, cosines.requires_grad_(), sines.requires_grad_()


OPERATIONS = {
    "norm": (
        lambda x, w: RMSNorm.apply(x, w, 1e-5),
        plain_norm,
        lambda device: (values(50, 64, device=device), values(64, seed=1, device=device)),
    ),
    "rotary positions": (ApplyRotary.apply, plain_rotation, rotary_inputs),
    "gates": (SwiGLU.apply, plain_gates, lambda device: (values(50, 64, device=device), values(50, 64, device=device))),
}


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_precision_against_the_formula_in_float64(name, dtype, device):
    """On CUDA the fused operations are compiled, so this holds the compiled forms to plain ones too."""
    fused, plain, inputs = OPERATIONS[name]
    ours = [each.detach().to(dtype).requires_grad_() for each in inputs(device)]
    exact = [each.detach().double().requires_grad_() for each in ours]
    got, expected = fused(*ours), plain(*exact)
    assert got.dtype == dtype
    upstream = values(*got.shape, seed=9, device=device).detach()
    found = torch.autograd.grad(got, ours, upstream.to(dtype), allow_unused=True)
    wanted = torch.autograd.grad(expected, exact, upstream.to(dtype).double())
    for mine, other in [(got, expected), *((a, b) for a, b in zip(found, wanted, strict=True) if a is not None)]:
        assert mine.dtype == dtype
        assert gap(mine, other) < CLOSE[dtype]


COMPILED = {
    "rms_norm": (rms_norm, lambda: (values(5, 8), values(8, seed=1), 1e-5)),
    "to inputs": (
        fused_layers._rms_norm_to_inputs,
        lambda: (values(5, 8), values(5, 8, seed=1), values(8, seed=2), values(5, 1, seed=3)),
    ),
    "rotate": (rotate, lambda: (heads := values(5, 2, 6), *angles_of(heads)[:2])),
    "swiglu": (swiglu, lambda: (values(4, 5), values(4, 5, seed=1))),
    "swiglu, backward": (
        fused_layers._swiglu_backward,
        lambda: (values(4, 5), values(4, 5, seed=1), values(4, 5, seed=2)),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_what_is_compiled_can_be_and_leaves_its_inputs_alone(name):
    """By the compiler's own trace, without its code generator: an operation in place must stay off the inputs."""
    call, inputs = COMPILED[name]
    arguments = [each.detach() if isinstance(each, torch.Tensor) else each for each in inputs()]
    before = [each.clone() if isinstance(each, torch.Tensor) else each for each in arguments]
    plain = call.__wrapped__
    expected, got = (
        plain(*arguments),
        torch.compile(plain, dynamic=True, backend="aot_eager", fullgraph=True)(*arguments),
    )
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for given, kept in zip(arguments, before, strict=True):
        assert not isinstance(given, torch.Tensor) or torch.equal(given, kept)


@pytest.mark.slow
def test_one_variant_is_compiled_for_training_trials_decoding_and_validation(monkeypatch):
    """With and without a graph, in autocast with its cache, without it, and outside."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(fused_layers, "_compiles_for", lambda inputs: True)
    monkeypatch.setattr(fused_layers, "_compiled", cache(partial(torch.compile, dynamic=True, backend=backend)))
    weight = torch.nn.Parameter(torch.rand(8))
    for inputs in (torch.rand(5, 8), torch.rand(7, 8, requires_grad=True), torch.rand(20, 16)[:9, :8].contiguous()):
        for scale in (weight, weight.detach()):
            for mode in (torch.no_grad, torch.enable_grad):
                for settings in ({"enabled": False}, {}, {"cache_enabled": False}):
                    with mode(), torch.autocast("cpu", dtype=torch.bfloat16, **settings):
                        got, _ = fused_layers.rms_norm(inputs, scale, 1e-5)
                    expected, _ = fused_layers.rms_norm.__wrapped__(inputs, scale, 1e-5)
                    assert torch.equal(got, expected)
    assert len(compiled) == 1


ROWS = [[1, 2, 3, 4], [1, 2, 5], [1, 2], [6, 7], [1, 2, 3, 4, 8, 9]]  # one is the beginning of others, one stands alone


def alone(states, path, *, window=None, softcap=None):
    """(1, T, heads, D) of one row by the formula: two heads share keys and values."""
    query, key, value = (each[:, :, path] for each in states)
    scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) / 8**0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    sees = torch.ones(len(path), len(path), dtype=torch.bool).tril()
    sees = sees if window is None else sees & ~torch.ones_like(sees).tril(-window)
    return (scores.masked_fill(~sees, -torch.inf).softmax(-1) @ value.repeat_interleave(2, 1)).transpose(1, 2)


def states_of(pack):
    size = len(pack.tokens)
    return values(1, 4, size, 8), values(1, 2, size, 8, seed=1), values(1, 2, size, 8, seed=2)


def skipping():
    """Rows 1 and 4 share half of their tokens or more, and attend from their own alone."""
    return replace(pack_rows(ROWS, share=True), skips_shared=True)


@pytest.mark.slow
@pytest.mark.parametrize("share", [False, True, "skip"])
def test_attention_of_rows(share):
    pack = skipping() if share == "skip" else pack_rows(ROWS, share=share)
    states, attention = states_of(pack), partial(varlen_attention, pack)
    assert gradcheck(lambda *each: attention(None, *each, AttentionSettings()), states)
    whole = attention(None, *states, AttentionSettings())
    for path in pack.row_indices:
        torch.testing.assert_close(whole[:, path], alone(states, path), rtol=0, atol=1e-12)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("asked", [{"sliding_window": 2}, {"softcap": 0.7}, {"sliding_window": 3, "softcap": 0.7}])
def test_windows_and_soft_caps_of_rows(asked, share):
    pack = pack_rows(ROWS, share=share)
    states, attention = states_of(pack), partial(varlen_attention, pack)
    whole = attention(None, *states, AttentionSettings(**asked))
    window, softcap = asked.get("sliding_window"), asked.get("softcap")
    for path in pack.row_indices:
        expected = alone(states, path, window=window, softcap=softcap)
        torch.testing.assert_close(whole[:, path], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("share", [False, True, "skip"])
def test_attention_of_rows_in_bfloat16(share):
    """Queries and keys come wider than values under autocast; gradients of shared places are summed in float32."""
    pack = skipping() if share == "skip" else pack_rows(ROWS, share=share)
    exact = [each.detach().bfloat16().double().requires_grad_() for each in states_of(pack)]
    types = (torch.float32, torch.float32, torch.bfloat16)
    query, key, value = (each.detach().to(dtype).requires_grad_() for each, dtype in zip(exact, types, strict=True))
    got = varlen_attention(pack, None, query, key, value, AttentionSettings())
    expected = torch.zeros(got.shape, dtype=torch.float64)
    for path in reversed(pack.row_indices):  # what rows share is the same in all
        expected[:, path] = alone(exact, path)
    assert got.dtype == torch.bfloat16
    upstream = values(*got.shape, seed=9).detach().bfloat16()
    found = torch.autograd.grad(got, (query, key, value), upstream)
    wanted = torch.autograd.grad(expected, exact, upstream.double())
    for mine, other in [(got, expected), *zip(found, wanted, strict=True)]:
        assert gap(mine, other) < CLOSE[torch.bfloat16]
