"""What a conversion refuses."""


class ConversionError(ValueError):
    """A checkpoint, or something that its conversion needs, is not as it must be. The message names the file and the tensor."""


def first_line(error: BaseException) -> str:
    """An error of a library in one line, for the end of a message."""
    return f"{type(error).__name__}: {str(error).strip()}".split("\n")[0][:300]
