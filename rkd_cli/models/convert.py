"""Export networks to ONNX (float, float16 or int8) and torch.export."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rkd_cli.errors import CheckpointError, first_line
from rkd_cli.models.backbones import compute_out_of_place
from rkd_cli.models.embedding_net import EmbeddingNet, freeze
from rkd_cli.models.exported import FLOAT_INPUT, INPUT, OPSET, OUTPUT, quiet
from rkd_cli.models.features import pooled

_PRODUCTS = ("Conv", "Gemm", "MatMul")
# operators between products that stay in 8 bits; not Mul, because rounding gates (squeeze-excitation, swish) costs
# accuracy and saves no time
_BETWEEN = ("Add", "AveragePool", "Clip", "Concat", "MaxPool", "Relu", "Reshape", "Split", "Transpose")


def to_program(model: EmbeddingNet, side: int) -> torch.export.ExportedProgram:
    """Export a copy of a network with torch.export: (N, 3, side, side) uint8 RGB to (N, D) float32, any N."""
    network = freeze(copy.deepcopy(model).cpu())
    with _one_line_errors(model):
        return torch.export.export(network, (_example(side),), dynamic_shapes=_shapes())


class _Form(nn.Module):
    """A network that takes float pixels as ``exported.fed`` gives them, or computes its backbone in half precision."""

    def __init__(self, network: EmbeddingNet, has_float_input: bool, is_half: bool) -> None:
        super().__init__()
        self.network, self.has_float_input, self.is_half = network, has_float_input, is_half
        if is_half:
            network.base.half()

    def forward(self, images: Tensor) -> Tensor:
        network, expects = self.network, self.network.normalization
        if self.has_float_input:
            images = images[:, [2, 1, 0]] if expects.bgr255 else images
            side = expects.input_size
            if side and images.shape[-2:] != (side, side):  # a resize is linear, so it may follow the normalization
                images = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
        else:
            images = network.normalize(images)
        features = network.base(images.half() if self.is_half else images)
        return network.embed_features(pooled(features).flatten(1))


def to_onnx(model: EmbeddingNet, side: int, has_float_input: bool = False, is_half: bool = False) -> bytes:
    """Export a copy of a network as a serialized ONNX model, with inputs and outputs as in ``to_program``.

    Args:
        model: the network.
        side: S of its images.
        has_float_input: take normalized float32 ``pixel_values`` in place of uint8 ``images``.
        is_half: store and compute the backbone in float16; inputs and outputs stay as they are.
    """
    network: nn.Module = freeze(copy.deepcopy(model).cpu())
    compute_out_of_place(network)
    if has_float_input or is_half:
        assert isinstance(network, EmbeddingNet)
        network = _Form(network, has_float_input, is_half)
    images = _example(side).float() if has_float_input else _example(side)
    with _one_line_errors(model):
        program = torch.onnx.export(
            network,
            (images,),
            dynamo=True,
            dynamic_shapes=_shapes(),
            input_names=[FLOAT_INPUT if has_float_input else INPUT],
            output_names=[OUTPUT],
            opset_version=OPSET,
            verbose=False,
        )
        assert program is not None  # always with dynamo
        proto = program.model_proto
        _strip(proto)
        return bytes(proto.SerializeToString())


def to_int8(graph: bytes, fed: Iterable[dict[str, np.ndarray]]) -> bytes:
    """Quantize a model of ``to_onnx``: weights to 7 bits of int8 per channel, activations to uint8, in QDQ format.

    Calibrates on inputs of the model with MinMax: percentiles clip what distinguishes images, and entropy gives
    the same ranges. Activations are uint8, because x86 multiplies int8 by int8 several times slower.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]  # has no types
        def __init__(self) -> None:
            self._batches = iter(fed)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._batches, None)

    with TemporaryDirectory() as folder, quiet():
        given, prepared, quantized = (Path(folder, f"{name}.onnx") for name in ("given", "prepared", "quantized"))
        given.write_bytes(graph)
        # symbolic shape inference fails on torch's graphs, so use ONNX's own
        quant_pre_process(given, prepared, skip_symbolic_shape=True)
        kinds = {node.op_type for node in onnx.load(prepared).graph.node}
        # the residual stream of a transformer has outliers that do not fit 8 bits, so quantize only its products
        quantized_kinds = _PRODUCTS if "LayerNormalization" in kinds else (*_PRODUCTS, *_BETWEEN)
        quantization.quantize_static(
            prepared,
            quantized,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            # 7 bits: x86 without VNNI adds two products in 16 bits, which saturate with 8-bit weights
            reduce_range=True,
            calibrate_method=quantization.CalibrationMethod.MinMax,
            op_types_to_quantize=list(quantized_kinds),
            extra_options={
                # the embedding (of a Gemm) stays float: rounding it costs more accuracy than all other layers together
                "OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"],
                "MatMulConstBOnly": True,
                "QuantizeBias": False,  # takes three times the bytes, and onnxruntime does it when it loads the file
            },
        )
        proto = onnx.load(quantized)
    _strip(proto)
    _shorten(proto.graph)
    return bytes(proto.SerializeToString())


