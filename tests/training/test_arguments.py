"""What `DistillTrainer` takes as transformers' and TRL's trainers do, and what of theirs it refuses in a sentence."""

import logging
from itertools import count

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from transformers import TrainingArguments
from trl import DistillationConfig

from helpers.tiny import save_model, tiny_tokenizer
from helpers.trainers import config, log, pair
from promptkd.errors import RequestError
from promptkd.training import DistillTrainer, PromptKDTrainer
from promptkd.training.callbacks import quiet

ANSWERED = [{"prompt": f"say {index}", "completion": "the " * (1 + index % 3)} for index in range(16)]
ASKED = [{"prompt": row["prompt"]} for row in ANSWERED]
BY_REFERENCES = {"eval_loss", "eval_rouge_l", "eval_rouge_1", "eval_exact_match", "eval_length_ratio"}
ADAPTIVE = {"method": "distillm", "prompt_learning_rate": 1e-3}
KD = {"method": "kd", "prompt_learning_rate": 1e-3}


def made(folder, train=ASKED, valid=None, *, others=None, models=None, tokenizer=None, **settings):
    tokenizer = tokenizer or tiny_tokenizer()
    given = {"teacher_processing_class": tokenizer, **(others or {})}
    trainer = PromptKDTrainer if settings.get("method", "promptkd") == "promptkd" else DistillTrainer
    ours = trainer(*(models or pair()), config(folder, **settings), train, valid, tokenizer, **given)
    quiet(ours)
    return ours


def trained(*args, **settings):
    ours = made(*args, **settings)
    ours.train()
    return ours


def untimed(metrics):
    return {name: value for name, value in metrics.items() if not name.endswith("seconds")}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [dict, DatasetDict])
def test_each_of_several_sets_is_measured_as_if_it_were_alone(tmp_path, kind):
    sets = kind({"a": Dataset.from_list(ANSWERED[:3]), "b": Dataset.from_list(ANSWERED[4:9])})
    ours = made(tmp_path, valid=sets)
    found = ours.evaluate()
    assert untimed(ours.evaluate("b")) == untimed(ours.evaluate(sets["b"]))
    for name in sets:
        alone = made(tmp_path, valid=sets[name]).evaluate()
        assert untimed(alone) == {
            metric.replace(f"eval_{name}_", "eval_"): value
            for metric, value in untimed(found).items()
            if metric.startswith(f"eval_{name}_")
        }
        assert any(f"eval_{name}_loss" in each for each in ours.state.log_history)


@pytest.mark.slow
def test_a_source_of_responses_hears_the_loss_of_all_sets_together(tmp_path):
    heard = []
    for valid in (ANSWERED[:8], {"a": ANSWERED[:3], "b": ANSWERED[3:8]}):
        ours = made(tmp_path, ANSWERED, valid, **ADAPTIVE)
        ours.method.responses.on_validation = heard.append
        ours.evaluate()
    assert heard[1] == pytest.approx(heard[0], rel=1e-6)


@pytest.mark.slow
def test_the_checkpoint_is_chosen_by_a_metric_of_one_set(tmp_path):
    validates = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    validates |= {"load_best_model_at_end": True, "metric_for_best_model": "a_eos_share", "greater_is_better": True}
    ours = made(tmp_path, valid={"a": ANSWERED[:3], "b": ANSWERED[3:6]}, max_steps=3, **validates)
    shown = iter([(0.5, 2.0, 9.0), (0.5, 1.0, 9.0), (0.5, 3.0, 0.0)])

    def evaluate(**_):
        metrics = dict(zip(("eval_a_eos_share", "eval_a_loss", "eval_b_loss"), next(shown), strict=True))
        ours.log(dict(metrics))
        ours.control = ours.callback_handler.on_evaluate(ours.args, ours.state, ours.control, metrics)
        return metrics

    ours.evaluate = evaluate
    ours.train()
    assert ours.state.best_global_step == 2  # of equals the one with the lowest loss of that set


