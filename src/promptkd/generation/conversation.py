"""A model in a conversation: requests go in, the text of its answers comes out piece by piece."""

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from promptkd.data.encode import prompt_tokens, stop_token_ids
from promptkd.data.rows import Example, Instruction, Message
from promptkd.data.templates import resolve_template
from promptkd.errors import RequestError
from promptkd.generation.sampling import Decoding, row_seeds
from promptkd.generation.streaming import TextStream, stream
from promptkd.models import vocabulary_size


@dataclass
class StreamedAnswer:
    """An answer, complete or not."""

    limit: int
    """The most tokens that it may have."""
    text: str = ""
    tokens: int = 0
    ended: bool = False
    """Whether the model wrote a stop token."""


@dataclass
class Conversation:
    """One model, and what was said to it and by it.

    With the tokenizer's chat template the model reads all that was said before. Every other template knows single
    requests only, and each is answered by itself.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: str = "auto"
    messages: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._template = resolve_template(self.template, self.tokenizer)
        self._stops = stop_token_ids(self.tokenizer, self.model.generation_config, self._template)

    @property
    def remembers(self) -> bool:
        """Whether an answer depends on what was said before."""
        return self._template.name == "chat"

    @property
    def context(self) -> int | None:
        """Most tokens of prompt and answer together, None where the model's configuration names no limit."""
        settings = self.model.config.get_text_config().to_dict()
        return settings.get("max_position_embeddings") or settings.get("n_positions")  # GPT-2's name for it

    def reset(self) -> None:
        """Forget what was said."""
        self.messages = []

    def ask(self, request: str, decoding: Decoding, turn: int = 0) -> tuple[StreamedAnswer, Iterator[str]]:
        """An answer that fills while the iterator over its new pieces of text is read.

        What has been read of it when the iterator is closed is remembered as what the model said.

        Raises:
            RequestError: at once, for a request without text or a conversation that leaves no room for an answer.
        """
        prompt = self._prompt(request)
        (limit,) = decoding.limits(1)
        answer = StreamedAnswer(limit if self.context is None else min(limit, self.context - len(prompt)))
        params = replace(
            decoding, max_new_tokens=answer.limit, stop_ids=self._stops, vocabulary=vocabulary_size(self.tokenizer)
        )
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
        if self.context is not None and len(prompt) >= self.context:
            raise RequestError(
                f"The prompt has {len(prompt)} tokens, what was said before included, and the model reads and writes "
                f"{self.context} at most. Start from scratch or ask in fewer words."
            )
        return prompt

    def _pieces(self, request: str, answer: StreamedAnswer, tokens: Generator[int]) -> Iterator[str]:
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
            if self.remembers:
                said = {"role": "user", "content": request}
                self.messages += [said, {"role": "assistant", "content": answer.text}]
        yield tail
