"""The process in which kernels are tested: what they do to it does not reach the caller's.

Reads a list of [op, backend] from its second argument, and writes a line of JSON to its standard
output per case. It catches nothing: a wrong result, an error, a crash or a hang ends it, and
`processes` takes how it ended for the reason.
"""

import json
import os
import sys
import time

import torch

from clp_kernels.selftest import cases


def main(device_name: str, jobs: str) -> None:
    """Tests the ops and backends of `jobs` on a device, in order."""
    # Kernels and compilers may print: only the lines of this file go to the caller.
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(**fields: object) -> None:
        print(json.dumps(fields), file=lines, flush=True)

    device = torch.device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    for op, backend in json.loads(jobs):
        begin, count, every = time.monotonic(), 0, cases.cases(op, device)
        for i, case in enumerate(every):
            tell(op=op, backend=backend, case=case.name, index=i, of=len(every))
            count += cases.prove(op, backend, device, case)
        assert count > 0, "the kernels run none of the cases"
        tell(op=op, backend=backend, cases=count, seconds=time.monotonic() - begin)


if __name__ == "__main__":
    main(*sys.argv[1:])
