"""The CUDA engine's own code, held to the reference on CPU: what CUDA alone can do is replaced by ten lines each.

Varlen attention becomes a loop over rows, products of half precision with float32 sums become float32 products, and a
graph is called instead of replayed. On a machine with CUDA, test_engines.py and test_decoding.py run the real things.
"""

import gc
import inspect
import sys
from contextlib import nullcontext
from dataclasses import replace
from subprocess import CalledProcessError
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.attention import varlen
from torch.nn.functional import scaled_dot_product_attention

from helpers.rollback import assert_rows_as_each_alone
from helpers.standins import StandIn
from helpers.tiny import tiny_model
from promptkd.data.batch import right_pad
from promptkd.engine import Head, chunked_objective, chunked_prompt_loss, static_cache
from promptkd.engine.backbone import model_matmul_dtype
from promptkd.engine.chunked_loss import chunked_cross_entropy
from promptkd.engine.cuda import ENGINE, decoding, graphs, scoring
from promptkd.engine.reference import DynamicCacheDecoder, PaddedScorer
from promptkd.engine.resolve import first_verified, rolls_back
from promptkd.generation import SamplingParams, generate
from promptkd.objectives import reverse_kl
from promptkd.objectives.kernels import PLAIN_KERNELS

PROMPTS = ([5, 9, 11, 2, 40, 7, 7, 30, 12, 1], [3], [5, 9, 4, 60], [8, 8])
FUSED, ROWS, CACHE, *_ = ENGINE.decoders
FUSED_LAYERS, PACKED, PADDED, *_ = ENGINE.scorers
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
    monkeypatch.setattr(scoring, "varlen", StandIn(scoring.varlen, varlen_attn=varlen_attn))
    monkeypatch.setattr(scoring, "_GROUPED", {})
    monkeypatch.setattr(scoring, "_DTYPES", wide)
    monkeypatch.setattr(scoring, "_product", lambda left, right: left.float() @ right.float())


@pytest.fixture
def as_cuda(monkeypatch):
    """Everything on CPU is run by the CUDA engine."""
    monkeypatch.setattr("promptkd.engine.resolve._of_kind", lambda kind: ENGINE)
    monkeypatch.setattr(scoring, "_triton_kernels", lambda: PLAIN_KERNELS)  # Triton's have tests of their own


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
    with torch.no_grad(), decoder.open(model, 4, vocabulary) as sessions, sessions(7) as session:
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
        expected = decoded(DynamicCacheDecoder(), model, soft_prompt, vocabulary=90)
        assert got.shape == expected.shape == (4 * 4 + 3 * 3, 90)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "mistral", "opt"])
@pytest.mark.parametrize("decoder", [FUSED, ROWS], ids=["fused", "rows"])
def test_rows_grow_and_shrink_as_each_alone(architecture, decoder, monkeypatch):
    monkeypatch.setattr(decoding, "_SPAN", 8)
    monkeypatch.setattr(decoding, "_PROMPT_COLUMNS", 4)
    monkeypatch.setattr(decoding, "_ROWS", (4, 8))  # rows that only fill the bucket
    model = models(architecture)
    if decoder.supports(model):
        assert rolls_back(ENGINE.decoders, model)
        for _ in range(2):
            assert_rows_as_each_alone(decoder, model, length=3)


def test_rows_that_have_left_stay_within_the_table_of_positions(monkeypatch):
    """They are still run where they fill a bucket, and on the device a position behind the table is fatal."""
    monkeypatch.setattr(decoding, "_ROWS", (4,))
    model = models("opt")
    with torch.no_grad(), ROWS.open(model, 2, None) as sessions, sessions(20) as session:
        session.prefill([[1] * 500, [2]])
        session.extend(torch.ones(2, 12, dtype=torch.long))  # up to the last of 512 positions
        session.rollback([0, 12])
        session.select([1])
        assert session.extend(torch.ones(1, 12, dtype=torch.long)).isfinite().all()


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
        return decoded(decoder, model), decoded(DynamicCacheDecoder(), model)


