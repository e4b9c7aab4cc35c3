"""Masked next-token prediction (MNTP): an optional warm-up before stage 0, in which the LLM learns to attend to the tokens on the right.

LLM2Vec (arXiv 2404.05961): some tokens are masked, and each is predicted from the hidden state before it, as in the LLM's own training, but
with bidirectional attention. LLM2CLIP masks 20 % (run_mntp.py), and has no such warm-up in version 6.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_proclip.attention_proof import check_bidirectional
from modeling_proclip.finite_weights import check_finite
from modeling_proclip.prompt_template import NO_TEMPLATE, templated_tokenizer
from trainers.base.config import Refused
from trainers.base.sharding import engine_of
from trainers.base.trainer import StageTrainer
from trainers.data.captions import DrawnCaptions
from trainers.data.epochs import SetEpoch

from .batches import stable_hash
from .lora import LoraTrainingArguments, add_lora


@dataclass
class MaskedNextTokenConfig(LoraTrainingArguments):
    r"""Arguments of [`MaskedNextTokenTrainer`]: those of [`~transformers.TrainingArguments`] and the following.

    Args:
        mask_probability (`float`, defaults to 0.2): Share of the tokens to predict (LLM2CLIP).
        masking (`"bert"` or `"all"`, defaults to `"bert"`):
            What replaces them: "all": always the mask token; "bert": the mask token for 80 %, a random token for 10 %, nothing for 10 %
            (LLM2Vec's collators "all_mask" and "default").
        lora_r, lora_alpha, lora_dropout, lora_num_layers, max_length: As in [`CaptionContrastiveConfig`].

    Defaults that differ from [`~transformers.TrainingArguments`]: `per_device_train_batch_size` 32 (LLM2Vec), and those that
    [`CaptionContrastiveConfig`] calls ours.

    Raises:
        ValueError: If a value is out of range.
    """

    per_device_train_batch_size: int = 32

    mask_probability: float = 0.2
    masking: str = "bert"

    refused = Refused(
        LoraTrainingArguments.refused,
        load_best_model_at_end=(
            (False,),
            "Trainer does not find the LoRA in the model: load the best checkpoint yourself",
        ),
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.mask_probability <= 1:
            raise ValueError(f"mask_probability must be above 0 and at most 1, got {self.mask_probability}.")
        if self.masking not in ("bert", "all"):
            raise ValueError(f"masking must be 'bert' or 'all', got {self.masking!r}.")


def mask_tokens(
    input_ids: torch.Tensor,
    special_tokens_mask: torch.Tensor,
    *,
    mask_token_id: int,
    vocab_size: int,
    probability: float = 0.2,
    masking: str = "bert",
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask tokens that are to be predicted.

    Args:
        input_ids, special_tokens_mask: int64 of one shape; the mask is 1 where a token must stay.
        mask_token_id, vocab_size: The tokenizer's.
        probability, masking: See [`MaskedNextTokenConfig`].
        generator: Source of randomness; torch's global one by default.

    Returns:
        The masked `input_ids`, and labels: the token where it is to be predicted, -100 elsewhere.
    """

    def draw(share: float) -> torch.Tensor:
        return torch.bernoulli(torch.full(input_ids.shape, share), generator=generator).bool()

    chances = torch.full(input_ids.shape, probability).masked_fill(special_tokens_mask.bool(), 0.0)
    chosen = torch.bernoulli(chances, generator=generator).bool()
    labels = input_ids.masked_fill(~chosen, -100)
    if masking == "all":
        return input_ids.masked_fill(chosen, mask_token_id), labels
    masked = draw(0.8) & chosen
    replaced = draw(0.5) & chosen & ~masked  # half of the rest
    random_tokens = torch.randint(vocab_size, input_ids.shape, generator=generator)
    return torch.where(replaced, random_tokens, input_ids.masked_fill(masked, mask_token_id)), labels


def masked_next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy of each masked token given the hidden state before it, `()` in nats: the mean over the masked tokens, 0 if there are none. The very
    first token has none before it and does not count.

    `logits`: `(batch_size, sequence_length, vocab_size)`; `labels`: `(batch_size, sequence_length)` int64, -100 where there is nothing to predict.
    """
    predictions, targets = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
    return F.cross_entropy(predictions, targets, ignore_index=-100, reduction="sum") / (targets != -100).sum().clamp(
        min=1
    )


class MaskedTexts(Dataset):
    """Rows of texts as masked tokens. Masks, and the choice among several captions, depend on seed, epoch and row only, so a resumed run sees the
    same ones. What masks is the tokenizer's mask token, or the token "_" if it has none (LLM2Vec's "blank"); ValueError if it has neither.
    """

    def __init__(self, rows: Any, tokenizer: PreTrainedTokenizerBase, args: MaskedNextTokenConfig):
        self.rows, self.args = DrawnCaptions(rows, args.seed), args
        self.max_length = args.max_length or 512
        self.tokenizer = templated_tokenizer(tokenizer, NO_TEMPLATE, None, self.max_length)
        self.mask_token_id = tokenizer.mask_token_id
        if self.mask_token_id is None:
            self.mask_token_id = tokenizer.get_vocab().get("_")
        if self.mask_token_id is None:
            raise ValueError(
                "The tokenizer has no mask token and no token '_': set tokenizer.mask_token to one of its tokens."
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        encoded = self.tokenizer(
            self.rows[index]["text"], truncation=True, max_length=self.max_length, return_special_tokens_mask=True
        )
        seed = stable_hash(f"{self.args.seed} {self.rows.epoch} {index}")
        input_ids, labels = mask_tokens(
            torch.tensor(encoded["input_ids"]),
            torch.tensor(encoded["special_tokens_mask"]),
            mask_token_id=self.mask_token_id,
            vocab_size=len(self.tokenizer),
            probability=self.args.mask_probability,
            masking=self.args.masking,
            generator=torch.Generator().manual_seed(seed),
        )
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}

    def collate(self, rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Rows of one batch, padded on the left: each `(batch_size, sequence_length)`."""
        padding = {"input_ids": self.tokenizer.pad_token_id, "attention_mask": 0, "labels": -100}
        return {
            name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value, padding_side="left")
            for name, value in padding.items()
        }


