"""What `promptkd.training` needs of transformers and TRL.

The tables below name every method, attribute, field and argument of theirs that the package overrides, calls or reads;
tests hold the tables to the code in both directions. The other tests hold the libraries to what those names must mean.
When transformers or TRL is upgraded, this file says what has changed under us, before any training does.
"""

import ast
import inspect
import tomllib
from collections import defaultdict
from importlib import metadata
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model
from datasets import Dataset
from packaging.requirements import Requirement
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments, get_scheduler
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from trl import DistillationConfig, SFTConfig, SFTTrainer
from trl.generation.vllm_generation import VLLMGeneration
from trl.models import prepare_deepspeed, unwrap_model_for_generation
from trl.models.utils import _ForwardRedirection
from trl.trainer.utils import print_prompt_completions_sample

import promptkd.training
from helpers.tiny import END_ID, tiny_model, tiny_tokenizer
from helpers.vllm_server import answer, connect, serving
from promptkd.training import DistillConfig, DistillTrainer, FinetuneConfig, FinetuneTrainer
from promptkd.training.callbacks import logs_step
from promptkd.training.row_order import EpochOrder

TRAINING = Path(promptkd.training.__file__).parent

SHARED_METHODS = {
    # overridden by both trainers
    "_determine_best_metric": ["metrics", "trial"],
    "_get_grad_norm": ["model", "grad_norm"],
    "_get_output_dir": ["trial"],
    "_get_train_sampler": ["train_dataset"],
    "_load_best_model": [],
    "_load_optimizer_and_scheduler": ["checkpoint"],
    "_load_rng_state": ["checkpoint"],
    "_run_epoch": [  # passed on as they come
        *("model", "epoch", "train_dataloader", "steps_in_epoch", "num_update_steps_per_epoch", "trial"),
        *("ignore_keys_for_eval", "start_time", "resume_from_checkpoint", "epochs_trained"),
        "steps_trained_in_current_epoch",
    ],
    "_save": ["output_dir", "state_dict"],
    "_save_checkpoint": ["model", "trial"],
    "_save_optimizer_and_scheduler": ["output_dir"],
    "_save_rng_state": ["output_dir"],
    "_save_scaler": ["output_dir"],
    "create_model_card": [],
    "evaluate": ["eval_dataset", "ignore_keys", "metric_key_prefix"],
    "log": ["logs", "start_time"],
    "train": ["resume_from_checkpoint"],
    # called
    "add_callback": ["callback"],
}
DISTILLATION_METHODS = {
    # overridden
    "_prepare_inputs": ["inputs"],
    "compute_loss": ["model", "inputs", "return_outputs", "num_items_in_batch"],
    "create_scheduler": ["num_training_steps", "optimizer"],
    "get_train_dataloader": [],
    "predict": ["test_dataset"],  # refused
    "training_step": ["model", "inputs", "num_items_in_batch"],
    # called
    "_get_dataloader": ["dataset", "description", "batch_size", "sampler_fn", "is_training"],
}
FINETUNING_METHODS = {
    # overridden
    "compute_loss": ["model", "inputs", "return_outputs", "num_items_in_batch"],
    "training_step": ["args", "kwargs"],  # passed on as they come
}
CALLED_FROM_OUTSIDE = {
    "remove_callback": ["callback"],
    "save_model": ["output_dir", "_internal_call"],
}

SHARED_ATTRIBUTES = {"accelerator", "args", "model", "model_wrapped", "optimizer", "state"}
DISTILLATION_ATTRIBUTES = {
    *("_train_batch_size", "eval_dataset", "loss_is_scaled_for_ga", "processing_class", "train_dataset"),
}
FINETUNING_ATTRIBUTES = {
    *("_metrics", "_tag_names", "_total_train_tokens", "aux_loss_enabled", "compute_loss_func", "label_smoother"),
}
READ_FROM_OUTSIDE = {"callback_handler", "control", "is_deepspeed_enabled", "is_fsdp_enabled", "lr_scheduler"}
WHILE_TRAINING = {"_globalstep_last_logged", "_tr_loss"}  # what a logged line to come is made of
COUNTED_BY_TRL = {"_total_train_tokens"}  # by SFTTrainer, among the metrics

