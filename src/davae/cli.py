"""Command line, one subcommand a verb.

The exit status is 0 when done, 2 for bad input, 130 when interrupted after saving.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
import warnings
from contextlib import nullcontext
from itertools import dropwhile

from davae.commands import verbosity
from davae.commands.analyze import analyze_app
from davae.commands.app import app_verb
from davae.commands.convert import convert_app
from davae.commands.data import data
from davae.commands.doctor import doctor
from davae.commands.evaluate import evaluate_app
from davae.commands.inspect import inspect
from davae.commands.make_data import make_data
from davae.commands.publish import apply_verb, export_verb, push_verb
from davae.commands.recipes import recipes
from davae.commands.sample import sample
from davae.commands.start import start
from davae.commands.status import status
from davae.commands.upgrade import cache_latents, train_base_verb, train_dit, train_vae, upgrade_verb
from davae.commands.upscale import upscale_verb
from davae.commands.verbs import Verbs
from davae.errors import DavaeError, Interrupted
from davae.lab.commands.bench_data import cache_encoding, data_wait, growth, scale
from davae.lab.commands.bench_models import bench_app
from davae.lab.commands.reproduce import reproduce
from davae.lab.commands.train_sr import train_sr
from davae.train.signals import leave_on_signal

app = Verbs(
    invoke_without_command=True,
    callback=start,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Twice the resolution at the same token count for pretrained latent diffusion models (DA-VAE).\n\n"
    'Start with `davae sample micro-upgraded "a red rose"`: it draws with the embedded upgrade. '
    "`davae upgrade micro --out runs/micro` makes that upgrade, in hours on two CPU cores, and writes a report.",
)
FIRST, SHARE, STEPS, MEASURE = "Start here", "Convert and share", "Single steps and other trainings", "Measure"
app.command("upgrade", rich_help_panel=FIRST)(upgrade_verb)
app.command(rich_help_panel=FIRST)(sample)
app.command("upscale", rich_help_panel=FIRST)(upscale_verb)
app.command(rich_help_panel=FIRST)(inspect)
app.command(rich_help_panel=FIRST)(recipes)
app.command(rich_help_panel=FIRST)(data)
app.command(rich_help_panel=FIRST)(status)
app.command(rich_help_panel=FIRST)(doctor)
app.command("app", rich_help_panel=FIRST)(app_verb)
app.add_typer(evaluate_app, name="evaluate", rich_help_panel=MEASURE)
app.add_typer(analyze_app, name="analyze", rich_help_panel=MEASURE)
app.command("export", rich_help_panel=SHARE)(export_verb)
app.command("apply", rich_help_panel=SHARE)(apply_verb)
app.command("push", rich_help_panel=SHARE)(push_verb)
app.command("make-data", rich_help_panel=STEPS)(make_data)
app.command("train-vae", rich_help_panel=STEPS)(train_vae)
app.command("cache-latents", rich_help_panel=STEPS)(cache_latents)
app.command("train-dit", rich_help_panel=STEPS)(train_dit)
app.command("train-base", rich_help_panel=STEPS)(train_base_verb)
app.command("train-sr", rich_help_panel=STEPS)(train_sr)
app.add_typer(convert_app, name="convert", rich_help_panel=SHARE)
app.command(rich_help_panel=MEASURE)(reproduce)
bench_app.command("cache")(cache_encoding)
bench_app.command("data")(data_wait)
bench_app.command()(scale)
bench_app.command()(growth)
app.add_typer(bench_app, name="bench", rich_help_panel=MEASURE)


def main() -> None:
    """Run a verb, with errors that a user can mend as one line and exit status 2."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads that spin starve a second process
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "info" if {"-v", "--verbose"} & set(sys.argv) else "error")
    try:
        if len(sys.argv) > 1 and not {"--help", "-h", "--version", "recipes"} & set(sys.argv):
            _quiet_libraries()
        with nullcontext() if "app" in sys.argv[1:2] else leave_on_signal():  # the page's server has its own handlers
            app()
    except Interrupted as error:
        sys.stderr.write(f"davae: {error}\n")
        sys.exit(130)
    except DavaeError as error:
        if verbosity.state.level > 0:
            traceback.print_exc()
        sys.stderr.write(f"davae: {' '.join(own_words(str(error)).split())}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the program that reads the output has ended, as `davae recipes | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
    except ModuleNotFoundError as error:
        package = (error.name or "davae").partition(".")[0]
        if package == "davae":
            raise
        sys.stderr.write(
            f"davae: package {package} is not installed here; install davae again with pip, which adds it\n"
        )
        sys.exit(2)
    except (OSError, MemoryError) as error:
        sys.stderr.write(f"davae: {explain(error)}\n")
        sys.exit(2)
    except RuntimeError as error:  # a device without memory is one of torch's
        from davae.pretrained.memory_budget import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        sys.stderr.write(f"davae: {explain(MemoryError())}\n")
        sys.exit(2)


def explain(error: OSError | MemoryError) -> str:
    """Return one line on a file that the system refuses, or on memory that it does not have."""
    if isinstance(error, MemoryError):
        return "out of memory; use a smaller model, resolution or batch"
    place = f"{error.filename}: " if error.filename is not None else ""
    return " ".join(f"{place}{error.strerror or own_words(str(error))}".split())[:500]


def own_words(message: str) -> str:
    """Return a message without the traceback that torch adds to one of a data loader's worker."""
    if not re.match(r"Caught \w+ in .*\nOriginal ", message):
        return message
    lines = message.rpartition("Traceback (most recent call last):\n")[2].splitlines()
    raised = "\n".join(dropwhile(lambda line: not line.strip() or line.startswith(" "), lines))
    return re.sub(r"^[\w.]+: ", "", raised) or message


def _quiet_libraries() -> None:
    """Show davae's own messages on standard error, and errors alone of libraries."""
    from davae.console import log_handler, quiet_model_libraries

    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[log_handler()], force=True)
    warnings.filterwarnings("ignore", category=FutureWarning)  # between libraries, nothing a user can mend
    for name in ("accelerate", "diffusers", "transformers", "huggingface_hub", "httpx", "PIL", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not {"inspect", "doctor"} & set(sys.argv[1:2]):  # known models' figures and versions are read without them
        quiet_model_libraries()
