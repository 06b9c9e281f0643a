"""Data of the ranking task: catalogue, log and lists; a simulator of them, and loaders of published data sets."""

from flexrec.data.build import ListBuilder, build_dataset
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
    "load_movielens",
    "read_movielens",
    "simulate",
]
