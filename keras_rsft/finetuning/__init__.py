"""One run, from data to a trained model and its folder; what `keras-rsft fit` calls.

`features.py` gets cached features, `head_training.py` trains a head on them,
`unfreezing.py` unfrozen layers after it, `resume.py` is the state of both on disk,
`run.py` puts a run together, `run_folder.py` writes it. `pilot.py` looks ahead on a
sample. The folder is not called `finetune`: the function of that name is public, and a
module would hide it.
"""

from keras_rsft._storage import NumberedFolder
from keras_rsft.finetuning.features import SplitFeatures, extract_all
from keras_rsft.finetuning.head_training import TrainedHead, train_head
from keras_rsft.finetuning.pilot import Pilot, run_pilot
from keras_rsft.finetuning.run import Run, finetune

__all__ = [
    "NumberedFolder",
    "Pilot",
    "Run",
    "SplitFeatures",
    "TrainedHead",
    "extract_all",
    "finetune",
    "run_pilot",
    "train_head",
]
