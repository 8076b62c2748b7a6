#!/bin/bash
# The demo, and what it says to try next.
set -euo pipefail
: "${LAYERS:=24}" "${STEPS:=40}" "${TOKENS:=64}"

promptkd demo --out runs/demo --layers $LAYERS --steps $STEPS
promptkd chat runs/demo --prompt 'Name three rivers in Europe.' --max-completion-length $TOKENS
promptkd export runs/demo --to gguf --out runs/demo.gguf
promptkd report runs/demo --out demo.md
promptkd demo --out runs/demo-seed1 --seed 1 --layers $LAYERS --steps $STEPS
promptkd report runs/demo runs/demo-seed1 --out seeds.html
