"""`promptkd sft`."""

from typing import Any

from promptkd.cli.options.sft import Options
from promptkd.cli.training_run import TrainingRun
from promptkd.training import FinetuneConfig, FinetuneTrainer


def run(options: Options, training: dict[str, Any]) -> None:
    job = TrainingRun("sft", options, training)
    args = job.arguments(FinetuneConfig)
    with job.folder.locked():
        tokenizer = job.tokenizer(options.model)
        train, valid = job.encode(tokenizer, args, options.model)
        model = job.load("model", options.model)
        with job.folder.opened():
            trainer = FinetuneTrainer(model, args, train, valid, tokenizer)
        for note in trainer.notes:
            job.note(note)
        job.train(trainer, "Fine-tuning")
        trainer.save_student(job.folder.path / "model")
        job.record(trainer, "model")
