"""What `promptkd.training` needs of TRL and transformers.

The tables below name every method, attribute and argument of theirs that the package's trainers override, call or read;
a test holds the tables to the code in both directions. The other tests hold TRL to what those names must mean. When TRL
or transformers is upgraded, this file says what has changed under us, before any training does.
"""

import ast
import inspect
import tomllib
from collections import defaultdict
from importlib import metadata
from pathlib import Path

import pytest
import torch
from accelerate.utils import fsdp2_prepare_model
from datasets import Dataset
from packaging.requirements import Requirement
from torch import nn
from transformers import TrainerCallback, TrainerState, get_scheduler
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from trl import DistillationConfig, DistillationTrainer, SFTConfig, SFTTrainer
from trl.models import prepare_deepspeed, unwrap_model_for_generation
from trl.trainer.utils import RepeatSampler

import promptkd.training
from helpers.tiny import tiny_model, tiny_tokenizer
from promptkd.training import DistillConfig, DistillTrainer, FinetuneConfig, FinetuneTrainer

TRAINING = Path(promptkd.training.__file__).parent

SHARED_METHODS = {
    # overridden by both trainers
    "_get_grad_norm": ["model", "grad_norm"],
    "_get_output_dir": ["trial"],
    "_load_best_model": [],
    "_run_epoch": [  # passed on as they come
        *("model", "epoch", "train_dataloader", "steps_in_epoch", "num_update_steps_per_epoch", "trial"),
        *("ignore_keys_for_eval", "start_time", "resume_from_checkpoint", "epochs_trained"),
        "steps_trained_in_current_epoch",
    ],
    "_save_checkpoint": ["model", "trial"],
    "create_model_card": ["model_name"],
    "evaluate": ["eval_dataset", "ignore_keys", "metric_key_prefix"],
    "log": ["logs", "start_time"],
    "train": ["resume_from_checkpoint"],
    # called
    "add_callback": ["callback"],
    "is_world_process_zero": [],
    "save_model": ["output_dir", "_internal_call"],
}
DISTILLATION_METHODS = {
    # overridden
    "_generate_and_score_completions": ["inputs"],
    "_get_train_sampler": ["dataset"],
    "_load_optimizer_and_scheduler": ["checkpoint"],
    "compute_loss": ["model", "inputs", "return_outputs", "num_items_in_batch"],
    "create_scheduler": ["num_training_steps", "optimizer"],
    "training_step": ["model", "inputs", "num_items_in_batch"],
    # called
    "_generate_single_turn": ["prompt_ids", "images", "multimodal_fields"],
}
FINETUNING_METHODS = {
    # overridden
    "_get_train_sampler": ["train_dataset"],
    "training_step": ["args", "kwargs"],  # passed on as they come
}
CALLED_FROM_OUTSIDE = {
    "remove_callback": ["callback"],
}
CONSTRUCTOR = ["model", "args", "train_dataset", "eval_dataset", "processing_class"]

SHARED_ATTRIBUTES = {
    *(
        "_metrics",
        "_total_train_tokens",
        "_tag_names",
        "accelerator",
        "args",
        "callback_handler",
        "control",
        "eval_dataset",
        "model",
    ),
    *("is_deepspeed_enabled", "model_wrapped", "optimizer", "processing_class", "state"),
}
DISTILLATION_ATTRIBUTES = {
    *(
        "_buffered_inputs",
        "_forward_redirection",
        "_logs",
        "_name",
        "_step",
        "log_completions",
        "eos_token_ids",
        "generation_config",
    ),
    *("max_completion_length", "repetition_penalty", "shuffle_dataset"),
    *("teacher_model", "temperature", "top_k", "top_p", "train_dataset", "use_vllm"),
}

WHILE_TRAINING = {"_globalstep_last_logged", "_tr_loss"}  # what a logged line to come is made of

STATE = {
    *(
        "best_global_step",
        "best_model_checkpoint",
        "epoch",
        "global_step",
        "is_world_process_zero",
        "log_history",
        "logging_steps",
        "max_steps",
        "save_to_json",
        "stateful_callbacks",
    ),
}


