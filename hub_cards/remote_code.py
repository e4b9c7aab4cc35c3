"""The code that travels with a checkpoint, so that it loads with `trust_remote_code=True` where this package is not installed."""

from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

import modeling_proclip


# Which class of which file each Auto class takes, by config.json and by processor_config.json. Transformers' own `register_for_auto_class`
# keeps one of a model's Auto classes only, and the zero-shot pipeline needs the other.
AUTO_MAP = {
    "AutoConfig": "configuration_proclip.ProCLIPConfig",
    "AutoModel": "modeling_proclip.ProCLIPModel",
    "AutoModelForZeroShotImageClassification": "modeling_proclip.ProCLIPModel",
}
PROCESSOR_AUTO_MAP = {"AutoProcessor": "processing_proclip.ProCLIPProcessor"}


def code_files() -> list[Path]:
    """The files of `modeling_proclip` that the classes of [`AUTO_MAP`] need, found as Transformers finds them when it loads them: by their relative
    imports, which therefore name siblings only.
    """
    folder = Path(modeling_proclip.__file__).parent
    entries = {folder / f"{reference.split('.')[0]}.py" for reference in (AUTO_MAP | PROCESSOR_AUTO_MAP).values()}
    needed = {Path(file) for entry in entries for file in get_relative_import_files(entry)}
    return sorted(entries | needed)
