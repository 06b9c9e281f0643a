"""What was disliked counts: the same items, liked or disliked, give other rankings, in a run as when it is served."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from flexrec.data import simulate
from flexrec.decoding import Decoding
from flexrec.experiment.config import ExperimentConfig
from flexrec.experiment.run_folder import RunFolder, RunInfo
from flexrec.policy.small_model import build_model, build_tokenizer, item_vectors, starting_rows
from flexrec.serving.ranker import Ranker
from flexrec.task.examples import RankingTask, TrainingExamples
from flexrec.task.needs import get_need
from flexrec.task.prompts import PromptBuilder
from flexrec.trainer.supervised import SupervisedTrainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The data and the folder of a small run, supervised for some steps on histories of known interest."""
    data = simulate(num_users=150, num_items=150, num_topics=6, num_candidates=16, history_length=10, observed_share=1)
    need = get_need("interest")
    tokenizer = build_tokenizer(data.catalogue, need.wordings)
    rows = starting_rows(data.catalogue, item_vectors(data.log, 150, 32))
    model = build_model(tokenizer, rows=rows, hidden_size=32, num_layers=1, num_heads=2)
    builder = PromptBuilder(tokenizer, encoding="item_token", show_titles=False, show_rising=False, described=True)
    folder = tmp_path_factory.mktemp("runs") / "small"
    folder.mkdir()
    args = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=160,
        per_device_train_batch_size=32,
        learning_rate=5e-3,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    examples = TrainingExamples(RankingTask(data.catalogue, [need], builder), data.train)
    # At this rate roundings grow into another model, and two threads round otherwise.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    SupervisedTrainer(model, args, examples, stage="listwise", num_imitated=5).train()
    torch.set_num_threads(threads)
    config = ExperimentConfig(output=str(folder), needs=("interest",))
    RunFolder(folder).save(model, tokenizer, RunInfo.of(config, builder, data, [need]), data)
    return data, folder


def test_the_same_history_liked_or_disliked_gives_other_top_fives(trained):
    data, folder = trained
    ranker, ids = Ranker(folder), data.catalogue.ids
    lists = data.test[:100]

    def top_fives(says):
        requests = [
            {
                "need": "interest",
                "history": [{"id": ids[item], **says(h)} for h, item in enumerate(lst.history)],
                "candidates": [ids[item] for item in lst.candidates],
            }
            for lst in lists
        ]
        return [{entry["id"] for entry in answer["ranking"][:5]} for answer in ranker.rank(requests)]

    def shared(ones, others):
        return np.mean([len(one & other) / 5 for one, other in zip(ones, others, strict=True)])

    liked, disliked = (top_fives(lambda h, value=value: {"liked": value}) for value in (True, False))
    assert shared(liked, disliked) < 0.85
    halves = [top_fives(lambda h, half=half: {"interest": float(h % 2 == half)}) for half in (0, 1)]
    assert shared(*halves) < 0.9
    assert top_fives(lambda h: {"interest": 1.0}) == liked, "liked is an interest of 1"


def test_what_is_served_is_what_was_trained(trained):
    """The probabilities of a request are those of the list's example, known and unknown interest alike."""
    data, folder = trained
    ranker, ids = Ranker(folder), data.catalogue.ids
    task = RankingTask(data.catalogue, [get_need("interest")], ranker.builder)
    lst = replace(data.test[0], trend=data.trend[data.test[0].candidates].round(4))
    interest = lst.history_interest.copy()
    interest[::3] = np.nan
    lst = replace(lst, history_interest=interest)
    example = task.test_example(lst, get_need("interest"))
    rollout = ranker._decode([example.prompt], [example.candidates], Decoding(), None, None)
    request = {
        "need": "interest",
        "history": [
            {"id": ids[item], "interest": None if np.isnan(x) else float(x)}
            for item, x in zip(lst.history, interest, strict=True)
        ],
        "candidates": [ids[item] for item in lst.candidates],
    }
    (answer,) = ranker.rank([request])
    assert [entry["id"] for entry in answer["ranking"]] == [ids[lst.candidates[c]] for c in rollout.rankings[0]]
    probabilities = [entry["probability"] for entry in answer["ranking"]]
    np.testing.assert_allclose(probabilities, np.exp(rollout.logprobs[0]), atol=1e-6)
