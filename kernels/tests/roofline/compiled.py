"""Compiled kernels: each distinct one once, its machine code kept by a hash of its source and target."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import triton
from compile_kernels import TARGETS, Specialisation, compile_specialisation

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "qdiff" / "gpu_static"
NAME_BYTES = 20


class Machine(NamedTuple):
    """What the assembler made of a kernel."""

    registers: int
    shared: int  # bytes of a CTA
    stack: int  # bytes of a thread
    warps: int
    sass: str


def digest(wanted: Specialisation, target: str) -> str:
    """Hash of everything that the machine code depends on: the source with all it calls, its specialisation, compiler, target."""
    parts = (wanted.function.cache_key, repr(wanted._replace(module="")), triton.__version__, target)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[: 2 * NAME_BYTES]


class Failure(Exception):
    """Triton or its assembler refuses a kernel; the message says why."""


class Library:
    """Compiled kernels of a folder.

    Args:
        folder: where machine code is kept; entries are independent of each other and may be deleted at any time.
        workers: processes that compile.
    """

    def __init__(self, folder: Path = CACHE, workers: int | None = None) -> None:
        self.folder, self.workers = folder, workers or os.cpu_count() or 1
        self._held: dict[str, Machine | Failure] = {}

    def known(self, wanted: Specialisation, target: str) -> Machine | None:
        """A kernel's machine code if it has been compiled."""
        found = self._held.get(key := digest(wanted, target)) or self._read(key)
        return found if isinstance(found, Machine) else None

    def get(self, wanted: Specialisation, target: str) -> Machine:
        """A kernel's machine code, compiled now if need be.

        Raises:
            Failure: it does not compile.
        """
        key = digest(wanted, target)
        if key not in self._held:
            self._held[key] = self._read(key) or _build(wanted, target, self._file(key))
        found = self._held[key]
        if isinstance(found, Failure):
            raise found
        return found

    def compile(self, wanted: Iterable[Specialisation], target: str, advance: Callable[[str, int, int], None]) -> None:
        """Compile what is missing, in several processes; ``advance(name, done, total)`` is told of each."""
        missing = {key: each for each in wanted if not self._file(key := digest(each, target)).exists()}
        if self.workers == 1 or len(missing) < 2:
            for done, (key, each) in enumerate(missing.items(), 1):
                _build(each, target, self._file(key))
                advance(each.name, done, len(missing))
            return
        with ProcessPoolExecutor(self.workers, mp_context=get_context("spawn")) as pool:
            waiting = {pool.submit(_build, each, target, self._file(key)): each for key, each in missing.items()}
            for done, future in enumerate(as_completed(waiting), 1):
                future.result()
                advance(waiting[future].name, done, len(missing))

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.json.gz"

    def _read(self, key: str) -> Machine | Failure | None:
        try:
            stored = json.loads(gzip.decompress(self._file(key).read_bytes()))
        except (OSError, EOFError, ValueError):
            return None
        return Failure(stored["failure"]) if "failure" in stored else Machine(**stored)


def _build(wanted: Specialisation, target: str, file: Path) -> Machine | Failure:
    """Compile, disassemble and keep."""
    with tempfile.TemporaryDirectory() as scratch, triton.knobs.cache.scope():
        triton.knobs.cache.dir = scratch  # Triton's own cache would keep ten files of every kernel
        try:
            compiled = compile_specialisation(wanted, TARGETS[target])
        except Exception as error:  # a kernel that does not compile is a row of the table
            found: Machine | Failure = Failure(f"{type(error).__name__}: {str(error).strip()[:300]}")
        else:
            found = _disassemble(compiled)
    facts: dict[str, Any] = {"failure": str(found)} if isinstance(found, Failure) else found._asdict()
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(f".{os.getpid()}.part")
    beside.write_bytes(gzip.compress(json.dumps(facts).encode(), mtime=0))
    beside.replace(file)
    return found


def _disassemble(compiled: Any) -> Machine:
    tools = Path(triton.knobs.nvidia.ptxas.path).parent
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run(tools / "cuobjdump", "--dump-resource-usage", file.name)
        text = _run(tools / "nvdisasm", "-c", file.name)
    registers, stack = (int(found[1]) if (found := re.search(rf"{name}:(\d+)", usage)) else -1 for name in ("REG", "STACK"))
    if registers < 0:
        raise RuntimeError(f"cuobjdump names no registers: {usage[-500:]}")
    kept = "\n".join(line for line in text.splitlines() if re.match(r"\s*\.L|\s+/\*[0-9a-f]{4,}\*/\s+\S", line))
    return Machine(registers, compiled.metadata.shared, stack, compiled.metadata.num_warps, kept)


def _run(tool: Path, *arguments: str) -> str:
    run = subprocess.run([str(tool), *arguments], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{tool.name}: {run.stderr[-500:]}")
    return run.stdout
