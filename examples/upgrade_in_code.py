"""`davae upgrade micro` from Python, a few steps of each stage: enough to see every part work, not to see good images.

    python examples/upgrade_in_code.py [FOLDER]

`davae.upgrade("micro", out=folder)` runs the whole recipe and writes the report.
"""

import sys
from pathlib import Path

import davae

folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".") / "upgrade_in_code"


def watch(progress: davae.Progress) -> None:
    if progress.step == progress.max_steps:
        sys.stdout.write(f"{progress.task}: {progress.step} steps {progress.values}\n")


run = davae.UpgradeRun(
    "micro",
    out=folder,
    progress=watch,
    stage1__max_steps=4,
    stage2={"max_steps": 4, "warmup_steps": 2, "lr_cycles": 1},
    cache__variants=1,
)
run.train_dit()  # call it again: every finished step is skipped

pipeline = run.pipeline()  # a plain diffusers pipeline
pipeline("a red rose", num_inference_steps=4, max_sequence_length=1).images[0].save(folder / "rose.png")
