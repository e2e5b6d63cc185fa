"""From one planned tensor to its elements: the method's rule, kernels, and a look at what is not finite."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from toolkit.errors import MeldkitError, MergeError, ModelError
from toolkit.merging.finite import num_hidden
from toolkit.merging.group import PIECE_SIZE, MemoryReader, Reader, Scratch, TensorGroup
from toolkit.merging.order import call_method
from toolkit.merging.plan import OutputTensor, tensor_readers
from toolkit.merging.streaming.safetensors_file import CARRIER
from toolkit_kernels import sums
from toolkit_kernels.backend import Backend
from toolkit_kernels.rules import Consensus, FisherMean, Inputs, Piece, Rule, WeightedSum
from toolkit_kernels.spans import CODES, ITEMSIZES, Span

ONE = WeightedSum(np.ones(1))


@dataclass(frozen=True, slots=True)
class Prepared:
    """A tensor whose method has spoken: what is left goes piece by piece.

    Attributes:
        tensor: of the plan.
        group: what the rule is applied to; where the method gave a tensor, that tensor alone.
        rule: to apply.
        order: of the models in the group, as places in the tensor's.
        is_whole: whether the method gave the merged tensor itself.
    """

    tensor: OutputTensor
    group: TensorGroup
    rule: Rule
    order: Sequence[int] = ()
    is_whole: bool = False

    def inputs(self, start: int, scratch: Scratch | None) -> Inputs:
        """Of the piece that begins at element ``start``."""
        rule = self.rule
        needs_base = rule.base_weight is not None if isinstance(rule, WeightedSum) else True
        fisher = isinstance(rule, FisherMean)
        return self.group.piece(
            start, base=needs_base, fisher=fisher, scratch=None if self.group.passes else scratch
        )

    def piece(self, start: int, out: Span, scratch: Scratch | None) -> "Piece":
        return Piece(self.inputs(start, scratch), self.rule, out)


@dataclass(slots=True)
class Findings:
    """What was seen while computing, added up over tensors; JSON values only.

    Attributes:
        non_finite: NaN and infinite elements by the file or model that holds them.
        weights: of each group of tensors, the lowest and the highest effective weights: [rule, lowest, highest].
    """

    non_finite: dict[str, int] = field(default_factory=dict)
    weights: dict[str, list[Any]] = field(default_factory=dict)

    def add(self, other: "Findings") -> None:
        for where, count in other.non_finite.items():
            self.non_finite[where] = self.non_finite.get(where, 0) + count
        for group, (rule, lowest, highest) in other.weights.items():
            self.see(group, rule, lowest, highest)

    def see(self, group: str, rule: str, lowest: Sequence[float], highest: Sequence[float]) -> None:
        known = self.weights.get(group)
        if known is None:
            self.weights[group] = [rule, list(lowest), list(highest)]
        elif known[1] != lowest or known[2] != highest or known[0] != rule:
            if known[0] != rule or len(known[1]) != len(lowest):
                known[0], known[1], known[2] = "several", [], []
                return
            known[1] = [min(pair) for pair in zip(known[1], lowest, strict=True)]
            known[2] = [max(pair) for pair in zip(known[2], highest, strict=True)]


def rule_name(prepared: Prepared) -> str:
    """What was applied to the models: the kind of rule, or the method where it gave the tensor itself."""
    if prepared.is_whole and prepared.tensor.method is not None:
        return prepared.tensor.method.name
    return type(prepared.rule).__name__


def effective_weights(prepared: Prepared) -> list[float]:
    """What each model counts, in the order of the plan; with a weight for the base, that one last.

    Of a Fisher mean the factors of the Fishers' elements, what normalises them included. None of a whole tensor.
    """
    rule = prepared.rule
    if prepared.is_whole:
        return []
    if isinstance(rule, WeightedSum):
        weights, base = rule.weights, [] if rule.base_weight is None else [float(rule.base_weight)]
    elif isinstance(rule, FisherMean):
        weights, base = rule.weights, []
    elif isinstance(rule, Consensus):
        weights, base = rule.scale * rule.weights, []
    else:
        return []
    places = np.argsort(prepared.order) if prepared.order else slice(None)
    return [*weights[places].tolist(), *base]


class Computer:
    """Computes tensors of a plan with one backend. Safe to use from several threads.

    Args:
        backend: of kernels.
        seed: of random masks.
        device: where methods compute that need whole tensors.
        non_finite: ``error`` refuses NaN and infinity in inputs, ``keep`` counts them. In a result, where no input has
            any, they are an error in both cases.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        seed: int,
        device: str = "cpu",
        non_finite: Literal["error", "keep"] = "error",
    ) -> None:
        self.backend = backend
        self.keeps = non_finite == "keep"
        self._seed = seed
        self._device = device

    def with_backend(self, backend: Backend) -> "Computer":
        """The same computation by another backend."""
        policy = "keep" if self.keeps else "error"
        return Computer(backend, seed=self._seed, device=self._device, non_finite=policy)

    def prepare(self, tensor: OutputTensor, findings: Findings, parallel_map: sums.Map = map) -> Prepared:
        """Ask the tensor's method for its rule.

        Raises:
            ModelError: an input holds NaN or infinity.
            MergeError: the method failed, or gave what is not finite though the inputs are.
        """
        group = TensorGroup(
            tensor.name,
            tensor.shape,
            tensor.models,
            tensor.base,
            self.backend,
            tensor.fisher,
            self._seed,
            parallel_map,
            self._device,
        )
        method = tensor.method
        if method is None:
            return Prepared(tensor, group, ONE)
        try:
            result, group, order = call_method(method, group, tensor.parameters)
        except MeldkitError:
            raise
        except Exception as error:
            self._look_at_inputs(tensor, Findings())
            raise MergeError(
                f"{tensor.name}: {method.name} failed: {type(error).__name__}: {error}"
            ) from error
        if isinstance(result, Rule):
            return Prepared(tensor, group, result, order)
        return self._whole(tensor, method.name, result, findings)

    def _whole(self, tensor: OutputTensor, method: str, result: Any, findings: Findings) -> Prepared:
        """The merged tensor itself: what its method does to NaN and infinity in inputs, nobody knows."""
        are_finite = not self._look_at_inputs(tensor, findings)
        if tuple(result.shape) != tensor.shape:
            raise MergeError(
                f"{tensor.name}: {method} gave the shape {tuple(result.shape)}, not {tensor.shape}"
            )
        reader = MemoryReader.of(result.detach().cpu(), f"the result of {method}")
        if are_finite and int(self.backend.non_finite(Inputs((reader.whole,)))[0]):
            _refuse_overflow(tensor, _is_non_finite(reader.whole), 0, reader.dtype)
        group = TensorGroup(tensor.name, tensor.shape, (reader,), None, self.backend)
        return Prepared(tensor, group, ONE, is_whole=True)

    def compute(
        self,
        parts: Sequence[tuple[Prepared, int, Span]],
        findings: Findings,
        scratch: Scratch | None = None,
    ) -> None:
        """Write elements of tensors, each part from its start on, in one call of the kernels.

        Args:
            parts: tensor, index of the first element (a multiple of PIECE_SIZE), memory for the result.
            findings: gets what is not finite in inputs.
            scratch: memory for elements of files, of this thread; only for a single part.

        Raises:
            ModelError: an input holds NaN or infinity.
            MergeError: the result does, and no input.
        """
        pieces = [prepared.piece(start, out, scratch) for prepared, start, out in parts]
        counts = self.backend.apply(pieces)
        for (prepared, start, out), piece, count in zip(parts, pieces, counts.tolist(), strict=True):
            count += num_hidden(self.backend, piece)
            if count:
                self._judge(prepared, piece.inputs, start, out, findings)

    def copy(self, tensor: OutputTensor, start: int, size: int, findings: Findings) -> memoryview:
        """Bytes of elements that are copied as they are."""
        (reader,) = tensor.models
        span = reader.span(start, size)
        if tensor.dtype in CODES and int(self.backend.non_finite(Inputs((span,)))[0]):
            self._report(tensor, [(reader, _num_non_finite(span))], findings)
        return as_bytes(span)

    def _judge(self, prepared: Prepared, inputs: Inputs, start: int, out: Span, findings: Findings) -> None:
        """The slow look at a piece with something that is not finite in it: where does it come from?"""
        spans = [*inputs.theta, *([inputs.base] if inputs.base is not None else []), *inputs.fisher]
        group = prepared.group
        readers = [
            *group.models,
            *([group.base] if inputs.base is not None and group.base is not None else []),
        ]
        readers += [entry.reader for entry in group.fisher if entry is not None][: len(inputs.fisher)]
        bad = [_is_non_finite(span) for span in spans]
        if not prepared.is_whole:  # the inputs of a whole tensor have been looked at
            counts = [(reader, int(b.sum())) for reader, b in zip(readers, bad, strict=True)]
            self._report(prepared.tensor, counts, findings)
        new = _is_non_finite(out) & ~np.logical_or.reduce(bad)
        if new.any():
            self._look_at_inputs(prepared.tensor, Findings(), always=True)
            _refuse_overflow(prepared.tensor, new, start, prepared.tensor.dtype)

    def _look_at_inputs(self, tensor: OutputTensor, findings: Findings, *, always: bool = False) -> int:
        """Count what is not finite in all of a tensor's inputs."""
        counts = []
        for reader in tensor_readers(tensor):
            spans = (reader.span(start, size) for start, size in piece_bounds(tensor.size))
            counts.append((reader, sum(int(self.backend.non_finite(Inputs((span,)))[0]) for span in spans)))
        self._report(tensor, counts, findings, always=always)
        return sum(count for _, count in counts)

    def _report(
        self,
        tensor: OutputTensor,
        counts: Sequence[tuple[Reader, int]],
        findings: Findings,
        *,
        always: bool = False,
    ) -> None:
        guilty = [(reader.where, count) for reader, count in counts if count]
        if guilty and (always or not self.keeps):
            where, count = guilty[0]
            others = f" (and {', '.join(w for w, _ in guilty[1:])} too)" if guilty[1:] else ""
            raise ModelError(
                f"{tensor.name} in {where} holds {count:,} values that are NaN or infinite{others}",
                hint="such a model is broken; leave it out",
            )
        for where, count in guilty:
            findings.non_finite[where] = findings.non_finite.get(where, 0) + count