STATE = {
    *("best_global_step", "best_metric", "best_model_checkpoint", "epoch", "global_step", "is_world_process_zero"),
    *("log_history", "logging_steps", "max_steps", "save_to_json", "stateful_callbacks"),
}

DISTILLATION_FIELDS = {  # of TRL's DistillationConfig, beside those of transformers' arguments
    *("cache_implementation", "chat_template_kwargs", "disable_dropout", "generation_kwargs", "log_completions"),
    *("log_unique_prompts", "max_completion_length", "min_p", "model_init_kwargs", "num_completions_to_print"),
    *("pad_to_multiple_of", "repetition_penalty", "shuffle_dataset", "teacher_model_init_kwargs"),
    *("teacher_model_revision", "temperature", "top_k", "top_p", "trust_remote_code", "use_vllm"),
    *("vllm_enable_sleep_mode", "vllm_gpu_memory_utilization", "vllm_group_port", "vllm_max_model_length"),
    *("vllm_mode", "vllm_model_impl", "vllm_server_base_url", "vllm_server_host", "vllm_server_port"),
    *("vllm_server_timeout", "vllm_structured_outputs_regex", "vllm_tensor_parallel_size"),
}


def upgrade(message: str) -> str:
    return f"{message} What promptkd.training builds on has changed in transformers or TRL; see {Path(__file__).name}."


# ---- versions ----


@pytest.mark.parametrize("package", ["trl", "transformers"])
def test_the_installed_version_lies_in_our_range(package):
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (required,) = (each for each in map(Requirement, project["dependencies"]) if each.name == package)
    assert required.specifier.contains(metadata.version(package), prereleases=True), (
        f"{package} {metadata.version(package)} is installed, and pyproject.toml asks for {required.specifier}."
    )


# ---- the tables and our code ----


def own_class(trainer: type) -> ast.ClassDef:
    (definition,) = ast.parse(inspect.getsource(trainer)).body
    return definition


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


def attributes_of(variable: str, *trees: ast.AST) -> set[str]:
    """Every name that is read as `variable.name` or `anything.variable.name`, also where `variable` is private."""
    found = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        match node:
            case ast.Attribute(value=ast.Name(id=owner) | ast.Attribute(attr=owner), attr=name):
                if owner.removeprefix("_") == variable:
                    found.add(name)
    return found


def own_files() -> list[ast.Module]:
    return [ast.parse(file.read_text(encoding="utf-8")) for file in sorted(TRAINING.glob("*.py"))]


@pytest.mark.parametrize(("ours", "theirs"), [(DistillTrainer, Trainer), (FinetuneTrainer, SFTTrainer)])
def test_a_trainer_is_made_of_one_class_of_ours_and_one_of_theirs(ours, theirs):
    assert ours.__bases__ == (theirs,)


@pytest.mark.parametrize(
    ("ours", "plain", "named"),
    [
        (
            DistillTrainer,
            "plain_trainer",
            SHARED_METHODS.keys() | SHARED_ATTRIBUTES | DISTILLATION_METHODS.keys() | DISTILLATION_ATTRIBUTES,
        ),
        (
            FinetuneTrainer,
            "plain_sft",
            SHARED_METHODS.keys() | SHARED_ATTRIBUTES | FINETUNING_METHODS.keys() | FINETUNING_ATTRIBUTES,
        ),
    ],
)
def test_the_tables_name_all_that_our_trainers_use(request, ours, plain, named):
    used = names_in(own_class(ours))
    of_theirs = used & set(dir(request.getfixturevalue(plain)))
    assert of_theirs <= named, f"{ours.__name__} uses {sorted(of_theirs - named)} of theirs: name them in the tables."
    assert named <= used, f"{ours.__name__} no longer uses {sorted(named - used)}: shorten the tables."


def test_the_tables_name_all_that_is_read_of_a_trainer_from_outside():
    read = attributes_of("trainer", *own_files())
    outside = CALLED_FROM_OUTSIDE.keys() | READ_FROM_OUTSIDE
    known = outside | names_in(own_class(DistillTrainer)) | names_in(own_class(FinetuneTrainer)) | WHILE_TRAINING
    assert read <= known, f"Name {sorted(read - known)} in the tables."
    unread = outside | WHILE_TRAINING | COUNTED_BY_TRL
    assert unread <= read, f"Nothing reads {sorted(unread - read)} any more: shorten the tables."


