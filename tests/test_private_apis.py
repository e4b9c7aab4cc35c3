"""Private names of Transformers that our code uses are those that docs/private_apis.md lists with a test each."""

import ast
import re

from transformers import PreTrainedModel, Trainer

from tests.environments import PACKAGES, REPOSITORY


def private(library_class: type) -> set[str]:
    return {name for name in dir(library_class) if re.match(r"_[a-z]", name)}


def used(names: set[str]) -> set[str]:
    """Those of `names` that a class of ours defines or that our code reads or sets as an attribute."""
    found = set()
    for file in (file for package in PACKAGES for file in (REPOSITORY / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                found.add(node.attr)
            if isinstance(node, ast.ClassDef):
                assigned = [target for line in node.body if isinstance(line, ast.Assign) for target in line.targets]
                found |= {target.id for target in assigned if isinstance(target, ast.Name)}
                found |= {line.name for line in node.body if isinstance(line, ast.FunctionDef)}
    return found & names


def test_every_private_name_of_transformers_is_listed():
    # Attributes that Trainer sets in its __init__ are no part of the class.
    names = private(Trainer) | private(PreTrainedModel) | {"_train_batch_size", "_attn_implementation"}
    page = (REPOSITORY / "docs" / "private_apis.md").read_text(encoding="utf-8").split("## Others")[0]
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    listed = set(re.findall(r"`(_\w+)`", "".join(rows)))
    assert used(names) == listed
