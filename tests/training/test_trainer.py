"""The trainer against the flat example, against itself resumed, and at the edges of its schedule."""

import json
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from helpers.models import response_logits
from helpers.tiny import VOCABULARY, tiny_model, tiny_tokenizer
from helpers.trainers import FIXED_PROMPTKD, TIMINGS, FixedResponses, config, log, pair, rows, trainer
from minimal_loop import start_prompt, step
from promptkd.data import encode_examples, examples_from_rows
from promptkd.data.batch import right_pad
from promptkd.errors import PromptKDError, RequestError
from promptkd.methods import MethodSettings, named_method
from promptkd.models import SoftPrompt
from promptkd.objectives import forward_kl, reverse_kl
from promptkd.training import DistillTrainer, FinetuneConfig, FinetuneTrainer

pytestmark = pytest.mark.slow


def flat_loop(steps, *, family, window=4, dtype=torch.float64):
    """The example's own steps on the same rows; returns losses, student and soft prompt after each step."""
    student, teacher = pair(dtype, family)
    teacher.requires_grad_(False)
    soft_prompt = start_prompt(teacher, tiny_tokenizer())
    prompt_optimizer = torch.optim.AdamW([soft_prompt], lr=1e-2, weight_decay=0.0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.0)
    data = [(row.prompt_ids, row.response_ids) for row in rows().examples]
    losses = []
    for k in range(steps):
        batch = data[k * window : (k + 1) * window]
        losses.append(step(teacher, student, soft_prompt, prompt_optimizer, optimizer, batch, k, steps))
    return losses, student, soft_prompt


@pytest.mark.parametrize(
    ("family", "batch", "accumulation"),
    [("llama", 4, 1), ("llama", 2, 2), ("gpt2", 2, 2), ("qwen2", 4, 1), ("gemma", 2, 2), ("gemma2", 4, 1)],
)
def test_steps_equal_the_flat_example(tmp_path, family, batch, accumulation, float64_inside):
    losses, student, soft_prompt = flat_loop(3, family=family)  # in steps 2 and 3 the prompt has moved already
    ours = trainer(
        tmp_path,
        models=pair(torch.float64, family),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        shuffle_dataset=False,
    )
    ours.train()
    logged = log(ours)
    assert len(logged) == 3
    for entry, (prompt_loss, student_kl) in zip(logged, losses, strict=True):
        got = entry["prompt_kl"] + entry["lambda"] * entry["prompt_regularizer"]
        assert got == pytest.approx(prompt_loss, rel=1e-10)
        assert entry["student_kl"] == pytest.approx(student_kl, rel=1e-10)
        assert entry["loss"] == pytest.approx(student_kl, rel=1e-5)  # transformers keeps it in float32
    torch.testing.assert_close(ours.adapter.module.embeddings, soft_prompt, rtol=0, atol=1e-10)
    for mine, theirs in zip(ours.model.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)


def test_lambda_falls_from_c_to_c_over_k_and_every_step_is_taken_once(tmp_path):
    ours = trainer(tmp_path, max_steps=5, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    ours.train()
    weights = [entry["lambda"] for entry in log(ours)]
    assert weights == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert ours.state.global_step == 5
    optimizer_steps = {int(state["step"]) for state in ours.tuner.optimizer.state.values()}
    assert optimizer_steps == {5}


def test_epochs_take_the_steps_that_their_rows_give(tmp_path):
    ours = trainer(tmp_path, max_steps=-1, num_train_epochs=2)
    ours.train()
    assert ours.state.global_step == 2 * 16 // 4


def test_the_teacher_is_bit_identical_after_training(tmp_path):
    student, teacher = pair()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    ours = trainer(tmp_path, models=(student, teacher))
    ours.train()
    assert ours.adapter.module.distance() > 0
    for name, tensor in ours.teacher.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.grad is None for parameter in ours.teacher.model.parameters())


