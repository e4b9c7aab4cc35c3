"""Files of settings: what is read of YAML, what hostile ones end in, and how mistakes are told."""

import os
import time
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

import pytest
from pydantic import PositiveInt
from transformers import TrainingArguments

from trainers.storage.yaml_files import MAX_BYTES, MAX_DEPTH, NOT_IN_FILE, build, check_fields, parse_yaml, read_yaml


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: PositiveInt = 1
    names: str | list[str] = "x"
    share: float = 0.5
    made: Annotated[str | None, NOT_IN_FILE] = None

    def __post_init__(self) -> None:
        if self.share > 1:
            raise ValueError(f"share must be at most 1, got {self.share}")


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    inner: Inner = field(default_factory=Inner)
    several: list[Inner] = field(default_factory=list)
    perhaps: Inner | None = None
    by_name: dict[str, Inner] = field(default_factory=dict)
    kind: Literal["one", "two"] = "one"
    anything: dict[str, Any] = field(default_factory=dict)
    flag: bool = False


def test_yaml_as_people_read_it():
    text = "a: 4e-4\nb: 2024-01-01\nc: 1_000\nd: .5\ne: 12\nf: '7'\ng: 1.0e+2\nh: no\n"
    expected = {"a": 4e-4, "b": "2024-01-01", "c": 1000, "d": 0.5, "e": 12, "f": "7", "g": 100.0, "h": False}
    assert parse_yaml(text, "here") == expected
    assert parse_yaml("", "here") is None


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    (tmp_path / "a.yaml").write_text("name: ü\n", encoding="utf-8-sig")
    assert read_yaml(tmp_path / "a.yaml") == {"name": "ü"}


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: 1\na: 2\n", "here, line 2: the key 'a' is given twice"),
        ("1: a\n", "here, line 1: the key 1 is not text: put it in quotes"),
        ("no: a\n", "here, line 1: the key False is not text"),
        ("[1, 2]: a\n", "here, line 1: the key [1, 2] is not text"),
        ("a: [1\n", "here, line 2: expected ',' or ']'"),
        ("a: \x07\n", "here: unacceptable character #x0007"),
        ("a: !!python/object/apply:os.system [id]\n", "here, line 1: could not determine a constructor for the tag"),
        ("a: !!timestamp 2024-13-01\n", "here: month must be in 1..12"),
        ("a: " + "9" * 5000 + "\n", "here: Exceeds the limit (4300 digits)"),
        ("[" * 100_000, f"here, line 1: it is nested more than {MAX_DEPTH} levels deep"),
        ("{a: " * 1000, f"it is nested more than {MAX_DEPTH} levels deep"),
        ("a: 1\nb: *a\n", "here, line 2: *a is an alias, and aliases are not read: write out what it stands for"),
        ("a: &a [*a]\n", "here, line 1: *a is an alias"),
        ("a: &a {b: 1}\nc: {<<: *a}\n", "here, line 2: *a is an alias"),
        ("a: {<<: {b: 1}}\n", "here, line 1: could not determine a constructor for the tag 'tag:yaml.org,2002:merge'"),
    ],
)
def test_what_is_no_settings_is_one_line_and_soon(text, message):
    started = time.monotonic()
    with pytest.raises(ValueError) as error:
        parse_yaml(text, "here")
    assert message in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 200
    assert time.monotonic() - started < 30


def test_what_is_no_file_is_one_line(tmp_path):
    def refused(name: str) -> str:
        with pytest.raises((ValueError, OSError)) as error:
            read_yaml(tmp_path / name)
        return str(error.value).replace(str(tmp_path), "")

    os.mkfifo(tmp_path / "pipe.yaml")  # reading it would wait for ever
    assert refused("pipe.yaml") == "/pipe.yaml is not a file that can be read"
    assert refused(".") == " is not a file that can be read"
    assert refused("nowhere.yaml") == "there is no file /nowhere.yaml"
    (tmp_path / "latin.yaml").write_bytes("name: ü\n".encode("latin-1"))
    assert refused("latin.yaml").startswith("/latin.yaml: not encoded as UTF-8: ")
    with open(tmp_path / "huge.yaml", "wb") as file:
        file.truncate(10**12)  # takes no room on the disk
    assert refused("huge.yaml").startswith(f"/huge.yaml is larger than {MAX_BYTES:,} bytes")


