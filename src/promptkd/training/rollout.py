"""The first part of an optimizer step: responses to its rows, by the student, the data, or whoever the method asks."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerBase
from trl.generation.vllm_generation import VLLMGeneration
from trl.models import unwrap_model_for_generation

from promptkd.data.batch import right_pad
from promptkd.data.encode import EncodedExample, encode_texts
from promptkd.engine import evaluating, head_size, unwrap_peft
from promptkd.errors import RequestError
from promptkd.evaluation.text_metrics import distinct
from promptkd.generation import Corrected, Mixture, SamplingParams, generate, generate_corrected
from promptkd.methods import Method
from promptkd.responses import Sampler, Speculation, writes_responses
from promptkd.training.distributed import autocast, is_sharded, run_whole
from promptkd.training.sampling import needs_generate
from promptkd.training.teacher import Teacher
from promptkd.training.window import MicroBatch, StepMetrics, Window

Tokens = list[list[int]]

REPEATED = 4  # length of the n-grams whose repetition is logged


class Rollout:
    """Makes a `Window` of the rows of one optimizer step; its `metrics`: lengths, cuts and repetition."""

    def __init__(
        self,
        method: Method,
        teacher: Teacher,
        student: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: tuple[int, ...],
        args: Any,
        accelerator: Accelerator,
        metrics: StepMetrics,
    ):
        self.method, self.teacher, self.stop_ids, self.metrics = method, teacher, stop_ids, metrics
        self._args, self._accelerator, self._tokenizer = args, accelerator, tokenizer
        self.limit: int = args.max_completion_length  # most tokens of a response
        self._texts: Tokens = []
        if args.language_data is not None:
            self._texts = encode_texts(args.language_data, tokenizer, length=args.max_prompt_length + self.limit)
        masked = teacher.vocabulary.masked
        if masked and args.use_vllm and args.vllm_mode == "server":
            advice = "give --vllm_mode colocate, or leave --use_vllm out"
            raise RequestError(f"A vLLM server would sample tokens that student and teacher do not share: {advice}.")
        silent = [*masked, *range(teacher.vocabulary.size, head_size(student))]  # what a padded head adds has no text
        self._vllm = _vllm(args, accelerator, tokenizer, student, stop_ids, silent) if args.use_vllm else None
        self._is_synchronized = False  # whether vLLM has the weights of the running step
        self._generation = _generation_config(args, tokenizer, stop_ids, silent)
        kept = args.per_device_train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
        self.completions: deque[tuple[str, str]] = deque(maxlen=kept)
        """Prompts and responses of the last window on all processes, with `log_completions`."""
        self.teacher_names: tuple[str, ...] = ()  # of several teachers, whose response tokens are counted each

    def __call__(self, rows: Sequence[EncodedExample], model: nn.Module, *, step: int, total_steps: int) -> Window:
        """Responses to the rows of this process, in random micro-batches. All processes must call it together."""

        def sample(prompts: Tokens, mixed_with: Mixture | None = None) -> Tokens:
            return self._sample(prompts, model, mixed_with)

        def sample_mixed(prompts: Tokens, teacher_share: float, read: Tokens | None = None) -> Tokens:
            self._check_both_whole("Sampling from a mixture of student and teacher", "--teacher_mix 0")
            if read is None and any(row.teacher_prompt_ids is not None for row in rows):
                raise RequestError(
                    "The rows have a context for the teacher: give `sample.mixed` its prompts as a third argument, "
                    "[row.for_teacher().prompt_ids for row in rows]."
                )
            with self.teacher.without_adapter():
                return sample(prompts, Mixture(self.teacher.model, teacher_share, read))

        def speculative(prompts: Tokens, teacher_prompts: Tokens, speculation: Speculation) -> Tokens:
            self._check_both_whole("Letting the teacher correct the student's tokens", "--student_share 0")
            return self._sample_corrected(prompts, teacher_prompts, speculation, model)

        self._is_synchronized = False
        self.method.moving.before_step(step / total_steps)
        together = self._accelerator.num_processes > 1 and (self._vllm is not None or is_sharded(self._accelerator))
        sampler = Sampler(student=sample, mixed=sample_mixed, speculative=speculative, together=together)
        progress = step / total_steps
        answered = self.method.responses.answered(rows, sampler, progress)
        taken, responses = [row for row, _ in answered], [response for _, response in answered]
        self._count(taken, responses)
        return self._cut(taken, responses, progress)

    def write_to_the_limit(self) -> None:
        """Let every response that a model writes have `limit` tokens, as a trial of the cost needs."""
        self.stop_ids = ()
        self._generation.min_new_tokens = self.limit
        if self._vllm is not None:
            self._vllm.generation_kwargs |= {"min_tokens": self.limit}

    def _count(self, rows: Sequence[EncodedExample], responses: Tokens) -> None:
        metrics = self.metrics
        lengths = [len(each) for each in responses]
        ended = [bool(each) and each[-1] in self.stop_ids for each in responses]
        cut = [length >= self.limit and not end for length, end in zip(lengths, ended, strict=True)]
        metrics.rows += len(rows)
        metrics.processed_tokens += sum(lengths) + sum(len(row.prompt_ids) for row in rows)
        metrics.add("response_length", sum(lengths), per="row")
        metrics.add("cut_share", sum(cut), per="row")
        metrics.add("replaced_share", 0.0, per="corrected")  # of all processes alike, whichever had rows to correct
        written = responses if writes_responses(self.method.responses) else []
        metrics.written += len(written)
        metrics.add("repetition", sum(1 - distinct(each, REPEATED) for each in written), per="written")
        if self._args.log_completions:
            texts = self._tokenizer.batch_decode(responses, skip_special_tokens=True)
            self.completions.extend(gather_object([(row.prompt, text) for row, text in zip(rows, texts, strict=True)]))

    def _cut(self, rows: Sequence[EncodedExample], responses: Tokens, progress: float) -> Window:
        """The window: its counts over all processes, and its micro-batches, shuffled."""
        device = self._accelerator.device
        drawn = torch.randint(len(self._texts), (len(rows),)).tolist() if self._texts else []
        texts = [self._texts[index] for index in drawn]
        own = [sum(map(len, responses)), len(rows), sum(len(ids) - 1 for ids in texts)]
        lengths = [(row.teacher, len(ids)) for row, ids in zip(rows, responses, strict=True)]
        own += [sum(length for teacher, length in lengths if teacher == name) for name in self.teacher_names]
        counts: Tensor = self._accelerator.reduce(torch.tensor(own, device=device), reduction="sum")
        tokens, all_rows, text_tokens, *_ = counts.unbind()
        of_each: dict[str, Tensor] = {}
        if self.teacher_names:  # one process knows the sums without a look at the device
            sums = torch.tensor(own) if self._accelerator.num_processes == 1 else counts.cpu()
            of_each = dict(zip(self.teacher_names, sums[-len(self.teacher_names) :], strict=True))
        order = torch.randperm(len(rows)).tolist()
        size = len(rows) // self._args.gradient_accumulation_steps
        micro_batches = []
        for index in range(self._args.gradient_accumulation_steps):
            chosen = order[index * size : (index + 1) * size]
            own_rows, own_texts = [rows[each] for each in chosen], [texts[each] for each in chosen if texts]
            batch = right_pad([row.prompt_ids for row in own_rows], [responses[each] for each in chosen], device=device)
            micro_batches.append(MicroBatch(index, own_rows, batch, own_texts))
        items = all_rows if self.method.per_row else tokens
        return Window(micro_batches, items, tokens, text_tokens, progress, tokens_by_teacher=of_each)

    def _sample(self, prompts: Tokens, model: nn.Module, mixed_with: Mixture | None) -> Tokens:
        if self._vllm is not None:
            return self._sample_by_vllm(prompts)
        if needs_generate(self._args):
            return self._sample_by_transformers(prompts, model)
        params = self._sampling_params()

        def sampled(student: nn.Module) -> Tokens:
            seeds, rows = torch.randint(2**62, (len(prompts),)).tolist(), self._args.generation_batch_size
            with autocast(self._accelerator, self._args):
                return generate(student, prompts, params, seeds=seeds, batch_size=rows, mixed_with=mixed_with)

        return run_whole(sampled, model, self._accelerator)

    def _sample_corrected(
        self, prompts: Tokens, teacher_prompts: Tokens, speculation: Speculation, model: nn.Module
    ) -> Tokens:
        """By the student, corrected by the plain teacher; how many tokens are the teacher's is counted."""
        params, rows, teacher = self._sampling_params(), self._args.generation_batch_size, self.teacher.model
        read: dict[str, Any] = {"teacher_prompts": teacher_prompts, "batch_size": rows}

        def sampled(student: nn.Module) -> list[Corrected]:
            seeds = torch.randint(2**62, (len(prompts),)).tolist()
            with autocast(self._accelerator, self._args), self.teacher.without_adapter():
                return generate_corrected(student, teacher, prompts, params, speculation, seeds=seeds, **read)

        corrected = run_whole(sampled, model, self._accelerator)
        self.metrics.corrected += sum(len(each.token_ids) for each in corrected)
        self.metrics.add("replaced_share", sum(each.replaced for each in corrected), per="corrected")
        return [each.token_ids for each in corrected]

    def _sampling_params(self) -> SamplingParams:
        args, vocabulary = self._args, self.teacher.vocabulary
        sampling = args.temperature, args.top_p, args.top_k
        return SamplingParams(*sampling, self.limit, self.stop_ids, vocabulary.size, vocabulary.masked)

    def _sample_by_vllm(self, prompts: Tokens) -> Tokens:
        """TRL deals vLLM's answers out evenly, so all processes ask equally often: the first prompt fills up."""
        assert self._vllm is not None
        if not self._is_synchronized:
            self._vllm.sync_weights()
            self._is_synchronized = True
        count = torch.tensor([len(prompts)], device=self._accelerator.device)
        missing = int(self._accelerator.gather(count).max()) - len(prompts)
        padded = prompts + prompts[:1] * missing
        _, responses, _, _ = self._vllm.generate(prompts=padded, images=None, num_generations=1)
        size, most = self.teacher.vocabulary.size, max((max(each, default=0) for each in responses), default=0)
        if most >= size:  # by a server, which TRL tells no bias
            raise RequestError(
                f"vLLM sampled token {most:,}, of the head's padding: the tokenizer has {size:,}. Give --vllm_mode "
                "colocate, which never does, or cut the student's head by resize_token_embeddings."
            )
        return responses[: len(prompts)]

    def _sample_by_transformers(self, prompts: Tokens, model: nn.Module) -> Tokens:
        """By transformers' `generate`, for the settings that only it knows."""
        rows: Tokens = []
        size = self._args.generation_batch_size
        with unwrap_model_for_generation(model, self._accelerator) as student, torch.no_grad(), _as_sampled(student):
            for start in range(0, len(prompts), size):
                held = [torch.tensor(ids) for ids in prompts[start : start + size]]
                ids, mask = (
                    pad_sequence(each, batch_first=True, padding_side="left").to(self._accelerator.device)
                    for each in (held, [torch.ones_like(ids) for ids in held])
                )
                written = student.generate(input_ids=ids, attention_mask=mask, generation_config=self._generation)
                rows += written[:, ids.shape[1] :].tolist()
        return [row[: next((n + 1 for n, token in enumerate(row) if token in self.stop_ids), len(row))] for row in rows]

    def _check_both_whole(self, doing: str, other: str) -> None:
        if self.teacher_names:
            raise RequestError(f"{doing} is done with one teacher only: give one --teacher, or set {other}.")
        if self._vllm is not None or needs_generate(self._args) or is_sharded(self._accelerator):
            raise RequestError(
                f"{doing} needs both models whole in one process: leave vLLM, FSDP, DeepSpeed ZeRO-3 and "
                f"generation_kwargs out, or set {other}."
            )


