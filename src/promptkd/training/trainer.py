"""`DistillTrainer`: TRL's DistillationTrainer with a trainable teacher.

One optimiser step k of K runs over a window of `gradient_accumulation_steps` micro-batches, and all means over its
response tokens, on every process:

1. responses of the whole window (rollouts.py, `_generate_and_score_completions`);
2. the teacher's adapter: gradients of all micro-batches, then one step of its own optimiser (teaching.py);
3. the student: each micro-batch against the teacher as step 2 left it (here, `_student_loss`).

tests/training/test_trl_contract.py names every hook of TRL and transformers that is used here.
"""

import contextlib
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DistillationTrainer

from promptkd.data.dataset import encode_rows, stop_ids_of
from promptkd.data.encode import EncodedData
from promptkd.data.packing import TokenBatch, right_pad
from promptkd.engine import (
    ChunkedLoss,
    check_scoring,
    disable_dropout,
    engine_for,
    head_logits,
    response_hidden,
    unwrap_peft,
)
from promptkd.errors import RequestError
from promptkd.methods import Method, Step, named_method
from promptkd.models import (
    check_same_vocabulary,
    count_parameters,
    load_tokenizer,
    resolve_model,
    shared_vocabulary_size,
)
from promptkd.objectives import forward_kl, reverse_kl
from promptkd.responses import AdaptiveReplay, TeacherMixed
from promptkd.training.config import DistillConfig, PromptKDConfig
from promptkd.training.distributed import (
    autocast,
    check_dispatched,
    check_sharding,
    is_dispatched,
    place_teacher,
    run_inside,
    run_whole,
    settle_dispatched,
)
from promptkd.training.out_of_memory import Savings
from promptkd.training.rollout import Rollouts
from promptkd.training.teacher_options import load_teacher
from promptkd.training.teacher_tuner import TeacherTuning, figure
from promptkd.training.validation import RunTrainer

__all__ = ["DistillConfig", "DistillTrainer", "PromptKDConfig", "PromptKDTrainer"]

T = TypeVar("T")
_TOKEN_SUMS = ("student_loss", "entropy", "prompt_kl", "prompt_regularizer")
_ROW_SUMS = ("response_length", "cut_share")
_TIMED = ("rollout", "prompt", "student")
_AS_THEY_ARE = ("lambda", "prompt_lag", "prompt_grad_norm", "prompt_learning_rate")  # the same on every process


