"""What ends the responses of a pair: the end tokens of student and teacher are compared before anything is trained.

A student that ends with a token that its teacher never writes unlearns to end: at that place the teacher's distribution
asks for another token. So the teacher's ends end responses, too, and rows end as the teacher does where they can.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from promptkd.data import EncodedData, resolve_template, stop_token_ids
from promptkd.engine import unwrap_peft
from promptkd.errors import RequestError
from promptkd.methods import Method
from promptkd.models import SharedVocabulary, generation_config_of

_LOGGER = logging.getLogger(__name__)
_OTHER_WAY = "promptkd generate by the teacher and promptkd sft on what it writes"


class PairEnds:
    """The end tokens of a student and of the teacher whose distribution it learns.

    Args:
        args: a `DistillConfig`; `template` and `end_token` are read.
        shared: the tokens that both have; None, or a method that reads no teacher, leaves the teacher out.
        teacher: its tokenizer; None if there is only its generation configuration.

    Raises:
        RequestError: if the teacher ends with nothing but tokens that the student does not have.
    """

    def __init__(
        self,
        args: Any,
        method: Method,
        shared: SharedVocabulary | None,
        tokenizer: PreTrainedTokenizerBase,
        teacher: PreTrainedTokenizerBase | None,
        teacher_config: GenerationConfig | None,
    ):
        self.args, self.tokenizer = args, tokenizer
        self.of_teacher: list[int] = []
        self.first: int | None = None
        """Of the teacher's ends, the one that it writes."""
        if shared is None or not method.reads_teacher:
            return
        first, known = _ends_of(teacher, teacher_config, args.template)
        self.of_teacher = [index for index in known if index < shared.size and index not in shared.masked]
        if known and not self.of_teacher:
            names = ", ".join(f"{shared.of_teacher.get(index, 'a token')!r} (id {index})" for index in known)
            raise RequestError(
                f"The teacher ends its answers with {names}, which the student does not have, so the student would "
                f"unlearn to end. Give the student the teacher's tokenizer, or use {_OTHER_WAY}."
            )
        self.first = next((index for index in (*first, *self.of_teacher) if index in self.of_teacher), None)

    @property
    def in_order(self) -> list[int]:
        """The teacher's ends, the one that it writes first."""
        return sorted(self.of_teacher, key=lambda index: index != self.first)

    def settle(self, student_config: GenerationConfig | None) -> list[str]:
        """Let rows end as the teacher's answers do, where the EOS of the tokenizer decides; what to say of it.

        With `end_token` "student", and where a chat template writes the end, nothing is changed.
        """
        if self.first is None or not self.must_settle(student_config):
            return []
        own = resolve_template(self.args.template, self.tokenizer).end_token_id
        self.tokenizer.eos_token = self.tokenizer.convert_ids_to_tokens(self.first)
        of_rows = "nothing" if own is None else self._name(own)
        note = (
            f"End tokens differ: the student's rows would end with {of_rows}, the teacher ends with "
            f"{self._name(self.first)}. The rows end as the teacher does, with what is now the EOS of the student's "
            "tokenizer, and responses end at either (--end_token student keeps the student's)."
        )
        _LOGGER.warning(note)
        return [note]

    def must_settle(self, student_config: GenerationConfig | None) -> bool:
        """Whether rows would end as the teacher never does, and can end as it does instead."""
        template = resolve_template(self.args.template, self.tokenizer)
        own, known = template.end_token_id, stop_token_ids(self.tokenizer, student_config, template)
        is_written = template.chat is not None and template.chat.written_end is not None
        agree = own in self.of_teacher or (own is None and not set(known).isdisjoint(self.of_teacher))
        return not (self.first is None or agree or is_written or self.args.end_token == "student")

    def settle_with(
        self, student: str | Path | PreTrainedModel, data: Sequence[Any], revision: str | None = None
    ) -> tuple[list[str], list[Any]]:
        """`settle` by the student's own settings; and `data`, of which rows that are encoded end the same way.

        `revision` is that of a `student` of the hub.
        """
        config = generation_config(student, self.args, revision)
        before = resolve_template(self.args.template, self.tokenizer).end_token_id
        notes, after = self.settle(config), self.tokenizer.eos_token_id
        if not notes:
            return [], list(data)
        return notes, [with_end(each, before, after) if isinstance(each, EncodedData) else each for each in data]

    def stops(self, student_config: GenerationConfig | None) -> tuple[tuple[int, ...], list[str]]:
        """All ids that end a response, and what to say of the teacher's among them."""
        template = resolve_template(self.args.template, self.tokenizer)
        own = stop_token_ids(self.tokenizer, student_config, template)
        found, end = tuple(sorted({*own, *self.of_teacher})), template.end_token_id
        if self.first is not None and end is not None and end not in self.of_teacher:
            keeps = "the chat template writes" if self.args.end_token == "teacher" else "--end_token student keeps"
            note = (
                f"End tokens differ: {keeps} {self._name(end)} at the end of the rows, and the teacher ends with "
                f"{self._name(self.first)}. Responses end at either, and the student learns to write the teacher's. "
                "To keep the rows' own, tune the teacher on them first (promptkd sft)."
            )
            _LOGGER.warning(note)
            return found, [note]
        if more := sorted({*found} - {*own}):
            return found, [f"Responses also end at {', '.join(map(self._name, more))}, as the teacher's do."]
        return found, []

    @property
    def named_first(self) -> str:
        """The end token that the teacher writes, by name."""
        return "nothing" if self.first is None else self._name(self.first)

    def _name(self, index: int) -> str:
        return f"{self.tokenizer.convert_ids_to_tokens(index)!r} (id {index})"


