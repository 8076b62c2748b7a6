"""Logits and losses of response tokens: the model's own whatever stands around them, with a soft prompt and without."""

from dataclasses import replace
from itertools import cycle

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import nn

from helpers.models import response_logits
from helpers.standins import OnResults
from helpers.tiny import ARCHITECTURES, END_ID, VOCABULARY, tiny_model
from promptkd.data.batch import TokenBatch, right_pad
from promptkd.engine import check_scoring, head_logits, head_size, linear_head, response_hidden
from promptkd.engine.cpu.scoring import HEAD
from promptkd.engine.heads import HeadBackend
from promptkd.errors import RequestError
from promptkd.objectives import prompt_loss, reverse_kl

# (prompt, response): different lengths, one prompt token, END inside and at the front, an empty response in the middle
ROWS = [
    ([5, 9, 17, 30, 2, 44, 61, 8, 13], [7, 21, 35, END_ID]),
    ([50], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, END_ID]),
    ([3, END_ID, 6], []),
    ([END_ID, END_ID, 40], [END_ID]),
    ([71, 72, 73, 74, 75, 76], [0, 1, 0, 1, END_ID, 33]),
]
SCORED = [row for row in ROWS if row[1]]

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
with_and_without = pytest.mark.parametrize("length", [0, 1, 4])


def batch_of(rows) -> TokenBatch:
    return right_pad([prompt for prompt, _ in rows], [response for _, response in rows])


def vectors(model: nn.Module, length: int, seed: int = 5) -> torch.Tensor | None:
    """A soft prompt as large as the model's own embeddings, or None."""
    if length == 0:
        return None
    table = model.get_input_embeddings()(torch.arange(VOCABULARY)).detach()
    noise = torch.randn(length, table.shape[1], generator=torch.Generator().manual_seed(seed), dtype=table.dtype)
    return noise * table.std()


def own_logits(model: nn.Module, row, prompt: torch.Tensor | None = None) -> torch.Tensor:
    """The model's own logits for one row's response, without padding, position ids or mask."""
    ids = torch.tensor([[*row[0], *row[1]]])
    with torch.no_grad():
        if prompt is None:
            logits = model(input_ids=ids).logits[0]
        else:
            embedded = torch.cat([prompt[None], model.get_input_embeddings()(ids)], dim=1)
            logits = model(inputs_embeds=embedded).logits[0, len(prompt) :]
    return logits[len(row[0]) - 1 : -1]


def scored(model: nn.Module, batch: TokenBatch, prompt: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return response_logits(model, batch, prompt)


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


# --------------------------------------------------------------------------------------------- the model's own logits


@every_architecture
@with_and_without
@pytest.mark.parametrize("tied", [True, False])
def test_batched_logits_are_the_models_own_row_by_row(architecture, length, tied):
    model = tiny_model(architecture, tied=tied)
    prompt = vectors(model, length)
    expected = torch.cat([own_logits(model, row, prompt) for row in SCORED])
    batch = batch_of(ROWS)
    close(scored(model, batch, prompt), expected)
    assert batch.targets.tolist() == [token for _, response in ROWS for token in response]


@every_architecture
def test_the_prompt_changes_the_logits(architecture):
    """Without this, a prompt that is silently dropped would pass the padding tests."""
    model, batch = tiny_model(architecture), batch_of(ROWS)
    plain, prompted, other = (scored(model, batch, vectors(model, n, seed=n)) for n in (0, 4, 5))
    assert (plain - prompted).abs().amax(-1).min() > 1e-3  # every token, the last ones of the longest row too
    assert (prompted - other).abs().amax(-1).min() > 1e-3


@pytest.mark.slow
@every_architecture
@pytest.mark.parametrize(("engine", "length"), [("", 0), ("", 4), ("reference", 1)])  # which computes the padding
def test_padding_and_batching_change_no_logit_and_no_loss(architecture, length, engine, monkeypatch):
    monkeypatch.setenv("PROMPTKD_ENGINE", engine)
    teacher, student = tiny_model(architecture), tiny_model(architecture, layers=2, seed=1)
    prompt = vectors(teacher, length)

    def logits_and_losses(batch: TokenBatch) -> tuple[torch.Tensor, ...]:
        prompted, plain, ours = scored(teacher, batch, prompt), scored(teacher, batch), scored(student, batch)
        return prompted, prompt_loss(prompted, ours, plain, weight=0.7), reverse_kl(ours, prompted)

    expected = logits_and_losses(batch_of(ROWS))
    single = [logits_and_losses(batch_of([row])) for row in SCORED]
    turned = [logits_and_losses(batch_of(ROWS[::-1]))[i].split([6, 1, 0, 12, 4])[::-1] for i in range(3)]
    halves = [logits_and_losses(batch_of(rows)) for rows in (ROWS[:2], ROWS[2:])]
    for i, whole in enumerate(expected):
        close(torch.cat([each[i] for each in single]), whole)
        close(torch.cat(turned[i]), whole)
        close(torch.cat([each[i] for each in halves]), whole)
    wider = [padding_columns(batch_of(ROWS), 9, filler) for filler in (0, END_ID)]
    for padded in (*wider, padding_rows(batch_of(ROWS), 3, 41), padding_rows(batch_of(ROWS), 3, END_ID)):
        for got, whole in zip(logits_and_losses(padded), expected, strict=True):
            close(got, whole)


def padding_columns(batch: TokenBatch, count: int, filler: int) -> TokenBatch:
    """Wider, and with `filler` in all the padding that there was."""
    rows, width = batch.input_ids.shape
    ids = torch.full((rows, width + count), filler)
    for row, (prompt, response) in enumerate(ROWS):
        real = len(prompt) + len(response)
        ids[row, :real] = batch.input_ids[row, :real]
    return replace(batch, input_ids=ids)


def padding_rows(batch: TokenBatch, count: int, filler: int) -> TokenBatch:
    """`count` rows of `filler` alone put first."""
    ids = torch.cat([torch.full((count, batch.input_ids.shape[1]), filler), batch.input_ids])
    added = ([filler] * 3,) * count
    return replace(
        batch,
        input_ids=ids,
        rows=batch.rows + count,
        token_ids=(*added, *batch.token_ids),
        prompt_lengths=(*(len(row) for row in added), *batch.prompt_lengths),
    )


# -------------------------------------------------------------------------------------------------------------- PEFT


def peft_wrapper(model: nn.Module, prompt: torch.Tensor) -> PeftModel:
    """PEFT's prompt tuning of `model` with our vectors."""
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(prompt), token_dim=prompt.shape[1])
    wrapper = get_peft_model(model, config).eval()
    with torch.no_grad():
        wrapper.prompt_encoder["default"].embedding.weight.copy_(prompt)
    return wrapper


