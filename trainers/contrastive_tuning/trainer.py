"""Stage 2 of ProCLIP: contrastive tuning of image encoder and adapter, with self-distillation of the image encoder."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import has_length

from modeling_proclip import ProCLIPModel
from trainers.alignment.checks import proclip_of, trained_with_peft
from trainers.alignment.collators import ContrastiveTuningCollator, image_inputs
from trainers.alignment.losses import distillation_loss
from trainers.alignment.trainer import AlignmentTrainer
from trainers.base.replaced import replaced
from trainers.base.zero import clamp_
from trainers.compute.precision import unit_length
from trainers.losses import global_info_nce_loss, global_sigmoid_loss

from .config import ContrastiveTuningConfig
from .ema_teacher import EMATeacher
from .held_out_retrieval import AllCaptionsCollator, HeldOutRetrieval


MAX_LOG_LOGIT_SCALE = math.log(100)  # CLIP, arXiv 2103.00020


class ContrastiveTuningTrainer(AlignmentTrainer):
    r"""Trains image encoder E_I, text adapter A and logit scale on images with captions, by
    L_stage2 = L_info + lambda_ins L_ins(v, v*) + lambda_struct L_struct(v, v*) (ProCLIP, arXiv 2510.18795, method, stage 2): the contrastive
    loss over the joined batch of all processes, with the image embeddings v regularised towards the embeddings v* of an EMA copy of the image
    encoder. LLM2CLIP and LiT are settings of it: [`ContrastiveTuningConfig`]`.method`.

    The LLM's embeddings are looked up, so it is not loaded: load the model with `load_text_model=False`.

    Args:
        model ([`ProCLIPModel`]): After stage 1, or with a fresh adapter for the baselines. Trained parts in half precision are
            converted to float32. Or a [`ProCLIPPeftModel`] with PEFT adapters on the
            image encoder, which are trained in its place; the EMA teacher averages the adapters' factors.
        args ([`ContrastiveTuningConfig`]): Settings.
        train_dataset:
            Rows by number with "text", a caption or a list of captions, one of which is drawn in each epoch, and "pixel_values"
            `(3, height, width)` or "image", which `processing_class` turns into pixel values.
        eval_dataset (*optional*): The same. Logged: `eval_loss` and its parts, which read the first of several captions, and
            `eval_i2t_r@1`, `eval_t2i_r@1` and so on at 5 and 10: retrieval among all its images and all their captions.
        text_store ([`TextEmbeddingStore`]): G(text), `(N, hidden_size)`.
        processing_class (*optional*): [`ProCLIPProcessor`] or image processor, for rows with "image"; saved with the checkpoints.
        kwargs: Passed to [`~transformers.Trainer`].

    Raises:
        ValueError: If the store's embeddings do not fit the model, the training set is shorter than a batch, or the sigmoid loss is to
            train a model without a logit bias.
        KeyError: If a text is not in the store; names it.
        FileNotFoundError: On resuming from a checkpoint without the EMA teacher.

    Logged: `loss`, `info_nce_loss` or `sigmoid_loss`, `instance_loss` and `structure_loss` (without their weights), `logit_scale` (the
    multiplier itself), `logit_bias` with the sigmoid loss, `prefix_64_loss` and so on of `matryoshka_dims`, `grad_norm`, `learning_rate`,
    `samples_per_second`.

    Example:

    ```python
    >>> model = ProCLIPModel.from_pretrained("stage-1", load_text_model=False)
    >>> trainer = ContrastiveTuningTrainer(model, ContrastiveTuningConfig("stage-2"), pairs, text_store=llm_store, processing_class=processor)
    >>> trainer.train()
    ```"""

    stage = "contrastive tuning"

    def __init__(
        self,
        model: ProCLIPModel,
        args: ContrastiveTuningConfig,
        train_dataset: Any,
        eval_dataset: Any = None,
        *,
        text_store: Any,
        processing_class: Any = None,
        **kwargs: Any,
    ):
        if isinstance(model, ProCLIPModel):
            trained = [*model.text_adapter.parameters(), model.logit_scale]
            if not args.freeze_vision:
                trained += [*model.vision_model.parameters(), *model.visual_projection.parameters()]
        else:
            if args.loss == "sigmoid":
                raise ValueError(
                    "loss='sigmoid' trains the logit bias, which files of PEFT adapters do not keep: train without PEFT."
                )
            trained = trained_with_peft(model, args.freeze_vision)
        if args.loss == "sigmoid":
            if model.logit_bias is None:
                raise ValueError(
                    "loss='sigmoid' trains a logit bias, and this model has none: load or make it with logit_bias_init_value=-10.0, as in "
                    "ProCLIPModel.from_pretrained(..., logit_bias_init_value=-10.0)."
                )
            trained.append(model.logit_bias)
        super().__init__(
            model,
            args,
            train_dataset,
            eval_dataset,
            text_store=text_store,
            trained=trained,
            data_collator=ContrastiveTuningCollator(text_store, processing_class),
            processing_class=processing_class,
            **kwargs,
        )
        rows_of_last = len(self.rows) % (args.train_batch_size * args.world_size) if has_length(self.rows) else 0
        if rows_of_last == 1 and not args.dataloader_drop_last:
            raise ValueError(
                f"the last batch of {len(self.rows)} rows has one, which has nothing to be compared with: leave dataloader_drop_last True, or "
                "change per_device_train_batch_size."
            )
        # After the model has moved to its device.
        self.ema = EMATeacher(model, args.ema_decay) if args.lambda_ins or args.lambda_struct else None
        self.text_store, self._held_out = text_store, HeldOutRetrieval()

    def embed(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """v, from `pixel_values (batch_size, 3, height, width)` and the image encoder's other inputs, and t, from `llm_embeds (batch_size,
        hidden_size)`; t alone if E_I is frozen.
        """
        if self.args.freeze_vision:
            return (unit_length(model(llm_embeds=batch["llm_embeds"]).text_model_output.pooler_output),)
        outputs = model(**image_inputs(batch), llm_embeds=batch["llm_embeds"])
        return unit_length(outputs.vision_model_output.pooler_output), unit_length(
            outputs.text_model_output.pooler_output
        )

    def embed_frozen(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """v if E_I is frozen; v* if there is an EMA teacher."""
        if self.args.freeze_vision:
            self.model.vision_model.eval()  # Trainer puts all in training mode, and batch norms would go on learning
            with torch.no_grad():
                return (unit_length(model(**image_inputs(batch)).vision_model_output.pooler_output),)
        if self.ema is None:
            return ()
        with self.accelerator.autocast():
            return (self.ema.embed(**image_inputs(batch)),)

    def loss_of(
        self, embeds: tuple[torch.Tensor, ...], frozen: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """L_stage2."""
        images, texts = (*frozen, *embeds) if self.args.freeze_vision else embeds
        model = proclip_of(self.model)
        logit_scale = model.logit_scale.exp().reshape(())  # it has a dimension under DeepSpeed
        if self.args.loss == "sigmoid":
            logit_bias = model.logit_bias.reshape(())
            loss = global_sigmoid_loss(images, texts, logit_scale, logit_bias)
            parts = {"sigmoid_loss": loss, "logit_scale": logit_scale, "logit_bias": logit_bias}
        else:
            loss = global_info_nce_loss(images, texts, logit_scale)
            parts = {"info_nce_loss": loss, "logit_scale": logit_scale}
        if self.ema is not None:
            distillation, of_distillation = distillation_loss(images, frozen[0], self.args)
            loss, parts = loss + distillation, parts | of_distillation
        return loss, parts

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As in stage 1, with all captions of an image."""
        with replaced(self, data_collator=AllCaptionsCollator(self.data_collator, self.text_store)):
            return super().get_eval_dataloader(eval_dataset)

    def evaluate_batch(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """As in stage 1; keeps the embeddings for the recall."""
        loss, embeds = self.compute_loss(model, batch, return_outputs=True)
        images = embeds[1] if self.args.freeze_vision else embeds[0]
        if "num_captions" in batch:
            num_captions = batch["num_captions"][: len(images)]
            captions = batch["caption_embeds"][: num_captions.sum()]
            self._held_out.add(
                images, unit_length(model(llm_embeds=captions).text_model_output.pooler_output), num_captions
            )
        return loss

    def evaluation_metrics(self) -> dict[str, float]:
        """The loss's parts and the recall of retrieval."""
        return {**super().evaluation_metrics(), **self._held_out.recall(self.args.device)}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As Trainer, with the text adapter in groups of its own if `adapter_learning_rate` is given."""
        if self.optimizer is not None or self.args.adapter_learning_rate is None:
            return super().create_optimizer(model)
        optimizer = super().create_optimizer(model)
        adapter = set(self.model.text_adapter.parameters())
        for group in list(optimizer.param_groups):
            params = group["params"]
            group["params"] = [p for p in params if p not in adapter]
            ours = [p for p in params if p in adapter]
            optimizer.add_param_group({**group, "params": ours, "lr": self.args.adapter_learning_rate})
        return optimizer

    def before_training(self) -> None:
        """Shard the EMA teacher as the model is."""
        if self.ema is not None:
            self.ema.shard(self.model)

    def after_optimizer_step(self) -> None:
        """Keep the logit scale between 1 and 100 (CLIP; the published code too; not with the sigmoid loss) and move the EMA teacher."""
        if self.accelerator.optimizer_step_was_skipped:
            return  # float16 gradients overflowed
        if self.args.loss == "info_nce":
            clamp_(self.accelerator, proclip_of(self.model).logit_scale, 0, MAX_LOG_LOGIT_SCALE)
        if self.ema is not None:
            self.ema.update(self.model)

    def save_state(self, folder: Path) -> None:
        """The EMA teacher."""
        if self.ema is not None:
            self.ema.save(folder, self.args.should_save)

    def load_state(self, folder: Path) -> None:
        """The EMA teacher."""
        if self.ema is not None:
            self.ema.load(folder)
