"""Which files of a folder are sent, by their exact names, and what is removed from each."""

import json
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from modeling_proclip.conversion.code_references import code_names, without_code
from modeling_proclip.conversion.convert_llm_to_hf import TOKENIZER_FILES
from modeling_proclip.conversion.json_files import read_json
from modeling_proclip.conversion.stored_tensors import read_tensors

from .errors import PublishError
from .measurements import RESULTS_FILE, read_measurements, results_for_others
from .remote_code import AUTO_MAP, PROCESSOR_AUTO_MAP
from .scrubbing import holds_secret, scrub, scrub_text


PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
# Settings are rewritten: without paths of this machine, passwords, tokens and the code of others.
SETTINGS = (
    *PROCESSOR_FILES,
    "tokenizer_config.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
)
LEGAL_FILES = tuple(
    name + ending
    for name in ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")
    for ending in ("", ".txt", ".md")
)
MODULES_FILE = "modules.json"  # of sentence-transformers: the classes of its modules, and a folder for each
_GPS = 0x8825  # the EXIF tag of where an image was taken
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".gif", ".webp")
# What the processor adds to every text, and names of tokens: changed, the model would read something else.
_READ_BY_THE_MODEL = {"prompt_template", "instruction", "chat_template", "prompts", "added_tokens_decoder"}


