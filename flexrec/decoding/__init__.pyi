from .logits_processor import RankingLogitsProcessor as RankingLogitsProcessor
from .options import Decoding as Decoding
from .sample import Rollout as Rollout
from .sample import best_of as best_of
from .sample import sample_rankings as sample_rankings
from .sample import search_rankings as search_rankings
