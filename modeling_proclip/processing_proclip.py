"""ProCLIP processor: pictures for the image encoder, templated texts for the LLM."""

from typing import Any

import numpy as np
from PIL import Image, ImageOps
from transformers import BatchFeature, ProcessorMixin
from transformers.utils import logging

from .prompt_template import apply_template, choose_template


logger = logging.get_logger(__name__)


class ProCLIPProcessor(ProcessorMixin):
    r"""
    An image processor and an LLM's tokenizer that wraps every text in the LLM's prompt template.

    Args:
        image_processor (`BaseImageProcessor`): Image processor of the vision tower.
        tokenizer (`PreTrainedTokenizerFast`):
            Tokenizer of the LLM. It is changed in place: it carries the template from then on, pads on the left, pads with EOS if it has
            no padding token, and returns `token_type_ids`.
        prompt_template (`str`, *optional*):
            Holds `{text}` once, for example `"<|im_start|>user\n{text}<|im_end|>"`. By default the template of the chat markers that the
            tokenizer's chat template uses, and `"{text}"` for an LLM without one. Saved with the processor.
        instruction (`str`, *optional*): Stands before every text inside the template and is not pooled. Saved with the processor.
        max_length (`int`, defaults to 512): Most tokens of a text, template included.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        prompt_template: str | None = None,
        instruction: str | None = None,
        max_length: int = 512,
        **kwargs: Any,
    ):
        super().__init__(image_processor, tokenizer, **kwargs)
        self.prompt_template = choose_template(tokenizer) if prompt_template is None else prompt_template
        self.instruction = instruction
        self.max_length = max_length
        if tokenizer.pad_token is None:
            if tokenizer.eos_token is None:
                raise ValueError(
                    f"{type(tokenizer).__name__} has neither pad_token nor eos_token: set tokenizer.pad_token."
                )
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "left"
        tokenizer.model_input_names = ["input_ids", "attention_mask", "token_type_ids"]
        tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names
        self._template_length = apply_template(tokenizer, self.prompt_template, instruction)
        self._check_length(max_length)
        self._said_truncated = False
        self.text_kwargs = {"padding": True, "truncation": True, "max_length": max_length}

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        r"""
        Args:
            images: A picture or a list of them: PIL images of any mode, arrays, tensors, paths or URLs. Transparent pixels become white,
                16-bit grey becomes 8-bit, a camera's rotation is undone.
            text (`str` or `list[str]`): Texts of any length and language; whitespace at the end is dropped. Those over `max_length` lose
                the end of their content, never the template, and a warning says so once.
            kwargs: Of the tokenizer and the image processor, such as `return_tensors="pt"`, `padding` or `max_length`.

        Returns:
            `BatchFeature` with `input_ids`, `attention_mask` and `token_type_ids` of shape `(num_texts, sequence_length)`, where
            `token_type_ids` is 1 on the tokens that the pooling reads (content and end of turn), and `pixel_values` of shape
            `(num_images, 3, height, width)`.

        Raises:
            ValueError: If neither is given, a text is not a string, or `max_length` leaves no room beside the template.
        """
        if images is None and text is None:
            raise ValueError("Give text, images or both.")
        if images is not None:
            images = _to_rgb(images)
        if text is not None:
            self._check_length(kwargs.get("max_length", self.max_length))
            text = _clean(text)
        features = super().__call__(images=images, text=text, **kwargs)
        if text is not None and not self._said_truncated:
            self._warn_if_truncated(features, kwargs.get("max_length", self.max_length), text)
        return features

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]

    def _check_length(self, max_length: int) -> None:
        if max_length <= self._template_length:
            raise ValueError(
                f"max_length={max_length} leaves no room for text: prompt template, instruction and special tokens take "
                f"{self._template_length} tokens."
            )

    def _warn_if_truncated(self, features: BatchFeature, max_length: int, text: str | list[str]) -> None:
        texts, rows = (
            ([text], [np.ravel(features["input_ids"])]) if isinstance(text, str) else (text, features["input_ids"])
        )
        if max(map(len, rows)) < max_length:
            return
        lengths = self.tokenizer(texts, return_length=True, verbose=False)["length"]
        cut = sum(length > max_length for length in lengths)
        if cut:
            self._said_truncated = True
            logger.warning(
                f"{cut} of {len(texts)} texts are longer than {max_length} tokens and lose the end of their content; the prompt template is kept. "
                "This is said once; raise max_length to read more."
            )


def _clean(text: Any) -> str | list[str]:
    if isinstance(text, str):
        return text.rstrip()
    texts = list(text)
    if not texts:
        raise ValueError("text is an empty list.")
    for i, item in enumerate(texts):
        if not isinstance(item, str):
            raise ValueError(f"text[{i}] is {type(item).__name__}, not a string.")
    return [item.rstrip() for item in texts]


def _to_rgb(images: Any) -> Any:
    """Pictures as RGB the way a viewer shows them: rotated as the camera says, on white where they are transparent."""
    if isinstance(images, (list, tuple)):
        return [_to_rgb(image) for image in images]
    if not isinstance(images, Image.Image):
        return images  # arrays, tensors, paths: the image processor's business
    image = ImageOps.exif_transpose(images)
    if image.mode.startswith("I"):  # 16-bit grey, which PIL's own conversion clips at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


__all__ = ["ProCLIPProcessor"]
