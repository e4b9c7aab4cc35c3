"""ProCLIP processor: images for the image encoder, templated texts for the LLM."""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import get_session
from PIL import Image, ImageFile
from transformers import BatchFeature, PreTrainedTokenizerBase, PreTrainedTokenizerFast, ProcessorMixin
from transformers.processing_utils import ImagesKwargs, ProcessingKwargs, TextKwargs
from transformers.utils import logging

from .images import BrokenImage, decode_image
from .prompt_template import choose_template, templated_tokenizer
from .publisher import find_publisher, private_by_default, take_hub_arguments
from .sentence_transformers_files import write_sentence_transformers_files


logger = logging.get_logger(__name__)

_OWN_KEYS = ("prompt_template", "instruction", "max_length")  # of processor_config.json


class ProCLIPProcessor(ProcessorMixin):
    r"""An image processor and an LLM's tokenizer that wraps every text in the LLM's prompt template.

    Args:
        image_processor (`BaseImageProcessor`): Image processor of the vision tower.
        tokenizer (`PreTrainedTokenizerFast`):
            Tokenizer of the LLM. `processor.tokenizer` is a copy that carries the template, so whoever calls it gets the template too; it
            pads on the left, with EOS if it has no padding token. Special tokens spelled in a text are read as text.
        prompt_template (`str`, *optional*):
            Holds `{text}` once, for example `"<|im_start|>user\n{text}<|im_end|>"`. By default the one that the tokenizer's chat template
            writes for a user's message, and `"{text}"` for an LLM without a chat template. Saved with the processor.
        instruction (`str`, *optional*): Stands before every text inside the template and is not pooled. Saved with the processor.
        max_length (`int`, defaults to 512): Most tokens of a text, template included.

    Raises:
        ValueError: If the template does not hold `{text}` once, the tokenizer is not a fast one, or `max_length` leaves no room for text.
    """

    tokenizer: PreTrainedTokenizerFast

    def __init__(
        self,
        image_processor: Any,
        tokenizer: PreTrainedTokenizerBase,
        prompt_template: str | None = None,
        instruction: str | None = None,
        max_length: int = 512,
        **kwargs: Any,
    ):
        self._prompt_template = choose_template(tokenizer) if prompt_template is None else prompt_template
        self._instruction = instruction
        tokenizer = templated_tokenizer(tokenizer, self._prompt_template, instruction, max_length)
        super().__init__(image_processor, tokenizer, **kwargs)
        self._check_length(max_length)
        self._said_truncated = False

    # Template and instruction are part of the tokenizer and the length is the tokenizer's own, so that whoever sets or reads them anywhere,
    # such as `SentenceTransformer.max_seq_length`, means the same.

    @property
    def prompt_template(self) -> str:
        """The prompt template, with `{text}` in it. Setting it takes effect at once."""
        return self._prompt_template

    @prompt_template.setter
    def prompt_template(self, value: str) -> None:
        self._set_template(value, self.instruction)

    @property
    def instruction(self) -> str | None:
        """What stands before every text. Setting it takes effect at once."""
        return self._instruction

    @instruction.setter
    def instruction(self, value: str | None) -> None:
        self._set_template(self.prompt_template, value)

    @property
    def max_length(self) -> int:
        """Most tokens of a text, template included. Setting it takes effect at once."""
        return self.tokenizer.model_max_length

    @max_length.setter
    def max_length(self, value: int) -> None:
        self._check_length(value)
        self.tokenizer.model_max_length = value

    def _set_template(self, prompt_template: str, instruction: str | None) -> None:
        before = self.tokenizer
        self.tokenizer = templated_tokenizer(before, prompt_template, instruction, self.max_length)
        try:
            self._check_length(self.max_length)
        except ValueError:
            self.tokenizer = before
            raise
        self._prompt_template, self._instruction = prompt_template, instruction

    def to_dict(self) -> dict[str, Any]:
        """What `processor_config.json` keeps."""
        return super().to_dict() | {key: getattr(self, key) for key in _OWN_KEYS}

    @classmethod
    def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> "ProCLIPProcessor":
        """As the library, which passes over unknown keys: a misspelt one of the caller is refused, one of the file is warned of."""
        if "model_max_length" in kwargs:  # the tokenizer's name for it, and that of sentence-transformers
            kwargs.setdefault("max_length", kwargs["model_max_length"])
        for key in kwargs:
            close = difflib.get_close_matches(key, _OWN_KEYS, n=1, cutoff=0.8)
            if close and key not in _OWN_KEYS:
                raise TypeError(f"{cls.__name__} has no argument {key!r}; did you mean {close[0]!r}?")
        known = {*_OWN_KEYS, *cls.get_attributes(), "processor_class", "auto_map", "chat_template"}
        unknown = set(processor_dict) - known
        if unknown:
            logger.warning(
                f"The saved processor has keys that this release does not know: {', '.join(sorted(unknown))}."
            )
        return super().from_args_and_dict(args, processor_dict, **kwargs)

    @property
    def text_kwargs(self) -> dict[str, Any]:
        """What the tokenizer is called with unless the caller says otherwise."""
        return {"padding": True, "truncation": True, "max_length": self.max_length}

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        r"""Args:
            images: An image or a list of images: PIL images, paths and http(s) URLs, which [`decode_image`] decodes, or arrays and tensors of
                values from 0 to 255.
            text (`str` or `list[str]`): Texts of any length and language; whitespace at the end is dropped. Those over `max_length` lose
                the end of their content, never the template, and a warning says so once.
            kwargs: Arguments of the tokenizer and the image processor, such as `return_tensors="pt"`, `padding` or `max_length`.

        Returns:
            `BatchFeature` with `input_ids`, `attention_mask` and `token_type_ids` of shape `(num_texts, sequence_length)`, where
            `token_type_ids` is 1 on the tokens that the pooling reads (content and end of turn), and `pixel_values` of shape
            `(num_images, 3, height, width)`.

        Raises:
            ValueError: If neither is given, an image cannot be decoded or is an array of values from 0 to 1, a text is not a string, or
                `max_length` leaves no room beside the template.
            TypeError: If an argument is unknown.
        """
        if images is None and text is None:
            raise ValueError("Give text, images or both.")
        self._check_arguments(kwargs)
        if images is not None:
            images = to_rgb(images)
            rescales = getattr(self.image_processor, "do_rescale", True)
            if {**kwargs.get("common_kwargs", {}), **kwargs, **kwargs.get("images_kwargs", {})}.get(
                "do_rescale", rescales
            ):
                _refuse_rescaled(images)
        if text is None:
            return super().__call__(images=images, **kwargs)
        settings = {**self.text_kwargs, **kwargs.get("common_kwargs", {}), **kwargs, **kwargs.get("text_kwargs", {})}
        truncates = settings["truncation"] not in (None, False, "do_not_truncate")
        text = _clean(text)
        if truncates:
            self._check_length(settings["max_length"])
        # Transformers 5.20, the last for Python 3.10, does not look at a processor's own `text_kwargs`, so they are passed as arguments.
        given = {**kwargs.get("common_kwargs", {}), **kwargs, **kwargs.get("text_kwargs", {})}
        defaults = {name: value for name, value in self.text_kwargs.items() if name not in given}
        features = super().__call__(images=images, text=text, **defaults, **kwargs)
        if truncates and not self._said_truncated:
            self._warn_if_truncated(features, settings["max_length"], text)
        return features

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Saves as [`~transformers.ProcessorMixin.save_pretrained`] does, with the files by which sentence-transformers loads the checkpoint.
        With `push_to_hub` it is published too, as [`push_to_hub`] does, to `repo_id` (by default the folder's name).
        """
        hub_arguments = take_hub_arguments(kwargs, Path(save_directory).name) if push_to_hub else None
        super().save_pretrained(save_directory, **kwargs)
        write_sentence_transformers_files(save_directory)
        if hub_arguments is not None:
            self.push_to_hub(**hub_arguments)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        r"""Publishes the processor and its code: `hub_cards.publish.publish_processor`. [`ProCLIPModel.push_to_hub`] can send it with the model.

        Args:
            repo_id (`str`): `owner/name`, or the name alone of a repository of your own.
            kwargs: `private` (new repositories are, unless `False`), `revision`, `commit_message` and `token`.
        """
        publisher = find_publisher("publish")
        if publisher is None:
            return super().push_to_hub(repo_id, **private_by_default(kwargs))
        return publisher.publish_processor(self, repo_id, **kwargs)

    def _check_arguments(self, kwargs: dict[str, Any]) -> None:
        known = {"common_kwargs", *ProcessingKwargs.__annotations__, *TextKwargs.__annotations__}
        known |= {*ImagesKwargs.__annotations__, *self.image_processor.valid_kwargs.__annotations__}
        for name in kwargs:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else "."
                raise TypeError(f"{type(self).__name__} has no argument {name!r}{hint}")

    def _check_length(self, max_length: int) -> None:
        if not isinstance(max_length, int):
            raise ValueError(f"max_length must be a whole number of tokens, got {max_length!r}.")
        template_length = len(self.tokenizer("")["input_ids"])
        if max_length <= template_length:
            raise ValueError(
                f"max_length={max_length} leaves no room for text: prompt template, instruction and special tokens take {template_length} "
                "tokens."
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
    if not isinstance(text, Sequence):
        raise ValueError(f"text must be a string or a list of strings, got {type(text).__name__}.")
    if not text:
        raise ValueError("text is an empty list.")
    for i, item in enumerate(text):
        if not isinstance(item, str):
            raise ValueError(f"text[{i}] is {type(item).__name__}, not a string.")
    return [item.rstrip() for item in text]


def to_rgb(images: Any, name: str = "images") -> Any:
    """Images as [`decode_image`] decodes them, one or a list; arrays and tensors as they are. ValueError calls `images` by `name`."""
    if isinstance(images, (list, tuple)):
        if not images:
            raise ValueError(f"{name} is an empty list.")
        return [to_rgb(image, f"{name}[{i}]") for i, image in enumerate(images)]
    if not isinstance(images, (Image.Image, str, os.PathLike)):
        return images
    try:
        if isinstance(images, str) and images.startswith(("http://", "https://")):
            return decode_image(_download(images))
        return decode_image(images)
    except BrokenImage as error:
        if isinstance(images, Image.Image):
            images = images.filename if isinstance(images, ImageFile.ImageFile) else ""
        file = f" ({os.fspath(images)})" if images else ""
        raise ValueError(f"{name}{file} cannot be read: {error}.") from error


def _refuse_rescaled(images: Any, name: str = "images") -> None:
    """ValueError if an array or tensor holds floats from 0 to 1: divided by 255 once more, it would be black."""
    if isinstance(images, (list, tuple)):
        for i, image in enumerate(images):
            _refuse_rescaled(image, f"{name}[{i}]")
    elif isinstance(images, (np.ndarray, torch.Tensor)):
        values = torch.as_tensor(images)
        if values.is_floating_point() and values.numel() and values.max() <= 1:
            raise ValueError(
                f"{name} holds floats from 0 to 1, which would be divided by 255 again: pass values from 0 to 255, or do_rescale=False."
            )


def _download(url: str) -> bytes:
    try:
        return get_session().get(url, follow_redirects=True, timeout=60).raise_for_status().content
    except Exception as error:  # of whichever HTTP library huggingface_hub uses
        raise BrokenImage(f"{type(error).__name__}: {error}") from error


__all__ = ["ProCLIPProcessor"]