@pytest.mark.slow
def test_the_state_has_what_we_read():
    read = attributes_of("state", *own_files())
    assert read == STATE, f"Table and code differ by {sorted(read ^ STATE)}."
    missing = STATE - set(dir(TrainerState()))
    assert not missing, upgrade(f"TrainerState has no {sorted(missing)}.")


def test_the_tables_name_all_fields_of_trls_arguments_that_we_read():
    plain = TrainingArguments.__dataclass_fields__.keys()
    theirs = DistillationConfig.__dataclass_fields__.keys() - plain
    missing = DISTILLATION_FIELDS - theirs
    assert not missing, upgrade(f"DistillationConfig has no {sorted(missing)}.")
    tree = ast.parse((TRAINING / "config.py").read_text(encoding="utf-8"))
    of_self = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    read = (attributes_of("args", *own_files()) | of_self) & theirs
    assert read == DISTILLATION_FIELDS, f"Table and code differ by {sorted(read ^ DISTILLATION_FIELDS)}."


@pytest.mark.parametrize(("ours", "config"), [(DistillTrainer, DistillConfig), (FinetuneTrainer, FinetuneConfig)])
def test_the_arguments_have_what_we_read(tmp_path, ours, config):
    args = config(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    files = (each for each in sorted(TRAINING.glob("*.py")) if (each.name == "sft.py") == (ours is FinetuneTrainer))
    read = attributes_of("args", *(ast.parse(each.read_text(encoding="utf-8")) for each in files))
    assert read
    missing = read - set(dir(args))
    assert not missing, upgrade(f"{ours.__name__} reads {sorted(missing)} of its arguments, which have no such field.")


OURS_AGAIN = {
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "learning_rate"),
    *("num_train_epochs", "max_steps", "eval_strategy", "eval_steps", "logging_steps", "report_to", "seed"),
    *("gradient_checkpointing", "bf16", "ddp_find_unused_parameters", "logging_nan_inf_filter"),
}


@pytest.mark.parametrize(
    ("ours", "theirs", "again"),
    [
        (
            DistillConfig,
            DistillationConfig,
            {"chat_template_kwargs", "disable_dropout", "max_completion_length", "save_only_model", "temperature"},
        ),
        (FinetuneConfig, SFTConfig, {"max_length"}),
    ],
)
def test_our_settings_hide_none_of_theirs_by_chance(ours, theirs, again):
    own = {
        name
        for kind in ours.__mro__
        if kind.__module__.startswith("promptkd.")
        for name in vars(kind).get("__annotations__", {})
    }
    same, again = own & theirs.__dataclass_fields__.keys(), again | OURS_AGAIN
    assert same == again, upgrade(f"{theirs.__name__} and {ours.__name__} both have {sorted(same ^ again)}.")


# ---- signatures ----


@pytest.mark.parametrize(
    ("trainer", "methods"),
    [
        (Trainer, SHARED_METHODS | DISTILLATION_METHODS | CALLED_FROM_OUTSIDE),
        (SFTTrainer, SHARED_METHODS | FINETUNING_METHODS | CALLED_FROM_OUTSIDE),
    ],
)
def test_methods_take_what_they_took(trainer, methods):
    for name, expected in methods.items():
        method = inspect.getattr_static(trainer, name, None)
        assert method is not None, upgrade(f"{trainer.__name__} has no {name}.")
        parameters = list(inspect.signature(method).parameters)[1:]
        assert parameters[: len(expected)] == expected, upgrade(f"{trainer.__name__}.{name} takes {parameters}.")
        missing = set(required_by(method)) - {"self"} - set(expected)
        assert not missing, upgrade(f"{trainer.__name__}.{name} needs {sorted(missing)}.")


def required_by(function) -> list[str]:
    return [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]


