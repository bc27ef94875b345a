"""`davae reproduce`: runs of one of the paper's tables, each done once, and their figures.

`choose` turns a table into jobs, `job` defines them and their hashes, `runs` trains, measures and times them, `tabulate`
makes the table, `figures` the paper's figures from the same runs.
"""

from davae.lab.reproduce.choose import jobs
from davae.lab.reproduce.figures import FIGURES, TRAINED_WHOLE, figure, figure_jobs
from davae.lab.reproduce.job import BaseJob, DrawnJob, EnlargedJob, Job, PlannedJob, UpgradeJob, model_digest
from davae.lab.reproduce.runs import (
    finished,
    measure_speed,
    run_job,
    trained_autoencoder,
    trained_run,
    trained_stage1,
)
from davae.lab.reproduce.tabulate import markdown, table_rows

__all__ = [
    "FIGURES",
    "TRAINED_WHOLE",
    "BaseJob",
    "DrawnJob",
    "EnlargedJob",
    "Job",
    "PlannedJob",
    "UpgradeJob",
    "figure",
    "figure_jobs",
    "finished",
    "jobs",
    "markdown",
    "measure_speed",
    "model_digest",
    "run_job",
    "table_rows",
    "trained_autoencoder",
    "trained_run",
    "trained_stage1",
]
