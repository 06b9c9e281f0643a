"""The folder of a run: the one place that knows its files and their formats.

    experiment.json   what the run was configured with             config.yaml      the same, for flexrec train --config
    data.json         what its data set is called, holds and is known by, and what its loader said
    flexrec.json      how the model is to be prompted and what it was trained on (:class:`RunInfo`)
    catalogue.json    titles and topics of the items, and how strongly they rise at the end of the log
    histories.json    the last items of every user                critic.npz      the critic, where there is one
    metrics.json      means, changes, configuration, seconds          per_list.npz   every metric of every test list
    report.json       what a report shows beside them (:mod:`flexrec.experiment.shown`)         report.html   the report
    warm_start.npz    the same of the warm start, for a run that is resumed after it
    log.jsonl         a line per step                                 checkpoints/   of reinforcement, by step
    base/             the model after the format stage                reference/     the one before reinforcement, where
                                                      the KL refers to it, or baselines by reinforcement start from it
    backbone/         the embedded model, which adapters belong to

base/, reference/, backbone/ and checkpoints are whole where they have a manifest.json, which is written last. Beside
them stand the model and the tokenizer as transformers writes them, adapters as PEFT does.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexrec.data.lists import Catalogue, RankingDataset
from flexrec.data.options import all_data_options
from flexrec.experiment.arguments import options_text
from flexrec.experiment.config import ExperimentConfig
from flexrec.experiment.files import MANIFEST, PARTIAL, check_sealed, read_json, seal, settle, write_json, write_text
from flexrec.experiment.results import WARM_START, Results
from flexrec.policy.lora import ADAPTER_FILE, BACKBONE, OF_A_RUN, has_adapters, load_model, save_adapters
from flexrec.task.critic import Critic
from flexrec.task.expression_values import find_column
from flexrec.task.needs import Need
from flexrec.task.own_needs import columns_of, definitions_of, make_needs
from flexrec.task.prompts import PromptBuilder

LOCK = ".lock"
FORMAT, WARM_UP, REINFORCEMENT = "format", "listwise warm-up", "reinforcement"  # the stages, in the log and by seconds
# By --resume.
CHANGEABLE = {"output", "resume", "save_every", "eval_every", "profile", "baselines", "report_to", "dry_run"}
# What a run's folder says of the builder of its prompts and of its configuration, by the names that they have there.
_OF_BUILDER = ("encoding", "max_title_tokens", "show_titles", "show_rising", "described", "show")
_OF_CONFIG = (
    *("mode", "max_reasoning_tokens", "num_ranked", "temperature"),
    *("dataset", "data", "data_options", "seed", "model"),
)

try:
    import fcntl
except ImportError:  # on Windows nothing is locked
    fcntl = None  # type: ignore[assignment]


@dataclass(frozen=True)
class RunInfo:
    """What a run's folder says about how its model is to be prompted, and what it was trained on."""

    encoding: str
    show_titles: bool
    show_rising: bool
    max_history: int
    num_ranked: int | None
    temperature: float
    dataset: str
    data: str | None
    needs: list[str]
    seed: int
    described: bool = False
    mode: str = "decode"
    max_reasoning_tokens: int | None = None
    reasoning_end: str | None = None
    show: Sequence[str] = ("title",)
    max_title_tokens: int | None = None
    model: str = ""  # which the run began with
    own_needs: list[dict[str, Any]] = field(default_factory=list)  # that were written as expressions
    data_options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, config: ExperimentConfig, builder: PromptBuilder, dataset: RankingDataset, needs: Sequence[Need]
    ) -> RunInfo:
        return cls(
            **{name: getattr(builder, name) for name in _OF_BUILDER},
            **{name: getattr(config, name) for name in _OF_CONFIG},
            reasoning_end=None if config.max_reasoning_tokens is None else config.reasoning_end,
            max_history=max(len(lst.history) for lst in dataset.train),
            needs=[need.name for need in needs],
            own_needs=definitions_of(needs),
        )

    @classmethod
    def load(cls, folder: Path) -> RunInfo:
        path = folder / "flexrec.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is not the folder of a finished run: it has no {path.name}")
        stored = read_json(path)
        try:
            return cls(**stored)
        except TypeError as error:
            raise ValueError(f"{path} is damaged, or of another version of flexrec: {error}") from None


