"""Data of the ranking task: catalogue, log and lists; a simulator of them, and loaders of data of all kinds."""

from flexrec.data.build import ListBuilder, build_dataset
from flexrec.data.columns import parse_columns
from flexrec.data.describe import describe, draw_description
from flexrec.data.esci import load_esci
from flexrec.data.interactions import load_interactions
from flexrec.data.kuairec import load_kuairec
from flexrec.data.lists import Catalogue, Interactions, RankingDataset, RankingList
from flexrec.data.movielens import load_movielens, read_movielens
from flexrec.data.simulator import simulate

__all__ = [
    "Catalogue",
    "Interactions",
    "ListBuilder",
    "RankingDataset",
    "RankingList",
    "build_dataset",
    "describe",
    "draw_description",
    "load_esci",
    "load_interactions",
    "load_kuairec",
    "load_movielens",
    "parse_columns",
    "read_movielens",
    "simulate",
]
