"""A whole training step as one CUDA graph: the host launches it with one call in place of some thousands.

What may be captured: work on the device alone, with tensors that keep their addresses. No `.item()`, no branch on a
value, no draw from the host's generators, no gradient that becomes None (PyTorch notes, "CUDA semantics: CUDA Graphs").
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

NUM_WARM_UPS = 3  # cuDNN and cuBLAS choose their kernels and allocate work space in the first calls of a shape
MAX_GRAPHS = 16  # shapes beyond these stay eager: each graph keeps its inputs, and the launches' own memory

Inputs = Mapping[str, Tensor]
Step = Callable[[Inputs], None]
"""Reads the inputs, changes weights and writes results in place."""
Shape = tuple[tuple[str, tuple[int, ...], torch.dtype], ...]


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]


class StepGraphs:
    """Runs `step`, after a few calls of a shape as a graph.

    The warm-up calls are real steps, and so is every replay: capturing itself computes nothing. A shape that cannot be
    captured is run eagerly ever after, which is said once.
    """

    def __init__(self, step: Step, device: torch.device) -> None:
        """device: a CUDA device."""
        self._step = step
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()  # one for all: they never run at the same time
        self._captured: dict[Shape, _Captured | None] = {}
        self._num_calls: dict[Shape, int] = {}
        self._may_capture = True

    @property
    def num_graphs(self) -> int:
        return sum(captured is not None for captured in self._captured.values())

    def __call__(self, inputs: Inputs) -> None:
        shape = shape_of(inputs)
        captured = self._captured.get(shape)
        if captured is None and self._should_capture(shape):
            captured = self._captured[shape] = self._capture(inputs)
        if captured is None:
            self._num_calls[shape] = self._num_calls.get(shape, 0) + 1
            self._run_in_what_is_free(inputs)
            return
        for name, tensor in inputs.items():
            captured.inputs[name].copy_(tensor, non_blocking=True)
        captured.graph.replay()

    def _should_capture(self, shape: Shape) -> bool:
        return (
            self._may_capture
            and shape not in self._captured
            and self._num_calls.get(shape, 0) >= NUM_WARM_UPS
            and self.num_graphs < MAX_GRAPHS
        )

    def _run_in_what_is_free(self, inputs: Inputs) -> None:
        """Eagerly. Graphs keep the memory that their steps need: where there is too little beside it, they go."""
        try:
            self._run_eagerly(inputs)
            return
        except torch.OutOfMemoryError:
            if not self.num_graphs:
                raise
        # Here, where no traceback keeps the failed step's tensors. It had not come to its update.
        logger.warning("memory is short: from now on steps are launched one operation at a time, without CUDA graphs")
        torch.cuda.synchronize()
        self._captured.clear()
        self._may_capture = False
        torch.cuda.empty_cache()
        self._run_eagerly(inputs)

    def _run_eagerly(self, inputs: Inputs) -> None:
        """On the stream that captures too, so that autograd's accumulation has met it."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._step(inputs)
        current.wait_stream(self._stream)

    def _capture(self, inputs: Inputs) -> _Captured | None:
        """None where `step` does what a graph cannot hold."""
        static = {name: tensor.clone() for name, tensor in inputs.items()}
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        try:
            # The outer one puts the stream back, which torch's leaves as it is when a capture fails. Other threads may
            # allocate and wait meanwhile, as the one that makes batches does.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                self._step(static)
        except RuntimeError as error:
            shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
            # Its text: the error itself would keep the step's tensors for as long as the log's line is kept.
            reason = str(error)
            logger.warning("steps of %s are launched one operation at a time: no CUDA graph (%s)", shapes, reason)
        else:
            return _Captured(graph, static)
        self._leave_pool()
        return None

    def _leave_pool(self) -> None:
        """After a capture that failed: some torches go on to allocate in its pool then, and no other graph could.

        pytorch/pytorch#180395.
        """
        with suppress(RuntimeError):  # it has ended
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
        self._pool = torch.cuda.graph_pool_handle()


def shape_of(inputs: Inputs) -> Shape:
    """What a graph depends on."""
    return tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in sorted(inputs.items()))
