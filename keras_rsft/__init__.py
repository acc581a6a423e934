"""Fine-tune a pretrained Keras model on labels that cannot all be trusted.

The names below are loaded when they are first used: importing the package
imports neither Keras nor TensorFlow, so that the command line answers at once.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "AcceptAll": "policies",
    "AcceptListed": "policies",
    "AcceptReviewed": "policies",
    "AutoPolicy": "policies",
    "BackboneRanking": "rank",
    "BatchedTuner": "searching",
    "Examination": "examination",
    "Cluster": "cluster",
    "Comparison": "comparing",
    "Export": "export",
    "ExportConfig": "config",
    "FeatureConfig": "config",
    "FeatureSet": "features",
    "ImageData": "data",
    "ImageSplit": "data",
    "KeepFraction": "policies",
    "Ledger": "ledger",
    "LossMixture": "policies",
    "LossThreshold": "policies",
    "NumberedFolder": "finetuning",
    "Pilot": "finetuning",
    "Policy": "policies",
    "PolicyConfig": "config",
    "RSFTHyperModel": "searching",
    "RSFTModel": "model",
    "RejectionLedger": "ledger",
    "RejectionTensorBoard": "rejection_tensorboard",
    "Run": "finetuning",
    "RunningThreshold": "policies",
    "Search": "searching",
    "SearchConfig": "config",
    "SearchSpace": "config",
    "SelfPaced": "policies",
    "TextData": "data",
    "TextSplit": "data",
    "TrainingBatches": "features",
    "TrainConfig": "config",
    "UnfreezeConfig": "config",
    "add_label_noise": "data",
    "apply_corrections": "data",
    "available_backbones": "backbones",
    "build_classifier": "backbones",
    "build_head": "backbones",
    "cluster_of": "cluster",
    "compare": "comparing",
    "datalab_inputs": "ledger",
    "examine_labels": "examination",
    "export_litert": "export",
    "export_onnx": "export",
    "export_run": "export",
    "export_saved_model": "export",
    "extract_features": "features",
    "finetune": "finetuning",
    "load_backbone": "backbones",
    "load_images": "data",
    "load_texts": "data",
    "predict_files": "predict",
    "rank_backbones": "rank",
    "run_pilot": "finetuning",
    "search": "searching",
    "search_features": "searching",
    "write_report": "report",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
