"""Fine-tune a pretrained Keras model on labels that cannot all be trusted.

The names below are loaded when they are first used: importing the package
imports neither Keras nor TensorFlow, so that the command line answers at once.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "AcceptAll": "policies._threshold",
    "AcceptListed": "policies._listed",
    "Audit": "training._run",
    "AutoPolicy": "policies._listed",
    "BackboneRanking": "comparison._rank",
    "BatchedTuner": "tuning._tuner",
    "Comparison": "comparison._compare",
    "Export": "export._export_run",
    "ExportConfig": "config",
    "FeatureConfig": "config",
    "FeatureSet": "features._store",
    "ImageData": "data._samples",
    "ImageSplit": "data._samples",
    "KeepFraction": "policies._threshold",
    "LabelQuality": "label_quality._audit",
    "Ledger": "_ledger",
    "LossMixture": "policies._threshold",
    "LossThreshold": "policies._threshold",
    "NumberedFolder": "_storage",
    "Pilot": "training._pilot",
    "Policy": "policies._policy",
    "PolicyConfig": "config",
    "RSFTHyperModel": "tuning._tuner",
    "RSFTModel": "model._rsft_model",
    "RejectionLedger": "_ledger",
    "RejectionTensorBoard": "training._tensorboard",
    "Run": "training._run",
    "RunningThreshold": "policies._threshold",
    "Search": "tuning._search",
    "SearchConfig": "config",
    "SearchSpace": "config",
    "SelfPaced": "policies._threshold",
    "TextData": "data._sources",
    "TextSplit": "data._sources",
    "TrainConfig": "config",
    "TrainingBatches": "features._batches",
    "UnfreezeConfig": "config",
    "add_label_noise": "data._labels",
    "apply_corrections": "data._labels",
    "audit": "training._run",
    "audit_labels": "label_quality._audit",
    "available_backbones": "backbones._load",
    "build_head": "backbones._build",
    "compare": "comparison._compare",
    "export_run": "export._export_run",
    "export_saved_model": "export._saved_model",
    "extract_features": "features._extract",
    "finetune": "training._run",
    "load_backbone": "backbones._load",
    "load_data": "data._arrays",
    "load_images": "data._sources",
    "load_texts": "data._sources",
    "predict_files": "_predict",
    "rank_backbones": "comparison._rank",
    "run_pilot": "training._pilot",
    "search": "tuning._search",
    "trust_splits": "data._labels",
    "with_ids": "model._data",
    "write_report": "report._page",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


if "keras" in sys.modules:  # Its `load_model` finds the classes that it has heard of.
    importlib.import_module("keras_rsft.model._rsft_model")
