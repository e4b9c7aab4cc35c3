"""ProCLIPModel: what it computes, how it trains, compiles and copies."""

import copy
import math
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional as F
from transformers import AutoModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_proclip import ProCLIPModel
from tests.modeling_proclip import tiny


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    return tiny.inputs()


# What it computes


@torch.no_grad()
def test_forward_against_a_naive_reference(inputs):
    model = tiny.model()
    states = model.text_model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    texts = torch.stack(
        [row[marked.bool()].mean(dim=0) for row, marked in zip(states, inputs["token_type_ids"], strict=True)]
    )
    texts = torch.stack([t / t.norm() for t in model.text_adapter(texts)])
    images = model.visual_projection(model.vision_model(inputs["pixel_values"]).pooler_output)
    images = torch.stack([v / v.norm() for v in images])
    scores = torch.tensor([[(t * v).sum() * model.logit_scale.exp() for v in images] for t in texts])
    picked = [-math.log(math.exp(row[i]) / sum(map(math.exp, row))) for i, row in enumerate(scores.tolist())]
    picked += [-math.log(math.exp(row[i]) / sum(map(math.exp, row))) for i, row in enumerate(scores.T.tolist())]

    outputs = model(**inputs, return_loss=True)
    torch.testing.assert_close(outputs.text_embeds, texts)
    torch.testing.assert_close(outputs.image_embeds, images)
    torch.testing.assert_close(outputs.logits_per_text, scores)
    torch.testing.assert_close(outputs.logits_per_image, scores.T)
    assert outputs.loss.item() == pytest.approx(sum(picked) / len(picked), abs=1e-5)


@torch.no_grad()
def test_either_modality_and_stored_embeddings(inputs):
    model = tiny.model()
    both = model(**inputs)
    text_inputs = {name: inputs[name] for name in tiny.TEXT_INPUTS}
    text = model(**text_inputs)
    image = model(pixel_values=inputs["pixel_values"])
    assert set(text) == {"text_embeds", "text_model_output"} and set(image) == {"image_embeds", "vision_model_output"}
    assert torch.equal(text.text_embeds, both.text_embeds) and torch.equal(image.image_embeds, both.image_embeds)

    llm_embeds = model.get_llm_embeds(**text_inputs)
    assert llm_embeds.shape == (3, 32)
    stored = model(llm_embeds=llm_embeds, pixel_values=inputs["pixel_values"])
    assert torch.equal(stored.logits_per_image, both.logits_per_image)
    assert set(stored.text_model_output) == {"pooler_output"}

    text_features, image_features = (
        model.get_text_features(**text_inputs),
        model.get_image_features(inputs["pixel_values"]),
    )
    assert isinstance(text_features, BaseModelOutputWithPooling) and isinstance(
        image_features, BaseModelOutputWithPooling
    )
    torch.testing.assert_close(F.normalize(text_features.pooler_output, dim=-1), both.text_embeds)
    torch.testing.assert_close(F.normalize(image_features.pooler_output, dim=-1), both.image_embeds)


@torch.no_grad()
def test_shorter_embeddings(inputs):
    model = tiny.model()
    texts = {name: inputs[name] for name in tiny.TEXT_INPUTS}
    whole, llm_embeds = model(**inputs), model.get_llm_embeds(**texts)
    for dim in (5, model.config.projection_dim):
        for features in (
            model.get_text_features(**texts, truncate_dim=dim),
            model.get_text_features(llm_embeds=llm_embeds, truncate_dim=dim),
        ):
            torch.testing.assert_close(features.pooler_output, whole.text_model_output.pooler_output[:, :dim])
        images = model.get_image_features(inputs["pixel_values"], truncate_dim=dim)
        torch.testing.assert_close(images.pooler_output, whole.vision_model_output.pooler_output[:, :dim])
        shorter = model(**inputs, truncate_dim=dim)
        for name in ("text_embeds", "image_embeds"):
            torch.testing.assert_close(shorter[name], F.normalize(whole[name][:, :dim], dim=-1))
        expected = model.logit_scale.exp() * shorter.image_embeds @ shorter.text_embeds.T
        torch.testing.assert_close(shorter.logits_per_image, expected)
    for dim in (0, -1, model.config.projection_dim + 1):
        with pytest.raises(ValueError, match=f"truncate_dim={dim}, but this model's embeddings have 16 dimensions"):
            model(**inputs, truncate_dim=dim)


