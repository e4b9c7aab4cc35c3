from pathlib import Path

import pytest

from modeling_proclip import ProCLIPConfig
from trainers.recipe.curriculum import Curriculum
from trainers.recipe.files import RecipeError, read_recipe
from trainers.recipe.schema import derived_arguments, load_recipe


RECIPES = Path(__file__).parents[3] / "recipes"
MINIMAL = """
output_dir: out
model: {vision: clip, text: llm}
data:
  train: {source: pairs.parquet}
stages:
  inheritance: {global_batch_size: 256}
"""


def write(folder, text, name="recipe.yaml"):
    (folder / name).write_text(text)
    return folder / name


def refused(folder, text, *overrides) -> str:
    with pytest.raises(RecipeError) as error:
        load_recipe(write(folder, text), overrides)
    message = str(error.value)
    assert message.startswith(str(folder / "recipe.yaml")) or overrides
    return message.removeprefix(str(folder / "recipe.yaml"))


def test_a_minimal_recipe_has_every_default(tmp_path):
    recipe = load_recipe(write(tmp_path, MINIMAL))
    assert (recipe.seed, recipe.precision, recipe.model.max_length) == (0, "auto", 512)
    assert recipe.data.train.text_columns == "text" and recipe.data.train.max_broken_fraction == 0.01
    assert recipe.text_stores.llm.dtype == "float32"
    stage = recipe.stages["inheritance"]
    assert (stage.global_batch_size, stage.device_batch_size, stage.arguments) == (256, None, {})


