"""The model that made an index, loaded."""

from pathlib import Path

from trainers.compute.dtypes import default_device
from trainers.evaluation.scoring.encoders import Encoder

from .table import SETTINGS_FILE, ImageIndex


def load_encoder(index: Path, model: str | None, device: str | None) -> tuple[Encoder, str]:
    """Load `model`, or by default the one that the index was made by, and say where it came from (folders as absolute paths).

    Raises:
        ValueError: If no model is given for a new index.
        FileNotFoundError: If the folder of the index's model is gone.
    """
    if model is None:
        if not (index / SETTINGS_FILE).exists():
            raise ValueError(
                f"{index} is a new index: give its model with --model, the folder or Hub name of a ProCLIP, CLIP or SigLIP checkpoint"
            )
        model = ImageIndex(index).settings["model"]
        if Path(model).is_absolute() and not Path(model).is_dir():
            raise FileNotFoundError(
                f"the model that made {index} is no longer at {model}: give its new place with --model"
            )
    name = str(Path(model).resolve()) if Path(model).is_dir() else model
    return Encoder.load(model, device or default_device()), name
