"""The model card, README.md, from the record of a run and those of its evaluations."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from promptkd.publish.bundle import holds_a_path, without_folders
from promptkd.publish.origin import hub_origin, is_local
from promptkd.report.formatting import decoding_words, estimate, joined, listed, millions
from promptkd.report.labels import is_teacher, unified
from promptkd.report.metrics import in_order, metric_info
from promptkd.report.text import markdown_table, markdown_text
from promptkd.report.verdict import verdict_of
from promptkd.results import DataRecord, Evaluation, Results
from promptkd.training.own_teacher import is_own
from promptkd.training.teachers import teacher_and_place
from promptkd.visible import visible

_OF_THE_MACHINE = {  # settings that say where and how a run ran, not what it computed
    *("out", "student", "teacher", "model", "data", "eval_data", "keep", "select", "limit", "eval_limit", "method"),
    *(
        "merge",
        "report_to",
        "use_cpu",
        "config",
        "resume",
        "overwrite",
        "dry_run",
        "logging_dir",
        "run_name",
        "disable_tqdm",
    ),
}
_CHATTER = ("Before training:", "Speed:", "Peak memory")  # notes on the run that say nothing of the model
_DONE = {"distill": "distilled", "sft": "tuned on the responses of a data set", "prune": "pruned"}


@dataclass(frozen=True)
class Published:
    """What is published, beside what the records say."""

    repository: str
    """OWNER/NAME."""
    kind: Literal["student", "adapter", "prompt"]
    license: str
    """The hub's identifier of a license."""
    base: str | None
    """For an adapter or a prompt: the hub's name of the model that it belongs to."""
    template: Literal["chat", "alpaca", "jinja"]
    """How prompts were written."""
    gguf: bool = True
    """Whether `promptkd export` writes it as GGUF, so far as its files tell."""
    evaluations: Sequence[Results] = field(default_factory=list)
    """Further records in which the model was measured."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Of the options of the command that made the model: no setting that was given."""


def model_card(record: Results, published: Published) -> str:
    """README.md with its header for the hub; it names no folder of this machine."""
    bases = _bases(record, published)
    header: dict[str, Any] = {"license": published.license, "pipeline_tag": "text-generation"}
    header["library_name"] = "transformers" if published.kind == "student" else "peft"
    if bases:
        header |= {"base_model": bases}
        if published.kind != "student":
            header["base_model_relation"] = "adapter"
        elif len(bases) == 1:
            header["base_model_relation"] = "finetune"
    if named := [name for each in record.data.values() if (name := _hub_data(each))]:
        header["datasets"] = list(dict.fromkeys(named))
    header["tags"] = ["promptkd", "distillation" if record.kind == "distill" else record.kind]
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---",
        f"# {markdown_text(published.repository.split('/')[-1])}",
        _lead(record, published),
        "## How it was made\n\n" + _making(record, published.defaults),
        "## Data\n\n" + _data(record),
        "## What was measured\n\n" + _measured([record, *published.evaluations]),
        "## How to load it\n\n" + _loading(published),
        f"## License\n\n{published.license}. The licenses of the models and data that it was made from apply as well.",
    ]
    return "\n\n".join(parts) + "\n"


def shown_name(name: str) -> str:
    """A model or data set as a card may name it: by its hub name, else by the last part of its path."""
    if not is_local(name):
        return name
    origin, own = hub_origin(name), Path(name).name
    return f"{own} (a local model made from {origin})" if origin else f"{own} (local)"


def _bases(record: Results, published: Published) -> list[str]:
    """Models of the hub that it was made from; of an adapter the one that it belongs to."""
    if published.base is not None:
        return [published.base]
    names = [record.config.get("student"), *_named_teachers(record), record.config.get("model")]
    return list(dict.fromkeys(found for name in names if isinstance(name, str) and (found := hub_origin(name))))