def test_the_constructor_takes_its_arguments_in_the_same_order():
    first = ["model", "args", "data_collator", "train_dataset", "eval_dataset", "processing_class"]
    parameters = list(inspect.signature(Trainer).parameters)
    assert parameters[: len(first)] == first, upgrade(f"Trainer takes {parameters}.")
    assert {"callbacks", "optimizers"} <= set(parameters)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (SFTTrainer, ["model", "args", "train_dataset", "eval_dataset", "processing_class"]),
        (get_scheduler, ["name", "optimizer", "num_warmup_steps", "num_training_steps"]),
        (prepare_deepspeed, ["model", "accelerator"]),
        (unwrap_model_for_generation, ["model", "accelerator"]),
        (fsdp2_prepare_model, ["accelerator", "model"]),
        (rotate_checkpoints, ["output_dir", "save_total_limit", "best_model_checkpoint", "use_mtime"]),
        (
            print_prompt_completions_sample,
            ["prompts", "completions", "rewards", "advantages", "step", "num_samples"],
        ),
        (VLLMGeneration.sync_weights, ["self"]),
        (VLLMGeneration.generate, ["self", "prompts", "images", "num_generations"]),
    ],
)
def test_functions_take_what_they_took(function, expected):
    parameters = inspect.signature(function).parameters
    assert set(required_by(function)) <= set(expected) <= parameters.keys(), upgrade(
        f"{function.__name__} takes {list(parameters)}."
    )


def test_vllms_generation_takes_all_that_the_rollout_gives():
    tree = ast.parse((TRAINING / "rollout.py").read_text(encoding="utf-8"))
    (call,) = (
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "VLLMGeneration"
    )
    given = {keyword.arg for keyword in call.keywords}
    parameters = inspect.signature(VLLMGeneration).parameters
    assert set(required_by(VLLMGeneration)) <= given <= parameters.keys(), upgrade(
        f"VLLMGeneration takes {list(parameters)}."
    )
    left = parameters.keys() - given
    assert not left, f"VLLMGeneration has settings that the rollout leaves out: {sorted(left)}."


# ---- what the names mean: the loop ----

SETTINGS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 3,
    "max_steps": 4,
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