@pytest.mark.parametrize(
    "line, message",
    [
        ("sed: 1", ": sed: unknown key; did you mean 'seed'?"),
        ("model: {vision: a, text: b, visoin: c}", ": model.visoin: unknown key; did you mean 'vision'?"),
        (
            "stages: {inheritance: {global_batch_size: 2, learning_rte: 1.0}}",
            ": stages.inheritance.learning_rte: unknown key; did you mean 'learning_rate'?",
        ),
        (
            "stages: {inheritance: {global_batch: 2}}",
            ": stages.inheritance.global_batch: unknown key; did you mean 'global_batch_size'?",
        ),
        (
            "stages: {inheritance: {global_batch_size: 2, ema_decay: 0.9}}",
            ": stages.inheritance.ema_decay: unknown key; ",
        ),
        ("stages: {inheritence: {}}", ": stages.inheritence: unknown stage; did you mean 'inheritance'?"),
        ("stages: {}", ": stages: name at least one of "),
        ("data: {train: {source: a, stream: true}}", ": data.train.stream: unknown key; did you mean 'streaming'?"),
        ("seed: one", ": seed: must be a whole number, got the text 'one'"),
        ("seed: true", ": seed: must be a whole number, got true"),
        ("seed: -1", ": seed: must be greater than or equal to 0, got -1"),
        (
            "precision: half",
            ": precision: must be 'auto', 'float32', 'bfloat16' or 'float16', got the text 'half'",
        ),
        ("model: clip", ": model: must be a mapping, got the text 'clip'"),
        ("model: {vision: a}", ": model.text: is missing"),
        (
            "model: {vision: 's3://name:secret@bucket/clip', text: b}",
            ": model: vision must be a folder of this machine or a name on the Hub, not an address: download it",
        ),
        ("model: {vision: a, text: b, max_length: 0}", ": model.max_length: must be greater than 0, got 0"),
        (
            "data: {train: {source: a, text_columns: [1]}}",
            ": data.train.text_columns[0]: must be text, got 1",
        ),
        ("data: {train: {source: a, shuffle_buffer_size: 0}}", ": data.train: shuffle_buffer_size must be at least 1"),
        (
            "data: {train: {source: a}, texts: b.jsonl}",
            ": data.texts: must be a mapping, got the text 'b.jsonl'",
        ),
        (
            "stages: {inheritance: {global_batch_size: 2, save_strategy: no}}",
            ": stages.inheritance.save_strategy: must be 'no', 'steps', 'epoch' or 'best' or text, got false (YAML reads no, off and yes as truth values: put text in quotes)",
        ),
        ("stages: {inheritance: {}}", ": stages.inheritance.global_batch_size: is missing"),
        (
            "stages: {inheritance: {global_batch_size: 0}}",
            ": stages.inheritance.global_batch_size: must be greater than 0, got 0",
        ),
        (
            "stages: {inheritance: {global_batch_size: 2, per_device_train_batch_size: 2}}",
            ": stages.inheritance.per_device_train_batch_size: set global_batch_size",
        ),
        ("stages: {inheritance: {global_batch_size: 2, bf16: true}}", ": stages.inheritance.bf16: set precision"),
        (
            "stages: {inheritance: {global_batch_size: 2, hub_token: hf_x}}",
            ": stages.inheritance.hub_token: recipes are shared, so tokens do not belong in them",
        ),
        (
            "stages: {inheritance: {global_batch_size: 2, published_lambda: 0.1}}",
            ": stages.inheritance.published_lambda: unknown key",
        ),
        (
            "stages: {contrastive_tuning: {global_batch_size: 2, published_lambda: 4e-4, lambda_ins: 1.0}}",
            ": stages.contrastive_tuning.lambda_ins: follows from published_lambda",
        ),
        (
            "stages: {contrastive_tuning: {global_batch_size: 2, published_lambda: 4e-4, reduction: sum}}",
            ": stages.contrastive_tuning.reduction: published_lambda is converted for means",
        ),
        ("text_stores: {llm: {dtype: int8}}", ": text_stores.llm.dtype: must be 'float32', 'float16' or 'bfloat16'"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path, line, message):
    key = line.partition(":")[0]
    kept = read_recipe(write(tmp_path, MINIMAL))
    kept.pop(key, None)
    import yaml

    assert refused(tmp_path, yaml.safe_dump(kept) + line).startswith(message)


@pytest.mark.parametrize(
    "text, message",
    [
        ("seed: 1\nseed: 2\n", ", line 2: the key 'seed' is given twice"),
        ("seed: [1\n", ", line 2: expected ',' or ']'"),
        ("- seed\n", ": a recipe is a mapping"),
        ("", ": a recipe is a mapping"),
        ("base: recipe.yaml\n", ": this recipe builds on itself"),
        ("base: {a: b}\n", ": base: must be the path of a recipe, or a list of them"),
    ],
)
def test_files_that_are_no_recipes(tmp_path, text, message):
    assert refused(tmp_path, text).startswith(message)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(RecipeError, match=r"there is no recipe .*nowhere.yaml$"):
        load_recipe(tmp_path / "nowhere.yaml")
    with pytest.raises(RecipeError, match=r"there is no recipe .*nowhere.yaml, which .*recipe.yaml builds on"):
        load_recipe(write(tmp_path, "base: nowhere.yaml\nseed: 1\n"))


def test_numbers_are_numbers(tmp_path):
    text = MINIMAL.replace("256}", "2_56, learning_rate: 4e-4, weight_decay: 1, warmup_steps: .5, run_name: 1e}")
    stage = load_recipe(write(tmp_path, text)).stages["inheritance"]
    assert stage.global_batch_size == 256
    assert stage.arguments == {"learning_rate": 4e-4, "weight_decay": 1, "warmup_steps": 0.5, "run_name": "1e"}


def test_bases_are_joined_in_order_and_the_command_line_goes_first(tmp_path):
    write(tmp_path, MINIMAL + "seed: 1\n", "one.yaml")
    write(tmp_path, "seed: 2\nmodel: {text: other}\nprecision: float32\n", "two.yaml")
    path = write(tmp_path, "base: [one.yaml, two.yaml]\nprecision: float16\n")
    recipe = load_recipe(path, ["data.train.source=/data/x.tar", "data.train.streaming=true", "seed=3"])
    assert (recipe.model.vision, recipe.model.text, recipe.precision) == ("clip", "other", "float16")
    assert (recipe.seed, recipe.data.train.source, recipe.data.train.streaming) == (3, "/data/x.tar", True)
    assert load_recipe(path).seed == 2


@pytest.mark.parametrize("setting", ["seed", "=1", "data..x=1", "seed=[1", "sed=1", "seed=x"])
def test_settings_of_the_command_line_are_as_strict(tmp_path, setting):
    assert refused(tmp_path, MINIMAL, setting)


def test_a_stage_that_is_null_is_left_out(tmp_path):
    text = "base: one.yaml\nstages: {inheritance: null, contrastive_tuning: {global_batch_size: 8}}\n"
    write(tmp_path, MINIMAL, "one.yaml")
    assert list(load_recipe(write(tmp_path, text)).stages) == ["contrastive_tuning"]


def test_both_stages_take_shorter_embeddings(tmp_path):
    stages = "stages: {inheritance: {global_batch_size: 4}, contrastive_tuning: {global_batch_size: 4}}"
    text = MINIMAL.split("stages:")[0] + stages
    settings = [f"stages.{stage}.matryoshka_dims=[64, 32]" for stage in ("inheritance", "contrastive_tuning")]
    recipe = load_recipe(write(tmp_path, text), settings)
    assert [stage.arguments for stage in recipe.stages.values()] == [{"matryoshka_dims": [64, 32]}] * 2
    message = refused(tmp_path, text, "stages.inheritance.matryoshka_dims=[64, small]")
    assert "stages.inheritance.matryoshka_dims" in message


def test_stages_are_in_the_order_of_the_curriculum(tmp_path):
    text = MINIMAL + "  contrastive_tuning: {global_batch_size: 8}\n"
    text = text.replace("  inheritance: {global_batch_size: 256}\n", "") + "  inheritance: {global_batch_size: 256}\n"
    assert list(load_recipe(write(tmp_path, text)).stages) == ["inheritance", "contrastive_tuning"]


def test_the_global_batch_is_shared_and_cached(tmp_path):
    recipe = load_recipe(RECIPES / "proclip-vit-l-14-3m.yaml")
    stage = recipe.stages["contrastive_tuning"]
    published = derived_arguments("contrastive_tuning", stage, 8)
    assert published == {
        "per_device_train_batch_size": 512,
        "lambda_ins": pytest.approx(0.2048),
        "lambda_struct": pytest.approx(52.3264),
    }
    assert derived_arguments("contrastive_tuning", stage, 16)["per_device_train_batch_size"] == 256
    alone = derived_arguments("contrastive_tuning", stage, 1)
    assert (alone["per_device_train_batch_size"], alone["gradient_caching_batch_size"]) == (4096, 512)
    # Means do not depend on the number of devices, so neither do their weights.
    assert (alone["lambda_ins"], alone["lambda_struct"]) == (published["lambda_ins"], published["lambda_struct"])
    with pytest.raises(RecipeError, match="4096 rows cannot be shared evenly by 3 processes"):
        derived_arguments("contrastive_tuning", stage, 3)


ALL = sorted(path.name for path in RECIPES.glob("*.yaml"))
VISION = {
    "vit-b-32": "openai/clip-vit-base-patch32",
    "vit-b-16": "openai/clip-vit-base-patch16",
    "vit-l-14": "openai/clip-vit-large-patch14",
    "eva02-l-14": "models/eva02-clip-l-14",
    "siglip2": "google/siglip2-so400m-patch14-224",
}


def test_every_tower_and_size_has_a_recipe():
    for tower in VISION:
        for size in ("3m", "15m", "30m"):
            assert f"proclip-{tower}-{size}.yaml" in ALL
    assert {"llm2clip-vit-l-14-3m.yaml", "lit-vit-l-14-3m.yaml", "laptop.yaml"} <= set(ALL)


@pytest.mark.parametrize("name", ALL)
def test_every_recipe_is_valid_and_writes_to_a_place_of_its_own(name):
    recipe = load_recipe(RECIPES / name)
    assert recipe.output_dir == f"runs/{name.removesuffix('.yaml')}"
    curriculum = Curriculum(recipe)  # the trainers accept its values
    for stage, arguments in curriculum.arguments.items():
        assert arguments.per_device_train_batch_size == recipe.stages[stage].global_batch_size
    ProCLIPConfig(**recipe.model.config)


def test_stage_0_has_llm2clips_numbers():
    """LLM2CLIP, arXiv 2411.04997, v6."""
    recipe = load_recipe(RECIPES / "llm2clip-stage-0-vit-l-14-3m.yaml")
    assert list(recipe.stages) == ["caption_contrastive", "contrastive_tuning"]
    stage = recipe.stages["caption_contrastive"]
    assert (stage.global_batch_size, recipe.data.captions.streaming) == (2048, False)
    published = {"learning_rate": 2e-4, "warmup_steps": 300, "num_train_epochs": 1, "max_length": 512}
    published |= {"lora_r": 16, "lora_alpha": 32}
    assert {key: stage.arguments[key] for key in published} == published


def test_the_sigmoid_recipe_has_a_bias_to_train():
    recipe = load_recipe(RECIPES / "proclip-siglip2-sigmoid-3m.yaml")
    assert recipe.stages["contrastive_tuning"].arguments["loss"] == "sigmoid"
    assert recipe.model.config["logit_bias_init_value"] == -10


@pytest.mark.parametrize("tower", VISION)
@pytest.mark.parametrize("size", ["3m", "15m", "30m"])
def test_proclip_recipes_have_the_published_numbers(tower, size):
    """ProCLIP, arXiv 2510.18795, Table 8."""
    recipe = load_recipe(RECIPES / f"proclip-{tower}-{size}.yaml")
    assert recipe.model.vision == VISION[tower]
    assert recipe.model.config["adapter_num_layers"] == 4 and recipe.model.config["adapter_expansion"] == 2
    assert recipe.model.config["adapter_input_norm"] == ("none" if tower == "siglip2" else "l2")
    assert recipe.data.num_pairs == int(size.removesuffix("m")) * 1_000_000
    stage_1, stage_2 = recipe.stages["inheritance"], recipe.stages["contrastive_tuning"]
    assert (stage_1.global_batch_size, stage_1.device_batch_size) == (8 * 128, 128)
    assert (stage_2.global_batch_size, stage_2.device_batch_size) == (8 * 512, 512)
    for stage in (stage_1, stage_2):
        published = {
            "learning_rate": 1e-5,
            "lr_scheduler_type": "cosine",
            "weight_decay": 0.05,
            "adam_beta1": 0.9,
            "adam_beta2": 0.98,
            "adam_epsilon": 1e-6,
            "num_train_epochs": 4,
        }
        assert {key: stage.arguments[key] for key in published} == published
    assert stage_1.arguments["lambda_struct"] / stage_1.arguments["lambda_ins"] == (128 - 1) / 2
    assert (stage_2.published_lambda, stage_2.published_batch_size) == (4e-4, 512)
    assert (stage_2.arguments["method"], stage_2.arguments["ema_decay"]) == ("proclip", 0.999)


@pytest.mark.parametrize("method", ["llm2clip", "lit"])
def test_baselines_are_stage_2_alone_without_self_distillation(method):
    recipe = load_recipe(RECIPES / f"{method}-vit-l-14-3m.yaml")
    assert list(recipe.stages) == ["contrastive_tuning"]
    stage = recipe.stages["contrastive_tuning"]
    assert (stage.arguments["method"], stage.published_lambda, stage.global_batch_size) == (method, None, 4096)
