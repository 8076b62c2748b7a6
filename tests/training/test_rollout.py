"""The rollout by itself: rows with the responses of a hand-made source, cut into micro-batches."""

import json
import sys
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pandas
import pytest
import torch
from transformers import GenerationConfig, TrainerControl, TrainerState

from helpers.parts import parts
from helpers.tiny import END_ID, VOCABULARY, tiny_model, tiny_tokenizer
from helpers.trainers import FIXED_PROMPTKD, pair, rows, trainer
from promptkd.data.encode import EncodedData, EncodedExample, encode_texts
from promptkd.errors import RequestError
from promptkd.generation import SamplingParams, generate
from promptkd.responses import Responses, Speculation, Speculative
from promptkd.training.callbacks import CompletionLog

LIMIT = 4
PROMPTS = [[5, 6], [7], [8, 9, 10], [11], [12, 13], [14]]
RESPONSES = [[20, END_ID], [21, 22, 23, 24], [25, 26, 27, END_ID], [28], [], [29, 30]]
EXAMPLES = [EncodedExample(ids, [40], ("abc",), f"prompt {index}", index) for index, ids in enumerate(PROMPTS)]


@dataclass
class Told(Responses):
    """Gives `RESPONSES`, and remembers what it was asked."""

    given: list = field(default_factory=lambda: RESPONSES)
    asked: list = field(default_factory=list)
    needs_data = False

    def __call__(self, rows, sample, progress):
        self.asked.append(([row.row for row in rows], sample, progress))
        return [self.given[row.row] for row in rows]


def make(tmp_path, *, source=None, **settings):
    defaults = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_completion_length": LIMIT}
    method = replace(FIXED_PROMPTKD, adapter=None, responses=source or Told())
    part = parts(tmp_path, method=method, **{"prompt_learning_rate": 1e-3, **defaults, **settings})
    return part, part.rollout(END_ID)


def test_a_window_is_cut_in_the_order_of_torchs_generator(tmp_path):
    part, rollout = make(tmp_path)
    torch.manual_seed(3)
    order = torch.randperm(6).tolist()
    torch.manual_seed(3)
    window = rollout(EXAMPLES, part.student, step=1, total_steps=4)
    assert [[row.row for row in each.rows] for each in window.micro_batches] == [order[:2], order[2:4], order[4:]]
    assert order != sorted(order)
    assert [each.index for each in window.micro_batches] == [0, 1, 2]
    for micro_batch in window.micro_batches:
        numbers = [row.row for row in micro_batch.rows]
        assert micro_batch.batch.token_ids == tuple(PROMPTS[row] + RESPONSES[row] for row in numbers)
        assert micro_batch.batch.prompt_lengths == tuple(len(PROMPTS[row]) for row in numbers)
        assert not micro_batch.texts
    ((asked, sampler, progress),) = part.method.responses.asked
    assert (asked, progress) == ([0, 1, 2, 3, 4, 5], 0.25)
    assert not sampler.together


def test_what_a_window_counts(tmp_path):
    part, rollout = make(tmp_path)
    window = rollout(EXAMPLES, part.student, step=0, total_steps=4)
    assert (int(window.tokens), int(window.items), int(window.text_tokens)) == (13, 13, 0)
    assert (part.metrics.rows, part.metrics.processed_tokens) == (6, 13 + 10)
    logged = part.metrics.means(window, part.accelerator, {})
    assert logged["response_length"] == 13 / 6
    assert logged["cut_share"] == 1 / 6  # of those at the limit, one has ended


@pytest.mark.parametrize("processes", [1, 2])
def test_tokens_of_teachers_are_counted_on_the_host(tmp_path, processes):
    _, rollout = make(tmp_path)
    rollout.teacher_names, reads = ("a", "b", "c"), []

    class OnDevice(torch.Tensor):
        """Sums of alike processes on a device; what is asked of one there waits for it."""

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function in (torch.Tensor.cpu, torch.Tensor.__int__, torch.Tensor.item, torch.Tensor.tolist):
                reads.append(function)
                with torch._C.DisableTorchFunctionSubclass():
                    return function(args[0].as_subclass(torch.Tensor))
            return super().__torch_function__(function, types, args, kwargs or {})

    def reduce(own, reduction):
        return (own * processes).as_subclass(OnDevice)

    rollout._accelerator = SimpleNamespace(device=torch.device("cpu"), num_processes=processes, reduce=reduce)
    named = [replace(row, teacher="ab"[row.row % 2]) for row in EXAMPLES]
    window = rollout._cut(named, RESPONSES, 0.0)
    counted = {name: int(window.tokens_of(name)) for name in rollout.teacher_names}
    assert counted == {"a": 6 * processes, "b": 7 * processes, "c": 0}
    assert len(reads) == (0 if processes == 1 else 1)
    assert isinstance(window.tokens, OnDevice)


