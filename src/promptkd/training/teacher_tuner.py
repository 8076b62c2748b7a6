"""The second third of an optimiser step: the teacher's adapter, its optimiser, and what a checkpoint holds of them."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import IntervalStrategy, PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from promptkd.data.packing import TokenBatch
from promptkd.engine import ChunkedLoss, embedding_device, engine_for, evaluating, response_hidden, unwrap_peft
from promptkd.engine.recompute import recomputed_layers
from promptkd.errors import RequestError
from promptkd.methods import Pair
from promptkd.models import SoftPrompt
from promptkd.models.adapters import FullTeacher, LoraTeacher, OnlineTeacher, SoftPromptAdapter, TeacherAdapter
from promptkd.objectives import regularizer_weight
from promptkd.training.checkpoint import whole_folder
from promptkd.training.distributed import autocast, is_dispatched, is_sharded
from promptkd.training.phases import Phases
from promptkd.training.teacher_options import check_teacher_options

if TYPE_CHECKING:
    from trl import DistillationTrainer as _Trainer  # what this class is mixed into
else:
    _Trainer = object

__all__ = ["TeacherTuning", "figure"]

_METHOD_STATE = "method.pt"


class TeacherTuning(_Trainer):
    """The part of `DistillTrainer` that trains the teacher's adapter."""

    args: Any
    accelerator: Any
    state: Any
    method: Any
    teacher_model: Any
    adapter: TeacherAdapter | None
    adapter_optimizer: torch.optim.Optimizer | None
    adapter_scheduler: Any
    vocabulary: int
    _forward_redirection: Any
    _token_batch: Any
    _teacher_numbers: int
    _stale_hidden: dict[int, Tensor]
    _window: dict[str, Any]
    phases: Phases
    _before_step: tuple[dict[str, Tensor], dict[str, Any]] | None

    def _make_adapter(
        self, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[TeacherAdapter | None, nn.Module]:
        """The adapter that the method asks for, and the teacher to use with it."""
        args, kind = self.args, self.method.teacher_adapter
        check_teacher_options(args, self.method, teacher)
        if not (is_sharded(self.accelerator) or is_dispatched(teacher)):  # a sharded one goes there part by part
            teacher = teacher.to(self.accelerator.device)
        if kind == "none" or (kind == "prompt" and args.prompt_length == 0):
            return None, teacher
        if kind == "lora":
            return LoraTeacher.wrap(teacher, rank=args.adapter_rank, alpha=args.adapter_alpha, seed=args.seed)
        if kind == "full":
            return FullTeacher(teacher), teacher
        if kind == "online":
            online = OnlineTeacher(teacher, rank=args.adapter_rank, seed=args.seed)
            online.module.to(self.accelerator.device)
            return online, teacher
        prompt = SoftPrompt.create(
            teacher,
            tokenizer,
            length=args.prompt_length,
            start=args.prompt_start,
            text=args.prompt_text,
            seed=args.seed,
        )
        return SoftPromptAdapter(prompt.to(self.accelerator.device)), teacher

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.adapter is not None:
            self.adapter_optimizer = torch.optim.AdamW(
                self.adapter.parameters(),
                lr=self.args.prompt_learning_rate,
                weight_decay=self.args.prompt_weight_decay,
            )
            self.adapter_scheduler = get_scheduler(
                self.args.prompt_lr_scheduler_type,
                self.adapter_optimizer,
                num_warmup_steps=self.args.prompt_warmup_steps,
                num_training_steps=num_training_steps,
            )
        return super().create_scheduler(num_training_steps, optimizer)

    def _tune_teacher(self, student: nn.Module, first_hidden: Tensor | None, tokens: Tensor) -> None:
        """One step of the teacher's adapter on all response tokens of the window (PromptKD section 3.2).

        Args:
            first_hidden: the student's states of the window's first micro-batch, if they are known; None computes them
                without dropout, as those of the other micro-batches.
            tokens: response tokens of the window on all processes.
        """
        assert self.adapter is not None
        assert self.adapter_optimizer is not None
        online = self.method.teacher_adapter == "online"  # whose loss has no regulariser
        weight = 0.0 if online else self._regularizer_weight()
        # at λ = 0 the plain teacher only tells how far the adapted one has gone from it
        reads_plain = not online and (weight != 0 or self._logs_this_step())
        scale = self._gradient_scale(tokens)
        pair = self._pair(student)
        batches = [self._token_batch(each) for each in self._buffered_inputs]
        for index, batch in enumerate(batches):
            self.phases.works_on(batch.lengths)
            with autocast(self.accelerator, self.args), torch.no_grad():
                known = first_hidden if index == 0 else None
                target = _without_dropout(student, batch) if known is None else known
                plain = self._plain_hidden(batch) if reads_plain else None
            parts = self._parts(batch)
            counts = [part.response_tokens for part in parts]
            plains = [None] * len(parts) if plain is None else plain.split(counts)
            read = []
            for part, span, away_from in zip(parts, target.split(counts), plains, strict=True):
                with autocast(self.accelerator, self.args):
                    adapted = self._hidden_with_graph(part)
                    loss = self._adapter_loss(pair, part, adapted, span, away_from, weight)
                self._window["prompt_kl"] += figure(loss, "to_student")
                if reads_plain:
                    self._window["prompt_regularizer"] += figure(loss, "to_plain")
                self.note("prompt loss", loss.total, index)
                (loss.total * scale / tokens).backward()
                read.append(adapted.detach())
            if self.args.prompt_refresh == "stale":
                self._stale_hidden[index] = torch.cat(read)
        if not online:
            self._window["lambda"] = weight
        self._step_adapter(scale)

    def _parts(self, batch: TokenBatch) -> list[TokenBatch]:
        """A micro-batch in the pieces in which the adapted teacher reads it, each with a backward of its own.

        They bound the activations that are held. Processes that share a teacher's weights must call it equally often.
        """
        if is_sharded(self.accelerator):
            return [batch]
        teacher = unwrap_peft(self.accelerator.unwrap_model(self.teacher_model))
        return batch.parts(engine_for(embedding_device(teacher)).pass_tokens)

    def _hidden_with_graph(self, batch: TokenBatch) -> Tensor:
        if not self.args.teacher_gradient_checkpointing:
            return self._teacher_hidden(batch, adapted=True)
        assert self.adapter is not None
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        with recomputed_layers(self.adapter.adapted_model(teacher)):
            return self._teacher_hidden(batch, adapted=True)

    def _adapter_loss(
        self,
        pair: Pair,
        batch: TokenBatch,
        adapted: Tensor,
        student_hidden: Tensor,
        plain: Tensor | None,
        weight: float,
    ) -> ChunkedLoss:
        if self.method.teacher_adapter == "online":
            return pair.online_loss(adapted, batch.targets, student_hidden)
        return pair.prompt_loss(
            adapted,
            student_hidden,
            plain,
            weight=weight,
            student_direction=self.args.prompt_kl,
            plain_direction=self.args.regularizer_kl,
        )

    def _regularizer_weight(self) -> float:
        """λ of this step."""
        return regularizer_weight(
            self.state.global_step,
            self.state.max_steps,
            coefficient=self.args.regularizer_coefficient,
            schedule=self.args.regularizer_schedule,
        )

    def _logs_this_step(self) -> bool:
        """Whether transformers' Trainer will log at the end of the running step, by `logging_steps`."""
        step = self.state.global_step + 1
        if step == 1 and self.args.logging_first_step:
            return True
        return self.args.logging_strategy == IntervalStrategy.STEPS and step % self.state.logging_steps == 0

    def _gradient_scale(self, tokens: Tensor) -> Tensor | int:
        """What the prompt's gradient is multiplied by on its way: in float16 that of a sum survives, not of a mean."""
        half = unwrap_peft(self.accelerator.unwrap_model(self.teacher_model)).dtype == torch.float16
        return tokens if half else 1

    def _step_adapter(self, scale: Tensor | int) -> None:
        assert self.adapter is not None
        assert self.adapter_optimizer is not None
        parameters = self.adapter.parameters()
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad = self.accelerator.reduce(parameter.grad, reduction="sum") / scale
        limit = self.args.prompt_max_grad_norm or float("inf")
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        self.note("prompt gradient", norm)
        self._window["prompt_grad_norm"] = float(norm)
        self._window["prompt_learning_rate"] = self.adapter_scheduler.get_last_lr()[0]
        self._before_step = None  # two copies of a whole teacher would be too many
        self._before_step = copy.deepcopy((self.adapter.state_dict(), self.adapter_optimizer.state_dict()))
        if not math.isfinite(self._window["prompt_grad_norm"]):
            self.adapter_optimizer.zero_grad(set_to_none=True)  # the student's part of the step goes on without a move
        self.adapter_optimizer.step()
        self.adapter_scheduler.step()
        self.adapter_optimizer.zero_grad(set_to_none=True)

    def take_back_step(self) -> None:
        """The adapter and its optimiser as they were before this step; the schedule goes on."""
        if self.adapter is not None:
            assert self.adapter_optimizer is not None
            assert self._before_step is not None
            adapter, optimizer = self._before_step
            rates = [group["lr"] for group in self.adapter_optimizer.param_groups]
            self.adapter.load_state_dict(adapter)
            self.adapter_optimizer.load_state_dict(optimizer)
            for group, rate in zip(self.adapter_optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

    def weights_at_hand(self) -> dict[str, nn.Module]:
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        return {"student": self.model, "teacher": teacher}

    def _teacher_hidden(self, batch: TokenBatch, *, adapted: bool) -> Tensor:
        def run(teacher: nn.Module) -> Tensor:
            if self.adapter is None:
                return response_hidden(teacher, batch)
            return (self.adapter.adapted_hidden if adapted else self.adapter.plain_hidden)(teacher, batch)

        teacher = self.accelerator.unwrap_model(self.teacher_model)
        if self.teacher_model is teacher:
            return self._forward_redirection(teacher, teacher, run, teacher)
        # DeepSpeed lets nothing that its wrapper returned take part in a backward other than the wrapper's own
        hidden: list[Tensor] = []
        self._forward_redirection(self.teacher_model, teacher, lambda: hidden.append(run(teacher)))
        return hidden[0]

    def _plain_hidden(self, batch: TokenBatch) -> Tensor:
        with torch.no_grad():
            return self._teacher_hidden(batch, adapted=False)

    def _adapted_hidden(self, batch: TokenBatch) -> Tensor:
        with torch.no_grad():
            return self._teacher_hidden(batch, adapted=True)

    def _teacher_of_student(self, index: int) -> Callable[[TokenBatch], Tensor]:
        """The states that the student of micro-batch `index` learns from.

        They are the adapted teacher's, read once more since its step has moved it; with `prompt_refresh` "stale" those
        of before that step, which spares a pass and is another algorithm than PromptKD.
        """
        stale = self._stale_hidden.pop(index, None)
        if stale is None:
            return self._adapted_hidden
        self._window["prompt_lag"] = 1
        return lambda batch: stale  # `check_teacher_options` lets only methods come here that read this one batch

    def _pair(self, student: nn.Module) -> Pair:
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        adapted = None if self.adapter is None else self.adapter.adapted_model(teacher)
        return Pair(student, teacher, self.vocabulary, chunk=self.args.chunk_tokens, adapted=adapted)

    def save_method_state(self, folder: Path) -> None:
        """The adapter, its optimiser, and the source of responses of every process."""
        responses = gather_object([self.method.responses.state_dict()])
        if not self.args.should_save:
            return
        state: dict[str, Any] = {"responses": responses}
        if self.adapter is not None:
            assert self.adapter_optimizer is not None
            state["adapter"] = self.adapter.state_dict()
            state["optimizer"] = self.adapter_optimizer.state_dict()
            state["scheduler"] = self.adapter_scheduler.state_dict()
        torch.save(state, folder / _METHOD_STATE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        state = self._method_state(checkpoint)
        responses = state["responses"]  # with fewer processes than before, what the last ones kept is lost
        self.method.responses.load_state_dict(responses[self.accelerator.process_index % len(responses)])
        if self.adapter is not None:
            assert self.adapter_optimizer is not None
            self.adapter.load_state_dict(state["adapter"])
            self.adapter_optimizer.load_state_dict(state["optimizer"])
            self.adapter_scheduler.load_state_dict(state["scheduler"])

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.adapter is not None:
            self.adapter.load_state_dict(self._method_state(self.state.best_model_checkpoint)["adapter"])

    def _method_state(self, checkpoint: str) -> dict[str, Any]:
        file = Path(checkpoint) / _METHOD_STATE
        if not file.is_file():
            raise RequestError(f"Expected the method's state at {file}.")
        return torch.load(file, map_location="cpu", weights_only=True)

    def save_adapter(self, run: str | Path) -> None:
        """Write what was trained of the teacher into a folder of its own in `run`; nothing if nothing was.

        A soft prompt goes into `prompt`, as a PEFT adapter.
        """
        if self.adapter is not None and self.args.should_save:
            teacher = self.accelerator.unwrap_model(self.teacher_model)
            with whole_folder(Path(run) / self.adapter.folder, writes=True) as partial:
                self.adapter.save(partial, teacher)

    def trainable_share(self) -> tuple[int, float]:
        """Trainable numbers of the teacher, and their share of its parameters."""
        if self.adapter is None:
            return 0, 0.0
        numbers = sum(parameter.numel() for parameter in self.adapter.parameters())
        return numbers, numbers / self._teacher_numbers


def figure(loss: ChunkedLoss, name: str) -> Tensor | float:
    """A figure of a loss in float64, on its device: a number would wait for that. 0 of a loss without tokens."""
    return loss.figures[name].double() if name in loss.figures else 0.0


def _without_dropout(student: nn.Module, batch: TokenBatch) -> Tensor:
    with evaluating(student):
        return response_hidden(student, batch)
