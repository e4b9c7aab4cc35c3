"""SentenceTransformer loads a checkpoint as it was saved: the same embeddings of unit length, for texts and pictures; and trains it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from safetensors import safe_open
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    CoSENTLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from transformers import AutoModel, AutoProcessor

from modeling_proclip import ProCLIPModel, ProCLIPProcessor
from modeling_proclip.sentence_transformers_files import FILES
from tests.modeling_proclip import tiny


TEXTS = ["a red fox", "zwei Hunde", "两只狗在草地上", "", "word " * 100]
PICTURES = [
    Image.new("RGB", (20, 16), "red"),
    Image.new("RGB", (16, 30), "green"),
    Image.new("L", (16, 16), 80),
    Image.new("RGBA", (16, 16), (0, 0, 255, 40)),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save(tiny.model(), tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def lean_checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    model = ProCLIPModel.from_vision_text_pretrained(tiny.clip(), tiny.LLAMA_DIR)
    return save(model, tmp_path_factory.mktemp("lean"), lean=True)


def save(model: ProCLIPModel, folder: Path, **kwargs) -> Path:
    model.save_pretrained(folder, **kwargs)
    tiny.processor(prompt_template=tiny.LLAMA3, max_length=40, instruction="Describe:").save_pretrained(folder)
    return folder


@torch.no_grad()
def embed(folder: Path, texts=None, images=None) -> np.ndarray:
    """What the model itself gives, of unit length: by the Auto classes and their own arguments."""
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    output = model(**processor(text=texts, images=images, return_tensors="pt"))
    return (output.text_embeds if images is None else output.image_embeds).numpy()


@pytest.mark.parametrize("folder", ["checkpoint", "lean_checkpoint"])
def test_texts_and_pictures_embed_as_by_the_model_itself(folder, request):
    folder = request.getfixturevalue(folder)
    model = SentenceTransformer(str(folder))
    # One by one, in small batches and all at once: padding and order make no difference.
    for batch_size in (1, 2, 32):
        np.testing.assert_allclose(model.encode(TEXTS, batch_size=batch_size), embed(folder, TEXTS), atol=1e-5)
    np.testing.assert_allclose(model.encode(PICTURES, batch_size=3), embed(folder, images=PICTURES), atol=1e-5)


def test_a_model_without_its_llm_encodes_pictures(lean_checkpoint):
    model = SentenceTransformer(str(lean_checkpoint), model_kwargs={"load_text_model": False})
    assert model.transformers_model.text_model is None
    np.testing.assert_allclose(model.encode(PICTURES), embed(lean_checkpoint, images=PICTURES), atol=1e-5)


def test_settings_are_saved_with_the_processor(checkpoint):
    model = SentenceTransformer(str(checkpoint))
    assert [type(module).__name__ for module in model] == ["Transformer", "Normalize"]
    assert model.similarity_fn_name == "cosine" and model.max_seq_length == 40
    assert model.get_embedding_dimension() == 16
    assert sorted(model.modalities) == ["image", "text"]
    np.testing.assert_allclose(np.linalg.norm(model.encode(TEXTS), axis=1), 1, atol=1e-6)
    similarity = model.similarity(model.encode(PICTURES), model.encode(TEXTS))
    np.testing.assert_allclose(similarity, embed(checkpoint, images=PICTURES) @ embed(checkpoint, TEXTS).T, atol=1e-5)


def test_the_length_is_followed_and_saved(checkpoint, tmp_path):
    def tokens_read(model: SentenceTransformer) -> int:
        return len(model.encode(["word " * 100], output_value=None)[0]["input_ids"])

    model = SentenceTransformer(str(checkpoint))
    assert tokens_read(model) == 40
    model.max_seq_length = 16
    assert tokens_read(model) == 16
    model.save_pretrained(str(tmp_path))
    again = SentenceTransformer(str(tmp_path))
    assert again.max_seq_length == 16 == tokens_read(again)
    given = SentenceTransformer(str(checkpoint), processor_kwargs={"model_max_length": 20})
    assert given.max_seq_length == 20 == tokens_read(given)
    model.max_seq_length = 9
    with pytest.raises(ValueError, match="max_length=9 leaves no room for text"):
        model.encode(["a red fox"])


def test_images_of_their_own_aspect_ratio(tmp_path):
    torch.manual_seed(0)
    ProCLIPModel.from_vision_text_pretrained(tiny.naflex(), tiny.LLAMA_DIR).save_pretrained(tmp_path)
    tiny.processor(tiny.naflex_image_processor()).save_pretrained(tmp_path)
    np.testing.assert_allclose(
        SentenceTransformer(str(tmp_path)).encode(PICTURES, batch_size=3), embed(tmp_path, images=PICTURES), atol=1e-5
    )


def test_a_prompt_is_read_as_the_beginning_of_the_text(checkpoint):
    """It is pooled, unlike the processor's `instruction`, which stands in the template."""
    model = SentenceTransformer(str(checkpoint))
    expected = embed(checkpoint, ["query: a red fox"])
    np.testing.assert_allclose(model.encode(["a red fox"], prompt="query: "), expected, atol=1e-5)
    assert np.abs(expected - model.encode(["a red fox"])).max() > 1e-3


