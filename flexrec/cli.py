"""The ``flexrec`` command: train, evaluate, rank, serve; what is in a data set; studies."""

from __future__ import annotations

import argparse
import codecs
import errno
import json
import math
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from flexrec.decoding.options import Decoding
from flexrec.experiment.arguments import add_data_options, add_options, given, given_data_options, read_options
from flexrec.experiment.config import ExperimentConfig
from flexrec.experiment.studies.catalogue import STUDIES
from flexrec.experiment.studies.options import ALL, StudyOptions
from flexrec.serving.options import ServeOptions
from flexrec.serving.requests import parse_json

MISTAKES = (ValueError, TypeError, OSError, ImportError)  # a user's: one line, no traceback

TRAIN_EXAMPLES = """examples:
  flexrec train --output runs/first
  flexrec train --dataset movielens --data ml-latest-small --need interest --output runs/interest
  flexrec train --dataset interactions --data shop --columns user=customer,item=sku --candidates 20 --output runs/shop
  flexrec train --config runs/first/config.yaml --seed 1 --output runs/second
  flexrec train --need interest explore "0.7 interest + 0.3 explore" --output runs/mixed
  flexrec train --dataset interactions --data shop --needs needs.yaml --need "cheap but good" --output runs/cheap
  flexrec train --model Qwen/Qwen2.5-0.5B-Instruct --encoding index --prompts-per-step 8 --learning-rate 1e-6 \\
      --num-generations 4 --output runs/qwen
  flexrec train --model Qwen/Qwen2.5-0.5B-Instruct --encoding index --lora 16 --lora-save adapter \\
      --prompts-per-step 8 --num-generations 4 --learning-rate 1e-5 --warmup-learning-rate 1e-4 --output runs/qwen-lora
"""
EVALUATE_EXAMPLES = """examples:
  flexrec evaluate --run runs/first
  flexrec evaluate --run runs/interest --dataset movielens --data ml-latest-small --need interest --json scores.json
"""
DESCRIBE_EXAMPLES = """examples:
  flexrec data describe --dataset movielens --data ml-latest-small
  flexrec data describe --dataset interactions --data shop --gain threshold --figure shop.png
"""
STUDY_EXAMPLES = """examples:
  flexrec study credit --output studies --jobs 2 --data movielens=ml-latest-small kuairec=kuairec
  flexrec study credit --output studies --jobs 2 --retry
  flexrec study all --output short --short
"""
REPORT_EXAMPLES = """examples:
  flexrec report runs/first
  flexrec report runs/interest-seed0 runs/interest-seed1 --output compared.html
  flexrec report runs/first --png figures

The page is one file that asks nobody for anything. A run that is not finished is shown as far as its log goes.
"""
RANK_EXAMPLES = """examples:
  flexrec rank --run runs/first --input requests.jsonl --output rankings.jsonl
  flexrec rank --run runs/first --input requests.jsonl --num-beams 8 --num-ranked 5
  flexrec rank --run runs/first --input requests.jsonl --best-of 16 --temperature 0.7 --seed 1

By default the most probable item is taken at every rank. A request is one line of JSON:
  {"history": ["17", "4"], "need": "interest", "candidates": [{"id": "8", "title": "Night market 3"}, {"id": "9"}]}
"history" lists ids (or {"id", "title", "liked": false} for what was seen and not liked, or with "interest" from 0 to 1,
null where it is not known), oldest first; {"user": "12"} takes a user's history from the run's log;
"need" is a name (interest, explore, trend), names with weights ("0.7 interest + 0.3 explore") or an instruction in
words; with "top_n" the best so many are answered. Items that the run does not know come with "title" and "topics" (a
list), or stand in the table of --items. The answer on the same line of the output, with a "warning" where the run was
not trained on such a need:
  {"line": 1, "ranking": [{"id": "9", "probability": 0.8, "score": 0.8}, {"id": "8", "probability": 1.0, "score": 0.2}]}
where "probability" is that of the item at its rank, given those above it, and "score" that of being the first of all,
which can be compared down the list;
or {"line": 1, "error": "what was wrong"}.
"""