def to_int8_weights(graph: bytes) -> bytes:
    """Store the weights of a model of ``to_onnx`` as int8, symmetric per output channel; it computes in float.

    A weight is within half of its channel's scale. Cast and Mul give it back: unlike DequantizeLinear, every
    onnxruntime computes these once, when it loads the file.
    """
    import onnx
    from onnx import helper, numpy_helper

    proto = onnx.ModelProto.FromString(graph)
    inner = proto.graph
    weights = {tensor.name: tensor for tensor in inner.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    nodes = list(inner.node)
    del inner.node[:]
    for node in nodes:
        name = node.input[1] if node.op_type in _PRODUCTS else ""
        if name in weights:
            tensor = weights.pop(name)
            weight = numpy_helper.to_array(tensor)
            is_row = node.op_type == "Conv" or any(one.name == "transB" and one.i for one in node.attribute)
            others = tuple(axis for axis in range(weight.ndim) if axis != (0 if is_row else weight.ndim - 1))
            scale = np.abs(weight).max(axis=others, keepdims=True) / 127
            scale[scale == 0] = 1
            stored = {f"{name}.codes": np.round(weight / scale).astype(np.int8), f"{name}.scale": scale}
            inner.initializer.remove(tensor)
            inner.initializer.extend(numpy_helper.from_array(value, key) for key, value in stored.items())
            cast = helper.make_node("Cast", [f"{name}.codes"], [f"{name}.cast"], to=onnx.TensorProto.FLOAT)
            inner.node.extend([cast, helper.make_node("Mul", [cast.output[0], f"{name}.scale"], [name])])
        inner.node.append(node)
    _shorten(inner)
    return bytes(proto.SerializeToString())


def _example(side: int) -> Tensor:
    return torch.zeros(2, 3, side, side, dtype=torch.uint8)  # torch.export treats a batch size of 1 as a constant


def _shapes() -> dict[str, Any]:
    return {INPUT: {0: torch.export.Dim("N")}}


def _strip(proto: Any) -> None:
    """Remove metadata that no program needs: origins of nodes (with local paths) and inferred shapes."""
    graph = proto.graph
    proto.producer_version = ""
    for part in (proto, graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    graph.ClearField("value_info")
    used = {node.domain for node in graph.node}
    needed = [entry for entry in proto.opset_import if entry.domain in used]
    proto.ClearField("opset_import")
    proto.opset_import.extend(needed)


def _shorten(graph: Any) -> None:
    """Shorten internal names, which QDQ pairs repeat: 5% of a small file."""
    if any(attribute.HasField("g") for node in graph.node for attribute in node.attribute):
        return  # subgraphs refer to these names
    names = {port.name: port.name for port in (*graph.input, *graph.output)} | {"": ""}
    for tensor in graph.initializer:
        tensor.name = names.setdefault(tensor.name, f"{len(names):x}")
    for node in graph.node:
        node.ClearField("name")
        for ports in (node.input, node.output):
            ports[:] = [names.setdefault(name, f"{len(names):x}") for name in ports]


@contextmanager
def _one_line_errors(model: EmbeddingNet) -> Iterator[None]:
    """Turn any error of torch's exporters into a CheckpointError of one line."""
    try:
        with quiet():
            yield
    except Exception as error:  # tracing runs the network's code on proxies, which may raise any type
        reason = first_line(error)
        what = type(model.base).__name__
        raise CheckpointError(f"{what}: this network cannot be exported ({reason})") from None
