"""Settings of a training run: TRL's and transformers' own, ours, and those of the methods and of their adapters."""

from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments
from trl import DistillationConfig

from promptkd.data.teacher_prompt import TeacherPrompts, context_text
from promptkd.engine import engine_for
from promptkd.engine.devices import has_mps, training_device
from promptkd.engine.units import has_bfloat16_units
from promptkd.errors import RequestError, check_all
from promptkd.io.python_file import names_python, python_file
from promptkd.io.redact import without_secret_values
from promptkd.methods import Method, read_method, settings_classes
from promptkd.methods.method_file import method_of_file
from promptkd.models.adapters import ADAPTERS, PromptLossSettings
from promptkd.precision import WeightPrecision
from promptkd.results import file_sha256
from promptkd.settings import Reader, Settings, flat, limit_checks, no_effect, option
from promptkd.training.sampling import check_sampling, needs_generate
from promptkd.training.schedules import adapter_schedules
from promptkd.training.trackers import tracker_checks

_Arguments: Any = object  # for the type checker, which does not see the class that comes next


@dataclass
class BaseConfig(_Arguments):
    """Fields before those of a TRL configuration, the next base. Raises `RequestError` with all that is wrong."""

    max_steps: int = -1
    """Optimizer steps; -1 leaves it to num_train_epochs."""
    num_train_epochs: float = 3.0
    """Passes over the data."""
    learning_rate: float = option(5e-5, at_least=0)
    """Peak learning rate."""
    per_device_train_batch_size: int = option(8, at_least=1)
    """Rows per micro-batch."""
    per_device_eval_batch_size: int = option(8, at_least=1)
    """Rows per batch of validation."""
    gradient_accumulation_steps: int = option(1, at_least=1)
    """Micro-batches per optimizer step."""
    max_prompt_length: int = option(256, at_least=1)
    """Most tokens of a prompt, template included; see --overlong."""
    max_completion_length: int = option(256, at_least=1)
    """Most tokens of a response, its end token included."""
    template: str = "auto"
    """auto (what the student was trained on, else its chat template, else alpaca), alpaca, chat, teacher (distill: the
    teacher's, which the student keeps), or a Jinja text with {{ instruction }} and {{ input }}."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the chat template, such as {"enable_thinking": false}; a row's own column wins."""
    columns: dict[str, str] | list[str] | None = None
    """Columns to read under other names, as OLD=NEW, such as problem=instruction solution=output."""
    turns: Literal["last", "all"] = "last"
    """Assistant turns of a conversation to train on: the last one, or each with the conversation up to it."""
    overlong: Literal["drop", "error"] = "drop"
    """Rows over a length limit: drop (and count), or error."""
    eval_strategy: Literal["no", "steps", "epoch"] = "no"
    """When to validate. The command line takes epoch, where --eval-data is given."""
    eval_steps: float | None = None
    """Optimizer steps between validations."""
    eval_temperature: float = option(1.0, at_least=0)
    """Temperature of validation's responses; 0 decodes greedily."""
    eval_seed: int = option(10, at_least=0)
    """Seed of validation's sampled responses."""
    rouge_tokenizer: Literal["words", "unicode", "characters", "model"] = "words"
    """Tokens that ROUGE compares: words (a-z and digits, stemmed, as in the papers), unicode (words of any script),
    characters, or those of the model. Scripts other than Latin need one of the last three."""
    generation_batch_size: int | None = option(None, at_least=1)
    """Rows that are decoded at a time: by default 32 on CPU, 128 on a GPU."""
    bf16: bool | None = None
    """Compute in bfloat16; by default where the device has units for it. Trained weights stay float32."""
    seed: int = option(42, at_least=0, at_most=2**32 - 1)  # NumPy's limit
    """Seed of everything random."""
    on_nan: Literal["stop", "skip"] = "stop"
    """At a NaN or infinite loss or gradient, before the student's update: stop, or skip the step and count it."""
    report_to: str | list[str] | None = "none"
    """Trackers for live curves, such as tensorboard (logs in OUT/tensorboard) or wandb."""
    logging_steps: float = 1
    """Optimizer steps between two logged lines."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward: less memory, more time."""
    ddp_find_unused_parameters: bool | None = False
    """DDP: look for parameters that a step does not reach, as those of experts; costs time."""
    logging_nan_inf_filter: bool = False
    """Unused: nothing that is NaN or infinite is hidden from the log; see --on_nan."""

    def __post_init__(self) -> None:
        self._choose_precision()
        super().__post_init__()
        self.hub_token = None  # nothing is uploaded, so nothing needs it, and what is not held is not written down
        if self.generation_batch_size is None:
            self.generation_batch_size = engine_for(self.device).decode_rows
        use_one_gpu(self)
        check_all("Wrong settings", [*limit_checks(self), *self.checks()])

    def _choose_precision(self: Any) -> None:
        """`bf16`, before transformers looks at it: it takes bf16 on a CPU only with `use_cpu`, even without a GPU."""
        asks_for_cpu = self.use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU")
        device = torch.device("cpu") if asks_for_cpu else training_device()
        self.leaves_mps = has_mps() and not asks_for_cpu
        if self.bf16 is None:
            self.bf16 = not self.fp16 and has_bfloat16_units(device)
        if device.type == "cpu" and (self.bf16 or self.leaves_mps):
            self.use_cpu = True

    def to_dict(self) -> dict[str, Any]:
        """As transformers', which trackers and logs are given, without secrets at any depth."""
        return without_secret_values(super().to_dict())

    def checks(self) -> list[tuple[bool, str]]:
        """For `check_all`: what may be wrong beyond the limits of single fields."""
        declared = {each.name: each.default for each in fields(TrainingArguments)}
        hub = [name for name in declared if name.startswith(("push_to_hub", "hub_"))]
        pushed = [name for name in hub if vars(self)[name] != declared[name]]
        return [
            *tracker_checks(self.report_to),
            (
                bool(pushed),
                f"{', '.join(pushed)} would upload whatever a checkpoint holds; leave out what begins with hub_ and "
                "push_to_hub, and upload the finished student by `promptkd publish RUN OWNER/NAME`",
            ),
            (
                self.torch_compile,
                "torch_compile is not supported, since a compiled model cannot be run in parts as training and "
                "validation do; leave it, its backend and its mode out",
            ),
            (
                self.auto_find_batch_size,
                "auto_find_batch_size would change how many rows an optimizer step takes; lower "
                "per_device_train_batch_size, and raise gradient_accumulation_steps as much",
            ),
            (
                self.full_determinism and self.device.type == "cuda",
                "full_determinism would stop the first sampled response, since CUDA sums cumulatively in no fixed "
                "order; leave it out (--seed repeats a run up to rounding), or give --use_cpu",
            ),
            (
                self.logging_nan_inf_filter,
                "logging_nan_inf_filter would hide a loss that is NaN or infinite; see on_nan",
            ),
        ]


