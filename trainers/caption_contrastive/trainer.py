"""Stage 0: a LoRA teaches the LLM to embed captions so that captions of one image find each other."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object, send_to_device
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerControl
from transformers.trainer_utils import speed_metrics

from modeling_proclip import ProCLIPModel, ProCLIPProcessor
from modeling_proclip.attention_proof import check_bidirectional
from modeling_proclip.finite_weights import check_finite
from modeling_proclip.packing import attending_by_segments, recomputes_activations, why_padded
from modeling_proclip.pooling import pool_segments, pool_tokens
from modeling_proclip.prompt_template import choose_template
from trainers.base.gradient_caching import cached_backward
from trainers.base.sharding import gathered, rounds_together, structure_of, uses_fsdp
from trainers.base.trainer import StageTrainer
from trainers.compute.precision import at_least_float32
from trainers.data.epochs import SetEpoch
from trainers.evaluation.scoring.metrics import caption_retrieval
from trainers.text_store.encoding import CPU_TOKEN_BUDGET, GPU_TOKEN_BUDGET

from .batches import CaptionPairCollator, CaptionPairs, OneSourceBatches, TextTokenizer, caption_list, micro_batches
from .config import CaptionContrastiveConfig
from .frozen_layers import FrozenLayerStates
from .lora import add_lora
from .losses import caption_contrastive_loss, global_caption_contrastive_loss


class CaptionContrastiveTrainer(StageTrainer):
    r"""Trains a LoRA on an LLM with bidirectional attention: by the cosine of their pooled embeddings, a caption must find the other caption of
    its image among the captions of other images (LLM2CLIP, arXiv 2411.04997).

    Args:
        model ([`ProCLIPModel`] or `PreTrainedModel`):
            A ProCLIP model, whose LLM is trained, or a decoder LLM by itself (`AutoModel`). The LLM's own weights stay frozen.
        args ([`CaptionContrastiveConfig`]): Settings.
        train_dataset: Rows by number: "text", two or more captions of one image; optionally "negative" (hard negatives: a text or a list)
            and "id" (rows with the same id are not negatives of each other). See [`CaptionPairs`].
        eval_dataset (*optional*): The same, or a dict of such; the first two captions are read. Logged: `eval_loss` and
            `eval_caption_r@1`, see [`caption_retrieval`].
        processing_class ([`ProCLIPProcessor`] or tokenizer): Its prompt template is used, that of a tokenizer being its chat template.
        plain_text_dataset (*optional*): Rows `{"text": [query, document]}`, optionally with "instruction" and "negative", mixed in as batches
            of their own so that the LLM stays good at other texts (LLM2CLIP, LLM2Vec); see [`OneSourceBatches`].
        kwargs: Passed to [`~transformers.Trainer`].

    Raises:
        ImportError: If PEFT is not installed.
        ValueError: If the LLM stays causal or the captions do not fill a batch, or, when it is read, if a row has fewer than two captions.

    `save_model(folder)` and checkpoints write only the LoRA, in PEFT's format; [`~CaptionContrastiveTrainer.merge`] returns the tuned LLM.

    Example:

    ```python
    >>> llm = AutoModel.from_pretrained(LLM)
    >>> rows = [{"text": ["a cat on a mat", "a small cat sits on a doormat"]}, ...]
    >>> trainer = CaptionContrastiveTrainer(llm, CaptionContrastiveConfig("stage-0"), rows, processing_class=tokenizer)
    >>> trainer.train()
    >>> trainer.save_model("stage-0/adapter")
    >>> trainer.merge().save_pretrained("tuned-llm")
    >>> pair = ProCLIPModel.from_vision_text_pretrained(CLIP, "tuned-llm")
    ```"""

    text_column = "query"
    control: TrainerControl
    data_collator: CaptionPairCollator

    def __init__(
        self,
        model: ProCLIPModel | PreTrainedModel,
        args: CaptionContrastiveConfig,
        train_dataset: Any,
        eval_dataset: Any = None,
        *,
        processing_class: ProCLIPProcessor | PreTrainedTokenizerBase,
        plain_text_dataset: Any = None,
        **kwargs: Any,
    ):
        text_model, self.pooling = _text_model(model)
        text_model.config.is_causal = False
        check_bidirectional(text_model)
        self.tokenizer = _text_tokenizer(processing_class, args.max_length)
        self.frozen = None
        if args.cache_frozen_layers and args.lora_num_layers is not None:
            num_frozen = len(text_model.layers) - args.lora_num_layers
            self.frozen = FrozenLayerStates(text_model, num_frozen, self.tokenizer.pad_token_id)
        self.pairs = CaptionPairs(train_dataset, args.seed, plain_text_dataset)
        self.order = OneSourceBatches(self.pairs, args.train_batch_size * args.world_size, args.plain_text_share)
        super().__init__(
            model=add_lora(text_model, args),
            args=args,
            train_dataset=self.pairs,
            eval_dataset=eval_dataset,
            data_collator=CaptionPairCollator(
                self.tokenizer, args.gradient_caching_batch_size, args.micro_batch_tokens
            ),
            processing_class=self.tokenizer.tokenizer,
            **kwargs,
        )
        if uses_fsdp(self.accelerator):
            self._check_fsdp()
            self._structure = structure_of(self.model)  # for `merge`
        # Packing saves what it saves on a GPU; the frozen layers' states are kept by padded rows.
        self.text_model = text_model
        if self.args.device.type == "cuda" and self.frozen is None and not recomputes_activations(text_model):
            self.data_collator.packed = why_padded(text_model) is None
        self.loss_is_scaled_for_ga = True  # each step has one batch: there is nothing to divide by
        self.add_callback(SetEpoch(self.pairs))

    def _check_fsdp(self) -> None:
        """Raises ValueError for settings with which the processes would not run the same layers at the same time, as FSDP does."""
        if self.args.cache_frozen_layers:
            raise ValueError(
                "cache_frozen_layers runs some layers by themselves, and FSDP only the whole model: leave it out."
            )
        if self.args.micro_batch_tokens and self.args.gradient_caching_batch_size is None:
            raise ValueError(
                "micro_batch_tokens gives the processes different numbers of forward passes, which FSDP runs together: set "
                "gradient_caching_batch_size too, which evens them out."
            )

    def merge(self) -> PreTrainedModel:
        """The LLM with the LoRA merged into its weights, as a plain model of Transformers; save it with `save_pretrained`. A [`ProCLIPModel`] that
        was passed in has it as its `text_model`. Call this last: the trainer's model is no longer a PEFT model. Raises ValueError if a merged
        weight is NaN or infinite, as float16's may be. Under FSDP all processes have to call it, and it is a copy, on the CPU of each.
        """
        model = self.accelerator.unwrap_model(self.model)
        if uses_fsdp(self.accelerator):
            model = gathered(self._structure, model)
        merged = model.merge_and_unload()
        check_finite(dict(merged.named_parameters()), "the merged LLM")
        return merged

    def get_train_dataloader(self) -> DataLoader:
        """As Trainer; with `cache_frozen_layers` all rows are read first."""
        if self.frozen is not None:
            self._compute_frozen(list(self.pairs.texts()))
        return super().get_train_dataloader()

    def _get_train_sampler(self, train_dataset: Any = None) -> OneSourceBatches:
        return self.order

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The loss `()` of a batch from [`CaptionPairCollator`], over the joined batch of all processes."""
        embeds = torch.cat([self.embed(model, batch) for batch in inputs["micro_batches"]])
        loss = self._loss(inputs, embeds)
        return (loss, embeds) if return_outputs else loss

    def loss_and_gradients(
        self, model: nn.Module, batch: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """As in every stage; with gradient caching one micro-batch's activations are in memory at a time."""
        if self.args.gradient_caching_batch_size is None:
            return super().loss_and_gradients(model, batch, num_items_in_batch)
        model.train()
        batch = send_to_device(batch, self.accelerator.device)
        return cached_backward(
            lambda micro_batch: (self.embed(model, micro_batch),),
            batch["micro_batches"],
            lambda embeds: self._loss(batch, embeds),
            accelerator=self.accelerator,
            model=model,
        )

    def _loss(self, inputs: dict[str, Any], embeds: torch.Tensor) -> torch.Tensor:
        keys = [inputs[name] for name in ("query_keys", "document_keys", "negative_keys")]
        embeds = embeds[inputs["order"].argsort()]
        queries, documents, negatives = embeds.split([len(group) for group in keys])
        return global_caption_contrastive_loss(
            queries,
            documents,
            negatives,
            scale=self.args.loss_scale,
            query_keys=keys[0],
            document_keys=keys[1],
            negative_keys=keys[2],
        )

    def embed(self, model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        """Pooled embeddings `(texts, hidden_size)`, at least float32, of a micro-batch of tokens."""
        if "cu_seq_lens_q" in batch:
            tokens = {name: value for name, value in batch.items() if name != "token_type_ids"}
            with attending_by_segments(self.text_model):
                states = at_least_float32(model(**tokens, use_cache=False).last_hidden_state[0])
            return pool_segments(states, batch["cu_seq_lens_q"], batch["token_type_ids"][0], self.pooling)
        mask = batch["attention_mask"]
        if self.frozen is None:
            outputs = model(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False)
        else:
            states = self.frozen.lookup(batch["input_ids"], mask)
            with self.frozen.lower_layers_skipped():
                outputs = model(inputs_embeds=states, attention_mask=mask, use_cache=False)
        # Pooled in float32: half precision would round each embedding before they are compared.
        states = at_least_float32(outputs.last_hidden_state)
        return pool_tokens(states, mask, batch["token_type_ids"], self.pooling)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Pooled embeddings `(len(texts), hidden_size)`, float32, on the CPU, with the LoRA as it is now. Under FSDP all processes have to call it, each with a
        text at least.
        """
        self._compute_frozen([(text, None) for text in texts])
        model = self.model
        was_training = model.training
        model.eval()
        rows = self.tokenizer([(text, None) for text in texts])
        batches, order = micro_batches(
            rows, self.tokenizer.pad_token_id, token_budget=self._token_budget(), packed=self.data_collator.packed
        )
        idle = rounds_together(self.accelerator, len(batches)) - len(batches)
        with self.compute_loss_context_manager():
            embeds = [
                self.embed(model, send_to_device(batch, self.accelerator.device)).cpu()
                for batch in [*batches, *batches[-1:] * idle]
            ]
        model.train(was_training)
        return torch.cat(embeds[: len(batches)])[order.argsort()]

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Caption-to-caption retrieval over the whole evaluation set, and the loss in batches of `per_device_eval_batch_size` pairs.

        Returns:
            `{"eval_caption_r@1": ..., "eval_loss": ..., ...}`, for several datasets with their names in the keys; also logged.
        """
        eval_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if eval_dataset is None:
            raise ValueError("Trainer: evaluation requires an eval_dataset.")
        if isinstance(eval_dataset, dict):
            metrics = {}
            for name, rows in eval_dataset.items():
                metrics.update(self.evaluate(rows, ignore_keys, f"{metric_key_prefix}_{name}"))
            return metrics
        start = time.time()
        texts = [caption_list(eval_dataset[i], f"evaluation row {i}")[:2] for i in range(len(eval_dataset))]
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        own = texts[rank::ranks] or texts[:1]  # a process without a row of its own takes part all the same
        own_embeds = self.embed_texts([text for pair in own for text in pair]).unflatten(0, (-1, 2))
        embeds = torch.empty(len(texts), 2, self.model.config.hidden_size)
        for number, part in gather_object([(rank, own_embeds)]):
            rows = embeds[number::ranks]
            rows.copy_(part[: len(rows)])
        first, second = embeds.unbind(1)
        size = self.args.eval_batch_size
        losses = [
            caption_contrastive_loss(a, b, scale=self.args.loss_scale) * len(a)
            for a, b in zip(first.split(size), second.split(size), strict=True)
        ]
        loss = torch.stack(losses).sum() / len(texts)
        self.check_evaluated(loss, self.model, {"embeddings": embeds}, [pair[0] for pair in texts])
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in caption_retrieval(first, second).items()}
        metrics[f"{metric_key_prefix}_loss"] = loss.item()
        metrics.update(speed_metrics(metric_key_prefix, start, len(texts)))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _token_budget(self) -> int:
        default = CPU_TOKEN_BUDGET if self.args.device.type == "cpu" else GPU_TOKEN_BUDGET
        return self.args.micro_batch_tokens or default

    def _compute_frozen(self, texts: list[tuple[str, str | None]]) -> None:
        if self.frozen is not None:
            self.frozen.fill(self.tokenizer(list(dict.fromkeys(texts))), self._token_budget())


def _text_model(model: ProCLIPModel | PreTrainedModel) -> tuple[PreTrainedModel, str]:
    if not isinstance(model, ProCLIPModel):
        return model.base_model, "mean"
    if model.text_model is None:
        raise ValueError("This model was loaded without its LLM (load_text_model=False), which stage 0 trains.")
    return model.text_model, model.config.text_pooling


def _text_tokenizer(
    processing_class: ProCLIPProcessor | PreTrainedTokenizerBase, max_length: int | None
) -> TextTokenizer:
    if isinstance(processing_class, ProCLIPProcessor):
        processor = processing_class
        length = max_length or processor.max_length
        return TextTokenizer(processor.tokenizer, processor.prompt_template, length, processor.instruction)
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise ValueError(
            f"processing_class must be a ProCLIPProcessor or the LLM's tokenizer, got {type(processing_class).__name__}."
        )
    return TextTokenizer(processing_class, choose_template(processing_class), max_length or 512)
