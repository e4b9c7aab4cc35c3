"""Stages that tune the LLM: it comes first, and the stages after it read with the tuned one."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from modeling_proclip import ProCLIPModel
from tests.modeling_proclip import tiny
from tests.trainers.tiny_recipe import (
    DieAt,
    Interrupted,
    die_in_stage_0,
    interrupt,
    settings,
    write_parts,
    write_recipe,
)
from trainers.caption_contrastive.masked_next_token import MaskedNextTokenTrainer
from trainers.data import TextEmbeddingStore
from trainers.recipe.curriculum import Curriculum
from trainers.recipe.files import RecipeError
from trainers.recipe.plan import plan_stages
from trainers.recipe.schema import load_recipe


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    write_parts(folder)
    return folder


@pytest.fixture(scope="module")
def content(parts):
    content = copy.deepcopy(settings(parts))
    stage_0 = {"global_batch_size": 8, "device_batch_size": 4, "max_steps": 4, "save_steps": 2, "learning_rate": 1e-2}
    stage_0 |= {"warmup_steps": 0, "lora_r": 4, "disable_tqdm": True}
    content["stages"] = {"caption_contrastive": stage_0, "inheritance": content["stages"]["inheritance"]}
    content["stages"]["inheritance"]["max_steps"] = 2
    return content


def recipe_in(folder, content):
    return load_recipe(write_recipe(folder / "recipe.yaml", {**content, "output_dir": str(folder / "out")}))


@pytest.fixture(scope="module")
def whole(content, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    Curriculum(recipe_in(folder, content)).run()
    return folder / "out"


def weights(output_dir, step):
    return load_file(output_dir / step / "model" / "model.safetensors")


def test_the_tuned_llm_is_what_the_next_stage_reads_with(whole, parts):
    before = AutoModel.from_pretrained(parts / "llm").state_dict()
    tuned = AutoModel.from_pretrained(whole / "caption_contrastive" / "model").state_dict()
    moved = {name for name in before if not torch.equal(before[name], tuned[name])}
    assert moved and all("proj" in name for name in moved)  # the LoRA is on the linear layers, and merged
    assert (whole / "caption_contrastive" / "adapter" / "adapter_model.safetensors").is_file()
    assert list((whole / "caption_contrastive").glob("*/training_args.bin")) == []

    pair = ProCLIPModel.from_pretrained(whole / "inheritance" / "model")
    name = next(iter(moved))
    assert torch.equal(pair.text_model.state_dict()[name], tuned[name])
    store = TextEmbeddingStore(whole / "text-stores" / "llm")
    assert store.fingerprint["weights_sha256"] == pair.config.text_model_sha256
    text = "a red fox"
    plain, tuned = (AutoTokenizer.from_pretrained(f) for f in (parts / "llm", whole / "caption_contrastive" / "model"))
    assert plain(text).input_ids == tuned(text).input_ids


def test_the_plan_shows_stage_0(whole, content, tmp_path):
    plans = {plan.name: plan for plan in plan_stages(Curriculum(recipe_in(tmp_path, content)))}
    plan = plans["caption_contrastive"]
    assert (plan.rows, plan.steps, plan.state) == (24, 4, "to do")
    assert (plan.device_batch_size, plan.gradient_caching) == (4, True)


def test_interrupted_in_stage_0_and_run_again_it_ends_with_the_same_bits(whole, content, tmp_path, monkeypatch):
    recipe = recipe_in(tmp_path, content)
    with pytest.raises(
        RecipeError, match="stage inheritance starts from the result of caption_contrastive, which is not"
    ):
        Curriculum(recipe).run("inheritance")
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        die_in_stage_0(patched, 3)
        Curriculum(recipe).run()
    assert Curriculum(recipe).checkpoint_of("caption_contrastive").endswith("checkpoint-2")
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(Curriculum, "_finish", interrupt)
        Curriculum(recipe).run("caption_contrastive")
    Curriculum(recipe).run("caption_contrastive")
    Curriculum(recipe).run("inheritance")
    for step in ("caption_contrastive", "inheritance"):
        first, second = weights(whole, step), weights(tmp_path / "out", step)
        assert all(torch.equal(first[name], second[name]) for name in first), step


def test_a_change_of_stage_0_is_a_change_of_all_that_follows(whole, content, tmp_path):
    changed = copy.deepcopy(content)
    changed["stages"]["caption_contrastive"]["lora_r"] = 2
    curriculum = Curriculum(load_recipe(write_recipe(tmp_path / "r.yaml", {**changed, "output_dir": str(whole)})))
    for step in ("caption_contrastive", "preparation", "inheritance"):
        with pytest.raises(RecipeError, match="stages.caption_contrastive.lora_r was 4 and is 2"):
            curriculum.state_of(step)


@pytest.fixture(scope="module")
def warmed(parts, content, tmp_path_factory):
    """The output directory of a recipe that begins with masked next-token prediction, and the recipe."""
    folder = tmp_path_factory.mktemp("warmed")
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**tiny.TEXT)).save_pretrained(folder / "llm")
    AutoTokenizer.from_pretrained(tiny.LLAMA_DIR).save_pretrained(folder / "llm")
    changed = copy.deepcopy(content)
    changed["model"]["text"] = str(folder / "llm")
    stage = {"global_batch_size": 8, "max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "lora_r": 4}
    changed["stages"] = {"masked_next_token": {**stage, "disable_tqdm": True}, **changed["stages"]}
    Curriculum(recipe_in(folder, changed)).run()
    return folder / "out", changed


def test_masked_next_token_prediction_comes_first_and_stage_0_goes_on_from_it(warmed):
    out, content = warmed
    llms = [content["model"]["text"], out / "masked_next_token" / "model", out / "caption_contrastive" / "model"]
    before, warm, tuned = (AutoModel.from_pretrained(folder).state_dict() for folder in llms)
    assert before.keys() == warm.keys() == tuned.keys()
    moved = {name for name in before if not torch.equal(before[name], warm[name])}
    assert moved and all("proj" in name for name in moved)
    assert {name for name in before if not torch.equal(warm[name], tuned[name])} == moved
    assert (out / "masked_next_token" / "adapter" / "adapter_model.safetensors").is_file()
    record = json.loads((out / "caption_contrastive" / "complete.json").read_text())
    assert list(record["inputs"]) == ["data.train", "masked_next_token/model"]
    record = json.loads((out / "masked_next_token" / "complete.json").read_text())
    assert list(record["inputs"]) == ["data.train", "model.text"] and record["steps"] == 4
    pair = ProCLIPModel.from_pretrained(out / "inheritance" / "model")
    assert all(torch.equal(pair.text_model.state_dict()[name], tuned[name]) for name in moved)


def test_masked_next_token_prediction_is_resumed_to_the_same_bits(warmed, tmp_path, monkeypatch):
    out, content = warmed
    init = MaskedNextTokenTrainer.__init__

    def with_death(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.add_callback(DieAt(3, interrupt))

    recipe = recipe_in(tmp_path, content)
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(MaskedNextTokenTrainer, "__init__", with_death)
        Curriculum(recipe).run("masked_next_token")
    assert Curriculum(recipe).checkpoint_of("masked_next_token").endswith("checkpoint-2")
    Curriculum(recipe).run("masked_next_token")
    first, second = weights(out, "masked_next_token"), weights(tmp_path / "out", "masked_next_token")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_masked_tokens_need_a_language_modelling_head(warmed, parts, tmp_path):
    _, content = warmed
    changed = {**content, "model": {**content["model"], "text": str(parts / "llm")}}
    with pytest.raises(RecipeError, match="llm has no lm_head.weight: .* Take the causal LM itself"):
        Curriculum(recipe_in(tmp_path, changed)).run("masked_next_token")
    changed["stages"]["masked_next_token"]["device_batch_size"] = 4
    with pytest.raises(
        RecipeError, match="stages.masked_next_token.device_batch_size: this stage has no gradient caching"
    ):
        recipe_in(tmp_path, changed)
