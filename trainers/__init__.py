"""Training, evaluation and the command line of ProCLIP. Importing this package loads no torch: `proclip --help` goes through here."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .contrastive_tuning_config import ContrastiveTuningConfig
    from .contrastive_tuning_trainer import ContrastiveTuningTrainer
    from .inheritance_config import RepresentationInheritanceConfig
    from .inheritance_trainer import RepresentationInheritanceTrainer

__all__ = [
    "ContrastiveTuningConfig",
    "ContrastiveTuningTrainer",
    "RepresentationInheritanceConfig",
    "RepresentationInheritanceTrainer",
]

_MODULES = {
    "ContrastiveTuningConfig": "contrastive_tuning_config",
    "ContrastiveTuningTrainer": "contrastive_tuning_trainer",
    "RepresentationInheritanceConfig": "inheritance_config",
    "RepresentationInheritanceTrainer": "inheritance_trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