class DistillTrainer(Rollouts, TeacherTuning, RunTrainer, DistillationTrainer):
    """Distils a student from a teacher by any `Method`.

    Args:
        model: the student: a hub name, folder, run folder, GGUF file or loaded model.
        teacher_model: the teacher, likewise. It is frozen.
        args: a `DistillConfig`.
        train_dataset, eval_dataset: rows in any of the three forms, or `EncodedData`.
        processing_class: the tokenizer; the student's own if None.
        method: a `Method` of one's own in place of the one that `args.method` names.
        teacher_processing_class: the teacher's tokenizer, to compare when the teacher comes as a loaded model.

    Raises:
        RequestError: for differing vocabularies, unusable rows, too few rows for one optimiser step.
    """

    _tag_names = ("promptkd", "distillation")
    _name = "PromptKD"

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        teacher_model: str | Path | PreTrainedModel,
        args: DistillConfig | None = None,
        train_dataset: Sequence[dict[str, Any]] | EncodedData | None = None,
        eval_dataset: Sequence[dict[str, Any]] | EncodedData | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        method: Method | None = None,
        teacher_processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ):
        args = args or DistillConfig("distilled")
        self.method = method or named_method(args.method, args.method_settings())
        if isinstance(model, str | Path):
            model = resolve_model(model)
            # TRL would have the student's layers dealt out over all GPUs in sight.
            args.model_init_kwargs = {"device_map": None} | (args.model_init_kwargs or {})
            processing_class = processing_class or load_tokenizer(model, trust_remote_code=args.trust_remote_code)
        if processing_class is None:
            raise RequestError("Expected the tokenizer as `processing_class` beside a loaded model. Got None.")
        if model is teacher_model:
            raise RequestError("Student and teacher are one and the same model. Load the teacher a second time.")
        teacher, teacher_tokenizer = load_teacher(teacher_model, teacher_processing_class, args, self.method)
        if teacher_tokenizer is not None:
            check_same_vocabulary(processing_class, teacher_tokenizer)

        self._check_responses(args, eval_dataset)
        train = self._encode(train_dataset, processing_class, args, need_response=self.method.responses.needs_data)
        valid = self._encode(eval_dataset, processing_class, args, need_response=True)
        self.dropped_rows = 0 if train is None else train.dropped
        # The teacher is not handed to TRL, which refuses heads that are padded to different sizes.
        super().__init__(
            model=model,
            teacher_model=None,
            args=args,
            train_dataset=None if train is None else train.examples,
            eval_dataset=None if valid is None else valid.examples,
            processing_class=processing_class,
            **kwargs,
        )
        check_sharding(
            self.accelerator,
            self.model,
            teacher,
            adapter=self.method.teacher_adapter,
            needs_generate=self._needs_generate() and not self.use_vllm,
            chunks=args.chunk_tokens != 0,
        )
        check_dispatched(teacher, self.accelerator, self.method.teacher_adapter)
        if is_dispatched(teacher):
            settle_dispatched(teacher, self.accelerator.device)
        generation_config = unwrap_peft(self.model).generation_config
        self.stop_ids = stop_ids_of(processing_class, generation_config, template=args.template)
        # TRL's rollout takes them from here; without any it would look for the id None.
        self.eos_token_ids = list(self.stop_ids)
        self.generation_config.eos_token_id = list(self.stop_ids) or None
        if self.use_vllm:  # which knows the model's own end token, and not the template's
            own = {"stop_token_ids": list(self.stop_ids)}
            self.vllm_generation.generation_kwargs = own | self.vllm_generation.generation_kwargs
        self._check_sizes(teacher)
        self.vocabulary = shared_vocabulary_size(self.model, teacher, processing_class)
        teacher.requires_grad_(False)
        self._teacher_numbers = count_parameters(teacher)  # DeepSpeed's shards do not tell
        self.adapter, teacher = self._make_adapter(teacher, processing_class)
        self.language_rows = self._language_rows(processing_class)
        self._trains_dropout = not args.disable_dropout
        if args.disable_dropout:
            disable_dropout(self.model)
        self.teacher_model = place_teacher(teacher, self.accelerator)
        self.adapter_optimizer: torch.optim.Optimizer | None = None
        self.adapter_scheduler: Any = None
        self._window: dict[str, Any] = defaultdict(float)  # sums on the device: a number would wait for it
        self._stale_hidden: dict[int, Tensor] = {}

    def _check_responses(self, args: DistillConfig, eval_dataset: Any) -> None:
        source = self.method.responses
        if isinstance(source, TeacherMixed) and (args.temperature != 1 or args.top_p < 1 or args.top_k > 0):
            raise RequestError(
                "Responses from a mixture of student and teacher are weighed as samples at temperature 1 of the whole "
                "distribution. Leave --temperature, --top_p and --top_k as they are."
            )
        if isinstance(source, AdaptiveReplay) and source.start == 0 and eval_dataset is None:
            warnings.warn(
                "Without validation rows the student's share of the responses stays at 0: give eval rows or a "
                "student_share.",
                stacklevel=3,
            )

    @staticmethod
    def _encode(
        rows: Sequence[dict[str, Any]] | EncodedData | None,
        tokenizer: PreTrainedTokenizerBase,
        args: DistillConfig,
        *,
        need_response: bool,
    ) -> EncodedData | None:
        if rows is None or isinstance(rows, EncodedData):
            return rows
        return encode_rows(
            rows,
            tokenizer,
            template=args.template,
            max_prompt_length=args.max_prompt_length,
            max_response_length=args.max_completion_length or 0,
            overlong=args.overlong,
            need_response=need_response,
        )

    def _check_sizes(self, teacher: PreTrainedModel) -> None:
        window = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        if self.train_dataset is not None and len(self.train_dataset) < window:
            raise RequestError(
                f"One optimiser step takes {window} rows (batch size x accumulation x processes). "
                f"Got {len(self.train_dataset)}. Lower --per_device_train_batch_size or give more rows."
            )
        longest = self.args.max_prompt_length + self.args.max_completion_length
        prompt = self.args.prompt_length if self.method.teacher_adapter == "prompt" else 0
        for name, each, extra in (("student", self.model, 0), ("teacher", teacher, prompt)):
            # an attribute, not a key: GPT-2 spells it n_positions; models without positions have none
            limit = getattr(unwrap_peft(each).config.get_text_config(), "max_position_embeddings", None)
            if limit is not None and longest + extra > limit:
                raise RequestError(
                    f"The {name} has {limit} positions. max_prompt_length + max_completion_length"
                    f"{' + prompt_length' if extra else ''} is {longest + extra}; lower one of them."
                )
            check_scoring(each)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        student = self.accelerator.unwrap_model(model)
        # The whole loss runs inside the wrapper's forward, so that DDP and FSDP see the student being used.
        loss = self._forward_redirection(model, student, self._student_loss, student, inputs)
        return (loss, None) if return_outputs else loss

    def _student_loss(self, student: nn.Module, inputs: dict[str, Any]) -> Tensor:
        items = inputs["num_items_in_batch"].clamp(min=1)
        tokens = inputs["tokens_in_batch"].clamp(min=1)
        batch = self._token_batch(inputs)
        self.phases.works_on(batch.lengths)
        index = self._step % self.args.gradient_accumulation_steps
        tunes = index == 0 and self.adapter is not None
        shares = engine_for(self.accelerator.device).shares_passes and not self._trains_dropout
        if tunes and not shares:
            with self.phases("prompt"):
                self._tune_teacher(student, None, tokens)
        with autocast(self.accelerator, self.args):  # the redirected forward goes round accelerate's own
            hidden = response_hidden(student, batch)  # (N, H)
        if tunes and shares:
            with self.phases("prompt"):
                self._tune_teacher(student, hidden.detach(), tokens)
        with autocast(self.accelerator, self.args):
            loss = self._method_loss(student, inputs, batch, hidden, self._teacher_of_student(index))
        self._window["student_loss"] += loss.total.detach().double() * (tokens / items).double()
        self._window["entropy"] += figure(loss, "entropy")
        total = loss.total / items
        if "language_ids" in inputs:
            total = total + self._language_loss(student, inputs)
        # Processes average their gradients; times their number, the sum over all of them is the mean over all tokens.
        return total * self.accelerator.num_processes

    def _method_loss(
        self,
        student: nn.Module,
        inputs: dict[str, Any],
        batch: TokenBatch,
        hidden: Tensor,
        teacher_hidden: Callable[[TokenBatch], Tensor],
    ) -> ChunkedLoss:
        return self.method.student_loss(
            Step(
                pair=self._pair(student),
                rows=inputs["rows"],
                batch=batch,
                student_hidden=hidden,
                teacher_hidden=teacher_hidden,
                hidden_of_student=lambda other: response_hidden(student, other),
            )
        )

    def _language_loss(self, student: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The micro-batch's part of the mean cross-entropy on plain text (MiniLLM's L_PT), weighted."""
        texts = inputs["language_ids"]
        batch = right_pad([ids[:1] for ids in texts], [ids[1:] for ids in texts], device=self.accelerator.device)
        with autocast(self.accelerator, self.args):
            logits = head_logits(student, response_hidden(student, batch)).float()
        loss = nn.functional.cross_entropy(logits, batch.targets, reduction="sum")
        self._window["language_loss"] += loss.detach().double()
        return self.args.language_weight * loss / inputs["language_items"].clamp(min=1)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._step % self.args.gradient_accumulation_steps == 0:
            self._log_window(int(self._buffered_inputs[0]["tokens_in_batch"]))
        return loss

    def _log_window(self, tokens: int) -> None:
        """Turn the window's sums over tokens and rows into means over all processes."""
        names = [name for name in (*_TOKEN_SUMS, *_ROW_SUMS, "rows", "processed_tokens") if name in self._window]
        own = [float(self._window[name]) for name in names]
        sums = torch.tensor(own, dtype=torch.float64, device=self.accelerator.device)
        total = dict(zip(names, self.accelerator.reduce(sums, reduction="sum").tolist(), strict=True))
        spent = self.phases.lap()
        seconds = {f"seconds_{name}": spent.get(name, 0.0) for name in _TIMED}
        figures = {name: total[name] / max(tokens, 1) for name in _TOKEN_SUMS if name in total}
        if self.method.objective in (forward_kl, reverse_kl):
            figures["student_kl"] = figures.pop("student_loss")
        figures |= {name: total[name] / total["rows"] for name in _ROW_SUMS}
        figures |= {name: self._window[name] for name in _AS_THEY_ARE if name in self._window}
        if self.adapter is not None:
            figures |= self.adapter.figures()
        figures |= self.method.responses.figures()
        if "language_loss" in self._window:
            sums = torch.tensor(float(self._window["language_loss"]), device=self.accelerator.device)
            language_items = max(int(self._buffered_inputs[0]["language_items"]), 1)
            figures["language_loss"] = float(self.accelerator.reduce(sums, reduction="sum")) / language_items
        figures["tokens_per_second"] = total["processed_tokens"] / max(sum(seconds.values()), 1e-9)
        figures |= seconds
        for name, value in figures.items():
            self._metrics["train"][name].append(value)
        self._metrics["train"].pop("step_time", None)  # TRL's, the sum of the three above
        self._window.clear()

    def merge_student(self) -> None:
        """Merge a LoRA student's weights into its own, so that it is saved as a plain model."""
        student = self.accelerator.unwrap_model(self.model)
        if not isinstance(student, PeftModel):
            raise RequestError("Only a student that was trained with LoRA (peft_config) can be merged.")
        self.model = self.model_wrapped = student.merge_and_unload()

    def on_models(self, work: Callable[[nn.Module, nn.Module | None], T]) -> T:
        def with_teacher(student: nn.Module) -> T:
            teacher = self.accelerator.unwrap_model(self.teacher_model)
            with contextlib.nullcontext() if self.adapter is None else self.adapter.switched_off():
                return run_inside(lambda: work(student, teacher), teacher)

        return run_whole(with_teacher, self.model_wrapped, self.accelerator)

    def savings(self) -> Savings:
        kind = "none" if self.adapter is None else self.method.teacher_adapter
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        return Savings(
            recompute_teacher=kind in ("prompt", "lora", "full") and not self.args.teacher_gradient_checkpointing,
            lower_teacher=kind != "full" and all(each.dtype.itemsize >= 4 for each in teacher.parameters()),
            lora_student=not isinstance(self.accelerator.unwrap_model(self.model), PeftModel),
        )

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `RunTrainer.evaluate`; the source of responses hears of the loss."""
        metrics = super().evaluate(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        self.method.responses.on_validation(metrics[f"{prefix}_loss"])
        return metrics


class PromptKDTrainer(DistillTrainer):
    """`DistillTrainer` preset to PromptKD (Kim, Jang, Yang 2024, arXiv 2402.12842)."""

    def __init__(self, model: Any, teacher_model: Any, args: PromptKDConfig | None = None, **kwargs: Any):
        super().__init__(model, teacher_model, args or PromptKDConfig("promptkd"), **kwargs)
