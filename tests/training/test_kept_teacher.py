"""A student that learns from kept logits: as from the teacher where all are kept, refused where the loss would lie."""

import json
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch

from helpers.kept import keep
from helpers.tiny import VOCABULARY, tiny_model, tiny_tokenizer
from helpers.trainers import config, log, pair, rows, trainer
from promptkd.data import kept_logits, kept_writing
from promptkd.data.batch import right_pad
from promptkd.data.kept_logits import INDEX, KeptLogits
from promptkd.data.kept_writing import KeptWriter, held_index
from promptkd.engine import head_logits, response_hidden
from promptkd.errors import RequestError
from promptkd.methods import Method, named_method
from promptkd.methods.token_method import cross_entropy
from promptkd.objectives import adaptive_kl, forward_kl, reverse_kl, skew_forward_kl
from promptkd.responses import ResponseMix, Responses
from promptkd.training import DistillTrainer
from promptkd.training.config import chosen_method

pytestmark = pytest.mark.slow

KD = named_method("kd")


@pytest.fixture(scope="module")
def logits(tmp_path_factory):
    """Eight of 97 tokens of the helpers' teacher on the helpers' rows."""
    return keep(tmp_path_factory.mktemp("kept") / "logits", pair()[1], rows(), 8)


def train(folder, kept, *, method=KD, student=None, **settings):
    made = trainer(folder, models=(student or pair()[0], kept), method=method, **settings)
    made.train()
    return made


def weights(made):
    return torch.cat([each.detach().flatten() for each in made.model.parameters()])


def test_an_index_that_a_killed_process_was_writing_does_not_keep_the_next_one_out(tmp_path):
    (tmp_path / f"{INDEX}.partial").write_text("{")
    assert held_index(tmp_path, overwrite=False) is None
    kept = keep(tmp_path, pair()[1], rows(), 8)
    (tmp_path / f"{INDEX}.partial").write_text("{")
    assert held_index(tmp_path, overwrite=False) == kept.index


def test_shards_that_a_killed_overwriting_left_are_replaced_by_the_next(tmp_path):
    kept = keep(tmp_path, pair()[1], rows(), 8)
    (tmp_path / INDEX).unlink()
    with pytest.raises(RequestError, match=r"holds logits-00000\.safetensors, .* or replace them by --overwrite"):
        held_index(tmp_path, overwrite=False)
    assert held_index(tmp_path, overwrite=True) is None
    KeptWriter(tmp_path, kept.settings, rows().examples, overwrite=True)
    assert not list(tmp_path.iterdir())
    (tmp_path / "logits-mine.txt").write_text("mine")
    with pytest.raises(RequestError, match=r"holds logits-mine\.txt"):
        held_index(tmp_path, overwrite=True)


SKEWED = partial(skew_forward_kl, alpha=0.1)


@pytest.mark.parametrize(
    ("objective", "chunk"), [(forward_kl, None), (reverse_kl, 3), (adaptive_kl, 0), (SKEWED, 3)], ids=list("fras")
)
def test_with_all_tokens_kept_the_losses_are_those_of_the_teacher(tmp_path, objective, chunk):
    kept = keep(tmp_path / "logits", pair()[1], rows(), VOCABULARY, dtype="float32")
    method = Method(Responses(), objective)
    ours = train(tmp_path / "kept", kept, method=method, chunk_tokens=chunk)
    theirs = train(tmp_path / "whole", pair()[1], method=method, chunk_tokens=chunk)
    for mine, other in zip(log(ours), log(theirs), strict=True):
        assert mine.keys() == other.keys()
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-6)
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kept_as", ["float16", "bfloat16", "float32"])
def test_kept_logits_of_any_precision_serve_a_student_that_computes_in_bfloat16(tmp_path, kept_as):
    kept = keep(tmp_path / "logits", pair()[1], rows(), 8, dtype=kept_as)
    half, single = (train(tmp_path / str(bf16), kept, bf16=bf16, max_steps=1) for bf16 in (True, False))
    assert log(half)[0]["student_kl"] == pytest.approx(log(single)[0]["student_kl"], rel=0.05)


