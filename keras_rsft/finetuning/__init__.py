"""One run, from data to a trained model and its folder; what `keras-rsft fit` calls.

`settings.py` makes optimizers, `devices.py` is what it runs on,
`head_training.py` trains a head on kept features, `pilot.py` looks ahead on a sample,
`run.py` puts a run together, `run_folder.py` writes and reads it. `unfinished.py` is
its place until then, `checkpoint.py` the state of the training there.
`base_training.py` trains a part of the base after the head, `tuned_run.py` is that half
of a run, `base_time.py` says how long it will take. The folder is not called
`finetune`: the function of that name is public, and a module would hide it.
"""

from keras_rsft.finetuning.head_training import TrainedHead, train_head
from keras_rsft.finetuning.pilot import Pilot, run_pilot
from keras_rsft.finetuning.run import Run, finetune
from keras_rsft.finetuning.settings import TrainingSettings
from keras_rsft.finetuning.split_features import SplitFeatures, extract_all
from keras_rsft.finetuning.unfinished import NumberedFolder

__all__ = [
    "NumberedFolder",
    "Pilot",
    "Run",
    "SplitFeatures",
    "TrainedHead",
    "TrainingSettings",
    "extract_all",
    "finetune",
    "run_pilot",
    "train_head",
]
