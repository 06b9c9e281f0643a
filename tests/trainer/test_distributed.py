"""The trainers in two processes on the CPU (gloo), started as by a user; what they do is in distributed_worker.py."""

import importlib.util
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from flexrec.experiment import stages as experiment
from flexrec.experiment import training
from flexrec.experiment.config import ExperimentConfig
from flexrec.experiment.stages import run_experiment

ROOT = Path(__file__).resolve().parents[2]
CONFIGURATIONS = ROOT / "examples" / "accelerate"
WORKER = Path(__file__).with_name("distributed_worker.py")

spec = importlib.util.spec_from_file_location("distributed_worker", WORKER)
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def launch(task, engine, folder, launcher=TORCHRUN):
    """Two processes; returns what they print and how they end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        [sys.executable, "-m", *launcher, str(WORKER), task, engine, str(folder)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def accelerate_launch(configuration):
    file = CONFIGURATIONS / f"{configuration}.yaml"
    options = [
        "--config_file",
        str(file),
        "--num_processes",
        "2",
        "--mixed_precision",
        "no",
        "--main_process_port",
        "0",
    ]
    return ["accelerate.commands.launch", *options]


@pytest.fixture(scope="module", params=["ddp", "fsdp2", "zero3"])
def together(request, tmp_path_factory):
    """(engine, what two processes found)"""
    engine = request.param
    if engine == "zero3":
        pytest.importorskip("deepspeed", reason="ZeRO-3 needs deepspeed")
    folder = tmp_path_factory.mktemp(engine)
    # DeepSpeed by its configuration file is for GPUs; on the CPU the trainer's arguments ask for it.
    done = launch("cases", engine, folder, TORCHRUN if engine == "zero3" else accelerate_launch(engine))
    assert done.returncode == 0, done.stderr[-4000:]
    return engine, torch.load(folder / "found.pt", weights_only=False)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process finds for a case."""
    folder = tmp_path_factory.mktemp("alone")

    @cache
    def found(case):
        return worker.train_case(case, "one", folder / case)

    return found


