"""The LLM side against LLM2Vec as ProCLIP and LLM2CLIP ship it: states, poolings, gradients, tokens, adapters (cases g5_*)."""

from functools import cache

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModel, LlamaModel

from modeling_proclip import ProCLIPModel
from modeling_proclip.attention_proof import check_bidirectional
from modeling_proclip.pooling import pool_tokens
from tests import golden
from tests.modeling_proclip import tiny


POOLINGS = ["mean", "weighted_mean", "eos_token", "last_token", "bos_token"]
PIPELINES = ["llm2clip_repo", "pypi_0_2_3"]


def proclip_with_the_text_model_of(reference: golden.Golden, attention: str, pooling: str = "mean") -> ProCLIPModel:
    text_config = AutoConfig.for_model(**reference.config["hf_config"])
    config = tiny.config(text_config=text_config, text_pooling=pooling)
    config._attn_implementation = attention
    model = ProCLIPModel(config).eval()
    model.text_model.load_state_dict(reference.params)
    check_bidirectional(model.text_model)
    return model


def assert_close_at_tokens(reference: golden.Golden, name: str, states: torch.Tensor) -> None:
    """What the reference has at padding is defined but meaningless, so it is copied over ours before comparing."""
    tokens = reference.inputs["attention_mask"].bool()
    expected = reference.outputs[name.removeprefix("out.")]
    reference.assert_close(name, torch.where(tokens[..., None], states, expected))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "llama31_rope", "mistral", "gemma", "phi3", "qwen2"])
def test_hidden_states_and_every_pooling(family, attention):
    reference = golden.load(f"g5_{family}")
    model = proclip_with_the_text_model_of(reference, attention)
    ids, mask, embed_mask = (reference.inputs[name] for name in ("input_ids", "attention_mask", "embed_mask"))
    with torch.no_grad():
        outputs = model.get_text_features(ids, mask, output_hidden_states=True)
    for i, states in enumerate(outputs.hidden_states):
        assert_close_at_tokens(reference, f"out.hidden_states.{i}", states)
    assert_close_at_tokens(reference, "out.last_hidden_state", outputs.last_hidden_state)

    for pooling in POOLINGS:
        model.config.text_pooling = pooling
        with torch.no_grad():
            skipping = model.get_llm_embeds(ids, mask, token_type_ids=embed_mask)
            whole = model.get_llm_embeds(ids, mask)
        reference.assert_close(f"out.pooled.{pooling}.skip_instruction_true", skipping)
        reference.assert_close(f"out.pooled.{pooling}.skip_instruction_false", whole)
    unchecked = {name for name in reference.unchecked() if name.startswith("out.") and "causal_as_run" not in name}
    assert unchecked == set()


def test_gradients():
    reference = golden.load("g5_llama")
    model = proclip_with_the_text_model_of(reference, "eager")
    inputs = reference.inputs
    embeds = model.get_llm_embeds(inputs["input_ids"], inputs["attention_mask"], inputs["embed_mask"])
    (embeds * inputs["cotangent"]).sum().backward()
    for name, parameter in model.text_model.named_parameters():
        reference.assert_close(f"grad.mean_skip.param.{name}", parameter.grad)
    assert {name for name in reference.unchecked() if name.startswith("grad.")} == set()


def test_qwen2_differs_from_the_reference_as_run():
    """Deviation: the reference's Qwen2BiModel stays causal in eager and sdpa attention (its mask is inherited). We are
    bidirectional; the states it recorded as run come out of the same weights with `is_causal = True`."""
    reference = golden.load("g5_qwen2")
    model = proclip_with_the_text_model_of(reference, "eager")
    ids, mask = reference.inputs["input_ids"], reference.inputs["attention_mask"]
    recorded = reference.outputs["causal_as_run.last_hidden_state"]
    with torch.no_grad():
        ours = model.text_model(ids, attention_mask=mask).last_hidden_state
        model.text_model.config.is_causal = True
        causal = model.text_model(ids, attention_mask=mask).last_hidden_state
    assert_close_at_tokens(reference, "out.causal_as_run.last_hidden_state", causal)
    several_tokens = mask.sum(dim=1) > 1
    first_token = mask.argmax(dim=1)
    moved = (ours - recorded)[torch.arange(len(ids)), first_token].abs().amax(dim=-1)
    assert moved[several_tokens].min() > 0.1
    assert moved[~several_tokens].max() < 1e-5, "one token alone sees the same in both"


