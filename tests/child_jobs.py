"""Jobs for the isolated child, good and bad; the child imports this module, so it imports nothing heavy."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

from open_autoglm.export.tensorrt_api import DeviceOutOfMemoryError
from open_autoglm.schemas import Model


class Order(Model):
    """Payload of every job here."""

    text: str = ""


class Answer(Model):
    text: str
    pid: int


def answers(order: Order) -> Answer:
    return Answer(text=order.text, pid=os.getpid())


_told: list[str] = []


def remembers(order: Order) -> Answer:
    """Everything it was told so far, in one word: what a session is to the jobs that use it."""
    _told.append(order.text)
    return Answer(text="".join(_told), pid=os.getpid())


def tells_its_cores(_order: Order) -> Answer:
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0)))
    return Answer(text=cores, pid=os.getpid())


def answers_at_length(order: Order) -> Answer:
    """More than a pipe holds."""
    return Answer(text=order.text * 1_000_000, pid=os.getpid())


def prints_garbage(order: Order) -> Answer:
    """As runtimes do: on stdout, stderr, and below Python on the file descriptors."""
    sys.stdout.write('{"result": {"text": "fake", "pid": 0}}\n')
    sys.stderr.write("\x1b[31mwarning\x1b[0m\n")
    os.write(1, b"\xff\xfe not text\n")
    return answers(order)


def reads_its_environment(order: Order) -> Answer:
    return Answer(text=os.environ.get(order.text, "unset"), pid=os.getpid())


def raises(order: Order) -> NoReturn:
    raise ValueError(f"{order.text} is wrong\nand a second line")


def raises_memory_error(_order: Order) -> NoReturn:
    raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")


def lacks_gpu_memory(_order: Order) -> NoReturn:
    raise DeviceOutOfMemoryError("TensorRT 10.16 could not run: Requested size was 34359738368 bytes.")


class IncorrectOutput(RuntimeError):
    """Named as in `measure.jobs`."""


def answers_nonsense(_order: Order) -> NoReturn:
    raise IncorrectOutput("prefill gave logits that are not finite")


def segfaults(_order: Order) -> NoReturn:
    ctypes.string_at(0)
    raise AssertionError("reading address 0 went well")


def exits_with_3(_order: Order) -> NoReturn:
    sys.exit(3)


def leaves_without_a_word(_order: Order) -> NoReturn:
    os._exit(0)


def dies_while_answering(_order: Order) -> NoReturn:
    """Half an answer on the pipe, whose number is the child's argument."""
    os.write(int(sys.argv[1]), b'{"result": {"text": "ha')
    os._exit(0)


def crashes_after_answering(order: Order) -> Answer:
    """Teardown of a runtime: an exit handler that would end the process badly."""
    import atexit

    atexit.register(os.abort)
    return answers(order)


def hangs(order: Order) -> NoReturn:
    """Writes its pid and that of a process of its own into the file ``order.text``, then waits."""
    grandchild = subprocess.Popen(["sleep", "60"])
    partial = Path(f"{order.text}.partial")
    partial.write_text(f"{os.getpid()} {grandchild.pid}")
    partial.rename(order.text)
    while True:
        time.sleep(60)


def allocates_without_end(_order: Order) -> NoReturn:
    held = []
    while True:
        held.append(bytearray(16 * 2**20))
