from .config import ExperimentConfig as ExperimentConfig
from .results import Results as Results
from .run_folder import RunFolder as RunFolder
from .run_folder import RunInfo as RunInfo
from .stages import evaluate_run as evaluate_run
from .stages import load_dataset as load_dataset
from .stages import run_experiment as run_experiment
