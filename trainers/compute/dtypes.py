"""Which dtype a device multiplies fastest, and which one a command was asked for."""

from typing import Any, Literal

import torch


# "stored": each part as its checkpoint has it. "auto": what the device multiplies natively.
ModelDtype = Literal["auto", "float32", "bfloat16", "float16", "stored"]


def native_dtype(device: str | torch.device = "cpu") -> torch.dtype:
    """bfloat16 where `device` multiplies it natively (two to four times faster than float32), else float32."""
    kind = torch.device(device).type
    if kind == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # Older releases of torch cannot tell; float32 is right everywhere.
        capabilities: dict = getattr(torch.cpu, "get_capabilities", dict)() if kind == "cpu" else {}
        native = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return torch.bfloat16 if native else torch.float32


def loading_dtype(dtype: ModelDtype, device: str | torch.device) -> dict[str, Any]:
    """The `dtype` of `from_pretrained` for a model that will run on `device`: `{"dtype": ...}`, or `{}` for what is stored."""
    if dtype == "stored":
        return {}
    return {"dtype": native_dtype(device) if dtype == "auto" else getattr(torch, dtype)}


def default_device() -> str:
    """The GPU if there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"
