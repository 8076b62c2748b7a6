#!/bin/bash
# The demo, and what it says to try next.
set -euo pipefail

promptkd demo --out runs/demo
promptkd report runs/demo --out demo.md
promptkd export runs/demo --to gguf --out student.gguf
promptkd evaluate --model runs/demo --data "$ROWS" --out results/demo.json