def test_dataclasses_are_made_of_what_fits():
    values = {"name": "a", "several": [{"size": 2}], "perhaps": {"share": 1}, "by_name": {"x": {"names": ["y", "z"]}}}
    built = build(Outer, {**values, "anything": {"k": [1, None, {"l": 2.5}]}}, "here")
    assert (built.inner, built.several, built.perhaps) == (Inner(), [Inner(size=2)], Inner(share=1.0))
    assert built.by_name["x"].names == ["y", "z"] and built.anything == {"k": [1, None, {"l": 2.5}]}


@pytest.mark.parametrize(
    "values, message",
    [
        ({}, "name: is missing"),
        ({"nam": "a"}, "nam: unknown key; did you mean 'name'?"),
        ({"zzzz": "a"}, "zzzz: unknown key; known keys: anything, by_name, flag, inner, kind, name, perhaps, several"),
        ({"name": 7}, "name: must be text, got 7"),
        ({"name": None}, "name: must be text, got null"),
        ({"flag": 1}, "flag: must be true or false, got 1"),
        ({"kind": "three"}, "kind: must be 'one' or 'two', got the text 'three'"),
        ({"inner": {"size": True}}, "inner.size: must be a whole number, got true (YAML reads no, off and yes"),
        ({"inner": {"size": 1.5}}, "inner.size: must be a whole number, got 1.5"),
        ({"inner": {"size": 0}}, "inner.size: must be greater than 0, got 0"),
        ({"inner": {"share": "1"}}, "inner.share: must be a number, got the text '1'"),
        ({"inner": {"share": float("nan")}}, "inner.share: must be a finite number, got nan"),
        ({"inner": {"share": 2}}, "inner: share must be at most 1, got 2"),
        ({"inner": {"names": 3}}, "inner.names: must be text or a list, got 3"),
        ({"inner": {"names": ["a", 3]}}, "inner.names[1]: must be text, got 3"),
        ({"inner": {"sise": 3}}, "inner.sise: unknown key; did you mean 'size'?"),
        ({"inner": {"made": "x"}}, "inner.made: unknown key; "),
        ({"several": [{}, {"sise": 1}]}, "several[1].sise: unknown key; did you mean 'size'?"),
        ({"perhaps": {"sise": 1}}, "perhaps.sise: unknown key; did you mean 'size'?"),
        ({"perhaps": 3}, "perhaps: must be a mapping, got 3"),
        ({"by_name": {"x": {"sise": 1}}}, "by_name.x.sise: unknown key; did you mean 'size'?"),
        ({"anything": {"k": b"x"}}, "holds a value that is none of text, number, list and mapping"),
    ],
)
def test_a_mistake_is_named_with_its_place(values, message):
    with pytest.raises(ValueError) as error:
        build(Outer, values if "nam" in str(values)[:6] or not values else {"name": "a", **values}, "here.yaml")
    assert str(error.value).startswith(f"here.yaml: {message}") and "\n" not in str(error.value)


def test_what_is_no_mapping_is_refused():
    with pytest.raises(ValueError, match=r"^here: must be a mapping, got \['a'\]$"):
        build(Outer, ["a"], "here")
    with pytest.raises(ValueError, match="^here: must be a mapping, got null$"):
        build(Outer, None, "here")


def test_every_setting_of_a_trainer_can_be_checked():
    for setting in fields(TrainingArguments):
        if setting.init and isinstance(setting.default, (bool, int, float, str)):
            check_fields(TrainingArguments, {setting.name: setting.default}, "stage")
        with pytest.raises(ValueError, match=rf"^stage: {setting.name}(\[0\])?: "):
            check_fields(TrainingArguments, {setting.name: [[3]]}, "stage")
    check_fields(TrainingArguments, {"learning_rate": 1, "lr_scheduler_type": "cosine", "logging_steps": 5}, "stage")
    check_fields(TrainingArguments, {"lr_scheduler_kwargs": {"num_cycles": 2}, "save_strategy": "no"}, "stage")
    with pytest.raises(ValueError, match="^stage: learning_rte: unknown key; did you mean 'learning_rate'?"):
        check_fields(TrainingArguments, {"learning_rte": 1.0}, "stage")
