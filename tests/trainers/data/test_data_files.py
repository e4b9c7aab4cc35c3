"""Which files of a folder are read: those that its README states, or that patterns name."""

import json

import pytest

from tests.trainers.data.test_folders import LAYOUTS, texts_of, write
from trainers.data.folders import matching_files
from trainers.data.text_files import read_texts


def test_files_that_a_readme_states(tmp_path):
    """As a data set on the Hub does, here a copy of one."""
    for name in ("one.csv", "two.csv"):
        (tmp_path / name).write_text(f"text\n{name}\n")
    header = {
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": "train", "path": "one.*"}, {"split": "seen", "path": "two.csv"}],
            }
        ]
    }
    (tmp_path / "README.md").write_text(f"---\n{json.dumps(header)}\n---\n# Data\n")
    assert list(read_texts(tmp_path)) == ["one.csv"]
    assert list(read_texts(tmp_path, split="seen")) == ["two.csv"]
    with pytest.raises(ValueError, match="has no split 'test'; its README.md states train, seen"):
        read_texts(tmp_path, split="test")
    for outside in ("../secret.csv", "/etc/passwd", "https://example.org/a.csv"):
        (tmp_path.parent / "secret.csv").write_text("text\nsecret\n")
        header["configs"][0]["data_files"] = outside
        (tmp_path / "README.md").write_text(f"---\n{json.dumps(header)}\n---\n")
        with pytest.raises(FileNotFoundError, match="no file in it fits the pattern"):
            read_texts(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        "configs: [",
        "configs:\n- config_name: a\n  data_files: 7",
        "configs:\n- config_name: a\n  data_files: [{split: [a], path: b}]",
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi"))
        + "configs:\n- config_name: *i\n  data_files: *i",
    ],
    ids=["no YAML", "a number", "a list as a split", "a bomb"],
)
def test_a_readme_that_states_nonsense_is_named(tmp_path, header):
    for nothing in ("- configs", "configs: 7", "configs: [7]", "configs: [{config_name: [a], data_files: b}]"):
        (tmp_path / "README.md").write_text(f"---\n{nothing}\n---\n")
        (tmp_path / "one.csv").write_text("text\none\n")
        assert list(read_texts(tmp_path)) == ["one"]
    (tmp_path / "one.csv").write_text("text\none\n")
    (tmp_path / "README.md").write_text(f"---\n{header}\n---\n")
    with pytest.raises(ValueError, match=r"README\.md"):
        read_texts(tmp_path)


def test_patterns_of_files(tmp_path):
    files = ["a.tar", "test/0.tar", "test/1.tar", "test/deep/2.tar", "train/0.tar", "test/notes.txt"]
    for pattern, expected in {
        "test/*.tar": files[1:3],
        "test/**/*.tar": files[1:4],
        "**/*.tar": files[:5],
        "**": files,
        "*.tar": files[:1],
        "test/[0].tar": files[1:2],
    }.items():
        assert matching_files(files, [pattern], "here") == expected, pattern
    for pattern in ("../*.tar", "/etc/*", "x*", "a.tar/**/x"):
        with pytest.raises(FileNotFoundError, match="here: no file in it fits the pattern"):
            matching_files(files, [pattern], "here")
    with pytest.raises(FileNotFoundError):  # and soon
        matching_files(["a/" * 60 + "a" * 200], ["**/" * 60 + "*a" * 60 + "b"], "here")


def test_a_pattern_of_files_within_a_folder(tmp_path):
    write(tmp_path, "shards", {"train": 2, "test": 1})
    assert texts_of(tmp_path, data_files="test/*.tar", **LAYOUTS["shards"]) == ["test 0"]
    assert texts_of(tmp_path, "test", data_files=["test/*.tar"], **LAYOUTS["shards"]) == ["test 0"]
