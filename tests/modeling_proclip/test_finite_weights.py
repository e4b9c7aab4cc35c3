"""Weights that hold NaN or infinity are found, whatever their dtype."""

import pytest
import torch

from modeling_proclip.finite_weights import check_finite, is_finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_one_bad_value_is_found(value, dtype):
    tensor = torch.zeros(3, 5)
    assert is_finite(tensor.to(dtype))
    tensor[1, 3] = value
    assert not is_finite(tensor.to(dtype))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(3),
        torch.tensor(True),
        torch.empty(0),
        torch.empty(2, device="meta"),
        torch.tensor(3e38),
        torch.ones(4)[::2],
    ],
)
def test_what_holds_no_such_value_passes(tensor):
    assert is_finite(tensor)


def test_the_message_names_the_first_tensor_and_counts_the_others():
    bad = torch.tensor([0.0, float("nan")], requires_grad=True)
    check_finite({"a": torch.ones(2)}, "the model")
    with pytest.raises(ValueError, match=r"^model.safetensors: b holds NaN or infinity \(1 of 2 tensors do\)$"):
        check_finite({"a": torch.ones(2), "b": bad}, "model.safetensors")
    with pytest.raises(ValueError, match="b holds NaN or infinity .2 of 2"):
        check_finite({"b": bad, "c": bad}, "the model")
