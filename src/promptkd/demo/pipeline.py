"""The demo's stages: tune the teacher, prune it, recover the student, distill with PromptKD, measure every stage."""

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from promptkd.data import encode_examples, read_examples, stop_token_ids
from promptkd.data.batch import right_pad
from promptkd.demo.settings import TEMPLATE, DemoSettings, data_file, teacher_file
from promptkd.demo.stages import Stage, Trained, cached_stage, differences
from promptkd.evaluation.dataset_evaluation import measure_rows
from promptkd.evaluation.measure import evaluation_of
from promptkd.generation import Decoding
from promptkd.models import block_influence, load_model, load_tokenizer, model_record, most_influential, prune_layers
from promptkd.models.gguf_read import GGUF_CONVERSION
from promptkd.precision import compute_dtype, computing
from promptkd.results import DataRecord, Evaluation, Results, Series, file_sha256
from promptkd.training import DistillConfig, DistillTrainer, FinetuneConfig, FinetuneTrainer, PromptKDConfig
from promptkd.training.callbacks import MetricsFile, ProgressBar, quiet

_TUNING_ORDER = "group_by_length"  # rows of like length share a batch, so that less padding is computed
_PAIRS = (("recovered", "pruned"), ("promptkd", "recovered"), ("promptkd", "teacher"))


