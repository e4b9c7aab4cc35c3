"""The checkpoint of a baseline that the quickstart trains, scores and does not keep."""

import shutil
from pathlib import Path

from .run import FRESH_ADAPTER, Quickstart


def train_llm2clip(output_dir: Path, size: str = "full", seed: int = 0) -> Path:
    """
    Train LLM2CLIP as `proclip quickstart` does, with the same data, steps and seed, and save the checkpoint.

    Args:
        output_dir: That of a quickstart: its embedded texts are reused, and made where they are missing.
        size, seed: Those of the quickstart.

    Returns:
        The checkpoint `output_dir/llm2clip`; one that is there already is kept.
    """
    checkpoint = output_dir / "llm2clip"
    if checkpoint.is_dir():
        return checkpoint
    run = Quickstart(output_dir.resolve(), size, seed)
    run.draw()
    run.pair_with_llm()
    run.build_stores()
    model = run.tune(run.untrained(), "llm2clip", "LLM2CLIP", run.size.baseline_steps, **FRESH_ADAPTER)
    model.text_model = run.llm
    staging = output_dir / "llm2clip.partial"
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(staging)
    run.processor.save_pretrained(staging)
    staging.rename(checkpoint)
    return checkpoint
