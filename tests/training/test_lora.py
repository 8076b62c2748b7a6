"""LoRA folders and `PeftModel`s as student and teacher: what a step computes, what is saved, and how it goes on."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from helpers.tiny import save_model, tiny_tokenizer
from helpers.trainers import config, log, pair, rows
from promptkd.data.batch import right_pad
from promptkd.engine import response_hidden
from promptkd.errors import RequestError
from promptkd.methods import named_method
from promptkd.models import load_adapted, load_model, merged_parts
from promptkd.models.merge import base_name, has_adapter
from promptkd.models.prune import prune_layers
from promptkd.training import DistillTrainer, FinetuneConfig, FinetuneTrainer
from promptkd.training.callbacks import quiet

pytestmark = pytest.mark.slow
BATCH = right_pad([[1, 2, 3], [4]], [[4, 5], [6, 7, 8]])


def lora(**settings):
    return LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **{"r": 2, **settings})


def states(model):
    with torch.no_grad():
        return response_hidden(model.eval(), BATCH)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Student and teacher as LoRA folders, and the same models merged by hand."""
    place, made = tmp_path_factory.mktemp("models"), {}
    for seed, (name, model) in enumerate(zip(("student", "teacher"), pair(), strict=True)):
        base = load_model(save_model(place / f"{name}-base", model))
        torch.manual_seed(seed)
        wrapped = get_peft_model(base, lora(init_lora_weights=False))
        wrapped.save_pretrained(place / name)
        made[name] = str(place / name)
        made[f"whole {name}"] = str(save_model(place / f"{name}-whole", wrapped.merge_and_unload()))
        made[f"{name} base"] = str(place / f"{name}-base")
    return made


def distiller(folder, student, teacher, *, method="promptkd", peft_config=None, **settings):
    if named_method(method).adapter is None:
        settings["prompt_learning_rate"] = 1e-3  # the default: nothing reads it
    if method in ("promptkd-lora", "okd"):
        settings["adapter_rank"] = 2
    tokenizer = tiny_tokenizer()
    args = config(folder, method=method, **settings)
    models, known = (student, teacher), {"teacher_processing_class": tokenizer, "peft_config": peft_config}
    made = DistillTrainer(*models, args, rows(), None, tokenizer, **known)
    quiet(made)
    return made


def first_step(folder, *models, **settings):
    made = distiller(folder, *models, max_steps=1, **settings)
    made.train()
    return log(made)[0]


# one for each adapter, and for each way to ask student and teacher
MERGED = ("promptkd", "promptkd-lora", "promptkd-full", "okd", "kd", "distillm2", "skd", "opsd")


@pytest.mark.parametrize(("method", "beside"), [("promptkd", False), *((method, True) for method in MERGED)])
def test_the_first_step_is_that_of_the_models_merged_by_hand(folders, tmp_path, method, beside):
    settings = {"method": method, "peft_config": lora() if beside else None}
    expected = first_step(tmp_path, folders["whole student"], folders["whole teacher"], **settings)
    assert first_step(tmp_path, folders["student"], folders["teacher"], **settings) == expected


@pytest.mark.parametrize("method", ["promptkd", "promptkd-full"])
def test_peft_models_in_memory_are_those_models_too(folders, tmp_path, method):
    expected = first_step(tmp_path, folders["whole student"], folders["whole teacher"], method=method)
    models = [
        PeftModel.from_pretrained(load_model(folders[f"{role} base"]), folders[role]) for role in ("student", "teacher")
    ]
    got = first_step(tmp_path, *models, method=method)
    assert got == pytest.approx(expected, rel=1e-4)


def test_with_its_adapter_off_a_lora_teacher_is_exactly_the_tuned_one(folders, tmp_path):
    whole = states(load_model(folders["whole teacher"]))
    base = load_model(folders["teacher base"])
    for teacher in (folders["teacher"], PeftModel.from_pretrained(base, folders["teacher"])):
        made = distiller(tmp_path, folders["student"], teacher, method="promptkd-lora", prompt_learning_rate=0.1)
        made.train()
        with made.teacher.without_adapter():
            assert torch.equal(states(made.teacher.model), whole)
        adapted = states(made.teacher.model)
        assert (adapted - whole).abs().max() > 1e-3
    made.save_adapter(tmp_path / "run")  # its base is named by no folder: it was merged in memory
    made = distiller(tmp_path, folders["student"], folders["teacher"], method="promptkd-lora", prompt_learning_rate=0.1)
    made.train()
    made.save_adapter(tmp_path / "run")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "teacher_lora")
    torch.testing.assert_close(states(loaded), states(made.teacher.model), rtol=0, atol=1e-4)


