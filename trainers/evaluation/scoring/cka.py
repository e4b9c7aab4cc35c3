"""Centred kernel alignment (CKA): how much of one image encoder's representation is left in another's, layer by layer.

Linear CKA of the features x (N, d) and y (N, e) of the same N images, both centred (Kornblith et al., Similarity of Neural Network
Representations Revisited, ICML 2019, section 3):

    CKA(x, y) = ||xᵀy||² / (||xᵀx|| ||yᵀy||)                       Frobenius norms

1 means equal up to rotation and scale, 0 nothing in common. The numerator is the biased estimate of the Hilbert-Schmidt independence criterion
(HSIC): with fewer images than some times d, even unrelated features come near 1. `debiased` takes the unbiased estimate of all three
HSICs instead (Song et al., Feature Selection via Dependence Maximization, JMLR 2012, equation 5), whose expectation is 0 for unrelated features
however few images there are. Nguyen et al. (ICLR 2021) average that estimate over minibatches, because they hold N x N kernels; here
all sums are over the d x e products, so that it is the estimate over all images at once, with memory that does not grow with N.
"""

from collections.abc import Iterable

import torch


class LinearCKA:
    """Linear CKA of two sets of features that come in batches.

    Keeps the d x d, d x e and e x e products in float64: 24 MB for d = e = 1024.

    Example:
        >>> cka = LinearCKA()
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
        >>> cka.update(x, 3 * x.flip(1))
        >>> round(cka.compute(), 6)
        1.0
    """

    def __init__(self) -> None:
        self.num_images = 0

    @torch.no_grad()
    def update(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds the features `x` (batch_size, d) and `y` (batch_size, e) of the same images, in any floating dtype. ValueError if they do not fit each other
        or those before, or are not finite.
        """
        for name, features in (("x", x), ("y", y)):
            if features.dim() != 2 or not features.is_floating_point():
                raise ValueError(
                    f"{name} must be floating point numbers (batch_size, dim), but is {tuple(features.shape)} {features.dtype}."
                )
            if not torch.isfinite(features).all():
                raise ValueError(f"{name} has NaN or infinite values.")
        if len(x) != len(y):
            raise ValueError(f"x and y must be of the same images, but have {len(x)} and {len(y)} rows.")
        if x.device.type == "mps":  # Apple's GPUs have no float64
            x, y = x.cpu(), y.cpu()
        x, y = x.double(), y.double()
        if self.num_images == 0:
            # Both estimates are the same for moved features; sums of centred ones lose no digits.
            self._moves = x.mean(0), y.mean(0)
            self._sides = _Sums(x, x), _Sums(y, y), _Sums(x, y)
        elif (x.shape[1], y.shape[1]) != tuple(len(move) for move in self._moves):
            widths = tuple(len(move) for move in self._moves)
            raise ValueError(f"features had {widths} dimensions before, and now have {(x.shape[1], y.shape[1])}.")
        x, y = x - self._moves[0], y - self._moves[1]
        for sums, (first, second) in zip(self._sides, ((x, x), (y, y), (x, y)), strict=True):
            sums.add(first, second)
        self.num_images += len(x)

    def compute(self, debiased: bool = False) -> float:
        """CKA over all images so far, at least four. `debiased` takes the unbiased estimates of HSIC; it can be a little below 0 for unrelated features."""
        if self.num_images < 4:
            raise ValueError(f"CKA needs at least 4 images, and has {self.num_images}.")
        xx, yy, xy = (sums.hsic(self.num_images, debiased) for sums in self._sides)
        for name, own, sums in (("x", xx, self._sides[0]), ("y", yy, self._sides[1])):
            if own <= 1e-24 * self.num_images * float(sums.lengths) or own == 0:
                raise ValueError(f"{name} is the same for every image, so there is nothing to compare.")
        return xy / (xx * yy) ** 0.5


class _Sums:
    """What both estimates of HSIC(x, y) need, summed over images: xᵀy and moments with the squared lengths |x_i|², |y_i|²."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor):
        self.product = x.new_zeros(x.shape[1], y.shape[1])  # sum of x_i y_iᵀ
        self.x, self.y = x.new_zeros(x.shape[1]), y.new_zeros(y.shape[1])  # sums of x_i, of y_i
        self.x_by_length, self.y_by_length = torch.zeros_like(self.x), torch.zeros_like(self.y)  # of x_i |y_i|²
        self.x_length, self.y_length, self.lengths = x.new_zeros(()), x.new_zeros(()), x.new_zeros(())  # of |x_i|² ...

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        x_length, y_length = x.square().sum(1), y.square().sum(1)
        self.product += x.T @ y
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.x_by_length += y_length @ x
        self.y_by_length += x_length @ y
        self.x_length += x_length.sum()
        self.y_length += y_length.sum()
        self.lengths += (x_length * y_length).sum()

    def hsic(self, n: int, debiased: bool) -> float:
        """HSIC up to a factor that depends on `n` alone, which cancels in CKA."""
        if not debiased:
            return float((self.product - torch.outer(self.x, self.y) / n).square().sum())
        # With K = x xᵀ and L = y yᵀ, diagonals set to 0: tr KL + (1ᵀK1)(1ᵀL1) / (n-1)(n-2) - 2 (1ᵀKL1) / (n-2).
        trace = self.product.square().sum() - self.lengths
        sums = (self.x @ self.x - self.x_length) * (self.y @ self.y - self.y_length)
        rows = self.x @ self.product @ self.y - self.x @ self.x_by_length - self.y @ self.y_by_length + self.lengths
        return float(trace + sums / ((n - 1) * (n - 2)) - 2 * rows / (n - 2))


@torch.inference_mode()
def image_layers(model: torch.nn.Module, pixel_values: torch.Tensor) -> list[torch.Tensor]:
    """The image encoder's representations of `pixel_values (batch_size, 3, height, width)`: the embedded patches and the output of every layer, each
    `(batch_size, hidden_size)`, and the image embedding itself, `(batch_size, projection_dim)`.

    Layers come as the mean over all tokens, so that towers which pool by a class token and towers which attend over patches are treated alike.
    """
    outputs = model.get_image_features(pixel_values=pixel_values, output_hidden_states=True)
    if not outputs.hidden_states:
        raise ValueError(
            f"{type(model).__name__}.get_image_features gives no hidden states: CKA by layer cannot be measured."
        )
    return [hidden.float().mean(1) for hidden in outputs.hidden_states] + [outputs.pooler_output.float()]


def cka_by_layer(
    model: torch.nn.Module, baseline: torch.nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]
) -> list[dict[str, float | str]]:
    """CKA between each layer of `model`'s image encoder and the same layer of `baseline`'s.

    Args:
        model, baseline: the tuned and the original model, whose `get_image_features` pass `output_hidden_states` on.
        batches: pairs of `pixel_values` of the same images, as each model's own processor makes them.

    Returns:
        `{"layer": "patches" | "1" ... | "embedding", "cka": ..., "cka_debiased": ...}`, first layer first.
    """
    layers: list[LinearCKA] = []
    for own_pixels, baseline_pixels in batches:
        own, others = image_layers(model, own_pixels), image_layers(baseline, baseline_pixels)
        if len(own) != len(others):
            raise ValueError(
                f"the image encoders have {len(own) - 2} and {len(others) - 2} layers: CKA by layer needs the same number."
            )
        layers = layers or [LinearCKA() for _ in own]
        for cka, first, second in zip(layers, own, others, strict=True):
            cka.update(first, second)
    if not layers:
        raise ValueError("there are no images to measure CKA on.")
    names = ["patches", *(str(number) for number in range(1, len(layers) - 1)), "embedding"]
    return [
        {"layer": name, "cka": cka.compute(), "cka_debiased": cka.compute(debiased=True)}
        for name, cka in zip(names, layers, strict=True)
    ]
