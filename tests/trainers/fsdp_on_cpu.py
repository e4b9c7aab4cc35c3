"""FSDP2 on a CPU, for tests. accelerate takes FSDP only where there is an accelerator (`AcceleratorState.__init__`), and torch's own `fully_shard` runs on CPUs
with gloo: this module makes the state that accelerate would make on GPUs, and nothing else.

Run as a program, it is `proclip`: `accelerate launch --config_file recipes/accelerate/fsdp2.yaml -m tests.trainers.fsdp_on_cpu train RECIPE`.
"""

from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin


def choose_fsdp() -> None:
    """Make FSDP the choice of every `Accelerator` of this process that has an FSDP plugin and several processes."""
    init = AcceleratorState.__init__

    def with_fsdp(
        self: AcceleratorState, *args: Any, fsdp_plugin: FullyShardedDataParallelPlugin | None = None, **kwargs: Any
    ):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = with_fsdp  # type: ignore[method-assign]


if __name__ == "__main__":
    from trainers.cli import app

    choose_fsdp()
    app()
