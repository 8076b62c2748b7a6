"""The rows that the error of kept logits is measured on, and how often scoring waits for the device."""

import pytest

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
