"""The teacher's pass of the prompt step: used again by the student (stale), computed twice (recomputed), left out."""

import copy
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

import promptkd.models.adapters
from helpers.tiny import tiny_model, tiny_tokenizer
from helpers.trainers import FixedResponses, log, pair, rows, trainer
from minimal_loop import kl, response_log_probs, start_prompt
from promptkd.data.batch import right_pad
from promptkd.engine import response_hidden
from promptkd.engine.backbone import recomputed_layers
from promptkd.engine.cpu.scoring import CpuPackedScorer
from promptkd.errors import RequestError
from promptkd.methods import Method, MethodSettings, named_method
from promptkd.models.adapters import FullTeacher, LoraFactory, SoftPromptAdapter, SoftPromptFactory
from promptkd.models.soft_prompt import SoftPrompt
from promptkd.objectives import reverse_kl
from promptkd.responses import ResponseMix


def stale_loop(steps, *, window=4):
    """PromptKD written flat, but for the student's target: the prompted teacher of before the prompt's update."""
    student, teacher = pair(torch.float64)
    teacher.requires_grad_(False)
    soft_prompt = start_prompt(teacher, tiny_tokenizer())
    prompt_optimizer = torch.optim.AdamW([soft_prompt], lr=1e-2, weight_decay=0.0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.0)
    data = [(row.prompt_ids, row.response_ids) for row in rows().examples]
    losses = []
    for k in range(steps):
        batch = data[k * window : (k + 1) * window]
        tokens, weight = sum(len(response) for _, response in batch), 1 - k / steps
        prompt_loss, targets = 0.0, []
        for request, response in batch:
            prompted = response_log_probs(teacher, request, response, soft_prompt)
            plain = response_log_probs(teacher, request, response)
            target = response_log_probs(student, request, response).detach()
            prompt_loss = prompt_loss + (kl(prompted, target) + weight * kl(prompted, plain)) / tokens
            targets.append(prompted.detach())
        prompt_optimizer.zero_grad()
        prompt_loss.backward()
        torch.nn.utils.clip_grad_norm_([soft_prompt], 1.0)
        prompt_optimizer.step()
        student_loss = 0.0
        for (request, response), target in zip(batch, targets, strict=True):
            student_loss = student_loss + kl(response_log_probs(student, request, response), target) / tokens
        optimizer.zero_grad()
        student_loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        losses.append((prompt_loss.item(), student_loss.item()))
    return losses, student, soft_prompt


def share_nothing(monkeypatch):
    """Every row of a pack whole, also where rows begin alike."""
    monkeypatch.setattr(CpuPackedScorer, "shares_prefixes", lambda self, model: False)


# ---- the pass of before the update ----


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (2, 2)])
def test_stale_steps_equal_the_flat_ones(tmp_path, monkeypatch, batch, accumulation):
    share_nothing(monkeypatch)  # Llama's norms are float32, where gradients add up otherwise
    losses, student, soft_prompt = stale_loop(3)
    ours = trainer(
        tmp_path,
        models=pair(torch.float64),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        shuffle_dataset=False,
        prompt_refresh="stale",
    )
    ours.train()
    for entry, (prompt_loss, student_kl) in zip(log(ours), losses, strict=True):
        assert entry["prompt_kl"] + entry["lambda"] * entry["prompt_regularizer"] == pytest.approx(prompt_loss, 1e-10)
        assert entry["student_kl"] == pytest.approx(student_kl, rel=1e-10)
        assert entry["prompt_lag"] == 1
    torch.testing.assert_close(ours.adapter.module.embeddings, soft_prompt, rtol=0, atol=1e-10)
    for mine, theirs in zip(ours.model.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("refresh", "prompted"), [("fresh", 4), ("stale", 2)])
def test_a_stale_step_spares_a_pass_of_the_teacher(tmp_path, monkeypatch, refresh, prompted):
    passes = count_passes(monkeypatch)
    ours = trainer(tmp_path, prompt_refresh=refresh, max_steps=2)
    ours.train()
    assert passes == ["plain", "prompted", *["prompted"] * (refresh == "fresh")] * 2
    assert passes.count("prompted") == prompted
    assert ("prompt_lag" in log(ours)[0]) == (refresh == "stale")


def count_passes(monkeypatch):
    """The teacher's passes in their order, as they come."""
    passes = []

    def counted(model, batch, prompt=None):
        passes.append("plain" if prompt is None else "prompted")
        return response_hidden(model, batch, prompt)

    monkeypatch.setattr(promptkd.models.adapters, "response_hidden", counted)
    return passes


@pytest.mark.parametrize(
    ("method", "length", "message"),
    [
        (
            Method(ResponseMix(1.0), reverse_kl, SoftPromptFactory),
            0,
            "takes no prompt_learning_rate, prompt_refresh",
        ),
        (named_method("kd"), 7, "without a teacher adapter takes no prompt_refresh"),
        (named_method("promptkd-full"), 7, "whose head is trained too"),
        (named_method("promptkd", MethodSettings(cross_entropy_share=0.5)), 7, "one objective per token"),
    ],
)
def test_stale_is_refused_where_it_means_nothing(tmp_path, method, length, message):
    with pytest.raises(RequestError, match=message):
        trainer(tmp_path, method=method, prompt_length=length, prompt_refresh="stale")


