"""Toys whose answer is known: what forward and reverse KL make of a bimodal teacher, and that every method descends."""

import math
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch

from helpers.models import response_logits
from helpers.tiny import END_ID
from helpers.trainers import FixedResponses, log, pair, rows, trainer
from promptkd.data.batch import right_pad
from promptkd.generation import SamplingParams, generate
from promptkd.methods import METHODS, MethodSettings, named_method
from promptkd.objectives import (
    adaptive_kl,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    total_variation,
)
from promptkd.responses import Responses

pytestmark = pytest.mark.slow

OBJECTIVES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": partial(jensen_shannon, beta=0.5),
    "jensen_shannon_0.1": partial(jensen_shannon, beta=0.1),
    "jensen_shannon_0.9": partial(jensen_shannon, beta=0.9),
    "skew_forward_kl": partial(skew_forward_kl, alpha=0.1),
    "skew_reverse_kl": partial(skew_reverse_kl, alpha=0.1),
    "total_variation": total_variation,
    "adaptive_kl": partial(adaptive_kl, mu=0.5),
    "adaptive_kl_0.9": partial(adaptive_kl, mu=0.9),
}

GRID = torch.arange(61, dtype=torch.float64)
LOW, HIGH, WIDTH = 20.0, 40.0, 2.0


def bell(mean: torch.Tensor | float, log_width: torch.Tensor | float) -> torch.Tensor:
    """Logits (61,) of a discretised normal distribution."""
    width = torch.as_tensor(log_width, dtype=GRID.dtype).exp()
    return -0.5 * ((GRID - mean) / width) ** 2


def bimodal(share: float = 0.5) -> torch.Tensor:
    """Logits (61,) of two equal bells, the lower one with `share` of the mass."""
    low, high = (bell(mean, math.log(WIDTH)).log_softmax(-1) for mean in (LOW, HIGH))
    return torch.logaddexp(low + math.log(share), high + math.log(1 - share))


def moments(logits: torch.Tensor) -> tuple[float, float]:
    """Mean and standard deviation on the grid."""
    p = logits.detach().softmax(-1)
    mean = (p * GRID).sum()
    return float(mean), float(((p * (GRID - mean) ** 2).sum()).sqrt())


def fit_bell(objective, teacher: torch.Tensor, *, mean: float, steps: int = 400) -> torch.Tensor:
    """The logits of the bell that minimizes `objective`, from `mean` and the width of one mode."""
    place = torch.tensor(mean, dtype=GRID.dtype, requires_grad=True)
    log_width = torch.tensor(math.log(WIDTH), dtype=GRID.dtype, requires_grad=True)
    optimizer = torch.optim.Adam([{"params": [place], "lr": 0.3}, {"params": [log_width], "lr": 0.1}])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        objective(bell(place, log_width)[None], teacher[None]).sum().backward()
        optimizer.step()
        schedule.step()
    return bell(place, log_width).detach()


def test_forward_kl_covers_both_modes():
    """Among bells, the forward KL is least where mean and variance are the teacher's own."""
    teacher = bimodal()
    found = moments(fit_bell(forward_kl, teacher, mean=LOW + 2, steps=1000))
    assert found == pytest.approx(moments(teacher), abs=0.02)
    assert found == pytest.approx((30.0, math.hypot(WIDTH, (HIGH - LOW) / 2)), abs=0.1)


@pytest.mark.parametrize(("start", "mode"), [(24.0, LOW), (36.0, HIGH)])
def test_reverse_kl_seeks_one_mode(start, mode):
    student = fit_bell(reverse_kl, bimodal(), mean=start)
    assert moments(student) == pytest.approx((mode, WIDTH), abs=0.05)
    assert float(reverse_kl(student, bimodal())) == pytest.approx(
        math.log(2), abs=0.01
    )  # the other mode's half is lost