SERVE_EXAMPLES = """examples:
  flexrec serve --run runs/first
  flexrec serve --run runs/first --host 0.0.0.0 --port 8080 --max-batch 64
  curl http://127.0.0.1:8000/v1/rerank -H "Content-Type: application/json" \\
      -d '{"query": "interest", "documents": ["Night market 3", "Deep sky comets"], "top_n": 1}'

A page to try it is at /. POST /rank takes what flexrec rank takes, /v1/rerank and /v2/rerank what clients of Cohere,
Jina and vLLM send; /health and /metrics are for who watches it. Whoever reaches the address may ask: put what checks
that in front.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    parser = argparse.ArgumentParser(
        prog="flexrec",
        description="Post-train a language model as a recommender, with a reward for every ranked item.",
    )
    parser.add_argument("--version", action="version", version=f"flexrec {version('flexrec')}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="{train,evaluate,report,rank,serve,data,study}"
    )

    train = _command(commands, "train", "train a model and compare it with its base and with baselines", TRAIN_EXAMPLES)
    train.add_argument(
        "--config",
        metavar="FILE",
        help="take options from a YAML file, such as the config.yaml of a run; what stands on the command line comes "
        "before it (default: none)",
    )
    add_options(train, ExperimentConfig, required=False)  # --output may stand in the file
    add_data_options(train)
    train.set_defaults(run=_train)

    evaluate = _command(commands, "evaluate", "measure a trained run on a data set's test users", EVALUATE_EXAMPLES)
    evaluate.add_argument("--run", dest="folder", required=True, metavar="DIR", help="folder of a finished run")
    add_options(evaluate, ExperimentConfig, ("dataset", "data", "needs", "needs_file"), default="that of the run")
    add_data_options(evaluate, default="that of the run")
    evaluate.add_argument("--json", metavar="FILE", help="write the figures here as well (default: only show them)")
    evaluate.set_defaults(run=_evaluate)

    report = _command(commands, "report", "show what runs came to, on a page of their own", REPORT_EXAMPLES)
    report.add_argument("folders", nargs="+", metavar="RUN", help="folder of a run; of several, all against the first")
    report.add_argument(
        "--output", metavar="FILE", help="the page (default: report.html in the folder of one run, or here of several)"
    )
    report.add_argument("--png", metavar="DIR", help="a folder for pictures of the figures as well (default: none)")
    report.set_defaults(run=_report)

    rank = _command(commands, "rank", "rank the candidates of requests", RANK_EXAMPLES)
    rank.add_argument("--run", dest="folder", required=True, metavar="DIR", help="folder of a finished run")
    rank.add_argument("--input", required=True, metavar="FILE", help="requests, one JSON object a line; - for stdin")
    rank.add_argument(
        "--items",
        metavar="FILE",
        help="a table of items (id, title, categories) beside those of the run (default: none)",
    )
    rank.add_argument("--output", metavar="FILE", help="where the answers go (default: standard output)")
    rank.add_argument(
        "--batch-size", type=_positive, default=64, metavar="N", help="requests ranked together (default: %(default)s)"
    )
    add_options(rank, Decoding)
    rank.add_argument("--seed", type=int, default=0, metavar="S", help="of samples (default: %(default)s)")
    rank.set_defaults(run=_rank)

    serve = _command(commands, "serve", "answer requests over HTTP, with a page to try it", SERVE_EXAMPLES)
    serve.add_argument(
        "--run", dest="folder", required=True, metavar="DIR", help="folder of a finished run, or owner/name at the hub"
    )
    add_options(serve, ServeOptions)
    serve.set_defaults(run=_serve)

    data = commands.add_parser("data", help="say what is in a data set", description="Say what is in a data set.")
    of_data = data.add_subparsers(dest="of_data", required=True, metavar="{describe}")
    describe = _command(of_data, "describe", "count what is in a data set, as training reads it", DESCRIBE_EXAMPLES)
    add_options(describe, ExperimentConfig, ("dataset", "data", "needs", "needs_file", "seed"))
    add_data_options(describe)
    describe.add_argument("--figure", metavar="FILE", help="draw it here as well, a .png, .pdf or .svg (default: none)")
    describe.set_defaults(run=_describe, command="data describe")

    study = _command(commands, "study", "run a study, or what is left of it, and write what it says", STUDY_EXAMPLES)
    study.add_argument("names", nargs="+", metavar="NAME", help=f"{', '.join(STUDIES)}, or {ALL}")
    add_options(study, StudyOptions)
    study.set_defaults(run=_study)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code. A user's mistake is one line on standard error, never a traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    arguments = build_parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except Exception as error:
        full = _disk_is_full(error, getattr(arguments, "output", None))
        if os.environ.get("FLEXREC_DEBUG") or not (full or isinstance(error, MISTAKES)):
            raise
        said = f"no space is left on the disk{_kept(arguments)}" if full else error
        print(f"flexrec {arguments.command}: error: {said}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nflexrec {arguments.command}: interrupted{_kept(arguments)}", file=sys.stderr)
        return 130


def _program() -> str:
    """What calls this command again: its path, where a shell would not find it by its name."""
    called = Path(sys.argv[0])
    return shlex.quote(str(called)) if called.name == "flexrec" and shutil.which("flexrec") is None else "flexrec"


def _kept(arguments: argparse.Namespace) -> str:
    output = getattr(arguments, "output", None)
    again = ""
    if arguments.command == "train" and output is not None:
        if not (Path(output) / "experiment.json").is_file():
            return "; nothing was written yet: the same command begins again"
        again = f"; to continue: {_program()} train --resume --output {shlex.quote(output)}"
    elif arguments.command == "study":
        again = "; the same command goes on with it"
    return f"; what was written is kept{again}"


def _disk_is_full(error: BaseException, output: str | None) -> bool:
    """Whether a write failed for want of space; libraries say so in ways of their own, or say something else."""
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return True
    folder = Path(output or ".").absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return isinstance(error, RuntimeError) and shutil.disk_usage(existing).free < 1 << 20


def _command(commands: Any, name: str, summary: str, examples: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _silence_bars() -> None:
    """Libraries draw bars of their own, of milliseconds; what a hub sends takes long, and is shown on a terminal."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    logging.disable_progress_bar()
    if sys.stderr.isatty() and "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ:
        enable_progress_bars()


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return value


