"""Stage 0: what is trained, what is computed, what is saved, and that a killed run goes on to the same bits."""

import math
import os
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from transformers import AutoModel, TrainerCallback

from modeling_proclip import ProCLIPModel, convert
from modeling_proclip.pooling import pool_tokens
from tests.modeling_proclip import tiny
from tests.trainers import tiny_llm
from tests.trainers.base.test_distributed import run_on_ranks
from trainers import CaptionContrastiveConfig
from trainers.caption_contrastive.batches import pair_keys
from trainers.caption_contrastive.losses import caption_contrastive_loss
from trainers.evaluation import caption_retrieval


def losses(trainer) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def lora(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_" in name}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 8 steps on a ProCLIPModel, with what it had before."""
    folder = tmp_path_factory.mktemp("trained")
    model = ProCLIPModel.from_vision_text_pretrained(tiny.clip(), tiny_llm.llm())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = tiny_llm.trainer(
        folder, model, processing_class=tiny.processor(max_length=64), max_steps=8, lora_num_layers=2
    )
    fresh = lora(trainer)
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    return folder, trainer, model, before, fresh


def test_all_of_the_lora_moves_and_nothing_else(trained):
    _, trainer, model, before, fresh = trained
    after = lora(trainer)
    assert fresh.keys() == after.keys() and len(after) == 2 * 2 * 7
    assert {int(name.split("layers.")[1].split(".")[0]) for name in after} == {1, 2}
    assert all(not torch.equal(fresh[name], after[name]) for name in after)
    frozen = {name.replace(".base_layer", ""): t for name, t in model.state_dict().items() if "lora_" not in name}
    assert frozen.keys() == before.keys()
    assert all(torch.equal(frozen[name], before[name]) for name in before)
    assert losses(trainer)[-1] < losses(trainer)[0]


@pytest.mark.parametrize("settings", [{}, {"gradient_caching_batch_size": 4}, {"micro_batch_tokens": 60}])
def test_packed_batches_train_the_same(tmp_path, settings):
    """As on a GPU: the same losses, the same LoRA and the same evaluation as of padded batches."""
    # Adam's first step takes the gradient's signs, where rounding may decide.
    settings = {**settings, "optim": "sgd", "lora_dropout": 0.0}
    runs = []
    for packed in (False, True):
        rows = tiny_llm.ROWS
        trainer = tiny_llm.trainer(tmp_path / str(packed), rows=rows, eval_dataset=rows[:8], max_steps=3, **settings)
        trainer.data_collator.packed = packed
        trainer.train()
        runs.append(
            (
                losses(trainer),
                lora(trainer),
                trainer.evaluate()["eval_loss"],
                trainer.text_model.config._attn_implementation,
            )
        )
    (padded_losses, padded_lora, padded_eval, attention), (packed_losses, packed_lora, packed_eval, _) = runs
    assert packed_losses == pytest.approx(padded_losses, abs=1e-5) and attention == "eager"
    assert packed_eval == pytest.approx(padded_eval, abs=1e-5)
    for name, value in padded_lora.items():
        torch.testing.assert_close(packed_lora[name], value, atol=1e-6, rtol=0)


def test_batches_are_padded_where_activations_are_computed_again(tmp_path):
    """In the backward pass, where the texts' bounds are not known."""
    trainer = tiny_llm.trainer(tmp_path, max_steps=1, gradient_checkpointing=True)
    trainer.train()
    assert not trainer.data_collator.packed
    trainer.data_collator.packed = True
    with pytest.raises(ValueError, match="packed texts are not trained with gradient checkpointing"):
        trainer.train()


def test_the_adapter_loads_by_peft_and_by_convert_and_as_merged(trained, tmp_path):
    folder, trainer, model, _, _ = trained
    texts = [caption for row in tiny_llm.ROWS[:4] for caption in row["text"]]
    expected = trainer.embed_texts(texts)
    inputs = tiny.processor(max_length=64)(text=texts, return_tensors="pt")

    def embeds(llm) -> torch.Tensor:
        llm.config.is_causal = False
        llm.eval()
        with torch.no_grad():
            states = llm(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
        return pool_tokens(states, inputs["attention_mask"], inputs["token_type_ids"])

    plain = tiny_llm.llm()
    assert not torch.allclose(embeds(plain), expected, atol=1e-3)
    torch.testing.assert_close(
        embeds(PeftModel.from_pretrained(plain, folder / "adapter")), expected, atol=1e-5, rtol=0
    )

    tiny_llm.llm().save_pretrained(tmp_path / "llm")
    convert(tmp_path / "llm", tmp_path / "tuned", lora_adapters=[folder / "adapter"])
    torch.testing.assert_close(embeds(AutoModel.from_pretrained(tmp_path / "tuned")), expected, atol=1e-5, rtol=0)

    merged = trainer.merge()
    assert merged is model.text_model and not [name for name, _ in merged.named_parameters() if "lora" in name]
    merged.save_pretrained(tmp_path / "merged")
    pair = ProCLIPModel.from_vision_text_pretrained(tiny.clip(), tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(pair.get_llm_embeds(**inputs), expected, atol=1e-5, rtol=0)


def naive_loss(trainer, pairs) -> torch.Tensor:
    """Every text by itself through the whole LLM."""
    names = [(pair["query"], pair["instruction"]) for pair in pairs]
    names += [(text, None) for pair in pairs for text in [pair["document"]]]
    names += [(text, None) for pair in pairs for text in pair["negatives"]]
    embeds = []
    for row in trainer.tokenizer(names):
        ids, mask, types = (torch.tensor([row[k]]) for k in ("input_ids", "attention_mask", "token_type_ids"))
        states = trainer.model(input_ids=ids, attention_mask=mask).last_hidden_state
        embeds.append(pool_tokens(states, mask, types)[0])
    n = len(pairs)
    queries, documents, negatives = torch.stack(embeds).split([n, n, len(embeds) - 2 * n])
    return caption_contrastive_loss(queries, documents, negatives, scale=50.0, **pair_keys(pairs))


WAYS = {
    "plain": {},
    "micro-batches": {"micro_batch_tokens": 40},
    "gradient caching": {"gradient_caching_batch_size": 3},
    "all at once": {
        "gradient_caching_batch_size": 5,
        "micro_batch_tokens": 50,
        "lora_num_layers": 2,
        "cache_frozen_layers": True,
    },
}
HARD = [{**row, "negative": [other["text"][0]]} for row, other in zip(tiny_llm.ROWS, tiny_llm.ROWS[1:], strict=False)]


@pytest.mark.parametrize("way", list(WAYS))
def test_every_way_of_computing_gives_the_naive_loss_and_gradient(tmp_path, way):
    trainer = tiny_llm.trainer(tmp_path, rows=HARD + HARD[:4], lora_dropout=0.0, **WAYS[way])
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:  # zero at first, and so would be the gradients of A
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    # Of rows 0 and 23 one picture comes twice in the batch.
    pairs = [trainer.pairs[i] for i in (0, 3, 23, 8, 9)]
    trainer._compute_frozen(list(trainer.pairs.texts()))
    trainer.model.eval()
    expected = naive_loss(trainer, pairs)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    loss = trainer.training_step(trainer.model, trainer.data_collator(pairs))
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    assert set(gradients) == set(lora(trainer))
    for name, parameter in trainer.model.named_parameters():
        if name in gradients:
            assert (parameter.grad - gradients[name]).norm() < 1e-4 * gradients[name].norm(), name
    assert max(g.abs().max() for g in gradients.values()) > 1e-2


def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    uninterrupted = tiny_llm.trainer(tmp_path / "whole", **tiny_llm.KILLED)
    uninterrupted.train()
    command = [sys.executable, "-m", "tests.trainers.tiny_llm", str(tmp_path / "killed")]
    assert subprocess.run(command, capture_output=True).returncode == -9
    # One that was being written when the power went.
    (tmp_path / "killed" / "checkpoint-10").mkdir()
    resumed = tiny_llm.trainer(tmp_path / "killed", **tiny_llm.KILLED)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == uninterrupted.state.global_step == 12
    assert losses(resumed) == losses(uninterrupted)
    expected, actual = lora(uninterrupted), lora(resumed)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_evaluation_is_caption_retrieval_over_the_whole_set(tmp_path):
    rows = {"ten": tiny_llm.ROWS[:10], "five": tiny_llm.ROWS[:5]}
    trainer = tiny_llm.trainer(tmp_path, eval_dataset=rows, eval_strategy="steps", eval_steps=2, max_steps=2)
    trainer.train()
    first, second = (trainer.embed_texts([row["text"][i] for row in rows["ten"]]) for i in (0, 1))
    logs = {key: value for log in trainer.state.log_history for key, value in log.items()}
    assert logs["eval_ten_caption_r@1"] == caption_retrieval(first, second)["caption_r@1"]
    units = [torch.nn.functional.normalize(e, dim=1) for e in (first, second)]
    cosines = units[0] @ units[1].T
    rank = [(cosines.argmax(dim) == torch.arange(10)).float().mean().item() for dim in (0, 1)]
    assert math.isclose(logs["eval_ten_caption_r@1"], sum(rank) / 2, abs_tol=1e-6)
    blocks = [caption_contrastive_loss(first[:6], second[:6]), caption_contrastive_loss(first[6:], second[6:])]
    assert math.isclose(logs["eval_ten_loss"], (6 * blocks[0] + 4 * blocks[1]).item() / 10, rel_tol=1e-5)
    assert "eval_five_caption_r@1" in logs


def test_captions_without_a_word_in_common_learn_to_find_each_other(tmp_path):
    words = dict(
        zip(tiny_llm.WORDS, ("quit vuma zeri polo kado hest wimp juny lorb fenk tasi gyro").split(), strict=True)
    )
    rows = [{"text": [f"{a} {b}", f"{words[b]} {words[a]}"]} for a in tiny_llm.WORDS[:6] for b in tiny_llm.WORDS[6:10]]
    settings = {"num_train_epochs": 30, "learning_rate": 5e-3, "lora_r": 8, "per_device_train_batch_size": 24}
    trainer = tiny_llm.trainer(tmp_path, rows=rows, eval_dataset=rows, eval_on_start=True, **settings)
    trainer.train()
    before, after = trainer.state.log_history[0], trainer.evaluate()
    assert before["eval_caption_r@1"] < 0.3 < 0.6 < after["eval_caption_r@1"]


def test_plain_text_is_mixed_in_at_its_share(tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(state.global_step)

    trainer = tiny_llm.trainer(tmp_path, plain_text_dataset=tiny_llm.PLAIN, plain_text_share=0.5)
    trainer.add_callback(Watch())
    trainer.train()
    assert len(seen) == 4 + 4


def test_rows_are_read_when_they_are_needed(tmp_path):
    read = set()

    class Rows(list):
        def __getitem__(self, index):
            read.add(index)
            return super().__getitem__(index)

    tiny_llm.trainer(tmp_path / "a", rows=Rows(tiny_llm.ROWS), max_steps=1).train()
    assert len(read) <= 2 * 6, "two batches: that of the step, and the one that waits"
    layers = {"lora_num_layers": 2, "cache_frozen_layers": True}
    tiny_llm.trainer(tmp_path / "b", rows=Rows(tiny_llm.ROWS), max_steps=1, **layers).train()
    assert len(read) == 24, "whose states are computed once"


def test_a_merged_weight_that_overflows_is_refused(tmp_path):
    trainer = tiny_llm.trainer(tmp_path, model=tiny_llm.llm().half())
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_" in name:
                parameter.fill_(1e3)
    with pytest.raises(ValueError, match="the merged LLM: layers.0.self_attn.q_proj.weight holds NaN or infinity"):
        trainer.merge()


def on_rank(rank: int, world_size: int) -> dict:
    # As `accelerate launch` tells it; the process group exists already, so the address is not used.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    trainer = tiny_llm.trainer("unused", **rank_settings(world_size))
    trainer.train()
    metrics = trainer.evaluate(tiny_llm.ROWS[:7])
    return {"lora": lora(trainer), "losses": losses(trainer), "recall": metrics["eval_caption_r@1"]}


def rank_settings(world_size: int) -> dict:
    return {
        "per_device_train_batch_size": 12 // world_size,
        "gradient_caching_batch_size": 5,
        "lora_dropout": 0.0,
        "rows": HARD + HARD[:1],
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "max_grad_norm": 0.0,
    }


def test_two_processes_train_as_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ranks = run_on_ranks(on_rank, 2, tmp_path)
    alone = tiny_llm.trainer(tmp_path / "alone", **rank_settings(1))
    alone.train()
    for name, parameter in lora(alone).items():
        for result in ranks:
            assert (result["lora"][name] - parameter).norm() < 1e-3 * parameter.norm(), name
    torch.testing.assert_close(torch.tensor(ranks[0]["losses"]), torch.tensor(losses(alone)), rtol=1e-4, atol=1e-5)
    assert ranks[0]["recall"] == ranks[1]["recall"] == alone.evaluate(tiny_llm.ROWS[:7])["eval_caption_r@1"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache_frozen_layers": True}, "needs lora_num_layers"),
        ({"gradient_accumulation_steps": 2}, "gradient_caching_batch_size"),
        ({"loss_scale": 0.0}, "loss_scale"),
        ({"plain_text_share": 1.0}, "plain_text_share"),
        ({"lora_r": 0}, "lora_r"),
        ({"lora_alpha": -1}, "lora_alpha"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"remove_unused_columns": True}, "remove_unused_columns"),
        ({"micro_batch_tokens": 0}, "micro_batch_tokens"),
    ],
)
def test_bad_settings_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        CaptionContrastiveConfig(str(tmp_path), use_cpu=True, **settings)


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(ValueError, match="row 1 has 1 caption"):
        tiny_llm.trainer(tmp_path, rows=[*tiny_llm.ROWS[:1], {"text": ["alone"]}] * 6).train()
    with pytest.raises(ValueError, match="fewer than one batch of 6"):
        tiny_llm.trainer(tmp_path, rows=tiny_llm.ROWS[:5])
    with pytest.raises(ValueError, match="LLM has 3 layers"):
        tiny_llm.trainer(tmp_path, lora_num_layers=4)
    with pytest.raises(ValueError, match="tokenizer, got str"):
        tiny_llm.trainer(tmp_path, processing_class="gpt2")
    with pytest.raises(ValueError, match="without its LLM"):
        tiny_llm.trainer(tmp_path, model=tiny.model(lean=True))


def test_without_peft_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"proclip-transformers\[peft\]"):
        tiny_llm.trainer(tmp_path)
