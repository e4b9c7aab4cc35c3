"""What others get: the wheel's command publishes, and processes without this package load what it published."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoProcessor, LlamaConfig, LlamaModel

from hub_cards.publish import publish
from hub_cards.remote_code import code_files
from modeling_proclip import ProCLIPConfig, ProCLIPModel, ProCLIPProcessor
from tests.environments import environment_with, environment_without_the_package, run
from tests.hub_server import HubServer, hub_server
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

# Run where the package is not: REPO REVISION INPUTS OUTPUT.
LOAD = """
import sys
from importlib.util import find_spec

assert not [name for name in ("modeling_proclip", "trainers", "hub_cards") if find_spec(name)]

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor, AutoTokenizer, pipeline

repo, revision, inputs, output = sys.argv[1:]
settings = {"revision": revision, "trust_remote_code": True}
config = AutoConfig.from_pretrained(repo, **settings)
assert type(config).__module__.startswith("transformers_modules."), type(config)
processor = AutoProcessor.from_pretrained(repo, **settings)
model = AutoModel.from_pretrained(repo, **settings).eval()
features = processor(text=["a red fox", "two"], images=Image.new("RGB", (20, 16), "red"), return_tensors="pt")
with torch.no_grad():
    embeds = model(**load_file(inputs))
    logits = model(**features).logits_per_image
save_file({"text": embeds.text_embeds, "image": embeds.image_embeds, "logits": logits, **features}, output)
again = AutoModelForZeroShotImageClassification.from_pretrained(repo, **settings)
assert torch.equal(again.logit_scale, model.logit_scale) and AutoTokenizer.from_pretrained(repo, **settings)
classify = pipeline("zero-shot-image-classification", model=repo, **settings)
scores = classify(Image.new("RGB", (20, 16), "red"), candidate_labels=["a red fox", "two"], hypothesis_template="{}")
scores = [next(s["score"] for s in scores if s["label"] == label) for label in ("a red fox", "two")]
assert torch.allclose(torch.tensor(scores), logits.softmax(-1)[0], atol=1e-6), scores

# What is saved here loads here again, by the code that was saved with it.
model.save_pretrained(output + ".again")
processor.save_pretrained(output + ".again")
again = AutoModel.from_pretrained(output + ".again", trust_remote_code=True).eval()
with torch.no_grad():
    assert torch.equal(again(**load_file(inputs)).text_embeds, embeds.text_embeds)
assert AutoProcessor.from_pretrained(output + ".again", trust_remote_code=True).prompt_template == processor.prompt_template

try:
    AutoModel.from_pretrained(repo, revision=revision, trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code=True" in str(error)
else:
    raise AssertionError("code ran without being trusted")
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


@torch.no_grad()
def assert_loads_without_the_package(python: Path, hub: HubServer, repo_id: str, model: ProCLIPModel, folder: Path):
    revision = head(hub, repo_id)
    inputs, output = folder / "inputs.safetensors", folder / "output.safetensors"
    save_file(tiny.inputs(), inputs)
    # A later commit must not be what is loaded.
    hub.repositories["model", repo_id].commit("main", "emptied", {})
    environment = {"PYTHONPATH": "", **hub.environment(folder / "home")}
    done = run(python, "-c", LOAD, repo_id, revision, inputs, output, cwd=folder, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    found, expected = load_file(output), model(**tiny.inputs())
    assert torch.equal(found["text"], expected.text_embeds) and torch.equal(found["image"], expected.image_embeds)


def test_the_wheel_s_command_publishes_and_a_process_without_it_loads(with_wheel, without, hub, tmp_path):
    """The image encoder is EVA's, whose code is this package's too."""
    model = tiny.model(vision_config=EVA)
    save(model, tmp_path / "checkpoint")
    command = (
        with_wheel.parent / "proclip",
        "publish",
        tmp_path / "checkpoint",
        "alice/eva",
        "--max-shard-size",
        "60KB",
    )
    done = run(*command, cwd=tmp_path, PYTHONPATH="", **hub.environment(tmp_path / "home"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert head(hub, "alice/eva") in done.stdout and "model.safetensors.index.json" in hub.files("alice/eva")
    assert_loads_without_the_package(without, hub, "alice/eva", model, tmp_path)


def test_a_lean_repository_brings_its_llm_by_name(without, hub, tmp_path):
    torch.manual_seed(1)
    LlamaModel(LlamaConfig(**tiny.TEXT)).save_pretrained(tmp_path / "llm", push_to_hub=True, repo_id="alice/llm")
    torch.manual_seed(2)
    model = ProCLIPModel.from_vision_text_pretrained(tiny.clip(), "alice/llm", adapter_num_layers=1)
    assert model.config.text_model_revision == head(hub, "alice/llm")
    save(model, tmp_path / "lean", lean=True)
    report = publish(tmp_path / "lean", "alice/lean")
    assert report.lean and report.text_model_bytes > 0
    hub.repositories["model", "alice/llm"].commit("main", "emptied", {})  # the commit is what counts
    assert_loads_without_the_package(without, hub, "alice/lean", model, tmp_path)


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