@contextmanager
def _as_sampled(student: nn.Module) -> Iterator[None]:
    """Without dropout, and without what the model's folder asks of `generate` beyond the settings of the run."""
    model = unwrap_peft(student)
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        with evaluating(student):
            yield
    finally:
        model.generation_config = own


def _generation_config(
    args: Any, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], masked: Sequence[int]
) -> GenerationConfig:
    settings = {"max_new_tokens": args.max_completion_length, "do_sample": True, "eos_token_id": list(stop_ids) or None}
    settings |= {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    settings |= {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k, "min_p": args.min_p}
    settings |= {"repetition_penalty": args.repetition_penalty, "cache_implementation": args.cache_implementation}
    settings |= {"suppress_tokens": list(masked)} if masked else {}
    return GenerationConfig(**settings | (args.generation_kwargs or {}), disable_compile=True)


def _vllm(
    args: Any,
    accelerator: Accelerator,
    tokenizer: PreTrainedTokenizerBase,
    student: nn.Module,
    stop_ids: Sequence[int],
    masked: Sequence[int],
) -> VLLMGeneration:
    """TRL's link to vLLM, in this process or a server. It knows the model's own end token, and not the template's."""
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
    ends: dict[str, Any] = {"stop_token_ids": list(stop_ids)}
    if masked:
        ends["logit_bias"] = dict.fromkeys(masked, -100.0)  # the most that vLLM takes: a factor of 1e-44
    return VLLMGeneration(
        model=student,
        accelerator=accelerator,
        processing_class=tokenizer,
        max_num_seqs=rows * args.vllm_tensor_parallel_size,
        mode=args.vllm_mode,
        structured_outputs_regex=args.vllm_structured_outputs_regex,
        server_base_url=args.vllm_server_base_url,
        server_host=args.vllm_server_host,
        server_port=args.vllm_server_port,
        group_port=args.vllm_group_port,
        server_timeout=args.vllm_server_timeout,
        tensor_parallel_size=args.vllm_tensor_parallel_size,
        gpu_memory_utilization=args.vllm_gpu_memory_utilization,
        max_model_length=args.vllm_max_model_length,
        enable_sleep_mode=args.vllm_enable_sleep_mode,
        model_impl=args.vllm_model_impl,
        trust_remote_code=args.trust_remote_code,
        repetition_penalty=args.repetition_penalty,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        max_completion_length=args.max_completion_length,
        logprobs=None,
        generation_kwargs=ends | (args.generation_kwargs or {}),
    )
