"""Runs that answer: untrained models, whose folders are as those of finished runs."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from servers import serving

from flexrec.data import simulate
from flexrec.experiment.config import ExperimentConfig
from flexrec.experiment.run_folder import RunFolder, RunInfo
from flexrec.policy.small_model import build_model, build_tokenizer
from flexrec.serving.ranker import Ranker
from flexrec.task.needs import get_need
from flexrec.task.prompts import PromptBuilder


@pytest.fixture(scope="session")
def dataset():
    return simulate(num_users=24, num_items=70, num_topics=4, num_test_users=6, num_candidates=8)


@pytest.fixture(scope="session")
def make_run(tmp_path_factory, dataset):
    """Writes the folder of a run whose prompts have this encoding."""

    def make(encoding, name="run", sharp=False, **options):
        folder = tmp_path_factory.mktemp("runs") / name
        folder.mkdir()
        needs = [get_need("interest"), get_need("trend")]
        tokenizer = build_tokenizer(dataset.catalogue, [wording for need in needs for wording in need.wordings])
        model = build_model(tokenizer, hidden_size=16, num_layers=1, num_heads=2, max_length=512)
        if sharp:  # so that what is asked for matters, though nothing was learnt
            for parameter in model.parameters():
                parameter.data *= 4
        builder = PromptBuilder(tokenizer, encoding=encoding, **options)
        run = RunFolder(folder)
        thinking = {name: value for name, value in options.items() if "reasoning" in name}
        thinking |= {"model": "owner/thinker", "encoding": encoding} if thinking else {}
        config = ExperimentConfig(
            output=str(folder), data="/somewhere/else", dataset="movielens", temperature=0.5, **thinking
        )
        run.write_config(config, dataset)
        run.save(model, tokenizer, RunInfo.of(config, builder, dataset, needs), dataset)
        return folder

    return make


@pytest.fixture(scope="session", params=["item_token", "described", "index", "title", "score"])
def run(request, make_run):
    if request.param == "described":
        return make_run("item_token", show_titles=False, described=True)
    return make_run(request.param)


@pytest.fixture(scope="session")
def served(make_run):
    """The folder of a run that knows new items by their words."""
    return make_run("item_token", sharp=True, show_titles=False, described=True)


@pytest.fixture(scope="session")
def ranker(served):
    return Ranker(served)


@pytest.fixture(scope="session")
def url(ranker):
    """The address of a server that stays as long as the tests do."""
    for package in ("fastapi", "uvicorn", "prometheus_client", "httpx"):
        pytest.importorskip(package, reason="the extras 'serve' and 'test'")
    with serving(ranker) as address:
        yield address


@pytest.fixture
def client(url):
    import httpx

    with httpx.Client(base_url=url, timeout=30) as made:
        yield made
