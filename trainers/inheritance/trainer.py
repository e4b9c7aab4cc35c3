"""Stage 1 of ProCLIP: the text adapter inherits the space of CLIP's text encoder."""

from typing import Any

import torch
from torch import nn

from modeling_proclip import ProCLIPModel
from trainers.alignment.collators import InheritanceCollator
from trainers.alignment.losses import distillation_loss
from trainers.alignment.store_identity import check_made_by_teacher
from trainers.alignment.trainer import AlignmentTrainer
from trainers.compute.precision import unit_length

from .config import RepresentationInheritanceConfig


class RepresentationInheritanceTrainer(AlignmentTrainer):
    r"""Distils CLIP's text encoder E_T into the text adapter A, on texts alone. The adapter learns to map the LLM's embedding of a text,
    t = unit(A(G(text))), to CLIP's own embedding of it, e = unit(E_T(text)), by
    L_stage1 = lambda_ins L_ins(t, e) + lambda_struct L_struct(t, e) (ProCLIP, arXiv 2510.18795, method, stage 1).

    Both embeddings are looked up, so neither the LLM nor CLIP's text encoder is loaded: load the model with `load_text_model=False`.

    Args:
        model ([`ProCLIPModel`]):
            Everything but its `text_adapter` is frozen. An adapter in half precision is converted to float32. An adapter that standardises its input (`adapter_input_norm="standardize"`) and has
            no statistics yet gets `text_store.statistics()`.
        args ([`RepresentationInheritanceConfig`]): Settings.
        train_dataset: Rows by number with the column "text": a caption, or a list of captions, one of which is drawn in each epoch. A row may
            name in "teacher_text" what CLIP reads instead, likewise: `{"text": "ein roter Apfel", "teacher_text": "a red apple"}` teaches the
            adapter what CLIP, which knows no German, makes of the English caption.
        eval_dataset (*optional*): The same; the first of several captions is read. `eval_loss` and its parts are logged.
        text_store ([`TextEmbeddingStore`]): G(text), `(N, hidden_size)`.
        teacher_store ([`TextEmbeddingStore`]): E_T(text) of what CLIP reads, `(N, projection_dim)`, by the CLIP whose image encoder the model has.
        kwargs: Passed to [`~transformers.Trainer`].

    Raises:
        ValueError: If a store's embeddings do not fit the model, or a dataset is shorter than a batch.
        KeyError: If a text is not in a store; names it.

    Logged: `loss`, `instance_loss` and `structure_loss` (without their weights), `prefix_64_loss` and so on of `matryoshka_dims`, `grad_norm`,
    `learning_rate`.

    Example:

    ```python
    >>> model = ProCLIPModel.from_pretrained("pair", load_text_model=False)
    >>> trainer = RepresentationInheritanceTrainer(
    ...     model, RepresentationInheritanceConfig("stage-1"), captions, text_store=llm_store, teacher_store=clip_store
    ... )
    >>> trainer.train()
    ```"""

    stage = "representation inheritance"

    def __init__(
        self,
        model: ProCLIPModel,
        args: RepresentationInheritanceConfig,
        train_dataset: Any,
        eval_dataset: Any = None,
        *,
        text_store: Any,
        teacher_store: Any,
        **kwargs: Any,
    ):
        if not isinstance(model, ProCLIPModel):
            raise ValueError(
                f"stage 1 trains the text adapter alone, and PEFT adapters would stay as they are: pass the ProCLIPModel, not a "
                f"{type(model).__name__}"
            )
        super().__init__(
            model,
            args,
            train_dataset,
            eval_dataset,
            text_store=text_store,
            trained=model.text_adapter.parameters(),
            data_collator=InheritanceCollator(text_store, teacher_store),
            **kwargs,
        )
        check_made_by_teacher("teacher_store", teacher_store, model)
        self.check_store(
            "teacher_store",
            teacher_store,
            model.config.projection_dim,
            "build it with the CLIP whose image encoder this model has, by `proclip embed`.",
            reader="teacher_text",
        )

    def embed(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """t, from `llm_embeds (batch_size, hidden_size)`."""
        return (unit_length(model(llm_embeds=batch["llm_embeds"]).text_model_output.pooler_output),)

    def embed_frozen(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """e, from `teacher_embeds (batch_size, projection_dim)`."""
        return (unit_length(batch["teacher_embeds"]),)

    def loss_of(
        self, embeds: tuple[torch.Tensor, ...], frozen: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """L_stage1."""
        (student,), (teacher,) = embeds, frozen
        return distillation_loss(student, teacher, self.args)