@every_architecture
@pytest.mark.parametrize("tied", [True, False])
def test_prompted_logits_are_pefts_on_unpadded_rows(architecture, tied):
    model = tiny_model(architecture, tied=tied)
    prompt = vectors(model, 4)
    ours = scored(model, batch_of(SCORED), prompt)
    wrapper = peft_wrapper(tiny_model(architecture, tied=tied), prompt)
    expected = []
    for prompt_ids, response in SCORED:
        ids = torch.tensor([[*prompt_ids, *response]])
        with torch.no_grad():
            logits = wrapper(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 4:]
        expected.append(logits[len(prompt_ids) - 1 : -1])
    close(ours, torch.cat(expected))


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_left_padding_shifts_pefts_positions_but_not_ours(architecture):
    """Why the project inserts the prompt itself: PEFT's own output for one row depends on the padding between."""
    model = tiny_model(architecture)
    prompt, row = vectors(model, 4), ROWS[0]
    ids = torch.tensor([[END_ID] * 6 + [*row[0], *row[1]]])
    mask = torch.tensor([[0] * 6 + [1] * 13])
    with torch.no_grad():
        padded = peft_wrapper(tiny_model(architecture), prompt)(input_ids=ids, attention_mask=mask).logits[0, 18:-1]
    own = own_logits(model, row, prompt)
    assert (padded - own).abs().max() > 0.1
    close(scored(model, batch_of(ROWS), prompt)[:4], own)


# --------------------------------------------------------------------------------------------------- the gradient of P


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "direction"), zip(ARCHITECTURES, cycle(("reverse", "forward")), strict=False))
def test_the_prompts_gradient_is_a_float64_finite_difference(architecture, direction, float64_inside):
    teacher = tiny_model(architecture, layers=2, dtype=torch.float64).requires_grad_(False)
    student = tiny_model(architecture, layers=1, dtype=torch.float64, seed=1).requires_grad_(False)
    batch = batch_of(ROWS)
    plain, ours = scored(teacher, batch), scored(student, batch)
    prompt = vectors(teacher, 2)

    def loss(values: torch.Tensor) -> torch.Tensor:
        prompted = response_logits(teacher, batch, values)
        each = prompt_loss(prompted, ours, plain, weight=0.6, student_direction=direction, plain_direction=direction)
        return each.sum() / len(batch.targets)

    learned = prompt.clone().requires_grad_()
    loss(learned).backward()
    step, expected = 1e-6, torch.zeros_like(prompt)  # a longer one crosses a kink of OPT's ReLU
    with torch.no_grad():
        for index in range(prompt.numel()):
            shift = torch.zeros_like(prompt).view(-1)
            shift[index] = step
            shift = shift.view_as(prompt)
            expected.view(-1)[index] = (loss(prompt + shift) - loss(prompt - shift)) / (2 * step)
    torch.testing.assert_close(learned.grad, expected, rtol=1e-6, atol=1e-8)
    assert (learned.grad.norm(dim=-1) > 1e-3).all()  # every vector of the prompt
    assert all(weight.grad is None for weight in (*teacher.parameters(), *student.parameters()))


