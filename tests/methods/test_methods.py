"""Every named method: trains, is invariant to how its rows are cut into micro-batches, and does what its name says."""

import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from peft.tuners.lora import LoraLayer

from helpers.models import response_logits
from helpers.paper_loops import distillm2_skew, distillm2_student, distillm2_teacher, softmax
from helpers.tiny import VOCABULARY, tiny_model
from helpers.trainers import FixedResponses, config, log, pair, rows, trainer
from promptkd.data.batch import right_pad
from promptkd.engine import ChunkedLoss, response_hidden
from promptkd.errors import RequestError
from promptkd.methods import METHODS, Method, MethodSettings, named_method
from promptkd.methods.okd import OnlineModule, OnlineTeacher
from promptkd.models.adapters import LoraFactory, PromptLossSettings, TunerStep
from promptkd.models.pair import Pair
from promptkd.objectives import forward_kl, reverse_kl
from promptkd.responses import AdaptiveReplay, ResponseMix, Responses, Sampler, Speculation, Speculative, TeacherMixed
from promptkd.settings import Reader
from promptkd.training import DistillConfig
from promptkd.training.collapse import findings
from promptkd.training.config import chosen_method
from promptkd.training.rollout import Rollout


def fixed(name, **settings):
    return replace(named_method(name, MethodSettings(**settings)), responses=FixedResponses())


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_under_bfloat16_autocast_steps_of_every_method_move_every_weight(tmp_path, name):
    """A pass without a graph before the student's must leave no cast of a weight that has none either."""
    ours = trainer(tmp_path, method=named_method(name), max_steps=2, bf16=True)  # LoRA moves one half first
    trained = [*ours.model.named_parameters(), *((str(i), each) for i, each in enumerate(adapter_of(ours)))]
    before = [weight.detach().clone() for _, weight in trained]
    ours.train()
    assert ours.state.global_step == 2
    assert all(math.isfinite(entry["loss"]) for entry in log(ours))
    assert {weight.dtype for _, weight in trained} == {torch.float32}
    assert [name for (name, weight), old in zip(trained, before, strict=True) if torch.equal(weight, old)] == []


def adapter_of(ours):
    return [] if ours.adapter is None else ours.adapter.parameters()


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_micro_batches_and_chunks_do_not_matter(tmp_path, name, float64_inside):
    """8 x 1 = 2 x 4, in chunks of all and 3 tokens: log, student and adapter after two float64 steps. So for 1 x 8."""
    outcomes = []
    windows = [(8, 1, 0), (2, 4, 3)] + ([(1, 8, 256)] if name in ("promptkd", "distillm") else [])
    for batch, accumulation, chunk in windows:
        ours = trainer(
            tmp_path / str(batch),
            method=fixed(name),
            models=pair(torch.float64),
            max_steps=2,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            chunk_tokens=chunk,
        )
        ours.train()
        outcomes.append((log(ours), [*ours.model.parameters(), *adapter_of(ours)]))
    for entries, parameters in outcomes[1:]:
        for entry, expected in zip(entries, outcomes[0][0], strict=True):
            assert entry.keys() == expected.keys()
            for key, value in expected.items():
                assert entry[key] == pytest.approx(value, rel=1e-5, abs=1e-8), key
        for mine, theirs in zip(parameters, outcomes[0][1], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_two_seeds_differ(tmp_path, name):
    def student(seed):
        ours = trainer(tmp_path / str(seed), method=named_method(name), seed=seed, max_steps=1)
        ours.train()
        assert all(math.isfinite(entry["loss"]) for entry in log(ours))
        return torch.cat([parameter.flatten() for parameter in ours.model.parameters()])

    assert not torch.equal(student(1), student(2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "made"),
    [
        *(("promptkd-lora", {}), ("promptkd-full", {}), ("okd", {}), ("distillm", {"student_share": 0.5})),
        *(("opd", {"teacher_adapter": "prompt"}), ("distillm2", {"teacher_adapter": "prompt"})),
        ("skd", {"teacher_adapter": "prompt", "student_share": 0.5, "skd_top_k": 40, "objective": "reverse_kl"}),
        *(("opcd", {}), ("opsd", {"kl_clip": 0.01}), ("abkd", {"student_share": 0.5}), ("eopd", {})),
    ],
)
def test_every_adapter_and_the_buffer_resume_bit_for_bit(tmp_path, name, made):
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    whole = trainer(tmp_path / "whole", method=named_method(name, MethodSettings(**made)), **settings)
    whole.train()
    resumed = trainer(tmp_path / "resumed", method=named_method(name, MethodSettings(**made)), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert log(resumed) == log(whole)
    for mine, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, other)
    assert resumed.method.responses.state_dict() == whole.method.responses.state_dict()
    if whole.adapter is not None:
        for mine, other in zip(resumed.adapter.parameters(), whole.adapter.parameters(), strict=True):
            assert torch.equal(mine, other)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["promptkd-lora", "promptkd-full", "okd"])
