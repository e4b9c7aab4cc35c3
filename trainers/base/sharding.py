"""Training with parameters that FSDP2 shards over the processes, through accelerate: what stays whole, and how whole weights are put together again.

A parameter without dimensions, such as CLIP's logit scale, cannot be sharded (torch's `fully_shard` refuses it), and sharding it would save nothing. FSDP2
leaves it alone: it is an ordinary float32 parameter on every process, which may be read and changed anywhere. Its gradient, which FSDP2 would average if it
were sharded, is averaged over the processes here, once a step.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, StateDictType, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor

from .distributed import row_counts
from .replaced import replaced
from .zero import uses_deepspeed


def uses_fsdp(accelerator: Accelerator) -> bool:
    """Whether `accelerator` shards parameters by FSDP."""
    return accelerator.distributed_type == DistributedType.FSDP


def engine_of(accelerator: Accelerator) -> str | None:
    """What divides a training's weights or optimizer among the processes: "FSDP", "DeepSpeed", or None."""
    return "FSDP" if uses_fsdp(accelerator) else "DeepSpeed" if uses_deepspeed(accelerator) else None


def check_engine(accelerator: Accelerator) -> None:
    """Raises ValueError for settings of FSDP under which a training could not start, or would differ from the one that was asked for."""
    if not uses_fsdp(accelerator):
        return
    plugin = accelerator.state.fsdp_plugin
    settings = "in the file for accelerate launch (recipes/accelerate/fsdp2.yaml is one that works)"
    if plugin.fsdp_version != 2:
        raise ValueError(f"FSDP 1 is not supported: set fsdp_version: 2 {settings}.")
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading leaves every process but the first without the model's buffers, such as the adapter's input statistics: "
            f"set it to false {settings}."
        )
    if plugin.state_dict_type != StateDictType.SHARDED_STATE_DICT:
        raise ValueError(
            "fsdp_state_dict_type says how the state is kept that a training resumes from, which any number of processes can read if it is sharded "
            f"(the model itself is saved whole in any case): set it to SHARDED_STATE_DICT {settings}."
        )


def scalars(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that stay whole: those without dimensions."""
    return [parameter for parameter in model.parameters() if parameter.ndim == 0]


@contextmanager
def sharding_settings(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Within this context accelerate's FSDP shards `model` as it should be; nothing changes without FSDP.

    Scalars stay whole. With TRANSFORMER_BASED_WRAP a unit is one layer, of the kinds that `model` has. Weights are gathered in float32 and cast by autocast,
    as in every other training: FSDP's own policy would round the inputs as well, and the adapter's input statistics with them.
    """
    if not uses_fsdp(accelerator):
        yield
        return
    plugin = accelerator.state.fsdp_plugin
    changes: dict[str, Any] = {"ignored_modules": [nn.ParameterList(scalars(model))], "mixed_precision_policy": None}
    if plugin.auto_wrap_policy is transformer_auto_wrap_policy and plugin.transformer_cls_names_to_wrap is None:
        changes["transformer_cls_names_to_wrap"] = _units(model)
        changes["auto_wrap_policy"] = plugin.auto_wrap_policy  # which accelerate binds to the classes of one model
    with replaced(plugin, **changes):
        yield


def _units(model: nn.Module) -> list[str]:
    """The classes of layers that become units: those in `_no_split_modules` that `model` has (it also names layers of an LLM that may not be loaded), without
    those that hold its input embeddings, which accelerate makes a unit of their own.
    """
    embeddings = model.get_input_embeddings()
    kinds = {
        type(module).__name__ for module in model.modules() if all(part is not embeddings for part in module.modules())
    }
    return sorted(kinds & set(model._no_split_modules or ()))


def separate_scalars(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Give the scalars of `model` groups of their own: the optimizers' fused steps take no mixture of whole and sharded parameters."""
    whole, groups = set(scalars(model)), optimizer.param_groups
    separate = []
    for group in groups:
        of_group = group["params"]
        for params in ([p for p in of_group if p not in whole], [p for p in of_group if p in whole]):
            if params:
                separate.append({**group, "params": params})
    groups[:] = separate


def average_scalar_gradients(accelerator: Accelerator, model: nn.Module) -> None:
    """Average the scalars' gradients over the processes under FSDP, which does so for the sharded parameters only. All processes have to call it."""
    if uses_fsdp(accelerator):
        for parameter in scalars(model):
            if parameter.grad is not None:
                parameter.grad = accelerator.reduce(parameter.grad, reduction="mean")


def rounds_together(accelerator: Accelerator, own: int) -> int:
    """How many passes a process that needs `own` has to make. Under FSDP, whose processes run all passes together, and under DeepSpeed, whose processes run
    backward passes together, it is the most that any process needs.
    """
    if not (uses_fsdp(accelerator) or uses_deepspeed(accelerator)):
        return own
    return max(row_counts(torch.empty(own, device=accelerator.device)))


def saved_whole(accelerator: Accelerator) -> Any:
    """A context in which Transformers gathers the weights of a sharded model to save it, which it does only if the whole state is saved so."""
    if not uses_fsdp(accelerator):
        return nullcontext()
    return replaced(accelerator.state.fsdp_plugin, state_dict_type=StateDictType.FULL_STATE_DICT)


def shard_like(twin: nn.Module, model: nn.Module) -> None:
    """Shard `twin`, a module of the same structure that is not trained, as `model` is; each child of it can be called by itself. Nothing happens if `model` is
    not sharded, or `twin` is already.
    """
    mesh = next((p.device_mesh for p in model.parameters() if isinstance(p, DTensor)), None)
    if mesh is None:
        return
    children = {name for name, _ in model.named_children()}
    for name, module in reversed(list(model.named_modules())):  # what is inside comes first
        if name in children or (name and isinstance(module, FSDPModule)):
            part = twin.get_submodule(name)
            if not isinstance(part, FSDPModule) and any(True for _ in part.parameters()):
                # Without a backward pass nothing else would take the gathered weights away again.
                fully_shard(part, mesh=mesh, reshard_after_forward=True)


def structure_of(model: nn.Module) -> nn.Module:
    """A copy of `model` without its weights, for [`gathered`]."""
    weights = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, weights)


def gathered(structure: nn.Module, model: nn.Module) -> nn.Module:
    """`structure` with the weights of a sharded model, whole, on the CPU of every process. All processes have to call it."""
    structure.load_state_dict(full_state(model), assign=True)
    return structure


def full_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of `module`, with whole tensors on the CPU of every process; the device holds one of them at a time. All processes have to call it."""
    return {name: full_tensor(tensor).cpu() for name, tensor in module.state_dict().items()}


def load_full_state(module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Load a state dict of whole tensors, which every process has, into `module`, sharded or not."""
    if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        set_model_state_dict(module, dict(state), options=StateDictOptions(full_state_dict=True))
    else:
        module.load_state_dict(state)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, whole on every process. All processes have to call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, or the part of it that this process has."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