@torch.no_grad()
def test_tuples_and_outputs_of_the_towers(inputs):
    model = tiny.model()
    outputs = model(**inputs, output_hidden_states=True)
    assert len(outputs.text_model_output.hidden_states) == len(outputs.vision_model_output.hidden_states) == 3
    assert model(**inputs).text_model_output.hidden_states is None
    as_tuple = model(**inputs, return_loss=True, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[1], outputs.logits_per_image)
    assert isinstance(model.get_image_features(inputs["pixel_values"], return_dict=False), tuple)
    assert isinstance(model.get_text_features(inputs["input_ids"], return_dict=False), tuple)
    model.config.return_dict = False
    assert torch.equal(model(**inputs)[0], outputs.logits_per_image)


@torch.no_grad()
def test_pictures_of_another_size():
    model = tiny.model()
    larger = torch.randn(1, 3, 24, 24)
    outputs = model(pixel_values=larger, interpolate_pos_encoding=True)
    assert outputs.image_embeds.shape == (1, 16)
    with pytest.raises(ValueError, match="size"):
        model(pixel_values=larger)


def test_inputs_that_cannot_be(inputs):
    model = tiny.model()
    with pytest.raises(ValueError, match="Give pixel_values, or input_ids or llm_embeds"):
        model()
    with pytest.raises(ValueError, match="either input_ids or llm_embeds"):
        model(input_ids=inputs["input_ids"], llm_embeds=torch.randn(3, 32))
    # What LLM2CLIP's cards write, where embeddings of the LLM come first.
    for call in (model.get_text_features, model.get_llm_embeds):
        with pytest.raises(ValueError, match="input_ids must be whole numbers, got torch.float32.*llm_embeds="):
            call(torch.randn(3, 32))
    for embeds, shape in (
        (torch.randn(3, 4096), r"\(3, 4096\)"),
        (torch.randn(32), r"\(32,\)"),
        (torch.randn(1, 3, 32), r"\(1, 3, 32\)"),
    ):
        for call in (model.get_text_features, model):
            with pytest.raises(ValueError, match=rf"llm_embeds must be of shape \(batch_size, 32\), got {shape}"):
                call(llm_embeds=embeds)
    for pair in ({"input_ids": inputs["input_ids"]}, {**inputs, "pixel_values": inputs["pixel_values"][:2]}):
        with pytest.raises(ValueError, match="as many texts as images"):
            model(**pair, return_loss=True)


@torch.no_grad()
def test_half_precision_scores_are_float32(inputs):
    """Scores are scaled by up to 100: bfloat16 embeddings would be off by 0.4 in a logit."""
    model = tiny.model().to(torch.bfloat16)
    outputs = model(**inputs)
    assert outputs.logits_per_image.dtype == outputs.text_embeds.dtype == torch.float32
    torch.testing.assert_close(outputs.image_embeds.norm(dim=-1), torch.ones(3))


# Training


def gradients(model: ProCLIPModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    model(**inputs, return_loss=True).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_gradient_checkpointing_gives_the_same_gradients(inputs):
    model = tiny.model()
    expected = gradients(model, inputs)
    assert set(expected) == {name for name, _ in model.named_parameters()}
    model.gradient_checkpointing_enable()
    assert model.vision_model.encoder.gradient_checkpointing and model.text_model.gradient_checkpointing
    actual = gradients(model, inputs)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, msg=lambda message, name=name: f"{name}: {message}")