def test_the_plain_teacher_stays_what_it_was(tmp_path, name):
    student, teacher = pair()
    data = rows(4)
    batch = right_pad([row.prompt_ids for row in data.examples], [row.response_ids for row in data.examples])
    with torch.no_grad():
        before = response_hidden(teacher, batch)
    ours = trainer(tmp_path, data=data, models=(student, teacher), method=fixed(name), prompt_learning_rate=1e-2)
    ours.train()
    with torch.no_grad():
        plain = ours.teacher.plain_hidden(batch)
        adapted = ours.teacher.adapted_hidden(batch)
    assert torch.equal(plain, before)
    assert not torch.allclose(adapted, before, atol=1e-4)


@pytest.mark.slow
def test_adapters_lower_the_divergence_to_the_student(tmp_path):
    for name in ("promptkd", "promptkd-lora", "promptkd-full", "okd"):
        ours = trainer(
            tmp_path / name,
            method=fixed(name),
            data=rows(4),
            max_steps=12,
            learning_rate=0.0,
            prompt_learning_rate=1e-2,
            **({} if name == "okd" else {"regularizer_schedule": "none"}),
        )
        ours.train()
        divergences = [entry["prompt_kl"] for entry in log(ours)]
        assert divergences[-1] < divergences[0], name


@pytest.mark.slow
def test_trainable_shares(tmp_path):
    student, teacher = pair()
    total = sum(parameter.numel() for parameter in teacher.parameters())
    prompt = trainer(tmp_path, models=(student, teacher), prompt_length=7)
    assert prompt.trainable_share() == (7 * 24, 7 * 24 / total)
    full = trainer(tmp_path, models=pair(), method=named_method("promptkd-full"))
    assert full.trainable_share() == (total, 1.0)
    lora = trainer(tmp_path, models=pair(), method=Method(FixedResponses(), reverse_kl, LoraFactory(adapter_rank=2)))
    numbers, share = lora.trainable_share()
    assert 0 < numbers < total
    assert share == numbers / total
    assert trainer(tmp_path, models=pair(), method=named_method("kd")).trainable_share() == (0, 0.0)


class StudentAlone(Responses):
    """Every response is the student's, without a share."""

    def __call__(self, rows, sample, progress):
        return sample.student([row.prompt_ids for row in rows])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "share"), [("imitkd", 0.0), ("gkd", 1.0), ("distillm", 0.0), ("distillm", 1.0)])
def test_mixture_shares_zero_and_one_are_the_pure_forms(tmp_path, name, share):
    """For distillm in its first step, before anything can be replayed."""
    pure = StudentAlone() if share else Responses()
    steps = 1 if name == "distillm" else 2
    mixed = named_method(name, MethodSettings(student_share=share))
    runs = []
    for method in (mixed, replace(mixed, responses=pure)):
        ours = trainer(tmp_path, models=pair(), method=method, max_steps=steps)
        ours.train()
        shown = [{key: entry[key] for key in entry if key not in source_metrics(mixed)} for entry in log(ours)]
        runs.append((shown, torch.cat([parameter.detach().flatten() for parameter in ours.model.parameters()])))
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])


def source_metrics(method):
    return {*method.responses.metrics(), "repetition"}  # the latter is of responses that a model may write