def test_repetition_is_that_of_responses_that_a_model_writes(tmp_path):
    loops = [[20, 21] * 5, [20, 21, 22, 23], [20], [], [20, 21, 22, 23, 24], [20] * 7]
    part, rollout = make(tmp_path, source=Told(loops))
    logged = part.metrics.means(rollout(EXAMPLES, part.student, step=0, total_steps=4), part.accelerator, {})
    assert logged["repetition"] == pytest.approx((5 / 7 + 3 / 4) / 6)  # 2 of 7 4-grams and 1 of 4 are new
    part, rollout = make(tmp_path, source=Responses())  # the data's own
    assert "repetition" not in part.metrics.means(rollout(EXAMPLES, None, step=0, total_steps=4), part.accelerator, {})


def test_a_loss_by_row_counts_rows(tmp_path):
    part, rollout = make(tmp_path)
    rollout.method = replace(part.method, per_row=True)
    window = rollout(EXAMPLES, part.student, step=0, total_steps=4)
    assert (int(window.items), int(window.tokens)) == (6, 13)


def test_each_row_comes_with_a_plain_text(tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in ("abc", "defgh", "ij")))
    part, rollout = make(tmp_path, language_data=str(file))
    known = encode_texts(str(file), rollout._tokenizer, length=part.args.max_prompt_length + LIMIT)
    torch.manual_seed(3)
    chosen, order = torch.randint(len(known), (6,)).tolist(), torch.randperm(6).tolist()
    torch.manual_seed(3)
    window = rollout(EXAMPLES, part.student, step=0, total_steps=4)
    texts = [text for each in window.micro_batches for text in each.texts]
    assert texts == [known[chosen[row]] for row in order]
    assert int(window.text_tokens) == sum(len(text) - 1 for text in texts)


class Sampled(Responses):
    needs_data = False

    def __call__(self, rows, sample, progress):
        return sample.student([row.prompt_ids for row in rows])


class Mixed(Responses):
    needs_data = False

    def __call__(self, rows, sample, progress):
        return sample.mixed([row.prompt_ids for row in rows], 0.5)


@pytest.mark.parametrize("source", [Sampled(), Mixed(), Speculative(1.0, Speculation(top_k=40, block=3))])
def test_samples_repeat_by_torchs_generator_and_end_at_the_limit(tmp_path, source):
    part, rollout = make(tmp_path, source=source)
    windows = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        windows.append(rollout(EXAMPLES, part.student, step=0, total_steps=4))
    first, again, other = ([each.batch.token_ids for each in window.micro_batches] for window in windows)
    assert first == again != other
    assert all(max(each.batch.response_lengths) <= LIMIT for each in windows[0].micro_batches)
    rollout.write_to_the_limit()
    window = rollout(EXAMPLES, part.student, step=0, total_steps=4)
    assert {length for each in window.micro_batches for length in each.batch.response_lengths} == {LIMIT}


@pytest.mark.parametrize(
    ("source", "doing", "other"),
    [
        (Mixed(), "Sampling from a mixture of student and teacher", "--teacher_mix 0"),
        (Speculative(1.0, Speculation()), "Letting the teacher correct the student's tokens", "--student_share 0"),
    ],
)
@pytest.mark.parametrize("settings", [{"repetition_penalty": 1.5}, {"generation_kwargs": {"num_beams": 2}}])
def test_two_models_that_write_together_are_both_in_the_process(tmp_path, source, doing, other, settings):
    part, rollout = make(tmp_path, source=source, **settings)
    told = f"^{doing} needs .*leave vLLM, FSDP, DeepSpeed ZeRO-3 and generation_kwargs out, or set {other}"
    with pytest.raises(RequestError, match=told):
        rollout(EXAMPLES, part.student, step=0, total_steps=4)


