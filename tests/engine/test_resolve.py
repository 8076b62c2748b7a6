"""The trial that holds a way of running a model to the reference: what it sees, how often, what it leaves behind."""

import logging
from contextlib import contextmanager

import pytest
import torch

from helpers.tiny import tiny_model
from promptkd.data.batch import right_pad
from promptkd.engine import first_verified, response_hidden
from promptkd.engine.reference import DynamicCacheDecoder, DynamicCacheSession, PaddedScorer

pytestmark = pytest.mark.usefixtures("own_engine")
SCORED = ["prompted", "plain", "prompted"]  # with a soft prompt, without one, and after a context


class Noted(PaddedScorer):
    """The reference under another name; it notes what it is asked for, and may change what it gives."""

    name = "noted rows"

    def __init__(self, change=lambda hidden, prompt: hidden):
        self.asked, self.change = [], change

    def hidden(self, model, batch, prompt):
        self.asked.append("plain" if prompt is None else "prompted")
        return self.change(super().hidden(model, batch, prompt), prompt)


def chosen(way, model):
    return first_verified((way, PaddedScorer()), model) is way


# ------------------------------------------------------------------------------------------------ one trial, and when


def test_a_way_is_tried_once_for_a_model():
    way, model = Noted(), tiny_model("llama")
    assert all(chosen(way, model) for _ in range(3))
    assert way.asked == SCORED
    assert chosen(way, tiny_model("llama"))
    assert way.asked == 2 * SCORED


def test_the_verdict_is_for_a_precision_of_weights_and_of_computing_and_an_attention():
    way, model = Noted(), tiny_model("llama")

    def trials():
        way.asked.clear()
        assert chosen(way, model)
        assert way.asked in ([], SCORED)
        return len(way.asked) // len(SCORED)

    def under_autocast(dtype):
        with torch.autocast("cpu", dtype=dtype):
            return trials()

    assert [trials(), trials()] == [1, 0]
    assert [under_autocast(dtype) for dtype in (torch.bfloat16, torch.bfloat16, torch.float16)] == [1, 0, 1]
    model.set_attn_implementation("eager")
    assert [trials(), trials(), under_autocast(torch.bfloat16)] == [1, 0, 1]
    model.set_attn_implementation("sdpa")
    assert trials() == 0
    model.to(torch.bfloat16)
    assert [trials(), trials()] == [1, 0]
    model.float()
    assert trials() == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_verdict_is_for_a_device():
    way, model = Noted(), tiny_model("llama")
    assert chosen(way, model)
    assert chosen(way, model.to("cuda"))
    assert way.asked == 2 * SCORED


def test_what_failed_in_one_precision_may_run_in_another():
    way = Noted(lambda hidden, prompt: hidden * (1.5 if hidden.dtype == torch.bfloat16 else 1.0))
    model = tiny_model("llama")
    assert chosen(way, model)
    assert not chosen(way, model.to(torch.bfloat16))
    assert chosen(way, model.float())


def test_two_ways_have_verdicts_of_their_own():
    wrong, right, model = Noted(lambda hidden, prompt: 2 * hidden), Noted(), tiny_model("llama")
    right.name = "other rows"
    assert first_verified((wrong, right, PaddedScorer()), model) is right


def test_what_does_not_support_a_model_is_not_tried():
    class Never(Noted):
        def supports(self, model):
            return False

    way = Never()
    assert not chosen(way, tiny_model("llama"))
    assert way.asked == []


# ------------------------------------------------------------------------------------------------- what it finds out


def one_state_off(hidden, prompt):
    return hidden.index_add(0, torch.tensor([4]), 0.05 * hidden.abs().max().expand(1, hidden.shape[1]))


WRONG = {
    "everywhere": lambda hidden, prompt: hidden * 1.05,
    "in one state": one_state_off,
    "with a soft prompt alone": lambda hidden, prompt: hidden if prompt is None else hidden.flip(0),
    "in the order of rows": lambda hidden, prompt: hidden.roll(1, 0),
    "by numbers that are none": lambda hidden, prompt: hidden * torch.nan,
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_way_that_differs_is_refused_and_said_so_once(kind, caplog):
    way, model = Noted(WRONG[kind]), tiny_model("llama")
    with caplog.at_level(logging.INFO, logger="promptkd"):
        assert not any(chosen(way, model) for _ in range(3))
    (message,) = caplog.messages
    assert message.startswith("LlamaForCausalLM is not run by noted rows on cpu: it differs by ")


def test_rounding_is_no_difference():
    """A thousandth in float32, and the square root of its precision in bfloat16."""
    small, larger = (Noted(lambda hidden, prompt, by=by: hidden * (1 + by)) for by in (5e-4, 3e-2))
    larger.name = "rounded rows"
    single, half = tiny_model("llama"), tiny_model("llama", dtype=torch.bfloat16)
    assert chosen(small, single)
    assert not chosen(larger, single)
    assert chosen(larger, half)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert chosen(larger, single)


def ill_conditioned(hidden, prompt=None):
    """One state turns with the last digit, as where two tokens of a deep model compete to be the attention sink."""
    return hidden.index_copy(0, torch.tensor([4]), hidden[4:5] * torch.sin(1e4 * hidden[4].mean()))


@pytest.mark.parametrize("wrong", [None, 1, 5])
def test_in_half_precision_a_way_may_differ_where_the_reference_itself_turns_with_rounding(wrong):
    def otherwise_rounded(hidden, prompt):
        factors = torch.full((len(hidden), 1), 1 + 2**-7)
        if wrong is not None:
            factors[wrong] = 1.5
        return ill_conditioned((hidden * factors).to(hidden.dtype))

    reference, way = Noted(ill_conditioned), Noted(otherwise_rounded)
    reference.name = "the reference"
    half = tiny_model("llama", dtype=torch.bfloat16)
    assert (first_verified((way, reference), half) is way) == (wrong is None)
    assert len(reference.asked) > len(SCORED)  # it was rounded otherwise, too
    assert not half.get_input_embeddings()._forward_hooks
    assert first_verified((way, reference), tiny_model("llama")) is reference


def test_no_trial_is_repeated_where_a_way_agrees():
    reference, way = Noted(), Noted(lambda hidden, prompt: hidden * 1.01)
    reference.name = "the reference"
    assert first_verified((way, reference), tiny_model("llama", dtype=torch.bfloat16)) is way
    assert reference.asked == SCORED


ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, KeyError, NotImplementedError, AssertionError)


