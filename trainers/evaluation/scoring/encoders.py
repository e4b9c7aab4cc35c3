"""A model under evaluation: one way to embed images and texts for ProCLIP, CLIP, SigLIP and whatever else has both features."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, BatchFeature

import modeling_proclip  # noqa: F401  registers the classes
from modeling_proclip import ProCLIPModel
from modeling_proclip.identity import config_values, library_versions, own_weights_sha256, state_sha256
from trainers.compute.dtypes import ModelDtype, loading_dtype
from trainers.storage.model_files import loading_from
from trainers.text_store.encoding import (
    EncodedBatch,
    characters_read,
    count_truncated,
    embeddings_of,
    encode_texts,
    encoder_fingerprint,
    text_dtype,
)
from trainers.text_store.layout import PROVENANCE


# Raised when our own code decodes images or prepares them for the model in another way than the release before.
DECODING_VERSION = 1


# Pixels of decoded images that are in memory together, in each of the threads that prepare them: 100 MB.
_MOST_PIXELS = 1 << 25


class Encoder:
    """A model with its processor, ready to embed images and texts.

    Args:
        model: a `ProCLIPModel`, a CLIP or SigLIP of Transformers, or another module whose `get_image_features(**images)` and
            `get_text_features(**tokens)` return `(N, p)` tensors, or outputs with them as `pooler_output`. Put in eval mode.
        processor: its processor, with an `image_processor` and a `tokenizer`.
        name: for people.

    Raises:
        ValueError: If the model has no image or no text side, or the processor lacks a part.
    """

    def __init__(self, model: torch.nn.Module, processor: Any, name: str):
        for method in ("get_image_features", "get_text_features"):
            if not callable(getattr(model, method, None)):
                raise ValueError(
                    f"{name}: {type(model).__name__} has no {method}: evaluate a ProCLIP, a CLIP or SigLIP, or another model with "
                    "get_image_features and get_text_features"
                )
        for part in ("image_processor", "tokenizer"):
            if getattr(processor, part, None) is None:
                raise ValueError(
                    f"{name}: the processor ({type(processor).__name__}) has no {part}: save the model's whole processor beside it"
                )
        self.model, self.processor, self.name = model.eval(), processor, name
        # Also refuses a ProCLIP without its LLM, and a processor of another model.
        self._text = encoder_fingerprint(model, processor)

    @classmethod
    def load(
        cls,
        name_or_path: str,
        device: str | torch.device = "cpu",
        dtype: ModelDtype = "float32",
        attn_implementation: str | None = None,
    ) -> "Encoder":
        """Loads a model and its processor from a folder or from the Hub.

        Args:
            device: such as "cpu" or "cuda".
            dtype: of the model; "stored": each part as its checkpoint has it, "auto": bfloat16 where the device multiplies it natively.
            attn_implementation: such as "sdpa", "eager" or "flash_attention_2"; by default the library's choice.

        Raises:
            OSError: If nothing can be loaded from there.
            ValueError: As the class, or if there is no such dtype.
            ImportError: If the attention needs a package that is not installed.
        """
        if dtype not in get_args(ModelDtype):
            raise ValueError(f"dtype must be one of {', '.join(get_args(ModelDtype))}, got {dtype!r}")
        attention = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        with loading_from((name_or_path, None)):
            model = AutoModel.from_pretrained(name_or_path, **loading_dtype(dtype, device), **attention)
            processor = AutoProcessor.from_pretrained(name_or_path)
        path = Path(name_or_path)
        return cls(model.to(device), processor, path.resolve().name if path.exists() else name_or_path)

    @property
    def kind(self) -> str:
        """The family: "proclip", "clip", "siglip", ..., or the class of a model without a config."""
        config = getattr(self.model, "config", None)
        return config.model_type if config is not None else type(self.model).__name__

    @cached_property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @cached_property
    def dtype(self) -> torch.dtype:
        """That of the images that the model is given."""
        vision = self.model.vision_model if isinstance(self.model, ProCLIPModel) else self.model
        return next(p.dtype for p in vision.parameters() if p.is_floating_point())

    @cached_property
    def embedding_dim(self) -> int:
        """Size p of the shared embedding space. Costs one forward pass of an image."""
        return self.encode_images(self.prepare_images([Image.new("RGB", (8, 8))])).shape[-1]

    def check_truncate_dim(self, truncate_dim: int | None) -> None:
        """Raises ValueError if embeddings of this model cannot be cut to `truncate_dim` dimensions."""
        if truncate_dim is not None and not 0 < truncate_dim <= self.embedding_dim:
            raise ValueError(
                f"truncate_dim={truncate_dim}, but the embeddings of {self.name} have {self.embedding_dim} dimensions: give 1 to "
                f"{self.embedding_dim}"
            )

    @cached_property
    def weights_sha256(self) -> str:
        """Content hash of all weights, as they are in memory: another dtype has another hash."""
        return state_sha256(self.model.state_dict())

    def identity(self) -> dict[str, Any]:
        """ "name", "kind" and "weights_sha256" for the results; of a ProCLIP also "own_weights_sha256": of all but the LLM, in float32, which a
        checkpoint's files can be held against wherever its LLM is.
        """
        identity = {"name": self.name, "kind": self.kind, "weights_sha256": self.weights_sha256}
        if isinstance(self.model, ProCLIPModel):
            identity["own_weights_sha256"] = own_weights_sha256(self.model.state_dict())
        return identity

    def image_fingerprint(self) -> dict[str, Any]:
        """What decides an image's embedding, see [`modeling_proclip.identity`], with image processor, dtype and device."""
        if isinstance(self.model, ProCLIPModel):
            # The adapter and the LLM may change without the images' embeddings changing.
            state = self.model.state_dict()
            parts = {k: v for k, v in state.items() if k.startswith(("vision_model.", "visual_projection."))}
            weights, config = state_sha256(parts), self.model.config.vision_config
        else:
            weights, config = self.weights_sha256, getattr(self.model, "config", None)
        backend = ("torchvision",) if self._image_backend() == "torchvision" else ()
        return {
            "weights_sha256": weights,
            "config": config_values(config),
            "image_processor": self._image_processor_json(),
            "decoding": DECODING_VERSION,
            "versions": library_versions(("transformers", "pillow", *backend)),
            **self._place(),
        }

    def text_fingerprint(self) -> dict[str, Any]:
        """What decides what [`encode_texts`] gives. Two ProCLIPs with the same LLM, template and length share it."""
        fingerprint = {k: v for k, v in self._text.items() if k not in PROVENANCE}
        if not isinstance(self.model, ProCLIPModel):
            fingerprint["weights_sha256"] = self.weights_sha256
        return {**fingerprint, **self._place()}

    def prepare_images(self, images: Iterable[Image.Image]) -> BatchFeature:
        """Decoded images (mode "RGB") as the model takes them. Images that an iterator decodes are in memory a few at a time, if they are large."""
        prepare = self.processor.image_processor
        return join_images([prepare(images=some, return_tensors="pt") for some in _few_pixels(images)])

    @torch.inference_mode()
    def encode_images(self, inputs: BatchFeature) -> torch.Tensor:
        """`(N, p)` float32 embeddings on the CPU, not normalised, of what [`prepare_images`] returned."""
        inputs = {
            name: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }
        return embeddings_of(self.model.get_image_features(**inputs)).float().cpu()

    def encode_texts(self, texts: Sequence[str], token_budget: int | None = None) -> Iterator[EncodedBatch]:
        """Texts in batches of similar length; see [`trainers.text_store.encoding.encode_texts`]. SigLIP's are padded to full length."""
        return encode_texts(texts, self.model, self.processor, token_budget=token_budget)

    @torch.inference_mode()
    def project_texts(self, embeds: torch.Tensor) -> torch.Tensor:
        """`(N, p)` float32 embeddings in the space of the images, on the CPU, of what [`encode_texts`] gave."""
        if not isinstance(self.model, ProCLIPModel):
            return embeds
        weight = self.model.text_adapter.projection.weight
        return (
            self.model.get_text_features(llm_embeds=embeds.to(weight.device, weight.dtype)).pooler_output.float().cpu()
        )

    def count_truncated(self, texts: Sequence[str]) -> int:
        """How many of `texts` the model does not read to the end."""
        return count_truncated(texts, self.model, self.processor)

    def characters_read(self, text: str) -> int:
        """How many characters of `text` the model reads; see [`trainers.text_store.encoding.characters_read`]."""
        return characters_read(text, self.model, self.processor)

    def protocol(self) -> dict[str, Any]:
        """How this model was given its images and texts, for the results."""
        text = self._text
        image = self.processor.image_processor
        settings = image.to_dict()
        padded = self.kind in ("siglip", "siglip2")
        return {
            "text": {
                "tokenizer": type(self.processor.tokenizer).__name__,
                "max_length": text["max_length"],
                "padding": "to max_length" if padded else "to the longest of a batch, masked",
                "prompt_template": text["prompt_template"],
                "instruction": text["instruction"],
                "pooling": text["pooling"],
                "truncation": "the end of the content is cut, a prompt template is kept whole",
            },
            "image": {
                "processor": type(image).__name__,
                "backend": self._image_backend(),
                "size": settings.get("size"),
                "crop_size": settings.get("crop_size") if settings.get("do_center_crop") else None,
                "resample": settings.get("resample"),
                "conversion": "EXIF rotation undone, transparency on white, RGB",
            },
            "dtype": {name: str(dtype).removeprefix("torch.") for name, dtype in self._dtypes().items()},
            "device": self.device.type,
        }

    def _image_backend(self) -> str:
        return "pil" if type(self.processor.image_processor).__name__.endswith("Pil") else "torchvision"

    def _image_processor_json(self) -> str:
        settings = self.processor.image_processor.to_dict()
        text = json.dumps(settings, sort_keys=True, default=str)
        return f"{type(self.processor.image_processor).__name__} {hashlib.sha256(text.encode()).hexdigest()}"

    def _place(self) -> dict[str, str]:
        return {"dtype": str(self._dtypes()), "device": self.device.type}

    def _dtypes(self) -> dict[str, torch.dtype]:
        return {"image": self.dtype, "text": text_dtype(self.model)}


def join_images(parts: Sequence[BatchFeature]) -> BatchFeature:
    """What [`Encoder.prepare_images`] returned for several groups of images, as one batch."""
    return BatchFeature({name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def _few_pixels(images: Iterable[Image.Image]) -> Iterator[list[Image.Image]]:
    """The images in groups, each ended by the image that fills it."""
    group, num_pixels = [], 0
    for image in images:
        group.append(image)
        num_pixels += image.width * image.height
        if num_pixels > _MOST_PIXELS:
            yield group
            group, num_pixels = [], 0
    if group:
        yield group