@pytest.mark.slow
@pytest.mark.parametrize(("top_k", "least", "most"), [(97, 0, 0), (1, 0.5, 1)])
def test_the_share_of_replaced_tokens_is_that_of_the_tokens_that_the_teacher_has_read(tmp_path, top_k, least, most):
    """Responses of the data are no part of it, and a step without others logs none."""
    for share, logged in ((1.0, True), (0.5, True), (0.0, False)):
        source = Speculative(share, Speculation(top_k=top_k, block=2))
        part, rollout = make(tmp_path / str(share), source=source)
        torch.manual_seed(1)
        window = rollout(EXAMPLES, part.student, step=0, total_steps=4)
        corrected = rollout.metrics.corrected
        assert (0 < corrected < int(window.tokens)) == (share == 0.5)
        means = rollout.metrics.means(window, part.accelerator, {})
        assert ("replaced_share" in means) == logged
        assert not logged or least <= means["replaced_share"] <= most


@pytest.mark.slow
def test_a_process_without_rows_to_correct_sums_as_many_metrics_as_the_others(tmp_path):
    """They are reduced as one tensor."""
    sizes = []
    for share in (0.0, 1.0):
        part, rollout = make(tmp_path / str(share), source=Speculative(share, Speculation(block=2)))
        window = rollout(EXAMPLES, part.student, step=0, total_steps=4)
        device = part.accelerator.device
        counting = SimpleNamespace(reduce=lambda own, reduction: sizes.append(len(own)) or own, device=device)
        rollout.metrics.means(window, counting, {})
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("settings", [{}, {"min_p": 0.0}, {"generation_kwargs": {"no_repeat_ngram_size": 9}}])
def test_what_pads_the_head_is_never_sampled(tmp_path, settings):
    student = tiny_model("llama", layers=2, hidden=16, vocabulary=VOCABULARY + 400, seed=1)
    made = trainer(tmp_path, models=(student, pair()[1]), max_completion_length=30, **settings)
    torch.manual_seed(0)
    sampled = made.rollout._sample([row.prompt_ids for row in rows(12).examples], student, None)
    assert sum(map(len, sampled)) > 20
    assert max(map(max, sampled)) < VOCABULARY


@pytest.mark.parametrize("folder", [{}, {"no_repeat_ngram_size": 1}, {"forced_eos_token_id": 7}])
def test_transformers_generate_samples_what_is_scored(tmp_path, folder):
    """Without the student's dropout, and without what its folder asks of `generate`; some rows at a time."""
    student = tiny_model("gpt2", layers=2, hidden=16, seed=1, attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    settings = {"disable_dropout": False, "top_k": 1, "max_completion_length": 8, "generation_batch_size": 2}
    made = trainer(tmp_path, models=(student, pair()[1]), min_p=0.0, **settings)
    student.generation_config.update(**folder)
    student.train()
    sizes, generate = [], student.generate
    student.generate = lambda **given: sizes.append(len(given["input_ids"])) or generate(**given)
    prompts = [[5, 6], [5, 6], [7], [5, 6], [5, 6]]
    sampled = made.rollout._sample(prompts, student, None)
    student.eval()
    assert sampled == greedy(student, prompts, made.rollout)
    assert sizes == [2, 2, 1]
    assert all(getattr(student.generation_config, name) == value for name, value in folder.items())
    student.generation_config = GenerationConfig()


def greedy(model, prompts, rollout):
    params = SamplingParams(temperature=0, max_new_tokens=rollout.limit, stop_ids=rollout.stop_ids)
    return generate(model, prompts, params)


def test_vllm_gets_the_weights_once_for_each_window(tmp_path):
    """Also where a second training begins at the step with which the first one ended."""
    part, rollout = make(tmp_path, source=Sampled())
    sent = []
    answered = {"generate": lambda prompts, **_: (None, [[5] for _ in prompts], None, None)}
    rollout._vllm = SimpleNamespace(sync_weights=lambda: sent.append(1), **answered)
    for window in (1, 2):
        rollout(EXAMPLES, part.student, step=0, total_steps=4)
        assert len(sent) == window


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.0001}])
def test_a_student_that_keeps_dropout_samples_without(tmp_path, settings):
    """Almost greedily, so that what two students write alike depends on nothing but their distributions."""
    written = []
    for dropout in (0.0, 0.5):
        student = tiny_model("gpt2", layers=2, seed=1, dropout=dropout)
        made = trainer(tmp_path, models=(student, pair()[1]), disable_dropout=False, temperature=1e-4, **settings)
        student.train()
        written.append(made.rollout._sample([row.prompt_ids for row in rows(8).examples], student, None))
        assert student.training
    assert written[0] == written[1]


