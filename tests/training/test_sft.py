"""The loss of fine-tuning: the mean cross-entropy over a step's response tokens, by our own engine, or by TRL's."""

import pytest
import torch
from peft import LoraConfig
from trl import SFTTrainer

import promptkd.training.sft
from helpers.tiny import tiny_model, tiny_tokenizer
from helpers.trainers import log, rows, trainer
from promptkd.methods import named_method
from promptkd.training import FinetuneConfig, FinetuneTrainer
from promptkd.training.callbacks import quiet


def finetuner(folder, model, *, data=None, peft_config=None, **settings) -> FinetuneTrainer:
    """One optimizer step of two micro-batches of four rows, by plain SGD at a rate of 1."""
    defaults = {
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    args = FinetuneConfig(str(folder), **{**defaults, **settings})
    made = FinetuneTrainer(model, args, data or rows(8), None, tiny_tokenizer(), peft_config=peft_config)
    quiet(made)
    return made


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters() if each.requires_grad}


def loop_loss(model, examples) -> tuple[torch.Tensor, float, float]:
    """The mean of -log q(y), one row and one token at a time; the means of entropy and of the top token's hits."""
    total, entropy, hits, tokens = torch.zeros((), dtype=torch.float64), 0.0, 0, 0
    for row in examples:
        logits = model(torch.tensor([row.prompt_ids + row.response_ids]), use_cache=False).logits[0]
        for place, token in enumerate(row.response_ids, start=len(row.prompt_ids) - 1):
            q = logits[place].double().softmax(-1)
            total = total - q[token].log()
            entropy -= float((q * q.log()).sum())
            hits += int(q.argmax()) == token
            tokens += 1
    return total / tokens, entropy / tokens, hits / tokens


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_a_step_is_that_of_the_double_loop(tmp_path, float64_inside, architecture, lora):
    model, data = tiny_model(architecture, layers=2, dtype=torch.float64), rows(8)
    adapter = LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]) if lora else None
    made = finetuner(tmp_path, model, data=data, peft_config=adapter)
    before = trained(made.model)
    loss, *_ = loop_loss(made.model, data.examples)
    expected = torch.autograd.grad(loss, [each for each in made.model.parameters() if each.requires_grad])
    made.train()
    entry = log(made)[0]
    assert entry["loss"] == pytest.approx(float(loss), rel=1e-6)  # logged in float32
    assert entry["num_tokens"] == sum(len(row.prompt_ids) + len(row.response_ids) for row in data.examples)
    for (name, start), gradient in zip(before.items(), expected, strict=True):
        moved = start - dict(made.model.named_parameters())[name].detach()
        torch.testing.assert_close(moved, gradient, rtol=1e-8, atol=1e-10, msg=name)


def test_the_metrics_are_means_over_the_response_tokens(tmp_path):
    model, data = tiny_model("llama", layers=2), rows(8)
    for row in data.examples[::2]:  # some tokens are the model's most probable
        logits = model(torch.tensor([row.prompt_ids])).logits[0, -1]
        row.response_ids[0] = int(logits.argmax())
    made = finetuner(tmp_path, model, data=data, per_device_train_batch_size=8, gradient_accumulation_steps=1)
    with torch.no_grad():
        loss, entropy, hits = loop_loss(made.model, data.examples)
    assert hits > 0
    made.train()
    entry = log(made)[0]
    assert entry["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert entry["entropy"] == pytest.approx(entropy, rel=1e-5)
    assert entry["mean_token_accuracy"] == pytest.approx(hits, rel=1e-6)


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        *((each, {}) for each in ("gpt2", "opt", "llama", "gemma2", "granite")),
        ("llama", {"gradient_checkpointing": True}),
    ],
    ids=str,
)
def test_float32_gives_what_trl_gives(tmp_path, monkeypatch, architecture, settings):
    entries, weights = [], []
    for name in ("ours", "theirs"):
        if name == "theirs":
            monkeypatch.setattr(FinetuneTrainer, "compute_loss", SFTTrainer.compute_loss)
        steps = {"max_steps": 2, "learning_rate": 1e-2, **settings}
        made = finetuner(tmp_path / name, tiny_model(architecture, layers=2), **steps)
        made.train()
        entries.append(log(made))
        weights.append(trained(made.model))
    for mine, theirs in zip(*entries, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-4, atol=1e-5)


def test_in_bfloat16_the_heads_products_are_not_rounded(tmp_path, monkeypatch):
    """Logits of about 20 nats, whose rounding to bfloat16 would show; factors that bfloat16 holds exactly."""
    model, states = tiny_model("llama", layers=1, hidden=64, tied=False), []
    head = model.get_output_embeddings().weight
    head.data = (4 * head.data).bfloat16().float()
    whole = promptkd.training.sft.response_hidden

    def rounded(*arguments):
        states.append((whole(*arguments).bfloat16().float(), arguments[1].targets))
        return states[-1][0]

    monkeypatch.setattr(promptkd.training.sft, "response_hidden", rounded)
    weight = head.detach().clone().double()
    made = finetuner(tmp_path, model, bf16=True)
    made.train()
    logits = torch.cat([hidden.detach().double() @ weight.T for hidden, _ in states])
    targets = torch.cat([each for _, each in states])
    cross_entropy = torch.nn.functional.cross_entropy
    expected, crude = (float(cross_entropy(each.double(), targets)) for each in (logits, logits.bfloat16()))
    assert abs(crude - expected) > 1e-3
    assert log(made)[0]["loss"] == pytest.approx(expected, abs=2e-5)


def test_it_is_the_loss_of_seqkd(tmp_path):
    data, entries = rows(8), []
    shared = {"max_steps": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "bf16": False}
    models = [tiny_model("llama", layers=2) for _ in range(3)]
    taught = trainer(tmp_path / "seqkd", data=data, models=models[:2], method=named_method("seqkd"), **shared)
    taught.train()
    tuned = finetuner(
        tmp_path / "sft", models[2], data=data, optim="adamw_torch", learning_rate=1e-3, max_grad_norm=1.0
    )
    tuned.train()
    entries = [log(each)[0] for each in (tuned, taught)]
    for name in ("loss", "grad_norm"):
        assert entries[0][name] == pytest.approx(entries[1][name], rel=1e-6)


@pytest.fixture
def by_trl(monkeypatch) -> list[int]:
    """Grows with each loss that TRL computes."""
    calls, theirs = [], SFTTrainer.compute_loss

    def counted(self, *arguments, **settings):
        calls.append(1)
        return theirs(self, *arguments, **settings)

    monkeypatch.setattr(SFTTrainer, "compute_loss", counted)
    return calls


@pytest.mark.parametrize(
    ("settings", "calls"),
    [({}, 0), ({"loss_type": "dft"}, 2), ({"label_smoothing_factor": 0.1}, 2), ({"neftune_noise_alpha": 5.0}, 2)],
    ids=str,
)
def test_what_our_engine_does_not_compute_is_left_to_trl(tmp_path, by_trl, settings, calls):
    made = finetuner(tmp_path, tiny_model("llama", layers=1), learning_rate=1e-3, **settings)
    made.train()
    assert len(by_trl) == calls
    assert log(made)[0]["loss"] > 0


def test_a_mixture_of_experts_keeps_the_loss_that_balances_it(tmp_path, by_trl):
    made = finetuner(tmp_path, tiny_model("mixtral", layers=1, num_local_experts=2), learning_rate=1e-3)
    made.train()
    assert len(by_trl) == 2
    assert log(made)[0]["aux_loss"] > 0
