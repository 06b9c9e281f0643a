"""Rewards from somebody who judges: no label and no formula, only a callable that scores lists.

    python examples/judge.py --output runs/judged        a minute on two CPU cores

The judge here is a scorer of words in the manner of BM25: a candidate is good if its title shares rare words with what
the user had. One that asks a language model behind an endpoint has the same form; `ask` shows it.
"""

import argparse
import json
import math
import re
from collections import Counter

from flexrec.data import simulate
from flexrec.experiment.config import ExperimentConfig
from flexrec.experiment.stages import run_experiment
from flexrec.task import JudgedGains, Need

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output", required=True)
parser.add_argument("--steps", type=int, default=10, help="of reinforcement, after four times as many of supervision")
parser.add_argument("--prompts", type=int, default=48, help="in a step")
options = parser.parse_args()

data = simulate(num_users=300, num_items=200, num_topics=8, num_candidates=12, num_test_users=100)


def words_of(title: str) -> list[str]:
    return re.findall(r"[a-z]+", title.lower())


TITLES_WITH = Counter(word for title in data.catalogue.titles for word in set(words_of(title)))


def overlap(words: str, histories: list[list[str]], candidates: list[list[str]]) -> list[list[float]]:
    """Inverse document frequencies of the words that a candidate shares with the history, saturated as in BM25."""
    answers = []
    for history, titles in zip(histories, candidates, strict=True):
        seen = Counter(word for title in history for word in words_of(title))
        rarity = {word: math.log(1 + len(data.catalogue) / TITLES_WITH[word]) for word in seen}
        answers.append([sum(seen[w] / (seen[w] + 1.2) * rarity.get(w, 0.0) for w in words_of(t)) for t in titles])
    return answers


def ask(complete):
    """A judge from ``complete(prompt) -> text``, such as a call of an OpenAI-compatible endpoint at temperature 0.

    Asked several times it can say how sure it is: the mean of the scores, and their variance.
    """

    def judge(words, histories, candidates):
        answers = []
        for history, titles in zip(histories, candidates, strict=True):
            listed = "\n".join(f"[{i}] {title}" for i, title in enumerate(titles, start=1))
            prompt = (
                f"A user who had\n{chr(10).join(history)}\nasks: {words}\nHow well does each of these serve the user? "
                f"Answer with a JSON list of {len(titles)} numbers from 0 to 10, in order.\n{listed}\n"
            )
            answers.append(json.loads(complete(prompt)))  # what is no list of so many numbers is refused, with its list
        return answers

    return judge


WORDINGS = ("More like what I had before.", "I know what I like. Show me more of it.")
# For a language model: JudgedGains(ask(complete), WORDINGS[0], low=0, high=10, cache="judgments.jsonl")
need = Need("more of it", WORDINGS, JudgedGains(overlap, WORDINGS[0], low=0, high=10))

config = ExperimentConfig(
    output=options.output,
    steps=options.steps,
    warmup_steps=2 * options.steps,
    listwise_steps=4 * options.steps,
    prompts_per_step=options.prompts,
    baselines=("random",),
)
results = run_experiment(config, dataset=data, needs=[need])
for name in ("random", "base", "trained"):
    print(f"test users, {name}: ndcg@5 {results.means(name)[need.name]['ndcg@5']:.3f}")
