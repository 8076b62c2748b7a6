"""The end tokens of student and teacher are compared before training, so that no student unlearns to end."""

from types import SimpleNamespace

import pytest
from transformers import GenerationConfig

from helpers.tiny import BOS_ID, END_ID, PAD_ID, tiny_model, tiny_tokenizer, token_id
from helpers.trainers import config, pair, rows
from promptkd.data import EncodedData
from promptkd.data.encode import EncodedExample
from promptkd.errors import RequestError
from promptkd.methods import Method
from promptkd.methods.token_method import cross_entropy
from promptkd.models import shared_vocabulary
from promptkd.objectives import reverse_kl
from promptkd.responses import ResponseMix
from promptkd.training import DistillTrainer
from promptkd.training.ends import PairEnds, with_end

READS = Method(ResponseMix(1.0), reverse_kl)
READS_NOT = Method(ResponseMix(0.0), loss=cross_entropy, reads_teacher=False)
SPARE = token_id("<spare1>")
TURN = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<pad>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer(eos="<|end|>", chat=None):
    made = tiny_tokenizer(eos=False, pad=None)
    made.eos_token, made.chat_template = eos, chat
    return made


def compare(student, teacher, teacher_ends=None, *, own=None, method=READS, template="auto", end_token="teacher"):
    """Stop ids, all notes, and the EOS of the student's tokenizer."""
    args, own = SimpleNamespace(template=template, end_token=end_token), GenerationConfig(eos_token_id=own)
    shared = shared_vocabulary(student, teacher or student)
    ends = PairEnds(args, method, shared, student, teacher, GenerationConfig(eos_token_id=teacher_ends))
    notes = ends.settle(own)
    stops, more = ends.stops(own)
    assert ends.settle(own) == []  # once
    return stops, [*notes, *more], student.eos_token


def test_equal_ends_need_no_word():
    assert compare(tokenizer(), tokenizer(), END_ID, own=END_ID) == ((END_ID,), [], "<|end|>")
    assert compare(tokenizer(), tokenizer(), [END_ID], own=[END_ID]) == ((END_ID,), [], "<|end|>")
    assert compare(tokenizer(None), tokenizer(None)) == ((), [], None)


def test_rows_end_as_the_teacher_does_where_it_never_writes_their_end():
    stops, (note,), eos = compare(tokenizer(), tokenizer("<pad>"), PAD_ID, own=END_ID)
    assert (stops, eos) == ((END_ID, PAD_ID), "<pad>")
    assert f"the student's rows would end with '<|end|>' (id {END_ID}), the teacher ends with '<pad>'" in note
    assert "--end_token student keeps the student's" in note


def test_the_students_end_is_kept_on_request_and_both_end_responses():
    stops, (note,), eos = compare(tokenizer(), tokenizer("<pad>"), PAD_ID, end_token="student")
    assert (stops, eos) == ((END_ID, PAD_ID), "<|end|>")
    assert "--end_token student keeps '<|end|>'" in note
    assert "promptkd sft" in note


def test_the_end_that_a_chat_template_writes_is_kept_and_both_end_responses():
    stops, (note,), eos = compare(tokenizer(chat=TURN), tokenizer(), END_ID)
    assert (stops, eos) == ((END_ID, PAD_ID), "<|end|>")
    assert "the chat template writes '<pad>'" in note
    assert "tune the teacher on them first (promptkd sft)" in note


def test_the_teachers_further_ends_end_responses_too():
    """As with an instructed teacher that knows the base's end, and writes another."""
    stops, (note,), eos = compare(tokenizer(), tokenizer("<pad>"), [PAD_ID, END_ID, BOS_ID], own=END_ID)
    assert (stops, eos) == (tuple(sorted((END_ID, PAD_ID, BOS_ID))), "<|end|>")
    assert note == f"Responses also end at '<s>' (id {BOS_ID}), '<pad>' (id {PAD_ID}), as the teacher's do."


def test_what_the_teachers_chat_template_writes_comes_first():
    _, (note, *_), eos = compare(tokenizer("<s>"), tokenizer("<|end|>", chat=TURN), [END_ID])
    assert eos == "<pad>"
    assert f"the teacher ends with '<pad>' (id {PAD_ID})" in note


def test_a_tokenizer_without_an_end_gets_the_teachers_unless_the_model_knows_it():
    stops, (note,), eos = compare(tokenizer(None), tokenizer(), END_ID)
    assert (stops, eos) == ((END_ID,), "<|end|>")
    assert "would end with nothing" in note
    assert compare(tokenizer(None), tokenizer(None), END_ID, own=END_ID) == ((END_ID,), [], None)


def test_a_teacher_that_comes_as_a_model_alone_is_known_by_its_configuration():
    _, (note, *_), eos = compare(tokenizer(), None, [PAD_ID, BOS_ID])
    assert eos == "<pad>"
    assert "End tokens differ" in note


def test_a_method_that_reads_no_teacher_keeps_the_rows_end():
    assert compare(tokenizer(), tokenizer("<pad>"), PAD_ID, method=READS_NOT) == ((END_ID,), [], "<|end|>")


def test_a_teacher_that_ends_with_nothing_the_student_has_is_refused():
    teacher = tokenizer()
    teacher.add_special_tokens({"eos_token": "<over>"})
    with pytest.raises(RequestError, match=r"ends its answers with '<over>' \(id 97\).*promptkd sft"):
        compare(tokenizer(), teacher, 97)
    stops, _, _ = compare(tokenizer(), teacher, [97, END_ID])
    assert stops == (END_ID,)


def test_rows_that_are_encoded_already_get_the_new_end():
    data = EncodedData([EncodedExample([5], ids, ("a",), "?", 0) for ids in ([6, END_ID], [6], [])], 0)
    assert [row.response_ids for row in with_end(data, END_ID, PAD_ID).examples] == [[6, PAD_ID], [6], []]
    assert with_end(data, None, PAD_ID) is data


@pytest.mark.slow
def test_a_trainer_ends_its_rows_as_the_teacher_does(tmp_path):
    student, _ = pair()
    teacher = tiny_model(layers=3, hidden=24, seed=2, eos_token_id=PAD_ID)
    ours, theirs = tokenizer(), tokenizer("<pad>")
    args = config(tmp_path, method="gkd", max_steps=1, prompt_learning_rate=1e-3)
    ended = [{"prompt": "a", "completion": "b"}] * 8
    made = DistillTrainer(student, teacher, args, ended, rows(4), ours, teacher_processing_class=theirs)
    assert {row.response_ids[-1] for row in made.train_dataset} == {PAD_ID}
    assert made.stop_ids == (END_ID, PAD_ID)
    assert sum("End tokens differ" in note for note in made.notes) == 1
    made.train()
    made.save_student(tmp_path / "student")
    again = type(ours).from_pretrained(tmp_path / "student")
    assert again.eos_token == "<pad>"
    assert set(made.model.generation_config.eos_token_id) == {END_ID, PAD_ID}
