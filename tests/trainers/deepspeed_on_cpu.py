"""DeepSpeed on a CPU, for tests. accelerate's CPU mode leaves DeepSpeed out (`AcceleratorState.__init__`), and DeepSpeed itself runs on CPUs with gloo: this
module makes the state that accelerate would make on GPUs, and nothing else.

Run as a program, it is `proclip`: `accelerate launch --config_file recipes/accelerate/deepspeed_zero2.yaml -m tests.trainers.deepspeed_on_cpu train RECIPE`.
"""

import os
from typing import Any

from accelerate import PartialState


def choose_deepspeed() -> None:
    """Make DeepSpeed the choice of every `Accelerator` of this process, on CPUs with gloo, where `accelerate launch` asks for DeepSpeed."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.ops

    # Shared memory among the processes, which would be compiled for a minute. gloo does the same.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    init = PartialState.__init__

    def with_deepspeed(self: PartialState, cpu: bool = False, **kwargs: Any):
        init(self, cpu=False, **{**kwargs, "backend": "gloo"})

    PartialState.__init__ = with_deepspeed  # type: ignore[method-assign]


if __name__ == "__main__":
    from trainers.cli import app

    choose_deepspeed()
    app()
