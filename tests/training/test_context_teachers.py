"""A teacher that reads a context which the student does not see, in every part of a step."""

from dataclasses import replace

import pytest
import torch

from helpers.parts import parts, window
from helpers.tiny import VOCABULARY, tiny_model
from helpers.trainers import FIXED_PROMPTKD, FixedResponses, pair, rows, trainer
from minimal_loop import kl, response_log_probs
from promptkd.data.batch import right_pad
from promptkd.data.encode import EncodedData
from promptkd.engine import engine_for, response_hidden
from promptkd.errors import RequestError
from promptkd.generation import Mixture, SamplingParams, generate, generate_corrected
from promptkd.methods import METHODS, MethodSettings, named_method
from promptkd.responses import Sampler, TeacherMixed
from promptkd.training.teacher import Teacher

CONTEXT = [61, 60, 59, 62, 61]  # no ids of the rows


def informed(count=8, *, every=1, context=CONTEXT):
    """Rows of which each `every`-th has a context before its prompt."""
    made = rows(count).examples
    read = [[*context, *row.prompt_ids] if index % every == 0 else None for index, row in enumerate(made)]
    return EncodedData([replace(row, teacher_prompt_ids=ids) for row, ids in zip(made, read, strict=True)], 0)


def test_a_batch_with_other_prompts_has_the_same_responses():
    batch = right_pad([[1, 2, 3], [4]], [[5, 6], [7]])
    read = batch.with_prompts([None, [8, 9, 4]])
    expected = right_pad([[1, 2, 3], [8, 9, 4]], [[5, 6], [7]])
    assert read.token_ids == expected.token_ids
    for name in ("input_ids", "rows", "columns", "targets"):
        assert torch.equal(getattr(read, name), getattr(expected, name))
    assert torch.equal(read.targets, batch.targets)
    assert batch.with_prompts([None, None]) is batch
    with pytest.raises(ValueError, match=r"for each of the 2 rows\. Got 1"):
        batch.with_prompts([[1]])


def test_a_context_that_all_rows_share_is_counted_once_in_a_pass_that_shares_it():
    made = right_pad([[1], [2], [3]], [[4], [5], [6]]).with_prompts([[*CONTEXT, each] for each in (1, 2, 3)])
    assert made.shared_prefix == len(CONTEXT) == 5
    assert [len(part.token_ids) for part in made.split(9, shares=True)] == [2, 1]
    assert [len(part.token_ids) for part in made.split(14)] == [2, 1]
    assert {part.shared_prefix for part in made.split(9, shares=True)} == {5}
    assert right_pad([[1, 2], [1, 3]], [[4], [5]]).shared_prefix == 0  # rows as they come are run as ever


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [0, 3])
def test_a_shared_context_changes_no_state_and_no_gradient_of_the_soft_prompt(dtype, width):
    """By the engine's own scorers, in float32 and bfloat16, against one row at a time."""
    model = tiny_model("llama", hidden=32, seed=3, dtype=dtype)
    made = rows(6).examples
    read = right_pad([row.prompt_ids for row in made], [row.response_ids for row in made])
    read = read.with_prompts([[*CONTEXT * 6, *row.prompt_ids] for row in made])
    start = torch.randn(width, 32, generator=torch.Generator().manual_seed(4))

    def states_and_gradient(scorer):
        prompt = start.clone().requires_grad_()
        hidden = scorer.hidden(model, read, prompt if width else None).float()
        weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(5))
        (hidden * weights).sum().backward()
        return hidden.detach(), prompt.grad

    scorers = engine_for(torch.device("cpu")).scorers
    expected, gradient = states_and_gradient(scorers[-1])
    close = 1e-5 if dtype == torch.float32 else 0.1  # of rounding alone; a wrong place would give 1
    for scorer in scorers[:2]:
        hidden, found = states_and_gradient(scorer)
        assert float((hidden - expected).norm() / expected.norm()) < close
        assert not width or float((found - gradient).norm() / gradient.norm()) < close