@pytest.mark.slow
def test_a_fixed_prompt_teaches_as_a_teacher_that_carries_it(tmp_path):
    """Learning rate 0 for the prompt is distillation from that prompted teacher, step for step."""
    ours = trainer(tmp_path / "a", models=pair(), prompt_learning_rate=0.0)
    prompt = ours.adapter.module.embeddings.detach().clone()
    ours.train()
    student, teacher = pair()
    plain = trainer(tmp_path / "b", models=(student, teacher), method=Method(FixedResponses(), reverse_kl))
    plain.teacher.adapted_hidden = lambda batch: response_hidden(teacher, batch, prompt)
    plain.train()
    for mine, other in zip(log(ours), log(plain), strict=True):
        assert mine["student_kl"] == other["student_kl"]
    for mine, other in zip(ours.model.parameters(), student.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.slow
def test_a_cross_entropy_share_mixes_the_two_losses(tmp_path):
    def loss(**settings):
        ours = trainer(tmp_path, models=pair(torch.float64), method=fixed("kd", **settings), max_steps=1)
        ours.train()
        entry = log(ours)[0]
        return entry.get("student_kl", entry.get("student_loss"))

    soft, hard = loss(), loss(cross_entropy_share=1.0)
    assert loss(cross_entropy_share=0.25) == pytest.approx(0.75 * soft + 0.25 * hard, rel=1e-9)


def test_temperature_divides_both_models_logits():
    q, p = torch.randn(5, 11, dtype=torch.float64), torch.randn(5, 11, dtype=torch.float64)
    for name, plain in (("kd", forward_kl), ("promptkd", reverse_kl)):
        method = named_method(name, MethodSettings(distillation_temperature=2.0))
        torch.testing.assert_close(method.objective(q, p), plain(q / 2, p / 2))


@pytest.mark.slow
def test_plain_text_adds_its_cross_entropy(tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text('{"text": "the cat and the hat"}\n{"text": "an ant in the van"}\n')
    settings = {"method": fixed("minillm"), "max_steps": 1, "language_data": str(file), "max_prompt_length": 16}
    with_text = trainer(tmp_path / "a", models=pair(), language_weight=0.5, **settings)
    with_text.train()
    without = trainer(tmp_path / "b", models=pair(), language_weight=0.0, **settings)
    without.train()
    entry, other = log(with_text)[0], log(without)[0]
    assert entry["language_loss"] == other["language_loss"] > 0
    assert entry["loss"] - other["loss"] == pytest.approx(0.5 * entry["language_loss"], rel=1e-4)


@pytest.mark.slow
def test_plain_text_never_has_all_its_logits_at_once(tmp_path, monkeypatch):
    file = tmp_path / "text.jsonl"
    file.write_text('{"text": "the cat and the hat"}\n')
    settings = {"max_steps": 1, "language_data": str(file), "max_prompt_length": 16}
    entries = []
    for chunk in (0, 3):
        if chunk:
            monkeypatch.setattr("promptkd.training.student_loss.head_logits", None)
        made = trainer(tmp_path / str(chunk), models=pair(), method=fixed("minillm"), chunk_tokens=chunk, **settings)
        made.train()
        entries.append(log(made)[0])
    assert entries[1]["language_loss"] == pytest.approx(entries[0]["language_loss"], rel=1e-5)
    assert entries[1]["grad_norm"] == pytest.approx(entries[0]["grad_norm"], rel=1e-4)


def sampler():
    return Sampler(
        student=lambda prompts: [[1] * len(prompt) for prompt in prompts],
        mixed=lambda prompts, share: [[2] for _ in prompts],
        speculative=lambda prompts, read, how: [
            [3, len(own), len(other), how.top_k] for own, other in zip(prompts, read, strict=True)
        ],
    )


def test_sources_of_responses():
    data = rows(200).examples
    own = [row.response_ids for row in data]
    assert ResponseMix(0.0)(data, sampler(), 0.0) == own
    assert ResponseMix(1.0)(data, sampler(), 0.0) == [[1] * len(row.prompt_ids) for row in data]
    torch.manual_seed(0)
    mixed = ResponseMix(0.3)(data, sampler(), 0.0)
    students = sum(set(response) == {1} for response in mixed)
    assert 40 <= students <= 80  # 60 expected, 6.5 the deviation
    assert TeacherMixed(0.2)(data, sampler(), 0.0) == [[2]] * 200
    corrected = Speculative(1.0, Speculation(top_k=7))
    assert corrected(data, sampler(), 0.0) == [[3, len(row.prompt_ids), len(row.prompt_ids), 7] for row in data]
    informed = [replace(row, teacher_prompt_ids=[9, *row.prompt_ids]) for row in data]
    assert corrected(informed, sampler(), 0.0) == [[3, len(row.prompt_ids), len(row.prompt_ids) + 1, 7] for row in data]
    assert Speculative(0.0, Speculation())(data, sampler(), 0.0) == own
    assert TeacherMixed(0.0)(data, sampler(), 0.0) == [[1] * len(row.prompt_ids) for row in data]


def test_the_adaptive_share_rises_when_validation_gets_worse():
    source = AdaptiveReplay(start=0.0, step=0.4)
    for loss in (3.0, 2.0, 2.5, 2.1, 1.9, 5.0):
        source.on_validation(loss)
    assert source.share == 1.0  # 2.5, 2.1 and 5.0 exceed the least so far: 0.4, 0.8, at most 1
    assert source.best == 1.9


@pytest.mark.slow
def test_validation_in_a_run_moves_the_adaptive_share(tmp_path):
    """At a rate that ruins the student, the share of each step is what the losses logged before it say."""
    ours = trainer(
        tmp_path,
        method=named_method("distillm", MethodSettings(replay_step=0.3)),
        eval_data=rows(4, seed=5),
        eval_strategy="steps",
        eval_steps=1,
        max_steps=4,
        learning_rate=1.0,
    )
    ours.train()
    share, best, shares, expected = 0.0, None, [], []
    for entry in log(ours):
        if "student_share" in entry:
            shares.append(entry["student_share"])
            expected.append(share)
        elif "eval_loss" in entry:
            share += 0.3 if best is not None and entry["eval_loss"] > best else 0.0
            best = entry["eval_loss"] if best is None else min(best, entry["eval_loss"])
    assert shares == pytest.approx(expected)
    assert shares[-1] > 0


def replaying(start, capacity, count, **settings):
    """A source, `count` rows, and a sampler whose responses name the prompt and how often it was called."""
    calls = []

    def student(prompts):
        calls.append(len(prompts))
        return [[*prompt, 50 + len(calls)] for prompt in prompts]

    data = [replace(row, row=0) for row in rows(count).examples]  # as turns of one conversation have one number
    return AdaptiveReplay(start=start, capacity=capacity, **settings), data, replace(sampler(), student=student), calls


def test_the_replay_buffer_brings_rows_with_their_answers_and_forgets_the_oldest():
    source, data, sampled, calls = replaying(1.0, 3, 4)
    first = source.answered(data, sampled, 0.0)  # all new
    assert first == [(row, [*row.prompt_ids, 51]) for row in data]
    assert list(source.buffer) == first[1:]
    assert source.metrics() == {"student_share": 1.0, "replay_size": 3.0, "replayed_share": 0.0}
    torch.manual_seed(0)
    second = source.answered(data[:1] * 30, sampled, 1.0)  # all from the buffer, the first row not among them
    assert {first.index(each) for each in second} == {1, 2, 3}
    assert source.metrics()["replayed_share"] == 1.0
    assert calls == [4]
    again = AdaptiveReplay()
    again.load_state_dict(source.state_dict())
    assert again.state_dict() == source.state_dict()
    assert list(again.buffer) == list(source.buffer)


def test_a_replay_buffer_starts_from_scratch_in_the_next_training():
    source, data, sampled, _ = replaying(0.5, 9, 4, step=0.3)
    source.on_validation(2.0)  # before training
    source.answered(data, sampled, 0.0)
    assert source.best == 2.0
    source.on_validation(3.0)
    source.answered(data * 5, sampled, 0.5)
    assert source.share == 0.8
    assert source.buffer
    held = list(source.buffer)
    source.answered(data, sampled, 0.0)
    assert not any(each in held for each in source.buffer)
    assert (source.share, source.best) == (0.5, None)


def test_replayed_answers_are_their_own_rows_while_the_buffer_is_full():
    """New samples push old ones out of the buffer in the very step that replays some."""
    source, data, sampled, _ = replaying(0.7, 5, 8)
    replayed = []
    for step in range(40):
        answered = source.answered(data, sampled, step / 40)
        assert len(answered) == len(data)
        for row, response in answered:
            assert response == row.response_ids or response[:-1] == row.prompt_ids
        replayed.append(source.replayed)
    assert replayed[0] == 0
    assert sum(replayed[30:]) / 10 == pytest.approx(0.7 * 0.875, abs=0.15)  # φ times the mean of k / K


def test_a_replay_buffer_of_an_older_version_is_refused():
    source = AdaptiveReplay()
    source.load_state_dict({"share": 0.1, "best": 2.0, "buffer": {}})
    with pytest.raises(RequestError, match="replay buffer is of an older version"):
        source.load_state_dict({"share": 0.1, "best": 2.0, "buffer": {4: [5, 6]}})


def test_wrong_choices_are_told(tmp_path):
    with pytest.raises(RequestError, match=r"Expected a method of .*okd.*promptkd.* Got 'promtkd'"):
        named_method("promtkd")
    with pytest.raises(ValueError, match="either an objective or a loss"):
        Method(ResponseMix(0.0))
    with pytest.raises(RequestError, match="mu must lie in"):
        config(tmp_path, mu=1.5)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("seqkd", {"objective": "reverse_kl"}),
        ("minillm", {"cross_entropy_share": 0.5}),
        ("dpkd", {"distillation_temperature": 2.0}),
        ("promptkd", {"student_share": 0.5}),
        ("promptkd", {"beta": 0.5}),
        ("kd", {"alpha": 0.2}),
        ("akl", {"objective": "jensen_shannon", "mu": 0.2}),
        ("gkd", {"clip_ratio": None}),
        ("imitkd", {"replay_step": 0.2}),
        ("opd", {"objective": "forward_kl"}),
        ("distillm2", {"student_share": 0.5}),
        ("distillm", {"adaptive_alpha": False}),
    ],
)
def test_settings_without_effect_are_refused(name, settings):
    with pytest.raises(RequestError, match=f"{name} takes no {list(settings)[-1]}"):
        named_method(name, MethodSettings(**settings))


