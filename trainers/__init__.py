"""Training, evaluation and the command line of ProCLIP. Importing this package loads no torch: `proclip --help` goes through here."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from trainers.caption_contrastive.config import CaptionContrastiveConfig
    from trainers.caption_contrastive.masked_next_token import MaskedNextTokenConfig, MaskedNextTokenTrainer
    from trainers.caption_contrastive.trainer import CaptionContrastiveTrainer
    from trainers.contrastive_tuning.config import ContrastiveTuningConfig
    from trainers.contrastive_tuning.trainer import ContrastiveTuningTrainer
    from trainers.inheritance.config import RepresentationInheritanceConfig
    from trainers.inheritance.trainer import RepresentationInheritanceTrainer

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
    "CaptionContrastiveConfig": "caption_contrastive.config",
    "CaptionContrastiveTrainer": "caption_contrastive.trainer",
    "ContrastiveTuningConfig": "contrastive_tuning.config",
    "ContrastiveTuningTrainer": "contrastive_tuning.trainer",
    "MaskedNextTokenConfig": "caption_contrastive.masked_next_token",
    "MaskedNextTokenTrainer": "caption_contrastive.masked_next_token",
    "RepresentationInheritanceConfig": "inheritance.config",
    "RepresentationInheritanceTrainer": "inheritance.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
