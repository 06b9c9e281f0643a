"""The ``flexrec`` command: train, evaluate, rank."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import IO, Any

DATASETS = ("simulated", "movielens")

TRAIN_EXAMPLES = """examples:
  flexrec train --output runs/first
  flexrec train --dataset movielens --data ml-latest-small --need interest --output runs/interest
  flexrec train --model Qwen/Qwen2.5-0.5B-Instruct --encoding index --prompts-per-step 8 --learning-rate 1e-6 \\
      --num-generations 4 --output runs/qwen
  flexrec train --model Qwen/Qwen2.5-0.5B-Instruct --encoding index --lora 16 --lora-save adapter \
      --prompts-per-step 8 --num-generations 4 --learning-rate 1e-5 --warmup-learning-rate 1e-4 --output runs/qwen-lora
"""
EVALUATE_EXAMPLES = """examples:
  flexrec evaluate --run runs/first
  flexrec evaluate --run runs/interest --dataset movielens --data ml-latest-small --need interest --json scores.json
"""
RANK_EXAMPLES = """examples:
  flexrec rank --run runs/first --input requests.jsonl --output rankings.jsonl
  flexrec rank --run runs/first --input requests.jsonl --num-beams 8 --num-ranked 5
  flexrec rank --run runs/first --input requests.jsonl --best-of 16 --temperature 0.7 --seed 1

By default the most probable item is taken at every rank. A request is one line of JSON:
  {"history": ["17", "4"], "need": "interest", "candidates": [{"id": "8", "title": "Night market 3"}, {"id": "9"}]}
"history" lists ids (or {"id", "title", "liked": false} for what was seen and not liked), oldest first;
{"user": "12"} takes a user's history from the run's log;
"need" is a name (interest, explore, trend) or an instruction in words. The answer on the same line of the output:
  {"line": 1, "ranking": [{"id": "9", "probability": 0.83}, {"id": "8", "probability": 1.0}]}