def test_kept_targets_are_the_teachers_log_probabilities(logits):
    data, (_, teacher) = rows().examples, pair()
    batch = right_pad([row.prompt_ids for row in data[4:7]], [row.response_ids for row in data[4:7]])
    target = logits.target(batch)
    with torch.no_grad():
        log_p = head_logits(teacher, response_hidden(teacher, batch)).log_softmax(-1)
    top = log_p.topk(8, dim=-1)
    assert torch.equal(target.ids, top.indices)
    torch.testing.assert_close(target.log_probs[:, :-1], top.values, rtol=2**-11, atol=1e-7)
    rest = log_p.scatter(-1, top.indices, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(target.log_probs[:, -1], rest, rtol=2**-11, atol=1e-7)


def test_a_batch_opens_each_shard_once_and_has_its_rows_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_writing, "SHARD_TOKENS", 24)
    kept = keep(tmp_path / "logits", pair()[1], rows(), 8)
    shards = len(kept.index.shards)
    assert 1 < shards < 8
    mixed = [rows().examples[5 * index % 16] for index in range(16)]  # from one shard to another and back

    def target(of):
        return kept.target(right_pad([row.prompt_ids for row in of], [row.response_ids for row in of]))

    alone, opened, open_shard = [target([row]) for row in mixed], [], kept_logits.safe_open
    monkeypatch.setattr(kept_logits, "safe_open", lambda path, *how: opened.append(path) or open_shard(path, *how))
    together = target(mixed)
    assert len(opened) == len(set(opened)) == shards
    assert torch.equal(together.ids, torch.cat([each.ids for each in alone]))
    assert torch.equal(together.log_probs, torch.cat([each.log_probs for each in alone]))


def test_the_loss_is_a_lower_bound_and_mixes_with_cross_entropy(tmp_path, logits):
    ours, theirs = (train(tmp_path / str(n), each, max_steps=1) for n, each in enumerate((logits, pair()[1])))
    assert 0 < log(ours)[0]["student_kl"] < log(theirs)[0]["student_kl"]
    hard = train(tmp_path / "hard", pair()[1], method=Method(Responses(), loss=cross_entropy), max_steps=1)
    mixed = chosen_method(config(tmp_path, method="kd", cross_entropy_share=0.25, prompt_learning_rate=1e-3))
    share = train(tmp_path / "mixed", logits, method=mixed, max_steps=1)
    expected = 0.75 * log(ours)[0]["loss"] + 0.25 * log(hard)[0]["loss"]
    assert log(share)[0]["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("accumulation", [2, 4])
def test_micro_batches_change_nothing(tmp_path, logits, accumulation):
    whole = train(tmp_path / "whole", logits, per_device_train_batch_size=8)
    size = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    parts = train(tmp_path / "parts", logits, **size)
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-4, atol=1e-6)