def upgrade(message: str) -> str:
    return f"{message} What promptkd.training builds on has changed in TRL or transformers; see {Path(__file__).name}."


# ---- versions ----


@pytest.mark.parametrize("package", ["trl", "transformers"])
def test_the_installed_version_lies_in_our_range(package):
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (required,) = (each for each in map(Requirement, project["dependencies"]) if each.name == package)
    assert required.specifier.contains(metadata.version(package), prereleases=True), (
        f"{package} {metadata.version(package)} is installed, and pyproject.toml asks for {required.specifier}."
    )


# ---- the tables and our code ----


def own_classes(trainer: type) -> list[ast.ClassDef]:
    """The classes of promptkd.training that make up a trainer."""
    ours = [each for each in trainer.__mro__ if each.__module__.startswith("promptkd.training")]
    return [definition for each in ours for definition in ast.parse(inspect.getsource(each)).body]


def names_in(definition: ast.ClassDef) -> set[str]:
    """Every name of its own or of a base class that a class defines, reads or writes."""
    names = set()
    for node in definition.body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    for node in ast.walk(definition):
        match node:
            case ast.Attribute(value=ast.Name(id="self"), attr=name):
                names.add(name)
            case ast.Attribute(value=ast.Call(func=ast.Name(id="super")), attr=name):
                names.add(name)
    return {name for name in names if not name.startswith("__")}


def attributes_of(variable: str, tree: ast.AST) -> set[str]:
    """Every name that is read as `variable.name` or `self.variable.name`."""
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id=owner) | ast.Attribute(attr=owner), attr=name) if owner == variable:
                found.add(name)
    return found


def own_files() -> list[ast.Module]:
    return [ast.parse(file.read_text(encoding="utf-8")) for file in sorted(TRAINING.glob("*.py"))]


@pytest.mark.parametrize(
    ("ours", "plain", "named"),
    [
        (
            DistillTrainer,
            "plain_distillation",
            SHARED_METHODS.keys() | SHARED_ATTRIBUTES | DISTILLATION_METHODS.keys() | DISTILLATION_ATTRIBUTES,
        ),
        (
            FinetuneTrainer,
            "plain_sft",
            SHARED_METHODS.keys() | SHARED_ATTRIBUTES | FINETUNING_METHODS.keys(),
        ),
    ],
)
def test_the_tables_name_all_that_our_trainers_use(request, ours, plain, named):
    theirs = set(dir(request.getfixturevalue(plain)))
    used = {name for definition in own_classes(ours) for name in names_in(definition)} & theirs
    assert used <= named, f"{ours.__name__} uses {sorted(used - named)} of TRL's: name them in the tables above."
    assert used == named, f"{ours.__name__} no longer uses {sorted(named - used)}: take them out of the tables."


def test_the_tables_name_all_that_is_read_of_a_trainer_from_outside():
    read = {name for tree in own_files() for name in attributes_of("trainer", tree)}
    known = SHARED_METHODS.keys() | SHARED_ATTRIBUTES | DISTILLATION_ATTRIBUTES | CALLED_FROM_OUTSIDE.keys()
    known |= {name for definition in own_classes(DistillTrainer) for name in names_in(definition)} | WHILE_TRAINING
    assert read <= known, f"Name {sorted(read - known)} in the tables."


def test_the_state_has_what_we_read():
    read = {name for tree in own_files() for name in attributes_of("state", tree)}
    assert read == STATE, f"Table and code differ by {sorted(read ^ STATE)}."
    missing = STATE - set(dir(TrainerState()))
    assert not missing, upgrade(f"TrainerState has no {sorted(missing)}.")


