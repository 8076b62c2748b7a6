"""Sessions that append several tokens at a time and remove some of them: the logits of each row alone."""

import logging
from contextlib import nullcontext

import pytest
import torch

from helpers.rollback import assert_rows_as_each_alone
from helpers.tiny import ARCHITECTURES, tiny_model
from promptkd.engine import can_roll_back, decoding
from promptkd.engine.cpu import ENGINE
from promptkd.engine.reference import DECODERS, DynamicCacheDecoder, DynamicCacheSession, RecomputingDecoder
from promptkd.engine.resolve import rolls_back

FUSED, STATIC, *_ = ENGINE.decoders
WAYS = (FUSED, STATIC, *DECODERS)

pytestmark = pytest.mark.usefixtures("own_engine")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_rows_grow_and_shrink_as_each_alone(architecture, way):
    model = tiny_model(architecture)
    if way is FUSED and architecture != "llama":
        assert not way.supports(model)
        return
    if architecture == "gemma2" and way in DECODERS[:3]:  # transformers' windows forget what they have passed
        assert not rolls_back((way, DECODERS[-1]), model)
        return
    assert_rows_as_each_alone(way, model, length=3 if architecture == "llama" else 0)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_on_the_device(architecture, device):
    model = tiny_model(architecture).to(device)
    assert can_roll_back(model)
    assert_rows_as_each_alone(first_way(model), model)


def first_way(model):
    """What `decoding` opens."""

    class Way:
        @staticmethod
        def open(model, rows, vocabulary):
            return decoding(model, rows, vocabulary=vocabulary)

    return Way


@pytest.mark.parametrize("way", [FUSED, STATIC], ids=lambda way: way.name)
@pytest.mark.parametrize("settings", [{"num_key_value_heads": 2}, {"sliding_window": 3, "head_dim": 8}])
def test_windows_and_heads_of_their_own(way, settings):
    assert_rows_as_each_alone(way, tiny_model("mistral", **settings))


def test_in_float64_nothing_is_lost(float64_inside):
    assert_rows_as_each_alone(STATIC, tiny_model("llama", dtype=torch.float64), tolerance=1e-10)


def test_a_recurrent_state_keeps_no_past_which_the_log_says_once(caplog):
    model = tiny_model("mamba", layers=1)
    with caplog.at_level(logging.WARNING):
        assert not can_roll_back(model)
        assert not can_roll_back(model)
    (told,) = [each.getMessage() for each in caplog.records if "rolled back" in each.getMessage()]
    assert told.startswith(
        "MambaForCausalLM is not rolled back by transformers' cache on cpu, so that a teacher checks"
    )


def test_a_decoder_without_the_two_operations_is_still_a_decoder():
    class Plain(DynamicCacheDecoder):
        def session(self, model, vocabulary):
            return Session(model, vocabulary)

    class Session(DynamicCacheSession):
        def extend(self, tokens):
            return super(DynamicCacheSession, self).extend(tokens)

    assert not rolls_back((Plain(), RecomputingDecoder()), tiny_model("llama"))


class Faulty(DynamicCacheSession):
    fault = ""

    def extend(self, tokens):
        return super().extend(tokens.flip(0) if self.fault == "mixes rows up" else tokens)

    def rollback(self, counts):
        if self.fault == "forgets positions":
            positions = self.positions[:, -1:].clone()
            super().rollback(counts)
            self.positions = positions
        elif self.fault == "removes too few":
            super().rollback([max(count - 1, 0) for count in counts])
        elif self.fault == "removes the same of all":
            super().rollback([min(counts)] * len(counts))
        else:
            super().rollback(counts)


@pytest.mark.parametrize(
    "fault", ["", "mixes rows up", "forgets positions", "removes too few", "removes the same of all"]
)
def test_the_trial_extends_and_rolls_back(fault):
    class Way(DynamicCacheDecoder):
        name = f"faulty: {fault}"

        def open(self, model, rows, vocabulary):
            def opened(max_new_tokens):
                session = Faulty(model, vocabulary)
                session.fault = fault
                return nullcontext(session)

            return nullcontext(opened)

    assert rolls_back((Way(), RecomputingDecoder()), tiny_model("llama")) == (fault == "")
