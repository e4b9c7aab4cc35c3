"""Trainers publish the repository that `proclip publish` publishes."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from transformers import AutoModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from hub_cards.publish import publish
from modeling_proclip import ProCLIPModel, ProCLIPProcessor
from tests.hub_server import TOKEN, HubServer, hub_server
from tests.modeling_proclip import tiny
from tests.trainers.tiny_training import LLM_DIM, inheritance_trainer, tiny_model, tuning_trainer


PROCESSOR = ProCLIPProcessor(
    CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
    tiny.tokenizer(),
    prompt_template=tiny.LLAMA3,
    max_length=40,
)
TEXT = {**tiny.TEXT, "hidden_size": LLM_DIM, "head_dim": 6, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture
def hub(tmp_path, monkeypatch) -> HubServer:
    with hub_server(tmp_path / "blobs") as server:
        server.patch(monkeypatch, tmp_path / "home")
        yield server


def named_model(load_text_model: bool = False) -> ProCLIPModel:
    model = tiny_model(text_config=TEXT, load_text_model=load_text_model)
    model.config.text_model_name_or_path, model.config.text_model_sha256 = "alice/llm", "0" * 64
    return model


def names(hub: HubServer, repo_id: str, revision: str = "main") -> set[str]:
    return set(hub.files(repo_id, revision))


@pytest.mark.parametrize("make", [inheritance_trainer, tuning_trainer])
def test_push_to_hub_sends_a_complete_lean_repository(make, hub, tmp_path, monkeypatch):
    trainer = make(tmp_path / "run", named_model(load_text_model=True), processing_class=PROCESSOR, max_steps=1)
    trainer.train()
    (tmp_path / "run" / "optimizer.pt").write_text("not to be sent")
    report = trainer.push_to_hub(commit_message="trained")
    assert report.repo_id == "alice/run" and hub.repositories["model", "alice/run"].private
    assert trainer.model.text_model is not None  # only the repository is without it
    publish(tmp_path / "run", "alice/by-hand")
    assert names(hub, "alice/run") == names(hub, "alice/by-hand")
    for name in names(hub, "alice/run") - {"README.md", ".gitattributes"}:
        assert hub.read("alice/run", name) == hub.read("alice/by-hand", name), name
    fetched = AutoModel.from_pretrained(snapshot_download("alice/run"), load_text_model=False)
    assert torch.equal(fetched.text_adapter.projection.weight, trainer.model.text_adapter.projection.weight)
    assert hub.repositories["model", "alice/run"].find("main").message == "trained"
    assert "1 steps" in hub.read("alice/run", "README.md").decode()


def test_checkpoints_are_published_while_it_trains(hub, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "save_total_limit": 1}
    hub_settings = {
        "push_to_hub": True,
        "hub_strategy": "every_save",
        "hub_always_push": True,
        "hub_private_repo": False,
    }
    hub_settings |= {"hub_model_id": "alice/live", "hub_revision": "training"}
    trainer = tuning_trainer(tmp_path / "run", named_model(), processing_class=PROCESSOR, **settings, **hub_settings)
    trainer.train()
    trainer._finish_current_push()
    repository = hub.repositories["model", "alice/live"]
    assert not repository.private
    messages = [commit.message for commit in repository.commits.values()]
    assert messages[1:4] == [f"Training in progress, step {step}" for step in (1, 2, 3)]
    assert {"model.safetensors", "modeling_proclip.py", "tokenizer.json", "README.md"} <= names(
        hub, "alice/live", "training"
    )
    assert not [name for name in names(hub, "alice/live", "training") if name.endswith((".pt", ".pth", ".bin"))]
    last = load_file(hub.blob_path(hub.files("alice/live", "training")["model.safetensors"].sha256))
    assert torch.equal(last["text_adapter.projection.weight"], trainer.model.text_adapter.projection.weight)
    assert not list(Path(tmp_path, "run").glob("_push*"))


def test_the_whole_checkpoint_is_sent_where_it_is_asked_for(hub, tmp_path):
    settings = {
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 1,
        "push_to_hub": True,
        "hub_strategy": "checkpoint",
        "hub_token": TOKEN,
        "hub_private_repo": False,
    }
    trainer = inheritance_trainer(tmp_path / "run", named_model(), processing_class=PROCESSOR, **settings)
    trainer.train()
    trainer._finish_current_push()
    assert {"last-checkpoint/optimizer.pt", "last-checkpoint/trainer_state.json"} <= names(hub, "alice/run")
    assert json.loads(hub.read("alice/run", "config.json"))["lean"]
    trainer.save_model(tmp_path / "saved")
    for name in names(hub, "alice/run"):
        assert TOKEN.encode() not in hub.read("alice/run", name), name
    for file in (file for file in tmp_path.rglob("*") if file.is_file() and "home" not in file.parts):
        assert TOKEN.encode() not in file.read_bytes(), file
    fetched = Path(snapshot_download("alice/run", local_dir=tmp_path / "fetched"), "last-checkpoint")
    resumed = inheritance_trainer(tmp_path / "again", named_model(), processing_class=PROCESSOR, max_steps=2)
    assert resumed.train(resume_from_checkpoint=str(fetched)).global_step == 2


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_no_token_and_no_path_reaches_the_hub(hub, tmp_path, monkeypatch, strategy):
    model = named_model()
    model.config.vision_model_name_or_path = str(tmp_path / "clip")

    settings = {
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 2,
        "push_to_hub": True,
        "hub_always_push": True,
    }
    settings |= {"hub_strategy": strategy, "hub_token": TOKEN, "hub_private_repo": False}
    trainer = inheritance_trainer(tmp_path / "run", model, processing_class=PROCESSOR, **settings)

    def leave_something(folder: Path) -> None:
        trainer.state.best_model_checkpoint = str(folder)
        for name in ("training_args.bin", "optimizer.pt.bak", "notes.json"):
            (folder / name).write_text(TOKEN)

    monkeypatch.setattr(trainer, "save_state", leave_something)
    trainer.train()
    trainer._finish_current_push()
    trainer.push_to_hub()
    assert strategy == "end" or len(hub.repositories["model", "alice/run"].commits) > 3
    for name in names(hub, "alice/run"):
        content = hub.read("alice/run", name)
        assert TOKEN.encode() not in content and str(tmp_path).encode() not in content, name


def test_what_could_not_be_published_is_refused_before_training(hub, tmp_path):
    with pytest.raises(ValueError, match="None is not a name on the Hub"):
        tuning_trainer(tmp_path, tiny_model(text_config=TEXT), processing_class=PROCESSOR, push_to_hub=True)
    with pytest.raises(ValueError, match="pass processing_class=processor"):
        tuning_trainer(tmp_path, named_model(), push_to_hub=True)
    publish_public = {"push_to_hub": True, "hub_private_repo": False, "hub_model_id": "alice/x"}
    tuning_trainer(tmp_path, named_model(), processing_class=PROCESSOR, **publish_public)
    with pytest.raises(ValueError, match="alice/x is there and public"):
        tuning_trainer(tmp_path, named_model(), processing_class=PROCESSOR, push_to_hub=True, hub_model_id="alice/x")


def test_a_push_that_fails_does_not_stop_training(hub, tmp_path, caplog):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "push_to_hub": True}
    trainer = tuning_trainer(tmp_path / "run", named_model(), processing_class=PROCESSOR, **settings)
    hub.fail("POST", "/commit/", 503, times=9)
    trainer.train()
    trainer._finish_current_push()
    assert trainer.state.global_step == 2
    assert "alice/run did not get 'Training in progress, step 1': The Hub failed (503" in caplog.text
