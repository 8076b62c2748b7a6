"""What models take to run: bytes, and speeds of work that is the same for all of them."""

import pytest
import torch

from helpers.tiny import VOCABULARY, tiny_model
from promptkd.evaluation import inference
from promptkd.evaluation.inference import Workload, measure_inference

PROMPTS = ([5, 6, 7], [4] * 9, [3] * 5)


def test_models_run_in_turns_and_none_is_always_first(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def noted(model: str, workload: Workload, tokens: int) -> inference._Times:
        order.append(model)
        return inference._Times(0.5, 0.25, 0.125)

    monkeypatch.setattr(inference, "_round", noted)
    monkeypatch.setattr(inference, "_inference", lambda model, workload, tokens, times: times)
    found = measure_inference({"s": "s", "t": "t"}, Workload(PROMPTS, 4, VOCABULARY, rounds=3))
    assert order == ["s", "t"] * 3 + ["s", "t", "t", "s", "s", "t"]  # two rounds and one more to warm up
    assert {label: len(times) for label, times in found.items()} == {"s": 3, "t": 3}


def test_what_is_recorded_of_a_model() -> None:
    student, teacher = tiny_model(layers=1, hidden=8), tiny_model(layers=2)
    workload = Workload(PROMPTS, 4, VOCABULARY, new_tokens=2, rounds=3, seconds=0.01)
    found = measure_inference({"student": student, "teacher": teacher}, workload)
    for label, model in (("student", student), ("teacher", teacher)):
        measured = found[label]
        assert measured.weight_bytes == sum(4 * each.numel() for each in model.parameters())
        assert (measured.precision, measured.device, measured.rows) == ("float32", "cpu", 4)
        assert (measured.prompt_tokens, measured.new_tokens) == (5, 2)
        for times in (measured.tokens_per_second, measured.tokens_per_second_one_row, measured.first_token_seconds):
            assert len(times) == 3
            assert min(times) > 0


def test_weights_count_in_the_precision_that_is_computed_in() -> None:
    model = tiny_model(layers=1, hidden=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = measure_inference({"m": model}, Workload(PROMPTS, 2, VOCABULARY, 1, 1, 0.01)).values()
    assert (found.precision, found.weight_bytes) == ("bfloat16", sum(2 * each.numel() for each in model.parameters()))


def test_rows_beyond_the_data_start_from_its_first_row_again() -> None:
    assert Workload(PROMPTS, 5, VOCABULARY).batch == [*PROMPTS, *PROMPTS[:2]]
