"""CKA by hand, against the N x N kernels, and on real classes of models."""

import copy
import math

import pytest
import torch

from tests.trainers.tiny_encoders import tiny_clip, tiny_proclip
from trainers.evaluation.scoring.cka import LinearCKA, cka_by_layer, image_layers


def cka(x: torch.Tensor, y: torch.Tensor, batch_size: int | None = None, debiased: bool = False) -> float:
    found = LinearCKA()
    size = batch_size or len(x)
    for first, second in zip(x.split(size), y.split(size), strict=True):
        found.update(first, second)
    return found.compute(debiased)


def naive_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """HSIC with centred N x N kernels, as Kornblith et al. write it."""
    n = len(x)
    centre = torch.eye(n, dtype=torch.float64) - 1 / n

    def hsic(k: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        return (k @ centre @ m @ centre).trace()

    k, m = x.double() @ x.double().T, y.double() @ y.double().T
    return float(hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt())


def naive_debiased_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """HSIC as the mean over all tuples of different pictures, by Song et al.'s formula with N x N kernels."""
    n = len(x)

    def hsic(k: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        k, m = k - k.diag().diag(), m - m.diag().diag()
        return ((k @ m).trace() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 * (k @ m).sum() / (n - 2)) / (
            n * (n - 3)
        )

    k, m = x.double() @ x.double().T, y.double() @ y.double().T
    return float(hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt())


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_cka_by_hand():
    # Centred x = (-1, 0, 1, 0), y = (0, -1, 1, 0): xᵀy = 1, xᵀx = yᵀy = 2, and CKA = 1² / (2 * 2).
    x = torch.tensor([[1.0], [2.0], [3.0], [2.0]])
    y = torch.tensor([[5.0], [4.0], [6.0], [5.0]])
    assert cka(x, y) == pytest.approx(1 / 4)
    # Two dimensions of which the second model keeps one: ||xᵀy||² = 2², ||xᵀx|| = sqrt(2² + 2²), ||yᵀy|| = 2.
    square = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    assert cka(square, square[:, :1]) == pytest.approx(4 / (math.sqrt(8) * 2))


def test_cka_equals_the_kernel_form():
    x, y = random(30, 5), random(30, 7, seed=1)
    y[:, :3] += 2 * x[:, :3]
    assert cka(x, y) == pytest.approx(naive_cka(x, y), abs=1e-12)
    assert cka(x, y, debiased=True) == pytest.approx(naive_debiased_cka(x, y), abs=1e-12)
    assert cka(x, y) - cka(x, y, debiased=True) > 0.02


def test_batches_do_not_matter_nor_does_where_the_features_lie():
    x, y = random(31, 5), random(31, 7, seed=1)
    for debiased in (False, True):
        whole = cka(x, y, debiased=debiased)
        assert cka(x, y, batch_size=4, debiased=debiased) == pytest.approx(whole, abs=1e-12)
        moved = cka(x.double() + 1e4, y.double() * 1e-3 - 5, batch_size=4, debiased=debiased)
        assert moved == pytest.approx(whole, abs=1e-9)


def test_rotations_and_scales_keep_it_and_noise_lowers_it():
    x = random(200, 6)
    rotation = torch.linalg.qr(random(6, 6, seed=2))[0]
    for debiased in (False, True):
        assert cka(x, 5 * x @ rotation, debiased=debiased) == pytest.approx(1, abs=1e-6)
        little, much = (cka(x, x + noise * random(200, 6, seed=3), debiased=debiased) for noise in (0.3, 2))
        assert 1 > little > 0.8 > much


def test_few_images_of_unrelated_features_look_alike_only_to_the_biased_estimate():
    x, y = random(20, 200), random(20, 200, seed=1)
    assert cka(x, y) > 0.8
    assert abs(cka(x, y, debiased=True)) < 0.1


def test_layers_are_the_means_of_their_tokens():
    model, _ = tiny_proclip()
    pixels = random(3, 3, 8, 8)
    layers = image_layers(model, pixels)
    outputs = model.vision_model(pixel_values=pixels, output_hidden_states=True)
    assert [tuple(layer.shape) for layer in layers] == [(3, 16), (3, 16), (3, 16)]
    torch.testing.assert_close(layers[1], outputs.hidden_states[1].mean(1))
    torch.testing.assert_close(layers[2], model.get_image_features(pixel_values=pixels).pooler_output)


def test_a_changed_layer_shows_from_there_on():
    model, _ = tiny_proclip()
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for weight in tuned.vision_model.encoder.layers[0].mlp.parameters():
            weight.add_(random(*weight.shape, seed=5))
    pixels = random(24, 3, 8, 8).split(8)
    same = cka_by_layer(model, model, zip(pixels, pixels, strict=True))
    found = cka_by_layer(tuned, model, zip(pixels, pixels, strict=True))
    assert [row["layer"] for row in found] == ["patches", "1", "embedding"]
    assert [row["cka"] for row in same] == pytest.approx([1, 1, 1])
    assert found[0]["cka"] == pytest.approx(1) and found[1]["cka"] < 0.99 and found[2]["cka_debiased"] < 0.99


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_other_families_have_layers_too(family):
    model, _ = tiny_clip(family)
    size = model.config.vision_config.image_size
    pixels = random(5, 3, size, size)
    rows = cka_by_layer(model, model, [(pixels, pixels)])
    assert len(rows) == model.config.vision_config.num_hidden_layers + 2
    assert rows[-1]["cka_debiased"] == pytest.approx(1)


def test_bad_input_is_refused():
    found = LinearCKA()
    with pytest.raises(ValueError, match="at least 4 images, and has 0"):
        found.compute()
    with pytest.raises(ValueError, match="x has NaN or infinite values"):
        found.update(torch.full((2, 3), math.nan), torch.ones(2, 3))
    with pytest.raises(ValueError, match="same images, but have 2 and 3 rows"):
        found.update(torch.ones(2, 3), torch.ones(3, 3))
    with pytest.raises(ValueError, match="y must be floating point"):
        found.update(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.long))
    found.update(random(4, 3), torch.ones(4, 2))
    with pytest.raises(ValueError, match=r"had \(3, 2\) dimensions before, and now have \(3, 5\)"):
        found.update(random(4, 3), random(4, 5))
    for debiased in (False, True):
        with pytest.raises(ValueError, match="y is the same for every image"):
            found.compute(debiased)
    model, _ = tiny_proclip()
    with pytest.raises(ValueError, match="no images"):
        cka_by_layer(model, model, [])
    deeper, _ = tiny_clip("clip")
    deeper.vision_model.encoder.layers.append(copy.deepcopy(deeper.vision_model.encoder.layers[0]))
    size = deeper.config.vision_config.image_size
    with pytest.raises(ValueError, match="layers: CKA by layer needs the same number"):
        cka_by_layer(model, deeper, [(random(4, 3, 8, 8), random(4, 3, size, size))])
