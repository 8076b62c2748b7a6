"""The hand-written backwards of lean layers against finite differences, in float64."""

import pytest
import torch
from torch.autograd import gradcheck
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from promptkd.data.prefixes import pack_rows
from promptkd.models.lean_layers import _Gated, _Normed, _Turned, rotation
from promptkd.models.row_attention import row_attention


def values(*shape, seed=0):
    drawn = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return drawn.requires_grad_()


def test_norms():
    assert gradcheck(lambda x, w: _Normed.apply(x, w, 1e-5), (values(4, 6), values(6, seed=1)))
    assert gradcheck(lambda x, w: _Normed.apply(x, w, 1e-5), (values(3, 2, 4), values(4, seed=1)))  # of heads


def test_rotary_positions():
    angles = values(1, 5, 3, seed=2).detach().repeat(1, 1, 2)
    heads = values(5, 2, 6)
    cosines, sines = (each[0] for each in rotation(lambda *_: (1.3 * angles.cos(), 1.3 * angles.sin()), heads, angles))
    assert gradcheck(lambda x: _Turned.apply(x, cosines, sines), (heads,))
    (expected, _) = apply_rotary_pos_emb(heads, heads, 1.3 * angles[0].cos(), 1.3 * angles[0].sin())
    torch.testing.assert_close(_Turned.apply(heads, cosines, sines), expected)


def test_gates():
    assert gradcheck(_Gated.apply, (values(4, 5), values(4, 5, seed=1)))


ROWS = [[1, 2, 3, 4], [1, 2, 5], [1, 2], [6, 7], [1, 2, 3, 4, 8, 9]]  # one is the beginning of others, one stands alone


@pytest.mark.parametrize("share", [False, True])
def test_attention_of_rows(share):
    pack = pack_rows(ROWS, share=share)
    size = len(pack.tokens)
    states = (values(1, 4, size, 8), values(1, 2, size, 8, seed=1), values(1, 2, size, 8, seed=2))
    assert gradcheck(lambda *each: row_attention(*each, pack), states)
    whole = row_attention(*states, pack)
    for path in pack.paths:
        query, key, value = (each[:, :, path] for each in states)
        scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) / 8**0.5
        future = torch.ones(len(path), len(path), dtype=torch.bool).triu(1)
        alone = scores.masked_fill(future, -torch.inf).softmax(-1) @ value.repeat_interleave(2, 1)
        torch.testing.assert_close(whole[:, path], alone.transpose(1, 2), rtol=0, atol=1e-12)
