"""`python -m clp_kernels.info` tells what there is, and never fails."""

import json
import os
import subprocess
import sys

import pytest


def info(*argv, **environment):
    done = subprocess.run(
        [sys.executable, "-m", "clp_kernels.info", *argv],
        env=os.environ | environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_json_lists_every_op_and_its_backends():
    report = json.loads(info("--json"))
    assert report["backends"]["sample"] == ["cpu", "cuda", "triton", "reference"]
    assert report["backends"]["mixed_lora"][-1] == "reference"
    assert set(report["backends"]) == {
        "mixed_lora", "mixed_linear", "mix_logits", "sample", "linear_logprob",
    }  # fmt: skip
    assert report["versions"]["torch"]


def test_text_gives_the_reason_for_a_missing_module():
    assert "_cuda" in info()


@pytest.mark.parametrize("name", ["CLP_KERNELS_CPU_ISA", "CLP_KERNELS_BACKEND"])
def test_a_wrong_environment_is_reported_not_fatal(name):
    assert "nonsense" in info(**{name: "nonsense"})
