"""What `distill` and `evaluate` say first of a student: how it compares with its teacher, and what both take to run."""

import time
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from promptkd.cli.terminal import say
from promptkd.data.encode import EncodedExample
from promptkd.evaluation.comparison import compare
from promptkd.evaluation.inference import Workload, measure_inference
from promptkd.evaluation.pairing import Candidate
from promptkd.report.metrics import metric_info
from promptkd.results import Results

_COMPARED = ("loss", "kl_to_teacher", "rouge_l", "eos_share")


def compare_within(results: Results, labels: Sequence[str], *, chosen_from: int = 1) -> None:
    """Add the paired differences of the last of `labels` from each of the others, all models of one record.

    The last may be the best by these rows out of `chosen_from` checkpoints. Then p holds for all of them together, by
    Bonferroni's correction; intervals are those of the one.
    """
    held = [{name for each in results.evaluations if each.model == label for name in each.metrics} for label in labels]
    shared = [name for name in _COMPARED if sum(name in names for names in held) > 1]
    candidates = [Candidate(label, results, label) for label in labels]
    found = compare(candidates, lambda name: metric_info(name).better, pairs="last", metrics=shared)
    results.differences = found.differences
    results.notes += found.notes
    tested = [each for each in found.differences if each.p_adjusted is not None]
    if chosen_from > 1:
        for each in tested:
            each.p_adjusted = min(1.0, chosen_from * (each.p_adjusted or 0.0))
        corrected = f" p is {chosen_from} times that of a single one; intervals are as they are." if tested else ""
        chosen = f"{labels[-1]} is measured on the rows that chose it out of {chosen_from} validations."
        results.notes.append(chosen + corrected)


def measure_speed(
    results: Results, models: Mapping[str, nn.Module], rows: Sequence[EncodedExample], workload: Mapping[str, int]
) -> None:
    """Add speed and size of the `models`, on the prompts of `rows`; `workload` has the rows decoded together and so on.

    Say how long it took.
    """
    started = time.perf_counter()
    say(f"Measuring the speed of {' and '.join(models)}, in turns.")
    prompts = [row.prompt_ids for row in rows]
    results.inference = measure_inference(models, Workload(prompts, **workload))
    seconds = results.timings["speed"] = time.perf_counter() - started
    one = next(iter(results.inference.values()))
    how = f"{len(one.tokens_per_second)} rounds in turns, {one.new_tokens} tokens a round"
    where = torch.cuda.get_device_name() if one.device == "cuda" else f"{torch.get_num_threads()} threads of a CPU"
    results.notes.append(f"Speed: {how}, by promptkd's own decoder, on {where}; took {seconds:.0f} s.")