def test_a_resumed_run_equals_the_undisturbed_one_bit_for_bit(tmp_path, logits):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = train(tmp_path / "whole", logits, **settings)
    resumed = trainer(tmp_path / "resumed", models=(pair()[0], logits), method=KD, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert log(resumed) == log(whole)
    assert torch.equal(weights(resumed), weights(whole))


def test_validation_measures_the_student_alone(tmp_path, logits):
    made = train(tmp_path, logits, eval_data=rows(3, seed=4), eval_strategy="steps", eval_steps=3)
    measured = {name for entry in log(made) for name in entry if name.startswith("eval_")}
    assert "eval_loss" in measured
    assert "eval_kl_to_teacher" not in measured


def test_the_folder_is_named_in_the_configuration_too(tmp_path, logits):
    args = config(tmp_path, kept_logits=str(logits.folder), method="kd", prompt_learning_rate=1e-3)
    made = DistillTrainer(pair()[0], None, args, rows(), None, tiny_tokenizer())
    assert made.teacher.kept.folder == logits.folder
    with pytest.raises(RequestError, match="Expected a teacher as `teacher_model`, or its logits as `kept_logits`"):
        DistillTrainer(pair()[0], None, config(tmp_path), rows(), None, tiny_tokenizer())


def test_a_masked_token_has_no_probability(tmp_path):
    data, (student, teacher) = rows(), pair()
    kept = keep(tmp_path / "logits", teacher, data, VOCABULARY, masked=(70, 71))
    batch = right_pad([row.prompt_ids for row in data.examples], [row.response_ids for row in data.examples])
    target = kept.target(batch)
    hidden = target.ids >= 70
    hidden &= target.ids <= 71
    assert target.log_probs[:, :-1][hidden].exp().max() == 0
    assert log(train(tmp_path / "run", kept, student=student))[0]["student_kl"] > 0


def test_a_student_with_absent_and_padding_columns(tmp_path, logits):
    student = tiny_model("llama", layers=2, hidden=16, seed=1, vocabulary=VOCABULARY + 7)
    made = train(tmp_path, logits, student=student)
    assert all(entry["student_kl"] > 0 for entry in log(made))


REFUSED = [
    ({"method": "promptkd"}, "asks the teacher about tokens that a model writes"),
    ({"method": "gkd"}, "asks the teacher about tokens that a model writes"),
    ({"method": "imitkd"}, "asks the teacher about tokens that a model writes"),
    ({"method": "minillm"}, "asks the teacher about tokens that a model writes"),
    ({"method": "distillm"}, "asks the teacher about tokens that a model writes"),
    ({"method": "dpkd"}, "asks the teacher about tokens that a model writes"),
    ({"method": "opd"}, "asks the teacher about tokens that a model writes"),
    ({"method": "skd"}, "asks the teacher about tokens that a model writes"),
    ({"method": "opcd"}, "asks the teacher about tokens that a model writes"),
    ({"method": "distillm2"}, "--method kd --objective skew_forward_kl"),
    ({"method": "taid", "student_share": 0.0}, "cannot be told from kept logits"),
    ({"method": "veto", "student_share": 0.0}, "cannot be told from kept logits"),
    ({"method": "abkd", "student_share": 0.0}, "cannot be told from kept logits"),
    ({"method": "eopd", "student_share": 0.0}, "cannot be told from kept logits"),
    ({"method": "kd", "objective": "todi"}, "todi cannot be told"),
    ({"method": "kd", "student_share": 0.5}, "asks the teacher about tokens that a model writes"),
    ({"method": "okd"}, "a part of the teacher cannot be trained"),
    ({"method": "kd", "teacher_adapter": "prompt"}, "a part of the teacher cannot be trained"),
    ({"method": "seqkd"}, "learns nothing from a teacher's distribution"),
    ({"method": "kd", "cross_entropy_share": 1.0}, "learns nothing from a teacher's distribution"),
    ({"method": "kd", "distillation_temperature": 2.0}, "leave it at 1, or keep them all"),
    ({"method": "kd", "objective": "reverse_kl"}, "reverse_kl cannot be told from kept logits"),
    ({"method": "kd", "objective": "skew_reverse_kl"}, "skew_reverse_kl cannot be told"),
    ({"method": "gkd", "student_share": 0.0}, "reverse_kl cannot be told"),
    ({"method": "gkd", "student_share": 0.0, "beta": 0.7}, "jensen_shannon with beta 0.7 cannot be told"),
    ({"method": "kd", "objective": "reverse_kl", "cross_entropy_share": 0.5}, "reverse_kl cannot be told"),
    ({"method": "kd", "template": "teacher"}, "--template teacher needs the teacher's tokenizer"),
    ({"method": "kd", "teacher_dtype": "bfloat16"}, "--teacher_dtype has no effect"),
]


@pytest.mark.parametrize(("chosen", "told"), REFUSED, ids=lambda each: str(each)[:40])
def test_what_kept_logits_cannot_tell_is_refused(tmp_path, logits, chosen, told):
    args = config(tmp_path, kept_logits=str(logits.folder), **{"prompt_learning_rate": 1e-3, **chosen})
    with pytest.raises(RequestError, match=told):
        DistillTrainer(pair()[0], None, args, rows(), None, tiny_tokenizer())


def test_a_loss_of_ones_own_is_refused_at_its_objective(tmp_path, logits):
    def loss(step):
        return step.pair.student_loss(reverse_kl, step.student_hidden, step.teacher_hidden(step.batch))

    with pytest.raises(RequestError, match="reverse_kl cannot be told"):
        train(tmp_path, logits, method=Method(Responses(), loss=loss))


def test_rows_that_were_not_kept_are_refused(tmp_path, logits):
    others = rows(18, seed=0)
    with pytest.raises(RequestError, match=r"2 of 18 training rows have no logits in .*, row 16 among them"):
        trainer(tmp_path, data=others, models=(pair()[0], logits), method=KD)
    with pytest.raises(RequestError, match=r"max_completion_length 8 \(now 7\)"):
        trainer(tmp_path, data=rows(18), models=(pair()[0], logits), method=KD, max_completion_length=7)


def test_another_vocabulary_is_refused(tmp_path, logits):
    index = logits.index.model_copy(deep=True)
    index.settings.vocabulary_sha256 = "other"
    logits = KeptLogits(logits.folder)
    logits.index = index
    with pytest.raises(RequestError, match="the student's tokenizer has other tokens or ids"):
        trainer(tmp_path, models=(pair()[0], logits), method=KD)


def damage(folder, how):
    shard = folder / "logits-00000.safetensors"
    if how == "cut":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif how == "changed":
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    elif how == "gone":
        shard.unlink()
    elif how == "index":
        (folder / "index.json").unlink()
    else:
        index = json.loads((folder / "index.json").read_text())
        index |= {"version": 2} if how == "version" else {"error": None}
        (folder / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("cut", "is damaged: it is not what was written"),
        ("changed", "is damaged: it is not what was written"),
        ("gone", "a shard of kept logits, is not there"),
        ("index", "Expected kept logits in"),
        ("version", "is no index of kept logits of version 1"),
        ("unfinished", "holds 16 of 16 rows so far"),
    ],
)
def test_damaged_or_unfinished_logits_are_refused(tmp_path, logits, how, told):
    folder = tmp_path / "logits"
    shutil.copytree(logits.folder, folder)
    damage(folder, how)
    with pytest.raises(RequestError, match=told):
        KeptLogits(folder)


def test_sources_that_write_nothing_may_be_ones_own(tmp_path, logits):
    method = replace(KD, responses=ResponseMix(0.0))
    assert log(train(tmp_path, logits, method=method))[0]["student_kl"] > 0


def test_a_teacher_beside_kept_logits_or_among_several_is_refused(tmp_path, logits):
    with pytest.raises(RequestError, match="Expected None as `teacher_model` beside `kept_logits`"):
        trainer(tmp_path, models=pair(), method=KD, kept_logits=str(logits.folder))
    for others in ({"b": KeptLogits(logits.folder)}, {"b": pair()[1]}):
        with pytest.raises(RequestError, match=r"the place of a single teacher\. Got those of 'a' among several"):
            trainer(tmp_path, models=(pair()[0], {"a": logits, **others}), method=KD)


def test_encoded_rows_that_are_too_long_for_the_student_are_refused(tmp_path, logits):
    short = tiny_model("llama", layers=2, hidden=16, seed=1, max_position_embeddings=12)
    limits = {"max_prompt_length": 2, "max_completion_length": 2}
    with pytest.raises(RequestError, match=r"The student has 12 positions, and \d+ are needed"):
        trainer(tmp_path, models=(short, logits), method=KD, **limits)
