"""Networks as graphs that other programs run: by ONNX, in float or int8, and by torch.export."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rkd_cli.errors import CheckpointError, first_line
from rkd_cli.models.embedding_net import EmbeddingNet, freeze
from rkd_cli.models.exported import INPUT, OUTPUT, quiet

_PRODUCTS = ("Conv", "Gemm", "MatMul")
# what 8 bits pass through on their way from one product to the next; not Mul: gates (squeeze-excitation, swish) lose by
# being rounded, and gain no time that could be measured
_BETWEEN = ("Add", "AveragePool", "Clip", "Concat", "MaxPool", "Relu", "Reshape", "Split", "Transpose")
_OPSET = 20  # the first with Gelu; antialiased resizing is of 18


def to_program(model: EmbeddingNet, side: int) -> torch.export.ExportedProgram:
    """A network as a program of torch.export: (N, 3, side, side) uint8 RGB to (N, D) float32, any N.

    Args:
        model: stays as it is.
        side: of its images, in pixels.
    Raises:
        CheckpointError: the network cannot be traced.
    """
    network = freeze(copy.deepcopy(model).cpu())
    with _speaking_of(model):
        return torch.export.export(network, (_example(side),), dynamic_shapes=_shapes())


def to_onnx(model: EmbeddingNet, side: int) -> bytes:
    """The same as a serialized ONNX model.

    Args:
        model: stays as it is.
        side: of its images, in pixels.
    Raises:
        CheckpointError: the network cannot be traced, or an operation of it has no counterpart.
    """
    network = freeze(copy.deepcopy(model).cpu())
    with _speaking_of(model):
        program = torch.onnx.export(
            network,
            (_example(side),),
            dynamo=True,
            dynamic_shapes=_shapes(),
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=_OPSET,
            verbose=False,
        )
        assert program is not None  # as dynamo gives one
        proto = program.model_proto
        _strip(proto)
        return bytes(proto.SerializeToString())


def to_int8(graph: bytes, images: Iterable[np.ndarray]) -> bytes:
    """Quantize an ONNX model: weights to 7 bits of int8 for each channel, activations to uint8, as operators QDQ.

    Ranges are those that occur (MinMax): percentiles cut what tells images apart, and entropy came to the same ranges.
    uint8 activations, for x86 multiplies uint8 by int8; int8 by int8 is several times slower there.

    Args:
        graph: of ``to_onnx``.
        images: batches (B, 3, S, S) uint8, to calibrate by.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]  # has no types
        def __init__(self) -> None:
            self._batches = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self._batches, None)
            return None if batch is None else {INPUT: np.ascontiguousarray(batch)}

    with TemporaryDirectory() as folder, quiet():
        given, prepared, quantized = (Path(folder, f"{name}.onnx") for name in ("given", "prepared", "quantized"))
        given.write_bytes(graph)
        # shapes are inferred by ONNX itself; the symbolic way fails on the graphs that torch makes
        quant_pre_process(given, prepared, skip_symbolic_shape=True)
        kinds = {node.op_type for node in onnx.load(prepared).graph.node}
        # the residual stream of a transformer has outliers that 8 bits do not hold: its products alone are int8
        quantized_kinds = _PRODUCTS if "LayerNormalization" in kinds else (*_PRODUCTS, *_BETWEEN)
        quantization.quantize_static(
            prepared,
            quantized,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            # 7 bits: x86 without VNNI adds two products in 16 bits, and of 8-bit weights those sums saturate
            reduce_range=True,
            calibrate_method=quantization.CalibrationMethod.MinMax,
            op_types_to_quantize=list(quantized_kinds),
            extra_options={
                # the embedding (of a Gemm) stays float: rounded to 256 steps it lost more than all the rest together
                "OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"],
                "MatMulConstBOnly": True,
                "QuantizeBias": False,  # onnxruntime does that when it loads the file; three times the bytes in it
            },
        )
        proto = onnx.load(quantized)
    _strip(proto)
    _shorten(proto.graph)
    return bytes(proto.SerializeToString())


def _example(side: int) -> Tensor:
    return torch.zeros(2, 3, side, side, dtype=torch.uint8)  # one image would be taken for a constant


def _shapes() -> dict[str, Any]:
    return {INPUT: {0: torch.export.Dim("N")}}


def _strip(proto: Any) -> None:
    """Take off what no program needs: where each node comes from, with paths of this machine, and inferred shapes."""
    graph = proto.graph
    proto.producer_version = ""
    for part in (proto, graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    graph.ClearField("value_info")
    used = {node.domain for node in graph.node}
    kept = [entry for entry in proto.opset_import if entry.domain in used]
    proto.ClearField("opset_import")
    proto.opset_import.extend(kept)


def _shorten(graph: Any) -> None:
    """Short names for all that is inside: each QDQ pair repeats those of its weight, a twentieth of a small file."""
    if any(attribute.HasField("g") for node in graph.node for attribute in node.attribute):
        return  # the graph of a branch sees these names too
    names = {INPUT: INPUT, OUTPUT: OUTPUT, "": ""}
    for tensor in graph.initializer:
        tensor.name = names.setdefault(tensor.name, f"{len(names):x}")
    for node in graph.node:
        node.ClearField("name")
        for ports in (node.input, node.output):
            ports[:] = [names.setdefault(name, f"{len(names):x}") for name in ports]


@contextmanager
def _speaking_of(model: EmbeddingNet) -> Iterator[None]:
    """Have an error of torch's exporters, of which there are many kinds, be one line.

    Raises:
        CheckpointError: one was raised.
    """
    try:
        with quiet():
            yield
    except Exception as error:  # tracing runs the network's own code on stand-ins, and any of it may object
        reason = first_line(error)
        what = type(model.base).__name__
        raise CheckpointError(f"{what}: this network cannot be exported ({reason})") from None
