"""`promptkd publish`."""

import re
from contextlib import ExitStack
from dataclasses import MISSING, fields
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from promptkd.cli.options.publish import Options
from promptkd.cli.parsing.fields import plain
from promptkd.cli.terminal import quiet_libraries, say
from promptkd.data.templates import TRAINED_ON
from promptkd.errors import RequestError, check_all
from promptkd.io.files import read_json_object
from promptkd.models.load import folder_sha256
from promptkd.publish import Bundle, Published, collect, hub_origin, model_card, upload
from promptkd.publish.bundle import names_a_place, refuse_leaks
from promptkd.publish.origin import is_local
from promptkd.publish.upload import hub_token
from promptkd.results import Results
from promptkd.visible import shown

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_MODELS = {"distill": "student", "sft": "model", "prune": ""}  # where the commands leave their models
_Template = Literal["chat", "alpaca", "jinja"]


def run(options: Options, training: dict[str, Any]) -> None:
    record, folder = _checked(options)
    evaluations = _evaluations(options, folder)
    adapter = _adapter(folder)
    base = None if adapter is None or options.merge else _base(options, record, folder, adapter)
    kind: Literal["student", "adapter", "prompt"] = "student" if base is None else "adapter"
    kind = "prompt" if options.prompt else kind
    token = hub_token()
    with ExitStack() as stack:
        if options.merge or options.dtype is not None:
            folder = _stored(folder, options, Path(stack.enter_context(TemporaryDirectory())))
        bundle = collect(folder, base=base, secrets=[] if token is None else [token])
        published = Published(
            repository=options.repository,
            kind=kind,
            license=options.license,
            base=base,
            gguf=kind != "student" or _can_be_gguf(folder),
            template=_template(record, options.run / _MODELS[record.kind], saved=kind != "prompt"),
            evaluations=evaluations,
            defaults=_defaults(record.kind),
        )
        card = model_card(record, published)
        if names_a_place(card):
            raise RequestError("The card would name a folder of this machine. Please report this with the record.")
        bundle.files["README.md"] = card.encode()
        refuse_leaks(bundle, [] if token is None else [token])
        _list(bundle, options)
        if options.dry_run:
            print(shown(f"\nREADME.md:\n\n{card}"), end="")
        else:
            address = upload(bundle, options.repository, private=options.private, overwrite=options.overwrite)
            say(f"Uploaded: {address}")


def _checked(options: Options) -> tuple[Results, Path]:
    """The run's record, and the folder that is uploaded."""
    quiet_libraries()
    checks = [
        (not _REPOSITORY.fullmatch(options.repository), f"the repository must be OWNER/NAME, got {options.repository}"),
        (
            not _LICENSE.fullmatch(options.license),
            f"--license must be an identifier of the hub such as apache-2.0 or other, got {options.license!r}",
        ),
        (options.prompt and (options.merge or options.dtype is not None), "--merge and --dtype are of the student"),
        (options.prompt and bool(options.results), "--results are of a student, which --prompt does not upload"),
        (options.base is not None and not _is_hub_name(options.base), f"--base must be OWNER/NAME, got {options.base}"),
    ]
    check_all("Cannot publish", checks)
    if not options.run.is_dir():
        raise RequestError(f"Expected the folder of a run. {options.run} is none.")
    file = options.run / "results.json"
    if not file.is_file():
        told = f"{options.run} holds no results.json, from which the card is made"
        raise RequestError(f"{told}. Give the folder of a finished run of distill or sft, or of a model of prune.")
    record = Results.read(file)
    if record.kind not in _MODELS:
        raise RequestError(f"{options.run} is of `{record.kind}`. Give a run of {', '.join(_MODELS)}.")
    folder = options.run / ("prompt" if options.prompt else _MODELS[record.kind])
    if not folder.is_dir():
        advice = f"The method {record.config.get('method')} trains none" if options.prompt else "Finish it by --resume"
        raise RequestError(f"{folder} does not exist. {advice}.")
    if (options.merge or (options.base is not None)) and _adapter(folder) is None:
        raise RequestError(f"{folder} is no adapter: leave --merge and --base out.")
    if options.dtype is not None and _adapter(folder) is not None and not options.merge:
        raise RequestError("--dtype stores the weights of a whole student. Give --merge with it.")
    return record, folder


