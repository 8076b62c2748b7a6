"""Every causal family of transformers that can be built tiny, held to its own forward, is what docs/models.md says."""

from pathlib import Path

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from helpers.families import LEFT_OUT, families, outcome, table_line

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def lines() -> dict[str, str]:
    """The table's lines, by family."""
    found = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return {line.split("|")[1].strip(): line for line in found if line.split("|")[1].strip() not in ("family", "---")}


def test_the_page_lists_each_family_of_transformers_once_and_no_other():
    """And every family that is not tried has its reason."""
    listed = [line.split("|")[1].strip() for line in PAGE.read_text(encoding="utf-8").splitlines() if "|" in line]
    assert len(listed) == len(set(listed) - {"---"}) + listed.count("---")
    assert set(lines()) == {*families(), *LEFT_OUT} == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert {name: reason for name, reason in LEFT_OUT.items() if reason not in lines()[name]} == {}
    assert len(families()) > 150


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", families())
def test_a_family_is_run_as_the_page_says(family):
    """Scores, gradients of a soft prompt and ragged batches agree with its own forward; see `helpers.families`."""
    assert table_line(outcome(family)) == lines()[family]
