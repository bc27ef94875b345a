"""`davae reproduce`: the runs of one of the paper's tables, each done once, and the table they make.

`choose` reads a table into jobs, `job` says what a job's figures hang on, `runs` trains and measures, `plans` tells what that
takes, `speed` times the rows, `tabulate` makes the table, `figures` the paper's figures from the same runs.
"""

from davae.lab.reproduce.choose import jobs
from davae.lab.reproduce.figures import FIGURES, TRAINED_WHOLE, figure, figure_jobs
from davae.lab.reproduce.job import BaseJob, DrawnJob, EnlargedJob, Job, PlannedJob, UpgradeJob, model_digest
from davae.lab.reproduce.plans import cost, missing_parts
from davae.lab.reproduce.runs import finished, run_job, trained_autoencoder, trained_run, trained_stage1
from davae.lab.reproduce.speed import measure_speed
from davae.lab.reproduce.tabulate import markdown, spread, table_rows

__all__ = [
    "FIGURES",
    "TRAINED_WHOLE",
    "BaseJob",
    "DrawnJob",
    "EnlargedJob",
    "Job",
    "PlannedJob",
    "UpgradeJob",
    "cost",
    "figure",
    "figure_jobs",
    "finished",
    "jobs",
    "markdown",
    "measure_speed",
    "missing_parts",
    "model_digest",
    "run_job",
    "spread",
    "table_rows",
    "trained_autoencoder",
    "trained_run",
    "trained_stage1",
]
