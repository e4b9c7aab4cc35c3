"""Reading published checkpoints: pickles and safetensors, one file or shards, without running or copying what is in them."""

import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..finite_weights import is_finite
from .errors import ConversionError, first_line
from .json_files import read_json


# Types as safetensors headers name them; no published model has weights of another one.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WRAPPERS = ("state_dict", "module")  # OpenCLIP's trainer and DeepSpeed
INDEXES = {"model.safetensors.index.json": "model.safetensors", "pytorch_model.bin.index.json": "pytorch_model.bin"}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint, not read yet: its file and name, what the file states of it, and `load`, which maps it into memory."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]

    def read(self) -> torch.Tensor:
        """The tensor, mapped from the file: its bytes are read when they are used. ConversionError if it is not what the file states, or not finite."""
        try:
            tensor = self.load()
            finite = is_finite(tensor)
        except Exception as error:  # corrupt files fail in the reader in many ways
            raise ConversionError(f"{self.file}: tensor {self.name!r} cannot be read: {first_line(error)}") from error
        if tuple(tensor.shape) != self.shape or tensor.dtype != self.dtype:
            raise ConversionError(
                f"{self.file}: tensor {self.name!r} is not of the shape and type that the file states."
            )
        if not finite:
            raise ConversionError(f"{self.file}: tensor {self.name!r} holds NaN or infinity: the file is damaged.")
        return tensor


def read_tensors(source: Path) -> dict[str, StoredTensor]:
    """The tensors of a file (`.pt`, `.bin`, `.safetensors`) or of a folder that holds `model.safetensors` or `pytorch_model.bin`, in shards
    or not. Bare state dicts, `{"state_dict": ...}`, `{"module": ...}` and a `module.` in front of every name are unwrapped. Nothing of a pickle that
    needs more than tensors and plain containers is run.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in _weight_files(source) if source.is_dir() else [source]:
        for name, tensor in _read_file(file).items():
            if name in tensors:
                raise ConversionError(f"{file}: tensor {name!r} is in {tensors[name].file.name} too.")
            tensors[name] = tensor
    while tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    for index, whole in INDEXES.items():
        if (folder / index).is_file():
            places = read_json(folder / index).get("weight_map")
            if not isinstance(places, dict) or not places:
                raise ConversionError(f"{folder / index} has no weight_map.")
            names = set(map(str, places.values()))
            files = [folder / name for name in sorted(names)]
            if any(Path(name).name != name for name in names):
                raise ConversionError(f"{folder / index} points outside of its folder.")
        elif (folder / whole).is_file():
            files = [folder / whole]
        else:
            continue
        if missing := [file.name for file in files if not file.is_file()]:
            raise ConversionError(f"{folder} lacks {', '.join(missing)}, which {index} names.")
        return files
    raise ConversionError(
        f"{folder} holds neither model.safetensors nor pytorch_model.bin, in shards or not: name the file itself."
    )


def _read_file(file: Path) -> dict[str, StoredTensor]:
    if file.exists() and not file.is_file():  # reading a named pipe would wait for ever
        raise ConversionError(f"{file} is no file.")
    try:
        with file.open("rb") as stream:
            start = stream.read(9)
    except OSError as error:
        raise ConversionError(f"{file} cannot be read: {error.strerror}.") from error
    if not start:
        raise ConversionError(f"{file} is empty.")
    if start == b"version h":
        raise ConversionError(f"{file} is Git LFS's pointer to the file, not the file: fetch it with `git lfs pull`.")
    safetensors = file.suffix == ".safetensors" or start[8:] == b"{"
    return dict(_read_safetensors(file) if safetensors else _read_pickle(file, zipped=start.startswith(b"PK")))


def _read_safetensors(file: Path) -> Iterator[tuple[str, StoredTensor]]:
    try:
        handle = safe_open(file, framework="pt")
        names = list(handle.keys())
        headers = {name: (handle.get_slice(name).get_dtype(), handle.get_slice(name).get_shape()) for name in names}
    except Exception as error:  # the reader's own error class, and what corrupt UTF-8 makes of it
        raise ConversionError(f"{file} cannot be read as safetensors: {first_line(error)}") from error
    for name, (dtype, shape) in headers.items():
        if dtype not in DTYPES:
            if name.endswith(("position_ids", "inv_freq")):
                continue  # buffers of old checkpoints, which no model of today has
            raise ConversionError(f"{file}: tensor {name!r} has type {dtype}: weights of {', '.join(DTYPES)} convert.")
        yield name, StoredTensor(file, name, tuple(shape), DTYPES[dtype], partial(handle.get_tensor, name))


def _read_pickle(file: Path, zipped: bool) -> Iterator[tuple[str, StoredTensor]]:
    try:
        if zipped:
            with zipfile.ZipFile(file) as archive:  # a compressed record could fill the memory
                if sum(record.file_size for record in archive.infolist()) > file.stat().st_size:
                    raise ValueError("its records are larger than the file")
        # Only zipped files can be mapped; those of before PyTorch 1.6 are read whole.
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped or None)
    except Exception as error:  # a corrupt pickle can raise anything
        raise ConversionError(_refusal(file, error)) from error
    for key in WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not loaded:
        raise ConversionError(f"{file} holds a {type(loaded).__name__} and not a state dict.")
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ConversionError(f"{file}: entry {name!r} is {type(tensor).__name__} and no tensor with a name.")
        if name.endswith(("position_ids", "inv_freq")):
            continue
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in DTYPES.values():
            raise ConversionError(
                f"{file}: tensor {name!r} ({tensor.layout}, {tensor.dtype}) is not dense and of {', '.join(DTYPES)}."
            )
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ConversionError(f"{file}: tensor {name!r} claims more elements than the file holds.")
        yield name, StoredTensor(file, name, tuple(tensor.shape), tensor.dtype, tensor.detach)


def _refusal(file: Path, error: Exception) -> str:
    # PyTorch's own message begins with advice to load without this protection, and does not name everything.
    if not isinstance(error, pickle.UnpicklingError):
        return f"{file} cannot be read as a PyTorch checkpoint: {first_line(error)}"
    needed = re.findall(r"GLOBAL ([\w.]+)", str(error)) or _names_in(file)
    if needed:
        return (
            f"{file} is refused, and nothing of it was run: beside weights it needs {needed[0]}, which can run code. If you trust its "
            "source, load it there, and save its state dict alone, as safetensors."
        )
    return f"{file} is refused, and nothing of it was run: it is not a pickle of weights, or damaged."


def _names_in(file: Path) -> list[str]:
    """What a pickle imports beside weights, read from its instructions without following them."""
    found: list[str] = []
    strings: list[str] = []
    try:
        with ExitStack() as stack:
            stream: Any = stack.enter_context(file.open("rb"))
            if zipfile.is_zipfile(file):
                archive = stack.enter_context(zipfile.ZipFile(stream))
                record = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                stream = stack.enter_context(archive.open(record))
            while True:  # files of before PyTorch 1.6 are several pickles in a row; what follows them ends this
                for code, argument, _ in pickletools.genops(stream):
                    if code.name in ("GLOBAL", "INST"):
                        found.append(str(argument).replace(" ", "."))
                    elif code.name == "STACK_GLOBAL":
                        found.append(".".join(strings[-2:]))
                    elif isinstance(argument, str):
                        strings.append(argument)
    except Exception:  # instructions that cannot be read name nothing more
        pass
    return [name for name in found if not name.startswith(("torch.", "collections.OrderedDict"))]