@pytest.mark.parametrize(
    ("valid", "chosen_by", "told"),
    [
        ({"a": ANSWERED[:3], "b": ANSWERED}, "loss", "such as a_loss, b_loss. Got 'loss'"),
        ({"a": ANSWERED[:3], "b": ASKED}, "eval_b_rouge_l", r"eval_dataset\['b'\] has no references, and .* rouge_l"),
        (ASKED, "loss", "eval_dataset has no references"),
    ],
)
def test_a_metric_that_no_validation_measures_chooses_no_checkpoint(tmp_path, valid, chosen_by, told):
    with pytest.raises(RequestError, match=told):
        made(tmp_path, valid=valid, eval_strategy="steps", eval_steps=1, metric_for_best_model=chosen_by)


@pytest.mark.slow
def test_rows_without_references_are_measured_by_what_needs_none(tmp_path, caplog):
    with_references = untimed(made(tmp_path, valid=ANSWERED).evaluate())
    caplog.clear()
    with caplog.at_level(logging.WARNING, "promptkd.training.validation"):  # quieted where a command has run
        ours = made(tmp_path, valid=ASKED)
    told = [note for note in ours.notes if "no references" in note]
    assert len(told) == 1
    assert caplog.text.count("no references") == 1
    expected = {name: value for name, value in with_references.items() if name not in BY_REFERENCES}
    assert untimed(ours.evaluate()) == expected
    assert "eval_kl_to_teacher" in expected
    with pytest.raises(RequestError, match=r"eval_dataset\['b'\]: row 1: the row has no reference"):
        made(tmp_path, valid={"a": ANSWERED, "b": [ANSWERED[0], ASKED[1]]})


def test_a_schedule_that_only_a_loss_moves_warns_without_references(tmp_path):
    with pytest.warns(UserWarning, match="Without validation rows that have responses"):
        ours = made(tmp_path, ANSWERED, ASKED, **ADAPTIVE)
    ours.evaluate()
    assert ours.method.responses.best is None


@pytest.mark.slow
def test_a_method_that_samples_needs_no_response_of_the_data(tmp_path):
    runs = [trained(tmp_path / str(index), rows) for index, rows in enumerate((ASKED, ANSWERED))]
    assert log(runs[0]) == log(runs[1])


def test_a_method_that_learns_from_the_data_says_that_it_needs_responses(tmp_path):
    with pytest.raises(RequestError, match=r"No row of train_dataset has a response .* this method learns"):
        made(tmp_path, ASKED, **KD)


def endless():
    for index in count():
        yield {"prompt": f"say {index}"}


@pytest.mark.slow
@pytest.mark.parametrize("stream", [endless(), IterableDataset.from_generator(endless)], ids=["iterator", "datasets"])
def test_a_stream_gives_the_rows_that_its_steps_need(tmp_path, stream):
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    streamed = trained(tmp_path / "a", stream, **settings)
    assert next(iter(stream))["prompt"] in ("say 8", "say 0")  # an iterator was read no further
    whole = trained(tmp_path / "b", [{"prompt": f"say {index}"} for index in range(8)], **settings)
    assert log(streamed) == log(whole)


def test_empty_fields_of_structs_in_a_stream_are_left_out(tmp_path):
    messages = [[{"role": "user", "content": "the", "name": name}] for name in (None, "an")]
    rows = Dataset.from_list([{"messages": each} for each in messages * 2])
    shown = {"max_steps": 1, "template": "{{ messages }}", "max_prompt_length": 99}
    streamed = made(tmp_path, rows.to_iterable_dataset(), **shown).train_dataset
    assert streamed == made(tmp_path, rows, **shown).train_dataset
    assert "None" not in streamed[0].prompt