def test_rows_with_nothing_to_pool():
    """Deviation: where no token is marked for pooling (an empty caption), the reference's mean takes the whole row,
    padding included, and its weighted mean is a zero vector. Ours take all real tokens of the row."""
    reference = golden.load("g5_empty_text_pooling")
    model = proclip_with_the_text_model_of(reference, "eager")
    ids, mask, embed_mask = (reference.inputs[name] for name in ("input_ids", "attention_mask", "embed_mask"))
    with torch.no_grad():
        states = model.text_model(ids, attention_mask=mask).last_hidden_state
    assert_close_at_tokens(reference, "out.last_hidden_state", states)
    reference_states = reference.outputs["last_hidden_state"]

    marked, unpadded, padded = 0, 1, 2
    assert embed_mask.any(dim=1).tolist() == [True, False, False]
    assert mask.sum(dim=1).tolist() == [4, 6, 3]

    mean = pool_tokens(states, mask, embed_mask, "mean")
    recorded = reference.outputs["pooled.mean.skip_instruction_true"]
    torch.testing.assert_close(mean[[marked, unpadded]], recorded[[marked, unpadded]], atol=3e-5, rtol=1e-5)
    torch.testing.assert_close(recorded[padded], reference_states[padded].mean(dim=0))
    torch.testing.assert_close(mean[padded], reference_states[padded, 3:].mean(dim=0), atol=3e-5, rtol=1e-5)
    assert (mean[padded] - recorded[padded]).abs().max() > 0.1

    weighted = pool_tokens(states, mask, embed_mask, "weighted_mean")
    recorded = reference.outputs["pooled.weighted_mean.skip_instruction_true"]
    torch.testing.assert_close(weighted[marked], recorded[marked], atol=3e-5, rtol=1e-5)
    assert not recorded[[unpadded, padded]].any()
    weights = torch.tensor([1, 2, 3]) / 6
    torch.testing.assert_close(weighted[padded], weights @ reference_states[padded, 3:], atol=3e-5, rtol=1e-5)

    reference.assert_close(
        "out.pooled.last_token.skip_instruction_true", pool_tokens(states, mask, None, "last_token")
    )


def test_merged_lora_adapters():
    """LLM2CLIP's chain of PEFT adapters, each merged before the next, gives the reference's weights and embeddings."""
    reference = golden.load("g5_lora_merge")
    config = AutoConfig.from_pretrained(tiny.LLAMA_DIR)
    config.is_causal = False
    text_model = AutoModel.from_pretrained(tiny.LLAMA_DIR, config=config)
    for adapter in reference.config["adapters"]:
        text_model = PeftModel.from_pretrained(text_model, golden.GOLDEN_DIR / adapter).merge_and_unload()
    model = ProCLIPModel.from_vision_text_pretrained(tiny.clip(), text_model)

    ids, mask, embed_mask = (reference.inputs[name] for name in ("input_ids", "attention_mask", "embed_mask"))
    with torch.no_grad():
        outputs = model.get_text_features(ids, mask)
        embeds = model.get_llm_embeds(ids, mask, embed_mask)
    assert_close_at_tokens(reference, "out.last_hidden_state", outputs.last_hidden_state)
    reference.assert_close("out.embeddings_mean", embeds)
    state = model.text_model.state_dict()
    for name in [name for name in reference.outputs if name.startswith("merged.")]:
        reference.assert_close(f"out.{name}", state[name.removeprefix("merged.")])
    assert reference.unchecked() == set()


@cache
def pipeline_model() -> ProCLIPModel:
    return ProCLIPModel.from_vision_text_pretrained(tiny.clip(), LlamaModel.from_pretrained(tiny.LLAMA_DIR))


def pipeline_case(which: str, mode: str) -> tuple[golden.Golden, list[str], str | None, tuple[torch.Tensor, ...]]:
    reference = golden.load(f"g5_text_pipeline.{which}")
    record = reference.record["texts"][mode]
    tensors = tuple(reference.inputs[f"{mode}.{name}"] for name in ("input_ids", "attention_mask", "embed_mask"))
    return reference, record["texts"], record["instruction"], tensors


@pytest.mark.parametrize("mode", ["no_instruction", "instruction"])
@pytest.mark.parametrize("which", PIPELINES)
def test_pipeline_embeddings_of_the_reference_tokens(which, mode):
    reference, _, _, (ids, mask, embed_mask) = pipeline_case(which, mode)
    model = pipeline_model()
    with torch.no_grad():
        states = model.get_text_features(ids, mask).last_hidden_state
    name = f"{mode}.last_hidden_state"
    expected = reference.outputs[name]
    reference.assert_close(f"out.{name}", torch.where(mask.bool()[..., None], states, expected))
    reference.assert_close(f"out.{mode}.embeddings", pool_tokens(states, mask, embed_mask, "mean"))
    reference.assert_close(f"out.{mode}.embeddings.mean.skip_false", pool_tokens(states, mask, None, "mean"))
    weighted = pool_tokens(states, mask, embed_mask, "weighted_mean")
    reference.assert_close(f"out.{mode}.embeddings.weighted_mean.skip_true", weighted)
    last = pool_tokens(states, mask, embed_mask, "eos_token")
    reference.assert_close(f"out.{mode}.embeddings.eos_token.skip_true", last)
    assert {name for name in reference.unchecked() if name.startswith(f"out.{mode}.")} == set()


