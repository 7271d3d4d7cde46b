"""Recall of concatenated embeddings of fold models ("A Metric Learning Reality Check", Musgrave et al., ECCV 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from rkd_cli.commands.compare import Comparison, RunFacts, finished, read_settings
from rkd_cli.commands.evaluate import load_splits
from rkd_cli.commands.options import open_named, reading_as_trained
from rkd_cli.errors import SettingsError
from rkd_cli.events import Reporter
from rkd_cli.geometry import normalized
from rkd_cli.metrics import recall_at_k
from rkd_cli.runtime.context import make_context
from rkd_cli.settings import CompareSettings, EvaluateSettings


def with_concatenated(found: Comparison, settings: CompareSettings, report: Reporter) -> Comparison:
    """The comparison with the recalls of the concatenated embeddings of each seed whose folds are all finished.

    Raises:
        RkdError: no seed has all its folds, or a model or image cannot be read.
    """
    concatenated = tuple(
        {
            seed: _recalls([runs[0] for _, runs in sorted(folds.items())], settings, report)
            for seed, folds in finished(group.runs).items()
            if len(folds) == group.folds > 1
        }
        for group in found.groups
    )
    if not any(concatenated):
        raise SettingsError("--concatenate: no seed has finished runs of all its folds. Omit the flag.")
    return replace(found, concatenated=concatenated)


def _recalls(runs: Sequence[RunFacts], settings: CompareSettings, report: Reporter) -> dict[str, float]:
    """Recall@K of the evaluation split, each image as its unit-length embeddings by all models, side by side."""
    saved = read_settings(runs[0].path)
    asked = EvaluateSettings(
        data=settings.data or Path(str(saved["data"])), device=settings.device, skip_damaged=bool(saved["skip_damaged"])
    )
    context = make_context(asked.device, asked.precision)
    images = load_splits(str(saved["dataset"]), asked, report)["Evaluating eval images"]
    parts = []
    for run in runs:
        model, what = open_named(str(run.path), asked, report), f"Embedding with {run.path}"
        embedded = model.embed({what: images}, reading_as_trained(model, asked, context.device), context, report)[what]
        parts.append(normalized(embedded.embeddings))
    recalls = recall_at_k(torch.cat(parts, dim=1), embedded.labels, saved["recall"])
    return {f"R@{k}": recall for k, recall in recalls.items()}