@pytest.mark.parametrize(
    ("train", "told"),
    [
        (iter(ASKED), r"is a stream .* Give max_steps"),
        (Dataset.from_list(ASKED).to_iterable_dataset(), "is a stream"),
        (DatasetDict(train=Dataset.from_list(ASKED)), r"such as data\['train'\]. Got several: 'train'"),
        ("rows.jsonl", r"Got the text 'rows.jsonl'; `datasets.load_dataset` reads a file"),
        (3, "Expected rows as `train_dataset`, such as a list"),
    ],
)
def test_what_is_no_data_set_of_known_length_is_refused(tmp_path, train, told):
    with pytest.raises(RequestError, match=told):
        made(tmp_path, train, max_steps=-1)


@pytest.mark.parametrize(("valid", "told"), [({}, "Got none"), ({"": ASKED}, "Got ''"), ("b", "Got the text 'b'")])
def test_what_is_no_set_to_validate_on_is_refused(tmp_path, valid, told):
    with pytest.raises(RequestError, match=f"`eval_dataset`.*{told}"):
        made(tmp_path, valid=valid)


def test_a_loaded_model_brings_the_tokenizer_of_its_name(tmp_path):
    own = tiny_tokenizer(chat=True)
    student = type(pair()[0]).from_pretrained(save_model(tmp_path / "student", pair()[0], own))
    ours = DistillTrainer(student, pair()[1], config(tmp_path), ASKED, teacher_processing_class=own)
    assert ours.processing_class.get_vocab() == own.get_vocab()
    assert ours.processing_class.chat_template == own.chat_template


@pytest.mark.parametrize(
    ("name", "told"),
    [("", "that has no name. Got None"), ("./gone", r"since its name, ./gone, leads to none\. .*gone")],
)
def test_a_name_that_leads_to_no_tokenizer_is_told(tmp_path, name, told):
    student, teacher = pair()
    student.name_or_path = name
    with pytest.raises(RequestError, match=f"`processing_class` beside a loaded model.*{told}"):
        DistillTrainer(student, teacher, config(tmp_path), ASKED)


def test_a_processor_is_no_tokenizer(tmp_path):
    with pytest.raises(RequestError, match="Expected a tokenizer as `processing_class`"):
        DistillTrainer(*pair(), config(tmp_path), ASKED, None, object())


@pytest.mark.parametrize("of", [DistillationConfig, TrainingArguments])
def test_settings_of_another_trainer_are_refused(tmp_path, of):
    args = of(str(tmp_path), use_cpu=True, **({"bf16": False} if of is DistillationConfig else {}))
    for trainer in (DistillTrainer, PromptKDTrainer):
        with pytest.raises(RequestError, match=rf"Expected a DistillConfig .* Got \w+.{of.__name__}"):
            trainer(*pair(), args, ASKED, processing_class=tiny_tokenizer())


def test_the_trainer_of_promptkd_trains_no_other_method(tmp_path):
    with pytest.raises(RequestError, match=r"PromptKD alone. Got settings of method 'gkd'; give them"):
        PromptKDTrainer(*pair(), config(tmp_path, method="gkd"), ASKED, processing_class=tiny_tokenizer())


@pytest.mark.parametrize(
    "name",
    [
        *("compute_loss_func", "compute_metrics", "data_collator", "formatting_func", "model_init"),
        *("optimizer_cls_and_kwargs", "preprocess_logits_for_metrics", "tools"),
    ],
)
def test_arguments_of_other_trainers_are_refused_with_advice(tmp_path, name):
    with pytest.raises(RequestError, match=f"PromptKDTrainer has no argument '{name}': "):
        made(tmp_path, others={name: [print]})
    made(tmp_path, others={name: None})


def test_an_argument_of_no_trainer_is_an_error(tmp_path):
    with pytest.raises(TypeError, match="no argument 'metod'"):
        made(tmp_path, others={"metod": None})


def test_prediction_is_refused(tmp_path):
    with pytest.raises(RequestError, match="`predict` is not supported"):
        made(tmp_path).predict(ASKED)
