"""Part 5: peak memory of a run with default flags: a 7B teacher, a 1.5B student, 8 rows of 256 + 256 tokens."""

import tempfile

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.shapes import qwen, random_rows, vocabulary_of, words
from promptkd import PromptKDConfig, PromptKDTrainer
from promptkd.data.encode import EncodedData
from promptkd.training.callbacks import quiet

__all__ = ["run"]

_STEPS = 2
_ROWS = 8
_TOKENS = 256
"""Tokens of a prompt and of a response: the default limits."""


def run(bench: Bench) -> None:
    """Two steps, the second with the optimizer states in memory; responses run to the limit, or nearly so."""
    student = qwen("1.5B", bench, torch.float32)
    teacher = qwen("7B", bench, torch.bfloat16 if bench.on_cuda else torch.float32)
    numbers = [sum(each.numel() for each in model.parameters()) for model in (student, teacher)]
    bench.report("parameters", {"student": numbers[0], "teacher": numbers[1]})
    limit = 12 if bench.tiny else _TOKENS
    rows = random_rows([limit] * _ROWS * _STEPS, [0] * _ROWS * _STEPS, vocabulary_of(bench))
    with tempfile.TemporaryDirectory() as folder:
        tiny = {"max_prompt_length": limit, "max_completion_length": limit} if bench.tiny else {}
        trainer = PromptKDTrainer(
            student,
            teacher,
            # the other settings are those of the command line
            PromptKDConfig(
                folder,
                per_device_train_batch_size=_ROWS,
                max_steps=_STEPS,
                use_cpu=not bench.on_cuda,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                **tiny,
            ),
            train_dataset=EncodedData(rows, 0),
            processing_class=words(vocabulary_of(bench)),
        )
        quiet(trainer)
        trainer.train()
    steps = [entry for entry in trainer.state.log_history if "student_kl" in entry]
    bench.report("mean response", [entry["response_length"] for entry in steps], "tokens")
    bench.check(
        "losses are finite", all(torch.tensor(each["student_kl"]).isfinite() for each in steps), f"{len(steps)} steps"
    )
    parts = ("rollout", "prompt", "student")
    bench.report("seconds of the second step", {part: steps[-1][f"seconds_{part}"] for part in parts})
    if not bench.on_cuda:
        bench.skip("peak memory")
        return
    peaks = {phase: peak / 1e9 for phase, peak in trainer.phases.peaks.items()}
    bench.report("peak by phase", peaks, "GB")
    bench.report("peak", trainer.phases.peak / 1e9, "GB allocated")
    bench.report("reserved by torch's allocator", torch.cuda.max_memory_reserved(bench.device) / 1e9, "GB")
    bench.measured("memory", trainer.phases.peak / 1e9)