or {"line": 1, "error": "what was wrong"}.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    parser = argparse.ArgumentParser(
        prog="flexrec",
        description="Post-train a language model as a recommender, with a reward for every ranked item.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{train,evaluate,rank}")

    train = _command(commands, "train", "train a model and compare it with its base and with baselines", TRAIN_EXAMPLES)
    _add_data_options(train, default_dataset="simulated")
    train.add_argument("--output", required=True, metavar="DIR", help="folder for the model, the log and metrics.json")
    train.add_argument(
        "--model",
        default="embedded",
        metavar="NAME_OR_DIR",
        help="a causal language model by hub name or folder; default: a small one made from the catalogue",
    )
    train.add_argument(
        "--encoding",
        choices=("index", "title", "item_token"),
        help="how an answer names a candidate; default: item_token for the embedded model, else index",
    )
    train.add_argument(
        "--credit",
        default="all_actions",
        choices=("all_actions", "swap", "noncausal", "independent", "rank", "sequence", "policy"),
        help="how the metric's value is credited to ranked items (default: %(default)s)",
    )
    train.add_argument(
        "--metric",
        default="ndcg@10",
        help="the metric to maximise; ranks beyond its cutoff are not trained (%(default)s)",
    )
    train.add_argument(
        "--warmup",
        default="listwise",
        choices=("format", "listwise"),
        help="start from the format stage alone, or from listwise supervision after it (default: %(default)s)",
    )
    train.add_argument("--steps", type=_positive, metavar="N", help="steps of reinforcement")
    train.add_argument("--warmup-steps", type=_positive, metavar="N", help="steps of the format stage")
    train.add_argument("--listwise-steps", type=_positive, metavar="N", help="steps of the listwise warm start")
    train.add_argument("--prompts-per-step", type=_positive, metavar="N", help="prompts in a step")
    train.add_argument("--num-generations", type=_positive, metavar="G", help="rankings sampled per prompt")
    train.add_argument("--num-iterations", type=_positive, metavar="N", help="updates made with the same rankings")
    train.add_argument("--num-ranked", type=_positive, metavar="T", help="rank only the best T candidates")
    train.add_argument("--baseline", choices=("none", "rank", "group"), help="what rewards are compared with")
    train.add_argument("--scale", choices=("none", "rank", "group", "batch"), help="what advantages are divided by")
    train.add_argument("--uncertainty", choices=("none", "rollout", "item"), help="weight rewards by their certainty")
    train.add_argument("--learning-rate", type=float, metavar="X", help="of reinforcement")
    train.add_argument("--warmup-learning-rate", type=float, metavar="X", help="of the supervised stages")
    train.add_argument("--tilt", type=float, metavar="X", help="of all_actions: temperature of an exponential utility")
    train.add_argument("--temperature", type=float, metavar="X", help="of the policy while it is trained")
    train.add_argument(
        "--beta",
        type=float,
        metavar="X",
        help="weight of the exact KL to the policy that reinforcement starts from (paper: 0.01)",
    )
    train.add_argument("--entropy-coef", type=float, metavar="X", help="weight of the entropy bonus (paper: 0.005)")
    train.add_argument(
        "--bf16",
        action="store_true",
        help="compute in bfloat16, for GPUs; what is trained stays in float32",
    )
    train.add_argument(
        "--lora",
        type=_positive,
        metavar="RANK",
        help="train LoRA of this rank instead of the whole model, in all stages",
    )
    train.add_argument("--lora-alpha", type=_positive, metavar="N", help="LoRA counts alpha / RANK (default: 2 RANK)")
    train.add_argument(
        "--lora-targets",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="linear layers that get LoRA, such as q_proj v_proj (default: all but the output layer)",
    )
    train.add_argument(
        "--lora-save",
        default="merged",
        choices=("merged", "adapter"),
        help="save a whole model, or adapters and the name of the model they belong to (default: %(default)s)",
    )
    train.add_argument(
        "--critic",
        action=argparse.BooleanOptionalAction,
        help="fill in missing feedback by a critic; default: as the data set needs it",
    )
    train.add_argument(
        "--no-listwise-baseline",
        dest="listwise_baseline",
        action="store_false",
        default=True,
        help="do not train the listwise baseline, which takes as long as the reinforcement",
    )
    train.add_argument(
        "--profile",
        action="store_true",
        help="show where the seconds of a step of reinforcement go; also in log.jsonl, by step",
    )
    train.add_argument("--eval-every", type=_positive, metavar="N", help="log test metrics every N steps")
    train.add_argument("--save-every", type=_positive, metavar="N", help="checkpoint every N steps")
    train.add_argument("--resume", action="store_true", help="continue the interrupted run in --output")
    train.add_argument("--seed", type=int, default=0, metavar="S", help="of data, model and sampling (default: 0)")
    train.set_defaults(run=_train)

    evaluate = _command(commands, "evaluate", "measure a trained run on a data set's test users", EVALUATE_EXAMPLES)
    evaluate.add_argument("--run", dest="folder", required=True, metavar="DIR", help="folder of a finished run")
    _add_data_options(evaluate, default_dataset=None)
    evaluate.add_argument("--json", metavar="FILE", help="write the figures here as well")
    evaluate.set_defaults(run=_evaluate)

    rank = _command(commands, "rank", "rank the candidates of requests", RANK_EXAMPLES)
    rank.add_argument("--run", dest="folder", required=True, metavar="DIR", help="folder of a finished run")
    rank.add_argument("--input", required=True, metavar="FILE", help="requests, one JSON object a line; - for stdin")
    rank.add_argument("--output", metavar="FILE", help="where the answers go (default: standard output)")
    rank.add_argument("--batch-size", type=_positive, default=64, metavar="N", help="requests ranked together")
    rank.add_argument(
        "--num-ranked", type=_positive, metavar="T", help="rank the best T only (default: as in training)"
    )
    rank.add_argument(
        "--num-beams", type=_positive, default=1, metavar="B", help="search for the most probable ranking with B beams"
    )
    rank.add_argument(
        "--best-of", type=_positive, default=1, metavar="N", help="sample N rankings, answer with the most probable"
    )
    rank.add_argument(
        "--temperature", type=float, metavar="X", help="sample at this temperature (default: that of training)"
    )
    rank.add_argument(
        "--top-p", type=float, metavar="P", help="sample among the most probable items that reach P together"
    )
    rank.add_argument("--seed", type=int, default=0, metavar="S", help="of samples (default: 0)")
    rank.set_defaults(run=_rank)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code. A user's mistake is one line on standard error, never a traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    arguments = build_parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (ValueError, TypeError, OSError, ImportError) as error:
        if os.environ.get("FLEXREC_DEBUG"):
            raise
        print(f"flexrec {arguments.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        resume = "; --resume continues it" if arguments.command == "train" else ""
        print(f"\nflexrec {arguments.command}: interrupted; what was written is kept{resume}", file=sys.stderr)
        return 130


def _command(commands: Any, name: str, summary: str, examples: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_data_options(parser: argparse.ArgumentParser, default_dataset: str | None) -> None:
    parser.add_argument(
        "--dataset",
        choices=DATASETS,
        default=default_dataset,
        help=f"default: {default_dataset or 'the one of the run'}",
    )
    parser.add_argument("--data", metavar="DIR", help="the data set's folder, in its published format")
    parser.add_argument(
        "--need",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="interest, explore, trend (default: all)" if default_dataset else "default: those of the run",
    )


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return value


def _train(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from flexrec.evaluation.statistics import comparison_table
    from flexrec.experiment.stages import ExperimentConfig, run_experiment
    from flexrec.policy.distributed import process_index

    options = {k: v for k, v in vars(arguments).items() if v is not None and k not in ("command", "run", "need")}
    if arguments.need:
        options["needs"] = tuple(dict.fromkeys(arguments.need))
    if arguments.lora_targets:
        options["lora_targets"] = tuple(arguments.lora_targets)
    config = ExperimentConfig(**options)
    console = Console()
    results = run_experiment(config, say=console.print)
    if process_index() > 0:
        return 0
    users = len(set(results.users.tolist()))
    title = f"{len(results.users)} lists of {users} test users never trained on; changes in ndcg@5 against the base"
    console.print(comparison_table(results.per_list, clusters=results.users, title=title))
    console.print(f"{results.seconds['total']:.0f} seconds in all; model, log and metrics.json are in {config.output}")
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from flexrec.experiment.stages import evaluate_run

    scores = evaluate_run(Path(arguments.folder), arguments.dataset, arguments.data, arguments.need)
    table = Table(title=f"{arguments.folder}: mean over test lists [95 % interval over users]")
    table.add_column("need")
    for name in next(iter(scores.values())):
        table.add_column(name, justify="right")
    for need, values in scores.items():
        table.add_row(need, *(f"{v['mean']:.3f} [{v['low']:.3f}, {v['high']:.3f}]" for v in values.values()))
    Console().print(table)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(scores, indent=2) + "\n")
    return 0


def _rank(arguments: argparse.Namespace) -> int:
    import torch

    from flexrec.ranker import Decoding, Ranker

    names = ("num_ranked", "num_beams", "best_of", "temperature", "top_p")
    decoding = Decoding(**{name: getattr(arguments, name) for name in names})
    if arguments.input != "-" and not Path(arguments.input).is_file():
        raise FileNotFoundError(f"--input {arguments.input}: there is no such file")
    if arguments.output and Path(arguments.output).exists():
        raise FileExistsError(f"--output {arguments.output} exists: choose another file, nothing is overwritten")
    ranker = Ranker(arguments.folder)
    generator = torch.Generator(ranker.model.device).manual_seed(arguments.seed)
    failed = 0
    with ExitStack() as files:
        source: IO[str] = sys.stdin
        target: IO[str] = sys.stdout
        if arguments.input != "-":
            source = files.enter_context(open(arguments.input, encoding="utf-8"))
        if arguments.output:
            target = files.enter_context(open(arguments.output, "w", encoding="utf-8"))
        for part in _in_parts(source, arguments.batch_size):
            for answer in _answer(partial(ranker.rank, decoding=decoding, generator=generator), part):
                if "error" in answer:
                    failed += 1
                    print(f"{arguments.input}, line {answer['line']}: {answer['error']}", file=sys.stderr)
                target.write(json.dumps(answer, ensure_ascii=False) + "\n")
            target.flush()
    return 1 if failed else 0


def _in_parts(lines: IO[str], size: int) -> Any:
    """Non-empty lines with their numbers, a batch at a time."""
    part: list[tuple[int, str]] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            part.append((number, line))
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part


def _answer(
    rank: Callable[[list[dict[str, Any]]], list[dict[str, Any]]], part: list[tuple[int, str]]
) -> list[dict[str, Any]]:
    """Answers of a batch of lines, in order; a line that is no request gets its error."""
    answers: list[dict[str, Any]] = []
    requests: list[tuple[int, dict[str, Any]]] = []
    for position, (number, line) in enumerate(part):
        answers.append({"line": number})
        try:
            request = json.loads(line)
        except json.JSONDecodeError as error:
            answers[position]["error"] = f"no valid JSON: {error}"
            continue
        if not isinstance(request, dict):
            answers[position]["error"] = f"a request is a JSON object, got {type(request).__name__}"
            continue
        requests.append((position, request))
    for (position, _), answer in zip(requests, rank([r for _, r in requests]), strict=True):
        answers[position] |= answer
    return answers