def test_prompts_by_name(checkpoint):
    model = SentenceTransformer(str(checkpoint), prompts={"query": "query: ", "document": "text: "})
    for encoded in (model.encode(TEXTS[:2], prompt_name="query"), model.encode_query(TEXTS[:2])):
        np.testing.assert_allclose(encoded, embed(checkpoint, [f"query: {text}" for text in TEXTS[:2]]), atol=1e-5)
    documents = embed(checkpoint, [f"text: {text}" for text in TEXTS[:2]])
    np.testing.assert_allclose(model.encode_document(TEXTS[:2]), documents, atol=1e-5)
    with pytest.raises(ValueError, match="'passage'"):
        model.encode(TEXTS[:2], prompt_name="passage")


@torch.no_grad()
@pytest.mark.parametrize("truncate_dim", [5, 16])
def test_shorter_embeddings(checkpoint, truncate_dim):
    ours, processor = ProCLIPModel.from_pretrained(checkpoint), ProCLIPProcessor.from_pretrained(checkpoint)
    expected = ours(
        **processor(text=TEXTS, images=PICTURES, return_tensors="pt", padding=True), truncate_dim=truncate_dim
    )
    model = SentenceTransformer(str(checkpoint), truncate_dim=truncate_dim)
    assert model.get_embedding_dimension() == truncate_dim
    texts, images = (model.encode(inputs, normalize_embeddings=True) for inputs in (TEXTS, PICTURES))
    np.testing.assert_allclose(texts, expected.text_embeds, atol=1e-5)
    np.testing.assert_allclose(images, expected.image_embeds, atol=1e-5)
    # Without normalize_embeddings they are cut after they were brought to unit length; the cosines are the same.
    cosines = model.similarity(model.encode(PICTURES), model.encode(TEXTS))
    np.testing.assert_allclose(cosines, expected.image_embeds @ expected.text_embeds.T, atol=1e-5)


def test_a_pool_of_two_processes_encodes_as_one(checkpoint):
    """sentence-transformers spawns them and sends each the model as a pickle."""
    model = SentenceTransformer(str(checkpoint), prompts={"query": "query: "})
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    try:
        for inputs, settings in (
            (TEXTS, {}),
            (TEXTS, {"prompt_name": "query", "truncate_dim": 5, "normalize_embeddings": True}),
            (PICTURES, {}),
        ):
            encoded = model.encode(inputs, pool=pool, chunk_size=2, batch_size=2, **settings)
            np.testing.assert_allclose(encoded, model.encode(inputs, **settings), atol=1e-5)
    finally:
        model.stop_multi_process_pool(pool)


