"""Losses. Distillation: ``loss(student, teacher)``. Metric learning: ``loss(embeddings, labels)``."""

from rkd_cli.losses.contextual import ContextualSimilarity
from rkd_cli.losses.d3still import D3still
from rkd_cli.losses.dark_rank import HardDarkRank
from rkd_cli.losses.features import AttentionTransfer, FitNet
from rkd_cli.losses.matching import EmbeddingMatching
from rkd_cli.losses.matryoshka import Matryoshka
from rkd_cli.losses.multi_similarity import MultiSimilarity
from rkd_cli.losses.pairs import ContrastiveLoss, TripletLoss
from rkd_cli.losses.pkt import PKT
from rkd_cli.losses.proxy_anchor import ProxyAnchor
from rkd_cli.losses.queue_kl import QueueKL
from rkd_cli.losses.relaxed import RelaxedContrastive
from rkd_cli.losses.rkd import RKDAngle, RKDDistance
from rkd_cli.losses.smooth_ap import SmoothAP
from rkd_cli.losses.softmax import ArcFace, NormalizedSoftmax

__all__ = [
    "PKT",
    "ArcFace",
    "AttentionTransfer",
    "ContextualSimilarity",
    "ContrastiveLoss",
    "D3still",
    "EmbeddingMatching",
    "FitNet",
    "HardDarkRank",
    "Matryoshka",
    "MultiSimilarity",
    "NormalizedSoftmax",
    "ProxyAnchor",
    "QueueKL",
    "RKDAngle",
    "RKDDistance",
    "RelaxedContrastive",
    "SmoothAP",
    "TripletLoss",
]
