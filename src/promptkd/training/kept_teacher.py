"""Kept teacher logits (`data.kept_logits`) in the place of a teacher: what they serve for, and their reading."""

from functools import partial
from typing import Any

from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from promptkd.data.batch import TokenBatch
from promptkd.data.encode import EncodedData
from promptkd.data.kept_logits import KeptLogits, vocabulary_sha256
from promptkd.engine import Vocabulary
from promptkd.errors import RequestError, check_all
from promptkd.methods import Method
from promptkd.methods.token_method import mixed_loss
from promptkd.models import SharedVocabulary
from promptkd.models.pair import Pair
from promptkd.objectives.coarse import check_coarse
from promptkd.responses import writes_responses
from promptkd.training.teacher import Teacher

_OF_A_MODEL = ("teacher_dtype", "teacher_quantization", "teacher_model_revision", "teacher_model_init_kwargs")
_SPEAKS = "--kept_logits cannot serve this run"


class KeptTeacher(Teacher):
    """A teacher of which only its distributions at fixed responses are known; nothing of it is in memory."""

    def __init__(self, kept: KeptLogits, args: Any, vocabulary: Vocabulary):
        self.kept, self.vocabulary, self.adapter, self.name = kept, vocabulary, None, ""
        self.placed = self.model = nn.Module()  # without weights
        self.parameters, self.generation_config = 0, ends_config(kept)
        self._chunk_tokens = args.chunk_tokens

    @property
    def measurable(self) -> None:
        """There is no model that could be measured."""
        return None

    def adapted_hidden(self, batch: TokenBatch) -> Any:
        """The `CoarseTarget` of a batch, which `Pair.student_loss` takes in the place of states."""
        return self.kept.target(batch)

    def pair(self, student: nn.Module) -> Pair:
        return Pair(student, self.model, self.vocabulary, chunk=self._chunk_tokens)

    def savings(self) -> dict[str, bool]:
        return {}


def ends_config(kept: KeptLogits) -> GenerationConfig:
    """What is known of how the teacher decodes: the tokens that end its answers."""
    return GenerationConfig(eos_token_id=kept.settings.ends or None)


def kept_vocabulary(kept: KeptLogits, tokenizer: PreTrainedTokenizerBase) -> tuple[SharedVocabulary, list[str]]:
    """The tokens that the kept distributions are over. `RequestError` if the student's tokenizer has others."""
    settings = kept.settings
    if vocabulary_sha256(tokenizer) != settings.vocabulary_sha256:
        owner = f"the student {settings.student}" if settings.student else f"the teacher {settings.teacher}"
        raise RequestError(
            f"The logits in {kept.folder} were kept over the vocabulary of {owner}, and the student's tokenizer has "
            "other tokens or ids. Keep them for this student: promptkd generate --keep-logits K --student STUDENT."
        )
    return SharedVocabulary(settings.vocabulary, tuple(settings.masked)), [kept.told]


def check_kept_use(kept: KeptLogits, method: Method, args: Any) -> None:
    """Refuse what kept logits cannot tell: a method, a setting or an objective that needs the teacher itself."""
    fixed = "take a method on the data's responses (kd, akl), or give the teacher itself"
    halves = "; the part on the teacher's responses alone is --method kd --objective skew_forward_kl"
    settings = vars(args)
    checks = [
        (
            not method.reads_teacher,
            f"{args.method}, as it is set, learns nothing from a teacher's distribution; leave --kept_logits out",
        ),
        (
            writes_responses(method.responses),
            f"{args.method} asks the teacher about tokens that a model writes in training, and the logits are those of "
            f"fixed responses; {fixed}{halves if args.method == 'distillm2' else ''}",
        ),
        (
            method.adapter is not None,
            f"a part of the teacher cannot be trained without the teacher; {fixed} (--teacher_adapter none)",
        ),
        (
            settings.get("distillation_temperature", 1.0) != 1 and not kept.is_whole,
            f"--distillation_temperature would need the logits of all {kept.settings.vocabulary:,} tokens, of which "
            f"{kept.settings.kept} are kept; leave it at 1, or keep them all",
        ),
        (args.template == "teacher", "--template teacher needs the teacher's tokenizer; give the template itself"),
        *(
            (settings[name] is not None, f"--{name} has no effect, for no teacher is loaded; leave it out")
            for name in _OF_A_MODEL
        ),
    ]
    check_all(_SPEAKS, checks)
    objective: Any = method.objective
    if isinstance(method.loss, partial) and method.loss.func is mixed_loss:
        objective = method.loss.args[0]
    if objective is not None:
        check_coarse(objective, is_whole=kept.is_whole)


def check_kept_rows(kept: KeptLogits, data: EncodedData | None, args: Any) -> None:
    """`RequestError` if training rows have no kept logits, with how many, and which settings differ."""
    rows = [] if data is None else data.examples
    if with_context := [row for row in rows if row.teacher_prompt_ids is not None]:
        told = f"{len(with_context):,} of {len(rows):,} training rows give the teacher a context of its own"
        raise RequestError(
            f"{told} (--teacher_prompt, or a column of that name), and kept logits are of a teacher without. "
            "Leave the context out, or give the teacher itself."
        )
    missing = kept.missing(rows)
    if not missing:
        return
    before, now = kept.settings.rows, vars(args)
    named = [name for name in before if name in now and (name != "columns" or kept.settings.sampling is None)]
    changed = [
        f"{name} {before[name]!r} (now {now[name]!r})"
        for name in named
        if (before[name] or None) != (now[name] or None)
    ]
    made = f"with {', '.join(changed)}" if changed else "under the same settings, but of other texts or end tokens"
    raise RequestError(
        f"{len(missing):,} of {len(rows):,} training rows have no logits in {kept.folder}, row {missing[0].row} among "
        f"them: these were kept of {kept.settings.data} {made}. Train on that file with its settings, or keep the "
        "logits of these rows: promptkd generate --score --keep-logits K --data DATA --out FOLDER."
    )
