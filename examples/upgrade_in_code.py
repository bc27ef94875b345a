"""`davae upgrade micro` from Python, a few steps of each stage: enough to see every part work, not to see good pictures.

    python examples/upgrade_in_code.py [FOLDER]
"""

import sys
from pathlib import Path

from diffusers import StableDiffusion3Pipeline

from davae.recipes import load_recipe
from davae.train.loop import Progress
from davae.train.upgrade import Upgrade

folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".") / "upgrade_in_code"
recipe = load_recipe(
    "micro",
    ["stage1.max_steps=4", "stage2.max_steps=4", "stage2.warmup_steps=2", "stage2.lr_cycles=1", "cache.variants=1"],
)


def watch(progress: Progress) -> None:
    if progress.step == progress.max_steps:
        sys.stdout.write(f"{progress.task}: {progress.step} steps {progress.values}\n")


finished = Upgrade(recipe, folder, watch).run()  # run it again: every finished step is skipped

pipeline = StableDiffusion3Pipeline.from_pretrained(finished)  # plain diffusers
pipeline("a red rose", num_inference_steps=4, max_sequence_length=1).images[0].save(folder / "rose.png")
