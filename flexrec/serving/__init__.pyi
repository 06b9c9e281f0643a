from .options import ServeOptions as ServeOptions
from .ranker import Ranker as Ranker
