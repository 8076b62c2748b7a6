"""Pairs whose tokenizers differ in some tokens: those are masked, or the pair is refused before anything is trained."""

import pytest

from helpers.tiny import VOCABULARY, tiny_tokenizer, token_id
from helpers.trainers import config, pair, rows
from promptkd.data.encode import EncodedData, EncodedExample
from promptkd.errors import RequestError
from promptkd.training import DistillTrainer
from promptkd.training.validation import validation_decoding

SPARE = token_id("<spare1>")


def renamed(tokens=("<spare1>",)):
    tokenizer = tiny_tokenizer()
    text = tokenizer.backend_tokenizer.to_str()
    for token in tokens:
        text = text.replace(f'"{token}"', f'"<other-{token[1:]}"')
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(text)
    return tokenizer


def trainer(folder, method, teacher_tokenizer, data=None, **settings):
    student, teacher = pair()
    if method != "promptkd":
        settings = {"prompt_learning_rate": 1e-3, **settings}
    args = config(folder, method=method, max_steps=1, **settings)
    given = {"teacher_processing_class": teacher_tokenizer}
    return DistillTrainer(student, teacher, args, data or rows(), rows(4), tiny_tokenizer(), **given)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("promptkd", {}),
        ("gkd", {"chunk_tokens": 0, "student_share": 1.0, "repetition_penalty": 1.1}),
        ("minillm", {}),
        ("kd", {"cross_entropy_share": 0.5}),
    ],
)
def test_tokens_of_one_side_take_no_part(tmp_path, method, settings):
    made = trainer(tmp_path, method, renamed(), **settings)
    before = made.model.get_output_embeddings().weight[SPARE].clone()
    (note,) = (each for each in made.notes if "left out of both" in each)
    assert f"'<spare1>' ({SPARE}) of the student, '<other-spare1>' ({SPARE}) of the teacher" in note
    made.train()
    assert (made.model.get_output_embeddings().weight[SPARE] == before).all()  # tied, and in no row
    assert made.teacher.vocabulary.masked == (SPARE,)
    assert validation_decoding(made).masked_ids == (SPARE,)
    assert made.evaluate()["eval_kl_to_teacher"] > 0


def test_rows_that_use_them_are_refused(tmp_path):
    data = EncodedData([EncodedExample([5, SPARE], [6], ("a",), "?", index) for index in range(4)], 0)
    with pytest.raises(RequestError, match="Row 0 of the training rows: the prompt uses '<spare1>'"):
        trainer(tmp_path, "kd", renamed(), data)
    with pytest.raises(RequestError, match=r"Every response ends with '<\|end\|>'"):
        trainer(tmp_path, "promptkd", renamed(("<|end|>",)))


@pytest.mark.slow
@pytest.mark.parametrize("other", ["merges", "end"])
@pytest.mark.parametrize("method", ["seqkd", "gkd"])
def test_a_method_that_reads_no_teacher_needs_no_shared_vocabulary(tmp_path, method, other):
    tokenizer = tiny_tokenizer(merges=()) if other == "merges" else renamed(("<|end|>",))
    settings = {} if method == "seqkd" else {"cross_entropy_share": 1.0}
    made = trainer(tmp_path, method, tokenizer, **settings)
    assert "The teacher, of which this method reads nothing, is not compared with the student." in made.notes[0]
    made.train()
    assert "eval_kl_to_teacher" not in made.evaluate()
    assert made.teacher.vocabulary.size == VOCABULARY
    if method == "gkd":
        with pytest.raises(RequestError, match=r"(split text differently|Every response ends)"):
            trainer(tmp_path, method, tokenizer)