def _train(arguments: argparse.Namespace) -> int:
    options = {**given(arguments, ExperimentConfig), "data_options": given_data_options(arguments)}
    if arguments.config is not None:
        options = _before(options, read_options(Path(arguments.config)))
    if "output" not in options:
        raise ValueError("--output DIR is needed: the folder for the model, the log and metrics.json")
    arguments.output = options["output"]

    from rich.console import Console  # heavy, as all that follows: not before a mistake is told

    from flexrec.experiment.report.page import PAGE
    from flexrec.experiment.run_folder import RunFolder
    from flexrec.experiment.stages import run_experiment
    from flexrec.policy.distributed import leave, process_index

    if options.get("resume"):  # what is not said is as it was
        begun = RunFolder(arguments.output).read_config()
        if not begun and not options["data_options"] and set(options) <= {"output", "resume", "data_options"}:
            # By defaults it would be a run on simulated data, which nobody asked for.
            raise FileNotFoundError(
                f"--resume: there is no run in --output {arguments.output} to continue: is it another folder? To begin "
                f"a run, give its options, with --resume or without"
            )
        options = _before(options, begun)
    config = ExperimentConfig(**options)
    console = Console()
    _silence_bars()
    results = run_experiment(config, say=console.print)
    writes = process_index() == 0
    leave()
    if config.dry_run or not writes:
        return 0
    console.print(results.table(width=console.width))
    for sentence in results.summary():
        console.print(sentence)
    if len(results.unseen_wordings) > 1:
        console.print(results.table_of_wordings())
    if (new := results.new_items) is not None:
        console.print(new.table(f"Among items that were never trained on: {len(new.users)} lists", console.width))
    console.print(f"{results.seconds['total']:.0f} seconds in all; model, log and metrics.json are in {config.output}")
    if (page := Path(config.output) / PAGE).is_file():
        console.print(f"Look at {page} in a browser. What to do next:", soft_wrap=True)
        for line in (
            f"rank --run {config.output} --input requests.jsonl",
            f"serve --run {config.output}  # over HTTP, and a page to try it",
            f"report {config.output} ANOTHER_RUN  # beside each other",
        ):
            console.print(f"  {_program()} {line}", soft_wrap=True, highlight=False)
    return 0


