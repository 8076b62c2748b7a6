"""The CUDA engine's own code, held to the reference on CPU: what CUDA alone can do is replaced by ten lines each.

Varlen attention becomes a loop over rows, products of half precision with float32 sums become float32 products, and a
graph is called instead of replayed. On a machine with CUDA, tests/test_engines.py and tests/test_decoding.py run the
real things.
"""

import gc
import inspect
from importlib import reload

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from promptkd.data.packing import right_pad
from promptkd.engine import Head, chunked_objective, chunked_prompt_loss, compute_dtype
from promptkd.engine.chunked_loss import chunked_cross_entropy
from promptkd.engine.cuda import ENGINE, attention, decoding, head
from promptkd.engine.reference import CacheDecoder, PaddedScorer
from promptkd.engine.verify import first_verified
from promptkd.evaluation import generate
from promptkd.objectives import reverse_kl
from tiny import tiny_model

PROMPTS = ([5, 9, 11, 2, 40, 7, 7, 30, 12, 1], [3], [5, 9, 4, 60], [8, 8])
FUSED, ROWS, _ = ENGINE.decoders
FUSED_LAYERS, PACKED, _ = ENGINE.scorers
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 4, "head_dim": 8},
    "gpt2": {},
    "opt": {},
    "gemma": {},
}
LLAMAS = ("llama", "qwen2", "qwen3", "mistral")


