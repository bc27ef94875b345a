"""Count the figures of `davae inspect` for known models into src/davae/zoo/counts.json.

    python benchmarks/counts.py                          # all that the file has, and the embedded model
    python benchmarks/counts.py sd35-medium@1024 sdxl    # these (at a resolution), the others stay as they are

A model takes one to three minutes of CPU. The file is written after each.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

from davae.plan.counted import SHIPPED, config_fingerprint, count_figures, request_key

ALWAYS = ("micro", "sd35-medium@1024")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="MODEL or MODEL@RESOLUTION")
    options = parser.parse_args()
    found = json.loads(SHIPPED.read_text()) if SHIPPED.exists() else {}
    known = [f"{values['model']}@{values['resolution']}" for values in found.values()]
    for name in options.models or dict.fromkeys([*ALWAYS, *known]):
        model, _, size = name.partition("@")
        start = time.process_time()
        configs, resolution = config_fingerprint(model), int(size) if size else None
        if configs is None:
            parser.error(f"{model} is neither embedded nor a preset")
        values = count_figures(model, resolution, 2, None, None, lambda part: None)
        for asked in {resolution, values["resolution"]}:
            found[request_key(configs, asked, 2, None)] = values
        SHIPPED.write_text(json.dumps(dict(sorted(found.items())), indent=0) + "\n", encoding="utf-8")
        print(f"{name}: {time.process_time() - start:.0f} s of CPU", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