# ---------------------------------------------------------------------------------------------------------- the head


@every_architecture
@with_and_without
def test_only_response_positions_reach_the_head(architecture, length):
    model, batch = tiny_model(architecture), batch_of(ROWS)
    rows: list[int] = []

    def count(result, inputs, weight, bias=None):
        if len(weight) == VOCABULARY:  # no other size of a tiny model equals it
            rows.append(inputs.numel() // inputs.shape[-1])

    with OnResults(torch.nn.functional.linear, count):
        scored(model, batch, vectors(model, length))
    assert rows == [len(batch.targets)] == [23]


@pytest.mark.parametrize("architecture", ["cohere", "granite", "gemma2"])
def test_logit_scale_and_soft_cap_are_the_models_own(architecture):
    scales = {"cohere": {"logit_scale": 3.0}, "granite": {"logits_scaling": 0.5, "embedding_multiplier": 2.0}}
    settings = scales.get(architecture, {"final_logit_softcapping": 2.0})
    model = tiny_model(architecture, dtype=torch.float64, **settings)
    batch, prompt = batch_of(ROWS), vectors(model, 3)
    logits = scored(model, batch, prompt)
    close(logits, torch.cat([own_logits(model, row, prompt) for row in SCORED]))
    with torch.no_grad():
        bare = model.get_output_embeddings()(response_hidden(model, batch, prompt))
    if architecture == "gemma2":
        close(logits, 2 * torch.tanh(bare / 2))
        assert bare.abs().max() > 2 > logits.abs().max()
    else:
        close(logits, bare * {"cohere": 3.0, "granite": 1 / 0.5}[architecture])


@pytest.mark.parametrize("products", [HeadBackend(), HEAD], ids=["reference", "cpu"])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "cohere", "granite"])
def test_the_head_as_tensors_gives_the_same_logits(architecture, products):
    scale = {"cohere": {"logit_scale": 3.0}, "granite": {"logits_scaling": 4.0}}.get(architecture, {})
    model, batch = tiny_model(architecture, tied=False, **scale), batch_of(ROWS)
    for bias in (None, nn.Parameter(torch.linspace(-1, 1, VOCABULARY))):
        model.lm_head.bias = bias
        with torch.no_grad():
            hidden, expected = response_hidden(model, batch), scored(model, batch)
            got = products.projection(linear_head(model), torch.float32).logits(hidden)
            narrow = products.projection(linear_head(model).limited_to(50), torch.float32).logits(hidden)
        close(got, expected)
        close(narrow, expected[:, :50])
        assert len({tuple(row) for row in got.tolist()}) > 10


@every_architecture
def test_logits_are_float32_whatever_is_computed_in(architecture):
    """Of the same bfloat16 states, by the model's own float32 head: rounded logits would be off by up to 0.06."""
    model, half = tiny_model(architecture), tiny_model(architecture, dtype=torch.bfloat16)
    model.load_state_dict(half.state_dict())  # weights that bfloat16 holds
    with torch.no_grad():
        hidden = response_hidden(half, batch_of(ROWS))
        expected = head_logits(model, hidden.float())
        found = [head_logits(half, hidden)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found += [head_logits(half, hidden), head_logits(model, hidden)]
    assert not torch.equal(expected, expected.bfloat16().float())
    for got in found:
        assert got.dtype == torch.float32
        close(got, expected)


def test_a_head_that_is_more_than_linear_is_not_given_as_tensors():
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, target_modules=["lm_head"])
    model = get_peft_model(tiny_model("llama", tied=False), lora).eval()
    assert linear_head(model) is None
    assert linear_head(tiny_model("llama")) is not None
    close(
        scored(model, batch_of(SCORED)),
        torch.cat([own_logits(model, row) for row in SCORED]),
    )