def test_stored_embeddings_train_without_the_llm(inputs):
    model = tiny.model(lean=True)
    assert model.text_model is None
    loss = model(llm_embeds=torch.randn(3, 32), pixel_values=inputs["pixel_values"], return_loss=True).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_peft_adapters_on_the_llm(inputs, folder):
    base = AutoModel.from_pretrained(folder)
    lora = LoraConfig(r=4, target_modules=r"text_model\..*\.(q_proj|v_proj)", modules_to_save=["text_adapter"])
    model = get_peft_model(base, lora)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(**inputs, return_loss=True).loss.backward()
        optimizer.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("text_model" in name and "lora_" in name or "text_adapter" in name for name in changed)
    assert sum("lora_" in name for name in changed) == 2 * 2 * 2, "A and B, two projections, two layers"

    model.save_pretrained(folder / "peft")
    model.eval()
    again = PeftModel.from_pretrained(AutoModel.from_pretrained(folder), folder / "peft").eval()
    tiny.assert_same_embeddings(model, again)
    merged = model.merge_and_unload()
    tiny.assert_same_embeddings(again, merged, tolerance=1e-5)
    merged.save_pretrained(folder / "merged")
    tiny.assert_same_embeddings(merged, AutoModel.from_pretrained(folder / "merged"))


@torch.no_grad()
def test_compiles_in_one_graph(inputs):
    """Inductor compiles for a minute on a CPU, so the test stops before it: the graph is what our code decides."""
    model = tiny.model()
    text_inputs = {name: inputs[name] for name in tiny.TEXT_INPUTS}
    compiled = torch.compile(model.get_text_features, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(**text_inputs).pooler_output, model.get_text_features(**text_inputs).pooler_output
    )
    compiled = torch.compile(model.get_image_features, fullgraph=True, backend="aot_eager")
    expected = model.get_image_features(inputs["pixel_values"]).pooler_output
    torch.testing.assert_close(compiled(inputs["pixel_values"]).pooler_output, expected)


def test_copies():
    model = tiny.model()
    tiny.assert_same_embeddings(model, copy.deepcopy(model))
    tiny.assert_same_embeddings(model, pickle.loads(pickle.dumps(model)))


def test_resized_token_embeddings():
    model = tiny.model()
    model.resize_token_embeddings(430)
    assert model.get_input_embeddings() is model.text_model.embed_tokens
    assert model.config.text_config.vocab_size == len(model.text_model.embed_tokens.weight) == 430
    tiny.assert_same_embeddings(tiny.model(), model)


def test_layers_to_keep_on_one_device():
    assert {"LlamaDecoderLayer", "CLIPEncoderLayer", "TextAdapterBlock"} <= set(tiny.model()._no_split_modules)


# SigLIP's logit bias


@torch.no_grad()
def test_logit_bias(inputs, tmp_path):
    without, model = tiny.model(), tiny.model(logit_bias_init_value=-10.0)
    assert without.logit_bias is None and not [key for key in without.state_dict() if "bias" in key and "logit" in key]
    expected = without(**inputs).logits_per_image - 10
    assert torch.equal(model(**inputs).logits_per_image, expected)
    assert torch.equal(model(**inputs).logits_per_text, expected.T)

    model.logit_bias.fill_(-3.25)
    model.save_pretrained(tmp_path)
    loaded = ProCLIPModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.logit_bias.item() == -3.25 and loaded.logit_bias.dtype == torch.float32


def test_a_checkpoint_without_a_logit_bias_may_get_one(folder):
    plain = ProCLIPModel.from_pretrained(folder)
    assert plain.logit_bias is None
    tiny.assert_same_embeddings(tiny.model(), plain)
    model = ProCLIPModel.from_pretrained(folder, logit_bias_init_value=-10.0)
    assert model.logit_bias.item() == -10
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