def test_a_refused_setting_is_told_with_the_one_that_may_be_meant():
    with pytest.raises(
        RequestError, match=r"takes no alpha, beta\. Leave them out, or do you mean ab_alpha and ab_beta\?"
    ):
        named_method("abkd", MethodSettings(alpha=0.2, beta=0.7))
    with pytest.raises(RequestError, match=r"kd takes no alpha\. Leave it out\.$"):
        named_method("kd", MethodSettings(alpha=0.2))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        pytest.param("kd", {"clip_ratio": None}, "kd takes no clip_ratio", id="of another method"),
        pytest.param("kd", {"beta": 0.5}, "kd takes no beta", id="of another objective"),
        pytest.param("kd", {"prompt_length": 3}, "kd takes no prompt_length", id="of an adapter, without one"),
        pytest.param("promptkd", {"adapter_rank": 3}, "promptkd takes no adapter_rank", id="of another adapter"),
        pytest.param(
            "promptkd", {"teacher_adapter": "lora", "prompt_text": "a"}, "takes no prompt_text", id="of a replaced one"
        ),
        pytest.param(
            "promptkd", {"prompt_length": 0, "prompt_kl": "forward"}, "without a teacher adapter", id="of no prompt"
        ),
        pytest.param(
            "gkd",
            {"prompt_weight_decay": 0.1},
            "gkd without a teacher adapter takes no prompt_weight_decay",
            id="tuner",
        ),
        pytest.param("kd", {"regularizer_kl": "forward"}, "without a teacher adapter", id="of the prompt's loss"),
        pytest.param(
            "okd", {"prompt_kl": "forward"}, "okd takes no prompt_kl", id="of a loss that is not the adapter's"
        ),
        pytest.param(
            "kd", {"mu": 0.1, "alpha": 0.2}, "kd takes no alpha, mu. Leave them out", id="several of them at once"
        ),
    ],
)
def test_a_run_refuses_settings_that_nothing_reads(tmp_path, name, settings, message):
    with pytest.raises(RequestError, match=message):
        chosen_method(DistillConfig(str(tmp_path), method=name, use_cpu=True, **settings))