@pytest.mark.parametrize("stop", [3, 4])  # in the middle of an epoch of 4 steps, and at its end
def test_a_resumed_run_equals_the_undisturbed_one_bit_for_bit(tmp_path, stop):
    settings = {
        "max_steps": 6,
        "method": named_method("promptkd"),  # the student's own samples, so that random states count
        "save_strategy": "steps",
        "save_steps": stop,
        "prompt_lr_scheduler_type": "cosine",
        "prompt_warmup_steps": 2,
        "lr_scheduler_type": "cosine",
    }
    whole = trainer(tmp_path / "whole", **settings)
    whole.train()
    resumed = trainer(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    assert log(resumed) == log(whole)
    assert torch.equal(resumed.adapter.module.embeddings, whole.adapter.module.embeddings)
    for mine, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_epochs_differ_in_order(tmp_path):
    seen = []

    class Recording(FixedResponses):
        def __call__(self, batch, sample, progress):
            seen.append([row.row for row in batch])
            return [row.response_ids for row in batch]

    trainer(tmp_path, max_steps=8, method=replace(FIXED_PROMPTKD, responses=Recording())).train()
    first, second = ([row for batch in epoch for row in batch] for epoch in (seen[:4], seen[4:]))
    assert sorted(first) == sorted(second) == list(range(16))
    assert first != second


def test_gkd_with_reverse_kl_equals_promptkd_without_a_prompt(tmp_path):
    gkd = trainer(tmp_path / "a", method=named_method("gkd", MethodSettings(student_share=1.0, beta=1.0)))
    gkd.train()
    bare = trainer(tmp_path / "b", method=named_method("promptkd", MethodSettings(prompt_length=0)))  # seeds anew
    bare.train()
    assert log(gkd) == log(bare)
    for mine, theirs in zip(gkd.model.parameters(), bare.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_prompt_that_does_not_learn_stays_where_it_started(tmp_path):
    ours = trainer(tmp_path, prompt_learning_rate=0.0)
    ours.train()
    assert ours.adapter.module.distance() == 0
    assert [entry["prompt_learning_rate"] for entry in log(ours)] == [0.0, 0.0, 0.0]


def test_heads_padded_to_different_sizes_are_sliced_to_the_tokens(tmp_path):
    student = tiny_model("llama", layers=2, hidden=16, vocabulary=VOCABULARY + 7, seed=1)
    teacher = tiny_model("llama", layers=3, hidden=24, vocabulary=VOCABULARY + 31, seed=2)
    ours = trainer(tmp_path, models=(student, teacher))
    assert ours.teacher.vocabulary.size == VOCABULARY
    ours.train()
    ours.evaluate(rows(4, seed=1))  # what the student samples must be ids that the teacher knows, too


def test_dropout_acts_in_the_students_own_pass_alone(tmp_path):
    def prompt_figures(disable):
        student = tiny_model("gpt2", layers=2, hidden=16, seed=1, dropout=0.5)
        teacher = tiny_model("gpt2", layers=3, hidden=24, seed=2, dropout=0.5)
        ours = trainer(tmp_path, models=(student, teacher), disable_dropout=disable, max_steps=1)
        ours.train()
        return log(ours)[0]

    without, dropped = prompt_figures(True), prompt_figures(False)
    assert dropped["prompt_kl"] == without["prompt_kl"]
    assert dropped["prompt_regularizer"] == without["prompt_regularizer"]
    assert dropped["student_kl"] != without["student_kl"]


def test_the_best_checkpoint_brings_its_own_prompt(tmp_path):
    ours = trainer(
        tmp_path,
        eval_data=rows(4, seed=5),
        max_steps=4,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,
        prompt_learning_rate=0.1,
    )
    kept = {}
    step_adapter = ours.tuner._update

    def remember(scale):
        step_adapter(scale)
        kept[ours.state.global_step + 1] = ours.adapter.module.embeddings.detach().clone()

    ours.tuner._update = remember
    evaluate = ours.evaluate
    ours.evaluate = lambda **kwargs: {
        **evaluate(**kwargs),
        "eval_loss": [3.0, 1.0, 2.0, 4.0][ours.state.global_step - 1],
    }
    ours.train()
    best = ours.state.best_global_step
    assert best == 2
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / f"checkpoint-{best}")
    assert torch.equal(ours.adapter.module.embeddings, kept[best])


def test_a_checkpoint_is_whole_or_not_there(tmp_path):
    ours = trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    original = ours._save_rng_state

    def fail(folder):
        original(folder)
        if ours.state.global_step == 2:
            raise OSError("no space left")

    ours._save_rng_state = fail
    with pytest.raises(PromptKDError, match=r"no space left\. Intact, for --resume: checkpoint-1\."):
        ours.train()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("checkpoint")) == ["checkpoint-1"]
    held = {path.name for path in (tmp_path / "checkpoint-1").iterdir()}
    assert {"model.safetensors", "optimizer.safetensors", "rng_state.json", "method.json", "trainer_state.json"} < held


