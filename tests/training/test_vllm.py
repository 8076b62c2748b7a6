"""Rollouts by vLLM: what TRL's own code sends to a server, or to an engine in the process, and what comes back.

vLLM and NCCL are not here. Fakes stand in for what would be imported of them; the client, the protocol and the order of
events are TRL's. No GPU takes part.
"""

from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import trl.generation.vllm_client
import trl.generation.vllm_generation
from accelerate.state import AcceleratorState
from peft import LoraConfig

from helpers import RANKS
from helpers.tiny import END_ID, VOCABULARY, tiny_model
from helpers.trainers import pair, rows, trainer
from helpers.vllm_server import answer, connect, serving
from promptkd.methods import Method
from promptkd.models.adapters import SoftPromptFactory
from promptkd.objectives import reverse_kl
from promptkd.responses import ResponseMix

pytestmark = pytest.mark.slow

STEPS, ROWS = 3, 4


class Engine:
    """Stands for `vllm.LLM`."""

    made: ClassVar[list["Engine"]] = []

    def __init__(self, **settings):
        self.settings, self.asked, self.loaded, self.resets = settings, [], [], 0
        model = SimpleNamespace(load_weights=lambda pairs: self.loaded.extend((n, w.clone()) for n, w in pairs))
        runner = SimpleNamespace(model_runner=SimpleNamespace(model=model))
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=runner))
        Engine.made.append(self)

    def generate(self, prompts, *, sampling_params, use_tqdm):
        ids = [each["prompt_token_ids"] for each in prompts]
        self.asked.append((ids, sampling_params))
        return [
            SimpleNamespace(prompt_token_ids=each, outputs=[SimpleNamespace(token_ids=answer(each), logprobs=None)])
            for each in ids
        ]

    def reset_prefix_cache(self):
        self.resets += 1


@pytest.fixture
def server(monkeypatch):
    with serving() as server:
        connect(monkeypatch, server)
        yield server


@pytest.fixture
def engine(monkeypatch):
    generation = trl.generation.vllm_generation
    for module in (generation,):
        monkeypatch.setattr(module, "is_vllm_available", lambda *_, **__: True)
    monkeypatch.setattr(generation, "LLM", Engine, raising=False)
    monkeypatch.setattr(generation, "SamplingParams", lambda **settings: settings, raising=False)
    for name in RANKS:  # TRL sets them. `delenv` alone notes nothing of a name that is not there
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield
    if torch.distributed.is_initialized():  # accelerate's, of the one process that TRL's names announce
        torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
    Engine.made.clear()


def settings_of_the_paper(sent: dict) -> bool:
    wanted = {"n": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    wanted |= {"max_tokens": 8, "stop_token_ids": [END_ID]}
    return {name: sent[name] for name in wanted} == wanted


def distilled(folder, *, mode, url=None, share=1.0, **settings):
    """A trained student, the responses of each step, and its weights before each step."""
    made = trainer(
        folder,
        method=Method(ResponseMix(share), reverse_kl, SoftPromptFactory),
        use_vllm=True,
        vllm_mode=mode,
        vllm_server_base_url=url,
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        data=rows(12),
        **settings,
    )
    seen, before, cut = [], [], made.rollout._cut

    def watched(inputs, responses, progress):
        student = made.accelerator.unwrap_model(made.model)
        before.append({name: weight.detach().clone() for name, weight in student.named_parameters()})
        seen.append(list(zip(inputs, responses, strict=True)))
        return cut(inputs, responses, progress)

    made.rollout._cut = watched
    made.train()
    return made, seen, before


def test_a_server_gets_our_token_ids_and_the_weights_of_every_step(tmp_path, server):
    _, seen, before = distilled(tmp_path, mode="server", url=f"http://127.0.0.1:{server.server_port}")
    assert len(server.asked) == len(server.weights) == len(server.announced) == STEPS
    for step in range(STEPS):
        assert server.asked[step]["prompt"] == [row.prompt_ids for row, _ in seen[step]]  # ids, untouched
        assert settings_of_the_paper(server.asked[step])
        assert [response for _, response in seen[step]] == [answer(row.prompt_ids) for row, _ in seen[step]]
        sent = server.weights[step]
        assert list(sent) == server.announced[step]["names"] == list(before[step])
        assert all(torch.equal(sent[name], weight) for name, weight in before[step].items())
    assert any(not torch.equal(server.weights[0][name], server.weights[1][name]) for name in before[0])
    start, update = server.calls.index("/start_weight_update"), server.calls.index("/update_weights")
    finish, reset = server.calls.index("/finish_weight_update"), server.calls.index("/reset_prefix_cache")
    assert start < update < finish < reset < server.calls.index("/v1/completions")


def test_only_the_students_share_of_the_rows_is_asked_for(tmp_path, server):
    torch.manual_seed(0)
    _, seen, _ = distilled(tmp_path, mode="server", url=f"http://127.0.0.1:{server.server_port}", share=0.5)
    prompts = [prompt for body in server.asked for prompt in body["prompt"]]
    given = [row for step in seen for row in step]
    own = [row.prompt_ids for row, response in given if response != row.response_ids]
    assert prompts == own
    assert 0 < len(own) < len(given)


def test_an_engine_in_the_process_gets_the_same(tmp_path, engine):
    _, seen, before = distilled(tmp_path, mode="colocate")
    (made,) = Engine.made
    assert made.resets == len(made.asked) == STEPS
    for step, (prompts, sampling) in enumerate(made.asked):
        assert prompts == [row.prompt_ids for row, _ in seen[step]]
        assert settings_of_the_paper(sampling)
        assert [response for _, response in seen[step]] == [answer(ids) for ids in prompts]
        sent = made.loaded[step * len(before[0]) : (step + 1) * len(before[0])]
        assert [name for name, _ in sent] == list(before[step])
        assert all(torch.equal(weight, before[step][name]) for name, weight in sent)


def test_an_engine_in_the_process_never_samples_what_pads_the_head(tmp_path, engine):
    student = tiny_model("llama", layers=2, hidden=16, vocabulary=VOCABULARY + 3, seed=1)
    distilled(tmp_path, mode="colocate", models=(student, pair()[1]))
    (made,) = Engine.made
    assert made.asked[0][1]["logit_bias"] == dict.fromkeys(range(VOCABULARY, VOCABULARY + 3), -100.0)


def test_a_lora_student_arrives_merged_and_goes_on_unmerged(tmp_path, server):
    student, teacher = pair()
    plain = {name: weight.detach().clone() for name, weight in student.named_parameters()}
    lora = LoraConfig(r=2, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    made, _, _ = distilled(
        tmp_path,
        mode="server",
        url=f"http://127.0.0.1:{server.server_port}",
        models=(student, teacher),
        peft_config=lora,
        learning_rate=1e-1,
    )
    assert all(list(sent) == list(plain) for sent in server.weights)  # the student's own names, no LoRA among them
    assert all(torch.equal(server.weights[0][name], weight) for name, weight in plain.items())  # B starts at 0
    name = "model.layers.0.self_attn.q_proj.weight"
    moved = server.weights[STEPS - 1][name] - plain[name]
    assert 0 < torch.linalg.matrix_rank(moved, rtol=1e-3) <= 2  # an update of the LoRA's rank
    wrapped = made.accelerator.unwrap_model(made.model)
    assert not wrapped.base_model.model.model.layers[0].self_attn.q_proj.merged