@pytest.mark.parametrize("error", ERRORS)
def test_a_way_that_raises_is_refused_and_said_so_once(error, caplog):
    def fails(hidden, prompt):
        raise error("what this model\ncannot do")

    way, model = Noted(fails), tiny_model("llama")
    with caplog.at_level(logging.INFO, logger="promptkd"):
        assert not any(chosen(way, model) for _ in range(3))
    (message,) = caplog.messages
    assert message.startswith("LlamaForCausalLM is not run by noted rows on cpu: ")
    assert "what this model" in message
    assert "\n" not in message
    assert way.asked == ["prompted"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, torch.OutOfMemoryError])
def test_other_errors_are_not_swallowed(error):
    def fails(hidden, prompt):
        raise error

    with pytest.raises(error):
        chosen(Noted(fails), tiny_model("llama"))


def test_an_error_of_the_reference_is_no_verdict_on_another_way():
    class Broken(PaddedScorer):
        def hidden(self, model, batch, prompt):
            raise RuntimeError("the model itself")

    with pytest.raises(RuntimeError, match="the model itself"):
        first_verified((Noted(), Broken()), tiny_model("llama"))


class Session(DynamicCacheSession):
    """The reference's, with a fault."""

    fault = "none"

    def prefill(self, prompts, soft_prompt=None):
        return super().prefill(prompts, None if self.fault == "drops the soft prompt" else soft_prompt)

    def decode(self, tokens):
        return super().decode(tokens.flip(0) if self.fault == "mixes rows up" else tokens)

    def select(self, rows):
        kept = list(range(len(rows))) if self.fault == "keeps the first rows" else rows
        super().select(kept)


class FaultyDecoder(DynamicCacheDecoder):
    name = "faulty"

    def __init__(self, fault):
        self.fault = fault

    @contextmanager
    def open(self, model, rows, vocabulary):
        @contextmanager
        def session(max_new_tokens):
            made = Session(model, vocabulary)
            made.fault = self.fault
            yield made

        yield session


@pytest.mark.parametrize("fault", ["none", "drops the soft prompt", "mixes rows up", "keeps the first rows"])
def test_the_trial_of_a_decoder_prefills_decodes_and_selects(fault):
    way = FaultyDecoder(fault)
    assert (first_verified((way, DynamicCacheDecoder()), tiny_model("llama")) is way) == (fault == "none")


# ------------------------------------------------------------------------------------------------ what it leaves behind


def test_the_mode_and_the_random_state_are_as_they_were():
    model = tiny_model("gpt2", dropout=0.5).train()
    before = torch.get_rng_state()
    assert chosen(Noted(), model)
    assert model.training
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_autocasts_cache_is_off_for_the_trial_and_then_as_it_was(enabled, fails):
    def change(hidden, prompt):
        assert not torch.is_autocast_cache_enabled()
        if fails:
            raise KeyboardInterrupt
        return hidden

    before = torch.is_autocast_cache_enabled()
    try:
        torch.set_autocast_cache_enabled(enabled)
        with pytest.raises(KeyboardInterrupt) if fails else torch.autocast("cpu", enabled=False):
            chosen(Noted(change), tiny_model("llama"))
        assert torch.is_autocast_cache_enabled() == enabled
    finally:
        torch.set_autocast_cache_enabled(before)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_gradients_reach_the_weights_in_the_pass_that_calls_for_the_trial(architecture, device):
    """Within one autocast, which before torch 2.13 would keep casts that the trial made without a graph."""
    model = tiny_model(architecture, tied=False).to(device)
    batch = right_pad([[5, 6, 7], [8]], [[9, 10], [11]], device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        response_hidden(model, batch).float().square().sum().backward()
    weights = model.base_model.named_parameters()
    assert [name for name, each in weights if each.grad is None or not each.grad.any()] == []
