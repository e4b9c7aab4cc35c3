"""Settings of stage 2: defaults, what the methods preset, and what is refused."""

import pytest
import torch
from torch.nn.functional import normalize

from tests.trainers.tiny_training import (
    naive_distillation,
)
from trainers import ContrastiveTuningConfig
from trainers.contrastive_tuning.config import batch_invariant_weights


def config(**settings) -> ContrastiveTuningConfig:
    return ContrastiveTuningConfig("x", use_cpu=True, **settings)


def test_presets_fill_what_is_left_open():
    proclip, llm2clip, lit = (config(method=method) for method in ("proclip", "llm2clip", "lit"))
    assert (proclip.lambda_ins, proclip.lambda_struct, proclip.freeze_vision) == (
        pytest.approx(0.2048),
        pytest.approx(52.3264),
        False,
    )
    assert (llm2clip.lambda_ins, llm2clip.lambda_struct, llm2clip.freeze_vision) == (0, 0, False)
    assert (lit.lambda_ins, lit.lambda_struct, lit.freeze_vision) == (0, 0, True)
    published = config(reduction="sum")
    assert (published.lambda_ins, published.lambda_struct) == (4e-4, 4e-4)
    assert config(lambda_struct=0.0).lambda_ins == pytest.approx(0.2048), "an ablation is no contradiction"
    assert config(method="lit", freeze_vision=True, lambda_ins=0.0).freeze_vision


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "clip"}, "method must be one of 'proclip', 'llm2clip', 'lit', got 'clip'"),
        ({"method": "llm2clip", "lambda_ins": 0.1}, "method='llm2clip' means lambda_ins=0, but it is 0.1"),
        ({"method": "lit", "lambda_struct": 1.0}, "method='lit' means lambda_struct=0"),
        ({"method": "lit", "freeze_vision": False}, "method='lit' means freeze_vision=True"),
        ({"method": "llm2clip", "freeze_vision": True}, "'lit' freezes the image encoder"),
        ({"freeze_vision": True}, "method='proclip' means freeze_vision=False"),
        ({"lambda_ins": 0.0, "lambda_struct": 0.0}, "which is method='llm2clip'"),
        ({"ema_decay": 1.5}, "ema_decay must be between 0 and 1"),
        ({"adapter_learning_rate": 0.0}, "adapter_learning_rate must be positive"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps=4.*Raise per_device_train_batch_size"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


@pytest.mark.parametrize("distance", ["squared", "smooth_l1"])
def test_batch_invariant_weights_give_the_published_loss(distance):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (normalize(torch.randn(20, 16, generator=generator), dim=-1) for _ in range(2))
    published = config(reduction="sum", structure_distance=distance, lambda_ins=3e-3, lambda_struct=3e-3)
    lambda_ins, lambda_struct = batch_invariant_weights(3e-3, 20, distance)
    ours = config(lambda_ins=lambda_ins, lambda_struct=lambda_struct)
    expected = naive_distillation(student, teacher, published)
    torch.testing.assert_close(naive_distillation(student, teacher, ours), expected)
    assert batch_invariant_weights(distance=distance) == pytest.approx(
        (0.2048, 52.3264 if distance == "squared" else 26.1632)
    )


def test_defaults():
    args = config()
    assert (args.learning_rate, args.weight_decay, args.num_train_epochs, args.ema_decay) == (1e-5, 0.05, 4, 0.999)
    assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon) == (0.9, 0.98, 1e-6)
    assert args.per_device_train_batch_size == 512 and args.lr_scheduler_type == "cosine" and "adamw" in args.optim
