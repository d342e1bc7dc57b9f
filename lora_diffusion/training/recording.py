"""A whole training step on a CPU as a list of operations: what surrounds them takes its time only once.

A step of SD 1.5 is some 3,000 operations. Modules, custom functions, the graph of autograd, views of views are the same
at every step and run on one thread while the others wait: a tenth of the time with two threads, a quarter with a small
base. What CUDA graphs are on a GPU may be had here too, of steps that keep the same rules (see `graph`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from lora_diffusion.models.heap import large_blocks_apart, uncollected
from lora_diffusion.training.graph import Inputs, Shape, Step, shape_of

logger = logging.getLogger(__name__)

# The first step makes what stays, as the optimiser's moments. Recording takes as long as two to four steps and gains
# that within ten, so rare shapes are left alone.
NUM_WARM_UPS = 2
MAX_OPERATIONS = 300_000  # of all recordings, which take 0.5 kB each; shapes beyond these stay eager


class StepRecordings:
    """Runs `step`, after a few calls of a shape as a recording.

    Every call is a real step, also the one that is recorded. A shape that cannot be recorded is run as it is ever
    after, which is said once.
    """

    def __init__(self, step: Step) -> None:
        self._step = step
        self._recorded: dict[Shape, _Recorded | None] = {}
        self._num_calls: dict[Shape, int] = {}

    @property
    def num_recordings(self) -> int:
        return sum(recorded is not None for recorded in self._recorded.values())

    @property
    def num_operations(self) -> int:
        """Of all recordings together."""
        return sum(len(recorded.run) for recorded in self._recorded.values() if recorded is not None)

    def __call__(self, inputs: Inputs) -> None:
        shape = shape_of(inputs)
        recorded = self._recorded.get(shape)
        if recorded is not None:
            recorded.replay(inputs)
        elif self._should_record(shape):
            self._recorded[shape] = self._record(inputs)
        else:
            if self.num_operations < MAX_OPERATIONS:
                self._num_calls[shape] = self._num_calls.get(shape, 0) + 1
            self._step(inputs)

    def _should_record(self, shape: Shape) -> bool:
        return (
            shape not in self._recorded
            and self._num_calls.get(shape, 0) >= NUM_WARM_UPS
            and self.num_operations < MAX_OPERATIONS
        )

    def _record(self, inputs: Inputs) -> _Recorded | None:
        """A real step; None where it does what a recording cannot hold."""
        static = {name: tensor.clone() for name, tensor in inputs.items()}
        with uncollected(), large_blocks_apart():
            with _Recorder() as recorder:
                self._step(static)
            if not recorder.obstacle:
                return _Recorded(static, _Replay(recorder.calls))
        shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
        logger.warning("steps of %s are run as they are, without a recording: %s", shapes, recorder.obstacle)
        return None


@dataclass(frozen=True)
class _Recorded:
    inputs: dict[str, Tensor]
    run: _Replay

    def replay(self, inputs: Inputs) -> None:
        with torch.inference_mode():
            for name, tensor in inputs.items():
                self.inputs[name].copy_(tensor)
            self.run()


class _Part(NamedTuple):
    """A tensor by the number of its memory and its place there."""

    memory: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


class _Constant(NamedTuple):
    """A tensor that stays where it is from step to step."""

    tensor: Tensor


@dataclass
class _Call:
    function: Any
    args: list[Any]
    """Tensors as `_Part` or `_Constant`, also in lists; other values as they are."""
    kwargs: dict[str, Any]
    made: list[_Part | None]
    """Of what it returns, the tensors in new memory."""
    is_sequence: bool


@dataclass
class _Memory:
    number: int
    reference: StorageWeakRef
    """Keeps the address from being given to other memory."""
    dtype: torch.dtype | None = None
    """Of the tensor that an operation made of it; None: it was there before the step."""
    constants: dict[_Part, _Constant] = field(default_factory=dict["_Part", "_Constant"])


class _Recorder(TorchDispatchMode):
    """Notes every operation called inside, below autograd, and on which tensors.

    A tensor is known by its memory and its place there. So views need no operations of their own, and it does not
    matter that autograd hands on other objects for the same tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.obstacle = ""
        """Why what was called cannot be replayed."""
        self.calls: list[_Call] = []
        self._memories: dict[int, _Memory] = {}  # by address

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        noted = [self._noted(value) for value in args]
        named = {name: self._noted(value) for name, value in kwargs.items()}
        result = func(*args, **kwargs)
        is_sequence = isinstance(result, list | tuple)
        outputs: Iterable[Any] = result if is_sequence else (result,)
        made = [self._made(output) for output in outputs]
        if any(made) or (not _is_view(func) and _has_tensor([*noted, *named.values()])):  # or it is about dtypes, names
            self.calls.append(_Call(func, noted, named, made, is_sequence))
            if not all(output is None or isinstance(output, Tensor) for output in outputs):
                self.obstacle = f"{func} gives the host a value"
        return result

    def _noted(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._noted_tensor(value)
        if isinstance(value, list | tuple):
            return [self._noted(item) for item in value]
        return value

    def _noted_tensor(self, tensor: Tensor) -> _Part | _Constant:
        if tensor.layout != torch.strided:  # in oneDNN's order: a packed weight
            return _Constant(tensor.detach())
        memory = self._memory_of(tensor)
        part = _part(memory.number, tensor)
        if memory.dtype is None:
            return memory.constants.setdefault(part, _Constant(tensor.detach()))
        if tensor.dtype != memory.dtype:
            self.obstacle = f"memory of {memory.dtype} is read as {tensor.dtype}"
        return part

    def _made(self, output: Any) -> _Part | None:
        if not isinstance(output, Tensor):
            return None
        if output.layout != torch.strided:
            self.obstacle = f"a tensor is made in the layout {output.layout}"
            return None
        count = len(self._memories)
        memory = self._memory_of(output)
        if memory.number < count:
            return None
        memory.dtype = output.dtype
        return _part(memory.number, output)

    def _memory_of(self, tensor: Tensor) -> _Memory:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self._memories:
            self._memories[address] = _Memory(len(self._memories), StorageWeakRef(storage))
        return self._memories[address]


def _has_tensor(noted: Sequence[Any]) -> bool:
    return any(
        isinstance(value, _Part | _Constant) or (isinstance(value, list) and _has_tensor(cast("list[Any]", value)))
        for value in noted
    )


def _part(number: int, tensor: Tensor) -> _Part:
    return _Part(number, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), tensor.dtype)