def test_a_store_grows_and_is_emptied():
    """A NaN that an earlier decode has left would pass through a weight of 0."""
    model = tiny_model("llama")
    decoded(FUSED, model)
    store = FUSED._buffers[model]
    for layer in store.layers.values():
        layer.keys.fill_(torch.nan)
        layer.values.fill_(torch.nan)
    assert decoded(FUSED, model).isfinite().all()
    with torch.no_grad(), FUSED.open(model, 9, None) as sessions, sessions(300) as session:
        logits = session.prefill([[1, 2]] * 9)
    assert (len(store.first), store.columns) == (16, 384)
    assert torch.allclose(logits[0], logits[8])


def test_a_model_is_let_go_with_its_store():
    model = tiny_model("llama")
    decoded(FUSED, model)
    decoded(ROWS, model)
    gc.collect()
    before = len(FUSED._buffers), len(ROWS._buffers)
    del model
    gc.collect()
    assert (len(FUSED._buffers), len(ROWS._buffers)) == (before[0] - 1, before[1] - 1)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_generate_writes_what_the_reference_writes(architecture, as_cuda, monkeypatch):
    """Rows end at different tokens, between two looks; what they write until they leave is dropped."""
    model = models(architecture)
    params, seeds = SamplingParams(max_new_tokens=[40, 3, 20, 35], stop_ids=[7, 30]), [1, 2, 3, 4]
    got = generate(model, PROMPTS, params, seeds=seeds)
    greedy = generate(model, PROMPTS, replace(params, temperature=0))
    monkeypatch.setenv("PROMPTKD_ENGINE", "reference")
    assert got == generate(model, PROMPTS, params, seeds=seeds)
    assert greedy == generate(model, PROMPTS, replace(params, temperature=0))
    assert {len(each) for each in got} != {40, 3, 20, 35}  # some ended by themselves


def test_the_engine_is_trusted_after_its_trial():
    """And in float16 or bfloat16 alone, soft caps and dropout excepted."""
    assert first_verified(ENGINE.scorers, tiny_model("llama")) is FUSED_LAYERS
    assert first_verified(ENGINE.scorers, tiny_model("gpt2")) is PACKED
    assert first_verified(ENGINE.scorers, tiny_model("gemma2")) is PADDED
    assert first_verified(ENGINE.decoders, tiny_model("llama")) is FUSED
    assert first_verified(ENGINE.decoders, tiny_model("opt")) is ROWS
    assert first_verified(ENGINE.decoders, tiny_model("gemma2")) is CACHE
    assert not PACKED.supports(tiny_model("gpt2", dropout=0.1).train())


def test_float32_stays_with_the_reference(monkeypatch):
    monkeypatch.setattr(scoring, "_DTYPES", {torch.bfloat16, torch.float16})
    model = tiny_model("llama")
    assert not PACKED.supports(model)
    assert not FUSED.supports(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model_matmul_dtype(model) == torch.bfloat16
        assert PACKED.supports(model)
        assert FUSED.supports(model)


def test_varlen_attention_is_called_as_torch_has_it():
    """The names that are passed by keyword, against the installed torch; before 2.12 there is no `enable_gqa`."""
    real = inspect.signature(varlen.varlen_attn).parameters
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
        loss = chunked_objective(reverse_kl, (hidden, learner), (other, theirs), chunk=4).total
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


WRITERS = {
    "in place": lambda weight: weight.mul_(2),
    "through data": lambda weight: weight.data.copy_(2 * weight),  # which counts no version, nor does the next one
    "a fused optimizer": lambda weight: stepped(weight),
}


def stepped(weight):
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=0.5, fused=True).step()


@pytest.mark.parametrize("writer", WRITERS)
def test_a_heads_cast_follows_its_weight_in_place(writer, as_cuda):
    """CUDA graphs read the cast at its address; an old cast would sample from an earlier student, and train on it."""
    weight = torch.nn.Parameter(torch.randn(100, 24))
    projection = ENGINE.head.projection(Head(weight), torch.bfloat16)
    address, before = projection.weight.data_ptr(), weight.detach().clone()
    with torch.no_grad():
        WRITERS[writer](weight)
    assert not torch.equal(weight, before)
    again = ENGINE.head.projection(Head(weight), torch.bfloat16)
    assert again.weight.data_ptr() == address
    assert torch.equal(again.weight[:100], weight.bfloat16())
    assert again.weight.shape == (128, 24)


