"""Devices that save time or memory and change no result, and how to switch them off.

They are on. `PROMPTKD_OFF=packing,fused_head` in the environment switches some of them off, `PROMPTKD_OFF=all` every
one: to measure what a device is worth, or to rule it out where a figure looks wrong.
"""

import os

from promptkd.errors import RequestError

__all__ = ["DEVICES", "switched_on"]

VARIABLE = "PROMPTKD_OFF"
DEVICES = {
    "packing": "rows stand side by side in one sequence instead of being padded to the longest",
    "shared_prefixes": "on CPU, what several rows of a pack begin with is read once",
    "lean_layers": "on CPU, packs run through layers of Llama's family that are written out, with their backward",
    "row_cache": "decoding keeps keys and values in place, and reads prompts without padding",
    "prepacked": "decoding has the weights laid out anew for the processor",
    "lean_decoder": "on CPU, decoding runs the layers of Llama's family in a few joined operations",
    "fused_head": "head and divergence run over a few hundred tokens at a time, with a gradient worked out by hand",
    "onednn_head": "on CPU, full chunks of tokens are projected by oneDNN",
    "shared_passes": "the student's pass serves the prompt's step and its own",
    "split_prompt_pass": "on CPU the prompted teacher reads 1,536 tokens at a time, so that few activations are held",
    "kept_logits": "the student's logits of the prompt's step are kept for its own, within `keep_logits_mib`",
}


def switched_on(device: str) -> bool:
    """Whether one of `DEVICES` is on.

    Raises:
        RequestError: if the environment names a device that there is not.
    """
    off = {name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()}
    unknown = off - DEVICES.keys() - {"all"}
    if unknown:
        raise RequestError(
            f"{VARIABLE} takes all, or names among {', '.join(DEVICES)}, with commas between. "
            f"Got {', '.join(sorted(unknown))}."
        )
    return "all" not in off and device not in off
