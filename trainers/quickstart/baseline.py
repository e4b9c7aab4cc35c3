"""The checkpoint of a baseline that the quickstart trains, scores and does not keep."""

from pathlib import Path

from modeling_proclip import ProCLIPConfig
from trainers.openmoji.task import SIZES
from trainers.storage.folders import replacing_folder

from .run import FRESH_ADAPTER, Quickstart


def train_llm2clip(output_dir: Path, size: str = "full", seed: int = 0) -> Path:
    """Train LLM2CLIP as `proclip quickstart` does, with the same data, steps and seed, and save the checkpoint.

    Args:
        output_dir: The quickstart's: its embedded texts are reused, or made if they are missing.
        size, seed: The quickstart's.

    Returns:
        The checkpoint `output_dir/llm2clip`. One that an earlier call trained with this size and seed is kept.
    """
    checkpoint = output_dir / "llm2clip"
    if checkpoint.is_dir() and _was_trained(checkpoint, SIZES[size].baseline_steps, seed):
        return checkpoint
    run = Quickstart(output_dir.resolve(), size, seed)
    run.draw()
    run.pair_with_llm()
    run.build_stores()
    model = run.tune(run.untrained(), "llm2clip", "LLM2CLIP", run.size.baseline_steps, **FRESH_ADAPTER)
    model.text_model = run.llm
    with replacing_folder(checkpoint) as partial:
        model.save_pretrained(partial)
        run.processor.save_pretrained(partial)
    return checkpoint


def _was_trained(checkpoint: Path, steps: int, seed: int) -> bool:
    record = ProCLIPConfig.from_pretrained(checkpoint).training[-1]
    return (record["steps"], record["settings"]["seed"]) == (steps, seed)
