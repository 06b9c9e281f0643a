from .base import EpochOrder as EpochOrder
from .base import RankingTrainer as RankingTrainer
from .flexrec import FlexRecConfig as FlexRecConfig
from .flexrec import FlexRecTrainer as FlexRecTrainer
from .supervised import SupervisedTrainer as SupervisedTrainer
