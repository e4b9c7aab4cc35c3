"""The laptop recipe as a newcomer runs it, on the small size and for a few steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

from modeling_proclip import ProCLIPModel


ROOT = Path(__file__).parents[2]


def test_the_laptop_recipe_runs_end_to_end(tmp_path):
    def run(*command: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "COLUMNS": "80"}
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = run(str(ROOT / "examples" / "emoji_dataset.py"), "laptop-data", "--size", "small")
    assert "laptop-data: 160 images with captions, 889 texts, 160 test images" in said
    # Captions of the images alone: the LLM reads fewer texts.
    settings = [
        "data.texts=null",
        "data.train.text_columns=short",
        "stages.inheritance.max_steps=2",
        "stages.contrastive_tuning.max_steps=2",
    ]
    settings += ["stages.inheritance.global_batch_size=64", "stages.contrastive_tuning.global_batch_size=64"]
    said = run("-m", "trainers.cli", "train", str(ROOT / "recipes" / "laptop.yaml"), *settings)
    assert "Setting accelerator to CPU" not in said  # by DeepSpeed, which saving a model imports
    out = tmp_path / "runs" / "laptop"
    assert f"the model is in {out / 'contrastive_tuning' / 'model'}" in said
    assert "contrastive_tuning, held out: loss" in said and "t2i_r@1" in said
    done = json.loads((out / "contrastive_tuning" / "complete.json").read_text())
    assert 0 <= done["last_evaluation"]["eval_t2i_r@1"] <= 1
    model = ProCLIPModel.from_pretrained(out / "contrastive_tuning" / "model")  # brings its LLM back
    assert model.text_model.config.hidden_size == 576