class Recorder(Trainer):
    """transformers' own trainer with our dataloader; the hooks that ours overrides write down how they are called."""

    loss_is_scaled_for_ga = True
    get_train_dataloader = DistillTrainer.get_train_dataloader
    _prepare_inputs = DistillTrainer._prepare_inputs

    def __init__(self, **kwargs):
        self.calls = defaultdict(list)
        self.order = []
        super().__init__(**kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.calls["micro-batch"].append([row["number"] for row in inputs])
        self.calls["items"].append(num_items_in_batch)
        self.calls["sync"].append(self.accelerator.sync_gradients)
        return super().training_step(model, tuple(inputs))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.calls["loss of"].append(inputs)
        return next(model.parameters()).sum()

    def _get_grad_norm(self, model, grad_norm=None):
        self.calls["norm"].append((self.state.global_step, len(self.calls["micro-batch"]), float(self._tr_loss)))
        self.calls["weights"].append(float(next(model.parameters()).detach().sum()))
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

    def _get_train_sampler(self, train_dataset=None):
        sampler, recorder = DistillTrainer._get_train_sampler(self, train_dataset), self

        class Told(EpochOrder):
            def __iter__(self):
                recorder.calls["epoch"].append(recorder.state.epoch)
                return super().__iter__()

        sampler.__class__ = Told
        return sampler


class Watch(TrainerCallback):
    """Writes down what callbacks are shown, and when."""

    def __init__(self, trainer):
        self.trainer, self.gradients, self.logged, self.predicted, self.epochs = trainer, [], [], [], []

    def weight(self):
        return float(next(self.trainer.model.parameters()).detach().sum())

    def on_train_begin(self, args, state, control, **kwargs):
        self.begun_at = float(self.trainer._tr_loss), self.trainer._globalstep_last_logged
        self.trainer.order.append("on_train_begin")

    def on_step_begin(self, args, state, control, **kwargs):
        if logs_step(args, state):
            self.predicted.append(state.global_step + 1)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append(float(next(model.parameters()).grad.mean()))
        self.trainer.calls["before the update"].append(self.weight())

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.calls["after the update"].append(self.weight())

    def on_step_end(self, args, state, control, **kwargs):
        self.epochs.append(state.epoch)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logged.append((dict(logs), dict(state.log_history[-1])))


def recorder(folder: Path, **settings) -> Recorder:
    made = Recorder(
        model=tiny_model("llama", layers=1),
        args=DistillationConfig(output_dir=str(folder), **{**SETTINGS, **settings}),
        data_collator=list,
        train_dataset=ROWS,
        eval_dataset=ROWS,
        processing_class=tiny_tokenizer(),
    )
    made.watch = Watch(made)
    made.add_callback(made.watch)
    for callback in (PrinterCallback, ProgressCallback):
        made.remove_callback(callback)
    return made


@pytest.fixture(scope="module")
def plain_trainer(tmp_path_factory) -> Trainer:
    return Trainer(
        tiny_model("llama", layers=1),
        TrainingArguments(output_dir=str(tmp_path_factory.mktemp("plain")), **SETTINGS),
        train_dataset=ROWS,
        processing_class=tiny_tokenizer(),
    )


@pytest.fixture(scope="module")
def plain_sft(tmp_path_factory) -> SFTTrainer:
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}, {"input_ids": [9, 4], "labels": [-100, 4]}]
    return SFTTrainer(
        model=tiny_model("llama", layers=1),
        args=SFTConfig(output_dir=str(tmp_path_factory.mktemp("plain")), max_length=None, **SETTINGS),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Recorder:
    """Four optimizer steps of three micro-batches of two rows; two such steps are an epoch."""
    made = recorder(tmp_path_factory.mktemp("trained"))
    made.train()
    return made


def test_the_attributes_are_there_once_the_trainer_is(plain_trainer, plain_sft):
    for trainer, names in (
        (plain_trainer, SHARED_ATTRIBUTES | DISTILLATION_ATTRIBUTES | READ_FROM_OUTSIDE),
        (plain_sft, SHARED_ATTRIBUTES | FINETUNING_ATTRIBUTES | READ_FROM_OUTSIDE | COUNTED_BY_TRL),
    ):
        missing = names - set(dir(trainer))
        assert not missing, upgrade(f"{type(trainer).__name__} has no {sorted(missing)}.")
    assert plain_trainer._train_batch_size == 2
    assert plain_sft._metrics.keys() == {"train", "eval"}


def test_a_logged_line_to_come_is_kept_where_a_checkpoint_looks_for_it(trained):
    missing = WHILE_TRAINING - set(dir(trained))
    assert not missing, upgrade(f"A trainer that has trained lacks {sorted(missing)}.")
    assert trained._globalstep_last_logged == trained.state.global_step


def test_the_rows_of_a_whole_step_come_once_per_micro_batch(trained):
    given = trained.calls["micro-batch"]
    assert len(given) == 12, upgrade("An optimizer step no longer takes `gradient_accumulation_steps` batches.")
    windows = given[::3]
    assert [given[3 * index : 3 * index + 3] for index in range(4)] == [[window] * 3 for window in windows], upgrade(
        "The dataloader no longer gives our batches as they come."
    )
    orders = [list(EpochOrder(13, trained.args.seed, lambda epoch=epoch: epoch, window=6)) for epoch in (0, 1)]
    assert [[*windows[0], *windows[1]], [*windows[2], *windows[3]]] == orders, upgrade("Rows come in another order.")
    assert trained.calls["sync"] == [False, False, True] * 4, upgrade("Gradients are synchronized elsewhere.")


def test_what_a_step_hands_on_arrives_as_it_is(trained):
    """Ours is a `MicroBatch`, which is no mapping; and nothing counts labels in rows that have none."""
    assert trained.calls["items"] == [None] * 12
    assert all(isinstance(inputs, tuple) for inputs in trained.calls["loss of"])
    assert [[row["number"] for row in inputs] for inputs in trained.calls["loss of"]] == trained.calls["micro-batch"]


def test_the_loss_is_ours_to_scale(trained):
    # A loss that is the sum of the first parameter has gradient 1 per micro-batch.
    assert trained.watch.gradients == [3.0] * 4, upgrade("transformers divides the loss by the accumulation steps.")
    losses = [logs["loss"] for logs, _ in trained.watch.logged if "loss" in logs]
    expected = [3 * weight for weight in trained.calls["weights"]]
    assert losses == pytest.approx(expected, rel=1e-5), upgrade("A logged loss is no longer the sum of a step's.")


def test_the_norm_is_asked_for_once_per_step_before_anything_moves(trained):
    """Without clipping too (`max_grad_norm` 0), behind the last backward, and with the sum of the losses at hand."""
    places = [(step, micro_batches) for step, micro_batches, _ in trained.calls["norm"]]
    assert places == [(0, 3), (1, 6), (2, 9), (3, 12)], upgrade("The gradient's norm is asked for elsewhere.")
    for (_, _, loss), weights in zip(trained.calls["norm"], trained.calls["weights"], strict=True):
        assert loss == pytest.approx(3 * weights, rel=1e-5)  # of three micro-batches since the last logged line


def test_the_update_lies_between_its_two_callbacks(trained):
    before, after = trained.calls["before the update"], trained.calls["after the update"]
    assert before == trained.calls["weights"], upgrade("Something moves before on_pre_optimizer_step.")
    assert all(old != new for old, new in zip(before, after, strict=True)), upgrade("The update comes later.")
    assert before[1:] == after[:-1], upgrade("Something moves after on_optimizer_step.")


def test_callbacks_see_the_entry_that_is_logged(trained):
    for logs, history in trained.watch.logged:
        assert logs.items() <= history.items()
    assert "train_runtime" in trained.watch.logged[-1][1]  # marks the closing line, which is no step
    assert [history["step"] for _, history in trained.watch.logged if "loss" in history] == [1, 2, 3, 4]
    assert all("learning_rate" in history for _, history in trained.watch.logged if "loss" in history)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"logging_steps": 2}, [2, 4]),
        ({"logging_steps": 3, "logging_first_step": True}, [1, 3]),
        ({"logging_steps": 0.5}, [2, 4]),
        ({"logging_strategy": "no"}, []),
    ],
)
def test_a_logged_step_is_known_before_it_begins(tmp_path, settings, steps):
    made = recorder(tmp_path, **settings)
    made.train()
    logged = [history["step"] for _, history in made.watch.logged if "loss" in history]
    assert logged == made.watch.predicted == steps, upgrade("transformers logs at other steps.")


