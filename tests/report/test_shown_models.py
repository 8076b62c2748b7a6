"""What a page says before its figures: what PromptKD is, what its models are, and what was asked in plain words."""

import pytest

from helpers.demo_record import record
from helpers.pages import Page
from promptkd.data import examples_from_rows
from promptkd.data.rows import spoken
from promptkd.report import render_report, unified
from promptkd.report.formatting import estimate
from promptkd.report.metrics import metric_info
from promptkd.report.models import PROMPTKD, is_about_promptkd, shown_models
from promptkd.report.plots import stages
from promptkd.results import BEFORE, Evaluation, Metric, ModelRecord, Results, RowResult, Series


def test_the_page_begins_with_the_verdict_then_promptkd_in_four_sentences_then_its_models() -> None:
    made = record()
    made.differences.append(made.differences[-2].model_copy(update={"baseline": "teacher"}))
    text = Page(render_report([made])).text
    told = ("promptkd has 119 % of the teacher's", PROMPTKD[0], "the large model, tuned")
    places = [text.index(each) for each in told]
    assert places == sorted(places)
    assert len(PROMPTKD) == 4
    assert text.index("the large model") < text.index("Summary", text.index("What this page shows"))


def test_each_model_says_what_it_is() -> None:
    made = Results(
        kind="distill",
        config={"method": "kd"},
        models={
            "student": ModelRecord(path="run/student", parameters=1200, sha256="a", about="the student after kd"),
            BEFORE: ModelRecord(path="pruned", parameters=1200, sha256="b"),
            "teacher": ModelRecord(path="big", parameters=2400, sha256="c"),
        },
        evaluations=[Evaluation(model=name, data="v", metrics={}) for name in ("student", BEFORE, "teacher")],
    )
    assert shown_models(unified([made])) == [
        ("teacher", "the teacher, big; 2,400 parameters"),
        (BEFORE, "the student, pruned; 1,200 parameters"),
        ("student", "the student after kd; 1,200 parameters"),
    ]
    assert not is_about_promptkd([made])
    assert PROMPTKD[0] not in render_report([made])


def test_a_request_is_shown_without_its_template() -> None:
    (example,) = examples_from_rows(
        [
            {
                "messages": [
                    {"role": r, "content": c} for r, c in (("system", "Be kind."), ("user", "Hi?"), ("assistant", "Yo"))
                ]
            }
        ]
    )
    assert spoken(example) == (("system", "Be kind."), ("user", "Hi?"))
    row = RowResult(
        row=0,
        prompt="<|im_start|>system\nBe kind.<|im_end|>…",
        request=list(spoken(example)),
        references=[],
        response="Yo",
    )
    page = Page(
        render_report(
            [Results(kind="evaluate", evaluations=[Evaluation(model="m", data="d", metrics={}, samples=[row])])]
        )
    )
    assert "Be kind." in page.text
    assert "im_start" not in page.text


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"instruction": "Add.", "input": "1, 2", "output": "3"}, (("user", "Add.\n\n1, 2"),)),
        ({"instruction": "Add.", "output": "3", "system": "Sums."}, (("system", "Sums."), ("user", "Add."))),
        ({"prompt": "Once", "completion": " upon"}, ()),  # a text as it is
    ],
)
def test_what_a_reader_sees_of_a_request(row: dict, told: tuple) -> None:
    (example,) = examples_from_rows([row])
    assert spoken(example) == told


def test_identical_curves_are_drawn_once() -> None:
    points = [{"step": s, "loss": 1 / s, "student_kl": 1 / s + 1e-9, "entropy": 1 / s + 0.1} for s in (1, 2, 3)]
    (stage,) = stages([Results(kind="distill", history=[Series(name="distill", points=points)])])
    charts = [chart for group in stage.groups.values() for chart in group]
    assert [chart.info.name for chart in charts] == ["loss", "entropy"]
    assert charts[0].same == ["Student KL"]


def test_a_metric_of_one_of_several_teachers_stands_behind_that_of_all() -> None:
    names = ["own[0]", "prompt_norm[math]", "prompt_kl[code]", "prompt_kl[math]", "entropy", "eval_kl_to_teacher[math]"]
    points = [{"step": step} | {name: step + at for at, name in enumerate(names)} for step in (1, 2)]
    points = [point | {"prompt_kl": point["step"] + 0.5} for point in points]
    (stage,) = stages([Results(kind="distill", history=[Series(name="distill", points=points)])])
    shown = {title: [(each.info.label, each.info.unit) for each in group] for title, group in stage.groups.items()}
    of_each = [("Prompt KL, code", "nats/token"), ("Prompt KL, math", "nats/token")]
    assert shown == {
        "Losses": [("Prompt KL", "nats/token"), *of_each],
        "Validation": [("Validation KL to the teacher, math", "nats/token")],
        "Responses": [("Entropy", "nats/token")],
        "Other metrics": [("own[0]", "")],
        "Norms and rates": [("Prompt norm, math", "")],
    }


def test_what_rounding_leaves_is_zero() -> None:
    info = metric_info("rouge_l")
    assert estimate(info, Metric(value=5e-16)) == ("0.0", None)
    assert estimate(info, Metric(value=-1e-15, low=-2e-15, high=0.4), signed=True) == ("0.0", "[0.0, +0.4]")
    assert estimate(metric_info("kl_to_teacher"), Metric(value=2e-5))[0] != "0.00"  # small, and no rounding
