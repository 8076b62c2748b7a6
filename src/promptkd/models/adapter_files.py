"""What the folder of a saved adapter says of its base, so that the adapter loads from anywhere to what was trained.

An adapter that was trained on a merged model belongs to weights that no folder holds. It is saved joined with what was
merged: one LoRA adapter of the base that both came from, of the sum of their ranks, which every tool loads.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from promptkd.engine import unwrap_peft
from promptkd.io.files import read_json_object
from promptkd.models.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from promptkd.models.merge import Updates, base_name, is_low_rank, joined, merged_parts
from promptkd.models.source import BASE_NOTE, absolute_name

_PREFIX = "base_model.model."
_PER_MODULE = {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "exclude_modules": None}
_PER_LAYER = {"layers_to_transform": None, "layers_pattern": None}


def can_join(model: PeftModel) -> bool:
    """Whether the adapter of `model` can be saved as an adapter of a model that some folder or the hub holds."""
    merged = merged_parts(model)
    if merged is None:
        return base_name(model) is not None
    return merged.updates is not None and bool(merged.source.base) and is_low_rank(model.active_peft_config)


def name_base(model: PeftModel) -> None:
    """Let the adapters of `model` name their base so that it is found from any working directory."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = base_name(model) or ""


def note_base(folder: Path, model: nn.Module, *, place: Path | None = None) -> None:
    """Write beside an adapter in `folder`, which will lie at `place`, where its base is and what was merged into it."""
    name, merged = _named(folder), merged_parts(model)
    note: dict[str, Any] = {"base_model": name}
    if name and Path(name).is_dir():
        note["relative_path"] = os.path.relpath(name, place or folder)
    if merged is not None:
        note["note"] = f"It was trained on a merged model: {merged.told}."
    (folder / BASE_NOTE).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")


def join_saved(folder: Path, model: PeftModel) -> None:
    """Make of the adapter of `model` that was saved in `folder` one of the base that `merged_parts` tells of."""
    merged = merged_parts(model)
    if merged is None or not can_join(model):
        return
    assert merged.updates is not None
    both = joined(merged.updates, _saved_updates(folder, model))
    rank = max(a.shape[0] for a, _ in both.values())
    tensors: dict[str, Tensor] = {}
    embeddings = {name for name, each in unwrap_peft(model).named_modules() if _is_embedding(each)}
    for name, (a, b) in both.items():
        # one rank for all, filled up with zeros: tools differ in how they read a pattern of ranks
        a = torch.cat([a, a.new_zeros(rank - a.shape[0], a.shape[1])])
        b = torch.cat([b, b.new_zeros(b.shape[0], rank - b.shape[1])], dim=1)
        first, second = ("embedding_A", "embedding_B") if name in embeddings else ("A.weight", "B.weight")
        tensors |= {f"{_PREFIX}{name}.lora_{first}": a.contiguous(), f"{_PREFIX}{name}.lora_{second}": b.contiguous()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, {"format": "pt"})
    settings = read_json_object(folder / ADAPTER_CONFIG) | _PER_MODULE | _PER_LAYER
    settings |= {"r": rank, "lora_alpha": rank, "target_modules": _targets(model, both)}
    settings |= {"base_model_name_or_path": absolute_name(merged.source.base), "revision": merged.source.revision}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")


def _saved_updates(folder: Path, model: PeftModel) -> Updates:
    """What the saved adapter adds: its tensors are whole, also where those of `model` are shards."""
    saved, adapter = load_file(folder / ADAPTER_WEIGHTS), model.active_adapter
    found = {}
    for name, layer in unwrap_peft(model).named_modules():
        if isinstance(layer, LoraLayer) and adapter in layer.scaling:
            a, b = (next(saved[key] for key in _keys(name, which) if key in saved) for which in "AB")
            found[name] = a.float(), b.float() * layer.scaling[adapter]
    return found


def _keys(name: str, which: str) -> tuple[str, str]:
    return f"{_PREFIX}{name}.lora_{which}.weight", f"{_PREFIX}{name}.lora_embedding_{which}"


def _targets(model: PeftModel, updates: Updates) -> list[str]:
    """The last parts of the modules' names, as tools expect; their whole names where others end so too."""
    ends = {name.rpartition(".")[2] for name in updates}
    kinds = (nn.Linear, nn.Embedding, LoraLayer)
    alike = {
        name
        for name, each in unwrap_peft(model).named_modules()
        if name.rpartition(".")[2] in ends and (isinstance(each, kinds) or type(each).__name__ == "Conv1D")
    }
    return sorted(ends if alike <= updates.keys() else updates)


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module.get_base_layer() if isinstance(module, LoraLayer) else module, nn.Embedding)


def _named(folder: Path) -> str:
    return str(read_json_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "")
