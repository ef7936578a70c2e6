"""Triton's kernels compiled for chips that need not be there.

Workers are processes of their own: without TRITON_INTERPRET, under which kernels cannot be compiled, and with a cache that
is thrown away, so that nothing stale is read. Run as a script, this file is such a worker.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastconv.backends.triton_calls import Call, Recorded, record
from fastconv.backends.triton_cubin import machine_code
from fastconv.backends.triton_launch import Launch
from fastconv.tuning.sides import shared_memory

CAPABILITIES = (80, 90, 100)
SHARED_LIMIT = {capability: shared_memory(capability) for capability in CAPABILITIES}


def inspect(
    capabilities: Sequence[int],
    kernel: str = "",
    first_only: bool = False,
    dump: Path | None = None,
    processes: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Compile what `triton_calls` lists, each distinct kernel once for a chip, and read its machine code.

    Kernels are distinct by constants and by types of arguments. Of those that differ only in which sizes are multiples of
    16, the one is compiled that the compiler knows least about.

    Args:
        capabilities: of the chips, 90 for sm_90.
        kernel: only kernels whose name contains this.
        first_only: only candidates that tuning would take first, and passes.
        dump: a folder for the cubins, <kernel>.<config>.<arch>.cubin.
        processes: how many compile at a time.
        progress: called with (kernels compiled, kernels to compile).

    Returns:
        A record for each: kernel, config, arch, dtype, shared_bytes, what `machine_code` finds, and the call: call, family,
        direction, groups, channels, is_first, tile.

    Raises:
        RuntimeError: a kernel does not compile.
    """
    order = itertools.count()
    records: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = dump or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)

        def work(_: int) -> None:
            with _Worker(capabilities, kernel, first_only, folder, cache=temporary) as worker:
                for index in order:
                    if index >= worker.jobs:
                        return
                    records[index] = worker.compile(index)
                    if progress is not None:
                        progress(len(records), worker.jobs)

        with ThreadPoolExecutor(processes) as pool:
            list(pool.map(work, range(processes)))
        found = [records[index] for index in sorted(records)]
        for capability in capabilities:
            group = [each for each in found if each["arch"] == f"sm_{capability}"]
            codes = machine_code([folder / file_name(each) for each in group], capability)
            for each, code in zip(group, codes, strict=True):
                each.update(code)
    return found


def file_name(record: dict[str, Any]) -> str:
    return f"{record['kernel']}.{record['config']}.{record['arch']}.cubin"


class _Worker:
    """A process that compiles the jobs whose numbers it is told."""

    def __init__(self, capabilities: Sequence[int], kernel: str, first_only: bool, folder: Path, cache: str) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        paths = (str(Path(__file__).parents[2]), environment.get("PYTHONPATH"))
        environment |= {"TRITON_CACHE_DIR": cache, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        command = [sys.executable, "-m", __name__, str(folder), *map(str, capabilities), "--kernel", kernel]
        command += ["--first"] if first_only else []
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (__exit__ closes it)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=environment
        )
        self.jobs: int = self._answer()

    def compile(self, index: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(index, file=self._process.stdin, flush=True)
        found: dict[str, Any] = self._answer()
        return found

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        status = self._process.wait()
        self._errors.seek(0)
        raise RuntimeError(f"a compiling process ended with status {status}:\n{self._errors.read()[-4000:]}")

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        with self._errors, self._process:
            self._process.kill()


class Job(NamedTuple):
    """A kernel, specialised as Triton's own launch would specialise it for the arguments of a launch."""

    call: Call
    launch: Launch
    capability: int
    signature: dict[str, str]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]

    @property
    def key(self) -> str:
        kernel, _, arguments = self.launch
        options = {name: value for name, value in arguments.items() if name not in self.signature}
        return repr((kernel.__module__, kernel.__name__, self.signature, self.constants, options))

    @property
    def config(self) -> str:
        """The tile's sides, stages and warps, and a digest of everything that the kernel was specialised for."""
        parts = (_SHORT.get(name, name.removeprefix("BLOCK_").lower()) + str(size) for name, size in self.launch.tile)
        usual = {f"{_SHORT[name]}{size}" for name, size in _USUAL.items()}
        digest = hashlib.sha256(self.key.encode()).hexdigest()[:6]
        return "-".join([*(part for part in parts if part not in usual), digest])


_SHORT = {"NUM_STAGES": "s", "num_warps": "w", "PACK": "pack", "SWAP": "swap", "BATCH_INNER": "inner"}
_USUAL = {"PACK": 1, "SWAP": 1, "BATCH_INNER": 0}


def jobs(capabilities: Sequence[int], kernel: str = "", first_only: bool = False) -> list[Job]:
    """What there is to compile, in the order of the calls."""
    found: dict[tuple[int, str], Job] = {}
    for capability in capabilities:
        for recorded in record(capability):
            if kernel not in recorded.launch.kernel.__name__ or (first_only and not recorded.call.is_first):
                continue
            job = specialise(recorded, capability)
            known = found.setdefault((capability, job.key), job)
            if len(job.attributes) < len(known.attributes):
                found[capability, job.key] = job
    return list(found.values())


def specialise(recorded: Recorded, capability: int) -> Job:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, _, arguments = recorded.launch
    backend = make_backend(GPUTarget("cuda", capability, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    options, signature, constants, attributes = kernel._pack_args(backend, dict(arguments), *bind(**arguments))
    attributes = {path: attribute for path, attribute in attributes.items() if attribute}
    return Job(recorded.call, recorded.launch, capability, signature, constants, attributes, options.__dict__)


def compile_job(job: Job, folder: Path) -> dict[str, Any]:
    """Write a kernel's cubin, and return what is known of it without reading that."""
    from triton import compile as compile_for
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    call, kernel = job.call, job.launch.kernel
    source = ASTSource(kernel, job.signature, job.constants, job.attributes)
    # A failed compilation may raise anything at all; what was compiled is added to it.
    try:
        result = compile_for(source, target=GPUTarget("cuda", job.capability, 32), options=job.options)
    except Exception as error:
        raise RuntimeError(
            f"{kernel.__name__} {job.config} for {call.name} does not compile on sm_{job.capability}"
        ) from error
    found = {
        "kernel": kernel.__name__,
        "config": job.config,
        "arch": f"sm_{job.capability}",
        "dtype": _dtype(job),
        "shared_bytes": result.metadata.shared,
        "call": call.name,
        "family": call.family,
        "direction": call.direction,
        "groups": call.groups,
        "channels": call.channels,
        "is_first": call.is_first,
        "tile": dict(job.launch.tile),
    }
    (folder / file_name(found)).write_bytes(result.asm["cubin"])
    return found


def _dtype(job: Job) -> str:
    """Of the first operand: partial sums are float32 whatever the call's arithmetic."""
    operands = (getattr(value, "base", value) for value in job.launch.arguments.values())
    dtype = next(operand.dtype for operand in operands if isinstance(operand, torch.Tensor))
    return "tf32" if dtype == torch.float32 and job.call.dtype == "tf32" else str(dtype).removeprefix("torch.")


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("capabilities", type=int, nargs="+")
    parser.add_argument("--kernel", default="")
    parser.add_argument("--first", action="store_true")
    options = parser.parse_args()
    todo = jobs(options.capabilities, options.kernel, options.first)
    print(len(todo), flush=True)
    for line in sys.stdin:
        print(json.dumps(compile_job(todo[int(line)], options.folder)), flush=True)


if __name__ == "__main__":
    _main()