def test_a_loss_may_ask_for_other_batches_of_the_same_rows_alone():
    examples = informed(3, every=2).examples
    (made,) = window(examples).micro_batches
    other = right_pad([row.prompt_ids for row in examples], [[1], [2], [3]])
    assert made.for_teacher(other).token_ids[0] == [*CONTEXT, *examples[0].prompt_ids, 1]
    assert made.for_teacher(other).token_ids[1] == [*examples[1].prompt_ids, 2]
    assert made.for_teacher(made.batch) is made.teacher_batch
    swapped = right_pad([row.prompt_ids for row in examples[::-1]], [[1], [2], [3]])
    with pytest.raises(ValueError, match=r"one row for each of `Step\.rows`, in their order"):
        made.for_teacher(swapped)
    (plain,) = window(rows(3).examples).micro_batches
    assert plain.for_teacher(swapped) is swapped


@pytest.mark.slow
def test_both_losses_equal_a_loop_in_which_the_teacher_alone_reads_the_context(tmp_path, float64_inside):
    """Two micro-batches, some rows without a context; the soft prompt stands before the context."""
    student, teacher = pair(torch.float64)
    part = parts(tmp_path, models=(student, teacher))
    examples, tuner, student_loss = informed(5, every=2).examples, part.tuner(), part.student_loss()
    made = window(examples[:3], examples[3:])
    (prompt,) = part.teacher.adapter.parameters()
    tokens = sum(len(row.response_ids) for row in examples)

    def expected_losses():
        tuned, learned = torch.tensor(0.0), torch.tensor(0.0)
        for row in examples:
            read = row.teacher_prompt_ids or row.prompt_ids
            own = response_log_probs(student, row.prompt_ids, row.response_ids)
            prompted = response_log_probs(teacher, read, row.response_ids, prompt)
            plain = response_log_probs(teacher, read, row.response_ids)
            tuned = tuned + kl(prompted, own.detach()) + kl(prompted, plain.detach())
            learned = learned + kl(own, prompted.detach())
        return tuned / tokens, learned / tokens

    loss, _ = expected_losses()
    (gradient,) = torch.autograd.grad(loss, prompt)
    optimizer = torch.optim.AdamW([prompt], lr=1e-2, weight_decay=0.0)
    before = prompt.detach().clone()
    tuner.start(4)
    with part.phases("prompt"):
        tuner.step(made, student, student_loss.hidden_for_tuner, step=0, logs=True)
    moved = prompt.detach().clone()
    prompt.data.copy_(before)
    prompt.grad = gradient / max(1.0, float(gradient.norm()) + 1e-6)
    optimizer.step()
    torch.testing.assert_close(moved, prompt.detach(), rtol=1e-9, atol=1e-12)
    prompt.grad = None
    _, expected = expected_losses()
    found = sum(student_loss(student, made, each).detach() for each in made.micro_batches)
    assert float(found) == pytest.approx(float(expected.detach()), rel=1e-10)