def test_texts_are_padded_whoever_asks_for_unpadded_ones(checkpoint, caplog):
    """It packs texts only for models whose `forward` embeds them, with FlashAttention."""
    model = SentenceTransformer(str(checkpoint))
    model[0].unpad_inputs = True
    assert "prerequisites for skipping padding are not met" in caplog.text
    np.testing.assert_allclose(model.encode(TEXTS), embed(checkpoint, TEXTS), atol=1e-5)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_white(checkpoint, mode):
    image = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    image.paste((0, 90, 200, 255), (0, 0, 8, 16))
    image.paste((0, 90, 200, 100), (8, 0, 12, 16))
    image = image.quantize(8) if mode == "P" else image.convert(mode)
    seen = image.convert("RGBA")
    on_white = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")
    encoded = SentenceTransformer(str(checkpoint)).encode([image, on_white])
    np.testing.assert_array_equal(encoded[0], encoded[1])
    np.testing.assert_allclose(encoded, embed(checkpoint, images=[image, on_white]), atol=1e-6)


def test_half_precision(checkpoint):
    model = SentenceTransformer(str(checkpoint), model_kwargs={"dtype": torch.bfloat16})
    assert model.transformers_model.dtype == torch.bfloat16
    similarity = (model.encode(TEXTS) * embed(checkpoint, TEXTS)).sum(axis=1)
    assert similarity.min() > 0.99


def test_pictures_and_texts_in_one_call_are_refused(checkpoint):
    with pytest.raises(ValueError, match="image, text"):
        SentenceTransformer(str(checkpoint)).encode([TEXTS[0], PICTURES[0]])


def test_what_sentence_transformers_saves_loads_by_everything(checkpoint, tmp_path):
    model = SentenceTransformer(str(checkpoint), prompts={"query": "query: "}, default_prompt_name="query")
    model.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "modules.json").read_text()) == FILES["modules.json"]
    np.testing.assert_array_equal(embed(tmp_path, TEXTS), embed(checkpoint, TEXTS))
    again = SentenceTransformer(str(tmp_path))
    assert again.prompts["query"] == "query: " and again.default_prompt_name == "query"
    np.testing.assert_allclose(again.encode(TEXTS[:2]), model.encode(TEXTS[:2]), atol=1e-6)
    # Saving our processor over it must not reset the prompts.
    ProCLIPProcessor.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert SentenceTransformer(str(tmp_path)).prompts["query"] == "query: "


def test_a_lean_checkpoint_stays_lean(lean_checkpoint, tmp_path):
    SentenceTransformer(str(lean_checkpoint)).save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["lean"]
    np.testing.assert_array_equal(embed(tmp_path, TEXTS), embed(lean_checkpoint, TEXTS))


CAPTIONS = [f"a picture of {number} foxes" for number in range(8)]
COLOURS = [Image.new("RGB", (16, 16), (30 * number, 0, 255 - 30 * number)) for number in range(8)]
DATA = {
    "pictures and captions": {"image": COLOURS, "caption": CAPTIONS},
    "texts": {"query": CAPTIONS, "document": [f"{number} foxes" for number in range(8)]},
    "scored texts": {
        "one": CAPTIONS,
        "other": CAPTIONS[::-1],
        "score": [number / 8 for number in range(8)],
    },
}
LOSSES = {
    "MultipleNegativesRankingLoss": MultipleNegativesRankingLoss,
    "CachedMultipleNegativesRankingLoss": lambda model: CachedMultipleNegativesRankingLoss(model, mini_batch_size=2),
    "CoSENTLoss": CoSENTLoss,
    "MatryoshkaLoss": lambda model: MatryoshkaLoss(model, MultipleNegativesRankingLoss(model), [16, 4]),
}


