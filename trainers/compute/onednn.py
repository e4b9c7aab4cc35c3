"""The fastest float32 linear layer that torch has on this processor."""

import platform
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


# Built into torch for x86; elsewhere it may be there without a fast matrix product.
HAS_ONEDNN = torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")


class OneDNNLinear(TorchFunctionMode):
    """Within this context, float32 linear layers on the CPU run through oneDNN, without gradient.

    Torch gives them to MKL, which leaves half of an AMD processor idle: on one core of a Zen 5, for 1,000 tokens, MKL does 82 GFLOP/s and
    oneDNN 172. bfloat16 goes through oneDNN anyway. The choice does not hang on a measurement, so a build that is resumed makes it again.
    Compiled layers keep torch's own: its compiler takes oneDNN's operator with prepared weights only.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Calls `func`, or oneDNN in its place where it is a float32 linear layer."""
        if (
            func is F.linear
            and not torch.compiler.is_compiling()
            and not kwargs
            and args[0].dtype == args[1].dtype == torch.float32
        ):
            inputs, weight, bias = args if len(args) == 3 else (*args, None)
            return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
        return func(*args, **(kwargs or {}))


def fastest_linear(device: torch.device) -> AbstractContextManager:
    """The context in which linear layers on `device` run fastest without gradient: [`OneDNNLinear`] on an x86 CPU."""
    return OneDNNLinear() if device.type == "cpu" and HAS_ONEDNN else nullcontext()
