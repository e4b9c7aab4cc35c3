"""The EMA teacher against its recursion by hand."""

import pytest
import torch

from tests.trainers.tiny_training import tiny_model
from trainers.contrastive_tuning.ema_teacher import EMA_FILE, EMATeacher


def perturb(model, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))


def teacher_parameters(teacher: EMATeacher) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in teacher.averaged.module.named_parameters()}


@pytest.mark.parametrize("decay", [0.9, 0.999, 0.0, 1.0])
def test_recursion_starts_from_the_initial_encoder(decay):
    model = tiny_model()
    teacher = EMATeacher(model, decay)
    names = list(teacher_parameters(teacher))
    assert len(names) > 15 and any(name.startswith("visual_projection.") for name in names)
    expected = {name: model.get_parameter(name).detach().double() for name in names}
    for step in range(4):
        perturb(model, step)
        teacher.update(model)
        for name in names:
            expected[name] = decay * expected[name] + (1 - decay) * model.get_parameter(name).detach().double()
            torch.testing.assert_close(
                teacher_parameters(teacher)[name].double(), expected[name], atol=1e-5, rtol=1e-5
            )


def test_an_update_is_one_call_over_all_parameters():
    model = tiny_model()
    teacher = EMATeacher(model, 0.9)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        teacher.update(model)
    names = [event.name for event in profiler.events()]
    assert names.count("aten::_foreach_lerp_") == 1


def test_embeds_as_the_encoder_did_at_the_start():
    model = tiny_model(dropout=0.5)
    pixels = torch.randn(5, 3, 8, 8)
    expected = model.eval()(pixel_values=pixels).image_embeds
    model.train()
    teacher = EMATeacher(model, 0.9)
    perturb(model, 0)
    embeds = teacher.embed(pixel_values=pixels)  # without dropout, and not moved by the student
    assert torch.equal(embeds, expected) and not embeds.requires_grad
    assert not any(p.requires_grad for p in teacher.averaged.parameters())
    assert all(p.requires_grad for p in model.vision_model.parameters())


def test_buffers_are_copied_and_not_averaged():
    model = tiny_model()
    model.vision_model.register_buffer("batches_seen", torch.tensor(3))
    teacher = EMATeacher(model, 0.999)
    model.vision_model.batches_seen.fill_(7)
    teacher.update(model)
    assert teacher.averaged.module.get_buffer("vision_model.batches_seen") == 7


def test_goes_on_exactly_where_it_was_saved(tmp_path):
    model = tiny_model()
    teacher = EMATeacher(model, 0.9)
    perturb(model, 0)
    teacher.update(model)
    teacher.save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [EMA_FILE]
    resumed = EMATeacher(tiny_model(seed=1), 0.9)
    resumed.load(tmp_path)
    for step in range(2):
        for name, parameter in teacher_parameters(resumed).items():
            assert torch.equal(parameter, teacher_parameters(teacher)[name])
        perturb(model, step)
        teacher.update(model)
        resumed.update(model)


def test_a_missing_file_is_one_clear_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"{EMA_FILE} is missing.*resume from a checkpoint"):
        EMATeacher(tiny_model(), 0.9).load(tmp_path)
