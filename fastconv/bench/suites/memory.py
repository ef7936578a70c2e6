"""The peak memory of a training step on a CPU, in a process of its own: `python -m fastconv.bench.suites.memory`.

What is told is how far the process's resident memory grows, at its highest, above what it was with the net and the batch
in place: maps and gradients, the optimizer's state, and whatever kernels and libraries allocate, by whichever allocator.
Pages that an allocator keeps count as long as it keeps them. Linux tells both in /proc/self/status; getrusage's ru_maxrss
would not do, as it starts with that of the process which started this one.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch

from fastconv.bench.suites.cases import CPU, CPU_QUICK, Net
from fastconv.bench.suites.net_trials import Batch, Runner
from fastconv.models import recipe_net

_STEPS = 3
_MODULE = "fastconv.bench.suites.memory"


def peak(net: Net, dtype: str, provider: str) -> int:
    """Bytes, measured in a new process.

    Raises:
        RuntimeError: that process failed; with what it said.
    """
    arguments = ["--case", net.case, "--dtype", dtype, "--provider", provider, "--threads", str(torch.get_num_threads())]
    command = [sys.executable, "-m", _MODULE, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{_MODULE} of {net.case} ({provider}) failed:\n{done.stderr}")
    return int(done.stdout)


def _measure(net: Net, dtype: str, provider: str) -> int:
    small = Net("small", lambda layers: recipe_net(8, layers=layers, width=16, max_width=16), 2, 8)
    device = torch.device("cpu")
    for shown in (small, net):  # the first step of all loads code, which is not a step's memory
        runner = Runner(shown, dtype, provider, shown.build("torch").state_dict(), True, device)
        batch = Batch(shown, next(runner.model.parameters()).dtype, 10, device)
        before = resident("VmRSS")
        for _ in range(_STEPS):
            runner.step(batch)
    return resident("VmHWM") - before


def resident(name: str) -> int:
    """VmRSS, this process's bytes in memory now, or VmHWM, the most that they were. Of Linux."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith(f"{name}:"))
    return int(kilobytes) * 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    nets = {net.case: net for net in (*CPU_QUICK.nets, *CPU.nets)}
    parser.add_argument("--case", choices=nets, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--provider", required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(_measure(nets[options.case], options.dtype, options.provider))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
