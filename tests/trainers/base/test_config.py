"""Settings of Transformers that a stage would not follow are refused in words."""

import pytest

from trainers import (
    CaptionContrastiveConfig,
    ContrastiveTuningConfig,
    MaskedNextTokenConfig,
    RepresentationInheritanceConfig,
)


ALL = (CaptionContrastiveConfig, MaskedNextTokenConfig, RepresentationInheritanceConfig, ContrastiveTuningConfig)
COMPARING = (CaptionContrastiveConfig, RepresentationInheritanceConfig, ContrastiveTuningConfig)
ALIGNMENT = (RepresentationInheritanceConfig, ContrastiveTuningConfig)

REFUSED = [
    ({"label_smoothing_factor": 0.1}, ALL, r"label_smoothing_factor=0.1: .*no class labels.*leave it 0.0"),
    ({"auto_find_batch_size": True}, ALL, "auto_find_batch_size=True: the loss depends on the batch"),
    ({"resume_from_checkpoint": "x"}, ALL, r"call trainer.train\(resume_from_checkpoint=...\)"),
    ({"bf16_full_eval": True}, ALL, "round the weights that are trained: use bf16=True"),
    ({"fp16_full_eval": True}, ALL, "round the weights that are trained: use fp16=True"),
    ({"remove_unused_columns": True}, ALL, "drop the captions.*leave it False"),
    ({"accelerator_config": {"split_batches": True}}, ALL, "split_batches=True: every process reads batches"),
    ({"accelerator_config": {"dispatch_batches": True}}, ALL, "dispatch_batches=True"),
    (
        {"per_device_train_batch_size": 1},
        COMPARING,
        "per_device_train_batch_size=1 .* is 0 for a batch of one.*at least 2",
    ),
    ({"per_device_eval_batch_size": 1}, COMPARING, "per_device_eval_batch_size=1 .* is 0 for a batch of one"),
    ({"use_liger_kernel": True}, ALIGNMENT, "use_liger_kernel=True: it has no kernels"),
    ({"neftune_noise_alpha": 5.0}, ALIGNMENT, "neftune_noise_alpha=5.0: .*looked up"),
    (
        {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"},
        ALL[1:2],
        "does not find the LoRA",
    ),
    ({"train_sampling_strategy": "group_by_length"}, ALIGNMENT, "rows have no token lengths; leave it 'random'"),
    ({"include_num_input_tokens_seen": True}, COMPARING, "include_num_input_tokens_seen='all'"),
    (
        {"train_sampling_strategy": "group_by_length"},
        COMPARING[:1],
        "train_sampling_strategy='group_by_length'.*micro_batch_tokens",
    ),
    ({"data_seed": 3}, COMPARING[:1], "data_seed=3: pairs and their order are drawn from seed"),
    (
        {"cache_frozen_layers": True, "lora_num_layers": 1, "neftune_noise_alpha": 5.0},
        COMPARING[:1],
        "neftune_noise_alpha=5.0: with cache_frozen_layers",
    ),
]


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [(kind, settings, message) for settings, kinds, message in REFUSED for kind in kinds],
)
def test_a_setting_that_would_be_ignored_or_change_the_loss_is_refused(tmp_path, kind, settings, message):
    with pytest.raises(ValueError, match=message):
        kind(str(tmp_path), use_cpu=True, **settings)


@pytest.mark.parametrize("kind", ALL)
def test_logged_losses_are_not_filtered(tmp_path, kind):
    args = kind(str(tmp_path), use_cpu=True)
    assert args.logging_nan_inf_filter is False and args.data_seed == args.seed


def test_a_batch_of_one_is_for_losses_that_compare_no_rows(tmp_path):
    settings = {"use_cpu": True, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
    assert RepresentationInheritanceConfig(str(tmp_path), lambda_struct=0.0, **settings).train_batch_size == 1
    assert MaskedNextTokenConfig(str(tmp_path), **settings).train_batch_size == 1
