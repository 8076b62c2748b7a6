"""One prepared run on a GPU: what is right there, what it costs, and what it costs others.

    python -m benchmarks.gpu                              # all parts, at most 8 minutes
    python -m benchmarks.gpu --parts losses rollouts      # or --parts 2 6
    python -m benchmarks.gpu --device cpu --tiny          # the same code on shapes that a CPU takes seconds for

Models have random weights, so nothing is downloaded. Each part has a time limit of its own, ends alone if it fails or
runs out of time, and prints what it finds at once; the JSON file is written again after every part. `docs/gpu.md` says
what the parts measure, and which of it has been measured on which card.

A part is a module here with a function `run(bench)`; `parts.py` lists them, `targets.py` what they are held to.
"""