def _lead(record: Results, published: Published) -> str:
    method, teachers = _method(record), _named_teachers(record)
    named = [markdown_text(shown_name(each)) for each in teachers]
    teacher = f"the teacher{'s' * (len(named) > 1)} {listed(named)}" if named else ""
    of_teacher = f" of {teacher}" if teachers else ""
    if published.kind == "prompt":
        return (
            f"A soft prompt{of_teacher}, trained by promptkd's method `{method}`: before the request, it lets the "
            "teacher answer in a way that the student can learn. It is of use with that teacher alone."
        )
    what = "LoRA weights" if published.kind == "adapter" else "A language model"
    source = f" from {teacher}" if teachers else ""
    by = f" by promptkd's method `{method}`" if record.kind == "distill" else " by promptkd"
    return f"{what}, {_DONE.get(record.kind, 'made')}{source}{by}."


def _named_teachers(record: Results) -> list[str]:
    """The teachers that a run was given, by hub name or path; none where its teacher was made of the student."""
    given = record.config.get("teacher") or []
    named = [given] if isinstance(given, str) else list(map(str, given))
    if len(named) > 1:
        named = [teacher_and_place(each)[1] for each in named]
    return [each for each in named if not is_own(each)]


def _method(record: Results) -> str:
    known = list(record.training.values())
    return known[0].method if known else record.kind


def _making(record: Results, defaults: Mapping[str, Any]) -> str:
    start = record.config.get("student") or record.config.get("model")
    lines = [["Started from", shown_name(str(start))]] if start else []
    if teachers := _named_teachers(record):
        lines.append(["Teachers" if len(teachers) > 1 else "Teacher", listed(list(map(shown_name, teachers)))])
    elif "teacher" in record.models:
        lines.append(["Teacher", record.models["teacher"].about])
    for label in ("student", "model", "teacher"):
        if label in record.models:
            lines.append([f"Parameters of the {label}", millions(record.models[label].parameters)])
    lines.append(["Method", _method(record)])
    if recipe := _recipe(record.command):
        lines.append(["Recipe", recipe])
    if cost := next(iter(record.training.values()), None):
        lines.append(["Optimizer steps", f"{cost.steps:,}"])
    versions = [f"{name} {version}" for name, version in record.code.items() if version and name != "git_commit"]
    lines.append(["Versions", ", ".join(versions)])
    notes = [
        f"- {markdown_text(note)}" for note in record.notes if not (holds_a_path(note) or note.startswith(_CHATTER))
    ]
    table = markdown_table(["", ""], [list(map(markdown_text, line)) for line in lines])
    return joined(table, _settings(record.config, defaults), "\n".join(notes), by="\n\n")


def _recipe(command: Sequence[str]) -> str:
    """The recipe or file that --config named, without its folder; "" without one."""
    words = [word for each in command for word in (each.split("=", 1) if each.startswith("--config=") else [each])]
    return Path(words[words.index("--config") + 1]).name if "--config" in words[:-1] else ""


def _settings(config: dict[str, Any], defaults: Mapping[str, Any]) -> str:
    """The settings that were given, as YAML, but for those of the machine and those that name a folder of it."""
    told = {
        name: value
        for name, value in config.items()
        if name not in _OF_THE_MACHINE and value not in (None, "", [], {}) and not holds_a_path(str(value))
        if name not in defaults or value != defaults[name]
    }
    text = visible(yaml.safe_dump(told, sort_keys=False, allow_unicode=True))
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"Settings that were given; others are promptkd's defaults:\n\n{fence}yaml\n{text}{fence}" if told else ""


def _data(record: Results) -> str:
    if not record.data:
        return "The record names no data."
    lines = [
        [
            label,
            _data_name(each),
            f"{each.rows:,}",
            f"{each.dropped + each.cut:,}",
            each.sha256 or "not known (hub or folder)",
        ]
        for label, each in record.data.items()
    ]
    return markdown_table(
        ["Used for", "Data", "Rows", "Dropped", "SHA-256"], [list(map(markdown_text, line)) for line in lines]
    )


def _data_name(data: DataRecord) -> str:
    return Path(data.path).name if data.sha256 or is_local(data.path) else data.path


def _hub_data(data: DataRecord) -> str | None:
    name = data.path.partition(":")[0]
    return name if not data.sha256 and not is_local(name) and name.count("/") == 1 else None