def _before(options: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """These options, and of others what they do not say; of options of data sets only those of the same one."""
    of_data, theirs = dict(options["data_options"]), others.get("dataset")
    if theirs in (None, options.get("dataset", theirs)):
        of_data = {**others.get("data_options", {}), **of_data}
    return {**others, **options, "data_options": of_data}


def _evaluate(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from flexrec.evaluation.statistics import ONE_USER
    from flexrec.experiment.stages import evaluate_run
    from flexrec.trainer.callbacks import to_json

    options = given(arguments, ExperimentConfig)
    if of_data := given_data_options(arguments):
        options["data_options"] = of_data
    _silence_bars()
    scores = evaluate_run(Path(arguments.folder), **options)
    names = list(dict.fromkeys(name for values in scores.values() for name in values))
    alone = any(math.isnan(v["low"]) for values in scores.values() for v in values.values())
    interval = f"({ONE_USER})" if alone else "[95 % interval over users]"
    title, console = f"{arguments.folder}: mean over test lists {interval}", Console()
    table = Table("need", title=title)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for need, values in scores.items():
        table.add_row(need, *(_with_interval(values[name]) if name in values else "" for name in names))
    if Console(width=10_000).measure(table).maximum > console.width:  # a narrow terminal gets a row for each number
        table = Table("need", "metric", "mean", title=title)
        for need, values in scores.items():
            table.add_section()
            for name, value in values.items():
                table.add_row(need, name, _with_interval(value))
    console.print(table)
    if arguments.json:
        Path(arguments.json).write_text(to_json(scores, 2) + "\n")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from flexrec.experiment.report.page import PAGE, write_report

    folders = [Path(folder) for folder in arguments.folders]
    page = Path(arguments.output or (folders[0] / PAGE if len(folders) == 1 else PAGE))
    for sentence in write_report(folders, page, None if arguments.png is None else Path(arguments.png)):
        print(sentence)
    print(f"the report is {page}")
    return 0


def _with_interval(value: Mapping[str, float]) -> str:
    interval = "" if math.isnan(value["low"]) else f" [{value['low']:.3f}, {value['high']:.3f}]"
    return f"{value['mean']:.3f}{interval}"


def _describe(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from flexrec.data.describe import describe, draw_description
    from flexrec.experiment.needs import known_needs
    from flexrec.experiment.stages import load_dataset
    from flexrec.task.mixtures import find_need
    from flexrec.task.own_needs import check_needs

    options = {**given(arguments, ExperimentConfig), "data_options": given_data_options(arguments)}
    config = ExperimentConfig(output="", **options)
    dataset = load_dataset(config.dataset, config.data, config.seed, config.data_options)
    known = known_needs(config.needs_file)
    needs = [find_need(name, known) for name in config.needs or known]
    console = Console()
    for note in (*dataset.notes, *check_needs(needs, dataset.catalogue)):
        console.print(note, markup=False, highlight=False)
    table = Table("", "to train on", "to test on", title=config.data or config.dataset)
    for row in describe(dataset, needs):
        table.add_row(*map(escape, row))
    console.print(table)
    if arguments.figure:
        draw_description(dataset, arguments.figure)
    return 0


def _study(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from flexrec.experiment.studies.study import run_studies

    console = Console()
    options = StudyOptions(**given(arguments, StudyOptions) | {"names": tuple(arguments.names)})
    done = run_studies(options, lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True))
    return 0 if done else 1


def _rank(arguments: argparse.Namespace) -> int:
    import torch

    from flexrec.data.items import read_catalogue
    from flexrec.serving.ranker import Ranker

    decoding = Decoding(**given(arguments, Decoding))
    if arguments.input != "-" and not Path(arguments.input).is_file():
        raise FileNotFoundError(f"--input {arguments.input}: there is no such file")
    if arguments.output and Path(arguments.output).exists():
        raise FileExistsError(f"--output {arguments.output} exists: choose another file, nothing is overwritten")
    _silence_bars()
    ranker = Ranker(arguments.folder, None if arguments.items is None else read_catalogue(Path(arguments.items)))
    generator = torch.Generator(ranker.model.device).manual_seed(arguments.seed)
    failed = 0
    with ExitStack() as files:
        source: IO[bytes] = sys.stdin.buffer
        target: IO[bytes] = sys.stdout.buffer
        if arguments.input != "-":
            source = files.enter_context(open(arguments.input, "rb"))
        if arguments.output:
            target = files.enter_context(open(arguments.output, "xb"))
        for part in _in_parts(source, arguments.batch_size):
            answers = _answer(partial(ranker.rank, decoding=decoding, generator=generator), part)
            for answer in answers:
                if "error" in answer:
                    failed += 1
                    print(f"{arguments.input}, line {answer['line']}: {answer['error']}", file=sys.stderr)
            # UTF-8 whatever the locale, and whole lines only, however the process may end.
            lines = [json.dumps(answer, ensure_ascii=False, allow_nan=False) + "\n" for answer in answers]
            target.write("".join(lines).encode("utf-8", "backslashreplace"))
            target.flush()
    return 1 if failed else 0


def _serve(arguments: argparse.Namespace) -> int:
    from flexrec.serving.server import serve

    _silence_bars()
    serve(arguments.folder, ServeOptions(**given(arguments, ServeOptions)))
    return 0


MAX_LINE = 16 * 2**20  # bytes of a request


def _in_parts(source: IO[bytes], size: int) -> Iterator[list[tuple[int, bytes | None]]]:
    """Lines that are not empty with their numbers, a batch at a time; None in place of one that is too long to hold."""
    part: list[tuple[int, bytes | None]] = []
    number = 0
    while line := source.readline(MAX_LINE + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        whole = len(line) <= MAX_LINE
        while not whole and not line.endswith(b"\n") and (line := source.readline(MAX_LINE)):
            pass
        if not whole or line.strip():
            part.append((number, line if whole else None))
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part


def _answer(
    rank: Callable[[list[dict[str, Any]]], list[dict[str, Any]]], part: Sequence[tuple[int, bytes | None]]
) -> list[dict[str, Any]]:
    """Answers of a batch of lines, in order; a line that is no request gets its error."""
    answers: list[dict[str, Any]] = []
    requests: list[tuple[int, dict[str, Any]]] = []
    for position, (number, line) in enumerate(part):
        answers.append({"line": number})
        try:
            requests.append((position, _request(line)))
        except ValueError as error:
            answers[position]["error"] = str(error)
    for (position, _), answer in zip(requests, rank([r for _, r in requests]), strict=True):
        answers[position] |= answer
    return answers


def _request(line: bytes | None) -> dict[str, Any]:
    """The request that a line holds; a ValueError says why it holds none."""
    if line is None:
        raise ValueError(f"a request has at most {MAX_LINE} bytes")
    request = parse_json(line)
    if not isinstance(request, dict):
        raise ValueError(f"a request is a JSON object, got {type(request).__name__}")
    return request


if __name__ == "__main__":
    sys.exit(main())
