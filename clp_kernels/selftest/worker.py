"""The process in which kernels are tested: what they do to it does not reach the caller's.

Gets a list of [op, backend] in JSON, and writes a line of JSON to its standard output per case. It
catches nothing: a wrong result, an error, a crash or a hang ends it, and `processes` takes how it
ended for the reason.
"""

import ctypes
import json
import os
import signal
import sys
import time
from types import TracebackType

import torch

from clp_kernels.selftest import cases, proof

_PR_SET_PDEATHSIG = 1


def main(device_name: str, jobs: str) -> None:
    """Tests the ops and backends of `jobs` on a device, in order."""
    # It ends with its parent, also if a kernel hangs. Linux alone has this, as the package needs.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Kernels and compilers may print: only the lines of this file go to the caller.
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(**fields: object) -> None:
        print(json.dumps(fields), file=lines, flush=True)

    def tell_error(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        names = [one.__name__ for one in kind.__mro__]
        tell(error=f"{kind.__name__}: {error}", kinds=names)
        sys.__excepthook__(kind, error, trace)

    sys.excepthook = tell_error
    device = torch.device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    for op, backend in json.loads(jobs):
        begin, count, every = time.monotonic(), 0, cases.cases(op, device)
        for i, case in enumerate(every):
            tell(op=op, backend=backend, case=case.name, index=i)
            count += proof.prove(op, backend, device, case)
        assert count > 0, "the kernels run none of the cases"
        tell(op=op, backend=backend, cases=count, seconds=time.monotonic() - begin)
