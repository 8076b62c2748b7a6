"""A method of distillation: whose responses, which part of the teacher is trained, what the student minimizes.

Each file but method.py, token_method.py and named.py holds a method or a family of them, which `METHODS` names. A
method of your own is a `Method` with other choices, or with a loss function of its own (docs/extending.md).
"""

from promptkd.methods.method import METHODS, AdaptedMethod, Method, NamedMethod, Step, StudentLoss
from promptkd.methods.named import MethodSettings, named_method
from promptkd.methods.token_method import MixedMethod, TokenMethod
from promptkd.models.pair import Objective, Pair

__all__ = ["METHODS", "AdaptedMethod", "Method", "MethodSettings", "MixedMethod", "NamedMethod", "Objective", "Pair"]
__all__ += ["Step", "StudentLoss", "TokenMethod", "named_method"]
