"""What others get: the wheel's command publishes, and processes without this package load what it published."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoProcessor, LlamaConfig, LlamaModel

from hub_cards.publish import publish
from hub_cards.remote_code import code_files
from modeling_proclip import ProCLIPConfig, ProCLIPModel, ProCLIPProcessor
from tests.environments import REPOSITORY, environment_with, environment_without_the_package, run
from tests.hub_server import TOKEN, HubServer, hub_server
from tests.modeling_proclip import tiny


EVA = {
    "model_type": "proclip_eva_vision",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "rope_pretrained_grid": 2,
}

# Run where the package is not, with REPO REVISION pairs: tries everything on each, and writes what it embeds.
LOAD = """
import sys
from importlib.util import find_spec

assert not [name for name in ("modeling_proclip", "trainers", "hub_cards") if find_spec(name)]

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor, AutoTokenizer, pipeline

inputs, picture, texts = load_file("inputs.safetensors"), Image.new("RGB", (20, 16), "red"), ["a red fox", "two"]


@torch.no_grad()
def load(repo, revision, output):
    settings = {"revision": revision, "trust_remote_code": True}
    config = AutoConfig.from_pretrained(repo, **settings)
    assert type(config).__module__.startswith("transformers_modules."), type(config)
    processor = AutoProcessor.from_pretrained(repo, **settings)
    model = AutoModel.from_pretrained(repo, **settings).eval()
    embeds = model(**inputs)
    save_file({"text": embeds.text_embeds, "image": embeds.image_embeds}, output + ".safetensors")
    logits = model(**processor(text=texts, images=picture, return_tensors="pt")).logits_per_image

    other = AutoModelForZeroShotImageClassification.from_pretrained(repo, **settings)
    assert torch.equal(other.logit_scale, model.logit_scale)
    assert AutoTokenizer.from_pretrained(repo, **settings)(texts).keys() >= {"input_ids", "token_type_ids"}
    classify = pipeline("zero-shot-image-classification", model=repo, **settings)
    scores = {s["label"]: s["score"] for s in classify(picture, candidate_labels=texts, hypothesis_template="{}")}
    assert torch.allclose(torch.tensor([scores[text] for text in texts]), logits.softmax(-1)[0], atol=1e-6), scores

    text_embeds = model(**processor(text=texts, return_tensors="pt")).text_embeds
    features = pipeline("feature-extraction", model=repo, **settings)(texts, return_tensors=True)
    assert torch.allclose(torch.cat(features), text_embeds, atol=1e-5)
    image_embeds = model(**processor(images=picture, return_tensors="pt")).image_embeds
    features = pipeline("image-feature-extraction", model=repo, **settings)([picture], return_tensors=True)
    assert torch.allclose(torch.cat(features), image_embeds, atol=1e-5)
    if find_spec("sentence_transformers"):
        from sentence_transformers import SentenceTransformer

        encoder = SentenceTransformer(repo, **settings)
        assert torch.allclose(encoder.encode(texts, convert_to_tensor=True), text_embeds, atol=1e-5)
        assert torch.allclose(encoder.encode([picture], convert_to_tensor=True), image_embeds, atol=1e-5)

    # What is saved here loads here again, by the code that was saved with it.
    model.save_pretrained(output)
    processor.save_pretrained(output)
    again = AutoModel.from_pretrained(output, trust_remote_code=True).eval()
    assert torch.equal(again(**inputs).text_embeds, embeds.text_embeds)
    again = AutoProcessor.from_pretrained(output, trust_remote_code=True)
    assert again.prompt_template == processor.prompt_template

    try:
        AutoModel.from_pretrained(repo, revision=revision, trust_remote_code=False)
    except ValueError as error:
        assert "trust_remote_code=True" in str(error)
    else:
        raise AssertionError("code ran without being trusted")


for repo, revision in zip(sys.argv[1::2], sys.argv[2::2]):
    load(repo, revision, repo.split("/")[1])
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> HubServer:
    folder = tmp_path_factory.mktemp("hub")
    with hub_server(folder / "blobs") as server, pytest.MonkeyPatch.context() as patch:
        server.patch(patch, folder / "home")
        yield server


@pytest.fixture(scope="module")
def without(tmp_path_factory) -> Path:
    return environment_without_the_package(tmp_path_factory.mktemp("environment") / "without")


@pytest.fixture(scope="module")
def with_wheel(wheel, tmp_path_factory) -> Path:
    return environment_with(wheel, tmp_path_factory.mktemp("environment") / "with")


def save(model: ProCLIPModel, folder: Path, **kwargs) -> ProCLIPProcessor:
    processor = tiny.processor(prompt_template=tiny.LLAMA3, max_length=40)
    model.save_pretrained(folder, **kwargs)
    processor.save_pretrained(folder)
    return processor


def head(hub: HubServer, repo_id: str) -> str:
    return hub.repositories["model", repo_id].branches["main"]


def snippet(heading: str) -> str:
    """The code under a heading of docs/hub.md."""
    _, section = (REPOSITORY / "docs" / "hub.md").read_text().split(f"\n## {heading}\n")
    return section.split("```")[1].split("\n", 1)[1].replace("OWNER", "alice")