@pytest.mark.parametrize(("ours", "config"), [(DistillTrainer, DistillConfig), (FinetuneTrainer, FinetuneConfig)])
def test_the_arguments_have_what_we_read(tmp_path, ours, config):
    args = config(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    read = {name for definition in own_classes(ours) for name in attributes_of("args", definition)}
    assert read
    missing = read - set(dir(args))
    assert not missing, upgrade(f"{ours.__name__} reads {sorted(missing)} of its arguments, which have no such field.")


@pytest.mark.parametrize(
    ("ours", "theirs", "again"),
    [
        (
            DistillConfig,
            DistillationConfig,
            {"learning_rate", "max_completion_length", "disable_dropout", "logging_steps", "gradient_checkpointing"}
            | {"bf16", "save_only_model", "ddp_find_unused_parameters", "logging_nan_inf_filter"},
        ),
        (
            FinetuneConfig,
            SFTConfig,
            {"max_length", "logging_steps", "gradient_checkpointing", "bf16", "ddp_find_unused_parameters"}
            | {"logging_nan_inf_filter"},
        ),
    ],
)
def test_our_settings_hide_none_of_theirs_by_chance(ours, theirs, again):
    same = vars(ours)["__annotations__"].keys() & theirs.__dataclass_fields__.keys()
    assert same == again, upgrade(f"{theirs.__name__} and {ours.__name__} both have {sorted(same ^ again)}.")


# ---- signatures ----


@pytest.mark.parametrize(
    ("trainer", "methods"),
    [
        (DistillationTrainer, SHARED_METHODS | DISTILLATION_METHODS | CALLED_FROM_OUTSIDE),
        (SFTTrainer, SHARED_METHODS | FINETUNING_METHODS | CALLED_FROM_OUTSIDE),
    ],
)
def test_methods_take_what_they_took(trainer, methods):
    for name, expected in methods.items():
        method = inspect.getattr_static(trainer, name, None)
        assert method is not None, upgrade(f"{trainer.__name__} has no {name}.")
        parameters = list(inspect.signature(method).parameters)[1:]
        assert parameters[: len(expected)] == expected, upgrade(f"{trainer.__name__}.{name} takes {parameters}.")
        required = [
            parameter.name
            for parameter in list(inspect.signature(method).parameters.values())[1:]
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        ]
        assert set(required) <= set(expected), upgrade(f"{trainer.__name__}.{name} needs {required}.")


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (DistillationTrainer, [*CONSTRUCTOR, "teacher_model"]),
        (SFTTrainer, CONSTRUCTOR),
        (get_scheduler, ["name", "optimizer", "num_warmup_steps", "num_training_steps"]),
        (prepare_deepspeed, ["model", "accelerator"]),
        (unwrap_model_for_generation, ["model", "accelerator"]),
        (fsdp2_prepare_model, ["accelerator", "model"]),
        (rotate_checkpoints, ["output_dir", "save_total_limit", "best_model_checkpoint", "use_mtime"]),
        (RepeatSampler, ["data_source", "mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed"]),
    ],
)
def test_functions_take_what_they_took(function, expected):
    parameters = inspect.signature(function).parameters
    assert set(expected) <= parameters.keys(), upgrade(f"{function.__name__} takes {list(parameters)}.")


# ---- what the names mean ----

SETTINGS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 3,
    "max_steps": 4,
    "max_completion_length": 4,
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
}
ROWS = [{"prompt": "the", "number": number} for number in range(13)]  # two windows of six rows, and one row over


class Recorder(DistillationTrainer):
    """TRL's own trainer, with the hooks that ours overrides writing down how they are called."""

    def __init__(self, **kwargs):
        self.calls = defaultdict(list)
        self.order = []
        super().__init__(**kwargs)

    def _generate_and_score_completions(self, inputs):
        self.calls["window"].append([row["number"] for row in inputs])
        numbers = torch.tensor([row["number"] for row in inputs])
        return {"numbers": numbers, "rows": inputs, "ids": [[n, n] for n in numbers.tolist()], "items": numbers.sum()}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.calls["micro-batch"].append((self._step, len(self._buffered_inputs), inputs))
        assert inputs is self._buffered_inputs[self._step % 3]
        return next(model.parameters()).sum()

    def _get_grad_norm(self, model, grad_norm=None):
        self.calls["norm"].append((self.state.global_step, self._step, float(self._tr_loss)))
        self.watch.weights.append(float(next(model.parameters()).detach().sum()))
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def create_scheduler(self, num_training_steps, optimizer=None):
        self.order.append(("create_scheduler", num_training_steps))
        return super().create_scheduler(num_training_steps, optimizer)

    def _load_optimizer_and_scheduler(self, checkpoint):
        self.order.append(("_load_optimizer_and_scheduler", Path(checkpoint).name if checkpoint else None))
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self):
        self.order.append(("_load_best_model", self.state.best_model_checkpoint))
        super()._load_best_model()

    def evaluate(self, *args, **kwargs):
        metrics = {"eval_loss": float(abs(self.state.global_step - 2))}  # step 2 is the best
        self.log(dict(metrics))
        return metrics

    def _get_train_sampler(self, dataset=None):
        sampler = super()._get_train_sampler(dataset)
        iterate = type(sampler).__iter__
        recorder = self

        class Told(type(sampler)):
            def __iter__(self):
                recorder.calls["epoch starts at"].append(recorder.state.global_step)
                return iterate(self)

        sampler.__class__ = Told
        return sampler


