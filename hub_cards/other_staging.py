"""What else is sent, laid out as it is to lie on the Hub: PEFT adapters, processors, and checkpoints that a training resumes from."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modeling_proclip.conversion.json_files import read_json

from .adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, TRAINING_FILE, adapter_card
from .checkpoint_facts import is_hub_name
from .errors import PublishError
from .remote_code import PROCESSOR_AUTO_MAP, code_files
from .sent_files import PROCESSOR_FILES, SETTINGS, OutgoingFiles, read_text
from .staging import Staged, read_weights, write_card


def stage_adapters(source: Path, folder: Path, repo_id: str, *, card: Mapping[str, Any] | None = None) -> Staged:
    """Lay PEFT adapters of a ProCLIP model out in the empty `folder`. With `card`, arguments of [`adapter_card`], the card is rendered anew."""
    outgoing = OutgoingFiles(source, folder)
    file, weights = outgoing.find(ADAPTER_CONFIG), outgoing.find(ADAPTER_WEIGHTS)
    if file is None or weights is None:
        raise PublishError(f"{source} holds no PEFT adapters: it needs {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}.")
    tensors = read_weights(outgoing, weights)
    if not any(f".{part}." in name for name in tensors for part in ("vision_model", "text_model", "text_adapter")):
        raise PublishError(
            f"{source} holds adapters of another model than ProCLIP: send them with `hf upload OWNER/NAME {source}`."
        )
    settings = read_json(file)
    base = settings.get("base_model_name_or_path")
    if isinstance(base, str) and not is_hub_name(base):
        settings["base_model_name_or_path"] = Path(base).name or None
    mapping = settings.get("auto_mapping")
    library = mapping.get("parent_library") if isinstance(mapping, dict) else None
    if not str(library).startswith(("modeling_proclip.", "transformers.")):
        settings["auto_mapping"] = None  # PEFT imports the module that is named there
    outgoing.write_settings(ADAPTER_CONFIG, settings)
    (folder / ADAPTER_WEIGHTS).symlink_to(weights.resolve())
    if record := outgoing.find(TRAINING_FILE):
        outgoing.write_settings(TRAINING_FILE, read_json(record, list))
    outgoing.copy_legal_files()
    readme = outgoing.find("README.md")
    if readme is None or card is not None:
        write_card(outgoing, adapter_card, {"repo_id": repo_id, **(card or {})})
    else:
        outgoing.write_text("README.md", read_text(readme))
    return outgoing.staged(lean=True)


def stage_processor(source: Path, folder: Path) -> Staged:
    """Lay a processor out in `folder`, with the code that loads it."""
    outgoing = OutgoingFiles(source, folder)
    for name in SETTINGS:
        outgoing.copy_settings(name, PROCESSOR_AUTO_MAP if name == PROCESSOR_FILES[0] else None)
    outgoing.copy_tokenizer()
    outgoing.copy_modules()
    for code in code_files():
        shutil.copyfile(code, folder / code.name)
    return outgoing.staged(lean=True)


# What Trainer, Accelerate, FSDP, DeepSpeed and our stages write into a checkpoint, beside the model, to resume from. Never `training_args.bin`:
# it is a pickle with the token of the Hub in it.
_RESUMED_FROM = re.compile(
    r"""(optimizer|scheduler|scaler)\.(pt|bin) | rng_state(_\d{1,5})?\.pth | stream_\d{1,5}\.json | ema_teacher\.safetensors
    | model(-\d{5}-of-\d{5})?\.safetensors | model\.safetensors\.index\.json
    | (optimizer|pytorch_model_fsdp)_\d{1,3}/(\.metadata|__\d{1,5}_\d{1,5}\.distcp)
    | latest | global_step\d{1,12}/[a-z0-9_]{1,60}_(model|optim)_states\.pt""",
    re.VERBOSE,
)


def stage_resumable(source: Path, folder: Path) -> Staged:
    """Lay a checkpoint of a training out in the empty `folder`, so that the training can be resumed from it: model, processor, optimizer and random
    states (pickles), the state of the Trainer. Settings and texts are scrubbed; files with other names stay behind.
    """
    outgoing = OutgoingFiles(source, folder)
    for name in ("config.json", "trainer_state.json", *SETTINGS):
        outgoing.copy_settings(name)
    outgoing.copy_tokenizer()
    outgoing.copy_modules()
    for name in outgoing.names():
        if _RESUMED_FROM.fullmatch(name) and (file := outgoing.find(name)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(file.resolve())
    return outgoing.staged(lean=True)