def test_the_student_alone_is_what_is_saved(tmp_path):
    from transformers import AutoModelForCausalLM

    ours = trainer(tmp_path / "run")
    ours.train()
    ours.save_student(tmp_path / "student")
    ours.save_adapter(tmp_path)
    names = {path.name for path in (tmp_path / "student").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    for mine, theirs in zip(loaded.parameters(), ours.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert {path.name for path in (tmp_path / "prompt").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_validation_figures_equal_a_measurement_by_hand(tmp_path):
    data = rows(5, seed=3)
    ours = trainer(tmp_path, eval_data=data)
    figures = ours.evaluate()
    model = ours.model.eval().requires_grad_(False)
    nats = tokens = 0.0
    for row in data.examples:
        ids = torch.tensor([row.prompt_ids + row.response_ids])
        log_probs = model(ids).logits[0].log_softmax(-1)
        for position, token in enumerate(row.response_ids, start=len(row.prompt_ids) - 1):
            nats -= float(log_probs[position, token])
            tokens += 1
    assert figures["eval_loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert figures["eval_kl_to_teacher"] > 0
    assert json.dumps(figures)


TEXTS = [{"prompt": "the", "completion": "an"}, {"prompt": "man", "completion": "th"}]


def encoded(texts, **options):
    return encode_examples(examples_from_rows(texts), tiny_tokenizer(), **options)


def metrics_of(made, data=None):
    return {name: value for name, value in made.evaluate(data).items() if name not in TIMINGS}


def test_evaluate_takes_rows_in_every_form_and_tells_the_responses_of_its_own_alone(tmp_path):
    class Hearing(FixedResponses):
        heard = 0

        def on_validation(self, loss):
            self.heard += 1

    method = replace(FIXED_PROMPTKD, responses=Hearing())
    ours = trainer(tmp_path, eval_data=TEXTS, method=method)
    expected = metrics_of(ours)
    assert method.responses.heard == 1
    kept = dict(ours.validated)
    for same in (TEXTS, Dataset.from_list(TEXTS), encoded(TEXTS), encoded(TEXTS).examples):
        assert metrics_of(ours, same) == expected
    assert method.responses.heard == 1
    assert ours.validated == kept
    assert metrics_of(ours, ours.eval_dataset) == expected
    assert method.responses.heard == 2


def test_sft_evaluates_rows_in_every_form(tmp_path):
    settings = {"max_prompt_length": 16, "max_completion_length": 8, "report_to": "none", "use_cpu": True}
    args = FinetuneConfig(str(tmp_path), disable_tqdm=True, **settings)
    ours = FinetuneTrainer(tiny_model("llama"), args, rows(), None, tiny_tokenizer())
    assert metrics_of(ours, TEXTS) == metrics_of(ours, encoded(TEXTS))
    with pytest.raises(RequestError, match="Validation needs rows"):
        ours.evaluate()


def test_rows_that_cannot_be_evaluated_are_refused(tmp_path):
    turns = [{"role": role, "content": "an"} for role in ("user", "assistant", "user", "assistant")]
    every = encoded([{"messages": turns}], template="{{ messages[-1].content }}", turns="all")
    ours = trainer(tmp_path)
    with pytest.raises(RequestError, match=r'several turns of a row.*turns="last"'):
        ours.evaluate(every)
    with pytest.raises(RequestError, match=r'several turns of a row.*turns="last"'):
        trainer(tmp_path, eval_data=every)
    with pytest.raises(RequestError, match="row 0: expected"):
        ours.evaluate([{"ask": "the"}])


def test_too_few_rows_for_a_step_and_too_many_positions_are_refused(tmp_path):
    with pytest.raises(RequestError, match=r"takes 32 rows .* Got 16"):
        trainer(tmp_path, per_device_train_batch_size=32)
    with pytest.raises(RequestError, match="has 512 positions"):
        trainer(tmp_path, max_prompt_length=505)


def test_a_teacher_with_another_vocabulary_is_refused(tmp_path):
    student, teacher = pair()
    other = tiny_tokenizer(merges=())
    with pytest.raises(RequestError, match="split text differently"):
        DistillTrainer(
            student, teacher, config(tmp_path), rows(), None, tiny_tokenizer(), teacher_processing_class=other
        )


def test_wrong_settings_are_told_together(tmp_path):
    with pytest.raises(RequestError) as caught:
        config(tmp_path, prompt_length=-1, prompt_kl="sideways", temperature=0.0)
    assert all(part in str(caught.value) for part in ("prompt_length", "prompt_kl", "temperature"))


def test_the_trained_prompt_enters_the_teacher(tmp_path):
    """The student's target is the teacher under the prompt just moved, not the plain one."""
    data = rows(4)
    student, teacher = pair()
    ours = trainer(tmp_path, data=data, models=(student, teacher), max_steps=1, learning_rate=0.0)
    ours.train()
    batch = right_pad([row.prompt_ids for row in data.examples], [row.response_ids for row in data.examples])
    with torch.no_grad():
        prompted = response_logits(teacher, batch, ours.adapter.module())
        expected = reverse_kl(response_logits(student, batch), prompted).mean()
        plain = reverse_kl(response_logits(student, batch), response_logits(teacher, batch)).mean()
    assert log(ours)[0]["student_kl"] == pytest.approx(float(expected), rel=1e-5)
    assert abs(float(plain - expected)) > 1e-4


def test_bf16_runs_both_models_in_bf16_and_keeps_float32_masters(tmp_path):
    ours = trainer(tmp_path, bf16=True, max_steps=1)
    seen = {}
    for name, model in (("student", ours.model), ("teacher", ours.teacher.model)):
        layer = model.base_model.layers[0].self_attn.q_proj
        layer.register_forward_hook(lambda _, __, output, name=name: seen.__setitem__(name, output.dtype))
    ours.train()
    assert seen == {"student": torch.bfloat16, "teacher": torch.bfloat16}
    assert {parameter.dtype for parameter in ours.model.parameters()} == {torch.float32}
    assert ours.adapter.module.embeddings.dtype == torch.float32


def test_dropout_that_layers_hand_to_functions_is_off_too(tmp_path):
    def figures(**settings):
        student = tiny_model("opt", layers=2, hidden=16, seed=1, **settings)
        ours = trainer(tmp_path, models=(student, tiny_model("opt", layers=3, hidden=24, seed=2)), max_steps=1)
        ours.train()
        return log(ours)[0]

    assert figures(dropout=0.5) == figures(dropout=0.0)


def test_validation_measures_the_plain_teacher(tmp_path):
    """Whatever is trained of the teacher, the KL that validation reports is to the teacher as it came."""
    for name in ("promptkd", "promptkd-lora", "promptkd-full", "okd"):
        ours = trainer(
            tmp_path / name,
            models=pair(),
            method=named_method(name),
            eval_data=rows(4, seed=3),
            learning_rate=0.0,
            prompt_learning_rate=0.05,
        )
        before = ours.evaluate()["eval_kl_to_teacher"]
        ours.train()
        assert ours.evaluate()["eval_kl_to_teacher"] == before, name


def test_the_best_model_is_found_without_optimizer_states_too(tmp_path):
    ours = trainer(
        tmp_path,
        eval_data=rows(4, seed=5),
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,
        save_only_model=True,
    )
    ours.train()
    assert ours.state.best_model_checkpoint is not None


def test_gpt2_is_held_to_its_positions(tmp_path):
    student = tiny_model("gpt2", layers=2, hidden=16, seed=1)
    with pytest.raises(RequestError, match="has 512 positions"):
        trainer(tmp_path, models=(student, pair()[1]), max_prompt_length=505)


def test_one_model_cannot_teach_itself(tmp_path):
    student, _ = pair()
    with pytest.raises(RequestError, match="share weights"):
        trainer(tmp_path, models=(student, student))


def test_losses_by_row_leave_the_figures_by_token_alone(tmp_path):
    from promptkd.methods import MethodSettings as Settings

    def first(name, **settings):
        method = replace(named_method(name, Settings(teacher_adapter="prompt", **settings)), responses=FixedResponses())
        ours = trainer(tmp_path, models=pair(torch.float64), method=method, max_steps=1)
        ours.train()
        return log(ours)[0], ours.adapter.module.embeddings.detach()

    by_row, by_token = first("dpkd"), first("gkd")
    for key in ("prompt_kl", "prompt_regularizer", "entropy", "prompt_grad_norm"):
        assert by_row[0][key] == pytest.approx(by_token[0][key], rel=1e-9), key
    torch.testing.assert_close(by_row[1], by_token[1])


class AfterSteps(TrainerCallback):
    def __init__(self, act):
        self.act = act

    def on_step_end(self, args, state, control, **kwargs):
        self.act()


@pytest.mark.parametrize(
    ("schedule", "coefficient", "weights", "to_student", "to_plain"),
    [
        ("linear", 2.0, [2.0, 1.0], "reverse", "reverse"),
        ("constant", 0.5, [0.5, 0.5], "forward", "reverse"),
        ("none", 1.0, [0.0, 0.0], "reverse", "forward"),
    ],
)
def test_the_flags_of_prompt_experiments_reach_the_step(tmp_path, schedule, coefficient, weights, to_student, to_plain):
    """Directions, coefficient, schedule, start and length: the first step's figures by hand, and where P goes."""
    data, models = rows(4), pair(torch.float64)
    student, teacher = models
    ours = trainer(
        tmp_path,
        data=data,
        models=models,
        max_steps=2,
        prompt_start="random",
        prompt_length=3,
        prompt_kl=to_student,
        regularizer_kl=to_plain,
        seed=5,
        prompt_learning_rate=0.01,
        learning_rate=0.0,
        regularizer_schedule=schedule,
        regularizer_coefficient=coefficient,
    )
    start = SoftPrompt.create(teacher, tiny_tokenizer(), length=3, start="random", seed=5).embeddings
    assert torch.equal(ours.adapter.module.embeddings, start)
    batch = right_pad([row.prompt_ids for row in data.examples], [row.response_ids for row in data.examples])
    kl = {"reverse": reverse_kl, "forward": forward_kl}

    @torch.no_grad()
    def measures(prompt):
        prompted = response_logits(teacher, batch, prompt)
        return {
            "prompt_kl": float(kl[to_student](prompted, response_logits(student, batch)).mean()),
            "prompt_regularizer": float(kl[to_plain](prompted, response_logits(teacher, batch)).mean()),
        }

    moved = []
    ours.add_callback(AfterSteps(lambda: moved.append(ours.adapter.module.embeddings.detach().clone())))
    ours.train()
    for logged, prompt in zip(log(ours), (start, moved[0]), strict=True):
        for name, value in measures(prompt).items():  # the regularizer's KL also where it has no weight
            assert logged[name] == pytest.approx(value, rel=1e-9), name
    first, second = log(ours)
    assert [first["lambda"], second["lambda"]] == weights
    found = ours.adapter.module.embeddings.detach()
    assert second["prompt_distance"] == pytest.approx(float((found - start.detach()).norm()), rel=1e-6)
    assert second["prompt_norm"] == pytest.approx(float(found.norm()), rel=1e-6)


@pytest.mark.parametrize(
    "setting",
    [
        {"teacher_model_name_or_path": "x"},
        {"ds3_gather_for_generation": False},
        {"max_tool_calling_iterations": 3},
        {"cache_implementation": "static"},
        {"label_smoothing_factor": 0.1},
        {"vllm_mode": "server"},
        {"vllm_server_port": 8001},
    ],
)
def test_settings_of_trl_that_nothing_reads_are_refused(tmp_path, setting):
    with pytest.raises(RequestError, match=next(iter(setting))):
        config(tmp_path, **setting)


def test_generates_cache_is_taken_where_generate_decodes(tmp_path):
    assert config(tmp_path, cache_implementation="static", min_p=0.1).cache_implementation == "static"


@pytest.mark.parametrize(
    "setting",
    [
        {"assistant_only_loss": True},
        {"completion_only_loss": False},
        {"padding_free": True},
        {"dataset_text_field": "x"},
        {"eos_token": "x"},
        {"chat_template_path": "x"},
        {"truncation_mode": "keep_end"},
    ],
)
def test_settings_of_trls_sft_that_nothing_reads_are_refused(tmp_path, setting):
    with pytest.raises(RequestError, match=next(iter(setting))):
        FinetuneConfig(str(tmp_path), use_cpu=True, **setting)


def test_settings_serve_one_trainer_after_the_other(tmp_path):
    args = config(tmp_path, template="teacher", prompt_learning_rate=1e-3, method="kd")
    asked = [{"instruction": "the man", "output": "an"}] * 4
    prompts = []
    for _ in range(2):
        own, theirs = tiny_tokenizer(chat=True), tiny_tokenizer(chat=True)
        theirs.chat_template = theirs.chat_template.replace("<|user|>", "<|user|>TEACHER ")
        made = DistillTrainer(*pair(), args, asked, None, own, teacher_processing_class=theirs)
        prompts.append(made.train_dataset[0].prompt_ids)
    assert prompts[0] == prompts[1]
    assert args.template == "teacher"


@pytest.mark.parametrize(
    ("data", "settings", "told"),
    [
        (
            replace(rows(), examples=[replace(each, response_ids=[]) for each in rows().examples]),
            {},
            "need_response=True",
        ),
        (
            replace(rows(), examples=[replace(each, prompt_ids=[5] * 600) for each in rows().examples]),
            {},
            r"The student has \d+ positions, and 608 are needed",
        ),
    ],
)
def test_rows_that_came_encoded_are_checked(tmp_path, data, settings, told):
    with pytest.raises(RequestError, match=told):
        trainer(tmp_path, method=named_method("kd"), data=data, **settings)


def test_a_context_that_encoded_rows_are_without_is_told(tmp_path, caplog):
    caplog.set_level("WARNING", "promptkd.training.setup")  # which commands lower
    trainer(tmp_path, method=named_method("kd"), teacher_prompt="Be brief.")
    assert "train_dataset was encoded without a context of the teacher" in caplog.text