def test_a_head_in_half_precision_is_not_copied(as_cuda):
    weight = torch.randn(130, 24).bfloat16()
    projection = ENGINE.head.projection(Head(weight, columns=100), torch.bfloat16)
    assert projection.weight.data_ptr() == weight.data_ptr()
    assert projection.logits(torch.randn(3, 24)).shape == (3, 100)


def test_the_other_losses_run_on_half_precision_heads(as_cuda):
    learner, other = heads(97, dtype=torch.bfloat16), heads(97, dtype=torch.bfloat16, rows=120)
    generator = torch.Generator().manual_seed(2)
    mine, theirs = (torch.randn(9, 24, generator=generator).bfloat16().requires_grad_() for _ in range(2))
    prompt = chunked_prompt_loss((mine, learner), (theirs, other), (mine.detach(), learner), weight=0.5, chunk=4)
    assert float(prompt.metrics["to_plain"].abs()) < 1e-5
    assert float(prompt.total.detach()) > 0
    labels = torch.randint(97, (9,), generator=generator)
    loss = chunked_cross_entropy((mine, learner), labels, chunk=4).total
    logits = mine.detach().float() @ learner.weight.float().T
    torch.testing.assert_close(
        loss, torch.nn.functional.cross_entropy(logits, labels, reduction="sum"), rtol=1e-5, atol=1e-5
    )


# ------------------------------------------------------------------------------------------- what outlives a decode


@pytest.mark.slow
@pytest.mark.parametrize("decoder", [ROWS], ids=["rows"])
def test_an_adapter_that_is_switched_or_merged_is_another_model(decoder):
    base = tiny_model("llama")
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False)).eval()
    inner = adapted.get_base_model()
    own, expected = both_in_bfloat16(decoder, inner)
    assert distance(own, expected) < 0.05
    with adapted.disable_adapter():
        plain, expected = both_in_bfloat16(decoder, inner)
    assert distance(plain, expected) < 0.05
    assert distance(plain, own) > 0.1
    adapted.merge_adapter()
    assert distance(*both_in_bfloat16(decoder, inner)) < 0.05


def distance(got, expected):
    return float((got - expected).norm() / expected.norm())


def test_what_is_made_in_inference_mode_serves_outside_of_it(as_cuda):
    model, batch = tiny_model("llama"), batch_of()
    greedy = SamplingParams(max_new_tokens=5, temperature=0)

    def loss():
        hidden = FUSED_LAYERS.hidden(model, batch, None)
        own = Head(model.lm_head.weight)
        return chunked_objective(reverse_kl, (hidden, own), (hidden.detach(), own), chunk=4).total

    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.inference_mode():
            first = generate(model, PROMPTS, greedy)
            loss()
        assert generate(model, PROMPTS, greedy) == first
        assert abs(float(loss().detach())) < 1e-3


def test_two_sessions_of_one_model_are_refused():
    """They would write over each other's keys and values."""
    model = tiny_model("llama")
    refused = pytest.raises(RuntimeError, match="one batch at a time")
    with torch.no_grad(), FUSED.open(model, 2, None) as sessions, sessions(4), refused, sessions(4):
        pass
    with torch.no_grad(), FUSED.open(model, 2, None) as sessions, sessions(4) as session:
        assert session.prefill([[1], [2]]).isfinite().all()  # the one before has ended


def test_rows_that_have_ended_stay_within_the_table_of_positions(as_cuda):
    model = tiny_model("gpt2", n_positions=32)
    prompts, limits = [[5] * 28, [7, 8]], [4, 25]
    written = generate(model, prompts, SamplingParams(max_new_tokens=limits, temperature=0))
    assert [len(each) for each in written] == limits


def test_quantized_weights_are_not_cast():
    model = tiny_model("llama")
    packed = torch.zeros(16, 8, dtype=torch.uint8)
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(packed, requires_grad=False)
    assert not ROWS.supports(model)
    assert not FUSED.supports(model)


