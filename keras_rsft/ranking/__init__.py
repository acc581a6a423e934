"""Which base suits the data: several, scored on the features of a sample.

`scores.py` is the published scores and the agreement between rankings, pure numbers;
`backbones.py` computes the features and puts the table together.
"""

from keras_rsft.ranking.backbones import (
    BackboneRanking,
    RankedBackbone,
    rank_backbones,
)
from keras_rsft.ranking.scores import h_score, kendall_tau, log_me

__all__ = [
    "BackboneRanking",
    "RankedBackbone",
    "h_score",
    "kendall_tau",
    "log_me",
    "rank_backbones",
]