def train(model: SentenceTransformer, data: str, loss: str, folder: Path, **settings) -> SentenceTransformerTrainer:
    arguments = {"max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 5e-4, "logging_steps": 1}
    trainer = SentenceTransformerTrainer(
        model,
        args=SentenceTransformerTrainingArguments(
            str(folder), report_to="none", use_cpu=True, save_strategy="no", seed=0, **{**arguments, **settings}
        ),
        train_dataset=Dataset.from_dict(DATA[data]),
        loss=LOSSES[loss](model),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("data", "loss", "moved"),
    [
        (
            "pictures and captions",
            "CachedMultipleNegativesRankingLoss",
            {"vision_model", "visual_projection", "text_adapter"},
        ),
        ("texts", "MultipleNegativesRankingLoss", {"text_adapter"}),
        ("scored texts", "CoSENTLoss", {"text_adapter"}),
    ],
)
def test_its_trainer_trains_all_but_the_frozen_llm(lean_checkpoint, data, loss, moved, tmp_path):
    model = SentenceTransformer(str(lean_checkpoint))
    model.transformers_model.text_model.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.transformers_model.state_dict().items()}
    trainer = train(model, data, loss, tmp_path / "run")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    changed = {
        name for name, tensor in model.transformers_model.state_dict().items() if not torch.equal(before[name], tensor)
    }
    assert {name.split(".")[0] for name in changed} == moved
    adapter = {name for name in before if name.startswith("text_adapter")}
    assert adapter <= changed | {name for name in adapter if name.endswith("projection.bias")}

    trainer.save_model(str(tmp_path / "saved"))
    assert not any("text_model" in name for name in saved_tensors(tmp_path / "saved")), "lean as it was loaded"
    encoded = model.encode(CAPTIONS)
    np.testing.assert_allclose(SentenceTransformer(str(tmp_path / "saved")).encode(CAPTIONS), encoded, atol=1e-6)
    np.testing.assert_allclose(embed(tmp_path / "saved", CAPTIONS), encoded, atol=1e-5)
    ours = ProCLIPModel.from_pretrained(tmp_path / "saved")
    processor = ProCLIPProcessor.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        features = ours.get_text_features(**processor(text=CAPTIONS, return_tensors="pt")).pooler_output
    np.testing.assert_allclose(torch.nn.functional.normalize(features, dim=-1), encoded, atol=1e-5)


def test_the_cached_loss_trains_as_the_plain_one(checkpoint, tmp_path):
    weights = []
    for loss in ("MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"):
        model = SentenceTransformer(str(checkpoint))
        model.transformers_model.text_model.requires_grad_(False)
        train(model, "pictures and captions", loss, tmp_path / loss, max_steps=1, optim="sgd", learning_rate=0.1)
        weights.append(model.transformers_model.state_dict())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-5, rtol=1e-4, msg=name)


def test_its_trainer_trains_both_towers(checkpoint, tmp_path):
    """The LLM too, which a full checkpoint holds; and shorter embeddings by its own loss."""
    model = SentenceTransformer(str(checkpoint))
    before = {name: tensor.clone() for name, tensor in model.transformers_model.state_dict().items()}
    trainer = train(model, "pictures and captions", "MatryoshkaLoss", tmp_path / "run")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    after = model.transformers_model.state_dict()
    changed = {name.split(".")[0] for name, tensor in after.items() if not torch.equal(before[name], tensor)}
    assert changed == {"vision_model", "visual_projection", "text_adapter", "text_model"}
    trainer.save_model(str(tmp_path / "saved"))
    np.testing.assert_allclose(embed(tmp_path / "saved", CAPTIONS), model.encode(CAPTIONS), atol=1e-5)
    np.testing.assert_allclose(embed(tmp_path / "saved", images=COLOURS), model.encode(COLOURS), atol=1e-5)


def test_prompts_of_the_training_are_kept(checkpoint, tmp_path):
    model = SentenceTransformer(str(checkpoint), prompts={"query": "query: ", "document": "text: "})
    model.transformers_model.text_model.requires_grad_(False)
    trainer = train(
        model, "texts", "MultipleNegativesRankingLoss", tmp_path / "run", prompts=model.prompts, max_steps=1
    )
    trainer.save_model(str(tmp_path / "saved"))
    again = SentenceTransformer(str(tmp_path / "saved"))
    assert again.prompts == {"query": "query: ", "document": "text: "}
    np.testing.assert_allclose(
        again.encode_query(CAPTIONS), embed(tmp_path / "saved", [f"query: {text}" for text in CAPTIONS]), atol=1e-5
    )


def saved_tensors(folder: Path) -> list[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        return list(tensors.keys())
