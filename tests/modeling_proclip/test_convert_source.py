"""Names that `convert` takes: files, folders, and what it asks of the Hub's client for names there. No network."""

import shutil
from pathlib import Path

import pytest

from modeling_proclip import ConversionError, convert
from modeling_proclip.conversion import source
from tests import golden
from tests.modeling_proclip import tiny


PUBLISHED = golden.GOLDEN_DIR / "g2_vit_quickgelu.bare.pt"
REPOSITORIES = {
    "owner/many": ["README.md", "3m/B16.pt", "3m/L14.pt"],
    "owner/one": ["README.md", "config.json", "LLM2CLIP.pt", "modeling.py"],
    "owner/llm": [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "modeling.py",
        "sub/model.safetensors",
        "sub/config.json",
    ],
}


@pytest.fixture
def asked(monkeypatch, tmp_path) -> list:
    """What the Hub's client was asked for, in order; it answers with the recorded file or LLM."""
    asked: list = []
    copy = tmp_path / "cache"
    shutil.copytree(tiny.LLAMA_DIR, copy, copy_function=shutil.copyfile)
    shutil.copytree(tiny.LLAMA_DIR, copy / "sub", copy_function=shutil.copyfile)

    def files(repository, revision=None):
        if repository not in REPOSITORIES:
            raise OSError("404")
        return REPOSITORIES[repository]

    def download(repository, file, revision=None):
        asked.append((repository, file, revision))
        return str(PUBLISHED)

    def snapshot(repository, revision=None, allow_patterns=None):
        asked.append((repository, sorted(allow_patterns), revision))
        return str(copy)

    monkeypatch.setattr(source, "list_repo_files", files)
    monkeypatch.setattr(source, "hf_hub_download", download)
    monkeypatch.setattr(source, "snapshot_download", snapshot)
    return asked


def test_a_file_of_a_repository(asked, tmp_path):
    convert("owner/many/3m/B16.pt", tmp_path / "out", head_width=8, revision="v1", dry_run=True)
    assert asked == [("owner/many", "3m/B16.pt", "v1")]


def test_the_only_checkpoint_of_a_repository(asked, tmp_path):
    convert("owner/one", tmp_path / "out", head_width=8, dry_run=True)
    assert asked == [("owner/one", "LLM2CLIP.pt", None)]


def test_several_checkpoints_are_listed_and_none_is_fetched(asked, tmp_path):
    with pytest.raises(
        ConversionError, match="owner/many holds several checkpoints, so name one: 3m/B16.pt, 3m/L14.pt"
    ):
        convert("owner/many", tmp_path / "out")
    assert asked == []


@pytest.mark.parametrize("name, folder", [("owner/llm", ""), ("owner/llm/sub", "sub/")])
def test_folders_without_their_code(name, folder, asked, tmp_path):
    report = convert(name, tmp_path / "out", dry_run=True)
    (_, wanted, _) = asked[0]
    assert folder + "model.safetensors" in wanted and not any(file.endswith(".py") for file in wanted)
    assert not any("/" in file.removeprefix(folder) for file in wanted), "nothing of the folders below"
    assert report.source == tmp_path / "cache" / folder


@pytest.mark.parametrize("name", ["owner/absent", "./owner/one", "../one", "one", "a/b/"])
def test_what_is_nowhere(name, asked, tmp_path):
    with pytest.raises(ConversionError, match="neither"):
        convert(name, tmp_path / "out")


def test_the_only_checkpoint_of_a_folder(tmp_path):
    folder = tmp_path / "download"
    folder.mkdir()
    shutil.copyfile(PUBLISHED, folder / "anything.pt")
    assert convert(folder, tmp_path / "out", head_width=8, dry_run=True).source == folder / "anything.pt"
    shutil.copyfile(PUBLISHED, folder / "more.pt")
    with pytest.raises(ConversionError, match="several checkpoints, so name one: anything.pt, more.pt"):
        convert(folder, tmp_path / "out")
    with pytest.raises(ConversionError, match="neither a file nor a folder"):
        convert(Path("owner/one"), tmp_path / "out")


def test_an_address_is_no_source(tmp_path):
    with pytest.raises(ConversionError, match="is an address: name the repository on the Hub, owner/name"):
        convert("https://huggingface.co/owner/name", tmp_path / "out")
