"""Fixtures of every test: fixed seeds, poisoned memory, one thread, the shared models."""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

# OpenMP reads this when torch is loaded. With its default, active waiting, a small parallel op
# takes 10 to 30 ms on a machine where other processes run (measured: two busy cores, two threads)
# and 0.1 ms with this.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# One thread, in the processes that tests start too: those of `make test` have a core each, and a
# second thread would wait for the first while another process has its core. Tests of what depends
# on the number of threads set it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

from clp_kernels import files, trust

# derandomize: the same examples in every run; deadline: a busy machine is not a failure.
settings.register_profile(
    "clp",
    derandomize=True,
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("clp")
torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Read when Triton is imported: its kernels then run as plain Python, on CPU tensors.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test starts from the same seeds and environment, whichever tests run before it."""
    random.seed(0)
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:  # torch.manual_seed also keeps the stack for devices that are not here: 2 ms a test
        torch.default_generator.manual_seed(0)
    monkeypatch.delenv("CLP_KERNELS_BACKEND", raising=False)


@pytest.fixture(autouse=True)
def _no_results_of_the_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which kernels run does not depend on what was tested on this machine."""
    monkeypatch.setenv("CLP_KERNELS_CACHE", os.devnull)  # a folder that cannot be made
    monkeypatch.setenv("CLP_KERNELS_TUNE", "0")
    monkeypatch.delenv("CLP_KERNELS_TRUST", raising=False)
    monkeypatch.setattr(trust, "of_this_process", {})
    monkeypatch.setattr(files, "warned", set())
    monkeypatch.setattr(trust, "distrusted", {})


@pytest.fixture(autouse=True)
def _poison_uninitialised_memory() -> Iterator[None]:
    """torch.empty gives NaN (the largest integer), so that an unwritten output fails its test.

    PyTorch fills uninitialised memory where deterministic algorithms are on; `warn_only` keeps ops
    without a deterministic form usable.
    """
    before = torch.are_deterministic_algorithms_enabled()
    before_warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before, warn_only=before_warn_only)


@pytest.fixture
def kernels_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for the results of the self-test."""
    monkeypatch.setenv("CLP_KERNELS_CACHE", str(tmp_path / "clp_kernels"))
    return tmp_path / "clp_kernels"


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads; what it sets ends with the test."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


@pytest.fixture
def one_thread(set_threads: Callable[[int], None]) -> None:
    """One thread, whatever the fixtures of a module have set."""
    set_threads(1)


@pytest.fixture
def failing() -> Callable[[torch.nn.Module], AbstractContextManager[None]]:
    """failing(model): a context in which the model's forward raises RuntimeError("no memory")."""

    @contextmanager
    def context(model: torch.nn.Module) -> Iterator[None]:
        def fail(*args: object) -> None:
            raise RuntimeError("no memory")

        handle = model.register_forward_pre_hook(fail)
        try:
            yield
        finally:
            handle.remove()

    return context


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """The folder of real models beside the repository; it is not part of the project."""
    folder = Path(__file__).resolve().parents[1].parent / "shared" / "models"
    if not folder.is_dir():
        pytest.skip("the shared models (../shared/models beside the repository) are not here")
    return folder


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The embedded model with a chat template: BOS, the messages' contents, then "Then"."""
    from clp.data.paths import TINY

    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(TINY, folder)
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }} {% endfor %}"
    template += "{% if add_generation_prompt %}Then{% endif %}"
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    return str(folder)
