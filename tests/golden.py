"""Reads the recorded reference cases in `tests/golden/`, and compares tensors with them to their recorded tolerance.

A case is `<case>.json` (how it was made, its config and a tolerance for each tensor) with `<case>.safetensors` (the
tensors). Names carry a prefix: `in.` inputs, `param.` parameters under the reference's own keys, `out.` outputs,
`grad.` gradients.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


GOLDEN_DIR = Path(__file__).parent / "golden"


@dataclass
class Golden:
    """One recorded case. The four dictionaries are keyed by the tensor's name without its prefix.

    Attributes:
        case: name of the case.
        record: the whole json: "config", "notes", "scalars", "tensors" and whatever else the case recorded.
        inputs, params, outputs, grads: the tensors of each prefix.
        checked: full names that `assert_close` has compared so far.
    """

    case: str
    record: dict[str, Any]
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    params: dict[str, torch.Tensor] = field(default_factory=dict)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    grads: dict[str, torch.Tensor] = field(default_factory=dict)
    checked: set[str] = field(default_factory=set)

    @property
    def config(self) -> dict[str, Any]:
        return self.record["config"]

    def assert_close(self, name: str, actual: torch.Tensor | float) -> None:
        """Compares `actual` with the recorded tensor `name` ("out.y", "grad.in.x": prefix included).

        Shape and the json's atol and rtol decide; integers and booleans are exact. Raises AssertionError, or KeyError
        for a name that is no output or gradient of the case.
        """
        prefix, _, key = name.partition(".")
        expected = {"out": self.outputs, "grad": self.grads}[prefix][key]
        tolerance = self.record["tensors"][name]
        actual = torch.as_tensor(actual).detach().to(expected.dtype)
        torch.testing.assert_close(
            actual,
            expected,
            atol=tolerance["atol"],
            rtol=tolerance["rtol"],
            msg=lambda message: f"{self.case}: {name}: {message}",
        )
        self.checked.add(name)

    def unchecked(self) -> set[str]:
        """Full names of outputs and gradients not compared yet: a test of the whole case asserts that it is empty."""
        names = {f"out.{key}" for key in self.outputs} | {f"grad.{key}" for key in self.grads}
        return names - self.checked


def load(case: str) -> Golden:
    """Reads the case of that name, e.g. `load("g3_stage1_b2")`."""
    golden = Golden(case, json.loads((GOLDEN_DIR / f"{case}.json").read_text(encoding="utf-8")))
    if not golden.record.get("tensors"):
        return golden
    by_prefix = {"in": golden.inputs, "param": golden.params, "out": golden.outputs, "grad": golden.grads}
    for name, tensor in load_file(GOLDEN_DIR / f"{case}.safetensors").items():
        prefix, _, key = name.partition(".")
        by_prefix[prefix][key] = tensor
    return golden
