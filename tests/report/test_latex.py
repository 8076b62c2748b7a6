"""The report as LaTeX: tables that compile, text that stays text, and what cannot be told apart."""

import re

import pytest

from helpers.commands import done, run
from helpers.demo_record import HOSTILE
from helpers.records import made_up_rows, study
from promptkd.report import render_latex
from promptkd.report.latex import latex_text
from promptkd.report.tables import comparison_table, groups
from promptkd.results import Difference, Evaluation, Metric, Results

STUDY = study(made_up_rows(12))
COMMANDS = {
    *(
        "begin",
        "end",
        "centering",
        "small",
        "caption",
        "toprule",
        "midrule",
        "bottomrule",
        "scriptsize",
        "textbf",
        "pm",
    ),
    *("textsuperscript", "uparrow", "downarrow", "lambda", "Vert", "infty", "times", "to", "usepackage"),
    *("label", "multicolumn", "textit"),
    *("textbackslash", "textasciitilde", "textasciicircum", "textasciigrave", "textless", "textgreater", "textbar"),
    *("textquotedbl", "textendash"),
}


def measured(model: str, value: float, reach: float, data: str = "test") -> Evaluation:
    metric = Metric(value=value, low=value - reach, high=value + reach, rows=50)
    return Evaluation(model=model, data=data, metrics={"rouge_l": metric, "loss": metric})


def tables(text: str) -> list[list[list[str]]]:
    """The cells of every table, its heads first; raises where a row has another number of cells than columns."""
    found = []
    for body in re.findall(
        r"\\begin\{tabular\}\{(l?r*)\}\n\\toprule\n(.*?)\n\\bottomrule\n\\end\{tabular\}", text, re.S
    ):
        lines = [line for line in body[1].split("\n") if line != "\\midrule"]
        assert all(line.endswith(" \\\\") for line in lines)
        lines = [line for line in lines if not line.startswith("\\multicolumn")]
        rows = [re.split(r"(?<!\\) ?& ?", line.removesuffix(" \\\\")) for line in lines]
        assert {len(row) for row in rows} == {len(body[0])}
        found.append(rows)
    return found


def test_every_table_is_whole_and_uses_booktabs():
    text = render_latex(STUDY, title="A & B")
    found = tables(text)
    assert len(found) == text.count("\\begin{table*}") == text.count("\\end{table*}") == 8
    assert [row[0] for row in found[0]] == ["Model", "teacher", "sft", "kd", "gkd", "promptkd"]
    assert "A \\& B. dolly\\_test, greedy" in text
    assert "ExAccErr$(l)$" in text
    plain = re.sub(r"\\[\\&%$#_{},]", "", text)
    assert plain.count("{") == plain.count("}")
    assert plain.count("$") % 2 == 0
    assert set(re.findall(r"\\([a-zA-Z]+)", text)) <= COMMANDS


@pytest.mark.parametrize(
    "text", [*HOSTILE, "\\input{/etc/passwd}", "100%", "a_b^c~d", "$x$", "[opt]", "*", "a--b", "a\\\\b\x1b"]
)
def test_no_text_is_a_command_a_comment_or_mathematics(text):
    written = latex_text(text)
    left = re.sub(r"\\(textbackslash|text[a-z]+)\{\}|\\[&%$#_{}]|\{[\[\]*]\}|-\{\}-|\$\\(to|lambda|pm)\$", "", written)
    assert not set(left) & set("\\{}%$#&~^[]*\x1b"), written
    record = Results(kind="evaluate", evaluations=[measured(text, 1.0, 0.5, data=text)])
    assert len(tables(render_latex([record], title=text))) == 1


def test_numbers_are_set_as_mathematics():
    assert latex_text("−1.5 ± 0.2") == "$-$1.5 $\\pm$ 0.2"
    assert latex_text("2.0×10⁻⁵") == "2.0$\\times$10$^{-5}$"
    assert latex_text("Regularizer weight λ") == "Regularizer weight $\\lambda$"


def test_no_two_characters_become_a_dash_or_a_quotation_mark():
    assert latex_text("a---b") == "a-{}-{}-b"
    assert latex_text("1–2 --x") == "1\\textendash{}2 -{}-x"
    assert latex_text("''a,,") == "'{}'a,{},"