def test_a_given_method_refuses_settings_of_an_adapter_that_it_has_not(tmp_path):
    def choose(method, **settings):
        return chosen_method(DistillConfig(str(tmp_path), use_cpu=True, **settings), method)

    bare, lora = Method(ResponseMix(0.0), forward_kl), Method(ResponseMix(0.0), forward_kl, LoraFactory)
    with pytest.raises(RequestError, match="The given method takes no prompt_length"):
        choose(bare, prompt_length=3)
    with pytest.raises(RequestError, match="The given method without a teacher adapter takes no prompt_refresh"):
        choose(bare, prompt_refresh="stale")
    with pytest.raises(RequestError, match="The given method takes no prompt_text"):
        choose(lora, prompt_text="a")
    assert choose(lora, adapter_rank=3, adapter_alpha=8.0).adapter == LoraFactory(adapter_rank=3, adapter_alpha=8.0)
    made = replace(lora, adapter=LoraFactory(adapter_rank=3))
    assert choose(made, adapter_rank=3).adapter == LoraFactory(adapter_rank=3)
    with pytest.raises(RequestError, match="takes no adapter_rank"):
        choose(made, adapter_rank=4)


def test_the_name_of_an_adapter_warns_and_works():
    with pytest.warns(FutureWarning, match=r"'lora'\) is deprecated; write Method\(adapter=LoraFactory\)"):
        assert Method(ResponseMix(0.0), forward_kl, teacher_adapter="lora").adapter is LoraFactory
    with pytest.warns(FutureWarning, match="adapter=None"):
        assert Method(ResponseMix(0.0), forward_kl, "none").adapter is None


