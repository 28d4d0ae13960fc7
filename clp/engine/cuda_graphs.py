"""CUDA graphs of decode steps, one per padded size.

A graph is captured for a few sizes only: a step runs the next larger one. What differs between
steps (weights, seeds, lengths, filters) are tensors that the graph reads.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from clp.engine.model_error import ModelError, is_out_of_memory, memory_errors
from clp.engine.slot_state import SlotState

# Slot lengths that a graph is captured for are multiples of this.
GRAPH_LENGTH = 256
FILTERS = {"temperature": None, "top_k": 0, "top_p": 1.0, "min_p": 0.0}  # and the value that is off


class StepSize(NamedTuple):
    """Slots, tokens read of each, and for each filter its value if it is off, else None."""

    slots: int
    length: int
    filters: tuple[Any, ...]


class CudaGraphs:
    """Captured steps by size, all on the current device.

    They share their memory: one runs at a time, and its output is read before the next one runs.

    Attributes:
        captured: By size (graph, output).
        refusal: Why no step is captured: a model that reads its tensors on the host, for instance.
            Steps then run as they are. None while captures succeed.
    """

    def __init__(self) -> None:
        self.captured: dict[StepSize, tuple[Any, Any]] = {}
        self.refusal: str | None = None
        self._pool: Any = None

    def replay(self, size: StepSize, step: Callable[[StepSize], Any], state: SlotState) -> Any:
        """What step(size) gives; captured at the first use of a size.

        A capture that fails is the last one: it warns, and the step runs as it is.
        """
        if self.refusal is None and size not in self.captured:
            self.warm_up(lambda: step(size), state)
            try:
                with memory_errors():
                    self.captured[size] = self.capture(lambda: step(size))
            except (RuntimeError, ModelError) as error:
                if is_out_of_memory(error.__cause__ or error):
                    raise
                self.refusal = " ".join(str(error).split())
                warnings.warn(
                    "the decode step cannot be captured as a CUDA graph and runs without one, "
                    f"slower: {self.refusal}",
                    stacklevel=2,
                )
        if self.refusal is not None:
            return step(size)
        graph, output = self.captured[size]
        graph.replay()
        return output

    def warm_up(self, step: Callable[[], Any], state: SlotState) -> None:
        """Runs the step twice, and leaves the state as it was."""
        before = state.ints.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            # Libraries set themselves up, and `steer` reads its weights on the host, outside of
            # the capture.
            for _ in range(2):
                step()
                state.ints.copy_(before)
        torch.cuda.current_stream().wait_stream(side)

    def capture(self, step: Callable[[], Any]) -> tuple[Any, Any]:
        """(graph, output) of a step.

        Raises: RuntimeError or ModelError if it cannot be captured.
        """
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = step()
        return graph, output


def step_size(
    count: int, longest: int, filters: Sequence[Any], slots: int, capacity: int
) -> StepSize:
    """The size that serves `count` sequences of at most `longest` tokens, within both bounds.

    The filters are as `common_value` gives them, in the order of FILTERS.
    """
    # A filter that is off for all sequences is left out of the graph; the rest are tensors.
    off = tuple(
        value if value is not None and value == none else None
        for value, none in zip(filters, FILTERS.values(), strict=True)
    )
    length = min(-(-longest // GRAPH_LENGTH) * GRAPH_LENGTH, capacity)
    return StepSize(min(padded_batch(count), slots), length, off)


def padded_batch(count: int) -> int:
    """The next power of two up to 8, then the next multiple of 8, of 32 above 64."""
    if count <= 8:
        return 1 << (count - 1).bit_length()
    step = 8 if count <= 64 else 32
    return -(-count // step) * step


def common_value(values: Sequence[Any]) -> Any:
    """The value if all agree, else None. A filter that is off for all costs nothing."""
    first = values[0]
    return first if all(v == first for v in values) else None
