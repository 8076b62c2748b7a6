"""The first third of an optimiser step: rows in an order of their own, and responses for the whole window."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedTokenizerBase
from trl.trainer.utils import RepeatSampler

from promptkd.data.encode import EncodedExample
from promptkd.data.packing import TokenBatch, right_pad
from promptkd.data.texts import encode_texts
from promptkd.errors import RequestError
from promptkd.generation import SamplingParams, generate
from promptkd.responses import Sampler
from promptkd.training.distributed import autocast, is_sharded, run_whole
from promptkd.training.phases import Phases
from promptkd.training.row_order import epoch_seed

if TYPE_CHECKING:
    from trl import DistillationTrainer as _Trainer  # what this class is mixed into
else:
    _Trainer = object

__all__ = ["Rollouts"]


class Rollouts(_Trainer):
    """The part of `DistillTrainer` that finds responses."""

    args: Any
    accelerator: Any
    state: Any
    method: Any
    stop_ids: tuple[int, ...]
    vocabulary: int
    language_rows: list[list[int]]
    _window: dict[str, Any]
    phases: Phases

    def _get_train_sampler(self, dataset: Any = None) -> RepeatSampler:
        rows = self.train_dataset if dataset is None else dataset
        window = self.args.per_device_train_batch_size * self.accelerator.num_processes
        window *= self.args.gradient_accumulation_steps

        def epoch() -> int:
            return self.state.global_step // (len(rows) // window)

        return _EpochSampler(
            rows,
            mini_repeat_count=1,
            batch_size=window,
            repeat_count=self.args.gradient_accumulation_steps,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
            epoch=epoch,
        )

    def _generate_and_score_completions(self, inputs: list[EncodedExample]) -> dict[str, Any]:
        together = self.accelerator.num_processes > 1 and (self.use_vllm or is_sharded(self.accelerator))
        sampler = Sampler(student=self._sample, mixed=self._sample_mixed, together=together)
        with self.phases("rollout"):
            self.phases.works_on([len(row.prompt_ids) + self.max_completion_length for row in inputs])
            responses = self.method.responses(inputs, sampler, self.state.global_step / self.state.max_steps)
        tokens = torch.tensor([len(each) for each in responses], device=self.accelerator.device)
        ended = [bool(each) and each[-1] in self.stop_ids for each in responses]
        self._window["rows"] += len(responses)
        self._window["response_length"] += int(tokens.sum())
        self._window["cut_share"] += sum(
            len(each) >= self.max_completion_length and not end for each, end in zip(responses, ended, strict=True)
        )
        self._window["processed_tokens"] += int(tokens.sum()) + sum(len(row.prompt_ids) for row in inputs)
        self._log_completions(inputs, responses)
        total = self.accelerator.gather(tokens.sum()).sum()
        rows = self.accelerator.gather(tokens.new_tensor(len(inputs))).sum()
        batch = {
            "row": torch.tensor([row.row for row in inputs]),
            "rows": inputs,
            "response_ids": responses,
            "num_items_in_batch": rows if self.method.per_row else total,  # what the student's loss is a mean over
            "tokens_in_batch": total,
        }
        return batch | self._language_batch(len(inputs))

    def _sample(self, prompts: list[list[int]], mixed_with: tuple[nn.Module, float] | None = None) -> list[list[int]]:
        if self.use_vllm:
            return self._generate_single_turn(self._as_many_everywhere(prompts), None, {})[: len(prompts)]
        if self._needs_generate():
            return self._generate_single_turn(prompts, None, {})

        params = SamplingParams(
            max_new_tokens=self.max_completion_length,
            stop_ids=self.stop_ids,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            vocabulary=self.vocabulary,
        )

        def sampled(student: nn.Module) -> list[list[int]]:
            with autocast(self.accelerator, self.args):
                return generate(
                    student,
                    prompts,
                    params,
                    seeds=torch.randint(2**62, (len(prompts),)).tolist(),
                    batch_size=self.args.generation_batch_size,
                    mixed_with=mixed_with,
                )

        return run_whole(sampled, self.model_wrapped, self.accelerator)

    def write_to_the_limit(self) -> None:
        """Let every response that a model writes have `max_completion_length` tokens, as a trial of the cost needs."""
        limit = self.max_completion_length
        self.stop_ids = ()  # `generate` then stops at the limit alone
        self.generation_config.min_new_tokens = limit  # of transformers' `generate`
        if self.use_vllm:
            self.vllm_generation.generation_kwargs |= {"min_tokens": limit}

    def _as_many_everywhere(self, prompts: list[list[int]]) -> list[list[int]]:
        """`prompts`, and the first one again until all processes have as many: TRL deals vLLM's answers out evenly."""
        count = torch.tensor([len(prompts)], device=self.accelerator.device)
        return prompts + prompts[:1] * (int(self.accelerator.gather(count).max()) - len(prompts))

    def _log_completions(self, rows: list[EncodedExample], responses: list[list[int]]) -> None:
        if self.log_completions:
            self._logs["prompt"].extend(gather_object([row.prompt for row in rows]))
            texts = self.processing_class.batch_decode(responses, skip_special_tokens=True)
            self._logs["completion"].extend(gather_object(texts))

    def _sample_mixed(self, prompts: list[list[int]], teacher_share: float) -> list[list[int]]:
        if self.use_vllm or self._needs_generate() or is_sharded(self.accelerator):
            raise RequestError(
                "Sampling from a mixture of student and teacher needs both models whole in one process: leave vLLM, "
                "FSDP, DeepSpeed ZeRO-3 and generation_kwargs out, or set --teacher_mix 0."
            )
        return self._sample(prompts, (self.accelerator.unwrap_model(self.teacher_model), teacher_share))

    def _needs_generate(self) -> bool:
        """Whether sampling is asked for as only transformers' `generate` (or vLLM) does it."""
        return self.args.min_p is not None or self.repetition_penalty != 1.0 or bool(self.args.generation_kwargs)

    def rows_of_micro_batch(self, index: int, inputs: Any) -> list[int]:
        return self._buffered_inputs[index]["row"].tolist()

    def _token_batch(self, inputs: dict[str, Any]) -> TokenBatch:
        prompts = [row.prompt_ids for row in inputs["rows"]]
        return right_pad(prompts, inputs["response_ids"], device=self.accelerator.device)

    def _language_rows(self, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        if self.args.language_data is None:
            return []
        length = self.args.max_prompt_length + self.args.max_completion_length
        return encode_texts(self.args.language_data, tokenizer, length=length)

    def _language_batch(self, rows: int) -> dict[str, Any]:
        """A piece of plain text for each row, and how many tokens are predicted on all processes."""
        if not self.language_rows:
            return {}
        chosen = [self.language_rows[index] for index in torch.randint(len(self.language_rows), (rows,)).tolist()]
        tokens = torch.tensor(sum(len(ids) - 1 for ids in chosen), device=self.accelerator.device)
        return {"language_ids": chosen, "language_items": self.accelerator.gather(tokens).sum()}


class _EpochSampler(RepeatSampler):
    """TRL's sampler with an order of its own in each epoch, the same whether the run was resumed or not."""

    def __init__(self, *args: Any, epoch: Callable[[], int], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed(epoch_seed(self.seed, self._epoch()))
        return super().__iter__()