# ---- activations computed again ----


def _adapters():
    teacher = tiny_model("llama", layers=3, hidden=24, seed=2).requires_grad_(False)
    prompt = SoftPrompt.create(teacher, tiny_tokenizer())
    factory = LoraFactory(adapter_rank=4, adapter_alpha=8.0)
    lora, wrapped = factory.create(copy.deepcopy(teacher), None, seed=0, device=torch.device("cpu"))
    return {
        "prompt": (SoftPromptAdapter(prompt), teacher),
        "lora": (lora, wrapped),
        "full": (FullTeacher(teacher), teacher),
    }


@pytest.mark.parametrize("kind", ["prompt", "lora", "full"])
@pytest.mark.parametrize("engine", ["", "reference"])
@pytest.mark.parametrize("autocast", [False, True])
def test_recomputed_passes_have_the_same_states_and_gradients(monkeypatch, kind, engine, autocast):
    monkeypatch.setenv("PROMPTKD_ENGINE", engine)
    adapter, teacher = _adapters()[kind]
    batch = right_pad([[5, 6, 7], [8], [9, 10]], [[11, 12], [13, 14, 15], [16]])
    found = []
    for again in (False, True):
        layers = recomputed_layers(adapter.adapted_model(teacher)) if again else nullcontext()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast), layers:
            hidden = adapter.adapted_hidden(teacher, batch)
        weights = torch.linspace(-1, 1, hidden.numel()).reshape(hidden.shape)
        found.append([hidden.detach(), *torch.autograd.grad((hidden * weights).sum(), adapter.parameters())])
    for plain, recomputed in zip(*found, strict=True):
        assert torch.equal(plain, recomputed)
    assert any(float(each.norm()) > 0 for each in found[0][1:])


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2"])  # biases; a soft cap and a window
def test_recomputed_layers_hold_less_and_leave_nothing_behind(architecture):
    model = tiny_model(architecture, layers=6, hidden=24).requires_grad_(False)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    plain = held_bytes(model)
    with recomputed_layers(model):
        assert held_bytes(model) < 0.4 * plain
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


def held_bytes(model):
    """Bytes that autograd keeps of a pass behind a soft prompt, weights apart."""
    prompt = torch.zeros(3, 24, requires_grad=True)
    batch = right_pad([[5] * 20, [6] * 9], [[7] * 8, [8] * 12])
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        assert response_hidden(model, batch, prompt).requires_grad
    weights = {each.untyped_storage().data_ptr() for each in model.state_dict().values()}
    return sum(each.untyped_storage().nbytes() for place, each in kept.items() if place not in weights)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["promptkd", "promptkd-lora", "promptkd-full"])
def test_a_run_with_recomputed_activations_is_the_same_run(tmp_path, method):
    logs = []
    for again in (False, True):
        settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 2}
        fixed = replace(named_method(method), responses=FixedResponses())
        made = trainer(tmp_path / str(again), method=fixed, teacher_gradient_checkpointing=again, **settings)
        made.train()
        logs.append(log(made))
    assert logs[0] == logs[1]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("kd", "without a teacher adapter takes no teacher_gradient_checkpointing"),
        ("okd", "no gradient passes through the teacher's layers"),
    ],
)
def test_recomputing_is_refused_where_no_gradient_goes(tmp_path, method, message):
    with pytest.raises(RequestError, match=message):
        trainer(tmp_path, method=named_method(method), teacher_gradient_checkpointing=True)


# ---- the plain teacher at a weight of 0 ----


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "read"),
    [
        ({"regularizer_schedule": "none", "logging_steps": 2}, 2),
        ({"regularizer_coefficient": 0.0, "logging_steps": 4, "logging_first_step": True}, 2),
        ({"regularizer_schedule": "none", "logging_strategy": "epoch"}, 0),
        ({"regularizer_schedule": "linear", "logging_steps": 4}, 4),
    ],
)
def test_without_its_weight_the_plain_teacher_is_read_in_logged_steps_alone(tmp_path, monkeypatch, settings, read):
    passes = count_passes(monkeypatch)
    ours = trainer(tmp_path, max_steps=4, **settings)
    ours.train()
    assert passes.count("plain") == read
    logged = [entry for entry in log(ours) if "prompt_kl" in entry]
    assert logged
    assert all((entry.get("prompt_regularizer", 0) > 0) == (read > 0) for entry in logged)


@pytest.mark.slow
def test_what_is_not_read_changes_nothing(tmp_path):
    runs = [
        trainer(tmp_path / str(steps), max_steps=4, logging_steps=steps, regularizer_schedule="none")
        for steps in (1, 4)
    ]
    for each in runs:
        torch.manual_seed(0)  # TRL draws the order of a window's rows, and sums round by their order
        each.train()
    torch.testing.assert_close(*(each.adapter.module.embeddings for each in runs), rtol=0, atol=1e-6)
    often, seldom = (log(each)[-1]["prompt_regularizer"] for each in runs)
    assert often == pytest.approx(seldom, rel=1e-5)  # the figure of the one step in which both have read it
