"""ProCLIP for Transformers: importing this package registers its classes with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
)

from .configuration_eva_clip import EvaCLIPVisionConfig
from .configuration_proclip import ProCLIPConfig
from .conversion import ConversionError, convert
from .modeling_eva_clip import EvaCLIPVisionModel
from .modeling_proclip import ProCLIPModel, ProCLIPOutput
from .processing_proclip import ProCLIPProcessor


AutoModel.register(EvaCLIPVisionConfig, EvaCLIPVisionModel)  # its configuration registers itself
AutoConfig.register("proclip", ProCLIPConfig)
AutoModel.register(ProCLIPConfig, ProCLIPModel)
AutoModelForZeroShotImageClassification.register(ProCLIPConfig, ProCLIPModel)
AutoProcessor.register(ProCLIPConfig, ProCLIPProcessor)

__all__ = [
    "ConversionError",
    "EvaCLIPVisionConfig",
    "EvaCLIPVisionModel",
    "ProCLIPConfig",
    "ProCLIPModel",
    "ProCLIPOutput",
    "ProCLIPProcessor",
    "convert",
]