class Demo:
    """One run of the demo in the folder `out`. `say` gets a line for people now and then."""

    def __init__(self, settings: DemoSettings, out: Path, say: Callable[[str], None]):
        self.settings, self.out, self.say = settings, out, say
        self.dtype = compute_dtype("auto", "cpu")  # as the training stages compute
        self.tokenizer = load_tokenizer(teacher_file())
        self.rows = {
            split: encode_examples(
                read_examples(data_file(split)),
                self.tokenizer,
                TEMPLATE,
                max_prompt_length=settings.max_prompt_length,
                max_response_length=settings.max_response_length,
                overlong="error",
            )
            for split in ("train", "validation", "test")
        }
        self.stop_ids: tuple[int, ...] = ()
        self.timings: dict[str, float] = {}

    def run(self) -> Results:
        """All stages in order. Writes student, prompt, `metrics.jsonl` and `results.json`; returns the record."""
        started = time.perf_counter()
        teacher = self.tuned_teacher()
        self.stop_ids = stop_token_ids(self.tokenizer, teacher.model.generation_config, TEMPLATE)
        pruned = self.pruned_student(teacher.model)
        # with weights in the precision that is computed in
        frozen = teacher.model if self.dtype == torch.float32 else load_model(teacher.folder, dtype="bfloat16")
        evaluations = {
            "teacher": self.measure("teacher", teacher.model, None),
            "pruned": self.measure("pruned", pruned, frozen),
        }
        recovered = self.recovered_student(pruned, teacher, frozen)
        evaluations["recovered"] = self.measure("recovered", recovered.model, frozen)
        trainer, history = self.promptkd(recovered.model, frozen)
        student = trainer.accelerator.unwrap_model(trainer.model)
        evaluations["promptkd"] = self.measure("promptkd", student, frozen)
        trainer.save_student(self.out / "student")
        trainer.save_adapter(self.out)
        shutil.rmtree(self.out / "checkpoints", ignore_errors=True)  # nothing was saved there
        self.timings["total"] = time.perf_counter() - started
        results = Results(
            kind="demo",
            config=asdict(self.settings),
            models={
                "teacher": model_record(teacher.folder, teacher.model),
                "recovered": model_record(recovered.folder, recovered.model),
                "promptkd": model_record(self.out / "student", student),
            },
            data={
                split: DataRecord(
                    path=f"promptkd.demo/{split}", rows=len(rows.examples), sha256=file_sha256(data_file(split))
                )
                for split, rows in self.rows.items()
            },
            evaluations=list(evaluations.values()),
            differences=list(differences(evaluations, _PAIRS)),
            history=[
                Series(name="tuning the teacher", points=teacher.history),
                Series(name="recovery", points=recovered.history),
                Series(name="promptkd", points=history),
            ],
            timings=self.timings,
            notes=[f"Computed in {str(self.dtype).removeprefix('torch.')}, with trained weights in float32, on cpu."],
        )
        results.write(self.out / "results.json")
        return results

    # ---- stages ----

    def tuned_teacher(self) -> Stage:
        """The teacher, tuned on the training rows as in the paper, so that it answers in their manner and stops."""
        args = FinetuneConfig(
            max_steps=self.settings.tuning_steps,
            learning_rate=self.settings.tuning_rate,
            train_sampling_strategy=_TUNING_ORDER,
            **self._training_arguments("tuning"),
        )
        keys = ("seed", "batch_size", "tuning_steps", "tuning_rate", "max_prompt_length", "max_response_length")

        def trainer() -> FinetuneTrainer:
            return FinetuneTrainer(load_model(teacher_file()), args, self.rows["train"], None, self.tokenizer)

        return self._stage(
            "teacher", "tuning", "tuned teacher", self._dependencies(keys), trainer, "Tuning the teacher"
        )

    def pruned_student(self, teacher: PreTrainedModel) -> PreTrainedModel:
        """The teacher's most influential layers, measured on training rows."""
        started = time.perf_counter()
        rows = self.rows["train"].examples[: self.settings.influence_rows]
        chunks = [rows[first : first + 16] for first in range(0, len(rows), 16)]
        batches = [right_pad([r.prompt_ids for r in chunk], [r.response_ids for r in chunk]) for chunk in chunks]
        with computing("cpu", self.dtype):
            influence = block_influence(teacher, batches)
        kept = most_influential(influence, self.settings.layers)
        left = [index for index in range(len(influence)) if index not in kept]
        self.say(f"Pruned to {len(kept)} of {len(influence)} layers; left out {', '.join(map(str, left)) or 'none'}.")
        self.timings["pruning"] = time.perf_counter() - started
        return prune_layers(teacher, kept)

    def recovered_student(self, pruned: PreTrainedModel, teacher: Stage, frozen: PreTrainedModel) -> Stage:
        """The pruned student after knowledge distillation on the responses of the data."""
        args = DistillConfig(
            method="kd",
            max_steps=self.settings.recovery_steps,
            learning_rate=self.settings.recovery_rate,
            warmup_steps=5,
            **self._training_arguments("recovery"),
        )
        keys = ("layers", "seed", "batch_size", "recovery_steps", "recovery_rate", "influence_rows")
        depends_on = {**self._dependencies(keys), "teacher": teacher.folder.name}
        trainer = partial(self._trainer, pruned, frozen, args)
        return self._stage("recovered", "recovery", "recovered student", depends_on, trainer, "Recovering the student")

    def promptkd(
        self, student: PreTrainedModel, teacher: PreTrainedModel
    ) -> tuple[DistillTrainer, list[dict[str, Any]]]:
        """PromptKD on the training requests, with the student's own responses."""
        args = PromptKDConfig(
            max_steps=self.settings.steps,
            learning_rate=self.settings.rate,
            prompt_learning_rate=self.settings.prompt_rate,
            warmup_steps=3,
            **self._training_arguments("promptkd"),
        )
        trainer = self._trainer(student, teacher, args)
        numbers, share = trainer.trainable_share()
        self.say(f"The soft prompt trains {numbers:,} numbers, {share:.4%} of the teacher.")
        trainer.add_callback(MetricsFile(self.out / "metrics.jsonl"))
        _, history, self.timings["promptkd"] = self._train(trainer, "PromptKD")
        return trainer, history

    def measure(self, label: str, model: PreTrainedModel, teacher: PreTrainedModel | None) -> Evaluation:
        """Greedy answers to the test requests, and the KL to the teacher on samples."""
        started = time.perf_counter()
        self.say(f"Measuring: {label}")
        seed, limit = self.settings.seed, self.settings.max_response_length
        greedy = Decoding(0.0, max_new_tokens=limit, stop_ids=self.stop_ids, seed=seed, batch_size=64)
        with computing("cpu", self.dtype):
            results = measure_rows(
                model,
                self.tokenizer,
                self.rows["test"].examples,
                greedy,
                teacher=teacher,
                samples_per_row=1 if label == "pruned" else self.settings.samples_per_row,  # it is far from all others
                batch_size=16,
            )
        self.timings["measuring"] = self.timings.get("measuring", 0.0) + time.perf_counter() - started
        return evaluation_of(results, greedy, [seed], model=label, data="test")

    # ---- inside ----

    def _training_arguments(self, stage: str) -> dict[str, Any]:
        return {
            "output_dir": str(self.out / "checkpoints" / stage),
            "per_device_train_batch_size": self.settings.batch_size,
            "max_prompt_length": self.settings.max_prompt_length,
            "max_completion_length": self.settings.max_response_length,
            "seed": self.settings.seed,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
        }

    def _trainer(self, student: PreTrainedModel, teacher: PreTrainedModel, args: DistillConfig) -> DistillTrainer:
        # a copy with every layer, so that training leaves the original as it is for the next stage's comparison
        copy, tokenizer = prune_layers(student, list(range(student.config.num_hidden_layers))), self.tokenizer
        rows = self.rows["train"]
        return DistillTrainer(copy, teacher, args, rows, None, tokenizer, teacher_processing_class=tokenizer)

    def _train(self, trainer: Any, title: str) -> Trained:
        quiet(trainer)
        bar = ProgressBar(title)
        trainer.add_callback(bar)
        started = time.perf_counter()
        try:
            trainer.train()
        finally:
            bar.close()
        history = [entry for entry in trainer.state.log_history if "train_runtime" not in entry]
        return trainer.accelerator.unwrap_model(trainer.model).eval(), history, time.perf_counter() - started

    def _dependencies(self, keys: tuple[str, ...]) -> dict[str, Any]:
        settings = asdict(self.settings)
        return {
            **{key: settings[key] for key in keys},
            "template": TEMPLATE,
            "data": file_sha256(data_file("train")),
            "model": file_sha256(teacher_file()),
            "conversion": GGUF_CONVERSION,
            "order": _TUNING_ORDER,
            "dtype": str(self.dtype),
        }

    def _stage(
        self, name: str, part: str, what: str, depends_on: dict[str, Any], trainer: Callable[[], Any], title: str
    ) -> Stage:
        stage = cached_stage(name, depends_on, self.tokenizer, lambda: self._train(trainer(), title))
        if stage.was_cached:
            self.say(f"The {what} comes from the cache (made in {stage.seconds:.0f} s).")
        else:
            self.timings[part] = stage.seconds
        return stage
