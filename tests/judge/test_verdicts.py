"""What is read from a judge's text, and what is not."""

import time

import pytest

from promptkd.errors import RequestError
from promptkd.judge.questions import fill_prompt, load_prompt
from promptkd.judge.verdicts import read_preference, read_scores

SCORES = {
    "7 9": (7, 9),
    "7 9\nThe second is more complete.": (7, 9),
    "  7   9  ": (7, 9),
    "7, 9": (7, 9),
    "7; 9": (7, 9),
    "7 | 9": (7, 9),
    "7 and 9.": (7, 9),
    "7 & 9": (7, 9),
    "10 1": (10, 1),
    "7.5 8.25": (7.5, 8.25),
    "7/10 9/10": (7, 9),
    "7/10, 9/10": (7, 9),
    "7 out of 10, 9 out of 10": (7, 9),
    "7 / 10 and 9 / 10": (7, 9),
    "**7** **9**": (7, 9),
    "**7 9**": (7, 9),
    "`7 9`": (7, 9),
    "[7, 9]": (7, 9),
    "(7, 9)": (7, 9),
    "[[7]] [[9]]": (7, 9),
    "Scores: 7 9": (7, 9),
    "**Scores:** 7, 9": (7, 9),
    "The scores are: 7 and 9": (7, 9),
    "Rating: 7 9": (7, 9),
    '{"scores": [7, 9]}': (7, 9),
    "Here is my rating.\n\n7 9\n\nThe first is short.": (7, 9),
    "7 9\nAnswer 1: 7, because it is short. Answer 2: 9, because it is whole.": (7, 9),
    "Answer 1: 7\nAnswer 2: 9": (7, 9),
    "Answer 2: 9\nAnswer 1: 7": (7, 9),
    "answer 1: 7, answer 2: 9": (7, 9),
    "Answer 1: 7/10. Good. Answer 2: 9/10. Better.": (7, 9),
    "**Answer 1:** 7\n**Answer 2:** 9": (7, 9),
    "- **Answer 1**: 7 (short)\n- **Answer 2**: 9 (whole)": (7, 9),
    "Answer 1 = 7; Answer 2 = 9": (7, 9),
    "Answer 1 - 7\nAnswer 2 - 9": (7, 9),
    "Answer 1 – 7 – short\nAnswer 2 – 9 – whole": (7, 9),
    "Answer 1 score: 7\nAnswer 2 score: 9": (7, 9),
    "Answer 1's score is 7.\nAnswer 2's score is 9.": (7, 9),
    "Score for answer 1: 7\nScore for answer 2: 9": (7, 9),
    "Assistant 1: 7 Assistant 2: 9": (7, 9),
    "Response 1: 7 points\nResponse 2: 9 points": (7, 9),
    "Score 1: 7\nScore 2: 9": (7, 9),
    '{"answer_1": 7, "answer_2": 9}': (7, 9),
    '```json\n{\n  "answer_1": 7,\n  "answer_2": 9.5\n}\n```': (7, 9.5),
    '{"answer1_score": 7, "answer2_score": 9}': (7, 9),
    "<think>Perhaps 3 4?\n3 4</think>\n7 9": (7, 9),
    "7 9\r\nWindows lines": (7, 9),
    # nothing that can be said to be a verdict
    "": None,
    "   \n": None,
    "7": None,
    "7/10": None,
    "7/9": None,
    "7 9 8": None,
    "7-9": None,
    "79": None,
    "-7 9": None,
    "0 9": None,
    "7 11": None,
    "7 100": None,
    "7/100 9/100": None,
    "7 9\n\n8 9": None,
    "seven nine": None,
    "Both answers are good.": None,
    "Answer 1: 7": None,
    "Answer 1: 7\nAnswer 2: -9": None,
    "Answer 1: 7\nAnswer 2: 9\nAnswer 2: 8": None,
    "7 9\nAnswer 1: 9\nAnswer 2: 7": None,
    "Answer 1: 3 errors\nAnswer 2: 2 errors": None,
    "Answer 1: 3.5 errors\nAnswer 2: 2.5 errors": None,
    "Answer 1: 11\nAnswer 2: 9": None,
    "<score of answer 1> <score of answer 2>": None,
    "<think>7 9": None,
    "I refuse to rate 2 answers.": None,
    "nan nan": None,
    "9" * 5000: None,
}

