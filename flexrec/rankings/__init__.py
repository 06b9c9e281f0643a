"""Rankings as tokens and as text.

:mod:`flexrec.rankings.state` is the face of the C++ core: what may come next, what a completion says, and what every
decision was. Not loaded with it: :mod:`flexrec.rankings.text`, which reads and rewards text, and
:mod:`flexrec.rankings.reasoning`, which says what comes before a ranking.
"""

from flexrec.rankings.state import (
    Candidates,
    CandidateTries,
    EncodedRankings,
    ParsedRankings,
    RankingState,
    Spelling,
    TokenIds,
    encode_rankings,
    inverse_permutation,
    parse_rankings,
    step_states,
    validate_rankings,
)

__all__ = [
    "CandidateTries",
    "Candidates",
    "EncodedRankings",
    "ParsedRankings",
    "RankingState",
    "Spelling",
    "TokenIds",
    "encode_rankings",
    "inverse_permutation",
    "parse_rankings",
    "step_states",
    "validate_rankings",
]
