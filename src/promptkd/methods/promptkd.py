"""PromptKD (Kim, Jang and Yang 2024, arXiv 2402.12842), and its comparison with other trained parts of the teacher."""

from typing import ClassVar

from promptkd.methods.token_method import TokenMethod
from promptkd.models.adapters import AdapterFactory, FullTeacherFactory, LoraFactory, SoftPromptFactory
from promptkd.responses import ResponseMix, Responses


class PromptKD(TokenMethod):
    """Reverse KL on the student's responses, with a soft prompt that brings the teacher near the student."""

    name = "promptkd"
    own_objective = "reverse_kl"
    own_adapter: ClassVar[type[AdapterFactory]] = SoftPromptFactory

    def responses(self) -> Responses:
        return ResponseMix(1.0)


class PromptKDLora(PromptKD):
    """PromptKD with LoRA weights in place of the soft prompt."""

    name = "promptkd-lora"
    own_adapter = LoraFactory


class PromptKDFull(PromptKD):
    """PromptKD with all weights of the teacher in place of the soft prompt."""

    name = "promptkd-full"
    own_adapter = FullTeacherFactory
