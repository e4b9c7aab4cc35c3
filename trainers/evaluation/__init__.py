"""Evaluation of aligned towers: metrics as pure functions of embeddings."""

from trainers.evaluation.scoring.metrics import (
    caption_retrieval,
    retrieval_recall,
    zero_shot_accuracy,
    zero_shot_classifier,
)


__all__ = ["caption_retrieval", "retrieval_recall", "zero_shot_accuracy", "zero_shot_classifier"]