@pytest.mark.parametrize("which", PIPELINES)
def test_pipeline_tokens(which):
    """Ids and both masks equal the reference's where it did not truncate. Deviation on the long text: the reference cuts
    the end of turn off and, counting from the right, pools the header and BOS too; ours shortens the content only."""
    reference, texts, _, (ids, mask, embed_mask) = pipeline_case(which, "no_instruction")
    batch = tiny.processor(prompt_template=tiny.LLAMA3, max_length=40)(text=texts, return_tensors="pt")
    long = 3
    others = [0, 1, 2, 4]
    assert torch.equal(batch["input_ids"][others], ids[others])
    assert torch.equal(batch["attention_mask"][others], mask[others])
    assert torch.equal(batch["token_type_ids"][others], embed_mask[others])

    eot = 4
    assert ids[long, -1] != eot and embed_mask[long].all()
    assert torch.equal(batch["input_ids"][long, :-1], ids[long, :-1]), "the same content, one token less of it"
    assert batch["input_ids"][long, -1] == eot
    header = 6  # BOS and <|start_header_id|>user<|end_header_id|>\n\n
    assert batch["token_type_ids"][long].tolist() == [0] * header + [1] * (40 - header)

    model = pipeline_model()
    with torch.no_grad():
        embeds = model.get_llm_embeds(**batch)
    torch.testing.assert_close(
        embeds[others], reference.outputs["no_instruction.embeddings"][others], atol=3e-5, rtol=1e-5
    )


@pytest.mark.parametrize("which", PIPELINES)
def test_pipeline_tokens_with_instruction(which):
    """Ids equal the reference's; with room for the long text its 40 tokens are the first 40 of ours. Deviations: ours
    keeps the end of turn when it truncates; and where the space between instruction and text is a token of its own, the
    reference, which counts the tokens of the text alone, leaves it out of the mean, while ours pools it as content."""
    _, texts, instruction, (ids, mask, embed_mask) = pipeline_case(which, "instruction")
    processor = tiny.processor(prompt_template=tiny.LLAMA3, instruction=instruction, max_length=40)
    batch = processor(text=texts, return_tensors="pt")
    long = 3
    others = [0, 1, 2, 4]
    assert torch.equal(batch["input_ids"][others], ids[others])
    assert torch.equal(batch["attention_mask"][others], mask[others])
    space_alone = torch.tensor([False, True, True, False])
    extra = batch["token_type_ids"][others].sum(dim=1) - embed_mask[others].sum(dim=1)
    assert torch.equal(extra, space_alone.long())
    assert torch.equal(batch["token_type_ids"][others][~space_alone], embed_mask[others][~space_alone])

    assert batch["input_ids"][long, -1] == 4 and ids[long, -1] != 4
    roomy = tiny.processor(prompt_template=tiny.LLAMA3, instruction=instruction)(text=texts[long])
    assert roomy["input_ids"][:40] == ids[long].tolist()
    assert len(roomy["input_ids"]) > 40 and roomy["input_ids"][-1] == 4


@pytest.mark.parametrize("which", PIPELINES)
def test_document_length(which):
    """Deviation: beside truncation the reference shortens a text by whole words until it fits `doc_max_length`; a long
    text without spaces (Chinese, one long word) becomes the empty string. Ours has one limit, cuts between tokens, and
    keeps content of every text."""
    record = golden.load(f"g5_doc_max_length.{which}").record
    texts = record["texts"]
    tokenizer = tiny.tokenizer()
    counts = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    assert counts == record["token_counts"]
    emptied = [text for text in record["converted_no_instruction"] if text == "!@#$%^&*()"]
    assert len(emptied) == (2 if which == "pypi_0_2_3" else 0)

    template = 7  # BOS, header and end of turn
    limit = template + record["doc_max_length_arg"]
    processor = tiny.processor(prompt_template=tiny.LLAMA3, max_length=limit)
    for text in texts:
        tokens = processor(text=text)
        content = len(tokenizer(text.rstrip(), add_special_tokens=False)["input_ids"])
        assert len(tokens["input_ids"]) == template + min(content, record["doc_max_length_arg"])
        assert sum(tokens["token_type_ids"]) > 1, "content beside the end of turn"
        assert tokens["input_ids"][-1] == 4