class SeveralEnds:
    """The end tokens of a student and of several teachers; with one teacher, those of the pair.

    Raises:
        RequestError: if the teachers end their answers differently and the rows would have to end as one does.
    """

    def __init__(self, pairs: Mapping[str, PairEnds]):
        self.pairs = pairs

    def settle_with(
        self, student: str | Path | PreTrainedModel, data: Sequence[Any], revision: str | None = None
    ) -> tuple[list[str], list[Any]]:
        """See `PairEnds.settle_with`."""
        (one, *_), firsts = self.pairs.values(), {pair.first for pair in self.pairs.values()}
        config = generation_config(student, one.args, revision)
        if len(firsts) > 1 and any(pair.must_settle(config) for pair in self.pairs.values()):
            names = ", ".join(f"{name} with {pair.named_first}" for name, pair in self.pairs.items())
            raise RequestError(
                f"The teachers end their answers differently ({names}), and rows can end in one way only. Give "
                "--end_token student, or teachers that end alike."
            )
        notes, settled = [], list(data)
        for pair in self.pairs.values():  # what the first one settles, the others find
            more, settled = pair.settle_with(student, settled, revision)
            notes += more
        return notes, settled

    def stops(self, student_config: GenerationConfig | None) -> tuple[tuple[int, ...], list[str]]:
        """All ids that end a response, and what to say of the teachers' among them."""
        found = {name: pair.stops(student_config) for name, pair in self.pairs.items()}
        notes = [f"Teacher {name}: {note}" if name else note for name, (_, told) in found.items() for note in told]
        return tuple(sorted({index for ids, _ in found.values() for index in ids})), notes


def generation_config(
    model: str | Path | PreTrainedModel, args: Any, revision: str | None = None
) -> GenerationConfig | None:
    """How a model, or the one of that name, decodes by its own settings."""
    if isinstance(model, str | Path):
        return generation_config_of(model, trust_remote_code=args.trust_remote_code, revision=revision)
    return unwrap_peft(model).generation_config


def with_end(data: EncodedData, before: int | None, after: int | None) -> EncodedData:
    """Rows whose responses end with `before`, ending with `after` instead."""
    if before is None or after is None or before == after:
        return data
    rows = [
        replace(row, response_ids=[*row.response_ids[:-1], after]) if row.response_ids[-1:] == [before] else row
        for row in data.examples
    ]
    return replace(data, examples=rows)


def _ends_of(
    tokenizer: PreTrainedTokenizerBase | None, config: GenerationConfig | None, template: str
) -> tuple[Sequence[int], Sequence[int]]:
    """The ends that a teacher writes, the most likely first; and all that it knows."""
    if tokenizer is None:
        held = None if config is None else config.eos_token_id
        ids = [] if held is None else list(held) if isinstance(held, list | tuple) else [held]
        return ids, ids
    name = "auto" if template == "chat" else template  # it may have none
    found = resolve_template(name, tokenizer)
    first = [index for index in (found.end_token_id, tokenizer.eos_token_id) if index is not None]
    return first, stop_token_ids(tokenizer, config, found)
