"""The pictures and the tables of a run, finished or not.

python -m train.report RUN [--out FILE.png] [--json]

Reads config.yaml, metrics.jsonl, evaluations.jsonl, starts.jsonl and exit.json of the run directory, draws
RUN/report.png, writes RUN/report.html (one file that needs no network) and prints one screen.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from common.config import path_argument
from common.errors import ArgumentParser, ConfigError, Exit, run_main
from train.report.record import read_run, summarise


def _parse() -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m train.report", description=__doc__)
    parser.add_argument("run", type=path_argument, metavar="RUN", help="a run directory")
    parser.add_argument(
        "--out", type=path_argument, metavar="FILE.png", help="picture, page beside it (default: RUN/report.png)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser.parse_args()


def main() -> int:
    arguments = _parse()
    picture: Path = arguments.out or arguments.run / "report.png"
    if picture.suffix != ".png":
        raise ConfigError("--out", picture, "must end in .png", "the page gets the same name with .html")
    record = read_run(arguments.run)

    from train.report.figures import draw
    from train.report.page import write_page
    from train.report.screen import show

    page = picture.with_suffix(".html")
    summary = {**summarise(record), "picture": str(picture), "page": str(page)}
    draw(record, picture)
    write_page(record, summary, page)
    if arguments.json:
        print(json.dumps(summary, indent=1, ensure_ascii=False))
    else:
        show(record.config, summary)
    return Exit.DONE


if __name__ == "__main__":
    run_main(main)
