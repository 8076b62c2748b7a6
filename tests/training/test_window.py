"""Windows, and the metrics of a step by hand."""

import torch
from accelerate import Accelerator

from helpers.parts import window
from helpers.trainers import rows
from promptkd.training.window import StepMetrics, Window


def test_a_window_gives_each_micro_batch_once():
    examples = rows(4).examples
    made = window(examples[:2], examples[2:])
    assert not made.is_done
    assert [made.next().rows, made.next().rows] == [examples[:2], examples[2:]]
    assert made.is_done


def test_metrics_are_means_over_tokens_rows_and_text_tokens():
    metrics, accelerator = StepMetrics(), Accelerator(cpu=True)
    metrics.rows, metrics.processed_tokens = 4, 60
    metrics.add("loss", torch.tensor(3.0))
    metrics.add("loss", 5.0)
    metrics.add("response_length", 10, per="row")
    metrics.add("language_loss", torch.tensor(12.0, dtype=torch.float64), per="text")
    metrics.add("top_overlap", torch.tensor(6.0), per="compared")
    metrics.compared += 8  # of 16 response tokens
    metrics.set("lambda", 0.25)
    step = Window([], torch.tensor(4), torch.tensor(16), torch.tensor(24))
    assert metrics.means(step, accelerator, {"rollout": 1.0, "student": 2.0, "update": 9.0}) == {
        "loss": 0.5,
        "response_length": 2.5,
        "language_loss": 0.5,
        "top_overlap": 0.75,
        "lambda": 0.25,
        "tokens_per_second": 20.0,
        "seconds_rollout": 1.0,
        "seconds_prompt": 0.0,
        "seconds_student": 2.0,
    }
    empty = Window([], torch.tensor(0), torch.tensor(0), torch.tensor(0))
    assert metrics.rows == 0  # the next step begins
    metrics.add("loss", 0.0)
    metrics.add("top_overlap", 0.0, per="compared")  # of a loss that compares nothing
    logged = metrics.means(empty, accelerator, {})
    assert (logged["loss"], logged["tokens_per_second"]) == (0.0, 0.0)
    assert logged.keys().isdisjoint({"lambda", "response_length", "top_overlap"})


def test_sums_are_kept_in_their_precision():
    """As float32, a sum of many steps' worth would lose the last terms."""
    metrics = StepMetrics()
    metrics.add("loss", torch.tensor(2.0**24, dtype=torch.float64))
    metrics.add("loss", torch.tensor(1.0, dtype=torch.float64))
    step = Window([], torch.tensor(1), torch.tensor(1), torch.tensor(0))
    assert metrics.means(step, Accelerator(cpu=True), {})["loss"] == 2.0**24 + 1
