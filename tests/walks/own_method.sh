#!/bin/bash
# A method and a metric of one's own, in a study, to a LaTeX table.
# Run it in a folder with the models student/ and teacher/, the rows train.jsonl, valid.jsonl and test.jsonl, and the
# files mine.py and study.yaml that lie beside this script.
set -euo pipefail
: "${STEPS:=300}" "${BATCH:=16}" "${TOKENS:=256}"

promptkd distill --method mine.py:hellinger --method_settings '{"sharpness": 2}' --student student --teacher teacher \
    --data train.jsonl --eval-data valid.jsonl --out runs/first --max_steps $STEPS --per_device_train_batch_size $BATCH \
    --max_completion_length $TOKENS
promptkd evaluate --model runs/first --data test.jsonl --metrics mine.py:answers_briefly --out results/first.json \
    --max-completion-length $TOKENS
promptkd study study.yaml --out runs/study --dry-run
promptkd study study.yaml --out runs/study
promptkd compare runs/study --baseline kd --metrics rouge_l --out results/comparison.json
promptkd report runs/study --out paper/table.tex --figures paper/figures