class MaskedNextTokenTrainer(StageTrainer):
    r"""Trains a LoRA on an LLM with bidirectional attention to predict masked tokens. It saves the LoRA of the *base model*, as
    [`CaptionContrastiveTrainer`] does: load it on `AutoModel`, or merge it with `proclip convert LLM OUT --lora FOLDER`.

    Args:
        model (`PreTrainedModel`): A causal LM (`AutoModelForCausalLM`); its weights and head stay frozen.
        args ([`MaskedNextTokenConfig`]): Settings.
        train_dataset: Rows by number with "text", a text or a list of texts, one of which is drawn in each epoch.
        eval_dataset (*optional*): The same; `eval_loss` is logged.
        processing_class (tokenizer): The LLM's. Texts are read without a prompt template.
        kwargs: Passed to [`~transformers.Trainer`].

    Raises:
        ImportError: If PEFT is not installed.
        ValueError: If the LLM stays causal or the tokenizer has nothing to mask with.
    """

    text_column = None  # rows are tokens

    def __init__(
        self,
        model: PreTrainedModel,
        args: MaskedNextTokenConfig,
        train_dataset: Any,
        eval_dataset: Any = None,
        *,
        processing_class: PreTrainedTokenizerBase,
        **kwargs: Any,
    ):
        if model.get_output_embeddings() is None:
            raise ValueError(
                f"{type(model).__name__} has no language-modelling head: load it by AutoModelForCausalLM."
            )
        model.config.is_causal = False
        check_bidirectional(model.base_model)
        self.texts = MaskedTexts(train_dataset, processing_class, args)
        model.requires_grad_(False)
        self.adapter = add_lora(model.base_model, args)
        super().__init__(
            model=model,
            args=args,
            train_dataset=self.texts,
            eval_dataset=None if eval_dataset is None else MaskedTexts(eval_dataset, processing_class, args),
            data_collator=self.texts.collate,
            processing_class=processing_class,
            **kwargs,
        )
        if engine_of(self.accelerator) is not None:
            raise ValueError(
                "masked next-token prediction is not trained under FSDP or DeepSpeed: use DDP (`accelerate launch --multi_gpu`)."
            )
        self.add_callback(SetEpoch(self.texts.rows))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The loss `()` of a batch from [`MaskedTexts`]."""
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        loss = masked_next_token_loss(outputs.logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss

    def merge(self) -> PreTrainedModel:
        """The base model with the LoRA merged into its weights, to continue with in stage 0. Call this last."""
        merged = self.adapter.merge_and_unload()
        check_finite(dict(merged.named_parameters()), "the merged LLM")
        return merged

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            self.adapter.save_pretrained(folder)
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        from peft import load_peft_weights, set_peft_model_state_dict

        set_peft_model_state_dict(self.adapter, load_peft_weights(resume_from_checkpoint, device="cpu"))
