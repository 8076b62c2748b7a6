"""`promptkd export`."""

import time
from pathlib import Path
from typing import Any

import torch

from promptkd.cli.options.export import Options
from promptkd.cli.outputs import check_output, check_replaceable, check_writable, label_of, refuse_foreign
from promptkd.cli.terminal import quiet_libraries, say
from promptkd.cli.trained_template import as_trained
from promptkd.errors import RequestError, writing
from promptkd.io.atomic import atomic, write_atomic
from promptkd.models import count_parameters, merged_parts
from promptkd.models.export import export_gguf, export_safetensors, plain_model
from promptkd.models.modelfile import modelfile

_OWN = (
    *("config.json", "generation_config.json", "chat_template.jinja", "special_tokens_map.json", "vocab.json"),
    *("model*.safetensors", "model.safetensors.index.json", "tokenizer*", "merges.txt", "*.py"),
)


def run(options: Options, training: dict[str, Any]) -> None:
    _check(options)
    quiet_libraries()
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[options.dtype]
    trusted = options.trust_remote_code
    model, tokenizer = plain_model(options.model, trust_remote_code=trusted)
    tokenizer = as_trained(tokenizer, options.model)
    if merged := merged_parts(model):
        say(f"{options.model} is {merged.told}.")
    for_ollama = ""
    if options.to == "gguf":
        for_ollama = modelfile(options.out.name, model, tokenizer)
    started = time.monotonic()
    with writing(options.out), atomic(options.out) as partial:
        if options.to == "gguf":
            found = export_gguf(partial, model, tokenizer, dtype, title=label_of(options.model))
        else:
            found = export_safetensors(partial, model, tokenizer, dtype, trust_remote_code=trusted)
    seconds = time.monotonic() - started
    if for_ollama:
        write_atomic(_modelfile(options), for_ollama)
    files = [each for each in options.out.rglob("*") if each.is_file()] or [options.out]
    size = sum(each.stat().st_size for each in files) / 1e6
    say(f"{options.out}: {count_parameters(model):,} parameters in {options.dtype}, {size:,.1f} MB, {seconds:.1f} s.")
    apart = f"by at most {found.difference:.1g} (limit {found.limit:.1g})"
    same = f"{found.texts} texts are cut into the same tokens"
    say(f"Read back, the logits of {found.tokens} tokens differ from the model's {apart}, and {same}.")
    if found.rounding > 0:
        moved = f"Storing the weights in {options.dtype} moved a logit by at most {found.rounding:.1g}"
        kept = f"{found.same_choices} of {found.tokens} most probable next tokens as they were"
        say(f"{moved} and left {kept}.")
    if for_ollama:
        has_template = "\nTEMPLATE" in for_ollama
        template = "with the prompt's template" if has_template else "without a template (the file says why)"
        say(f"For Ollama, {template}: ollama create {options.out.stem} -f {_modelfile(options)}")


def _modelfile(options: Options) -> Path:
    return options.out.with_suffix(".Modelfile")


def _check(options: Options) -> None:
    out, source = options.out, Path(options.model).expanduser()
    if out.resolve() in {(source / inside).resolve() for inside in ("", "student", "model")}:
        raise RequestError(f"--out must be another place than the model's own, {out}.")
    if options.to == "gguf":
        if out.suffix != ".gguf":
            raise RequestError(f"With --to gguf, --out must be a file that ends in .gguf. Got {out}.")
        check_output(out, overwrite=options.overwrite)
        check_output(_modelfile(options), overwrite=options.overwrite)
        return
    if out.is_file():
        raise RequestError(f"With --to safetensors, --out must be a folder. {out} is a file.")
    check_replaceable(out)
    check_writable(out.parent, out)
    held = sorted(each.name for each in out.iterdir()) if out.is_dir() else []
    if held and not options.overwrite:
        raise RequestError(f"{out} is not empty. Replace the model in it by --overwrite or give another --out.")
    refuse_foreign(out, [name for name in held if not any(map(Path(name).match, _OWN))], "an exported model")