@dataclass
class Staged:
    """A folder whose every file is to be sent.

    Attributes:
        lean: Whether the LLM is left out.
        files: Size of each file in bytes, by its name in the repository.
        left_out: Names of the files in the source that are not sent.
        notes: Remarks for the user.
        text_model_bytes: Size in bytes of the LLM that a lean checkpoint names instead of holding it, in the dtype that it runs in.
    """

    folder: Path
    lean: bool
    files: dict[str, int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    text_model_bytes: int = 0


@dataclass
class OutgoingFiles:
    """Files on their way from `source`, the folder that is published, to `folder`, which is empty at first and whose every file is sent. `notes` are
    remarks for the user: what was removed from which file, and what is not sent.
    """

    source: Path
    folder: Path
    notes: list[str] = field(default_factory=list)

    def staged(self, lean: bool, used: Collection[str] = ()) -> Staged:
        """What is laid out in the folder now. Files of the source that are `used` in another form do not count as left out."""
        files = {name: (self.folder / name).stat().st_size for name in _names(self.folder)}
        return Staged(self.folder, lean, files, sorted({*self.names()} - {*files, *used}), self.notes)

    def names(self) -> list[str]:
        """Names of all files of the source, and of those in its folders."""
        return _names(self.source)

    def find(self, name: str) -> Path | None:
        """The file `name` of the source, or None. PublishError if it is a link out of the folder; those of the Hub's cache stay in their repository."""
        file, root = self.source / name, self.source.resolve()
        if not file.is_file():
            return None
        places = [root]
        if root.parent.name == "snapshots":
            places.append(root.parent.parent / "blobs")
        if not any(file.resolve().is_relative_to(place) for place in places):
            raise PublishError(
                f"{file} is a link out of the folder, and links are not followed: put the file itself there if everybody may see it."
            )
        return file

    def write_settings(self, name: str, settings: Any, auto_map: dict[str, str] | None = None) -> None:
        """Write a JSON file for others, which names the code of `auto_map` and no other. PublishError if a token cannot be taken out of it."""
        ours = {*AUTO_MAP.values(), *PROCESSOR_AUTO_MAP.values()}
        if others := sorted({code for code in code_names(settings) if code not in ours}):
            self.notes.append(f"{name}: references to code of others were removed ({', '.join(others)}).")
        plain = without_code(settings)
        shown = scrub(plain, keep=_READ_BY_THE_MODEL)
        self._note_if_other(plain, shown, name)
        text = json.dumps({**shown, "auto_map": auto_map} if auto_map else shown, indent=2, sort_keys=True) + "\n"
        self._refuse_secrets(name, text)
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_text(text, encoding="utf-8")

    def write_text(self, name: str, text: str) -> None:
        """Write a text for others."""
        shown = scrub_text(text)
        self._note_if_other(text, shown, name)
        (self.folder / name).write_text(shown, encoding="utf-8")

    def copy_settings(self, name: str, auto_map: dict[str, str] | None = None) -> None:
        """Write the settings of the source's file `name`, if it has one; see [`write_settings`]."""
        if file := self.find(name):
            self.write_settings(name, read_json(file), auto_map)

    def copy_tokenizer(self) -> None:
        """Copy the files of a tokenizer but its settings: as they are, or not at all."""
        for name in TOKENIZER_FILES:
            if name not in SETTINGS and (file := self.find(name)):
                self._refuse_secrets(name, file.read_bytes().decode("utf-8", "replace"))
                shutil.copyfile(file, self.folder / name)

    def copy_legal_files(self) -> None:
        """Copy licences and notices."""
        for name in LEGAL_FILES:
            if file := self.find(name):
                self.write_text(name, read_text(file))

    def copy_results(self) -> None:
        """Copy the results of an evaluation; another program's `results.json` stays behind."""
        if file := self.find(RESULTS_FILE):
            try:
                read_measurements(file)
            except ValueError as error:
                self.notes.append(f"{RESULTS_FILE} is not sent: {error}")
            else:
                self.write_settings(RESULTS_FILE, results_for_others(read_json(file)))

    def copy_modules(self) -> None:
        """Copy the modules of sentence-transformers. PublishError if one is of another package, whose code would run where this is loaded."""
        file = self.find(MODULES_FILE)
        if file is None:
            return
        modules = read_json(file, list)
        for module in modules:
            folder, kind = (module.get("path"), module.get("type")) if isinstance(module, dict) else (None, None)
            if not isinstance(kind, str) or not kind.startswith("sentence_transformers."):
                raise PublishError(
                    f"{file} names the class {kind!r}: only modules of sentence-transformers are sent, as others would run their own code where "
                    "the checkpoint is loaded."
                )
            if not isinstance(folder, str) or not re.fullmatch(r"(\d{1,3}_\w{1,60})?", folder):
                raise PublishError(f"{file} names the folder {folder!r}, which is none such as 1_Normalize.")
            if folder:
                self._copy_module(folder)
        self.write_settings(MODULES_FILE, modules)

    def copy_images(self, text: str) -> None:
        """Copy the images that a card shows from this folder."""
        for name in sorted(set(re.findall(r"\]\(([\w./+-]{1,300})\)", text))):
            if name.lower().endswith(IMAGE_ENDINGS) and ".." not in Path(name).parts and (file := self.find(name)):
                try:
                    with Image.open(file) as image:
                        image.verify()
                    with Image.open(file) as image:
                        image.load()  # texts may come after the pixels
                        facts, place = dict(image.info), image.getexif().get_ifd(_GPS)
                except Exception as error:  # each format fails in its own way
                    raise PublishError(f"{file}, which README.md shows, is no image that can be read.") from error
                texts = [
                    part if isinstance(part, str) else part.decode("latin-1")
                    for name, part in facts.items()
                    if name != "icc_profile" and isinstance(part, (str, bytes))
                ]
                if place or any(scrub_text(part) != part or holds_secret(part) for part in texts):
                    raise PublishError(
                        f"{file}, which README.md shows, says in its metadata where it was taken, or holds a local path or a token there: save it "
                        "without metadata."
                    )
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, self.folder / name)

    def _copy_module(self, folder: str) -> None:
        if file := self.find(f"{folder}/config.json"):
            settings = read_json(file)
            activation = settings.get("activation_function", "torch.")  # of a Dense module: a class to import
            if not isinstance(activation, str) or not activation.startswith("torch."):
                raise PublishError(f"{file} names the activation {activation!r}: only those of torch are sent.")
            self.write_settings(f"{folder}/config.json", settings)
        if file := self.find(f"{folder}/model.safetensors"):
            for tensor in read_tensors(file).values():
                tensor.read()
            (self.folder / folder).mkdir(exist_ok=True)
            shutil.copyfile(file, self.folder / folder / "model.safetensors")

    def _note_if_other(self, found: Any, shown: Any, name: str) -> None:
        if shown != found:
            self.notes.append(f"{name}: local paths, passwords or tokens were removed.")

    def _refuse_secrets(self, name: str, text: str) -> None:
        if holds_secret(text):
            raise PublishError(
                f"{self.source / name} holds what looks like a token or a private key: remove it first."
            )


def read_text(file: Path) -> str:
    """A text file's content; PublishError that names it if it is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PublishError(f"{file} is not UTF-8, so it is not text that can be sent: save it as UTF-8.") from error


def _names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