def test_a_way_that_fails_its_trial_holds_nothing(monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(decoding._CudaSession, "_step", lambda self, rows, span: torch.zeros(rows, 97))
    assert first_verified(ENGINE.decoders, model) is CACHE
    assert model not in FUSED._buffers
    assert model not in ROWS._buffers


def test_running_out_of_memory_is_no_verdict(monkeypatch):
    model = tiny_model("llama")

    def fail(self, *args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(decoding._CudaSession, "_step", fail)
        with pytest.raises(torch.OutOfMemoryError):
            first_verified(ENGINE.decoders, model)
    assert first_verified(ENGINE.decoders, model) is FUSED


def test_only_matrices_are_copied_where_layers_are_the_models_own():
    """Embeddings and norms stay float32 as under autocast: rows are sampled from the distribution that is scored."""
    model = tiny_model("gpt2")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decoded(ROWS, model)
    copied = ROWS._buffers[model].backbone.args[0]
    assert copied.wte.weight is model.transformer.wte.weight
    assert copied.h[0].ln_1.weight is model.transformer.h[0].ln_1.weight
    assert copied.h[0].mlp.c_fc.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("length", [0, 3])
@pytest.mark.parametrize("most", [1, 8, 15])
def test_prompts_are_read_few_at_a_time(monkeypatch, length, most):
    model, soft_prompt = models("qwen2"), torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    soft_prompt = soft_prompt[:, : model.config.hidden_size] if length else None
    expected = decoded(ROWS, model, soft_prompt)
    packs, pack_inputs = [], static_cache.pack_inputs

    def counted(*args, **kwargs):
        pack, inputs = pack_inputs(*args, **kwargs)
        packs.append(len(pack.tokens))
        return pack, inputs

    monkeypatch.setattr(static_cache, "pack_inputs", counted)
    monkeypatch.setattr(decoding._PACKED, "max_tokens", most)
    torch.testing.assert_close(decoded(ROWS, model, soft_prompt), expected, rtol=1e-5, atol=1e-5)
    assert len(packs) > 1
    assert max(packs) <= max(most, length + max(map(len, PROMPTS)))


@pytest.fixture
def triton_that(monkeypatch):
    """Lets the first kernel of Triton raise."""

    def raises(error):
        def reverse_kl(*logits):
            raise error

        kernels = SimpleNamespace(KERNELS=SimpleNamespace(reverse_kl=reverse_kl))
        monkeypatch.setitem(sys.modules, "promptkd.engine.cuda.triton_kernels", kernels)
        monkeypatch.setattr(scoring, "find_spec", lambda name: name)
        on_cpu = StandIn(torch, zeros=lambda *size, device: torch.zeros(*size))
        monkeypatch.setattr(scoring, "torch", on_cpu)
        return scoring._triton_kernels.__wrapped__

    return raises


@pytest.mark.parametrize(
    "error", [CalledProcessError(1, ["gcc", "Python.h"]), RuntimeError("no compiler"), KeyError("arch")]
)
def test_where_triton_compiles_nothing_torchs_operations_serve(triton_that, caplog, error):
    assert triton_that(error)() is PLAIN_KERNELS
    assert "Triton compiles nothing here" in caplog.text


def test_a_full_device_is_no_reason_to_do_without_triton(triton_that):
    with pytest.raises(torch.OutOfMemoryError):
        triton_that(torch.OutOfMemoryError())()


@pytest.mark.parametrize("fails", [None, 1, 2, 3])
def test_the_stream_waits_for_a_recording_also_where_it_fails(monkeypatch, fails):
    """Else what was begun on the side could still write into memory that is given to others."""
    calls, waits = [], []

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def wait_stream(self, other):
            waits.append((self.name, other.name, len(calls)))

    current = Stream("current")
    cuda = SimpleNamespace(
        Stream=Stream,
        current_stream=lambda: current,
        stream=lambda stream: nullcontext(),
        get_sync_debug_mode=lambda: 0,
        set_sync_debug_mode=lambda mode: None,
        CUDAGraph=lambda: SimpleNamespace(
            capture_begin=lambda **_: None, capture_end=lambda: None, pool=lambda: "pool"
        ),
    )
    monkeypatch.setattr(graphs, "torch", StandIn(torch, cuda=cuda))

    def function():
        calls.append("run")
        if len(calls) == fails:
            raise RuntimeError("waits for the device")
        return torch.zeros(1)

    with nullcontext() if fails is None else pytest.raises(RuntimeError, match="waits for the device"):
        graphs.Graphs()._record(function)
    assert waits == [("side", "current", 0), ("current", "side", fails or 3)]