def test_the_best_is_bold_and_groups_share_letters():
    near = [measured("a", 30, 2), measured("b", 27, 2), measured("c", 24, 2), measured("teacher", 90, 1)]
    (rows,) = tables(render_latex([Results(kind="evaluate", evaluations=near)]))
    cells = {row[0]: row[2].split(" {")[0] for row in rows[1:]}  # ROUGE-L, of which more is better
    assert cells == {
        "teacher": "90.0",
        "a": "\\textbf{30.0}\\textsuperscript{a}",
        "b": "27.0\\textsuperscript{ab}",
        "c": "24.0\\textsuperscript{b}",
    }
    assert {row[0]: row[1].split("\\textsuperscript")[0] for row in rows[1:]}["c"] == "\\textbf{24.00}"  # loss


def test_nothing_is_marked_where_nothing_is_told_apart():
    text = render_latex([Results(kind="evaluate", evaluations=[measured("a", 30, 5), measured("b", 27, 5)])])
    assert "textbf" not in text
    assert "textsuperscript" not in text


def test_groups_go_by_paired_differences_where_there_are_some():
    """Overlapping intervals, but the paired difference tells the two apart."""
    two = [measured("a", 30, 5), measured("b", 27, 5)]
    difference = Difference(
        model="a",
        baseline="b",
        metric="rouge_l",
        difference=Metric(value=3, low=2, high=4),
        better="higher",
        data="test",
    )
    rows = comparison_table([Results(kind="compare", evaluations=two, differences=[difference])])
    assert [[row.model for row in group] for group in groups("rouge_l", rows)] == [["a"], ["b"]]
    assert [[row.model for row in group] for group in groups("loss", rows)] == [["b", "a"]]
    assert groups("rouge_l", rows[:1]) == []


def test_the_command_writes_it_by_suffix_or_format(tmp_path, capsys):
    STUDY[-1].write(tmp_path / "compared.json")
    done(capsys, "report", tmp_path / "compared.json", "--out", tmp_path / "table.tex")
    text = (tmp_path / "table.tex").read_text()
    assert tables(text)
    done(capsys, "report", tmp_path / "compared.json", "--out", tmp_path / "table.txt", "--format", "latex")
    assert (tmp_path / "table.txt").read_text() == text
    done(capsys, "report", tmp_path / "compared.json", "--out", tmp_path / "one.tex", "--metrics", "rouge_l")
    assert "ROUGE-L" in (one := (tmp_path / "one.tex").read_text())
    assert "Loss on references" in text
    assert "Loss on references" not in one
    ran = run(capsys, "report", tmp_path / "compared.json", "--out", tmp_path / "no.tex", "--metrics", "bleu")
    assert (ran.status, "Got bleu" in ran.err) == (2, True)
    ran = run(capsys, "report", tmp_path / "compared.json", "--out", tmp_path / "table.doc")
    assert ran.status == 2
    assert "--format html, markdown, json or csv, or latex" in ran.err


def test_each_table_has_a_label_of_its_own_and_captions_say_what_spreads():
    text = render_latex(STUDY)
    labels = re.findall(r"\\label\{(tab:[a-z0-9-]+)\}", text)
    assert len(labels) == len(set(labels)) == text.count("\\begin{table*}")
    assert "between decoding seeds" in text
    assert text.count("Loss on references (nats/token)") == 1  # it is the same under every decoding
    assert "cannot be told apart \\\\" not in text
    kept = Metric(value=3, low=-6, high=7, deviation=1.5, rows=4)
    alone = Evaluation(model="teacher", data="d", metrics={"rouge_l": Metric(value=99.0, low=90, high=104, rows=4)})
    pooled = Results(kind="study", evaluations=[Evaluation(model="a", data="d", metrics={"rouge_l": kept}), alone])
    text = render_latex([pooled])
    assert "[0.0, 7.0]" in text.replace("{[}", "[").replace("{]}", "]")
    assert "[90.0, 100.0]" in text.replace("{[}", "[").replace("{]}", "]")
    assert "between training seeds" in text
    assert "over rows alone where no $\\pm$ stands" in text


def test_the_loss_of_a_model_that_was_decoded_in_the_later_way_alone_is_in_its_table():
    def decoded(model: str, temperature: float) -> Evaluation:
        return measured(model, 3.0, 0.5).model_copy(update={"decoding": {"temperature": temperature}})

    both = [decoded("a", 1.0), decoded("b", 1.0), decoded("a", 0.0), decoded("b", 0.0)]
    first, second = tables(render_latex([Results(kind="evaluate", evaluations=both)]))
    assert (len(first[0]), len(second[0])) == (3, 2)
    late = Results(kind="evaluate", evaluations=[decoded("c", 0.0)])
    first, second = tables(render_latex([Results(kind="evaluate", evaluations=both), late]))
    assert [row[0] for row in second] == ["Model", "a", "b", "c"]
    assert second[0] == first[0]
    assert second[3][1].startswith("3.00")