def _refuse_overflow(tensor: OutputTensor, new: NDArray[np.bool_], start: int, dtype: str) -> NoReturn:
    """``new`` marks the elements from ``start`` on that are not finite though the inputs are."""
    raise MergeError(
        f"{tensor.name}: {int(new.sum()):,} values of the result are NaN or infinite though no input is"
        f" (the first at element {start + int(np.argmax(new)):,}): the result overflows {dtype}"
        f" ({', '.join(reader.where for reader in tensor.models)})",
        hint="smaller weights, or a wider dtype for the result",
    )


def is_copied(tensor: OutputTensor) -> bool:
    """Whether the bytes of the only reader are those of the result."""
    return tensor.method is None and tensor.models[0].dtype == tensor.dtype


def check_tensor(tensor: OutputTensor) -> None:
    """Raises ModelError where readers do not fit the tensor that they are for."""
    for reader in tensor_readers(tensor):
        if reader.shape != tensor.shape:
            raise ModelError(
                f"{tensor.name} has the shape {reader.shape} in {reader.where}, and {tensor.shape} is needed"
            )
        if not is_copied(tensor) and not {reader.dtype, tensor.dtype} <= CODES.keys():
            raise ModelError(
                f"{tensor.name} is {reader.dtype} in {reader.where}: only floating-point tensors are merged"
            )


def piece_bounds(size: int) -> Iterator[tuple[int, int]]:
    """(start, size) of the pieces of a tensor."""
    return ((start, min(PIECE_SIZE, size - start)) for start in range(0, size, PIECE_SIZE))


def as_bytes(span: Span) -> memoryview:
    """The memory of a span on the CPU."""
    data = span.data
    if not isinstance(data, np.ndarray):
        import torch  # spans of files need none

        data = data.detach().cpu().view(torch.uint8).numpy()
    return data.data.cast("B") if data.size else memoryview(b"")


def typed(memory: NDArray[np.uint8], dtype: str) -> Span:
    """Bytes as elements of a floating-point type."""
    return Span(memory.view(CARRIER[dtype]), dtype)


# The bits of the exponent: all set in what is not finite.
_EXPONENTS = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000, "float64": 0x7FF0000000000000}


def _is_non_finite(span: Span) -> NDArray[np.bool_]:
    bits = np.frombuffer(as_bytes(span), np.dtype(f"u{ITEMSIZES[span.dtype]}"))
    exponent = bits.dtype.type(_EXPONENTS[span.dtype])
    return (bits & exponent) == exponent


def _num_non_finite(span: Span) -> int:
    return int(_is_non_finite(span).sum())
