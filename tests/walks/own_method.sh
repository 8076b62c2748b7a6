#!/bin/bash
# A method and a metric of one's own, from two files to a LaTeX table: docs/extending.md, docs/studies.md, docs/report.md.
# In a folder with student/, teacher/, train.jsonl, valid.jsonl and test.jsonl. PROMPTKD is the command (promptkd),
# FLAGS are further settings of each run, as YAML.
set -euo pipefail
PROMPTKD=${PROMPTKD:-promptkd}

cat > mine.py <<'END'
from promptkd.methods import Method
from promptkd.models.adapters import SoftPromptFactory
from promptkd.objectives.divergences import shared_log_probs
from promptkd.responses import ResponseMix


def hellinger(share=0.5):
    """The squared Hellinger distance on responses of which the student writes a share."""

    def distance(student_logits, teacher_logits):
        log_q, log_p = shared_log_probs(student_logits, teacher_logits)
        return 1 - (0.5 * (log_q + log_p)).exp().sum(-1)

    return Method(ResponseMix(share), distance, SoftPromptFactory)


def first_letter(prediction, references):
    return 100.0 * any(prediction[:1] == reference[:1] for reference in references)
END

cat > study.yaml <<END
out: runs/study
base: {student: student, teacher: teacher, data: train.jsonl, eval_data: valid.jsonl${FLAGS:+, $FLAGS}}
methods:
  - kd
  - {name: own, method: "mine.py:hellinger", method_settings: {share: 1.0}}
seeds: [1, 2]   # five for a paper
evaluate: {data: [test.jsonl], seeds: [10], metrics: ["mine.py:first_letter"]}
metrics: [rouge_l, kl_to_teacher, "own:first_letter"]
END

$PROMPTKD study study.yaml
$PROMPTKD report runs/study --out table.tex --figures figures
$PROMPTKD compare runs/study --baseline own --out compared.json
