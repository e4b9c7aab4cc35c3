"""Training, evaluation and the command line of ProCLIP. Importing this package loads no torch: `proclip --help` goes through here."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .caption_contrastive_config import CaptionContrastiveConfig
    from .caption_contrastive_trainer import CaptionContrastiveTrainer
    from .contrastive_tuning_config import ContrastiveTuningConfig
    from .contrastive_tuning_trainer import ContrastiveTuningTrainer
    from .inheritance_config import RepresentationInheritanceConfig
    from .inheritance_trainer import RepresentationInheritanceTrainer
    from .masked_next_token import MaskedNextTokenConfig, MaskedNextTokenTrainer

__all__ = [
    "CaptionContrastiveConfig",
    "CaptionContrastiveTrainer",
    "ContrastiveTuningConfig",
    "ContrastiveTuningTrainer",
    "MaskedNextTokenConfig",
    "MaskedNextTokenTrainer",
    "RepresentationInheritanceConfig",
    "RepresentationInheritanceTrainer",
]

_MODULES = {
    "CaptionContrastiveConfig": "caption_contrastive_config",
    "CaptionContrastiveTrainer": "caption_contrastive_trainer",
    "ContrastiveTuningConfig": "contrastive_tuning_config",
    "ContrastiveTuningTrainer": "contrastive_tuning_trainer",
    "MaskedNextTokenConfig": "masked_next_token",
    "MaskedNextTokenTrainer": "masked_next_token",
    "RepresentationInheritanceConfig": "inheritance_config",
    "RepresentationInheritanceTrainer": "inheritance_trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