def test_the_documented_lines_publish_by_the_wheel_and_load_without_it(with_wheel, without, hub, tmp_path):
    model = tiny.model()
    save(model, tmp_path / "quickstart-output" / "proclip")
    environment = {"PYTHONPATH": "", **hub.environment(tmp_path / "home")}
    path = os.pathsep.join([str(with_wheel.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    lines = snippet("Publish yours")
    assert len(lines.splitlines()) == 3
    # Asked for, a token cannot be typed here. The variable that names one would have the say over the login.
    lines = lines.replace("hf auth login", f"hf auth login --token {environment.pop('HF_TOKEN')}")
    environment["HF_TOKEN"] = ""
    done = run("bash", "-ec", lines, cwd=tmp_path, PATH=path, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert hub.repositories["model", "alice/my-proclip"].private
    assert head(hub, "alice/my-proclip") in done.stdout and TOKEN not in done.stdout + done.stderr
    code = snippet("Load it anywhere")
    assert len([line for line in code.splitlines() if line]) == 3
    code += f"print(model.logit_scale.item(), processor.prompt_template == {tiny.LLAMA3!r})"
    code += "; import importlib.util; assert importlib.util.find_spec('modeling_proclip') is None"
    done = run(without, "-c", code, cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(model.logit_scale.item()), "True"]


@torch.no_grad()
def test_a_process_without_the_package_loads_commits_full_and_lean(without, hub, tmp_path):
    """A full repository in shards, with EVA's image encoder, whose code is this package's too; a lean one, whose LLM comes by name."""
    full = tiny.model(vision_config=EVA)
    save(full, tmp_path / "full")
    publish(tmp_path / "full", "alice/full", max_shard_size="60KB")
    assert "model.safetensors.index.json" in hub.files("alice/full")

    LlamaModel(LlamaConfig(**tiny.TEXT)).save_pretrained(tmp_path / "llm", push_to_hub=True, repo_id="alice/llm")
    lean = ProCLIPModel.from_vision_text_pretrained(tiny.clip(), "alice/llm", adapter_num_layers=1)
    assert lean.config.text_model_revision == head(hub, "alice/llm")
    save(lean, tmp_path / "lean", lean=True)
    report = publish(tmp_path / "lean", "alice/lean")
    assert report.lean and report.text_model_bytes > 0

    models = {"full": full, "lean": lean}
    commits = [word for name in models for word in (f"alice/{name}", head(hub, f"alice/{name}"))]
    for name in (*models, "llm"):  # the commit is what counts, not what came later
        hub.repositories["model", f"alice/{name}"].commit("main", "emptied", {})
    save_file(tiny.inputs(), tmp_path / "inputs.safetensors")
    environment = {"PYTHONPATH": "", **hub.environment(tmp_path / "home")}
    shutil.rmtree(tmp_path / "full")
    shutil.rmtree(tmp_path / "lean")
    done = run(without, "-c", LOAD, *commits, cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    for name, model in models.items():
        found, expected = load_file(tmp_path / f"{name}.safetensors"), model(**tiny.inputs())
        assert torch.equal(found["text"], expected.text_embeds) and torch.equal(found["image"], expected.image_embeds)


def test_code_of_another_version_loads_where_the_package_is_installed_but_not_imported(with_wheel, hub, tmp_path):
    save(tiny.model(), tmp_path / "checkpoint")
    publish(tmp_path / "checkpoint", "alice/newer")
    folder = tmp_path / "newer"
    folder.mkdir()
    for name in hub.files("alice/newer"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(hub.read("alice/newer", name))
    field = "    lean: bool = False\n"
    code = (folder / "configuration_proclip.py").read_text()
    assert code.count(field) == 1
    (folder / "configuration_proclip.py").write_text(code.replace(field, field + "    new_key: int = 1\n"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "new_key": 2}))
    script = (
        "import sys; from transformers import AutoModel\n"
        "model = AutoModel.from_pretrained('newer', trust_remote_code=True)\n"
        "assert 'modeling_proclip' not in sys.modules and model.config.new_key == 2\n"
        "import modeling_proclip  # which then has the say\n"
        "try: AutoModel.from_pretrained('newer', trust_remote_code=True)\n"
        "except ValueError as error: assert \"no key 'new_key'\" in str(error), error\n"
    )
    done = run(with_wheel, "-c", script, cwd=tmp_path, PYTHONPATH="", **hub.environment(tmp_path / "home"))
    assert done.returncode == 0, done.stderr


def test_where_the_package_is_imported_no_code_of_a_repository_runs(tmp_path):
    folder = tmp_path / "checkpoint"
    save(tiny.model(), folder)
    for file in code_files():
        (folder / file.name).write_text("raise AssertionError('code of the repository ran')")
    for name in ("config.json", "processor_config.json"):
        settings = json.loads((folder / name).read_text())
        references = {
            "AutoConfig": "configuration_proclip.ProCLIPConfig",
            "AutoModel": "modeling_proclip.ProCLIPModel",
        }
        references["AutoProcessor"] = "processing_proclip.ProCLIPProcessor"
        (folder / name).write_text(json.dumps({**settings, "auto_map": references}))
    for trust in ({}, {"trust_remote_code": True}):
        assert type(AutoConfig.from_pretrained(folder, **trust)) is ProCLIPConfig
        assert type(AutoModel.from_pretrained(folder, **trust)) is ProCLIPModel
        assert type(AutoProcessor.from_pretrained(folder, **trust)) is ProCLIPProcessor


def test_code_that_travels_imports_nothing_that_does_not():
    names = {file.stem for file in code_files()}
    assert len(names) == len(code_files())
    for file in code_files():
        for line in file.read_text().splitlines():
            if line.startswith("from ."):
                assert line.split()[1].removeprefix(".") in names, f"{file.name}: {line}"
            assert not line.startswith(("from ..", "from . ", "import modeling_proclip", "from modeling_proclip"))
