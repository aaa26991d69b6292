"""What it takes to import the package, beside `import torch`: each in Pythons of their own, taking turns. On Linux.

python benchmarks/imports.py
python benchmarks/imports.py --repeats 15
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

from machine import describe

STATEMENTS = {
    "import torch": "import torch",
    "import lightning_spectral": "import lightning_spectral",
    "from lightning_spectral import measure": "from lightning_spectral import measure",
    "from lightning_spectral import Watch": "from lightning_spectral import Watch",
    "import lightning.pytorch": "import lightning.pytorch",
    "from lightning_spectral import SpectralMonitor": "from lightning_spectral import SpectralMonitor",
    "lightning-spectral --help": (
        "import contextlib, io\nfrom lightning_spectral.cli import main\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()): main(['--help'])"
    ),
}
MEASURE = """
import sys, time
from pathlib import Path
began = time.process_time(), time.perf_counter()
exec(sys.argv[1])
processor, wall = time.process_time() - began[0], time.perf_counter() - began[1]
(peak,) = [line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line]
print(processor, wall, int(peak) / 1024)
"""


def once(statement: str) -> list[float]:
    """Return processor seconds, wall seconds and the largest memory in MiB of a fresh Python."""
    command = [sys.executable, "-c", MEASURE, statement]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [float(number) for number in printed.split()[-3:]]


def main() -> None:
    """Print one row per statement, medians over the repeats."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    print(describe(), "\n")
    runs = [{name: once(statement) for name, statement in STATEMENTS.items()} for _ in range(repeats)]
    print(f"{'':<46}{'processor':>10}{'wall':>9}{'memory':>10}{'of import torch':>17}")
    for name in STATEMENTS:
        processor, wall, memory = (statistics.median(run[name][column] for run in runs) for column in range(3))
        ratio = statistics.median(run[name][0] / run["import torch"][0] for run in runs)
        print(f"{name:<46}{processor:>8.2f} s{wall:>7.2f} s{memory:>6.0f} MiB{ratio:>16.2f}x")


if __name__ == "__main__":
    main()
