"""What each of several processes does that train together.

processes.py starts it once per process. Each check writes what it saw into the folder, from every process, as
`CHECK-RANK.pt`; the test compares.
"""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from helpers.kept import keep
from helpers.tiny import VOCABULARY, tiny_model, tiny_tokenizer
from helpers.trainers import FixedResponses, log, pair, rows, trainer
from helpers.vllm_server import answer, connect, serving
from promptkd.engine import Head, chunked_objective, linear_head
from promptkd.methods import Method, MethodSettings, named_method
from promptkd.models.adapters import SoftPromptFactory
from promptkd.objectives import Taid, reverse_kl
from promptkd.responses import AdaptiveReplay, ResponseMix, Responses
from promptkd.training import FinetuneConfig, FinetuneTrainer

ON_POLICY = Method(ResponseMix(1.0), reverse_kl, SoftPromptFactory)
WINDOW = 16
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def made(folder: Path, **settings):
    """A trainer of whole windows of 16 rows, on however many processes."""
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4 // processes()} | settings
    return trainer(folder, data=settings.pop("data", None) or rows(48), **settings)


def outcome(trainer) -> dict:
    """What two runs must have in common. Every process calls it."""
    student = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return {
        "log": log(trainer),
        "prompt": trainer.adapter.module.embeddings.detach().clone(),
        "student": {name: weight.clone() for name, weight in (student or {}).items()},
    }


def fixed(folder: Path) -> dict:
    """Losses, prompt and student after three steps on the data's responses, validated on rows that do not divide."""
    run = made(folder, eval_data=rows(5, seed=3), eval_strategy="steps", eval_steps=2)
    run.train()
    return outcome(run)


def tuned(folder: Path) -> dict:
    """Losses, metrics and model after three steps of fine-tuning, on rows of one to eight response tokens."""
    settings = {"max_steps": 3, "lr_scheduler_type": "constant", "learning_rate": 1e-3, "save_strategy": "no"}
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4 // processes()}
    args = FinetuneConfig(str(folder), **settings, **sizes, report_to="none", disable_tqdm=True, use_cpu=True)
    run = FinetuneTrainer(pair()[0], args, rows(48), None, tiny_tokenizer())
    run.train()
    student = run.accelerator.get_state_dict(run.model_wrapped)
    return {"log": log(run), "student": {name: weight.clone() for name, weight in (student or {}).items()}}


def contrast(folder: Path) -> dict:
    """DistiLLM-2 with a prompted teacher: its α follow from gaps that are averaged over all processes."""
    method = named_method("distillm2", MethodSettings(teacher_adapter="prompt"))
    run = made(folder, method=replace(method, responses=FixedResponses()))
    run.train()
    return outcome(run)


class NothingHere(Responses):
    """The data's responses, but none at all on the last process."""

    def __call__(self, rows, sample, progress):
        nothing = rank() == processes() - 1
        return [[] if nothing else row.response_ids for row in rows]


class Unlike(Responses):
    """The data's responses, cut to one token in every second row, so that the processes' losses and tokens differ."""

    needs_data = False

    def __call__(self, rows, sample, progress):
        return [row.response_ids[: None if row.row % 2 else 1] for row in rows]


class Nothing(Responses):
    def __call__(self, rows, sample, progress):
        return [[] for _ in rows]


def kept(folder: Path) -> dict:
    """Losses and student after three steps on kept logits, of which each process reads its own rows'."""
    data, (student, teacher) = rows(48), pair()
    logits = keep(folder / f"logits-{rank()}", teacher, data, 8)
    run = made(folder, data=data, models=(student, logits), method=named_method("kd"))
    run.train()
    return {"log": log(run), "student": run.accelerator.get_state_dict(run.model_wrapped)}


def empty(folder: Path) -> dict:
    """Rows without responses on one process, then on all."""
    one = made(folder / "one", method=Method(NothingHere(), reverse_kl, SoftPromptFactory))
    one.train()
    method = replace(named_method("distillm2", MethodSettings(teacher_adapter="prompt")), responses=NothingHere())
    made(folder / "contrast", method=method, max_steps=2).train()
    none = made(folder / "none", method=Method(Nothing(), reverse_kl, SoftPromptFactory), max_steps=1)
    none.train()
    return {"one": outcome(one), "none": outcome(none)}