def test_old_names_of_what_a_class_defines_warn_and_work():
    with pytest.warns(FutureWarning, match=r"Counted.figures is deprecated; write metrics\. The old form goes with"):

        class Counted(Responses):
            def figures(self):
                return {"counted": 1.0}

    assert Counted().metrics() == {"counted": 1.0}
    with pytest.warns(FutureWarning, match="Off.switched_off is deprecated; write disabled"):

        class Off(OnlineTeacher):
            def switched_off(self):
                return "off"

    assert Off(OnlineModule(4, 2, seed=0)).disabled() == "off"


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("promptkd", {"objective": "jensen_shannon", "beta": 0.5}),
        ("kd", {"objective": "skew_forward_kl", "alpha": 0.2, "student_share": 0.3}),
        ("gkd", {"objective": "adaptive_kl", "mu": 0.2}),
        ("distillm", {"alpha": 0.2, "replay_step": 0.2, "replay_capacity": 9, "teacher_adapter": "prompt"}),
        ("minillm", {"teacher_mix": 0.0, "importance": "none", "length_normalization": False, "clip_ratio": None}),
        ("dpkd", {"dpkd_beta": 0.2, "dpkd_level": "token", "length_normalization": False}),
        ("opd", {"teacher_adapter": "prompt", "prompt_length": 3}),
        ("distillm2", {"alpha": 0.2, "adaptive_alpha": False, "gradual_beta": False, "teacher_adapter": "lora"}),
        ("kd", {"cross_entropy_share": 1.0}),
    ],
)
def test_settings_that_a_method_takes(name, settings):
    named_method(name, MethodSettings(**settings))


def test_which_methods_need_the_datas_responses():
    assert {name for name in METHODS if not named_method(name).responses.needs_data} == {
        *("promptkd", "promptkd-lora", "promptkd-full", "gkd", "minillm", "opd", "opcd", "opsd", "veto", "eopd", "skd"),
    }
    assert named_method("gkd", MethodSettings(student_share=0.9)).responses.needs_data


@pytest.mark.parametrize("name", ["minillm", "opd"])
def test_a_method_that_weighs_samples_keeps_to_the_whole_distribution(tmp_path, name):
    settings = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2}
    for setting, value in settings.items():
        with pytest.raises(RequestError, match="temperature 1 of the whole distribution"):
            trainer(tmp_path, method=named_method(name), **{setting: value})


def test_a_share_that_can_never_rise_is_told(tmp_path):
    with pytest.warns(UserWarning, match="stays at 0"):
        trainer(tmp_path, method=named_method("distillm"))


@pytest.mark.slow
def test_on_policy_distillation_follows_the_prompted_teacher_and_tells_the_sampled_kl(tmp_path):
    """The log's estimate is the mean of log q - log p over the tokens, p with the prompt as its own step left it."""
    given = MethodSettings(teacher_adapter="prompt", prompt_length=3)
    method = replace(named_method("opd", given), responses=FixedResponses())
    ours = trainer(tmp_path, method=method, data=rows(4), max_steps=1, learning_rate=0.0)
    ours.train()
    batch = right_pad(*zip(*((row.prompt_ids, row.response_ids) for row in rows(4).examples), strict=True))
    with torch.no_grad():
        hidden, pair_of = response_hidden(ours.model, batch), ours.teacher.pair(ours.model)
        sides = [
            pair_of.log_probs(hidden, each(batch), batch.targets)
            for each in (ours.teacher.adapted_hidden, ours.teacher.plain_hidden)
        ]
    (adapted, plain) = (float((log_q - log_p).mean()) for log_q, log_p in sides)
    (entry,) = log(ours)
    assert entry["sampled_kl"] == pytest.approx(adapted, rel=1e-5)
    assert adapted != pytest.approx(plain, rel=1e-3)
    log_q, log_p = sides[0]
    assert entry["loss"] == pytest.approx(float(((log_q - log_p) * log_q).mean()), rel=1e-5)