def test_vocabulary_slices_the_padding_of_the_head_away():
    model = tiny_model("llama", vocabulary=VOCABULARY + 7)
    batch = batch_of(ROWS)
    with torch.no_grad():
        sliced = response_logits(model, batch, vocabulary=VOCABULARY)
    assert head_size(model) == VOCABULARY + 7
    close(sliced, scored(model, batch)[:, :VOCABULARY])


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "cohere", "granite"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_check_scoring_accepts_supported_models(architecture, dtype):
    check_scoring(tiny_model(architecture, tied=False, dtype=dtype))
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, target_modules="all-linear")
    lora.fan_in_fan_out = architecture == "gpt2"
    check_scoring(get_peft_model(tiny_model(architecture, dtype=dtype), lora).train())


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda logits: logits * 1.01, id="scale"),
        pytest.param(lambda logits: 20 * torch.tanh(logits / 20), id="cap"),
        pytest.param(lambda logits: logits + torch.linspace(0, 0.1, logits.shape[-1]), id="bias"),
        pytest.param(lambda logits: torch.cat([logits, logits[..., :1]], dim=-1), id="extra column"),
        pytest.param(lambda logits: logits.roll(1, dims=1), id="other position"),
    ],
)
def test_check_scoring_refuses_logits_computed_otherwise(change, monkeypatch):
    model = tiny_model("llama").train()
    forward = model.forward

    def otherwise(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = change(output.logits)
        return output

    monkeypatch.setattr(model, "forward", otherwise)
    with pytest.raises(RequestError, match="LlamaForCausalLM computes its logits in a way"):
        check_scoring(model)
    assert model.training  # the mode is put back after a refusal too


def test_a_model_that_cannot_be_prompted_is_scored_and_refused_with_a_soft_prompt():
    """Gemma 3n looks tokens up again in every layer; embeddings alone give other logits than the ids do."""
    per_layer = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 4, "laurel_rank": 4}
    sizes = {
        "intermediate_size": 32,
        "head_dim": 8,
        "num_kv_shared_layers": 1,
        "activation_sparsity_pattern": [0.0] * 4,
    }
    model = tiny_model("gemma3n_text", layers=4, **per_layer, **sizes)
    check_scoring(model)
    close(scored(model, batch_of(SCORED)), torch.cat([own_logits(model, row) for row in SCORED]))
    with pytest.raises(RequestError, match="No soft prompt can stand before Gemma3nForCausalLM: "):
        scored(model, batch_of(SCORED), torch.zeros(2, 16))


def test_check_scoring_is_not_confused_by_dropout():
    model = tiny_model("gpt2", dropout=0.5).train()
    check_scoring(model)
    assert model.training


def test_no_model_of_transformers_is_a_type_error():
    with pytest.raises(TypeError, match="Got Linear"):
        head_logits(nn.Linear(2, 2), torch.zeros(1, 2))


# ---------------------------------------------------------------------------------------------------------- the edges


@every_architecture
@with_and_without
def test_a_batch_of_empty_responses_scores_nothing(architecture, length):
    teacher, student = tiny_model(architecture), tiny_model(architecture, seed=1)
    prompt = vectors(teacher, length)
    if prompt is not None:
        prompt.requires_grad_()
    batch = batch_of([([4, 5, 6], []), ([7], [])])
    logits = response_logits(teacher, batch, prompt)
    assert logits.shape == (0, VOCABULARY)
    loss = prompt_loss(logits, scored(student, batch), scored(teacher, batch), weight=1.0).sum()
    assert loss.item() == 0
    loss.backward()  # it must not break an accumulation in which other batches have tokens
    if prompt is not None:
        assert torch.equal(prompt.grad, torch.zeros_like(prompt))


def test_targets_and_columns_are_positions_not_ids():
    """pad == EOS == 89: EOS in the prompt, as the first response token and as the last are told apart by place."""
    batch = right_pad([[END_ID, 5], [7, 8, 9]], [[END_ID, 6, END_ID], [END_ID]])
    assert batch.targets.tolist() == [END_ID, 6, END_ID, END_ID]
    assert batch.rows.tolist() == [0, 0, 0, 1]
    assert batch.columns.tolist() == [1, 2, 3, 2]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4]] * 2


def test_rows_that_nothing_can_score_are_refused():
    with pytest.raises(ValueError, match=r"at least one token\. Got none in row 1"):
        right_pad([[1], []], [[2], [3]])
    with pytest.raises(ValueError, match="Got 1 and 2"):
        right_pad([[1]], [[2], [3]])
    with pytest.raises(ValueError, match="Got 0 and 0"):
        right_pad([], [])


def test_a_model_is_checked_in_its_own_precision_within_autocast():
    """There it would round its own logits, and look like one whose head is not known."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_scoring(tiny_model("llama"))
    check_scoring(tiny_model("llama", dtype=torch.bfloat16))