def test_reverse_kl_seeks_the_heavier_mode_from_between():
    assert moments(fit_bell(reverse_kl, bimodal(share=0.3), mean=30.0, steps=800))[0] == pytest.approx(HIGH, abs=0.1)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_student_whose_family_contains_the_teacher_finds_it(name):
    """Gradient descent on free logits ends at the teacher, whatever the divergence."""
    objective = OBJECTIVES[name]
    generator = torch.Generator().manual_seed(3)
    teacher = 1.5 * torch.randn(4, 12, generator=generator, dtype=torch.float64)
    student = (1.5 * torch.randn(4, 12, generator=generator, dtype=torch.float64)).requires_grad_()
    before = objective(student, teacher).detach()
    optimizer = torch.optim.Adam([student], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    for _ in range(400):
        optimizer.zero_grad()
        objective(student, teacher).sum().backward()
        optimizer.step()
        schedule.step()
    after = objective(student, teacher).detach()
    assert (after < 0.01 * before).all()
    assert torch.allclose(student.softmax(-1), teacher.softmax(-1), atol=2e-3)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_plain_gradient_descent_lowers_each_divergence(name):
    """Step by step, also where the student cannot reach the teacher."""
    objective, teacher = OBJECTIVES[name], bimodal(share=0.3)
    parameters = torch.tensor([27.0, math.log(4.0)], dtype=GRID.dtype, requires_grad=True)
    seen = []
    for _ in range(30):
        value = objective(bell(*parameters)[None], teacher[None]).sum()
        seen.append(float(value.detach()))
        (gradient,) = torch.autograd.grad(value, parameters)
        with torch.no_grad():
            parameters -= 0.01 * gradient
    assert seen[-1] < seen[0]
    assert all(later <= earlier for earlier, later in pairwise(seen))


class OthersResponses(Responses):
    """To each row the response of the row before it: what a student might have written in place of the data's."""

    def __call__(self, rows, sample, progress):
        return [rows[index - 1].response_ids for index in range(len(rows))]


POLICY_GRADIENTS = ("minillm", "opd")
"""Their surrogates have the gradient of a KL, not its value, and want the student's own samples."""


STILL = {"taid": MethodSettings(taid_start=1.0), "veto": MethodSettings(veto_beta=0.3, veto_beta_end=0.3)}
"""A target that moves away raises the loss by itself: here it stands still."""


@pytest.mark.parametrize("name", [name for name in METHODS if name not in POLICY_GRADIENTS])
def test_every_method_lowers_its_own_loss(tmp_path, name):
    """On the same four rows for 15 steps; sampling is taken out, so that what falls is the loss."""
    responses = OthersResponses() if name == "dpkd" else FixedResponses()
    ours = trainer(
        tmp_path,
        method=replace(named_method(name, STILL.get(name)), responses=responses),
        data=rows(4),
        max_steps=15,
        learning_rate=3e-3,
    )
    ours.train()
    losses = [entry["loss"] for entry in log(ours)]
    assert len(losses) == 15
    assert sum(losses[-3:]) / 3 < 0.9 * losses[0]


def sequence_kl(student, teacher, data, samples=64):
    """KL(q || p) of whole responses, estimated from the same random numbers each time; the sum over a response's tokens
    of the KL of the next token, on the student's own samples."""
    prompts = [row.prompt_ids for row in data.examples] * samples
    seeds = list(range(len(prompts)))
    responses = generate(
        student, prompts, SamplingParams(max_new_tokens=4, stop_ids=(END_ID,)), seeds=seeds, batch_size=len(prompts)
    )
    batch = right_pad(prompts, responses)
    with torch.no_grad():
        values = reverse_kl(response_logits(student, batch), response_logits(teacher, batch))
    return float(values.sum()) / len(prompts)


@pytest.mark.parametrize(("name", "steps"), [("minillm", 15), ("opd", 40)])  # the latter learns from single tokens
def test_policy_gradients_lower_the_kl_of_their_own_samples(tmp_path, name, steps):
    data, (student, teacher) = rows(4), pair()
    before = sequence_kl(student, teacher, data)
    ours = trainer(
        tmp_path,
        method=named_method(name),
        models=(student, teacher),
        data=data,
        max_steps=steps,
        max_completion_length=4,
        learning_rate=3e-3,
    )
    ours.train()
    assert sequence_kl(student, teacher, data) < 0.9 * before