def assert_same(found, expected, atol=2e-6):
    assert len(found["steps"]) == len(expected["steps"])
    for step, expected_step in zip(found["steps"], expected["steps"], strict=True):
        assert step.keys() == expected_step.keys()
        for name, value in expected_step.items():
            assert step[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert found["state"].keys() == expected["state"].keys()
    for name, value in expected["state"].items():
        torch.testing.assert_close(found["state"][name], value, rtol=1e-5, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", worker.CASES)
def test_two_processes_do_what_one_does(together, alone, case):
    """Same losses, metrics and gradient norms in every step, same parameters in the end."""
    _, found = together
    expected = alone(case)
    assert expected["moved"]
    assert_same(found[case], expected)


def test_parameters_are_spread(together):
    engine, found = together
    held = found["all_actions"]["held"]
    assert held == 1.0 if engine == "ddp" else 0.4 < held < 0.6


def test_processes_draw_different_rankings(together):
    first, second = together[1]["drawn"]
    assert first != second
    assert len({tuple(ranking) for ranking in first}) > 1


def test_resume_draws_what_an_uninterrupted_training_does(together):
    for whole, resumed in together[1]["resumed"].values():
        assert_same(resumed, whole | {"steps": whole["steps"][2:]})


def test_killed_process_ends_the_job_and_training_resumes(tmp_path):
    done = launch("killed", "ddp", tmp_path)
    assert done.returncode != 0
    assert "Signal 9 (SIGKILL)" in done.stderr
    assert "rank      : 1" in done.stderr
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]

    done = launch("interrupted", "ddp", tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    found = torch.load(tmp_path / "found.pt", weights_only=False)
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["global_step"] == 6
    whole = worker.interrupted("one", tmp_path / "whole")
    assert_same(found, whole | {"steps": whole["steps"][2:]}, atol=1e-4)  # Adam enlarges rounding


def test_command_line_writes_and_prints_once(tmp_path):
    done = launch("command line", "ddp", tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("lists of training users") == 1
    assert done.stdout.count("seconds in all") == 1
    assert done.stderr.count("Reinforcement: 2 steps in") == 1

    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for stage in ("format", "listwise warm-up", "reinforcement", "listwise", "rank_grpo"):
        steps = [line["step"] for line in lines if line["stage"] == stage and "loss" in line]
        assert steps[:2] == [1, 2]
    points = [(line["of"], line["steps"]) for line in lines if line["stage"] == "evaluation"]
    assert points[:4] == [("format", 0), ("format", 2), ("listwise warm-up", 4), ("reinforcement", 6)]
    assert points[-1] == ("rank_grpo", 6)
    stored, metrics = np.load(run / "per_list.npz"), json.loads((run / "metrics.json").read_text())
    assert len(stored["trained/interest/ndcg@5"]) == len(stored["users"]) == 33
    # Shared out among two or not, the model that was saved ranks the test lists the same way.
    with pytest.MonkeyPatch.context() as patch:
        world = {"num_users": 80, "num_items": 90, "num_topics": 4, "num_test_users": 11, "num_candidates": 8}
        real = experiment.simulate
        patch.setattr(experiment, "simulate", lambda **options: real(**{**options, **world}))
        again = experiment.evaluate_run(run)
    assert again["interest"]["ndcg@5"]["mean"] == pytest.approx(metrics["trained"]["interest"]["ndcg@5"])


def test_prompts_must_divide_among_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "num_processes", lambda: 5)
    with pytest.raises(ValueError, match=r"192 cannot be split evenly among 5 processes"):
        run_experiment(ExperimentConfig(output=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_first_version_of_fsdp_is_refused(tmp_path, monkeypatch):
    """In one process, as if accelerate had set it up."""
    trainer_class = worker.FlexRecTrainer
    monkeypatch.setattr(trainer_class, "create_accelerator_and_postprocess", first_version(trainer_class))
    with pytest.raises(ValueError, match="fsdp_version: 2"):
        worker.make_trainer(tmp_path, "one")


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(worker.FlexRecConfig, "n_gpu", 2)
    with pytest.raises(ValueError, match="accelerate launch"):
        worker.make_trainer(tmp_path, "one")


def first_version(trainer_class):
    create = trainer_class.create_accelerator_and_postprocess

    def create_and_pretend(trainer):
        create(trainer)
        trainer.is_fsdp_enabled = True
        trainer.accelerator.state.fsdp_plugin = type("Plugin", (), {"fsdp_version": 1})

    return create_and_pretend


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "deepspeed_zero3"])
def test_accelerate_reads_the_configurations(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(CONFIGURATIONS / f"{name}.yaml"))
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed_zero3": "DEEPSPEED"}
    assert config.distributed_type.value == kinds[name]
    assert config.num_processes == 8
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    if name == "deepspeed_zero3":
        file = ROOT / config.deepspeed_config["deepspeed_config_file"]
        assert json.loads(file.read_text())["zero_optimization"]["stage"] == 3


def stand_in(folder, name, text):
    path = folder / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def test_slurm_starts_a_launcher_on_each_host(tmp_path):
    """With stand-ins for Slurm's commands and for accelerate, which says what it was given."""
    from accelerate.commands.launch import launch_command_parser

    stand_in(tmp_path, "scontrol", "printf 'host1\\nhost2\\n'")
    stand_in(tmp_path, "srun", 'shift; for id in 0 1; do SLURM_NODEID=$id "$@"; done')
    stand_in(tmp_path, "accelerate", "printf '%s\\t' \"$@\"; echo")
    job = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "host[1-2]"}

    def submit():
        script = [str(ROOT / "examples/slurm/train.sbatch"), str(CONFIGURATIONS / "fsdp2.yaml"), "run", "--steps", "9"]
        environment = {**os.environ, **job, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        done = subprocess.run(
            ["bash", *script], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
        )
        commands = [line.rstrip("\t").split("\t") for line in done.stdout.splitlines()]
        assert [command[0] for command in commands] == ["launch", "launch"]
        return [launch_command_parser().parse_args(command[1:]) for command in commands]

    for rank, arguments in enumerate(submit()):
        assert (arguments.machine_rank, arguments.num_machines, arguments.num_processes) == (rank, 2, 16)
        assert (arguments.main_process_ip, arguments.main_process_port) == ("host1", 24711)
        assert arguments.no_python
        assert arguments.training_script == "flexrec"
        assert arguments.training_script_args == ["train", "--output", "run", "--save-every", "20", "--steps", "9"]
    (tmp_path / "run").mkdir()
    assert "--resume" not in submit()[0].training_script_args, "an empty folder"
    (tmp_path / "run" / "log.jsonl").write_text("")
    assert "--resume" in submit()[0].training_script_args