def use_one_gpu(args: Any) -> None:
    """Without a launcher, leave all GPUs but one alone: transformers would copy the student to each at every step."""
    args._n_gpu = min(args.n_gpu, 1)


@dataclass(frozen=True, kw_only=True)
class TunerSettings(Settings):
    """How the teacher's adapter is trained, whatever the adapter is."""

    prompt_learning_rate: float = option(1e-3, at_least=0)
    """Learning rate of the soft prompt."""
    prompt_warmup_steps: int = option(0, at_least=0)
    """Steps of the prompt over which its learning rate rises."""
    prompt_lr_scheduler_type: str = "constant_with_warmup"
    """Schedule of the prompt's learning rate."""
    prompt_weight_decay: float = option(0.0, at_least=0)
    """Weight decay of the soft prompt."""
    prompt_max_grad_norm: float = option(1.0, at_least=0)
    """Gradient norm at which the prompt's gradient is clipped; 0 never clips."""
    prompt_every: int = option(1, at_least=1)
    """N: train the prompt in the first of every N optimizer steps alone. In the others the student learns from the
    teacher with the prompt as it stands, which above 1 is not PromptKD as published."""
    prompt_refresh: Literal["fresh", "stale"] = "fresh"
    """stale: the student learns from the prompted pass of before the prompt's update, which saves a pass of the teacher
    and is not PromptKD as published."""
    teacher_gradient_checkpointing: bool = False
    """Recompute the teacher's activations in the prompt's backward: less memory, more time."""