def test_the_running_loss_is_0_when_training_begins_and_ours_to_set_then(tmp_path):
    class Resumed(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            made._tr_loss = torch.tensor(30.0)
            made._globalstep_last_logged = -1

    made = recorder(tmp_path, max_steps=1)
    made.add_callback(Resumed())
    made.train()
    assert made.watch.begun_at == (0.0, 0), upgrade("The running loss is set to 0 elsewhere.")
    expected = (30 + 3 * made.calls["weights"][0]) / 2  # two steps since the last logged line, one of them before
    assert made.watch.logged[0][0]["loss"] == pytest.approx(expected, rel=1e-5), upgrade("A resumed sum is lost.")


@pytest.mark.slow
def test_the_state_tells_the_running_epoch(trained, tmp_path):
    assert list(map(int, trained.calls["epoch"])) == [0, 1], upgrade("The sampler is not iterated once per epoch.")
    assert trained.watch.epochs == [0.5, 1.0, 1.5, 2.0], upgrade("`state.epoch` counts otherwise when a step ends.")
    first = recorder(tmp_path, save_strategy="steps", save_steps=1)
    first.train()
    for step, epochs in ((1, [0, 1]), (2, [1])):
        resumed = recorder(tmp_path / "resumed")
        resumed.train(resume_from_checkpoint=str(tmp_path / f"{PREFIX_CHECKPOINT_DIR}-{step}"))
        assert list(map(int, resumed.calls["epoch"])) == epochs, upgrade("A resumed epoch begins elsewhere.")
        assert resumed.calls["micro-batch"] == first.calls["micro-batch"][3 * step :], upgrade(
            "A resumed run takes other rows."
        )


# ---- what the names mean: checkpoints ----


@pytest.mark.slow
def test_the_scheduler_is_made_before_a_checkpoint_is_loaded_and_training_begins_after_both(trained, tmp_path):
    assert trained.order == [("create_scheduler", 4), "on_train_begin"], upgrade("Schedulers are made elsewhere.")
    first = recorder(tmp_path, save_strategy="steps", save_steps=2)
    first.train()
    resumed = recorder(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"{PREFIX_CHECKPOINT_DIR}-2"))
    assert resumed.order == [
        ("create_scheduler", 4),
        ("_load_optimizer_and_scheduler", f"{PREFIX_CHECKPOINT_DIR}-2"),
        "on_train_begin",
    ], upgrade("What ours makes in create_scheduler would not be there when it is loaded.")