def distillm2_by_loops(student, teacher, examples, responses, means, beta):
    """Per row: the loss, each side's α and each side's gap, of DistiLLM-2's code, one token at a time."""
    found = []
    for row, own in zip(examples, responses, strict=True):
        sides = []
        for response, loop in ((row.response_ids, distillm2_teacher), (own, distillm2_student)):
            batch = right_pad([row.prompt_ids], [response])
            q, p = ([each.tolist() for each in response_logits(model, batch)] for model in (student, teacher))
            log_q, log_p = ([math.log(softmax(z)[y]) for z, y in zip(side, response, strict=True)] for side in (q, p))
            logs = (log_p, log_q) if loop is distillm2_teacher else (log_q, log_p)
            alpha = distillm2_skew(*logs, base=0.1, mean=means[len(sides)])
            gap = math.exp(sum(logs[0]) / len(response)) - math.exp(sum(logs[1]) / len(response))
            frozen = [{"frozen": z} if loop is distillm2_student else {} for z in q]
            values = [loop(z, t, alpha=alpha, **more) for z, t, more in zip(q, p, frozen, strict=True)]
            sides.append((sum(values) / len(values), alpha, gap))
        (of_teacher, *first), (of_student, *second) = sides
        found.append([(2 - beta) * of_teacher + beta * of_student, *first, *second])
    return [sum(column) / len(found) for column in zip(*found, strict=True)]


@pytest.mark.slow
def test_distillm2_equals_loops_written_from_its_code_with_alpha_and_beta_that_move(tmp_path, float64_inside):
    """Two steps that move nothing: the mean gap of the first is m in the second, where β has risen to 3/2."""
    student, teacher = pair(torch.float64)
    examples = rows(4).examples
    others = [examples[index - 1].response_ids for index in range(4)]

    class Others(ResponseMix):
        def __call__(self, rows, sample, progress):
            return [others[row.row] for row in rows]

    method = replace(named_method("distillm2"), responses=Others(1.0))
    settings = {
        "max_steps": 2,
        "learning_rate": 0.0,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    }
    ours = trainer(tmp_path, method=method, models=(student, teacher), data=rows(4), **settings)
    ours.train()
    first, second = log(ours)
    names = ("loss", "alpha_teacher", "gap_teacher", "alpha_student", "gap_student")
    with torch.no_grad():
        expected = distillm2_by_loops(student, teacher, examples, others, (0.0, 0.0), 1.0)
        assert [first[name] for name in names] == pytest.approx(expected, rel=1e-6)
        expected = distillm2_by_loops(student, teacher, examples, others, (expected[2], expected[4]), 1.5)
    assert [second[name] for name in names] == pytest.approx(expected, rel=1e-6)
    assert [first["contrast_beta"], second["contrast_beta"]] == [1.0, 1.5]
    assert first["alpha_teacher"] == pytest.approx(0.1)
    assert second["alpha_teacher"] < 0.1 or second["alpha_student"] < 0.1


@pytest.mark.slow
def test_students_of_another_architecture_learn_from_the_teacher(tmp_path):
    student = tiny_model("gpt2", layers=2, hidden=16, seed=1)
    _, teacher = pair()
    ours = trainer(tmp_path, models=(student, teacher), max_steps=2)
    ours.train()
    assert ours.state.global_step == 2


@pytest.mark.slow
@pytest.mark.parametrize("merge", [False, True])
def test_a_lora_student_trains_its_own_weights_alone_and_can_be_merged(tmp_path, merge):
    from peft import LoraConfig

    from promptkd.models import load_model

    student, teacher = pair()
    student.save_pretrained(tmp_path / "base")
    student = load_model(tmp_path / "base")  # the adapter notes where its base is
    before = {name: weight.clone() for name, weight in student.named_parameters()}
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    ours = trainer(tmp_path / "run", models=(student, teacher), peft_config=lora, max_steps=2)
    ours.train()
    for name, weight in ours.model.get_base_model().named_parameters():
        if "lora" not in name:
            assert torch.equal(weight, before[name.replace(".base_layer", "")]), name
    batch = right_pad([[1, 2, 3]], [[4, 5]])
    with torch.no_grad():
        trained = response_hidden(ours.model, batch)
    if merge:
        ours.merge_student()
    ours.save_student(tmp_path / "student")
    with torch.no_grad():
        loaded = response_hidden(load_model(tmp_path / "student"), batch)
    torch.testing.assert_close(loaded, trained, rtol=0, atol=1e-4)
    assert (tmp_path / "student" / ("model.safetensors" if merge else "adapter_model.safetensors")).is_file()
    assert not torch.allclose(trained, response_hidden(load_model(tmp_path / "base"), batch).detach(), atol=1e-4)