def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """As torch's for CUDA: (S, heads, D), key and value with fewer heads; a window counts the tokens before."""
    outputs = []
    for start, end in zip(cu_seq_q.tolist(), cu_seq_q.tolist()[1:], strict=False):
        q, k, v = (each[start:end].transpose(0, 1) for each in (query, key, value))
        seen = torch.ones(end - start, end - start, dtype=torch.bool).tril()
        if window_size[0] >= 0:
            seen = seen.triu(-window_size[0])
        outputs.append(scaled_dot_product_attention(q[None], k[None], v[None], seen, scale=scale, enable_gqa=True)[0])
    return torch.cat([each.transpose(0, 1) for each in outputs])


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    wide = {torch.float32, torch.float64, torch.bfloat16}
    monkeypatch.setattr(attention.varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(attention, "_GROUPED", {})
    monkeypatch.setattr(attention, "_PRECISIONS", wide)
    monkeypatch.setattr(head, "_product", lambda left, right: left.float() @ right.float())


@pytest.fixture
def as_cuda(monkeypatch):
    """Everything on CPU is run by the CUDA engine."""
    monkeypatch.setattr("promptkd.engine.resolve._of_kind", lambda kind: ENGINE)
    monkeypatch.setattr(head, "find_spec", lambda name: None)  # the kernels have tests of their own


def models(architecture, **settings):
    return tiny_model(architecture, **FAMILIES[architecture], **settings)


def batch_of(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def tokens(least, most):
        length = int(torch.randint(least, most + 1, (), generator=generator))
        return torch.randint(0, 97, (length,), generator=generator).tolist()

    return right_pad([tokens(1, 13) for _ in range(5)], [tokens(0, 9) for _ in range(5)])


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("length", [0, 3])
def test_packed_rows_equal_padded_ones_and_so_do_their_gradients(architecture, length):
    model, batch = models(architecture), batch_of()
    width = model.get_input_embeddings().weight.shape[1]
    prompt = torch.randn(length, width, generator=torch.Generator().manual_seed(1), requires_grad=True)
    learned = [*model.base_model.parameters(), *([prompt] if length else [])]
    found = []
    for scorer in (PaddedScorer(), PACKED, *([FUSED_LAYERS] if architecture in LLAMAS else [])):
        assert scorer.supports(model)
        hidden = scorer.hidden(model, batch, prompt if length else None)
        gradients = torch.autograd.grad(hidden.square().sum(), learned, allow_unused=True)
        found.append([hidden.detach(), torch.cat([each.flatten() for each in gradients if each is not None])])
    for got in found[1:]:
        for mine, expected in zip(got, found[0], strict=True):
            assert float((mine - expected).norm() / expected.norm()) < 1e-5


def decoded(decoder, model, soft_prompt=None, vocabulary=None):
    """Logits over six steps, the second row leaving after the third."""
    steps = torch.tensor(
        [[10, 20, 30, 7], [31, 21, 11, 8], [12, 22, 32, 9], [13, 33, 34, 0], [1, 2, 3, 0], [4, 5, 6, 0]]
    )
    with torch.no_grad(), decoder.opened(model, 4, vocabulary) as sessions, sessions(7) as session:
        logits = [session.prefill(PROMPTS, soft_prompt).clone()]
        for step, tokens in enumerate(steps):
            if step == 3:
                session.select([0, 3, 2])
            logits.append(session.decode(tokens[: 4 if step < 3 else 3]).clone())
    return torch.cat(logits)


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("length", [0, 3])
@pytest.mark.parametrize("decoder", [FUSED, ROWS], ids=["fused", "rows"])
def test_decoding_equals_the_reference(architecture, length, decoder, monkeypatch):
    monkeypatch.setattr(decoding, "_SPAN", 8)  # several spans
    monkeypatch.setattr(decoding, "_PROMPT_COLUMNS", 4)
    model = models(architecture)
    if decoder is FUSED and architecture not in LLAMAS:
        assert not decoder.supports(model)
        return
    soft_prompt = model.get_input_embeddings()(torch.arange(40, 40 + length)).detach() if length else None
    for _ in range(2):  # what the first decode leaves in the store is no matter to the second
        got = decoded(decoder, model, soft_prompt, vocabulary=90)
        expected = decoded(CacheDecoder(), model, soft_prompt, vocabulary=90)
        assert got.shape == expected.shape == (4 * 4 + 3 * 3, 90)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("decoder", [FUSED, ROWS], ids=["fused", "rows"])
def test_weights_are_taken_anew_when_decoding_opens(decoder):
    """A store lives as long as its model; with the weights of an earlier step it would decode another student."""
    model = tiny_model("llama")
    before, _ = both_in_bfloat16(decoder, model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1)
    got, expected = both_in_bfloat16(decoder, model)
    assert (got - before).abs().max() > 0.5
    assert float((got - expected).norm() / expected.norm()) < 0.05
    layer = model.model.layers[1].mlp.up_proj
    layer.weight.data = 2 * layer.weight.data  # at another address
    got, expected = both_in_bfloat16(decoder, model)
    assert float((got - expected).norm() / expected.norm()) < 0.05


def both_in_bfloat16(decoder, model):
    """Under autocast, so that weights are copied."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return decoded(decoder, model), decoded(CacheDecoder(), model)


def test_a_store_grows_and_is_emptied():
    """A NaN that an earlier decode has left would pass through a weight of 0."""
    model = tiny_model("llama")
    decoded(FUSED, model)
    store = FUSED._stores[model]
    for layer in store.layers.values():
        layer.keys.fill_(torch.nan)
        layer.values.fill_(torch.nan)
    assert decoded(FUSED, model).isfinite().all()
    with torch.no_grad(), FUSED.opened(model, 9, None) as sessions, sessions(300) as session:
        logits = session.prefill([[1, 2]] * 9)
    assert (store.rows, store.columns) == (16, 384)
    assert torch.allclose(logits[0], logits[8])


def test_a_model_is_let_go_with_its_store():
    model = tiny_model("llama")
    decoded(FUSED, model)
    decoded(ROWS, model)
    gc.collect()
    before = len(FUSED._stores), len(ROWS._stores)
    del model
    gc.collect()
    assert (len(FUSED._stores), len(ROWS._stores)) == (before[0] - 1, before[1] - 1)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_generate_writes_what_the_reference_writes(architecture, as_cuda, monkeypatch):
    """Rows end at different tokens, between two looks; what they write until they leave is dropped."""
    model = models(architecture)
    settings = {"max_new_tokens": [40, 3, 20, 35], "stop_ids": [7, 30], "seeds": [1, 2, 3, 4]}
    got = generate(model, PROMPTS, **settings)
    greedy = generate(model, PROMPTS, **settings, temperature=0)
    monkeypatch.setenv("PROMPTKD_ENGINE", "reference")
    assert got == generate(model, PROMPTS, **settings)
    assert greedy == generate(model, PROMPTS, **settings, temperature=0)
    assert {len(each) for each in got} != {40, 3, 20, 35}  # some ended by themselves


def test_the_engine_is_trusted_after_its_trial():
    """And in float16 or bfloat16 alone, soft caps and dropout excepted."""
    assert first_verified(ENGINE.scorers, tiny_model("llama")) is FUSED_LAYERS
    assert first_verified(ENGINE.scorers, tiny_model("gpt2")) is PACKED
    assert first_verified(ENGINE.scorers, tiny_model("gemma2")) is ENGINE.scorers[-1]
    assert first_verified(ENGINE.decoders, tiny_model("llama")) is FUSED
    assert first_verified(ENGINE.decoders, tiny_model("opt")) is ROWS
    assert first_verified(ENGINE.decoders, tiny_model("gemma2")) is ENGINE.decoders[-1]
    assert not PACKED.supports(tiny_model("gpt2", dropout=0.1).train())


def test_float32_stays_with_the_reference(monkeypatch):
    monkeypatch.setattr(attention, "_PRECISIONS", {torch.bfloat16, torch.float16})
    model = tiny_model("llama")
    assert not PACKED.supports(model)
    assert not FUSED.supports(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compute_dtype(model) == torch.bfloat16
        assert PACKED.supports(model)
        assert FUSED.supports(model)


def test_varlen_attention_is_called_as_torch_has_it():
    """The names that are passed by keyword, against the installed torch; before 2.12 there is no `enable_gqa`."""
    real = inspect.signature(reload(attention.varlen).varlen_attn).parameters
    assert [*real][:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"scale", "window_size"} <= real.keys()


# --------------------------------------------------------------------------------------------------- heads and losses


def heads(vocabulary, *, dtype, biased=False, softcap=None, scale=1.0, rows=None):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows or vocabulary, 24, generator=generator)
    bias = torch.randn(rows or vocabulary, generator=generator) if biased else None
    return Head(weight.to(dtype), bias, scale, softcap, columns=vocabulary)


@pytest.mark.parametrize("vocabulary", [97, 128])
@pytest.mark.parametrize("rows", [None, 160])
@pytest.mark.parametrize("settings", [{}, {"biased": True, "softcap": 9.0, "scale": 0.7}])
def test_losses_of_half_precision_heads_round_factors_alone(vocabulary, rows, settings, as_cuda):
    """Against float32 losses of the same rounded factors: rounded logits would be off by 1e-2."""
    generator = torch.Generator().manual_seed(1)
    ours = heads(vocabulary, dtype=torch.float32, rows=rows, **settings)
    theirs = heads(vocabulary, dtype=torch.bfloat16, rows=rows, **settings)
    weight = ours.weight.clone().requires_grad_()
    bias = None if ours.bias is None else ours.bias.clone().requires_grad_()
    learner = Head(weight, bias, ours.scale, ours.softcap, ours.columns)
    hidden = torch.randn(11, 24, generator=generator).requires_grad_()
    other = torch.randn(11, 24, generator=generator).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = chunked_objective(reverse_kl, hidden, learner, other, theirs, chunk=4).total
    learned = [hidden, weight, *([] if bias is None else [bias])]
    got = torch.autograd.grad(loss, learned)

    rounded = [each.detach().bfloat16().float().requires_grad_() for each in (hidden, weight)]
    plain = torch.nn.functional.linear(*rounded)[:, :vocabulary]
    wide_bias = None if bias is None else bias.detach().clone().requires_grad_()
    if wide_bias is not None:
        plain = plain + wide_bias[:vocabulary]

    def transformed(products):
        products = products * ours.scale
        return products if ours.softcap is None else torch.tanh(products / ours.softcap) * ours.softcap

    target = torch.nn.functional.linear(other.float(), theirs.weight.float())[:, :vocabulary]
    if theirs.bias is not None:
        target = target + theirs.bias.float()[:vocabulary]
    expected = reverse_kl(transformed(plain), transformed(target)).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(expected, [*rounded, *([] if wide_bias is None else [wide_bias])])
    for mine, other in zip(got, gradients, strict=True):
        assert mine.dtype == torch.float32
        assert float((mine - other).norm() / other.norm()) < 1e-2


def test_a_heads_cast_follows_its_weight_in_place(as_cuda):
    """CUDA graphs read the cast at its address; an old cast would sample from an earlier student."""
    weight = torch.randn(100, 24)
    projection = ENGINE.head.projection(Head(weight), torch.bfloat16)
    address = projection.weight.data_ptr()
    weight.mul_(2)
    again = ENGINE.head.projection(Head(weight), torch.bfloat16)
    assert again.weight.data_ptr() == address
    assert torch.equal(again.weight[:100], weight.bfloat16())
    assert again.weight.shape == (128, 24)


def test_one_cast_serves_every_vocabulary(as_cuda):
    """A graph of one vocabulary would read freed memory if another vocabulary made a new cast."""
    weight = torch.randn(100, 24)
    address = ENGINE.head.projection(Head(weight, columns=70), torch.bfloat16).weight.data_ptr()
    for columns in (100, 30, 70):
        again = ENGINE.head.projection(Head(weight, columns=columns), torch.bfloat16)
        assert again.weight.data_ptr() == address
        assert torch.equal(again.weight[:columns], weight[:columns].bfloat16())


def test_a_bias_in_half_precision_is_cast_into_the_same_memory(as_cuda):
    """CUDA graphs read it long after the projection that they were captured with is gone."""
    weight, bias = torch.randn(100, 24).bfloat16(), torch.randn(100).bfloat16()
    kept = [ENGINE.head.projection(Head(weight, bias, columns=90), torch.bfloat16).bias]
    bias.mul_(2)
    again = ENGINE.head.projection(Head(weight, bias, columns=80), torch.bfloat16).bias
    assert again.data_ptr() == kept[0].data_ptr()
    assert torch.equal(again, bias[:80].float())


def test_a_head_in_half_precision_is_not_copied(as_cuda):
    weight = torch.randn(130, 24).bfloat16()
    projection = ENGINE.head.projection(Head(weight, columns=100), torch.bfloat16)
    assert projection.weight.data_ptr() == weight.data_ptr()
    assert projection.logits(torch.randn(3, 24)).shape == (3, 100)


def test_the_other_losses_run_on_half_precision_heads(as_cuda):
    learner, other = heads(97, dtype=torch.bfloat16), heads(97, dtype=torch.bfloat16, rows=120)
    generator = torch.Generator().manual_seed(2)
    mine, theirs = (torch.randn(9, 24, generator=generator).bfloat16().requires_grad_() for _ in range(2))
    prompt = chunked_prompt_loss(mine, learner, theirs, other, mine.detach(), learner, weight=0.5, chunk=4)
    assert float(prompt.figures["to_plain"].abs()) < 1e-5
    assert float(prompt.total.detach()) > 0
    labels = torch.randint(97, (9,), generator=generator)
    loss = chunked_cross_entropy(mine, learner, labels, chunk=4).total
    logits = mine.detach().float() @ learner.weight.float().T
    torch.testing.assert_close(
        loss, torch.nn.functional.cross_entropy(logits, labels, reduction="sum"), rtol=1e-5, atol=1e-5
    )
