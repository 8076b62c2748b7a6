"""`promptkd sft`."""

from typing import Any

from promptkd.cli.lora import LoraRequest
from promptkd.cli.options.sft import Options
from promptkd.cli.training_run import TrainingRun
from promptkd.errors import RequestError
from promptkd.training import FinetuneConfig, FinetuneTrainer
from promptkd.training.config import student_revision
from promptkd.training.student import saves_merged


def run(options: Options, training: dict[str, Any]) -> None:
    lora = LoraRequest(options.lora_rank, options.lora_alpha, options.lora_continue, options.merge, "--lora")
    lora.check()
    job = TrainingRun("sft", options, training)
    args = job.arguments(FinetuneConfig)
    with job.folder.locked():
        tokenizer = job.tokenizer(options.model, student_revision(args))
        train, valid = job.encode(tokenizer, args, options.model)
        lora.check_model(options.model, student_revision(args))
        model = job.load("model", options.model, adapted=lora.continues)
        with job.folder.opened():
            trainer = FinetuneTrainer(model, args, train, valid, tokenizer, peft_config=lora.config())
            if options.merge and trainer.is_sharded:
                raise RequestError(
                    "--merge needs the model's weights whole: leave it out, and merge by promptkd export."
                )
            trainer.accelerator.wait_for_everyone()  # an older run goes once no process can refuse any more
        for note in trainer.notes:
            job.note(note)
        if not trainer.is_sharded and (told := lora.told(options.model, trainer.model)):
            job.note(told)
        job.train(trainer, "Fine-tuning")
        if options.merge or saves_merged(trainer):  # then what is measured is what is saved
            trainer.merge_student()
        trainer.save_student(job.folder.path / "model")
        job.record(trainer, "model")