def test_the_online_modules_loss_by_hand():
    """-log p(y) + KL(p || q), summed over the tokens; the adapted teacher alone gets a gradient."""
    student, teacher = pair(torch.float64)
    generator = torch.Generator().manual_seed(0)
    adapted = torch.randn(5, 24, dtype=torch.float64, generator=generator).requires_grad_()
    student_hidden = torch.randn(5, 16, dtype=torch.float64, generator=generator).requires_grad_()
    targets = torch.tensor([3, 1, 4, 1, 5])
    batch = right_pad([[1]], [targets.tolist()])
    step = TunerStep(
        Pair(student, teacher, VOCABULARY), batch, adapted, student_hidden, None, 0.0, PromptLossSettings()
    )
    loss = OnlineTeacher(OnlineModule(24, 2, seed=0)).loss(step)
    log_p = teacher.get_output_embeddings()(adapted).log_softmax(-1)
    log_q = student.get_output_embeddings()(student_hidden).log_softmax(-1)
    p, kl = log_p.exp(), (log_p.exp() * (log_p - log_q)).sum(-1)
    torch.testing.assert_close(loss.total, kl.sum() - log_p[range(5), targets].sum())
    torch.testing.assert_close(loss.metrics["to_student"], kl.sum().detach())
    by_logits = p * (log_p - log_q - kl[:, None]) + p - torch.nn.functional.one_hot(targets, VOCABULARY)
    (gradient,) = torch.autograd.grad(loss.total, adapted)
    torch.testing.assert_close(gradient, by_logits.detach() @ teacher.get_output_embeddings().weight.detach())


@pytest.mark.parametrize("chunk", [None, 0])
@pytest.mark.parametrize(
    ("objective", "got"),
    [
        (lambda student, teacher: reverse_kl(student, teacher).mean(), r"the shape \(\)"),
        (lambda student, teacher: (student - teacher).square(), r"the shape \(\d+, \d+\)"),
        (lambda student, teacher: reverse_kl(student, teacher).sum().item(), "a float"),
    ],
    ids=["mean", "vocabulary", "number"],
)
def test_an_objective_that_gives_no_value_per_token_is_refused(tmp_path, objective, got, chunk):
    run = trainer(tmp_path, method=Method(FixedResponses(), objective), chunk_tokens=chunk)
    with pytest.raises(RequestError, match=f"one value per token, here .* Got {got}"):
        run.train()


@pytest.mark.slow
def test_the_plain_teacher_samples_also_where_it_has_an_adapter(tmp_path, monkeypatch):
    seen = []
    sample = Rollout._sample

    def watched(self, *arguments):
        seen.append([each.disable_adapters for each in self.teacher.model.modules() if isinstance(each, LoraLayer)])
        return sample(self, *arguments)

    monkeypatch.setattr(Rollout, "_sample", watched)
    mixed = Method(TeacherMixed(0.5), reverse_kl, LoraFactory(adapter_rank=2))
    trainer(tmp_path, method=mixed, max_steps=2).train()
    assert len(seen) == 2
    assert all(each and all(each) for each in seen)


@pytest.mark.slow
def test_a_custom_loss_without_an_entropy_logs_none(tmp_path):
    def loss(step):
        logits = step.pair.logits("student", step.student_hidden)
        return ChunkedLoss(-logits.log_softmax(-1).gather(-1, step.batch.targets[:, None]).sum(), {})

    made = trainer(tmp_path, method=Method(ResponseMix(0.0), loss=loss), max_steps=6)
    made.train()
    assert all("entropy" not in entry for entry in log(made))
    assert not [each for each in findings(log(made)) if "entropy" in each.message]


def test_a_setting_of_a_method_that_came_later_is_no_setting_of_this_run():
    @dataclass
    class Later:
        sharpness: float = 1.0

    reader = Reader(SimpleNamespace(beta=0.5))
    reader.refuse_unread("gkd", [Later])
    with pytest.raises(RequestError, match="gkd takes no sharpness"):
        Reader(SimpleNamespace(sharpness=2.0)).refuse_unread("gkd", [Later])
