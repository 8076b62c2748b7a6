"""What a loss of sampled tokens costs beside those of the whole vocabulary, forward and backward, in one run.

Seconds are those that the process had a core, so that other processes on the machine count less.

OMP_NUM_THREADS=1 python benchmarks/sampled_tokens.py --tokens 512 --words 49152 --width 576
"""

import argparse
import resource
import statistics
import time
from collections.abc import Callable

import torch

from promptkd.engine import (
    ChunkedLoss,
    Head,
    chunked_cross_entropy,
    chunked_objective,
    chunked_on_policy_gradient,
    chunked_skew_kl,
)
from promptkd.objectives import reverse_kl, skew_forward_kl


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("tokens", 512), ("words", 49152), ("width", 576), ("runs", 15)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.manual_seed(0)
    hidden = [torch.randn(args.tokens, args.width) for _ in range(2)]
    heads = [Head(torch.randn(args.words, args.width) / args.width**0.5) for _ in range(2)]
    student, teacher = zip(hidden, heads, strict=True)
    student[0].requires_grad_()
    student[1].weight.requires_grad_()
    labels = torch.randint(args.words, (args.tokens,))
    alpha, weight = torch.full((args.tokens,), 0.1), torch.ones(args.tokens)

    def skewed(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
        return skew_forward_kl(student_logits, teacher_logits, alpha=0.1)

    losses: dict[str, Callable[[], ChunkedLoss]] = {
        "cross-entropy": lambda: chunked_cross_entropy(student, labels),
        "opd, the sampled tokens": lambda: chunked_on_policy_gradient(student, teacher, labels),
        "reverse KL, the whole vocabulary": lambda: chunked_objective(reverse_kl, student, teacher),
        "skew KL with an alpha per token": lambda: chunked_skew_kl(
            "forward", student, teacher, alpha=alpha, weight=weight
        ),
        "skew KL by autograd": lambda: chunked_objective(skewed, student, teacher),
    }
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    for run in range(args.runs + 1):  # in turns, so that a busy machine slows all of them
        for name, loss in losses.items():
            student[0].grad = student[1].weight.grad = None
            started = time.process_time()
            loss().total.backward()
            if run:  # the first one warms up
                seconds[name].append(time.process_time() - started)
    print(f"{args.tokens} tokens, {args.words} words, width {args.width}, {torch.get_num_threads()} thread(s)")
    for name, each in seconds.items():
        print(f"{name:34} {statistics.median(each):.3f} s, least {min(each):.3f}")
    print(f"peak of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