def _defaults(command: str) -> dict[str, Any]:
    """Of a command's own options; of the training's, a record holds only those that were given."""
    options = import_module(f"promptkd.cli.options.{command}").Options
    return {each.name: plain(each.default) for each in fields(options) if each.default is not MISSING}


def _adapter(folder: Path) -> dict[str, Any] | None:
    file = folder / "adapter_config.json"
    return read_json_object(file) if file.is_file() else None


def _is_hub_name(name: str) -> bool:
    return _REPOSITORY.fullmatch(name) is not None and not is_local(name)


def _base(options: Options, record: Results, folder: Path, adapter: dict[str, Any]) -> str:
    """The hub's name of what an adapter belongs to."""
    if options.base is not None:
        return options.base
    known, role = str(adapter.get("base_model_name_or_path")), "teacher" if options.prompt else "student"
    given = str(record.config.get(role) or record.config.get("model"))
    # an adapter on an adapter is one of the first one's base
    if not is_local(known) and (known == given or not is_local(given) or known == hub_origin(given)):
        return known
    what = "soft prompt" if options.prompt else "adapter"
    told = (
        f"The {what} in {folder} belongs to {Path(known).name}, a model of this machine, without which nobody loads it"
    )
    made = f" (it was made from {origin}, and is not that)" if (origin := hub_origin(given)) else ""
    advice = "Publish that model too and name it by --base OWNER/NAME"
    raise RequestError(f"{told}{made}. {advice}{'' if options.prompt else ', or give --merge'}.")


def _evaluations(options: Options, folder: Path) -> list[Results]:
    """Further records, each of which must have measured these very weights."""
    if not options.results:  # a soft prompt has no such hash, nor an adapter whose base is gone
        return []
    own, records = folder_sha256(folder), []
    for path in options.results:
        record = Results.read(path / "results.json" if path.is_dir() else path)
        if not record.evaluations:
            raise RequestError(f"{path} holds no evaluation.")
        if not record.models:  # of judge, which reads answers alone
            told = f"{path} is of `{record.kind}` and names no weights, so it does not say whether it is of this model"
            raise RequestError(f"{told}. Give a record of evaluate or compare.")
        if own not in {each.sha256 for each in record.models.values()}:
            raise RequestError(
                f"{path} measured other models than the one in {folder}: leave it out, or measure again."
            )
        records.append(record)
    return records


def _template(record: Results, model: Path, *, saved: bool) -> _Template:
    """How prompts were written: by the run's setting, and "auto" by what the model's tokenizer says.

    `saved`: whether the card's code loads that tokenizer.
    """
    given = str(record.config.get("template", "auto"))
    settings = model / "tokenizer_config.json"
    held = read_json_object(settings) if settings.is_file() else {}
    has_chat_template = bool(held.get("chat_template")) or (model / "chat_template.jinja").is_file()
    if given in ("chat", "teacher") or (saved and TRAINED_ON in held and has_chat_template):  # which writes the same
        return "chat"
    given = str(held.get(TRAINED_ON, given)) if given == "auto" else given
    if given == "alpaca":
        return "alpaca"
    if given != "auto" or not settings.is_file():
        return "jinja"
    return "chat" if has_chat_template else "alpaca"


def _can_be_gguf(folder: Path) -> bool:
    from promptkd.models.export import can_write_gguf

    try:
        return can_write_gguf(folder)
    except RequestError:  # of code that the model ships, which nobody trusts here
        return False


def _stored(folder: Path, options: Options, place: Path) -> Path:
    """The model whole, in the type that was asked for, read back and compared, in `place`."""
    import torch

    from promptkd.models.export import export_safetensors, plain_model

    model, tokenizer = plain_model(str(folder))
    types = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, None: torch.float32}
    export_safetensors(place, model, tokenizer, types[options.dtype])
    return place


def _list(bundle: Bundle, options: Options) -> None:
    visibility = "a private repository" if options.private else "a public repository"
    begun = "Would upload" if options.dry_run else "Uploading"
    print(f"{begun} to {options.repository}, {visibility} if it is new:")
    for name in sorted(bundle.files):
        print(f"  {bundle.size(name):>15,}  {name}")
    for note in bundle.rewritten:
        print(shown(note))
    if bundle.left_out:
        print(shown(f"Left out: {', '.join(bundle.left_out)}."))
