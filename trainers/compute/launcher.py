"""Which of several processes this one is, by the variables that its launcher sets."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass


logger = logging.getLogger(__name__)

# The launchers' variables for the index of a process, how many there are, and the index on its machine. The first that are set decide: under `srun
# torchrun`, say, torchrun's.
_LAUNCHERS = {
    "accelerate or torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "Slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
}


@dataclass(frozen=True)
class LaunchedProcess:
    """One of `count` processes.

    Attributes:
        index: from 0.
        count: over all machines.
        local_index: among the processes on its machine; None if the launcher does not say.
    """

    index: int = 0
    count: int = 1
    local_index: int | None = None


def launched_process(environment: Mapping[str, str] = os.environ) -> LaunchedProcess:
    """What the launcher says of this process: accelerate's and torchrun's RANK and WORLD_SIZE, else Slurm's SLURM_PROCID and SLURM_NTASKS. Without a
    launcher it is the only one. ValueError if only one of the two is set, or they make no sense.
    """
    for launcher, names in _LAUNCHERS.items():
        index_name, count_name, local_name = names
        values = {name: _number(name, environment[name]) for name in names if name in environment}
        if index_name not in values and count_name not in values:
            continue
        for name, other in ((index_name, count_name), (count_name, index_name)):
            if name not in values:
                raise ValueError(
                    f"{other} is set and {name} is not: {launcher} sets both. Set both or neither, or give --process-index and --num-processes"
                )
        index, count = values[index_name], values[count_name]
        if not 0 <= index < count:
            rule = f"the index of a process is from 0 to {count - 1}" if count else "there is at least one process"
            raise ValueError(f"{index_name} is {index} and {count_name} is {count}: {rule}")
        if launcher == "Slurm" and count > 1 and "SLURM_JOB_ID" in environment and "SLURM_STEP_ID" not in environment:
            logger.warning(
                "Slurm calls this process number %d of %d, and srun did not start it: nobody may have started the others. Start it by srun",
                index,
                count,
            )
        return LaunchedProcess(index, count, values.get(local_name))
    return LaunchedProcess()


def _number(name: str, value: str) -> int:
    if not value.isdecimal():
        raise ValueError(f"{name} is {value!r}: it should be a whole number, as the launcher sets it")
    return int(value)
