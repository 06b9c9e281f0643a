"""The studies by name."""

from __future__ import annotations

from flexrec.experiment.studies.design import Study
from flexrec.experiment.studies.of_runs import COLD, DIVERSE, MAIN, TRANSFER
from flexrec.experiment.studies.of_steps import CREDIT, CRITIC, ESTIMATOR, UNCERTAINTY

STUDIES: dict[str, Study] = {
    study.name: study for study in (MAIN, CREDIT, UNCERTAINTY, TRANSFER, DIVERSE, CRITIC, COLD, ESTIMATOR)
}