EVERY_METHOD = [(name, None) for name in sorted(METHODS) if name != "seqkd"]  # which reads no teacher
EVERY_METHOD += [("gkd", "online"), ("dpkd", "prompt"), ("dpkd", "lora")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "adapter"), EVERY_METHOD)
def test_with_every_method_the_teacher_reads_contexts_and_the_student_does_not(name, adapter, tmp_path, monkeypatch):
    method = named_method(name, MethodSettings(teacher_adapter=adapter))
    part = parts(tmp_path, method=method, prompt_learning_rate=1e-3)  # the default, which few methods read
    examples, read, learned, written = informed(4).examples, [], [], []

    def noted(function, where):
        def watched(teacher, batch, *rest, **options):
            where.extend(batch.token_ids)
            return function(teacher, batch, *rest, **options)

        return watched

    def sampled(model, prompts, *arguments, mixed_with=None, **options):
        written.append((prompts, mixed_with))
        return generate(model, prompts, *arguments, mixed_with=mixed_with, **options)

    def corrected(student, teacher, prompts, *arguments, teacher_prompts, **options):
        written.append((prompts, None))
        assert teacher_prompts == [row.teacher_prompt_ids for row in examples]
        return generate_corrected(student, teacher, prompts, *arguments, teacher_prompts=teacher_prompts, **options)

    monkeypatch.setattr(Teacher, "_hidden", noted(Teacher._hidden, read))
    monkeypatch.setattr("promptkd.training.student_loss.response_hidden", noted(response_hidden, learned))
    monkeypatch.setattr("promptkd.training.rollout.generate", sampled)
    monkeypatch.setattr("promptkd.training.rollout.generate_corrected", corrected)
    made, loss = part.rollout()(examples, part.student, step=0, total_steps=2), part.student_loss()
    if part.teacher.adapter is not None:
        tuner = part.tuner()
        tuner.start(2)
        with part.phases("prompt"):
            tuner.step(made, part.student, loss.hidden_for_tuner, step=0, logs=True)
    assert loss(part.student, made, made.next()).isfinite()
    assert {tuple(ids[: len(CONTEXT)]) for ids in read} == {tuple(CONTEXT)}
    assert not any(token in CONTEXT for ids in learned for token in ids[:1])
    assert not any(token in CONTEXT for prompts, _ in written for prompt in prompts for token in prompt)
    mixtures = [mixed.prompts for _, mixed in written if mixed is not None]
    assert mixtures == ([[row.teacher_prompt_ids for row in examples]] if name == "minillm" else [])


@pytest.mark.slow
def test_a_mixture_samples_after_the_prompts_that_each_model_reads():
    """By counts: the first tokens of many rows come from (1 - s) q(. | x) + s p(. | c, x)."""
    student, teacher = tiny_model("llama", seed=1), tiny_model("llama", layers=2, hidden=24, seed=2)
    request, draws, share = [5, 6, 7], 3000, 0.4
    read = [*CONTEXT, *request]
    params = SamplingParams(max_new_tokens=1, vocabulary=VOCABULARY)
    mixture = Mixture(teacher, share, [read] * draws)
    drawn = generate(student, [request] * draws, params, seeds=list(range(draws)), batch_size=1500, mixed_with=mixture)
    with torch.no_grad():
        q, p = (
            model(torch.tensor([ids])).logits[0, -1].softmax(-1) for model, ids in ((student, request), (teacher, read))
        )
    expected = (1 - share) * q + share * p
    counts = torch.bincount(torch.tensor([each[0] for each in drawn]), minlength=VOCABULARY)
    often = expected * draws > 5
    chi = ((counts - expected * draws)[often] ** 2 / (expected * draws)[often]).sum()
    assert chi < 2 * int(often.sum())


def test_a_source_must_give_the_teachers_prompts(tmp_path):
    taken = []
    sampler = Sampler(lambda prompts: [], lambda *arguments: taken.append(arguments) or [], lambda *arguments: [])
    examples = informed(2, every=2).examples
    TeacherMixed(0.5)(examples, sampler, 0.0)
    TeacherMixed(0.5)(rows(2).examples, sampler, 0.0)
    prompts = [row.prompt_ids for row in examples]
    assert taken == [(prompts, 0.5, [[*CONTEXT, *prompts[0]], prompts[1]]), (prompts, 0.5)]

    class Mixing(FixedResponses):
        def __call__(self, rows, sample, progress):
            return sample.mixed([row.prompt_ids for row in rows], 0.5)

    method = replace(FIXED_PROMPTKD, responses=Mixing())
    with pytest.raises(RequestError, match=r"give `sample\.mixed` its prompts as a third argument"):
        trainer(tmp_path, data=informed(4), method=method, max_steps=1).train()


def test_the_teacher_needs_positions_for_its_contexts(tmp_path):
    data = informed(4, context=CONTEXT * 101)  # 505 tokens of 512 positions
    longest = max(len(row.teacher_prompt_ids) for row in data.examples)
    told = rf"Its longest prompt, context included, \+ max_completion_length \+ prompt_length is {longest + 8 + 7}\."
    with pytest.raises(RequestError, match=rf"The teacher has 512 positions\. {told}.*_length {512 - 8 - 7}\."):
        trainer(tmp_path, data=data)