_FlatSettings: Any = flat("_FlatSettings", (*settings_classes(), PromptLossSettings, TunerSettings))


_INSTEAD = {  # of TRL
    "teacher_model_name_or_path": "give the teacher as teacher_model of the trainer, --teacher on the command line",
    "ds3_gather_for_generation": "under ZeRO-3 the student is always gathered whole to decode; leave it out",
    "max_tool_calling_iterations": "responses are sampled without calling tools; leave it out",
    "label_smoothing_factor": "the loss is the method's own; leave it out",
    "train_sampling_strategy": "rows are drawn in a random order, and run without padding; leave it out",
}


@dataclass
class DistillConfig(_FlatSettings, BaseConfig, DistillationConfig):
    """Arguments of `DistillTrainer`. Every field of `trl.DistillationConfig` is one too.

    Defaults that differ from TRL's: learning_rate 5e-5 (the authors' for GPT-2), max_completion_length 256,
    disable_dropout (one distribution in the rollout, the prompt step and the student step), logging_steps 1, no
    gradient checkpointing, and bf16 only where the device has units for it.
    """

    method: str = "promptkd"
    """Name of the method (--help lists them), or FILE.py:NAME, a method of your own."""
    method_settings: dict[str, Any] | None = None
    """Settings of a method of your own, by name."""
    method_sha256: str | None = None
    """SHA-256 of the file of a method of your own, which a run records; another file is refused."""
    end_token: Literal["teacher", "student"] = "teacher"
    """Where the teacher does not end as the rows do: rows end with its end token, or keep the student's."""
    teacher_prompt: str | None = None
    """What only the teacher reads before each request: a text, or a file that holds it, with the row's fields as Jinja
    ({{ reference }}). A row's column teacher_prompt takes its place. See docs/context-teachers.md."""
    max_teacher_prompt_length: int = option(1024, at_least=1)
    """Most tokens of the teacher's prompt with its context; see --overlong."""
    language_data: str | None = None
    """Plain-text rows ({"text": ...}) for an extra language-modeling loss."""
    language_weight: float = option(1.0, at_least=0)
    """Weight of the language-modeling loss."""
    chunk_tokens: int | None = option(None, at_least=0)
    """Tokens whose logits are held at a time: by default 256 on CPU, 2,048 on a GPU; 0 holds all."""
    teacher_dtype: WeightPrecision | None = None
    """Precision of the teacher's weights; by default bfloat16 where the device has units for it, else float32; auto is
    that of its files."""
    kept_logits: str | None = None
    """Folder of kept teacher logits (promptkd generate --keep-logits), from which the student learns without a teacher.
    """
    teachers_resident: Literal["all", "one"] = "all"
    """Several teachers: all stay on the device, or one at a time; the others wait in host memory (on CPU, in files of
    the cache)."""
    teacher_ema_decay: float = option(0.99, at_least=0, at_most=1)
    """Teacher ema, the student's moving average: its share of itself after each optimizer step. 0 is the student as it
    stands, 1 its start."""
    teacher_quantization: Literal["8bit", "4bit"] | None = None
    """Quantize the teacher by bitsandbytes."""
    learning_rate: float = option(5e-5, at_least=0)
    """Peak learning rate of the student."""
    temperature: float = option(1.0, above=0)
    """Temperature of the sampled responses."""
    disable_dropout: bool = True
    """Train the student without dropout."""
    save_only_model: bool = False
    """Leave optimizer, prompt and random states out of checkpoints (no resuming)."""

    def __post_init__(self) -> None:
        if self.teacher_prompt is not None:
            self.teacher_prompt, _ = context_text(self.teacher_prompt)
            TeacherPrompts(self.teacher_prompt)  # which refuses what is no template
        super().__post_init__()

    @property
    def algorithm(self) -> str:
        """What records call it: the method's name, and how far the run is from that method."""
        name = self.method.rpartition(":")[2] if names_python(self.method) else self.method
        every = "" if self.prompt_every == 1 else f", prompt every {self.prompt_every} steps"
        return f"{name}{'' if self.prompt_refresh == 'fresh' else ', stale prompt'}{every}"

    def checks(self) -> list[tuple[bool, str]]:
        """See `BaseConfig.checks`."""
        schedule, known = self.prompt_lr_scheduler_type, adapter_schedules()
        wanted = f"prompt_lr_scheduler_type must be one of {', '.join(known)}, got {schedule}"
        of_vllm = [each.name for each in fields(DistillationConfig) if each.name.startswith("vllm_")]
        unread = dict.fromkeys([] if self.use_vllm else of_vllm, "it is read with use_vllm alone")
        return [
            *super().checks(),
            (schedule not in known, wanted),
            (bool(self.pad_to_multiple_of), "pad_to_multiple_of has no effect here: rows are not padded for rollouts"),
            *no_effect(self, DistillationConfig, _INSTEAD | unread),
            (
                self.cache_implementation is not None and (self.use_vllm or not needs_generate(self)),
                "cache_implementation is of transformers' generate, which decodes only with min_p, repetition_penalty "
                "or generation_kwargs; leave it out",
            ),
            (self.fp16, "fp16 would need a loss scale for the soft prompt's gradient; use bf16 or float32"),
            (
                bool(self.accelerator_config.split_batches or self.accelerator_config.dispatch_batches),
                "split_batches and dispatch_batches of accelerator_config would leave rows out; leave them out",
            ),
        ]


