"""PromptKD (Kim, Jang, Yang 2024, arXiv 2402.12842) in plain PyTorch and transformers, complete.

    promptkd recipe minimal_loop > minimal_loop.py
    python minimal_loop.py TEACHER STUDENT requests.txt

`requests.txt` has one prompt per line. The student is trained in place and saved to ./student. The library computes the
same losses on the same responses (tests/training/test_trainer.py). It adds accumulation, processes, packing and
records.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT_TEXT, PROMPT_LENGTH = "Suppose you are a student.", 7


def start_prompt(teacher, tokenizer):
    """(n, E) embeddings of the initial text, cut or repeated to n vectors, without special tokens."""
    ids = tokenizer(PROMPT_TEXT, add_special_tokens=False)["input_ids"]
    ids = (ids * PROMPT_LENGTH)[:PROMPT_LENGTH]
    return teacher.get_input_embeddings()(torch.tensor(ids)).detach().clone().requires_grad_()


@torch.no_grad()
def sample(student, prompt_ids, eos, limit):
    """One response from the student at temperature 1, with its EOS if it writes one."""
    response = []
    while len(response) < limit and (not response or response[-1] != eos):
        logits = student(torch.tensor([prompt_ids + response])).logits[0, -1]
        response.append(torch.multinomial(logits.softmax(-1), 1).item())
    return response


def response_log_probs(model, prompt_ids, response, soft_prompt=None):
    """(len(response), V) log-probabilities of the tokens that answer `prompt_ids`, with explicit positions."""
    embedded = model.get_input_embeddings()(torch.tensor([prompt_ids + response]))
    n = 0
    if soft_prompt is not None:
        n = len(soft_prompt)
        embedded = torch.cat([soft_prompt[None], embedded], dim=1)
    positions = torch.arange(embedded.shape[1])[None]
    logits = model(inputs_embeds=embedded, position_ids=positions).logits[0]
    first = n + len(prompt_ids) - 1  # the position that predicts the first response token
    return logits[first : first + len(response)].log_softmax(-1)


def kl(log_a, log_b):
    """KL(a || b), summed over the response tokens."""
    return (log_a.exp() * (log_a - log_b)).sum()


def step(teacher, student, soft_prompt, prompt_optimizer, optimizer, batch, k, steps, coefficient=1.0):
    """One optimizer step on `batch`, pairs of prompt and response ids. Returns the two losses as means over tokens."""
    tokens = sum(len(response) for _, response in batch)
    weight = coefficient * (1 - k / steps)

    # The soft prompt pulls the teacher towards the student, and the λ term keeps it close to the original teacher.
    prompt_loss = torch.tensor(0.0)
    for prompt_ids, response in batch:
        prompted = response_log_probs(teacher, prompt_ids, response, soft_prompt)
        with torch.no_grad():
            plain = response_log_probs(teacher, prompt_ids, response)
            target = response_log_probs(student, prompt_ids, response)
        prompt_loss = prompt_loss + (kl(prompted, target) + weight * kl(prompted, plain)) / tokens
    prompt_optimizer.zero_grad()
    prompt_loss.backward()
    torch.nn.utils.clip_grad_norm_([soft_prompt], 1.0)
    prompt_optimizer.step()

    # The student learns the distribution of the teacher with the updated prompt, by reverse KL.
    student_loss = torch.tensor(0.0)
    for prompt_ids, response in batch:
        with torch.no_grad():
            prompted = response_log_probs(teacher, prompt_ids, response, soft_prompt)
        student_loss = student_loss + kl(response_log_probs(student, prompt_ids, response), prompted) / tokens
    optimizer.zero_grad()
    student_loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    return prompt_loss.item(), student_loss.item()


def main(teacher_name, student_name, requests_file, steps=100, batch_size=4, limit=64):
    tokenizer = AutoTokenizer.from_pretrained(teacher_name)
    teacher = AutoModelForCausalLM.from_pretrained(teacher_name, dtype=torch.float32).eval().requires_grad_(False)
    student = AutoModelForCausalLM.from_pretrained(student_name, dtype=torch.float32).eval()  # eval: no dropout
    with open(requests_file, encoding="utf-8") as file:
        prompts = [tokenizer(line.rstrip("\n"))["input_ids"] for line in file if line.strip()]
    soft_prompt = start_prompt(teacher, tokenizer)
    prompt_optimizer = torch.optim.AdamW([soft_prompt], lr=1e-3, weight_decay=0.0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-5, weight_decay=0.0)
    for k in range(steps):
        chosen = [prompts[i] for i in torch.randint(len(prompts), (batch_size,)).tolist()]
        batch = [(prompt_ids, sample(student, prompt_ids, tokenizer.eos_token_id, limit)) for prompt_ids in chosen]
        losses = step(teacher, student, soft_prompt, prompt_optimizer, optimizer, batch, k, steps)
        print(f"step {k + 1}/{steps}: prompt loss {losses[0]:.3f}, student loss {losses[1]:.3f}", flush=True)
    student.save_pretrained("student")
    tokenizer.save_pretrained("student")


if __name__ == "__main__":
    main(*sys.argv[1:4])