class Watch(TrainerCallback):
    """Writes down gradients before each optimiser step, and what is logged."""

    def __init__(self):
        self.gradients, self.logged, self.weights = [], [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append(float(next(model.parameters()).grad.mean()))

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logged.append((dict(logs), dict(state.log_history[-1])))


def recorder(folder: Path, **settings) -> Recorder:
    made = Recorder(
        model=tiny_model("llama", layers=1),
        teacher_model=None,
        args=DistillationConfig(output_dir=str(folder), **{**SETTINGS, **settings}),
        train_dataset=ROWS,
        eval_dataset=ROWS,
        processing_class=tiny_tokenizer(),
    )
    made.watch = Watch()
    made.add_callback(made.watch)
    for callback in (PrinterCallback, ProgressCallback):
        made.remove_callback(callback)
    return made


@pytest.fixture(scope="module")
def plain_distillation(tmp_path_factory) -> DistillationTrainer:
    return DistillationTrainer(
        model=tiny_model("llama", layers=1),
        args=DistillationConfig(output_dir=str(tmp_path_factory.mktemp("plain")), **SETTINGS),
        train_dataset=ROWS,
        processing_class=tiny_tokenizer(),
    )


@pytest.fixture(scope="module")
def plain_sft(tmp_path_factory) -> SFTTrainer:
    settings = {name: value for name, value in SETTINGS.items() if name != "max_completion_length"}
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}, {"input_ids": [9, 4], "labels": [-100, 4]}]
    return SFTTrainer(
        model=tiny_model("llama", layers=1),
        args=SFTConfig(output_dir=str(tmp_path_factory.mktemp("plain")), max_length=None, **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Recorder:
    """Four optimiser steps of three micro-batches of two rows; two such steps are an epoch."""
    made = recorder(tmp_path_factory.mktemp("trained"))
    made.train()
    return made


def test_the_attributes_are_there_once_the_trainer_is(plain_distillation, plain_sft):
    for trainer, names in (
        (plain_distillation, SHARED_ATTRIBUTES | DISTILLATION_ATTRIBUTES),
        (plain_sft, SHARED_ATTRIBUTES),
    ):
        missing = names - set(dir(trainer))
        assert not missing, upgrade(f"{type(trainer).__name__} has no {sorted(missing)}.")
    assert plain_distillation._step == 0
    assert plain_distillation._buffered_inputs is None
    assert plain_distillation._metrics.keys() == {"train", "eval"}
    assert plain_distillation._logs.keys() == {"prompt", "completion"}
    assert {logs.maxlen for logs in plain_distillation._logs.values()} == {6}  # a window of rows


def test_a_logged_line_to_come_is_kept_where_a_checkpoint_looks_for_it(trained):
    missing = WHILE_TRAINING - set(dir(trained))
    assert not missing, upgrade(f"A trainer that has trained lacks {sorted(missing)}.")
    assert trained._globalstep_last_logged == trained.state.global_step


def test_responses_are_asked_for_once_a_window_with_the_rows_as_they_stand(trained):
    windows = trained.calls["window"]
    assert [len(window) for window in windows] == [6, 6, 6, 6], upgrade("A window is no longer one call.")
    for epoch in (windows[:2], windows[2:]):
        assert len({number for window in epoch for number in window}) == 12


def test_a_window_is_buffered_one_entry_a_micro_batch(trained):
    calls = trained.calls["micro-batch"]
    assert [step for step, _, _ in calls] == list(range(12)), upgrade("`_step` no longer counts micro-batches.")
    assert {size for _, size, _ in calls} == {3}, upgrade("`_buffered_inputs` no longer holds a window.")
    for index, window in enumerate(trained.calls["window"]):
        parts = [inputs for _, _, inputs in calls[3 * index : 3 * index + 3]]
        assert sorted(number for part in parts for number in part["numbers"].tolist()) == sorted(window)
        for part in parts:  # tensors and lists are shuffled and split alike, and a tensor without axes is left alone
            assert [row["number"] for row in part["rows"]] == part["numbers"].tolist()
            assert part["ids"] == [[number, number] for number in part["numbers"].tolist()]
            assert int(part["items"]) == sum(window)


def test_the_loss_is_ours_to_scale(trained):
    # A loss that is the sum of the first parameter has gradient 1 a micro-batch.
    assert trained.watch.gradients == [3.0] * 4, upgrade("TRL divides the loss by the accumulation steps.")
    losses = [logs["loss"] for logs, _ in trained.watch.logged if "loss" in logs]
    assert len(losses) == 4


def test_the_norm_is_asked_for_once_a_step_before_anything_moves(trained):
    """Without clipping too (`max_grad_norm` 0), behind the last backward, and with the sum of the losses at hand."""
    places = [(step, micro_batches) for step, micro_batches, _ in trained.calls["norm"]]
    assert places == [(0, 3), (1, 6), (2, 9), (3, 12)], upgrade("The gradient's norm is asked for elsewhere.")
    for (_, _, loss), weights in zip(trained.calls["norm"], trained.watch.weights, strict=True):
        assert loss == pytest.approx(3 * weights, rel=1e-5)  # of three micro-batches since the last logged line


def test_figures_put_among_the_metrics_are_logged_once(plain_distillation):
    trainer = plain_distillation
    trainer.model.train()
    trainer._metrics["train"]["ours"] += [1.0, 3.0]
    trainer.log({"loss": 0.5})
    assert {"loss": 0.5, "ours": 2.0}.items() <= trainer.state.log_history[-1].items()
    assert not trainer._metrics["train"]
    trainer.model.eval()
    trainer._metrics["train"]["ours"].append(1.0)
    trainer.log({"eval_loss": 0.5})
    assert "ours" not in trainer.state.log_history[-1]


def test_the_seconds_of_a_step_are_added_after_its_last_micro_batch(trained):
    steps = [history for _, history in trained.watch.logged if "loss" in history]
    assert all("step_time" in each for each in steps), upgrade("`step_time`, which we take out, is no longer there.")


def test_callbacks_see_the_entry_that_is_logged(trained):
    for logs, history in trained.watch.logged:
        assert logs.items() <= history.items()
    assert "train_runtime" in trained.watch.logged[-1][1]  # marks the closing line, which is no step
    assert [history["step"] for _, history in trained.watch.logged if "loss" in history] == [1, 2, 3, 4]


def test_an_epoch_of_the_sampler_starts_where_the_steps_stand(trained, tmp_path):
    assert trained.calls["epoch starts at"] == [0, 2], upgrade("The sampler is not iterated once an epoch.")
    first = recorder(tmp_path, save_strategy="steps", save_steps=1)
    first.train()
    resumed = recorder(tmp_path / "resumed", save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / f"{PREFIX_CHECKPOINT_DIR}-1"))
    assert resumed.calls["epoch starts at"] == [1, 2], upgrade("A resumed epoch starts at another step.")
    assert resumed.calls["window"] == first.calls["window"][1:]


def test_the_sampler_draws_from_its_own_generator():
    sampler = RepeatSampler(range(9), mini_repeat_count=1, batch_size=4, repeat_count=2, shuffle=True, seed=3)
    sampler.generator.manual_seed(sampler.seed + 1)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(4)).tolist()
    assert list(sampler) == [*order[:4], *order[:4], *order[4:8], *order[4:8]]
    assert sampler.shuffle
    assert not RepeatSampler(range(9), 1, shuffle=False).shuffle


