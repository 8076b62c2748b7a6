"""A model in a conversation: requests go in, the text of its answers comes out piece by piece."""

from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from promptkd.data.encode import stop_token_ids
from promptkd.data.messages import Message
from promptkd.data.prompt_tokens import prompt_tokens
from promptkd.data.rows import Example, Instruction
from promptkd.data.templates import resolve_template
from promptkd.errors import RequestError
from promptkd.generation.decode_loop import stream
from promptkd.generation.sampling import Decoding, row_seeds
from promptkd.models import position_limit, vocabulary_size
from promptkd.models.vocabulary import check_ids, check_stop_ids


@dataclass
class StreamedAnswer:
    limit: int  # the most tokens that it may have
    text: str = ""
    tokens: int = 0
    ended: bool = False  # whether the model wrote a stop token
    remembered: bool = False  # whether the conversation holds it


@dataclass
class Conversation:
    """One model, and what was said to it and by it, which it reads only with the tokenizer's chat template."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: str = "auto"
    chat_template_kwargs: Mapping[str, Any] | None = None
    messages: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._template = resolve_template(self.template, self.tokenizer, self.chat_template_kwargs)
        self._stops = stop_token_ids(self.tokenizer, self.model.generation_config, self._template)
        check_stop_ids("model", self.model, self._stops)
        self.context = position_limit(self.model)  # the most tokens of prompt and answer together

    @property
    def remembers(self) -> bool:
        """Whether an answer depends on what was said before."""
        return self._template.name == "chat"

    def reset(self) -> None:
        self.messages = []

    def ask(self, request: str, decoding: Decoding, turn: int = 0) -> tuple[StreamedAnswer, Generator[str]]:
        """An answer that fills while the iterator over its new pieces of text is read.

        What was read of it is remembered, and by `remember` also a request of which nothing was. Raises `RequestError`
        at once, for a request without text or a conversation that leaves no room for an answer.
        """
        prompt, (limit,), vocabulary = self._prompt(request), decoding.limits(1), vocabulary_size(self.tokenizer)
        answer = StreamedAnswer(limit if self.context is None else min(limit, self.context - len(prompt)))
        params = replace(decoding, max_new_tokens=answer.limit, stop_ids=self._stops, vocabulary=vocabulary)
        tokens = stream(self.model, prompt, params, seed=row_seeds(decoding.seed, turn + 1)[turn])
        return answer, self._pieces(request, answer, tokens)

    def _prompt(self, request: str) -> list[int]:
        if not request.strip():
            raise RequestError("The request is empty. Expected some text.")
        try:
            request.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError("The request is not valid UTF-8.") from error
        said = (*self.messages, {"role": "user", "content": request})
        example = Example(said if self.remembers else Instruction(request, ""), (), "the request", 0)
        text = self._template.render(example)
        (prompt,) = prompt_tokens([example], [text], self.tokenizer, self._template)
        check_ids("model", self.model, prompt, "The prompt")
        if self.context is not None and len(prompt) >= self.context:
            told = f"The prompt has {len(prompt)} tokens, what was said before included"
            most = f"the model reads and writes {self.context} at most"
            raise RequestError(f"{told}, and {most}. Start from scratch or ask in fewer words.")
        return prompt

    def remember(self, request: str, answer: StreamedAnswer) -> None:
        """Take a request and what there is of its answer into the conversation, if it is not in it."""
        if self.remembers and not answer.remembered:
            self.messages += [{"role": "user", "content": request}, {"role": "assistant", "content": answer.text}]
            answer.remembered = True

    def _pieces(self, request: str, answer: StreamedAnswer, tokens: Generator[int]) -> Generator[str]:
        text = TextStream(self.tokenizer)
        try:
            with closing(tokens):
                for token in tokens:
                    answer.tokens += 1
                    answer.ended = token in self._stops
                    piece = text.add(token)
                    answer.text += piece
                    yield piece
        finally:
            tail = text.end()
            answer.text += tail
            self.remember(request, answer)
        yield tail


class TextStream:
    """The text of a response, piece by piece; a character of several tokens comes with the last of them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self._shown = 0  # tokens whose text has been returned
        self._context = 0  # the token from which on the tokenizer is asked: a word's first token depends on it

    def add(self, token: int) -> str:
        """What `token` adds to the text; "" while it may still be part of a character."""
        self.ids.append(token)
        return self._new(last=False)

    def end(self) -> str:
        """What was held back as part of a character that was never completed."""
        return self._new(last=True)

    def _new(self, *, last: bool) -> str:
        parts = (self.ids[self._context : self._shown], self.ids[self._context :])
        before, text = (self.tokenizer.decode(ids, skip_special_tokens=True) for ids in parts)
        if not last and text.endswith("\ufffd"):
            return ""
        self._context, self._shown = self._shown, len(self.ids)
        return text[len(before) :]
