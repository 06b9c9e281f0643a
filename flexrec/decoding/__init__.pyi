from .logits_processor import RankingLogitsProcessor as RankingLogitsProcessor
from .one_pass import first_choices as first_choices
from .options import Decoding as Decoding
from .rollout import Rollout as Rollout
from .rollout import best_of as best_of
from .sample import sample_rankings as sample_rankings
from .sample import search_rankings as search_rankings
