"""Tokens per second of the speculative sampler of `skd`, by the tokens that are proposed per pass of the teacher.

    OMP_NUM_THREADS=1 python -m benchmarks.speculative --json speculative.json

Against the student alone, and against a teacher that reads one token per pass (block 1), on the same rows, seeds and
lengths, in one process, taking turns. The pair has the shapes of SmolLM2-135M and of its first 10 layers and random
weights; the further 20 layers of the teacher are weighed by --distance, which decides how many tokens it rejects.
Times are CPU time of the process, so that other jobs on the machine count little.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from promptkd.generation import SamplingParams, generate, generate_corrected
from promptkd.responses import Speculation

LAYERS, STUDENT_LAYERS = 30, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", nargs="+", type=int, default=[1, 2, 3, 4, 5, 6, 8])
    parser.add_argument("--distances", nargs="+", type=float, default=[0.02, 0.3])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--prompt", type=int, default=60, help="tokens of a prompt")
    parser.add_argument("--response", type=int, default=64, help="tokens of a response")
    parser.add_argument("--top-k", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="file for the record")
    given = parser.parse_args()
    print("| batch | replaced | tokens per pass | tokens/s | over block 1, median | range | over the student alone |")
    print("|---|---|---|---|---|---|---|")
    record = []
    for distance in given.distances:
        student, teacher = pair(distance)
        for size in given.batch_sizes:
            speeds, replaced = compare(student, teacher, size, given)
            record.append({"batch": size, "distance": distance, "replaced": replaced, "tokens_per_second": speeds})
            for name, each in speeds.items():
                over = [mine / other for mine, other in zip(each, speeds["1"], strict=True)]
                middle = statistics.median(over)
                alone = statistics.median([a / b for a, b in zip(each, speeds["student"], strict=True)])
                cells = size, f"{replaced:.0%}", name, f"{statistics.median(each):.0f}", f"{middle:.2f}"
                print(
                    "|", " | ".join(map(str, cells)), f"| {min(over):.2f}-{max(over):.2f} | {alone:.2f} |", flush=True
                )
    if given.json:
        Path(given.json).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def pair(distance: float) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """A student, and a teacher that begins with the student's layers."""
    shape = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "tie_word_embeddings": True}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 2048}
    torch.manual_seed(0)
    teacher, student = (
        LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **shape, **heads)).eval()
        for layers in (LAYERS, STUDENT_LAYERS)
    )
    with torch.no_grad():
        teacher.model.norm.weight.fill_(12.0)  # distributions of some 2.7 nats, as a trained model has them
        for layer in teacher.model.layers[STUDENT_LAYERS:]:
            layer.self_attn.o_proj.weight.mul_(distance)
            layer.mlp.down_proj.weight.mul_(distance)
    student.load_state_dict(teacher.state_dict(), strict=False)
    return student, teacher


def compare(student, teacher, size: int, given: argparse.Namespace) -> tuple[dict[str, list[float]], float]:
    """Tokens per second of each way in each turn, and the share of the tokens that are replaced."""
    params = SamplingParams(max_new_tokens=given.response)
    ways = ["student", *map(str, given.blocks)]
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    replaced = 0
    for turn in range(-1, given.repeats):  # the first turn of each is not counted
        generator = torch.Generator().manual_seed(turn + 1)
        prompts = torch.randint(49152, (size, given.prompt), generator=generator).tolist()
        seeds = list(range(turn * size + size, turn * size + 2 * size))
        for name in ways:
            rows = slice(2 if turn < 0 else size)
            started = time.process_time()
            if name == "student":
                generate(student, prompts[rows], params, seeds=seeds[rows])
            else:
                speculation = Speculation(given.top_k, int(name))
                found = generate_corrected(student, teacher, prompts[rows], params, speculation, seeds=seeds[rows])
                replaced += sum(each.replaced for each in found) * (turn >= 0)
            if turn >= 0:
                speeds[name].append(size * given.response / (time.process_time() - started))
    return speeds, replaced / (len(given.blocks) * given.repeats * size * given.response)


if __name__ == "__main__":
    main()
