"""Bounds that both settings and model files keep: what one lets be written, the other can read."""

from __future__ import annotations

MAX_SIDE = 8192  # pixels
MAX_EMBEDDING = 65536
BASE = r"(timm:)?[\w.]+"  # the name of a network