def test_a_new_adapter_starts_from_the_folders_and_is_saved_with_it(folders, tmp_path, monkeypatch):
    made = distiller(tmp_path / "run", folders["student"], folders["teacher"], peft_config=lora(r=3))
    told = f"{folders['student base']} with {folders['student']} (LoRA of rank 2) merged into its weights"
    assert f"The student is {told}." in made.notes
    assert f"saved joined with that as one adapter of {folders['student base']}" in made.notes[-1]
    assert torch.equal(states(made.model), states(load_model(folders["student"])))
    made.train()
    made.save_student(tmp_path / "saved")
    monkeypatch.chdir(tmp_path)
    for loaded in (load_model("saved"), AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved")):
        torch.testing.assert_close(states(loaded), states(made.model), rtol=0, atol=1e-4)
    made.adapter.save(tmp_path / "prompt", made.teacher.model)
    note = json.loads((tmp_path / "prompt" / "base_model.json").read_text())
    assert "merged model" in note["note"]
    assert folders["teacher base"] in note["note"]
    assert note["base_model"] == folders["teacher"]


def test_a_folders_own_adapter_goes_on(folders, tmp_path):
    student = load_adapted(folders["student"])
    made = distiller(tmp_path / "run", student, folders["teacher"])
    before = states(made.model)
    made.train()
    made.save_student(tmp_path / "saved")
    assert (states(made.model) - before).abs().max() > 1e-3
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(states(loaded), states(made.model), rtol=0, atol=1e-4)
    saved = loaded.active_peft_config
    assert (saved.r, saved.base_model_name_or_path) == (2, folders["student base"])


@pytest.mark.parametrize("given", ["frozen", "beside a new one", "loaded by transformers"])
def test_an_adapter_that_does_not_train_is_merged(folders, tmp_path, given):
    expected = states(load_model(folders["student"]))
    if given == "loaded by transformers":
        student = AutoModelForCausalLM.from_pretrained(folders["student"])
    else:
        student = PeftModel.from_pretrained(load_model(folders["student base"]), folders["student"])
    made = distiller(tmp_path, student, folders["teacher"], peft_config=lora() if given == "beside a new one" else None)
    torch.testing.assert_close(states(made.model), expected, rtol=1e-4, atol=1e-4)
    assert has_adapter(made.model) == (given == "beside a new one")
    made.train()
    made.save_student(tmp_path / "saved")
    torch.testing.assert_close(states(load_model(tmp_path / "saved")), states(made.model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("why", ["no folder holds its base", "it was merged from more than LoRA weights"])
def test_a_lora_student_is_saved_whole_where_no_adapter_could_tell_what_it_is(folders, tmp_path, why):
    student, _ = pair()
    if why != "no folder holds its base":
        torch.manual_seed(0)
        dora = lora(use_dora=True, init_lora_weights=False)
        get_peft_model(load_model(folders["student base"]), dora).save_pretrained(tmp_path / "dora")
        student = str(tmp_path / "dora")
    made = distiller(tmp_path / "run", student, folders["teacher"], peft_config=lora())
    made.train()
    trained = states(made.model)
    made.save_student(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").is_file()
    torch.testing.assert_close(states(load_model(tmp_path / "saved")), trained, rtol=0, atol=1e-4)


def test_a_run_on_a_lora_folder_resumes_to_the_same_student(folders, tmp_path):
    settings = {"peft_config": lora(), "save_strategy": "steps", "save_steps": 1}
    whole = distiller(tmp_path / "whole", folders["student"], folders["teacher"], **settings)
    whole.train()
    resumed = distiller(tmp_path / "resumed", folders["student"], folders["teacher"], **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert torch.equal(states(resumed.model), states(whole.model))
    checkpoint = load_model(tmp_path / "whole" / "checkpoint-3")  # it names the adapter that it was trained on
    torch.testing.assert_close(states(checkpoint), states(whole.model), rtol=0, atol=1e-4)


def test_fine_tuning_takes_lora_too(folders, tmp_path):
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_strategy": "no"}
    args = FinetuneConfig(output_dir=str(tmp_path / "run"), report_to="none", use_cpu=True, **settings)
    made = FinetuneTrainer(load_model(folders["student"]), args, rows(), None, tiny_tokenizer(), peft_config=lora())
    quiet(made)
    torch.testing.assert_close(states(made.model), states(load_model(folders["whole student"])), rtol=0, atol=0)
    made.train()
    made.save_student(tmp_path / "saved")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(states(loaded), states(made.model), rtol=0, atol=1e-4)
    assert (states(loaded) - states(load_model(folders["student"]))).abs().max() > 1e-3
    made.merge_student()
    assert merged_parts(made.model) is not None
    with pytest.raises(RequestError, match="trained with LoRA"):
        made.merge_student()


@pytest.mark.parametrize("before", ["nothing", "training", "pruning", "merging", "training and merging"])
def test_what_is_saved_is_what_was_trained_whatever_came_before(folders, tmp_path, before):
    """The weights that an adapter is trained on may be those of no folder; and it trains on after it was saved."""
    student, teacher, fast = load_model(folders["whole student"]), folders["whole teacher"], {"learning_rate": 1e-2}
    if before == "pruning":
        student = prune_layers(student, [0])
    elif before != "nothing":
        for stage in before.split(" and "):
            beside = lora() if stage == "merging" else None
            first = distiller(tmp_path / "first", student, teacher, method="kd", peft_config=beside, **fast)
            first.train()
            if beside is not None:
                first.merge_student()
            student = first.model
    made = distiller(tmp_path / "second", student, teacher, method="kd", peft_config=lora(), **fast)
    for _ in range(2):
        made.train()
        made.save_student(tmp_path / "saved")
        torch.testing.assert_close(states(load_model(tmp_path / "saved")), states(made.model), rtol=0, atol=1e-4)
    is_adapter = before in ("nothing", "merging")
    assert (tmp_path / "saved" / "adapter_config.json").is_file() == is_adapter
    told = "saved merged, as a whole model, since no folder holds the weights that it is trained on"
    assert any(told in note for note in made.notes) == (not is_adapter)


@pytest.mark.parametrize("own", ["self", "ema"])
def test_a_teacher_made_of_a_student_is_of_a_folder_only_as_long_as_the_student_is(folders, tmp_path, own):
    student = load_model(folders["whole student"])
    untrained = distiller(tmp_path / "first", student, own)
    assert base_name(untrained.teacher.model) == (folders["whole student"] if own == "self" else None)
    distiller(tmp_path / "second", student, folders["whole teacher"], method="kd").train()
    made = distiller(tmp_path / "third", student, own)
    assert base_name(made.teacher.model) is None


def test_a_teacher_that_was_tuned_in_memory_is_no_folders(folders, tmp_path):
    first = distiller(tmp_path / "first", load_model(folders["whole teacher"]), folders["whole teacher"], method="kd")
    first.train()
    made = distiller(tmp_path / "second", folders["whole student"], first.model)
    made.save_adapter(tmp_path / "run")
    named = json.loads((tmp_path / "run" / "prompt" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named in (None, "")


@pytest.mark.parametrize("beside", [True, False])
def test_a_teacher_that_was_given_stays_without_what_was_trained_in_it(folders, tmp_path, beside):
    teacher, rate = load_model(folders["teacher" if beside else "whole teacher"]), {"prompt_learning_rate": 0.1}
    before, expected = states(teacher), first_step(tmp_path, folders["whole student"], teacher, method="gkd")
    for _ in range(2):
        made = distiller(tmp_path, folders["whole student"], teacher, method="promptkd-lora", **rate)
        made.train()
        assert (states(made.teacher.model) - before).abs().max() > 1e-3
        assert not has_adapter(teacher)
        assert torch.equal(states(teacher), before)
    assert first_step(tmp_path, folders["whole student"], teacher, method="gkd") == expected


def test_a_student_that_has_carried_an_adapter_carries_another(folders, tmp_path):
    student = load_model(folders["whole student"])
    distiller(tmp_path, student, folders["teacher"], method="kd", peft_config=lora(), learning_rate=1e-2).train()
    trained = states(student)
    made = distiller(tmp_path, student, folders["teacher"], method="kd", peft_config=lora())
    torch.testing.assert_close(states(made.model), trained, rtol=0, atol=1e-5)
