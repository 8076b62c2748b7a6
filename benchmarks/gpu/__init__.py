"""One prepared run on a GPU: which results are correct there, what they cost, and what other implementations cost.

    python -m benchmarks.gpu                              # all parts, at most 8 minutes
    python -m benchmarks.gpu --parts losses rollouts      # or --parts 2 6
    python -m benchmarks.gpu --device cpu --tiny          # the same code on shapes that a CPU takes seconds for

Models have random weights, so nothing is downloaded. Each part has its own time limit. If it fails or runs out of time,
the other parts still run. Results are printed at once, and the JSON file is rewritten after every part. `docs/gpu.md`
says what the parts measure, and what has been measured on which card.

A part is a module here with a function `run(bench)`. `parts.py` lists the parts, and `targets.py` lists their targets.
"""
