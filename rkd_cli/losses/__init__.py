"""Losses. Distillation: ``loss(student, teacher)``. Metric learning: ``loss(embeddings, labels)``."""

from rkd_cli.losses.dark_rank import HardDarkRank
from rkd_cli.losses.features import AttentionTransfer, FitNet
from rkd_cli.losses.pairs import ContrastiveLoss, TripletLoss
from rkd_cli.losses.pkt import PKT
from rkd_cli.losses.relaxed import RelaxedContrastive
from rkd_cli.losses.rkd import RKDAngle, RKDDistance

__all__ = [
    "PKT",
    "AttentionTransfer",
    "ContrastiveLoss",
    "FitNet",
    "HardDarkRank",
    "RKDAngle",
    "RKDDistance",
    "RelaxedContrastive",
    "TripletLoss",
]
