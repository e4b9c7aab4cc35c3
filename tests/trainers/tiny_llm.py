"""A tiny bidirectional LLM and rows of captions for the tests of stage 0.

Run as a program, it trains until it kills itself without warning: `python -m tests.trainers.tiny_llm FOLDER`.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, PreTrainedModel, TrainerCallback

from tests.modeling_proclip import tiny
from trainers import CaptionContrastiveConfig, CaptionContrastiveTrainer


LLM = {**tiny.TEXT, "num_hidden_layers": 3, "attention_dropout": 0.0}
WORDS = "red green blue small large old new cat dog fox owl bee".split()
ROWS = [
    {"text": [f"a {a} {b}", f"one {b} that is {a}", f"{a} {b}, seen from afar in the rain"], "id": f"{a} {b}"}
    for a in WORDS[:6]
    for b in WORDS[6:10]
]
PLAIN = [{"text": [f"what is {a}?", f"{a} is a word of {len(a)} letters"], "instruction": "answer:"} for a in WORDS]
SETTINGS = {
    "per_device_train_batch_size": 6,
    "per_device_eval_batch_size": 6,
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 7,
    "lora_r": 2,
    "max_length": 64,
}


def llm(seed: int = 0, cls: type = AutoModel, **config) -> PreTrainedModel:
    torch.manual_seed(seed)
    return cls.from_config(LlamaConfig(**{**LLM, **config}), attn_implementation="eager")


def causal_llm(**config) -> PreTrainedModel:
    return llm(cls=AutoModelForCausalLM, **config)


def trainer(folder: Path | str, model=None, rows=None, **settings) -> CaptionContrastiveTrainer:
    names = ("eval_dataset", "plain_text_dataset", "processing_class")
    keywords = {key: settings.pop(key) for key in names if key in settings}
    keywords = {"processing_class": tiny.tokenizer(), **keywords}
    args = CaptionContrastiveConfig(str(folder), **{**SETTINGS, **settings})
    return CaptionContrastiveTrainer(
        llm() if model is None else model, args, ROWS if rows is None else rows, **keywords
    )


# Six steps an epoch, a checkpoint in the middle of each; dropout makes the result depend on the random state too.
KILLED = {
    "num_train_epochs": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "lora_dropout": 0.2,
    "plain_text_dataset": PLAIN,
    "lora_num_layers": 2,
    "cache_frozen_layers": True,
    "micro_batch_tokens": 60,
    "gradient_caching_batch_size": 4,
}


class _Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 9:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    killed = trainer(sys.argv[1], **KILLED)
    killed.add_callback(_Kill())
    killed.train()
