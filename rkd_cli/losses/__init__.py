"""Losses. Distillation: ``loss(student, teacher)``. Metric learning: ``loss(embeddings, labels)``."""

from rkd_cli.losses.pairs import ContrastiveLoss, TripletLoss
from rkd_cli.losses.rkd import RKDAngle, RKDDistance

__all__ = ["ContrastiveLoss", "RKDAngle", "RKDDistance", "TripletLoss"]
