#!/bin/bash
# From a LoRA-tuned teacher to a student that transformers and vLLM load, and to a GGUF file.
# Run it in a folder with the model base/ and the rows train.jsonl, valid.jsonl and test.jsonl.
set -euo pipefail
: "${STEPS:=300}" "${BATCH:=16}" "${TOKENS:=256}" "${LAYERS:=20}"

promptkd sft --model base --lora-rank 16 --learning_rate 1e-4 --data train.jsonl --eval-data valid.jsonl \
    --out runs/teacher --max_steps $STEPS --per_device_train_batch_size $BATCH \
    --max_completion_length $TOKENS
promptkd prune --model runs/teacher --layers $LAYERS --data train.jsonl --out runs/pruned
promptkd distill --method kd --student runs/pruned --teacher runs/teacher --data train.jsonl --eval-data valid.jsonl \
    --out runs/kd --max_steps $STEPS --per_device_train_batch_size $BATCH \
    --max_completion_length $TOKENS
promptkd distill --config promptkd --student runs/kd --teacher runs/teacher --data train.jsonl --eval-data valid.jsonl \
    --out runs/promptkd --max_steps $STEPS --per_device_train_batch_size $BATCH \
    --max_completion_length $TOKENS --student-lora-rank 16
promptkd distill --out runs/promptkd --resume

promptkd evaluate --model runs/promptkd --teacher runs/teacher --data test.jsonl --seeds 10 20 --out results/promptkd.json \
    --max-completion-length $TOKENS
promptkd evaluate --model runs/kd --teacher runs/teacher --data test.jsonl --seeds 10 20 --out results/kd.json \
    --max-completion-length $TOKENS
promptkd compare results/kd.json results/promptkd.json --out results/comparison.json
promptkd report results/kd.json results/promptkd.json results/comparison.json --out results/page.html

promptkd export runs/promptkd --to safetensors --out serve/student --dtype bf16
promptkd export runs/promptkd --to gguf --out serve/student.gguf
promptkd evaluate --model serve/student.gguf --data test.jsonl --out results/gguf.json \
    --max-completion-length $TOKENS
promptkd publish runs/promptkd someone/student --license apache-2.0 --results results/promptkd.json --merge --dry-run