@dataclass
class PromptKDConfig(DistillConfig):
    """`DistillConfig`, whose default method is PromptKD."""


def chosen_method(args: Any, given: Method | None = None, *, resumes: bool = False) -> Method:
    """The method that `args.method` names, or the one `given`, with its adapter's settings.

    Raises `RequestError` if a setting differs from its default and nothing reads it, and for a way of sampling that the
    method cannot weigh.
    """
    take = Reader(args)
    is_own = given is None and names_python(args.method)
    if args.method_settings and not names_python(args.method):
        raise RequestError("method_settings are those of a method of your own, --method FILE.py:NAME. Leave them out.")
    if is_own:
        method = _method_of_file(args, take)
    else:
        method = read_method(args.method, take) if given is None else given.with_settings(take)
    name = args.method if given is None else "The given method"
    adapter = method.adapter_class
    if adapter is not None:
        take(TunerSettings)
        if adapter.has_regularizer:
            take(PromptLossSettings)
    take.refuse_unread(name, (factory for factory in ADAPTERS.values() if factory is not None))
    without = " without a teacher adapter" if adapter is None else ""
    take.refuse_unread(name + without, (TunerSettings, PromptLossSettings))
    is_rounded = args.teacher_dtype in ("bfloat16", "float16") or args.teacher_quantization is not None
    if is_rounded and adapter is not None and adapter.copies_teacher:
        told = "a whole teacher is trained in float32 alone: leave teacher_dtype and teacher_quantization out"
        raise RequestError(f"Wrong settings: {told}.")
    if args.teacher_prompt is not None and not method.reads_teacher:
        raise RequestError(f"{name} reads no teacher, and teacher_prompt is what a teacher reads. Leave it out.")
    check_sampling(args, method, name, resumes=resumes)
    return method


def student_revision(args: Any) -> str | None:
    """The revision of the student's repository, of which tokenizer and settings are read too."""
    return (args.model_init_kwargs or {}).get("revision")


def teacher_revision(args: Any, *, own: bool = False) -> str | None:
    """Likewise the teacher's; an `own` one is in the student's repository."""
    named = student_revision(args) if own else args.teacher_model_revision
    return (args.teacher_model_init_kwargs or {}).get("revision", named)


def _method_of_file(args: Any, take: Reader) -> Method:
    """The method in a file of the user's own. Raises `RequestError` if it is another file than the run began with."""
    defaults = {each.name: each.default for each in fields(args)}
    given = {name: value for name, value in vars(args).items() if name in defaults and value != defaults[name]}
    method = method_of_file(args.method, args.method_settings or {}, given, take)
    now = file_sha256(python_file(args.method))
    if args.method_sha256 not in (None, now):
        told = f"{python_file(args.method)} has changed since this run or its study began"
        raise RequestError(f"{told}. Put it back, or start anew with another --out.")
    method = method.with_settings(take)
    take.refuse_unread(args.method, settings_classes())
    return method