def test_padding_that_a_server_samples_is_refused(tmp_path):
    _, rollout = make(tmp_path)
    written = [[5, 6], [7, VOCABULARY]]
    rollout._vllm = SimpleNamespace(sync_weights=lambda: None, generate=lambda **_: (None, written, None, None))
    with pytest.raises(
        RequestError, match=rf"token {VOCABULARY}, of the head's padding: the tokenizer has {VOCABULARY}"
    ):
        rollout._sample_by_vllm([[5], [6]])
    written.pop()
    assert rollout._sample_by_vllm([[5]]) == [[5, 6]]


def test_completions_are_kept_printed_written_and_sent(tmp_path, capsys, monkeypatch):
    sent = []
    tracker = SimpleNamespace(Table=lambda dataframe: dataframe, log=sent.append)
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    part, rollout = make(tmp_path, log_completions=True, num_completions_to_print=1, log_unique_prompts=True)
    part.args.report_to = ["trackio"]
    examples = [*EXAMPLES[:5], replace(EXAMPLES[5], prompt="prompt 4")]
    for _ in range(2):  # the last window alone is kept
        rollout(examples, part.student, step=0, total_steps=4)
    log, state, control = CompletionLog(rollout.completions), TrainerState(), TrainerControl()
    state.global_step = 3
    log.on_log(part.args, state, control, logs={"eval_loss": 1.0})
    assert not (tmp_path / "completions").exists()
    log.on_log(part.args, state, control, logs={"loss": 1.0})
    assert [path.name for path in (tmp_path / "completions").iterdir()] == ["completions_00003.parquet"]
    table = pandas.read_parquet(tmp_path / "completions" / "completions_00003.parquet")
    texts = rollout._tokenizer.batch_decode([[i for i in ids if i != END_ID] for ids in RESPONSES])
    assert list(table["completion"]) == texts
    assert list(table["prompt"]) == [row.prompt for row in examples]
    assert set(table["step"]) == {3}
    (shown,) = sent
    assert list(shown["completions"]["prompt"]) == [f"prompt {index}" for index in range(5)]
    printed = capsys.readouterr().out
    assert "Step 3" in printed
    assert sum(f"prompt {index}" in printed for index in range(5)) == 1


@pytest.mark.slow
def test_a_run_writes_the_responses_of_each_logged_step(tmp_path, capsys):
    asked = []

    class Remembering(Told):
        def __call__(self, rows, sample, progress):
            asked.append([(row.prompt, RESPONSES[row.row]) for row in rows])
            return super().__call__(rows, sample, progress)

    run = trainer(
        tmp_path,
        data=EncodedData(EXAMPLES, 0),
        method=replace(FIXED_PROMPTKD, responses=Remembering()),
        max_steps=4,
        logging_steps=2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_completion_length=LIMIT,
        log_completions=True,
        eval_data=rows(2),
        eval_strategy="steps",
        eval_steps=2,
    )
    run.train()
    folder = tmp_path / "completions"
    assert sorted(path.name for path in folder.iterdir()) == ["completions_00002.parquet", "completions_00004.parquet"]
    for step in (2, 4):
        table = pandas.read_parquet(folder / f"completions_{step:05d}.parquet")
        texts = [tiny_tokenizer().decode(ids, skip_special_tokens=True) for _, ids in asked[step - 1]]
        assert list(table["step"]) == [step, step]
        assert list(table["prompt"]) == [prompt for prompt, _ in asked[step - 1]]
        assert list(table["completion"]) == texts
        assert any(texts)
    printed = capsys.readouterr().out
    assert [f"Step {step}" in printed for step in (1, 2, 3, 4)] == [False, True, False, True]


def test_nothing_is_kept_of_completions_unless_asked_for(tmp_path):
    part, rollout = make(tmp_path)
    rollout(EXAMPLES, part.student, step=0, total_steps=4)
    assert not rollout.completions
