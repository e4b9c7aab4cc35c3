"""Which dtype a device multiplies fastest."""

import torch


def native_dtype() -> torch.dtype:
    """bfloat16 where the processor multiplies it natively (about four times faster than float32), else float32."""
    # Older releases of torch cannot tell; float32 is right everywhere.
    capabilities: dict = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.bfloat16 if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else torch.float32
