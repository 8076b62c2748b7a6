"""The rows that the error of kept logits is measured on, and how often scoring waits for the device."""

import pytest
import torch

from helpers.kept import settings
from helpers.tiny import tiny_model
from helpers.trainers import rows
from promptkd.evaluation import kept_scoring


@pytest.mark.parametrize(("count", "wanted"), [(7, [0, 1, 3, 5]), (4, [0, 1, 2, 3]), (3, [0, 1, 2])])
def test_the_error_is_measured_on_rows_from_all_over_the_data(monkeypatch, count, wanted):
    scored, chunks = [], kept_scoring._chunks
    monkeypatch.setattr(kept_scoring, "SAMPLE", 4)
    monkeypatch.setattr(
        kept_scoring, "_chunks", lambda m, sample, *rest: scored.extend(sample) or chunks(m, sample, *rest)
    )
    data = rows(count).examples
    error = kept_scoring.measured_error(tiny_model(), data, settings(3), batch_size=2)
    assert scored == [data[index] for index in wanted]
    assert error["rows"] == len(wanted)


def test_each_chunk_waits_for_the_device_once_and_rows_keep_their_bits(monkeypatch):
    teacher, data = tiny_model(), rows().examples
    whole = kept_scoring.top_log_probs(teacher, data, settings(3), batch_size=16)
    waits, cpu, is_true = [], torch.Tensor.cpu, torch.Tensor.__bool__
    monkeypatch.setattr(kept_scoring, "_TOKENS_AT_A_TIME", 5)  # rows go over the ends of chunks
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "cpu", lambda each: waits.append("cpu") or cpu(each))
        patch.setattr(torch.Tensor, "__bool__", lambda each: waits.append("bool") or is_true(each))
        parts = kept_scoring.top_log_probs(teacher, data, settings(3), batch_size=16)
    tokens = sum(len(row.response_ids) for row in data)
    assert waits == ["cpu"] * -(-tokens // 5)
    assert torch.equal(parts.ids, whole.ids)
    torch.testing.assert_close(parts.log_probs, whole.log_probs)
    torch.testing.assert_close(parts.rest, whole.rest)
    assert (whole.log_probs.exp().sum(-1) + whole.rest.exp() - 1).abs().max() < 1e-5
