"""The table of model families, from `backbones/families` and the outcome of the conformance tests.

    .venv/bin/python docs/make_family_table.py --run      # runs the tests (minutes), keeps their outcome, writes the table
    .venv/bin/python docs/make_family_table.py --run SD3Transformer2DModel      # only those of the classes named
    .venv/bin/python docs/make_family_table.py            # writes the table from the outcome that was kept last

The outcome is kept in docs/results/families.json: class -> test -> passed or failed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "families")]

from cases import BUILDERS, CASES  # noqa: E402

import davae  # noqa: E402
from davae.backbones.families import FAMILIES, supported  # noqa: E402
from davae.backbones.family import Family  # noqa: E402
from davae.zoo.presets import presets  # noqa: E402

TARGET = ROOT / "docs" / "families-table.md"
OUTCOMES = ROOT / "docs" / "results" / "families.json"
EXPANDING = {
    "step 0, gradients, round trip": "step_zero_gradients_and_round_trip",
    "LoRA, full": "lora_and_full_tuning",
}
UPGRADING = {"upgrade, stock pipeline": "upgrade_gives_a_stock_pipeline_at_the_doubled_size"}
HEADINGS = {"upgrade, stock pipeline": "upgrade"}  # of labels that families.json keeps as they were
OWN_FILES = {  # families whose tests are not parametrised with the others
    "SD3Transformer2DModel": {"upgrade, stock pipeline": "tests/runs/test_training.py"},
    "LightningDiT": {
        "step 0, gradients, round trip": "tests/backbones/test_lightning_dit.py",
        "LoRA, full": "tests/backbones/test_lightning_dit.py",
        "upgrade, stock pipeline": "tests/sample/test_class_conditional.py",
    },
}
SHARED_FILES = ("tests/families/test_families.py", "tests/families/test_family_upgrades.py")

Outcomes = dict[str, dict[str, str]]


def run(names: list[str]) -> Outcomes:
    """Run the conformance tests of these classes and return the outcome of each."""
    own = sorted({path for name in names for path in OWN_FILES.get(name, {}).values()})
    shared = [
        f"{path}::test_{test}[{name}]"
        for path, tests in zip(SHARED_FILES, (EXPANDING, UPGRADING), strict=True)
        for test in tests.values()
        for name in names
        if (name in CASES if path == SHARED_FILES[0] else name in BUILDERS)
    ]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        arguments = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}", *shared, *own]
        subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=ROOT, check=False)
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    outcomes: Outcomes = {name: {} for name in names}
    for case in cases:
        found = re.fullmatch(r"test_(\w+)\[(\w+)\]", case.get("name", ""))
        for label, test in {**EXPANDING, **UPGRADING}.items():
            if found and found[1] == test and found[2] in outcomes:
                outcomes[found[2]][label] = outcome(case)
    for name in outcomes:
        for label, path in OWN_FILES.get(name, {}).items():
            module = path.removesuffix(".py").replace("/", ".")
            worst = {outcome(case) for case in cases if case.get("classname") == module}
            outcomes[name][label] = next((o for o in ("failed", "skipped", "passed") if o in worst), "not run")
    return outcomes


def outcome(case: ElementTree.Element) -> str:
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    return "skipped" if case.find("skipped") is not None else "passed"


def page(outcomes: Outcomes) -> str:
    """Return the whole file."""
    labels = [*EXPANDING, *UPGRADING]
    headings = [HEADINGS.get(label, label) for label in labels]
    trained = [row for row in supported() if row.trains]
    stock = sum(not pipelines(row)[0].startswith("davae.") for row in trained)
    lines = [
        "# Model families",
        "",
        f"davae knows {len(FAMILIES)} transformer classes. `davae upgrade` trains {len(trained)} of them. "
        "`expand_transformer` widens the others,",
        "and `davae upgrade` refuses them by name.",
        "",
        "`docs/make_family_table.py` makes this page from `backbones/families` and the outcome of the conformance tests on",
        "tiny models of the real classes.",
        "",
        f"An upgraded folder of {stock} classes runs in the unmodified pipeline of diffusers. Those of the other "
        f"{len(trained) - stock} name a",
        "class of davae. diffusers has no pipeline for LightningDiT; the rest are small subclasses, because diffusers' own",
        "has a size or a number of channels in its code ([reasons](families.md)). After `import davae` a folder opens by the",
        "class in the table: `FluxPipeline.from_pretrained` of diffusers, `davae.DetailZImagePipeline.from_pretrained`.",
        "`DiffusionPipeline.from_pretrained` finds the classes of diffusers alone.",
        "",
        f"| transformer | pipeline of an upgraded folder | drawn from | {' | '.join(headings)} | presets |",
        f"|---|---|---|{'---|' * len(labels)}---|",
    ]
    for name, row in sorted(FAMILIES.items(), key=lambda item: (not item[1].trains, item[0])):
        cells = [outcomes.get(name, {}).get(label, "not run") for label in labels]
        if not row.trains:
            cells[-1] = "not trained yet"
        parts = {
            preset.name: {part["_class_name"] for part in preset.parts.values()} for preset in presets().values()
        }
        named = ", ".join(f"`{preset}`" for preset, classes in parts.items() if name in classes) or "-"
        lines.append(
            f"| `{name}` | {', '.join(f'`{kind}`' for kind in pipelines(row))} | {row.condition} | "
            f"{' | '.join(cells)} | {named} |"
        )
    return "\n".join(lines) + "\n"


def pipelines(row: Family) -> list[str]:
    """Return the pipeline classes that upgraded folders of a family name, those of davae with its name before them."""
    names = row.upgraded_pipelines or (row.pipeline,)
    return [f"davae.{name}" if name in davae.__all__ else name for name in names]


def main() -> None:
    outcomes = json.loads(OUTCOMES.read_text(encoding="utf-8"))
    if "--run" in sys.argv:
        names = sys.argv[sys.argv.index("--run") + 1 :] or list(FAMILIES)
        outcomes = {name: outcomes.get(name, {}) for name in FAMILIES} | run(names)
        OUTCOMES.write_text(json.dumps(outcomes, indent=1) + "\n", encoding="utf-8")
    TARGET.write_text(page(outcomes), encoding="utf-8")


if __name__ == "__main__":
    main()
