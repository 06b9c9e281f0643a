"""One experiment from data to table: warm up, reinforce, compare on unseen users, write the run's folder.

The stages are functions of a few plain objects; what a stage learns is in the model it returns, what it measures in
the :class:`flexrec.experiment.run_folder.Results` it fills.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from transformers import set_seed

from flexrec.data.cold import hold_out_items, lists_of_new_items, new_items
from flexrec.data.esci import load_esci
from flexrec.data.interactions import load_interactions
from flexrec.data.kuairec import load_kuairec
from flexrec.data.lists import RankingDataset, RankingList
from flexrec.data.movielens import load_movielens
from flexrec.data.options import all_data_options
from flexrec.data.simulator import simulate
from flexrec.evaluation.baselines import BASELINES, Baseline, has_what_it_reads, order_for
from flexrec.evaluation.critic import critic_quality
from flexrec.evaluation.evaluate import Evaluation
from flexrec.evaluation.mmr import MMR
from flexrec.evaluation.neighbours import ItemKNN
from flexrec.experiment.card import CARD, card_of
from flexrec.experiment.config import EMBEDDED, LISTWISE, MADE_IN_PYTHON, ExperimentConfig
from flexrec.experiment.estimate import estimate
from flexrec.experiment.files import write_text
from flexrec.experiment.model import make_model
from flexrec.experiment.needs import check_answerable, choose_needs, known_needs, renamed, unseen_columns, untrained
from flexrec.experiment.report.page import PAGE, page_of
from flexrec.experiment.report.read import Record
from flexrec.experiment.results import BASE, CRITIC, TRAINED, WARM_START, Results, stated
from flexrec.experiment.run_folder import FORMAT, REINFORCEMENT, WARM_UP, RunFolder, RunInfo
from flexrec.experiment.shown import intervals_of, shown_of_run
from flexrec.experiment.trackers import require_trackers
from flexrec.experiment.training import GRPO, Training, grpo_config, keep_few_kernels, reinforcement_arguments
from flexrec.experiment.wordings import kept_from_training, measure_unseen
from flexrec.metrics import parse_metric
from flexrec.ops.ranking_metric import greedy_ranking
from flexrec.policy.distributed import of_main_process, on_main_process, process_index
from flexrec.policy.lora import require_peft
from flexrec.task.critic import Critic
from flexrec.task.examples import RankingTask, TrainingExamples, answerable
from flexrec.task.mixtures import find_need
from flexrec.task.needs import Need
from flexrec.trainer.callbacks import Clock, StepLog

MIN_NEW_LISTS = 20  # of new items alone: figures of fewer say nothing


def load_dataset(
    name: str, folder: str | None, seed: int, options: Mapping[str, Any] = MappingProxyType({})
) -> RankingDataset:
    """The data set of a name; ``folder`` in the published format where it has one, ``options`` those of its loader."""
    if name == MADE_IN_PYTHON:
        raise ValueError(
            f"--dataset {name}: such a data set has no loader; hand it over in Python, as in "
            f"run_experiment(config, dataset=dataset) and evaluate_run(folder, dataset)"
        )
    if name == "simulated":
        return simulate(seed=seed, **options)
    if folder is None:
        what = "the folder with your log" if name == "interactions" else "the folder with its published files"
        raise ValueError(f"--dataset {name} needs --data FOLDER, {what}")
    loaders: dict[str, Callable[..., RankingDataset]] = {
        "movielens": load_movielens,
        "kuairec": load_kuairec,
        "esci": load_esci,
        "interactions": load_interactions,
    }
    return loaders[name](folder, seed=seed, **options)


def _say_nothing(text: str) -> None:
    """What the other processes say."""


def run_experiment(
    config: ExperimentConfig,
    say: Callable[[str], None] = print,
    *,
    dataset: RankingDataset | None = None,
    needs: Sequence[Need] | None = None,
) -> Results:
    """Train and evaluate as ``config`` says; writes the run's folder and returns the results.

    In several processes (``accelerate launch``, ``torchrun``) all call this; the main one writes and says.

    Args:
        say: takes what is to be told, in sentences.
        dataset: made in Python, in place of one that ``config`` names.
        needs: made in Python, in place of those that ``config`` names.

    Raises:
        FileExistsError: the output folder holds something, and ``config.resume`` is not set.
        FileNotFoundError, ValueError: data, needs or options that cannot be used.
        ImportError: ``config.lora`` without PEFT.
    """
    if dataset is not None:
        said = (config.dataset, config.data, config.data_options)
        if said not in (("simulated", None, all_data_options("simulated", {})), (MADE_IN_PYTHON, None, {})):
            raise ValueError(f"a data set is given: leave away dataset, data and data_options, got {said}")
        config = replace(config, dataset=MADE_IN_PYTHON, data_options={})
    if needs is not None:
        config = replace(config, needs=tuple(need.name for need in needs), needs_file=None)
    PartialState()  # where there are several processes, they meet
    folder = RunFolder(config.output)
    with folder.locked() if process_index() == 0 and not config.dry_run else nullcontext():
        return _run_in(folder, config, say if process_index() == 0 else _say_nothing, dataset, needs or ())


def _run_in(
    folder: RunFolder,
    config: ExperimentConfig,
    say: Callable[[str], None],
    dataset: RankingDataset | None,
    made: Sequence[Need],
) -> Results:
    on_main_process(lambda: folder.check_usable(config))
    resumed = config.resume and folder.is_whole(folder.base)
    kept = RunInfo.load(folder.base).own_needs if resumed else ()
    known = known_needs(None if resumed else config.needs_file, kept, made)
    for name in config.needs or ():
        find_need(name, known)
    reinforcement_arguments(config)  # options that contradict each other are an error before anything is loaded
    parse_metric(config.metric)
    chosen = config.chosen_baselines()
    others = [name for name in GRPO if name in chosen]
    for name in others:
        reinforcement_arguments(grpo_config(config, name))
    if config.lora is not None:
        require_peft()
    require_trackers(config.report_to or ())
    set_seed(config.seed)
    clock = Clock()

    if dataset is None:
        say(f"Loading the {config.dataset} data ..")
        dataset = load_dataset(config.dataset, config.data, config.seed, config.data_options)
    if config.noise is not None:
        dataset = replace(dataset, noise=config.noise)
    if config.cold_items is not None:
        dataset = hold_out_items(dataset, config.cold_items, seed=config.seed)
    for name in (name for name in chosen if not has_what_it_reads(name, dataset)):
        if name in (config.baselines or ()):
            raise ValueError(f"--baselines {name} reads what no test list of the {dataset.name} data has")
    chosen = tuple(name for name in chosen if has_what_it_reads(name, dataset))
    needs, unseen = kept_from_training(choose_needs(config.needs, known, dataset), config.unseen_wordings)
    notes = [*renamed(config.needs or (), known), *check_answerable(needs, dataset)]
    given = dataset
    on_main_process(lambda: folder.check_data(given))
    if config.bf16:
        keep_few_kernels()
    model, tokenizer, builder = make_model(config, dataset, needs, say)
    dataset = answerable(dataset, builder, config.num_ranked)
    if config.eval_lists is not None and config.eval_lists < len(dataset.test):
        notes.append(f"results are of {config.eval_lists} of {len(dataset.test)} test lists, drawn by the seed")
        drawn = np.random.default_rng(config.seed).permutation(len(dataset.test))[: config.eval_lists]
        dataset = replace(dataset, test=[dataset.test[i] for i in np.sort(drawn)])
    for note in (*dataset.notes, *notes, *unseen_columns(needs, builder, dataset.catalogue)):
        say(note)
    say(
        f"{len(dataset.catalogue)} items; {len(dataset.train)} lists of training users, {len(dataset.test)} of "
        f"{len({lst.user for lst in dataset.test})} other users to test on; model {config.model} with "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, of which "
        f"{sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6:.1f}M are trained"
    )
    wanted, available = config.supervised_lists, len(dataset.train) * len(needs)
    if wanted > available:
        raise ValueError(
            f"a step takes {wanted} rankings, and there are {available} training examples: use fewer --prompts-per-step"
        )
    critic = None
    if config.critic or (config.critic is None and dataset.unobserved == "critic"):
        with clock.stage("critic"):
            critic = Critic.fit(
                dataset.log,
                dataset.catalogue,
                model=config.critic_model,
                lists=dataset.train if dataset.unobserved == "critic" else (),
                noise=dataset.noise,
                fuse=config.fuse_observed,
                seed=config.seed,
                progress=process_index() == 0,
            )
    task = RankingTask(dataset.catalogue, needs, builder, critic)
    examples = TrainingExamples(task, dataset.train, resample=dataset.resample, seed=config.seed)
    measured = [_Measured(task, dataset.test, config.num_ranked, config.bf16)]
    results, evaluate = measured[0].results, measured[0].evaluate
    results.seconds = clock.seconds
    # Who reads items as texts has met none of them before, unless some were held out on purpose.
    told_apart = builder.encoding == "item_token" or config.cold_items is not None
    new = lists_of_new_items(dataset.test, new_items(dataset)) if told_apart else []
    if len(new) >= MIN_NEW_LISTS:
        measured.append(_Measured(task, new, config.num_ranked, config.bf16))
        results.new_items = measured[1].results

    def measure(model: Any, name: str) -> None:
        for one in measured:
            one.results.per_list[name] = one.evaluate(model, name)

    if config.dry_run or (config.model != EMBEDDED and process_index() == 0):
        tests = [example for examples in measured[0].evaluate.tests.values() for example in examples]
        planned = estimate(config, model, examples, tests, builder)
        say(planned.text())
        set_seed(config.seed)
        if config.dry_run:
            return results

    # From here on the folder is written to; mistakes that can be seen before have left no trace.
    on_main_process(lambda: folder.write_config(config, given))
    info = RunInfo.of(config, builder, dataset, needs)
    checkpoint = of_main_process(folder.latest_checkpoint(say) if resumed and process_index() == 0 else None)
    if checkpoint is not None and others and not folder.is_whole(folder.reference):
        raise ValueError(
            f"--baselines {' '.join(others)}: this run is past its warm start, from which they begin, and did not keep "
            f"it: resume it without them"
        )
    if resumed:
        step = checkpoint[0] if checkpoint else None
        clock.ends |= of_main_process(folder.cut_log(step, config.steps) if process_index() == 0 else {})
    log = StepLog(folder.log, append=resumed, intervals=partial(intervals_of, users=results.users))
    training = Training(config, examples, builder, log, clock, evaluate)
    if not resumed:
        if config.lora is not None and config.model == EMBEDDED:
            on_main_process(lambda: folder.save_backbone(model))
            model.active_peft_config.base_model_name_or_path = str(folder.backbone.absolute())
        training.format(model)
        on_main_process(lambda: folder.save_stage(folder.base, model, tokenizer, info))
    measure(model, BASE)
    if checkpoint is None and FORMAT in clock.ends:  # unless its log is gone
        training.finished(FORMAT, results.per_list[BASE])
    if config.warmup == "listwise" and checkpoint is None:
        training.warm_up(model)
        measure(model, WARM_START)
        training.finished(WARM_UP, results.per_list[WARM_START])
        on_main_process(lambda: folder.save_warm_start(results))
    elif config.warmup == "listwise":
        folder.load_warm_start(results)
    if checkpoint is None and (others or (config.beta and config.lora is None)):
        on_main_process(lambda: folder.save_stage(folder.reference, model, tokenizer, info))

    profile = training.reinforce(model, checkpoint)
    if profile is not None:
        say(profile.table())
    if config.lora is not None and config.lora_save == "merged":
        model = model.merge_and_unload()  # before the evaluation, which is of what is saved
    measure(model, TRAINED)
    training.finished(REINFORCEMENT, results.per_list[TRAINED])
    if unseen and process_index() == 0:
        results.unseen_wordings = measure_unseen(model, task, dataset.test, unseen, evaluate, described=True)
    on_main_process(lambda: folder.save(model, tokenizer, info, given))
    on_main_process(lambda: folder.write_shown(shown_of_run(model, task, dataset, config.num_ranked)))
    if critic is not None:
        on_main_process(lambda: folder.save_critic(critic))

    if policies := [name for name in chosen if name == LISTWISE or name in others]:
        del model  # there is room for one
    for name in policies:
        if name == LISTWISE:
            start = folder.load_stage(folder.base, tokenizer, config.lora)
            training.supervise_instead(start, name, of_main_process(training.equal_time_steps()))
        else:
            start = folder.load_stage(folder.reference, tokenizer, config.lora)
            training.reinforce_instead(start, name)
        measure(start, name)
        training.finished(name, results.per_list[name])
        del start
    for name in (name for name in BASELINES if name in chosen):
        with clock.stage(name):
            baseline = BASELINES[name](dataset)
            for one in measured:
                one.rank(name, baseline_rankings(baseline, task, one.lists))
    if critic is not None:
        results.critic = critic_quality(critic, dataset.test)
        for one in measured:
            one.rank(CRITIC, critic_rankings(critic, task, one.lists))
    if any(need.metric is not None for need in needs):
        for one in measured:
            one.rank(MMR.name, mmr_rankings(task, dataset, one.lists))
            if critic is not None:
                one.rank("greedy", greedy_rankings(critic, task, one.lists))
    clock.seconds["total"] = clock.elapsed()
    stated = {**asdict(config), "needs": tuple(need.name for need in needs)}
    on_main_process(lambda: folder.write_results(stated, results, partial(_report, folder, say)))
    if config.save_every is None:
        on_main_process(folder.drop_checkpoints)  # nobody asked for them but the run, which is finished
    return results


def _report(folder: RunFolder, say: Callable[[str], None], metrics: Mapping[str, Any]) -> None:
    """Write the card and the page of a run, which will be finished whatever becomes of that."""
    try:
        write_text(folder.path / CARD, card_of(folder, RunInfo.load(folder.path), metrics))
        write_text(folder.path / PAGE, page_of([Record.read(folder.path, metrics)]))
    except (OSError, ValueError) as error:
        say(f"The run is whole, its report was not written: {error}")


class _Measured:
    """What rankers are worth on some test lists, under every need of a task."""

    def __init__(
        self, task: RankingTask, lists: Sequence[RankingList], num_ranked: int | None, bf16: bool = False
    ) -> None:
        self.lists = lists
        self.results = Results(np.array([lst.user for lst in lists]))
        task.ask_judges(lists)
        tests = {need.name: [task.test_example(lst, need) for lst in lists] for need in task.needs}
        self.evaluate = Evaluation(tests, task.builder, num_ranked, bf16=bf16)

    def rank(self, name: str, rankings: Mapping[str, Sequence[np.ndarray]]) -> None:
        """Measure rankings of the lists, by need, as those of a ranker."""
        self.results.per_list[name] = self.evaluate.of_rankings(rankings)


def baseline_rankings(
    baseline: Baseline, task: RankingTask, lists: Sequence[RankingList]
) -> dict[str, list[np.ndarray]]:
    """need -> the order of every list's candidates."""
    return {need.name: [order_for(need, baseline, lst, task.catalogue) for lst in lists] for need in task.needs}


