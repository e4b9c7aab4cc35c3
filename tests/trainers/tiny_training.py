"""A model, stores and datasets small enough to train in a blink, for the tests of both trainers.

Run as a program, it trains until it kills itself without warning:
`python -m tests.trainers.tiny_training stage-1 FOLDER`.
"""

import gc
import os
import signal
import sys
from pathlib import Path

import torch

from modeling_proclip import ProCLIPConfig, ProCLIPModel
from trainers.base.sharding import full_state, full_tensor
from trainers.contrastive_tuning.config import ContrastiveTuningConfig
from trainers.contrastive_tuning.trainer import ContrastiveTuningTrainer
from trainers.inheritance.config import RepresentationInheritanceConfig
from trainers.inheritance.trainer import RepresentationInheritanceTrainer


# Trainer collects garbage at the end of every training, which takes 0.3 s for the imported modules, and they are none.
gc.freeze()

NUM_ROWS, LLM_DIM, DIM = 24, 12, 8
CAPTIONS = [[f"caption {i}", f"a longer caption of {i}", f"{i} in a few words"] for i in range(NUM_ROWS)]
TEXTS = [caption for captions in CAPTIONS for caption in captions]


def tiny_model(seed: int = 0, load_text_model: bool = False, dropout: float = 0.0, **config) -> ProCLIPModel:
    torch.manual_seed(seed)
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "attention_dropout": dropout,
    }
    text = {
        "model_type": "llama",
        "hidden_size": LLM_DIM,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 64,
    }
    config = {"vision_config": vision, "text_config": text, "projection_dim": DIM, "adapter_num_layers": 1, **config}
    return ProCLIPModel(ProCLIPConfig(**config), load_text_model=load_text_model)


class TinyStore:
    """What the trainers use of a TextEmbeddingStore, over a dictionary."""

    def __init__(self, dim: int, seed: int, texts: list[str] = TEXTS):
        self.embeds = torch.randn(len(texts), dim, generator=torch.Generator().manual_seed(seed)) + 0.5
        self.rows = {text: i for i, text in enumerate(texts)}

    def lookup(self, texts: list[str]) -> torch.Tensor:
        return self.embeds[[self.rows[text] for text in texts]]

    def statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.embeds.double().mean(0), self.embeds.double().std(0, unbiased=False)


TEXT_STORE, TEACHER_STORE = TinyStore(LLM_DIM, 1), TinyStore(DIM, 2)


def text_rows(num_rows: int = NUM_ROWS) -> list[dict]:
    return [{"text": captions} for captions in CAPTIONS[:num_rows]]


def picture_rows(num_rows: int = NUM_ROWS) -> list[dict]:
    pixels = torch.randn(num_rows, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    return [{"pixel_values": pixels[i], "text": CAPTIONS[i]} for i in range(num_rows)]


COMMON = {
    "per_device_train_batch_size": 6,
    "per_device_eval_batch_size": 6,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 7,
}
_OF_TRAINER = ("text_store", "teacher_store", "eval_dataset", "processing_class", "compute_metrics", "callbacks")


def inheritance_trainer(folder: Path | str, model: ProCLIPModel | None = None, rows=None, **settings):
    keywords = {key: settings.pop(key) for key in _OF_TRAINER if key in settings}
    keywords = {"text_store": TEXT_STORE, "teacher_store": TEACHER_STORE, **keywords}
    args = RepresentationInheritanceConfig(str(folder), **{**COMMON, **settings})
    return RepresentationInheritanceTrainer(
        tiny_model() if model is None else model, args, text_rows() if rows is None else rows, **keywords
    )


def tuning_trainer(folder: Path | str, model: ProCLIPModel | None = None, rows=None, **settings):
    keywords = {key: settings.pop(key) for key in _OF_TRAINER if key in settings}
    keywords = {"text_store": TEXT_STORE, **keywords}
    args = ContrastiveTuningConfig(str(folder), **{**COMMON, **settings})
    return ContrastiveTuningTrainer(
        tiny_model() if model is None else model, args, picture_rows() if rows is None else rows, **keywords
    )


def naive_distillation(student, teacher, args) -> torch.Tensor:
    """lambda_ins L_ins + lambda_struct L_struct, pair by pair, of unit-length rows."""
    n = len(student)
    instance = sum(((s - t) ** 2).sum() for s, t in zip(student, teacher, strict=True))
    structure = 0.0
    for i in range(n):
        for j in range(i):
            d = ((student[i] - student[j]).norm() - (teacher[i] - teacher[j]).norm()).abs()
            structure = structure + (
                d**2 if args.structure_distance == "squared" else torch.where(d < 1, d**2 / 2, d - 0.5)
            )
    if args.reduction == "mean":
        instance, structure = instance / n, structure / (n * (n - 1) / 2)
    return args.lambda_ins * instance + args.lambda_struct * structure


def changed_parameters(before: dict[str, torch.Tensor], model: ProCLIPModel) -> set[str]:
    """Names of what is not the same bits any more, buffers included."""
    after = model.state_dict()
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def copy_state(model: ProCLIPModel) -> dict[str, torch.Tensor]:
    """All tensors of a model, whole if they are sharded."""
    return {name: tensor.clone() for name, tensor in full_state(model).items()}


def training_state(trainer) -> dict[str, torch.Tensor]:
    """All tensors that training has moved: model, optimizer and EMA teacher."""
    state = copy_state(trainer.model)
    for i, moments in trainer.optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{i}.{name}": full_tensor(value) for name, value in moments.items()}
    if getattr(trainer, "ema", None) is not None:
        state |= {f"ema.{name}": value for name, value in full_state(trainer.ema.averaged).items()}
    return state


def assert_same_bits(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


# Four steps an epoch, a checkpoint in the middle of each. Dropout makes the result depend on the random state too.
KILLED_SETTINGS = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 3}
KILLED_TRAINERS = {"stage-1": inheritance_trainer, "stage-2": tuning_trainer}
# Where it dies: in the middle of a step, after some of the forward passes; or of a checkpoint, the weights of which are written.
KILLED_IN = {"stage-1": "step", "stage-2": "checkpoint", "stage-1 cached": "checkpoint", "stage-2 cached": "step"}


def killed_trainer(job: str, folder: Path | str):
    stage, *cached = job.split()
    settings = {**KILLED_SETTINGS, "gradient_caching_batch_size": 4 if cached else None}
    return KILLED_TRAINERS[stage](folder, tiny_model(dropout=0.3), **settings)


def train_until_killed(job: str, folder: str) -> None:
    """To the ninth step, or to the checkpoint after it."""

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    trainer = killed_trainer(job, folder)
    save_rng_state, embed = trainer._save_rng_state, trainer.embed

    def embed_and_die(*args):
        embeds = embed(*args)
        # With caching: in the second pass.
        if trainer.state.global_step == 8 and (embeds[0].requires_grad or not job.endswith("cached")):
            die()
        return embeds

    if KILLED_IN[job] == "step":
        trainer.embed = embed_and_die
    else:
        trainer._save_rng_state = lambda folder: die() if folder.endswith("-9") else save_rng_state(folder)
    trainer.train()


if __name__ == "__main__":
    train_until_killed(*sys.argv[1:])