def _measured(records: Sequence[Results]) -> str:
    """What the student keeps of its teacher; then a table per data set and decoding, with a column per model."""
    groups: dict[str, list[Evaluation]] = {}
    story = unified(records)
    for record in story:
        for each in record.evaluations:
            groups.setdefault(joined(each.data, decoding_words(each.decoding)), []).append(each)
    if not groups:
        return "Nothing was measured. `promptkd evaluate` measures it."
    verdict = verdict_of(story) if any(record.differences for record in story) else None
    parts = [] if verdict is None else [_told(joined(verdict.lead, *verdict.others, by=" "))]
    for setting, found in groups.items():
        by_model = {each.model: each for each in sorted(found, key=lambda each: is_teacher(each.model))}
        heads = ["Metric", *map(_told, by_model)]
        lines = []
        for name in in_order(metric for each in by_model.values() for metric in each.metrics):
            info, cells = metric_info(name), []
            for each in by_model.values():
                known = each.metrics.get(name)
                cells.append("–" if known is None else joined(*estimate(info, known), by=" "))
            label = joined(info.label, f"({info.unit})" if info.unit else "", by=" ")
            lines.append([markdown_text(label), *map(markdown_text, cells)])
        rows = max((each.rows for one in by_model.values() for each in one.metrics.values() if each.rows), default=0)
        parts += [f"On {_told(setting)}, {rows:,} rows:", markdown_table(heads, lines)]
    return "\n\n".join([*parts, "Square brackets: 95 % interval over rows, by bootstrap."])


def _told(text: str) -> str:
    """Labels are paths where names would be ambiguous: of these the last part."""
    return markdown_text(without_folders(text))


_ALPACA = (
    '"Below is an instruction that describes a task. Write a response that appropriately completes the request."\n'
    '    "\\n\\n### Instruction:\\nName a river.\\n\\n### Response:\\n"'
)
_TOKENIZED = 'ids = tokenizer(text, return_tensors="pt")'
_PROMPTS = {
    "chat": 'messages = [{"role": "user", "content": "Name a river."}]\n'
    "ids = tokenizer.apply_chat_template(\n"
    '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"\n)',
    "alpaca": f"text = (\n    {_ALPACA}\n)\n{_TOKENIZED}",
    "jinja": f'text = "Name a river."  # in the template of the training, above\n{_TOKENIZED}',
}


def _loading(published: Published) -> str:
    name, base = published.repository, published.base
    plain = "from transformers import AutoModelForCausalLM, AutoTokenizer"
    load = [plain, f'model = AutoModelForCausalLM.from_pretrained("{base or name}")']
    if published.kind != "student":
        load = ["from peft import PeftModel", *load, f'model = PeftModel.from_pretrained(model, "{name}")']
    tokens = f'tokenizer = AutoTokenizer.from_pretrained("{base if published.kind == "prompt" else name}")'
    run = ["print(tokenizer.decode(model.generate(**ids, max_new_tokens=64)[0], skip_special_tokens=True))"]
    blocks = ["```python\n" + "\n".join([*load, tokens, _PROMPTS[published.template], *run]) + "\n```"]
    short = name.split("/")[-1]
    if published.kind == "student":
        blocks += [f"vLLM:\n\n```bash\nvllm serve {name}\n```"]
        blocks += [_llama_cpp(name, short, name)] if published.gguf else []
    elif published.kind == "adapter":
        blocks.append(f"vLLM:\n\n```bash\nvllm serve {base} --enable-lora --lora-modules {short}={name}\n```")
        blocks.append(_llama_cpp(name, short, short))
    else:
        blocks.append("vLLM and llama.cpp load no soft prompts.")
    return "\n\n".join(blocks)


def _llama_cpp(name: str, short: str, source: str) -> str:
    fetch = f"hf download {name} --local-dir {short}\n" if source != name else ""
    export = f"promptkd export {source} --to gguf --out {short}.gguf"
    return f"llama.cpp:\n\n```bash\n{fetch}{export}\nllama-cli -m {short}.gguf\n```"