FIRST, SECOND, TIE = (1, 0), (0, 1), (0.5, 0.5)
PREFERENCES = {
    "1": FIRST,
    "2": SECOND,
    "tie": TIE,
    "Tie.": TIE,
    "It's a tie": TIE,
    "2.": SECOND,
    "**2**": SECOND,
    "[2]": SECOND,
    '"2"': SECOND,
    "A": FIRST,
    "B": SECOND,
    "Answer 1": FIRST,
    "Answer 2 is better.": SECOND,
    "Answer 2 wins!": SECOND,
    "Response 1": FIRST,
    "Neither": TIE,
    "equal": TIE,
    "1\nIt names 2 facts where the other names none.": FIRST,
    "Both are good, but one has more.\n\n2": SECOND,
    "Verdict: 1": FIRST,
    "**Verdict:** 2": SECOND,
    "Verdict: tie": TIE,
    "My final verdict is: Answer 2": SECOND,
    "Winner: Answer 1.": FIRST,
    "Better answer: 2": SECOND,
    "Better: 2": SECOND,
    "The better answer is answer 1.": FIRST,
    "The second is richer.\nVerdict: 2\nThat is all.": SECOND,
    "[[1]]": FIRST,
    "I prefer the second. [[B]]": SECOND,
    "[[C]]": TIE,
    "[[tie]]": TIE,
    "My verdict is [[A]], since [[A]] is longer.": FIRST,
    "Answer 1 is better because it is right.": FIRST,
    "Answer 2 is clearly better: it is right.": SECOND,
    "<think>Verdict: 1</think>2": SECOND,
    # nothing that can be said to be a verdict
    "": None,
    "3": None,
    "12": None,
    "1 2": None,
    "1 or 2": None,
    "[[1]] or [[2]]": None,
    "Verdict: 1\nVerdict: 2": None,
    "1\nno, wait:\n2": None,
    "Answer 1 is not better.": None,
    "Is answer 1 better? Answer 2 is worse.": None,
    "Answer 1 is longer.": None,
    "Neither of them is bad, both have merit.": None,
    "<think>1": None,
}


@pytest.mark.parametrize("text", SCORES)
def test_scores(text):
    assert read_scores(text) == SCORES[text]


@pytest.mark.parametrize("text", PREFERENCES)
def test_preferences(text):
    assert read_preference(text) == PREFERENCES[text]


@pytest.mark.parametrize(
    "piece", [" ", "*", "[[", "answer 1 ", "answer 1:", "7 ", "7", "score ", "\n", "<think>", "a "]
)
@pytest.mark.parametrize("read", [read_scores, read_preference])
def test_a_hostile_text_takes_no_time(piece, read):
    start = time.perf_counter()
    read("answer 1" + piece * 50_000 + "!")
    read(piece * 50_000)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("task", ["score", "pairwise"])
def test_the_prompts_that_ship(task):
    text = fill_prompt(load_prompt(task), request="REQUEST", first="ONE", second="TWO")
    assert "{{" not in text
    assert text.index("REQUEST") < text.index("ONE") < text.index("TWO")
    assert [text.count(each) for each in ("REQUEST", "ONE", "TWO")] == [1, 1, 1]
    read = read_scores if task == "score" else read_preference
    assert read(text) is None  # a judge that repeats the question has no verdict


def test_a_placeholder_inside_an_answer_stays_text():
    filled = fill_prompt(
        "{{request}}|{{ first }}|{{ second }}", request="{{ first }}", first="{{ second }}", second="\\1"
    )
    assert filled == "{{ first }}|{{ second }}|\\1"


def test_a_prompt_of_the_users(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("Frage: {{ request }} A: {{first}} B: {{ second }} {json}", encoding="utf-8")
    assert fill_prompt(load_prompt("score", file), request="q", first="a", second="b") == "Frage: q A: a B: b {json}"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{{ request }} {{ first }}", "lacks {{ second }}"),
        ("{ request } { first } { second }", "lacks {{ request }}; it lacks {{ first }}; it lacks {{ second }}"),
        ("{{ request }} {{ first }} {{ second }} {{ rubric }}", "holds {{ rubric }}, which is unknown"),
    ],
)
def test_a_prompt_with_other_placeholders(tmp_path, text, told):
    file = tmp_path / "mine.txt"
    file.write_text(text)
    with pytest.raises(RequestError, match=r"must hold \{\{ request \}\}") as error:
        load_prompt("score", file)
    assert told in str(error.value)


def test_a_prompt_that_cannot_be_read(tmp_path):
    (tmp_path / "latin").write_bytes(b"\xe4{{ request }}")
    for path in (tmp_path / "none", tmp_path, tmp_path / "latin"):
        with pytest.raises(RequestError, match="the judge's prompt"):
            load_prompt("score", path)
