"""Metrics against hand-computed matrices, naive forms and the reference's recorded figures."""

import math

import pytest
import torch
import torch.nn.functional as F

from modeling_proclip import ProCLIPConfig
from modeling_proclip.text_adapter import TextAdapter
from tests.golden import load
from tests.reference_layout import adapter_map, load_reference
from trainers.evaluation import caption_retrieval, retrieval_recall, zero_shot_accuracy, zero_shot_classifier
from trainers.evaluation.scoring import ranks


def embeds_with_scores(scores: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and texts whose cosine similarities are `scores` times one common factor.

    Texts are rows of the identity, each with a coordinate of its own that brings all images to one length.
    """
    scores = torch.tensor(scores, dtype=torch.float64)
    rest = (2 * scores.square().sum(1).max() - scores.square().sum(1)).sqrt()
    images = torch.cat([scores, torch.diag(rest)], dim=1)
    texts = torch.eye(scores.shape[1], images.shape[1], dtype=torch.float64)
    return images, texts


def naive_recall(scores: torch.Tensor, text_to_image: torch.Tensor, ks: tuple[int, ...]) -> dict[str, float]:
    """From the whole matrix `(num_images, num_texts)`, one query at a time; the wrong answer wins a tie."""
    result = {}
    for k in ks:
        i2t = t2i = 0
        for image in range(scores.shape[0]):
            best = scores[image, text_to_image == image].max()
            i2t += int((scores[image, text_to_image != image] >= best).sum()) < k
        for text in range(scores.shape[1]):
            own = text_to_image[text]
            others = torch.cat([scores[:own, text], scores[own + 1 :, text]])
            t2i += int((others >= scores[own, text]).sum()) < k
        result[f"i2t_r@{k}"] = i2t / scores.shape[0]
        result[f"t2i_r@{k}"] = t2i / scores.shape[1]
    return result


def random_set(num_images: int, dim: int = 16, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images with one to four captions each, in no order, of which about half are found."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(num_images, dim, generator=generator)
    counts = torch.randint(1, 5, (num_images,), generator=generator)
    text_to_image = torch.arange(num_images).repeat_interleave(counts)
    text_to_image = text_to_image[torch.randperm(len(text_to_image), generator=generator)]
    texts = images[text_to_image] + 1.5 * torch.randn(len(text_to_image), dim, generator=generator)
    return images, texts, text_to_image


# Retrieval by hand


def test_recall_of_several_captions_by_hand():
    images, texts = embeds_with_scores(
        # texts 0, 1, 2 describe image 0, text 3 image 1, text 4 image 2
        [
            [0.1, 0.9, 0.2, 0.8, 0.3],  # best own caption 0.9: rank 0, though 0.8 and 0.3 beat the other two
            [0.5, 0.7, 0.1, 0.6, 0.2],  # own 0.6, one ahead (0.7): rank 1
            [0.4, 0.8, 0.6, 0.5, 0.3],  # own 0.3, all four ahead: rank 4
        ]
    )
    # By column: 0.1 (0.5 and 0.4 ahead: 2), 0.9 (0), 0.2 (0.6: 1), 0.6 (0.8: 1), 0.3 (tie with image 0: 1)
    assert retrieval_recall(images, texts, [0, 0, 0, 1, 2], ks=(1, 2, 3, 4, 5)) == {
        "i2t_r@1": 1 / 3,
        "t2i_r@1": 1 / 5,
        "i2t_r@2": 2 / 3,
        "t2i_r@2": 4 / 5,
        "i2t_r@3": 2 / 3,
        "t2i_r@3": 1.0,
        "i2t_r@4": 2 / 3,
        "t2i_r@4": 1.0,
        "i2t_r@5": 1.0,
        "t2i_r@5": 1.0,
    }


def test_recall_of_ties_by_hand():
    images, texts = embeds_with_scores(
        # texts 0, 1 describe image 0, texts 2, 3 image 1
        [
            [0.5, 0.5, 0.1, 0.5],  # own captions tie with each other, which costs nothing, and with text 3: rank 1
            [0.5, 0.2, 0.4, 0.4],  # text 0 ahead of both own: rank 1
        ]
    )
    # By column: tie (1), 0 ahead, 0 ahead, 0.5 ahead (1)
    expected = {"i2t_r@1": 0.0, "t2i_r@1": 0.5, "i2t_r@2": 1.0, "t2i_r@2": 1.0}
    assert retrieval_recall(images, texts, [0, 0, 1, 1], ks=(1, 2)) == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_collapsed_model_finds_nothing(dtype: torch.dtype):
    # Lengths differ, directions do not: all scores are 1 up to rounding.
    direction = F.normalize(torch.randn(1, 768, generator=torch.Generator().manual_seed(0)), dim=-1)
    lengths = torch.tensor(2.0) ** torch.arange(-4, 4)
    images = (lengths.repeat(20)[:, None] * direction).to(dtype)
    result = retrieval_recall(images, images.repeat(2, 1), torch.arange(160).repeat(2))
    assert set(result.values()) == {0.0}
    assert set(zero_shot_accuracy(images, images[:40], [0] * 160).values()) == {0.0}


def test_a_copy_of_the_right_answer_counts_as_ahead_of_it_at_any_place():
    # Blocks end at different places for the two copies, and a matrix product may round them differently.
    images, texts, text_to_image = random_set(700, dim=384)
    texts = images[text_to_image] + 0.01 * texts
    assert retrieval_recall(images, texts, text_to_image, ks=(1,)) == {"i2t_r@1": 1.0, "t2i_r@1": 1.0}
    doubled = torch.cat([images, images])
    both = torch.cat([text_to_image, text_to_image + 700])
    result = retrieval_recall(doubled, torch.cat([texts, texts]), both, ks=(1, 2))
    assert result["t2i_r@1"] == result["i2t_r@1"] == 0.0
    assert result["t2i_r@2"] == 1.0


# Retrieval against naive forms


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_recall_equals_the_naive_form_across_blocks(monkeypatch, dtype: torch.dtype):
    monkeypatch.setattr(ranks, "_ROWS", 7)
    monkeypatch.setattr(ranks, "_COLUMNS", 11)
    for seed in range(3):
        images, texts, text_to_image = random_set(50, seed=seed)
        images, texts = images.to(dtype), texts.to(dtype)
        scores = F.normalize(images.double(), dim=-1) @ F.normalize(texts.double(), dim=-1).T
        ks = (1, 2, 5, 10, 49, 50, 1000)
        result = retrieval_recall(images, texts, text_to_image, ks)
        assert result == naive_recall(scores, text_to_image, ks)
        assert 0.1 < result["t2i_r@1"] < 0.9
        assert result["i2t_r@1000"] == result["t2i_r@1000"] == 1.0


@pytest.mark.parametrize("direction", ["t2i", "i2t"])
def test_scores_that_float32_cannot_tell_apart_are_ranked_right(direction: str):
    # 40 queries have the right answer and a wrong one 1e-9 below it, which float32 leaves open. 40 more, before them,
    # point away from their answers and are found by nobody.
    generator = torch.Generator().manual_seed(0)
    queries = F.normalize(torch.randn(40, 64, generator=generator, dtype=torch.float64), dim=-1)
    sideways = torch.randn(40, 64, generator=generator, dtype=torch.float64)
    sideways = F.normalize(sideways - (sideways * queries).sum(-1, keepdim=True) * queries, dim=-1)
    nearer, farther = math.acos(0.9), math.acos(0.9 - 1e-9)
    nearest = math.cos(nearer) * queries + math.sin(nearer) * sideways
    second = math.cos(farther) * queries - math.sin(farther) * sideways

    def recall(right: torch.Tensor, wrong: torch.Tensor) -> list[float]:
        sides = torch.cat([wrong, right]), torch.cat([-wrong, queries])
        images, texts = sides if direction == "t2i" else sides[::-1]
        result = retrieval_recall(images, texts, torch.arange(80), ks=(1, 2))
        return [result[f"{direction}_r@1"], result[f"{direction}_r@2"]]

    assert recall(right=nearest, wrong=second) == [0.5, 0.5]
    assert recall(right=second, wrong=nearest) == [0.0, 0.5]


@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 8), (255, 16), (256, 24), (700, 1024), (3, 8 * 255), (4, 8 * 256), (5, 13)]
)
def test_booleans_are_counted_without_overflow(rows, columns):
    generator = torch.Generator().manual_seed(0)
    for mask in (torch.ones(rows, columns, dtype=torch.bool), torch.rand(rows, columns, generator=generator) < 0.5):
        for along in (0, 1):
            found = ranks._count_true(mask, along)
            assert found.dtype == torch.int32 and torch.equal(found, mask.sum(along, dtype=torch.int32))
    columns_first = mask.T.contiguous().T
    assert torch.equal(ranks._count_true(columns_first, 1), mask.sum(1, dtype=torch.int32))


def test_recall_is_exact_where_float32_products_are_not_of_float32(monkeypatch):
    images, texts, text_to_image = random_set(60)
    expected = retrieval_recall(images, texts, text_to_image)
    products = ranks._products

    def rounded(first, second):
        if first.dtype == torch.float32:  # as oneDNN does where it is allowed to
            first, second = first.bfloat16().float(), second.bfloat16().float()
        return products(first, second)

    assert ranks._keeps_float32(16)
    monkeypatch.setattr(ranks, "_products", rounded)
    assert not ranks._keeps_float32(16)
    assert retrieval_recall(images, texts, text_to_image) == expected


def test_recall_does_not_depend_on_order_length_or_autocast():
    images, texts, text_to_image = random_set(60)
    expected = retrieval_recall(images, texts, text_to_image)
    generator = torch.Generator().manual_seed(1)
    text_order = torch.randperm(len(texts), generator=generator)
    image_order = torch.randperm(60, generator=generator)
    place = torch.empty_like(image_order)
    place[image_order] = torch.arange(60)
    lengths = torch.rand(60, 1, generator=generator) + 0.1
    shuffled = (images * lengths)[image_order], texts[text_order], place[text_to_image][text_order]
    assert retrieval_recall(*shuffled) == expected
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert retrieval_recall(images, texts, text_to_image) == expected
    # A rotation changes neither side.
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64))[0]
    assert retrieval_recall(images.double() @ rotation, texts.double() @ rotation, text_to_image) == expected


def test_recall_rises_with_k_and_takes_a_list():
    images, texts, text_to_image = random_set(60)
    result = retrieval_recall(images, texts, text_to_image.tolist())
    assert list(result) == ["i2t_r@1", "t2i_r@1", "i2t_r@5", "t2i_r@5", "i2t_r@10", "t2i_r@10"]
    for direction in ("i2t", "t2i"):
        assert result[f"{direction}_r@1"] < result[f"{direction}_r@5"] < result[f"{direction}_r@10"]
    assert all(type(value) is float for value in result.values())


# Zero-shot


def test_zero_shot_accuracy_by_hand():
    images, classes = embeds_with_scores(
        [
            [0.9, 0.1, 0.3],  # class 0: rank 0
            [0.5, 0.4, 0.6],  # class 0: one ahead
            [0.5, 0.5, 0.1],  # class 1: tied with class 0, rank 1
            [0.7, 0.6, 0.2],  # class 2: two ahead
        ]
    )
    result = zero_shot_accuracy(images, classes, [0, 0, 1, 2], ks=(1, 2, 3, 5))
    assert result == {"top1": 1 / 4, "top2": 3 / 4, "top3": 1.0, "top5": 1.0}


def test_zero_shot_accuracy_equals_the_naive_form_across_blocks(monkeypatch):
    monkeypatch.setattr(ranks, "_ROWS", 20)
    monkeypatch.setattr(ranks, "_COLUMNS", 3)
    images, classes, _ = random_set(50)
    labels = torch.arange(len(images)) % 12
    scores = F.normalize(images.double(), dim=-1) @ F.normalize(classes[:12].double(), dim=-1).T
    for k, accuracy in ((1, "top1"), (5, "top5")):
        hits = (scores.topk(k).indices == labels[:, None]).any(1)
        assert zero_shot_accuracy(images, classes[:12], labels)[accuracy] == int(hits.sum()) / 50


def test_zero_shot_classifier_by_hand():
    # Class 0 has prompts along x (of length 5) and y, class 1 one prompt. The lengths of prompts must not weigh.
    prompts = torch.tensor([[5.0, 0.0], [0.0, -2.0], [0.0, 1.0]])
    expected = torch.tensor([[math.sqrt(0.5), math.sqrt(0.5)], [0.0, -1.0]])
    torch.testing.assert_close(zero_shot_classifier(prompts, [0, 1, 0]), expected)
    assert zero_shot_classifier(prompts.bfloat16(), [0, 1, 0]).dtype == torch.float32


# The reference's recorded cases


def test_retrieval_of_five_captions_case():
    golden = load("g7_retrieval_5caps")
    result = retrieval_recall(
        golden.inputs["image_embeds"], golden.inputs["text_embeds"], golden.inputs["text_image_index"]
    )
    # The reference names a direction by what is retrieved.
    for k in (1, 5, 10):
        golden.assert_close(f"out.text_retrieval_recall@{k}", result[f"i2t_r@{k}"])
        golden.assert_close(f"out.image_retrieval_recall@{k}", result[f"t2i_r@{k}"])
        # Of 200 images and 1,000 texts: the recorded float32 means, to their last digit.
        assert torch.tensor(result[f"i2t_r@{k}"]) == golden.outputs[f"text_retrieval_recall@{k}"]
        assert torch.tensor(result[f"t2i_r@{k}"]) == golden.outputs[f"image_retrieval_recall@{k}"]
    assert golden.unchecked() == set()


def test_retrieval_of_one_caption_case():
    golden = load("g7_retrieval_global")
    images, texts = golden.inputs["image_embeds"], golden.inputs["text_embeds"]
    ks = (1, 5, 10, 25, 50)
    result = retrieval_recall(images, texts, torch.arange(len(texts)), ks)
    for k in ks:
        golden.assert_close(f"out.text_retrieval_recall@{k}", result[f"i2t_r@{k}"])
        golden.assert_close(f"out.image_retrieval_recall@{k}", result[f"t2i_r@{k}"])
        assert result[f"i2t_r@{k}"] == golden.record["metrics"][f"text_retrieval_recall@{k}"]
        assert result[f"t2i_r@{k}"] == golden.record["metrics"][f"image_retrieval_recall@{k}"]
    for k in (1, 5, 10):
        golden.assert_close(f"out.get_metrics.image_to_text_R@{k}", result[f"i2t_r@{k}"])
        golden.assert_close(f"out.get_metrics.text_to_image_R@{k}", result[f"t2i_r@{k}"])
    # Its training log reports the mean and the median of the ranks, which recall at every k adds up to.
    every_k = retrieval_recall(images, texts, torch.arange(len(texts)), range(1, len(texts) + 1))
    for direction, name in (("i2t", "image_to_text"), ("t2i", "text_to_image")):
        found = [round(every_k[f"{direction}_r@{k}"] * len(texts)) for k in range(1, len(texts) + 1)]
        ranks = torch.tensor([sum(count <= query for count in found) for query in range(len(texts))]).double()
        golden.assert_close(f"out.get_metrics.{name}_mean_rank", ranks.mean() + 1)
        golden.assert_close(f"out.get_metrics.{name}_median_rank", ranks.quantile(0.5).floor() + 1)
    assert golden.unchecked() == set()


def test_zero_shot_classification_case():
    golden = load("g7_zero_shot_classification")
    config = golden.config
    adapter = TextAdapter(
        ProCLIPConfig(
            text_config={"hidden_size": config["llm_dim"], "num_attention_heads": 1},
            projection_dim=config["embed_dim"],
            adapter_num_layers=config["num_layers_text"],
            adapter_expansion=config["expansion_factor"],
        )
    )
    load_reference(adapter, golden.params, adapter_map(config["num_layers_text"]))
    class_index = torch.arange(config["num_classes"]).repeat_interleave(golden.inputs["templates_per_class"])
    with torch.no_grad():
        classes = zero_shot_classifier(adapter(golden.inputs["class_text_embeds_llm"]), class_index)
    images = golden.inputs["image_embeds"]
    golden.assert_close("out.classifier_weights", classes.T)
    golden.assert_close("out.logits", config["logit_multiplier"] * F.normalize(images, dim=-1) @ classes.T)
    result = zero_shot_accuracy(images, classes, golden.inputs["targets"])
    golden.assert_close("out.top1", result["top1"])
    golden.assert_close("out.top5", result["top5"])
    assert result == {key: golden.record["metrics"][key] for key in ("top1", "top5")}
    assert golden.unchecked() == set()


# Bad input


def test_bad_input_of_retrieval_recall():
    images, texts, index = torch.eye(3), torch.eye(3), [0, 1, 2]
    with pytest.raises(ValueError, match="image_embeds must be .*at least one row, but has shape \\(0, 3\\)"):
        retrieval_recall(torch.zeros(0, 3), texts, index)
    with pytest.raises(ValueError, match="text_embeds must be .*\\(0, 3\\)"):
        retrieval_recall(images, torch.zeros(0, 3), [])
    with pytest.raises(ValueError, match="text_embeds must be floating point .*int64"):
        retrieval_recall(images, texts.long(), index)
    with pytest.raises(ValueError, match="have 3 and 4 dimensions"):
        retrieval_recall(images, torch.eye(3, 4), index)
    for bad in (math.nan, math.inf):
        broken = texts.clone()
        broken[1, 2] = bad
        with pytest.raises(ValueError, match="text_embeds has NaN or infinite values, first in row 1"):
            retrieval_recall(images, broken, index)
    with pytest.raises(ValueError, match="text_to_image must be 3 whole numbers, one for each text, .*\\(2,\\)"):
        retrieval_recall(images, texts, [0, 1])
    with pytest.raises(ValueError, match="text_to_image must be 3 whole numbers.*float32"):
        retrieval_recall(images, texts, [0.0, 1.0, 2.0])
    with pytest.raises(ValueError, match="text_to_image\\[2\\] is 3, but the 3 images go from 0 to 2"):
        retrieval_recall(images, texts, [0, 1, 3])
    with pytest.raises(ValueError, match="text_to_image\\[0\\] is -1"):
        retrieval_recall(images, texts, [-1, 1, 2])
    with pytest.raises(ValueError, match="1 of 3 images have no caption, the first is image 2"):
        retrieval_recall(images, texts, [0, 1, 1])
    for ks in ((), (0,), (5, -1)):
        with pytest.raises(ValueError, match="ks must be one or more whole numbers of at least 1"):
            retrieval_recall(images, texts, index, ks)


def test_bad_input_of_zero_shot_accuracy():
    with pytest.raises(ValueError, match="class_embeds must be .*\\(0, 3\\)"):
        zero_shot_accuracy(torch.eye(3), torch.zeros(0, 3), [0, 0, 0])
    with pytest.raises(ValueError, match="image_embeds has NaN or infinite values, first in row 0"):
        zero_shot_accuracy(torch.full((3, 3), math.nan), torch.eye(3), [0, 1, 2])
    with pytest.raises(ValueError, match="image_embeds and class_embeds .* 3 and 5 dimensions"):
        zero_shot_accuracy(torch.eye(3), torch.eye(5), [0, 1, 2])
    with pytest.raises(ValueError, match="labels must be 3 whole numbers, one for each image"):
        zero_shot_accuracy(torch.eye(3), torch.eye(3), [0, 1, 2, 2])
    with pytest.raises(ValueError, match="labels\\[1\\] is 3, but the 3 classes go from 0 to 2"):
        zero_shot_accuracy(torch.eye(3), torch.eye(3), [0, 3, 2])
    with pytest.raises(ValueError, match="ks must be"):
        zero_shot_accuracy(torch.eye(3), torch.eye(3), [0, 1, 2], ks=(0,))


def test_bad_input_of_zero_shot_classifier():
    with pytest.raises(ValueError, match="text_embeds must be"):
        zero_shot_classifier(torch.zeros(0, 3), [])
    with pytest.raises(ValueError, match="class_index must be 3 whole numbers, one for each prompt"):
        zero_shot_classifier(torch.eye(3), [0, 1])
    with pytest.raises(ValueError, match="class_index\\[0\\] is -1"):
        zero_shot_classifier(torch.eye(3), [-1, 0, 1])
    with pytest.raises(ValueError, match="class_index has no prompt for class 1 of 3 classes"):
        zero_shot_classifier(torch.eye(3), [0, 2, 2])


def test_caption_retrieval_by_hand():
    # The first captions find second captions 0, 0, 2: two of three right; the second ones find 0, 1, 2.
    first = torch.tensor([[1.0, 0.0], [0.8, 0.5], [0.0, 1.0]])
    second = torch.tensor([[0.98, 0.17], [0.5, 0.87], [-0.2, 1.0]])
    cosines = torch.nn.functional.normalize(first, dim=1) @ torch.nn.functional.normalize(second, dim=1).T
    assert cosines.argmax(1).tolist() == [0, 0, 2] and cosines.argmax(0).tolist() == [0, 1, 2]
    assert caption_retrieval(first, second, ks=(1, 2)) == {"caption_r@1": (2 / 3 + 1) / 2, "caption_r@2": 1.0}
    # A model that gives every caption the same embedding finds nothing.
    assert caption_retrieval(torch.ones(3, 2), torch.ones(3, 2)) == {"caption_r@1": 0.0}
    with pytest.raises(ValueError):
        caption_retrieval(first, second[:2])
