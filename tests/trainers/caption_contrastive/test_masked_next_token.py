"""Masked next-token prediction against the reference's record, and its trainer."""

import math

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig

from modeling_proclip import convert
from tests.golden import load
from tests.modeling_proclip import tiny
from tests.trainers import tiny_llm
from trainers import MaskedNextTokenConfig, MaskedNextTokenTrainer
from trainers.caption_contrastive.masked_next_token import MaskedTexts, mask_tokens, masked_next_token_loss


@pytest.mark.parametrize(("masking", "case"), [("all", "all_mask"), ("bert", "default")])
def test_reference_case(masking, case):
    golden = load("g6_mntp_llama")
    input_ids, labels = mask_tokens(
        golden.inputs["input_ids_original"],
        golden.inputs["special_tokens_mask"],
        mask_token_id=golden.config["mask_token_id"],
        vocab_size=golden.config["hf_config"]["vocab_size"],
        probability=golden.config["mlm_probability"],
        masking=masking,
        generator=torch.Generator().manual_seed(golden.config["torch_manual_seed"]),
    )
    assert torch.equal(input_ids, golden.inputs[f"{case}.input_ids"])
    assert torch.equal(labels, golden.inputs[f"{case}.labels"])

    values = {key: value for key, value in golden.config["hf_config"].items() if key != "transformers_version"}
    config = LlamaConfig(**values)
    config.is_causal = False
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.load_state_dict(golden.params)
    logits = model(input_ids=input_ids, attention_mask=golden.inputs[f"{case}.attention_mask"]).logits
    golden.assert_close(f"out.{case}.logits", logits)
    loss = masked_next_token_loss(logits, labels)
    golden.assert_close(f"out.{case}.loss", loss)
    loss.backward()
    parameters = dict(model.named_parameters())
    checked = [name.removeprefix(f"{case}.param.") for name in golden.grads if name.startswith(case)]
    assert len(checked) == 4
    for name in checked:
        golden.assert_close(f"grad.{case}.param.{name}", parameters[name].grad)


def test_loss_by_hand():
    logits = torch.zeros(1, 3, 4)
    logits[0, 1, 2] = math.log(3.0)  # the state before the last position: token 2 has 3 of 6 parts
    labels = torch.tensor([[1, -100, 2]])  # the first has no state before it
    assert math.isclose(masked_next_token_loss(logits, labels).item(), math.log(2), rel_tol=1e-6)
    assert masked_next_token_loss(logits, torch.full((1, 3), -100)).item() == 0


def test_shares():
    ids = torch.arange(100).repeat(400, 1) + 100
    special = torch.zeros_like(ids)
    special[:, 0] = 1
    generator = torch.Generator().manual_seed(0)
    masked, labels = mask_tokens(ids, special, mask_token_id=7, vocab_size=50, generator=generator)
    chosen = labels != -100
    assert not chosen[:, 0].any() and torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(masked[~chosen], ids[~chosen])
    assert chosen[:, 1:].float().mean().item() == pytest.approx(0.2, abs=0.01)
    assert (masked[chosen] == 7).float().mean().item() == pytest.approx(0.8 + 0.1 / 50, abs=0.015)
    assert (masked[chosen] == ids[chosen]).float().mean().item() == pytest.approx(0.1, abs=0.01)


def arguments(folder, **settings):
    settings = {"learning_rate": 2e-2, "num_train_epochs": 4, "lora_r": 4, "mask_probability": 0.4, **settings}
    settings = {key: value for key, value in tiny_llm.SETTINGS.items() if key != "warmup_steps"} | settings
    return MaskedNextTokenConfig(str(folder), **settings)


def test_training_resumes_to_the_same_bits_and_its_adapter_is_of_the_base_model(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 6, "lora_num_layers": 2, "lora_dropout": 0.2}

    def trainer(**more):
        args = arguments(tmp_path / "run", **settings)
        model = tiny_llm.causal_llm()
        return MaskedNextTokenTrainer(model, args, tiny_llm.ROWS, processing_class=tiny.tokenizer(), **more)

    before = tiny_llm.causal_llm().state_dict()
    first = trainer(eval_dataset=tiny_llm.ROWS[:6])
    start = first.evaluate()["eval_loss"]
    first.train()
    assert first.evaluate()["eval_loss"] < start - 0.1
    state = {name.replace(".base_layer", ""): tensor for name, tensor in first.model.state_dict().items()}
    assert all(torch.equal(state[name], before[name]) for name in before)
    expected = {name: p.clone() for name, p in first.model.named_parameters() if "lora_" in name}
    assert len(expected) == 2 * 2 * 7 and all(p.abs().max() > 0 for p in expected.values())

    second = trainer()
    second.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
    actual = dict(second.model.named_parameters())
    assert all(torch.equal(actual[name], expected[name]) for name in expected)

    first.save_model(str(tmp_path / "adapter"))
    tiny_llm.llm().save_pretrained(tmp_path / "llm")  # the same seed: the base model of the causal LM
    base = {name.removeprefix("model."): tensor for name, tensor in before.items()}
    model = AutoModel.from_pretrained(tmp_path / "llm")
    model.load_state_dict({name: tensor for name, tensor in base.items() if name != "lm_head.weight"})
    model.save_pretrained(tmp_path / "llm")
    convert(tmp_path / "llm", tmp_path / "tuned", lora_adapters=[tmp_path / "adapter"])
    merged, converted = first.merge().state_dict(), AutoModel.from_pretrained(tmp_path / "tuned").state_dict()
    assert merged.keys() == converted.keys()
    for name in merged:
        torch.testing.assert_close(converted[name], merged[name], atol=1e-6, rtol=0)


def test_what_is_masked_follows_from_seed_epoch_and_row(tmp_path):
    texts = MaskedTexts(tiny_llm.ROWS, tiny.tokenizer(), arguments(tmp_path))
    first = texts[3]
    torch.rand(5)
    assert all(torch.equal(first[name], value) for name, value in texts[3].items())
    texts.rows.set_epoch(1)
    assert any(
        not torch.equal(
            texts[i]["labels"], MaskedTexts(tiny_llm.ROWS, tiny.tokenizer(), arguments(tmp_path))[i]["labels"]
        )
        for i in range(4)
    )
    batch = texts.collate([texts[i] for i in range(4)])
    assert batch["labels"].shape == batch["input_ids"].shape
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def test_refusals(tmp_path):
    for settings, message in (({"mask_probability": 0.0}, "mask_probability"), ({"masking": "most"}, "masking")):
        with pytest.raises(ValueError, match=message):
            arguments(tmp_path, **settings)
    with pytest.raises(ValueError, match="no language-modelling head"):
        MaskedNextTokenTrainer(tiny_llm.llm(), arguments(tmp_path), tiny_llm.ROWS, processing_class=tiny.tokenizer())