def critic_rankings(critic: Critic, task: RankingTask, lists: Sequence[RankingList]) -> dict[str, list[np.ndarray]]:
    """need -> the order of every list's candidates by the gains that the critic expects, as any baseline is ranked."""
    expected = critic.predict_many(lists)
    return {
        need.name: [
            np.argsort(-need.gains(lst, task.catalogue, *of_list)[0], kind="stable")
            for lst, of_list in zip(lists, expected, strict=True)
        ]
        for need in task.needs
    }


def greedy_rankings(critic: Critic, task: RankingTask, lists: Sequence[RankingList]) -> dict[str, list[np.ndarray]]:
    """:func:`critic_rankings`, but for needs with a metric of their own the greedy order of the expected gains."""
    expected, topics = critic.predict_many(lists), task.catalogue.topic_matrix

    def order(need: Need, metric: str, lst: RankingList, of_list: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        gains, about = need.gains(lst, task.catalogue, *of_list)[0], topics[lst.candidates]
        return greedy_ranking(torch.from_numpy(gains)[None], metric, topics=torch.from_numpy(about)[None])[0].numpy()

    return critic_rankings(critic, task, lists) | {
        need.name: [order(need, need.metric, lst, of_list) for lst, of_list in zip(lists, expected, strict=True)]
        for need in task.needs
        if need.metric is not None
    }


_VALIDATION_LISTS = 500


def mmr_rankings(
    task: RankingTask, dataset: RankingDataset, lists: Sequence[RankingList]
) -> dict[str, list[np.ndarray]]:
    """need -> the order of every list's candidates by maximal marginal relevance.

    Relevance is the gain that the critic expects, or the score of item-KNN where there is no critic. The trade-off is
    that with the best metric of the need's on training lists, by the gains that training knows.
    """
    catalogue, knn = dataset.catalogue, None if task.critic is not None else ItemKNN(dataset)
    validation = dataset.train[:_VALIDATION_LISTS]

    def relevances(need: Need, lists: Sequence[RankingList]) -> list[np.ndarray]:
        if knn is not None:
            return [knn.scores(lst) for lst in lists]
        assert task.critic is not None
        expected = zip(lists, task.critic.predict_many(lists), strict=True)
        return [need.gains(lst, catalogue, *of_list)[0] for lst, of_list in expected]

    def rankings(need: Need) -> list[np.ndarray]:
        feedback = zip(validation, task.training_feedback(validation), strict=True)
        gains = [need.gains(lst, catalogue, *of_list)[0] for lst, of_list in feedback]
        metric, topics = f"{need.metric or 'alpha_ndcg'}@5", catalogue.topic_matrix
        mmr = MMR.tuned(topics, validation, relevances(need, validation), gains, metric)
        found = zip(lists, relevances(need, lists), strict=True)
        return [mmr.order(lst.candidates, relevance) for lst, relevance in found]

    return {need.name: rankings(need) for need in task.needs}


def evaluate_run(
    folder: Path,
    dataset: str | RankingDataset | None = None,
    data: str | None = None,
    needs: Sequence[str | Need] | None = None,
    data_options: Mapping[str, Any] | None = None,
    needs_file: str | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, dict[str, dict[str, float]]]:
    """need -> metric -> mean, low and high (95 % interval over users) of a finished run on a data set's test users.

    Arguments that are None are those that the run was trained with; so are options of its data that are not given.
    Metrics that any order of the candidates would get are left out; low and high are NaN where there is one user only.
    Items that the run was not trained with are ranked by what describes them; where enough test lists have several,
    "NEED, new items" is how well among each other.

    Args:
        dataset: the name of one, or one that was made in Python.
        needs: names of needs, of mixtures, of needs that the run was trained with or that ``needs_file`` holds; or
            needs made in Python.
        say: takes what is to be told, in sentences.
    """
    trained_with, model, builder = RunFolder(folder).load()
    if isinstance(dataset, RankingDataset):
        loaded = dataset
    else:
        name = dataset or trained_with.dataset
        of_data = trained_with.data_options if name == trained_with.dataset else {}
        options = all_data_options(name, {**of_data, **(data_options or {})})
        loaded = load_dataset(
            name, data or (trained_with.data if name == trained_with.dataset else None), trained_with.seed, options
        )
    loaded = answerable(loaded, builder, trained_with.num_ranked)
    if loaded.name == trained_with.dataset or isinstance(dataset, RankingDataset):
        users = {loaded.user_id(lst.user) for lst in loaded.test}
        if known_users := users & RunFolder(folder).trained_users():
            # Whom to test on is drawn from all users: where there are others now, it is others.
            say(
                f"{len(known_users)} of {len(users)} users to test on have the ids of users that the run was trained "
                f"on: these are not the data that it was trained with, and figures say less of users never seen"
            )
    asked = trained_with.needs if needs is None else needs
    names = [need.name if isinstance(need, Need) else need for need in asked]
    known = known_needs(needs_file, trained_with.own_needs, [need for need in asked if isinstance(need, Need)])
    task = RankingTask(loaded.catalogue, choose_needs(names, known, loaded), builder)
    for note in (*renamed(names, known), *check_answerable(task.needs, loaded), *untrained(task.needs, trained_with)):
        say(note)
    is_new = np.array([not builder.knows(item_id) for item_id in loaded.catalogue.ids])
    new = lists_of_new_items(loaded.test, is_new)
    scores = {}
    for suffix, lists in (("", loaded.test), (", new items", new if len(new) >= MIN_NEW_LISTS else [])):
        if lists:
            one = _Measured(task, lists, trained_with.num_ranked)
            for need, metrics in one.evaluate(model, str(folder)).items():
                told = {name: v for name, v in metrics.items() if one.evaluate.telling(need, name)}
                scores[need + suffix] = {name: stated(v, one.results.users) for name, v in told.items()}
    return scores