def early(folder: Path) -> dict:
    """Responses sampled by the student; on the last process each ends with its first token."""
    run = made(folder, method=ON_POLICY, eval_data=rows(1, seed=3), eval_strategy="steps", eval_steps=1)
    if rank() == processes() - 1:
        run.stop_ids = tuple(range(VOCABULARY))
    run.train()
    return outcome(run)


def mixed(folder: Path) -> dict:
    """The student writes for all rows of one process and for none of the others'."""
    run = made(folder, method=Method(ResponseMix(float(rank() == 0)), reverse_kl, SoftPromptFactory), max_steps=2)
    run.train()
    return outcome(run)


def moving(folder: Path) -> dict:
    """TAID's coefficient in a run that goes on from its second step, and in the undisturbed one."""
    runs = [
        made(folder / name, method=Method(Unlike(), Taid(alpha=1.0), SoftPromptFactory), max_steps=4, **saved)
        for name, saved in (("whole", {"save_strategy": "steps", "save_steps": 2}), ("again", {}))
    ]
    runs[0].train()
    runs[1].train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-2"))
    states = [run.method.moving.state_dict() for run in runs]
    return {"states": states, "t": [entry["taid_t"] for entry in log(runs[0])]}


def uneven(folder: Path) -> dict:
    """Two epochs of 40 rows: two windows each, 8 rows are left over."""
    run = made(folder, data=rows(40), max_steps=-1, num_train_epochs=2)
    run.train()
    return outcome(run)


def resumed(folder: Path) -> dict:
    """DistiLLM's buffer of every process survives: a run that goes on after its second step ends as the undisturbed."""
    method = lambda: Method(AdaptiveReplay(start=1.0), reverse_kl, SoftPromptFactory)  # noqa: E731
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = made(folder / "whole", method=method(), data=rows(16), **settings)
    whole.train()
    again = made(folder / "again", method=method(), data=rows(16), **settings)
    again.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-2"))
    buffers = [list(each.method.responses.buffer) for each in (whole, again)]
    return {"whole": outcome(whole), "again": outcome(again), "buffers": buffers}


def served(folder: Path) -> dict:
    """Responses by a vLLM server (test_vllm.py), of which the last process asks for fewer than the others."""
    share = 1.0 if rank() == 0 else 0.5
    with serving() as server, pytest.MonkeyPatch.context() as patch:
        connect(patch, server)
        run = made(
            folder,
            method=Method(ResponseMix(share), reverse_kl, SoftPromptFactory),
            use_vllm=True,
            vllm_mode="server",
            vllm_server_base_url=f"http://127.0.0.1:{server.server_port}",
        )
        cut, seen = run.rollout._cut, []

        def watched(inputs, responses, progress):
            seen.extend(zip(inputs, responses, strict=True))
            return cut(inputs, responses, progress)

        run.rollout._cut = watched
        run.train()
    own = [row for row, response in seen if response == answer(row.prompt_ids)]
    data = [row for row, response in seen if response == row.response_ids]
    return {"rows": len(seen), "own": len(own), "data": len(data), "requests": len(server.asked)}