class RunFolder:
    """Reads and writes the folder of a run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.base = self.path / "base"
        self.reference = self.path / "reference"
        self.backbone = self.path / BACKBONE
        self.log = self.path / "log.jsonl"

    def check_usable(self, config: ExperimentConfig) -> None:
        """Refuse a folder whose contents a run would touch, and one of a run that was configured otherwise."""
        folder, resume = self.path, config.resume
        if self._holds_something() and not resume:
            raise FileExistsError(
                f"--output {folder} exists and is not empty: choose another folder, or continue that run with --resume"
            )
        if resume and (folder / "metrics.json").is_file():
            raise FileExistsError(f"--output {folder} holds a finished run: there is nothing to resume")
        stored, configured = _flat(self.read_config() if resume else {}), _flat(asdict(config))
        for name in stored:
            if name not in CHANGEABLE and configured.get(name) != stored[name]:
                raise ValueError(
                    f"--resume continues the run as it was configured, with {name}={stored[name]!r}: got "
                    f"{configured.get(name)!r}; only {', '.join(sorted(CHANGEABLE - {'output', 'resume'}))} may change"
                )

    def check_data(self, dataset: RankingDataset) -> None:
        """Refuse a data set that is not the one that the run began with."""
        path = self.path / "data.json"
        if path.is_file() and read_json(path).get("fingerprint") != dataset.fingerprint():
            raise ValueError(
                f"--resume continues the run on the data that it began with, and these are others: their fingerprint "
                f"is not that of {path}; give the same files or the same data set, or start a new run"
            )

    def _holds_something(self) -> bool:
        """Besides what is left of a run that was killed before it had written its first file."""
        return self.path.is_dir() and any(
            path.name != LOCK and not path.name.endswith(PARTIAL) for path in self.path.iterdir()
        )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Inside of it no other process may run into this folder, which is left away again if nothing comes into it.

        Raises:
            FileExistsError: another run is at it, or it is no folder.
        """
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"--output {self.path} exists and is no folder")
        made = [path for path in (self.path, *self.path.parents) if not path.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / LOCK).open("a")
        except OSError as error:
            raise OSError(f"--output {self.path} cannot be written ({error.strerror}): choose another folder") from None
        with lock as file:
            if fcntl is not None:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    raise FileExistsError(f"--output {self.path} is in use by another run") from None
            try:
                yield
            finally:
                if not self._holds_something():
                    for path in self.path.iterdir():
                        path.unlink()
                    for path in made:
                        path.rmdir()

    def cut_log(self, step: int | None, last: int) -> dict[str, dict[str, Any]]:
        """Take out of the log what a resumed run is going to do again: all after the steps of the format stage, or,
        from a checkpoint, after its step, and the evaluation after the ``last`` one. Returns of each stage that is left
        the last step, as ``Stage.at`` says it."""
        kept: list[str] = []
        ends: dict[str, dict[str, Any]] = {}
        for line in self.log.read_text().splitlines() if self.log.is_file() else ():
            try:
                entry = json.loads(line)
            except ValueError:  # the run was killed while it wrote
                break
            stage, is_evaluation = entry.get("of", entry["stage"]), "of" in entry
            if step is None:
                is_done = stage == FORMAT and not is_evaluation
            elif stage == REINFORCEMENT:
                is_done = entry["step"] <= step and not (is_evaluation and entry["step"] == last)
            else:
                is_done = stage in (FORMAT, WARM_UP)
            end = {"stage": stage, **{name: entry[name] for name in ("step", "steps", "seconds")}}
            if is_done:
                kept.append(line + "\n")
                ends[stage] = end
            elif stage == FORMAT:  # its evaluation
                ends.setdefault(stage, end)
        self.log.write_text("".join(kept))
        return ends

    def write_config(self, config: ExperimentConfig, dataset: RankingDataset) -> None:
        write_json(self.path / "experiment.json", asdict(config), indent=2)
        write_text(self.path / "config.yaml", options_text(config))
        about = {
            "name": dataset.name,
            "items": len(dataset.catalogue),
            "interactions": len(dataset.log),
            "train": len(dataset.train),
            "test": len(dataset.test),
            "fingerprint": dataset.fingerprint(),
            "tested": sorted({dataset.user_id(lst.user) for lst in dataset.test}),
            "notes": dataset.notes,
        }
        write_json(self.path / "data.json", about, indent=2)

    def read_config(self) -> dict[str, Any]:
        """The options of the run to be resumed; none where the folder is empty."""
        path = self.path / "experiment.json"
        if not path.is_file():
            if self._holds_something():
                raise FileNotFoundError(f"--output {self.path} is not the folder of a run: it has no {path.name}")
            return {}
        stored = read_json(path)
        if "data_options" in stored:
            stored["data_options"] = all_data_options(stored["dataset"], stored["data_options"])
        return {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}

    def is_whole(self, folder: Path) -> bool:
        """Whether one of the run's folders was written to its end."""
        return (folder / MANIFEST).is_file()

    def seal(self, folder: Path) -> None:
        """Say that a folder is whole: sizes and checksums of its files, all of which are on the disk, in a manifest."""
        seal(folder, self._fingerprint())

    def check_sealed(self, folder: Path) -> None:
        """Raise an error that names the first file that is not as it was written, or says whose folder it is."""
        check_sealed(folder, self._fingerprint())

    def latest_checkpoint(self, say: Callable[[str], None]) -> tuple[int, Path] | None:
        """The step and the folder of the latest checkpoint of reinforcement that was written to its end."""
        found = {int(m[1]): p for p in self.checkpoints.glob("*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))}
        for step, checkpoint in sorted(found.items(), reverse=True):
            if (checkpoint / MANIFEST).is_file():
                self.check_sealed(checkpoint)
                return step, checkpoint
            say(f"{checkpoint} was not written to its end and is passed over")
        return None

    def drop_checkpoints(self) -> None:
        """Delete the checkpoints, which a finished run needs no more."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def _fingerprint(self) -> str:
        """What tells this run from those that give other results."""
        stored = {name: value for name, value in self.read_config().items() if name not in CHANGEABLE}
        return hashlib.sha256(json.dumps(stored, sort_keys=True).encode()).hexdigest()

    def save_stage(self, folder: Path, model: Any, tokenizer: Any, info: RunInfo) -> None:
        """Write the model as a stage leaves it: ``base`` as the format stage, ``reference`` as the last before
        reinforcement, for a resumed run and for other reinforcement."""
        save_model(folder, model, tokenizer, info)
        self.seal(folder)

    def load_stage(self, folder: Path, tokenizer: Any, lora: int | None) -> Any:
        """The model of ``base`` or ``reference``, with the adapters, of rank ``lora``, that other stages train."""
        self.check_sealed(folder)
        if self.backbone.is_dir():
            self.check_sealed(self.backbone)
        if (folder / ADAPTER_FILE).is_file() != (lora is not None):
            raise ValueError(f"{folder} was made {'without' if lora else 'with'} --lora: resume the run as it began")
        model = load_model(folder, tokenizer, backbone=self.backbone, trainable=True)
        if lora is not None and model.active_peft_config.r != lora:
            raise ValueError(f"{folder} holds LoRA of rank {model.active_peft_config.r}, got --lora {lora}")
        return model.to("cuda") if torch.cuda.is_available() else model

    def save_backbone(self, model: Any) -> None:
        """Write the embedded model, which has no name to load it by, without its adapters."""
        copy.deepcopy(model).unload().save_pretrained(self.backbone)
        self.seal(self.backbone)

    def load_reference(self) -> Any:
        self.check_sealed(self.reference)
        return AutoModelForCausalLM.from_pretrained(self.reference, **OF_A_RUN)

    def save(self, model: Any, tokenizer: Any, info: RunInfo, dataset: RankingDataset) -> None:
        """Write the trained model and what is needed to answer requests: the catalogue, what rises, histories."""
        catalogue, log = dataset.catalogue, dataset.log
        trend = np.zeros(len(catalogue)) if dataset.trend is None else dataset.trend
        rises = {catalogue.ids[i]: round(float(trend[i]), 4) for i in np.flatnonzero(trend)}
        items = {"ids": catalogue.ids, "titles": catalogue.titles, "topics": catalogue.topics}
        needs = make_needs(info.own_needs) if info.own_needs else []
        named = {*info.show, *(find_column(name, catalogue) for need in needs for name in columns_of(need))}
        columns = {name: values.tolist() for name, values in catalogue.columns.items() if name in named}
        popularity = np.bincount(log.items, minlength=len(catalogue)).tolist() if needs else []
        counts = (
            {} if dataset.rises is None else {name: dataset.rises[catalogue.index[name]].tolist() for name in rises}
        )
        of_items = {**items, "columns": columns, "popularity": popularity, "trend": rises, "rises": counts}
        write_json(self.path / "catalogue.json", of_items)
        # As lists have them: of an item that a user comes back to the latest event alone.
        histories: dict[str, dict[str, dict[str, Any]]] = {}
        logged = set(log.users.tolist())
        for user, item, interest in zip(log.users.tolist(), log.items.tolist(), log.interest.tolist(), strict=True):
            history, item_id = histories.setdefault(dataset.user_id(user), {}), catalogue.ids[item]
            history.pop(item_id, None)
            history[item_id] = {"id": item_id, "interest": interest}
        # Users who were tested on are in no log: what their latest list knows of them.
        for lst in sorted(dataset.test, key=lambda lst: lst.time):
            if lst.user not in logged and len(lst.history):
                known = [None] * len(lst.history) if lst.history_interest is None else lst.history_interest.tolist()
                histories[dataset.user_id(lst.user)] = {
                    catalogue.ids[item]: {"id": catalogue.ids[item], "interest": interest}
                    for item, interest in zip(lst.history.tolist(), known, strict=True)
                }
        latest = {user: list(of.values())[-info.max_history :] for user, of in histories.items() if info.max_history}
        write_json(self.path / "histories.json", latest)
        save_model(self.path, model, tokenizer, info)
        settle(self.path, deep=False)

    def load(self) -> tuple[RunInfo, Any, PromptBuilder]:
        """The trained model, to be used, with how it is to be prompted."""
        info = RunInfo.load(self.path)
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.path, **OF_A_RUN)
            model = load_model(self.path, tokenizer).eval()
        except ImportError:
            raise
        except Exception as error:  # libraries have many words for a damaged file
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(f"the model of {self.path} cannot be loaded: {reason}") from error
        if torch.cuda.is_available():
            model.to("cuda")
        builder = PromptBuilder(
            tokenizer,
            **{name: getattr(info, name) for name in _OF_BUILDER},
            described_needs=make_needs(info.own_needs) if info.own_needs else (),
            one_pass=info.mode == "one-pass",
            reasoning_end=info.reasoning_end,
            max_reasoning_tokens=info.max_reasoning_tokens,
        )
        return info, model, builder

    def save_critic(self, critic: Critic) -> None:
        critic.save(self.path)

    def load_critic(self) -> Critic:
        """The run's critic; a FileNotFoundError where it has none."""
        return Critic.load(self.path, self.read_catalogue()[0])

    def read_catalogue(self) -> tuple[Catalogue, dict[str, float], dict[str, list[int]]]:
        """The items, and of what rises the trend and the two counts that it comes from, by id."""
        path = self.path / "catalogue.json"
        saved = read_json(path)
        try:
            topics = saved.get("topics", [[] for _ in saved["ids"]])  # which runs of older versions lack
            columns = {name: _column(values) for name, values in saved.get("columns", {}).items()}
            catalogue = Catalogue(tuple(saved["ids"]), tuple(saved["titles"]), tuple(map(tuple, topics)), columns)
            trend = {str(item): float(rise) for item, rise in saved["trend"].items()}
            return catalogue, trend, dict(saved.get("rises", {}))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from None

    def read_popularity(self) -> dict[str, float]:
        """How often each item was taken in the log, by id, where needs of one's own may ask for it."""
        saved = read_json(self.path / "catalogue.json")
        return dict(zip(saved["ids"], saved.get("popularity", ()), strict=False))

    def read_histories(self) -> dict[str, list[dict[str, Any]]]:
        """The last items of every logged user, ``{"id", "interest"}`` each, oldest first."""
        return read_json(self.path / "histories.json")

    def trained_users(self) -> set[str]:
        """Ids of the users that the run was trained on and not tested on; none where its folder does not say."""
        path = self.path / "data.json"
        about = read_json(path) if path.is_file() else {}
        return set(self.read_histories()) - set(about["tested"]) if "tested" in about else set()

    def write_results(
        self,
        config: Mapping[str, Any],
        results: Results,
        report: Callable[[Mapping[str, Any]], None] = lambda metrics: None,
    ) -> None:
        """Write per_list.npz (every value, for paired tests) and metrics.json (means, changes, configuration, seconds).
        The latter is the last file of a run; ``report`` is called before, with what it is going to hold."""
        arrays = _arrays(results, results.per_list)
        new = results.new_items
        if new is not None:
            arrays |= {f"new items/{name}": values for name, values in _arrays(new, new.per_list).items()}
            arrays["new items/users"] = new.users
        for asked, values in results.unseen_wordings.items():
            arrays |= {f"unseen wordings/{asked}/{name}": of_need for name, of_need in values.items()}
        np.savez_compressed(self.path / "per_list.npz", users=results.users, **arrays)
        metrics = {**results.to_json(), "config": config}
        report(metrics)
        write_json(self.path / "metrics.json", metrics, indent=2)

    def num_measured(self) -> int | str:
        """How many test lists the results are of, which are not always all that there are; "the" where none is told."""
        path = self.path / "per_list.npz"
        if not path.is_file():
            return "the"
        with np.load(path) as saved:
            return len(saved["users"])

    def write_shown(self, shown: Mapping[str, Any]) -> None:
        """Write what a report shows beside the metrics."""
        write_json(self.path / "report.json", shown)

    def save_warm_start(self, results: Results) -> None:
        """Write what the warm start is worth, which nobody can measure any more once it is trained on."""
        arrays = _arrays(results, [WARM_START])
        if results.new_items is not None:
            arrays |= {f"new items/{k}": values for k, values in _arrays(results.new_items, [WARM_START]).items()}
        np.savez_compressed(self.path / "warm_start.npz", **arrays)

    def load_warm_start(self, results: Results) -> None:
        """Read it into ``results``, where it was written."""
        path = self.path / "warm_start.npz"
        if not path.is_file():
            return
        with np.load(path) as saved:
            for name in saved.files:
                *part, system, need, metric = name.split("/")
                of = results.new_items if part else results
                if of is not None:
                    of.per_list.setdefault(system, {}).setdefault(need, {})[metric] = saved[name]


def _column(values: list[Any]) -> np.ndarray:
    """A column of a catalogue from JSON, which knows no NaN."""
    if any(isinstance(value, str) for value in values):
        return np.array(values, dtype=object)
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the options of its data beside the others."""
    others = {name: value for name, value in config.items() if name != "data_options"}
    return {**others, **config.get("data_options", {})}


def _arrays(results: Results, systems: Iterable[str]) -> dict[str, Any]:
    """The values of systems by "system/need/metric"."""
    return {
        f"{system}/{need}/{metric}": values
        for system in systems
        for need, per_metric in results.per_list[system].items()
        for metric, values in per_metric.items()
    }


def load_checkpoint(model: Any, checkpoint: Path) -> None:
    """Give ``model`` the weights of a checkpoint."""
    if has_adapters(model):
        model.load_adapter(str(checkpoint), model.active_adapter, is_trainable=True)
    else:
        model.load_state_dict(AutoModelForCausalLM.from_pretrained(checkpoint, **OF_A_RUN).state_dict())


def save_model(folder: Path, model: Any, tokenizer: Any, info: RunInfo) -> None:
    if has_adapters(model):
        save_adapters(model, folder)
    else:
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(folder / "flexrec.json", asdict(info), indent=2)