def _is_view(function: Any) -> bool:
    return function.is_view or function is torch.ops.aten._unsafe_view.default


class _Operation(NamedTuple):
    """One value of a step from others, all by their places in a list."""

    function: Callable[..., Any]
    arguments: Callable[[list[Any]], Iterable[Any]]
    place: int
    ended: tuple[int, ...]
    """Values that nothing reads any more, so that tensors go with their last use, as they do in the step."""


class _Replay:
    """Makes the calls once more whenever it is called, with as little around them as Python can."""

    def __init__(self, calls: Sequence[_Call]) -> None:
        self._values: list[Any] = []
        self._places: dict[_Part, int] = {}
        self._wholes: dict[int, int] = {}  # number of a memory → place of what was made of it
        self._made: list[tuple[Callable[..., Any], list[int], int]] = []
        for call in calls:
            self._add_call(call)
        self._operations = self._with_ends()
        del self._places, self._wholes, self._made  # for building only; half as much memory again

    def __len__(self) -> int:
        return len(self._operations)

    def __call__(self) -> None:
        values = self._values
        try:
            for function, arguments, place, ended in self._operations:
                values[place] = function(*arguments(values))
                for end in ended:
                    values[end] = None
        except BaseException:
            for operation in self._operations:
                values[operation.place] = None
            raise

    def _add_call(self, call: _Call) -> None:
        places = [self._place(value) for value in call.args]
        function = call.function
        if _has_tensor([*call.kwargs.values()]):
            places += [self._place(value) for value in call.kwargs.values()]
            function = partial(_call_with_names, function, len(call.args), [*call.kwargs])
        elif call.kwargs:
            function = partial(function, **call.kwargs)
        result = self._add(function, places)
        for index, part in enumerate(call.made):
            if part is not None:
                place = self._add(itemgetter(index), [result]) if call.is_sequence else result
                self._places[part] = self._wholes[part.memory] = place

    def _place(self, value: Any) -> int:
        if isinstance(value, _Part):
            if value not in self._places:
                where = [self._place(number) for number in (value.shape, value.stride, value.offset)]
                self._places[value] = self._add(torch.as_strided, [self._wholes[value.memory], *where])
            return self._places[value]
        if isinstance(value, list) and _has_tensor(cast("list[Any]", value)):
            return self._add(_listed, [self._place(item) for item in cast("list[Any]", value)])
        self._values.append(value.tensor if isinstance(value, _Constant) else value)
        return len(self._values) - 1

    def _add(self, function: Callable[..., Any], places: list[int]) -> int:
        self._values.append(None)
        self._made.append((function, places, len(self._values) - 1))
        return len(self._values) - 1

    def _with_ends(self) -> list[_Operation]:
        operations: list[_Operation] = []
        made = {place for _, _, place in self._made}
        read_later: set[int] = set()
        for function, places, place in reversed(self._made):
            ended = ({place, *places} & made) - read_later
            operations.append(_Operation(function, _getter(places), place, tuple(ended)))
            read_later |= ended
        return operations[::-1]


def _getter(places: Sequence[int]) -> Callable[[list[Any]], Iterable[Any]]:
    """What gets the values at `places`. `itemgetter` does not return a sequence for one."""
    if len(places) > 1:
        return itemgetter(*places)
    return itemgetter(slice(places[0], places[0] + 1) if places else slice(0, 0))


def _listed(*values: Any) -> list[Any]:
    return [*values]


def _call_with_names(function: Callable[..., Any], count: int, names: Sequence[str], *values: Any) -> Any:
    """The first `count` values by position, the others by name."""
    return function(*values[:count], **dict(zip(names, values[count:], strict=True)))
