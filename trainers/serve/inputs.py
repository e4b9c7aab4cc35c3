"""What a request may hold: OpenAI's fields for embeddings, and images as data URLs."""

import base64
import binascii
from typing import Annotated, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modeling_proclip.images import BrokenImage, decode_image


_DATA_URL = "data:image/"


class InputError(ValueError):
    """A request that cannot be answered.

    Args:
        message: what was found, and the remedy.
        param: the field.
        status: of HTTP.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400):
        super().__init__(message)
        self.param, self.status = param, status


class TextInput(BaseModel):
    """`{"text": ...}`: a text, whatever it begins with."""

    model_config = ConfigDict(extra="forbid", strict=True)
    text: str


class ImageInput(BaseModel):
    """`{"image": "data:image/png;base64,..."}`."""

    model_config = ConfigDict(extra="forbid", strict=True)
    image: str


Input = str | TextInput | ImageInput


class EmbeddingRequest(BaseModel):
    """The body of `POST /v1/embeddings`.

    Attributes:
        input: one or several of: a string (a text, or an image if it begins with `data:image/`), `{"text": ...}`, `{"image": data URL}`.
        model: the served model's name, if given.
        encoding_format: "base64" is of little-endian float32.
        dimensions: keep the first so many dimensions, to unit length.
        truncate: read the beginning of texts that are too long, in place of refusing them.
        user: not used.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    input: Input | Annotated[list[Input], Field(min_length=1)]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    truncate: bool = False
    user: str | None = None

    @property
    def inputs(self) -> list[str | TextInput | ImageInput]:
        """The inputs as a list."""
        return self.input if isinstance(self.input, list) else [self.input]


def parse_request(body: bytes) -> EmbeddingRequest:
    """The request in `body`.

    Raises:
        InputError: Naming the first field that is wrong.
    """
    try:
        return EmbeddingRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = next((part for part in first["loc"] if isinstance(part, str)), None)
        if param == "input" and first["type"] != "missing":
            message = 'input must be a string, {"text": ...}, {"image": "data:image/..."}, or a list of some of these; tokens are not taken'
        else:
            message = f"{param}: {first['msg']}" if param else f"the body is not a JSON object: {first['msg']}"
        raise InputError(message, param) from error


def decode_input(given: str | TextInput | ImageInput, name: str) -> str | Image.Image:
    """The text, or the image decoded (mode "RGB").

    Args:
        name: what messages call it.

    Raises:
        InputError: If an image is no data URL, or cannot be decoded.
    """
    if isinstance(given, TextInput):
        return given.text
    if isinstance(given, str):
        if not given.startswith(_DATA_URL):
            return given
        url = given
    else:
        url = given.image
    head, comma, data = url.partition(",")
    if not (head.startswith(_DATA_URL) and head.endswith(";base64") and comma):
        raise InputError(
            f'{name} must be a data URL, "data:image/png;base64,...": nothing is fetched from other addresses', "input"
        )
    try:
        return decode_image(base64.b64decode(data, validate=True))
    except (BrokenImage, binascii.Error) as error:
        raise InputError(f"{name} cannot be read as an image: {error}", "input") from error
