"""The card of PEFT adapters states what their files hold; published by PEFT itself, they load from the Hub."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig
from safetensors.torch import load_file

from hub_cards import adapter_card
from hub_cards.citations import CITATIONS
from modeling_proclip import ProCLIPModel
from tests.hub_cards.numbers import held_by_file, stated
from tests.hub_server import hub_server
from tests.trainers.tiny_training import tiny_model, tuning_trainer
from trainers.alignment.peft_model import ProCLIPPeftModel


REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_model(load_text_model=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory) -> ProCLIPPeftModel:
    config = LoraConfig(r=2, lora_alpha=6, target_modules=r"vision_model\..*\.(q_proj|v_proj)")
    model = ProCLIPPeftModel(ProCLIPModel.from_pretrained(base), config)
    tuning_trainer(tmp_path_factory.mktemp("run"), model, max_steps=2).train()
    return model


@pytest.fixture(scope="module")
def adapter(trained, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    trained.save_pretrained(folder)
    return folder


def test_every_number_of_the_card_is_in_the_files(adapter):
    card = (adapter / "README.md").read_text()
    assert card == str(adapter_card(adapter))
    sources = held_by_file(adapter / "adapter_config.json") | held_by_file(adapter / "training.json")
    sources |= {str(sum(tensor.numel() for tensor in load_file(adapter / "adapter_model.safetensors").values()))}
    sources |= {str((adapter / "adapter_model.safetensors").stat().st_size), "1"}
    assert stated(card) <= sources | stated("\n".join(CITATIONS.values())) | {"2510.18795"}
    assert "rank 2, alpha 6 |" in card and "text_adapter, logit_scale |" in card
    assert "| adapters on | image encoder (" in card
    assert "**contrastive tuning** (`ContrastiveTuningTrainer`): 2 steps of 6 rows" in card


def test_metadata_names_the_base_on_the_hub_and_peft(adapter):
    card = adapter_card(adapter, repo_id="owner/mine", base_model="owner/base", license="mit")
    assert (card.data.base_model, card.data.library_name, card.data.license) == ("owner/base", "peft", "mit")
    assert "lora" in card.data.tags
    assert ModelCard.load(adapter / "README.md").data.base_model is None, (
        "a folder of this machine is no base on the Hub"
    )


def test_its_snippet_runs(adapter, base, trained):
    (block,) = re.findall(r"```python\n(.*?)```", adapter_card(adapter).text, flags=re.DOTALL)
    names: dict = {}
    exec(block.replace("path/of/its/base", str(base)).replace("path/of/this/folder", str(adapter)), names)
    assert isinstance(names["model"], ProCLIPModel)
    assert torch.equal(names["model"].logit_scale, trained.logit_scale)


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="adapter_config.json"):
        adapter_card(tmp_path)


# The client reads where its Hub is when it is imported, so this runs in a process of its own.
PUBLISH_AND_LOAD = """
import sys, torch
from peft import PeftModel
from modeling_proclip import ProCLIPModel
from trainers.alignment.peft_model import ProCLIPPeftModel

base, adapter = sys.argv[1:]
inputs = {"pixel_values": torch.ones(1, 3, 8, 8), "llm_embeds": torch.ones(1, 12)}
mine = ProCLIPPeftModel.from_pretrained(ProCLIPModel.from_pretrained(base), adapter)
mine.push_to_hub("adapter", base_model="alice/base")
again = PeftModel.from_pretrained(ProCLIPModel.from_pretrained(base), "alice/adapter")
with torch.no_grad():
    print([model(**inputs).logits_per_image.item() for model in (ProCLIPModel.from_pretrained(base), mine, again)])
"""


def test_adapters_are_published_and_loaded(base, trained, adapter, tmp_path):
    with hub_server(tmp_path / "server") as hub:
        environment = {**os.environ, **hub.environment(tmp_path / "home"), "PYTHONPATH": str(REPOSITORY)}
        command = (sys.executable, "-c", PUBLISH_AND_LOAD, str(base), str(adapter))
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        card = ModelCard(hub.read("alice/adapter", "README.md").decode())
        sent = hub.files("alice/adapter")
    without, mine, again = json.loads(done.stdout.splitlines()[-1])
    inputs = {"pixel_values": torch.ones(1, 3, 8, 8), "llm_embeds": torch.ones(1, 12)}
    with torch.no_grad():
        assert mine == pytest.approx(trained.eval()(**inputs).logits_per_image.item(), abs=1e-5)
    assert again == mine and abs(without - mine) > 1e-3
    assert (card.data.library_name, card.data.base_model) == ("peft", "alice/base")
    assert (
        'AutoModel.from_pretrained("alice/base"), "alice/adapter")' in card.text and "2 steps of 6 rows" in card.text
    )
    assert "adapter_model.safetensors" in sent and "model.safetensors" not in sent