def heads(folder: Path) -> dict:
    """A head that FSDP has left sharded: gathered once, its gradient the mean over processes."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(processes(), 5, 16, generator=generator)
    teacher = Head(torch.randn(VOCABULARY, 16, generator=generator))
    plain, student = (tiny_model("llama", layers=1, tied=False, seed=1) for _ in range(2))
    for each in hidden:
        chunked_objective(reverse_kl, (each, linear_head(plain)), (each, teacher)).total.backward()
    fully_shard(student.lm_head)
    head = linear_head(student)
    loss = chunked_objective(reverse_kl, (hidden[rank()], head), (hidden[rank()], teacher)).total
    loss.backward()
    gradient = student.lm_head.weight.grad
    assert isinstance(gradient, DTensor)
    return {"gathered": torch.equal(head.weight, plain.lm_head.weight), "gradient": gradient.full_tensor()} | {
        "expected": plain.lm_head.weight.grad / processes()
    }


def sharded(folder: Path) -> dict:
    """`fixed`, `early` and `mixed` under FSDP2, and a run that goes on from a checkpoint.

    accelerate switches FSDP on for GPUs alone; here it is told that it is on.
    """
    original = AcceleratorState.__init__

    def switched_on(self, *args, fsdp_plugin=None, **settings):
        original(self, *args, fsdp_plugin=fsdp_plugin, **settings)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState._reset_state(True)
    AcceleratorState.__init__ = switched_on
    os.environ.update(FSDP)
    student, teacher = pair()
    whole_numbers = [sum(each.numel() for each in model.parameters()) for model in (student, teacher)]
    run = made(
        folder / "fixed", models=(student, teacher), eval_data=rows(5, seed=3), eval_strategy="steps", eval_steps=2
    )
    run.train()
    models = (run.model_wrapped, run.teacher.placed)
    units = [[each for each in model.modules() if isinstance(each, FSDPModule)] for model in models]
    for unit in (*units[0], *units[1]):
        unit.reshard()  # the last layers stay whole between two passes
    held = [sum(each.to_local().numel() for each in model.parameters()) for model in models]
    seen = {"fixed": outcome(run), "shares": [one / all for one, all in zip(held, whole_numbers, strict=True)]}
    seen["units"] = [len(each) for each in units]
    seen["tuned"] = tuned(folder / "tuned")
    seen["early"] = early_sharded(folder / "early")
    settings = {"save_strategy": "steps", "save_steps": 2}
    first = made(folder / "first", **settings)
    first.train()
    again = made(folder / "again", **settings)
    again.train(resume_from_checkpoint=str(folder / "first" / "checkpoint-2"))
    again.save_student(folder / "student")
    seen |= {"first": outcome(first), "again": outcome(again)}
    return seen


def early_sharded(folder: Path) -> dict:
    run = made(folder, method=ON_POLICY, eval_data=rows(3, seed=3), eval_strategy="steps", eval_steps=1)
    if rank() == processes() - 1:
        run.method.responses.student_share = 0.5
        run.method.responses.needs_data = False
    run.train()
    return outcome(run)


def zero(stage: int, folder: Path) -> dict:
    """`fixed` under DeepSpeed, with a run that goes on from a checkpoint and one that samples."""
    small = {"stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    common = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"deepspeed-{rank()}.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage} | small} | dict.fromkeys(common, "auto")))
    os.environ.update(
        ACCELERATE_USE_DEEPSPEED="true",
        ACCELERATE_DEEPSPEED_ZERO3_INIT="false",
        ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL="true",
        ACCELERATE_DEEPSPEED_CONFIG_FILE=str(file),
        DS_ACCELERATOR="cpu",
    )
    on = {"eval_data": rows(5, seed=3), "eval_strategy": "steps", "eval_steps": 2}
    run = made(folder / "fixed", save_strategy="steps", save_steps=2, **on)
    run.train()
    seen = {"fixed": outcome(run)}
    forget_deepspeed()
    again = made(folder / "again", **on)
    again.train(resume_from_checkpoint=str(folder / "fixed" / "checkpoint-2"))
    again.save_student(folder / "student")
    seen["again"] = outcome(again)
    forget_deepspeed()
    sampled = made(folder / "sampled", method=ON_POLICY, **on)
    sampled.train()
    return seen | {"sampled": outcome(sampled)}


def forget_deepspeed() -> None:
    """Let the next trainer of this process begin as the first did; else transformers makes its models in pieces."""
    AcceleratorState._reset_state()
    unset_hf_deepspeed_config()


def reached(folder: Path) -> dict:
    """An adapter's step of which each process has reached another parameter, by experts of its own."""
    tuner = made(folder).tuner
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (2, 3, 1)]
    tuner.adapter = SimpleNamespace(parameters=lambda: parameters)
    tuner._settings = replace(tuner._settings, prompt_max_grad_norm=0.0, prompt_weight_decay=0.5)
    tuner.start(4)
    own = parameters[rank()]
    own.grad = torch.full_like(own, 10.0 ** (rank() + 1))
    seen = []
    step, tuner.optimizer.step = tuner.optimizer.step, lambda: seen.extend(p.grad for p in parameters) or step()
    tuner._update(1)
    return {"gradients": seen, "parameters": [each.detach().clone() for each in parameters]}


def zero2(folder: Path) -> dict:
    return zero(2, folder)


def zero3(folder: Path) -> dict:
    return zero(3, folder)


CHECKS = {
    check.__name__: check
    for check in (
        fixed,
        contrast,
        empty,
        early,
        mixed,
        moving,
        reached,
        uneven,
        resumed,
        served,
        heads,
        sharded,
        kept,
        tuned,
        zero2,
        zero3,
    )
}


def work(folder: Path, checks: tuple[str, ...]) -> None:
    for name in checks:
        print(name, flush=True)
        seen = CHECKS[name](folder / f"{name}-{processes()}")
        torch.save(seen, folder / f"{name}-{rank()}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