def test_a_checkpoint_goes_where_the_output_folder_says(tmp_path):
    class Staged(Recorder):
        def _get_output_dir(self, trial):
            return str(tmp_path / "staged")

    made = recorder(tmp_path / "out", max_steps=1, save_strategy="steps", save_steps=1)
    made.__class__ = Staged
    made.train()
    folder = tmp_path / "staged" / f"{PREFIX_CHECKPOINT_DIR}-1"
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


def test_the_closing_save_writes_model_and_tokenizer(plain_trainer, tmp_path):
    plain_trainer.save_model(str(tmp_path / "model"), _internal_call=True)
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert names - {"training_args.bin"} == {name for name in names if name.endswith((".json", ".safetensors"))}


# ---- what the names mean: TRL ----


def test_a_call_is_sent_through_the_wrappers_forward():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, *args, **kwargs):
            self.calls += 1
            return self.module(*args, **kwargs)

    inner = nn.Linear(2, 2)
    wrapper = Wrapper(inner)
    given = []

    def loss(module, value):
        given.append((module, value))
        return module(torch.ones(2)).sum() + value

    result = _ForwardRedirection()(wrapper, inner, loss, inner, 7)
    assert wrapper.calls == 1
    assert given == [(inner, 7)]
    assert result == inner(torch.ones(2)).sum() + 7
    assert "forward" not in vars(inner) or inner.forward == inner.forward.__func__.__get__(inner)


def test_a_model_of_one_process_is_unwrapped_for_generation_as_it_is():
    model = tiny_model("llama", layers=1)
    with unwrap_model_for_generation(model, Accelerator(cpu=True)) as unwrapped:
        assert unwrapped is model


@pytest.mark.slow
def test_vllms_generation_returns_responses_second_and_reads_its_settings_late(monkeypatch):
    prompts = [[5, 6], [7], [8, 9, 10]]
    with serving() as server:
        connect(monkeypatch, server)
        made = VLLMGeneration(
            model=tiny_model("llama", layers=1),
            accelerator=Accelerator(cpu=True),
            processing_class=tiny_tokenizer(),
            mode="server",
            server_base_url=f"http://127.0.0.1:{server.server_port}",
            max_completion_length=8,
            logprobs=None,
            generation_kwargs={"stop_token_ids": [END_ID]},
        )
        made.sync_weights()
        made.generation_kwargs |= {"min_tokens": 8}
        _, responses, _, _ = made.generate(prompts=prompts, images=None, num_generations=1)
    assert responses == [answer(prompt) for prompt in prompts]
    (asked,) = server.asked
    assert asked["prompt"] == prompts
    assert asked["stop_token_ids"] == [END_ID]
    assert asked["min_tokens"] == 8, upgrade("The settings of generation are read when it is made.")


def test_a_sample_of_responses_is_printed_without_rewards(capsys):
    print_prompt_completions_sample(("say one", "say two"), ("uno", "due"), {}, None, 3, 1)
    printed = capsys.readouterr().out
    assert "Step 3" in printed
    assert ("uno" in printed) != ("due" in printed)  # one of the two


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


def test_metrics_put_among_sfts_are_logged_once(plain_sft):
    plain_sft.model.train()
    plain_sft._metrics["train"]["ours"] += [1.0, 3.0]
    plain_sft.log({"loss": 0.5})
    assert {"loss": 0.5, "ours": 2.0}.items() <= plain_sft.state.log_history[-1].items()
    assert not plain_sft._metrics["train"]
