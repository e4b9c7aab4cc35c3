"""The dtype that a command asks for, on the device that it has."""

import pytest
import torch

from trainers.compute.dtypes import loading_dtype, native_dtype


@pytest.mark.parametrize("native, expected", [(True, torch.bfloat16), (False, torch.float32)])
def test_bfloat16_where_a_device_multiplies_it_natively(native, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": native}, raising=False)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: native and not including_emulation
    )
    assert native_dtype() == native_dtype("cpu") == native_dtype(torch.device("cuda:1")) == expected
    assert native_dtype("mps") == torch.float32
    for device in ("cpu", "cuda"):
        assert loading_dtype("auto", device) == {"dtype": expected}
        assert loading_dtype("float16", device) == {"dtype": torch.float16}
        assert loading_dtype("stored", device) == {}