def test_the_scheduler_is_made_before_a_checkpoint_is_loaded(trained, tmp_path):
    assert trained.order == [("create_scheduler", 4)], upgrade("Schedulers are made elsewhere, or more than once.")
    first = recorder(tmp_path, save_strategy="steps", save_steps=2)
    first.train()
    resumed = recorder(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"{PREFIX_CHECKPOINT_DIR}-2"))
    assert resumed.order == [
        ("create_scheduler", 4),
        ("_load_optimizer_and_scheduler", f"{PREFIX_CHECKPOINT_DIR}-2"),
    ], upgrade("What ours makes in create_scheduler would not be there when it is loaded.")


def test_a_checkpoint_goes_where_the_output_folder_says(tmp_path):
    class Staged(Recorder):
        def _get_output_dir(self, trial):
            return str(tmp_path / "staged")

        def create_model_card(self, *args, **kwargs):
            self.order.append(("create_model_card", None))

    made = recorder(tmp_path / "out", max_steps=1, save_strategy="steps", save_steps=1)
    made.__class__ = Staged
    made.train()
    folder = tmp_path / "staged" / f"{PREFIX_CHECKPOINT_DIR}-1"
    assert ("create_model_card", None) in made.order
    names = {path.name for path in folder.iterdir()}
    expected = {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", TRAINER_STATE_NAME}
    assert expected <= names, upgrade(f"A checkpoint holds {sorted(names)}.")
    assert not list((tmp_path / "out").iterdir()), upgrade("A part of the checkpoint went elsewhere.")
    loaded = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
    assert loaded.global_step == 1


def test_the_best_checkpoint_is_noted_and_loaded_at_the_end(tmp_path):
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    choice = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": False}
    made = recorder(tmp_path, **steps, **choice)
    made.train()
    best = str(tmp_path / f"{PREFIX_CHECKPOINT_DIR}-2")
    assert made.state.best_global_step == 2
    assert made.state.best_model_checkpoint == best
    assert made.order[-1] == ("_load_best_model", best)


def test_old_checkpoints_go_but_the_best_and_the_newest_stay(tmp_path):
    folders = [tmp_path / f"{PREFIX_CHECKPOINT_DIR}-{step}" for step in (1, 2, 3, 10)]
    for folder in folders:
        folder.mkdir()
    rotate_checkpoints(
        output_dir=str(tmp_path), save_total_limit=2, best_model_checkpoint=str(folders[0]), use_mtime=False
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [folders[0].name, folders[3].name]


def test_a_call_is_sent_through_the_wrappers_forward(plain_distillation):
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, *args, **kwargs):
            self.calls += 1
            return self.module(*args, **kwargs)

    inner = nn.Linear(2, 2)
    wrapper = Wrapper(inner)
    seen = []

    def loss(module, value):
        seen.append((module, value))
        return module(torch.ones(2)).sum() + value

    result = plain_distillation._forward_redirection(wrapper, inner, loss, inner, 7)
    assert wrapper.calls == 1
    assert seen == [(inner, 7)]
    assert result == inner(torch.ones(2)).sum() + 7
    assert "forward" not in vars(inner) or inner.forward == inner.forward.__func__.__get__(inner)


def test_the_closing_save_writes_model_and_tokenizer(plain_distillation, tmp_path):
    plain_distillation.save_model(str(tmp_path / "model"), _internal_call=True)
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert names - {"training_args.bin"} == {name for name in names if name.endswith((".json", ".safetensors"))}


def test_sft_takes_tokens_and_labels_as_they_are(plain_sft):
    batch = next(iter(plain_sft.get_train_dataloader()))
    rows = {
        tuple(ids): tuple(labels)
        for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
    }
    pad = tiny_tokenizer().pad_token_id
    assert rows == {(5, 6, 7, 8): (-100, -100, 7, 8), (9, 4, pad, pad): (-100, 4, -100, -100)}, upgrade(
        "SFTTrainer changes encoded rows."
    )
