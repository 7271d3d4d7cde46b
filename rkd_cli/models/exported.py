"""Read, write and run exported networks: ONNX and torch.export files with a header."""

from __future__ import annotations

import io
import json
import logging
import warnings
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rkd_cli.errors import CheckpointError, RunError, SettingsError, first_line
from rkd_cli.models.checkpoint import parsed, validated
from rkd_cli.schemas import PADDING, Exported, Header

INPUT, OUTPUT = "images", "embeddings"
FLOAT_INPUT = "pixel_values"  # as transformers names it
PREPROCESSOR = "preprocessor_config.json"
OPSET = 20  # the first with Gelu; antialiased Resize needs 18
_KEY = "rkd"


@dataclass(frozen=True)
class ExportedFile:
    """An exported ONNX file: its header, the serialized model without it, and a digest of both."""

    facts: Exported
    graph: bytes
    digest: str


class ExportedNet(nn.Module):
    """The network of an exported ONNX file, run by onnxruntime on the CPU; replaces an ``EmbeddingNet`` for inference.

    ``name`` is for errors.
    """

    def __init__(self, name: str, facts: Exported, digest: str, session: Any) -> None:
        super().__init__()
        self.name, self.facts, self.digest, self.session = name, facts, digest, session
        self.embedding_size, self.l2normalize = facts.header.embedding_size, facts.header.l2normalize

    def forward(self, images: Tensor) -> Tensor:
        """(N, D) float32 embeddings of (N, 3, S, S) uint8 RGB, on the device of the images; S is fixed."""
        side = self.facts.header.image_size
        if images.dtype != torch.uint8:
            raise TypeError(f"{self.name} takes uint8 images, got {images.dtype}")
        if images.shape[1:] != (3, side, side):
            raise ValueError(f"{self.name} takes (N, 3, {side}, {side}) images, got {tuple(images.shape)}")
        try:
            (found,) = self.session.run([OUTPUT], fed(self.facts, images))
        except _runtime_errors() as error:
            raise RunError(f"{self.name}: onnxruntime failed ({first_line(error)})") from None
        if found.shape != (len(images), self.embedding_size):
            raise RunError(f"{self.name}: returned shape {found.shape} for {len(images)} images. Export it again.")
        return torch.from_numpy(found).to(images.device)

    def parameter_count(self) -> int:
        """The number of parameters of the exported network."""
        return self.facts.parameters


def mean_and_std(header: Header) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of RGB in [0, 1] that a float input is normalized by."""
    if header.bgr255:
        return [value / 255 for value in header.mean[::-1]], [value / 255 for value in header.std[::-1]]
    return list(header.mean), list(header.std)


def fed(facts: Exported, images: Tensor) -> dict[str, np.ndarray]:
    """The input of an exported ONNX file from (N, 3, S, S) uint8 RGB."""
    pixels = images.cpu()
    if facts.input == "uint8":
        return {INPUT: np.ascontiguousarray(pixels.numpy())}  # from channels-last
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in mean_and_std(facts.header))
    return {FLOAT_INPUT: np.ascontiguousarray(((pixels.float() / 255 - mean) / std).numpy())}


def described(facts: Exported, name: str) -> dict[str, Any]:
    """What a program must do to an image before the exported ONNX file ``name``, and what it gets; for a JSON file."""
    header, side = facts.header, facts.header.image_size
    mean, std = mean_and_std(header)
    is_float = facts.input == "float"
    return {
        "file": name,
        "opset": facts.opset,
        "weights": facts.weights,
        "input": {
            "name": FLOAT_INPUT if is_float else INPUT,
            "type": "float32" if is_float else "uint8",
            "shape": ["N", 3, side, side],
            "channels": "RGB",
            "normalization": {"scale": 1 / 255, "mean": mean, "std": std} if is_float else None,
        },
        "output": {
            "name": OUTPUT,
            "type": "float32",
            "shape": ["N", header.embedding_size],
            "unit_length": header.l2normalize,
        },
        "preprocessing": [
            {"step": "decode", "exif_orientation": True, "color": "8 bits, sRGB", "transparent": "on white"},
            {"step": "resize", "fit": header.fit, "side": header.resize, "filter": "bilinear", "antialias": True}
            | ({"padding": list(PADDING)} if header.fit == "pad" else {}),
            {"step": "center_crop", "side": side},
        ],
    }


def preprocessor(header: Header) -> dict[str, Any] | None:
    """``preprocessor_config.json`` of transformers, for a float input; None if it cannot say how images are padded."""
    if header.fit == "pad":
        return None
    mean, std = mean_and_std(header)
    square = {"height": header.resize, "width": header.resize}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": header.resize} if header.fit == "crop" else square,
        "resample": 2,  # bilinear
        "do_center_crop": True,
        "crop_size": {"height": header.image_size, "width": header.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }


class ProgramNet(nn.Module):
    """The network of a torch.export file, as an ``nn.Module`` that supports ``eval()``."""

    def __init__(self, run: nn.Module) -> None:
        super().__init__()
        self._run = run.forward  # a child module would make eval() raise

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) uint8 RGB to (N, D) float32."""
        found: Tensor = self._run(images.contiguous())
        return found


def is_exported(path: Path) -> bool:
    """Whether a file is an exported network, by its suffix."""
    return path.suffix == ".onnx"


def check_installed(what: str, *more: str) -> None:
    """Raise a SettingsError for ``what`` if a package for ONNX, or one of ``more``, is not installed."""
    for package in ("onnx", "onnxruntime", *more):
        try:
            __import__(package)
        except ImportError:
            raise SettingsError(f"{what}: {package} is not installed. Run `pip install 'rkd-cli[export]'`.") from None


def packed(graph: bytes, facts: Exported) -> bytes:
    """A serialized ModelProto with a header.

    Concatenated protobuf messages are read as one, so the header can follow the graph with a checksum of its bytes.
    """
    import onnx

    header = json.loads(facts.model_dump_json()) | {"bytes": len(graph)}
    text = json.dumps(header | {"checksum": _checksum(header, graph)})
    metadata = onnx.ModelProto(metadata_props=[{"key": _KEY, "value": text}])
    return graph + bytes(metadata.SerializeToString())


def read_exported(path: Path) -> ExportedFile:
    """Read and check an exported ONNX file without running it."""
    check_installed(str(path))
    import onnx
    from google.protobuf.message import DecodeError

    try:
        data = path.read_bytes()
        model = onnx.ModelProto.FromString(data)
        texts = [entry.value for entry in model.metadata_props if entry.key == _KEY]
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except (DecodeError, UnicodeDecodeError):
        raise CheckpointError(f"{path}: not an ONNX file, or damaged") from None
    if len(texts) != 1:
        raise CheckpointError(
            f"{path}: contains no rkd header, so it is damaged or from another program. Use a file of `rkd export`."
        )
    facts = parsed(path, texts[0])
    length, checksum = facts.pop("bytes", None), str(facts.pop("checksum", None))
    graph = data[:length] if isinstance(length, int) else b""
    if checksum != _checksum(facts | {"bytes": length}, graph):
        raise CheckpointError(f"{path}: damaged or changed (wrong checksum). Export it again.")
    described = validated(path, facts, Exported)
    _check_graph(path, onnx.ModelProto.FromString(graph), described)
    return ExportedFile(described, graph, checksum)


def open_exported(path: Path) -> ExportedNet:
    """The network of an exported ONNX file."""
    file = read_exported(path)
    try:
        session = open_session(file.graph)
    except _runtime_errors() as error:
        raise CheckpointError(f"{path}: onnxruntime cannot run it ({first_line(error)})") from None
    return ExportedNet(str(path), file.facts, file.digest, session)


def open_session(graph: bytes) -> Any:
    """An ``onnxruntime.InferenceSession`` on the CPU, with as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # images are decoded beside
    options.log_severity_level = 4  # errors are raised anyway
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def packed_program(program: torch.export.ExportedProgram, facts: Exported) -> bytes:
    """A file of ``torch.export.save`` with a header in its extra file ``rkd``."""
    file = io.BytesIO()
    with quiet():
        torch.export.save(program, file, extra_files={_KEY: facts.model_dump_json()})
    return file.getvalue()


def read_program(path: Path) -> tuple[ProgramNet, Exported]:
    """The network of a file of ``packed_program``. It may contain pickles: do not read untrusted files."""
    extra = {_KEY: ""}
    try:
        with path.open("rb") as file, quiet():
            network = torch.export.load(file, extra_files=extra).module()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # torch raises any type for damaged archives
        raise CheckpointError(f"{path}: not a torch.export file, or damaged ({first_line(error)})") from None
    if not extra[_KEY]:
        raise CheckpointError(f"{path}: a torch.export file without rkd header. Use a file of `rkd export`.")
    return ProgramNet(network), validated(path, json.loads(extra[_KEY]), Exported)


def _check_graph(path: Path, model: Any, facts: Exported) -> None:
    """Raise a CheckpointError unless inputs and outputs match the header and all weights are in the file."""
    import onnx

    if _refers_outside(model):
        raise CheckpointError(f"{path}: stores weights in other files, which is not supported. Export it again.")
    side, size = facts.header.image_size, facts.header.embedding_size
    name, kind = (INPUT, "UINT8") if facts.input == "uint8" else (FLOAT_INPUT, "FLOAT")
    expected = [
        (name, onnx.TensorProto.DataType.Value(kind), [3, side, side]),
        (OUTPUT, onnx.TensorProto.FLOAT, [size]),
    ]
    found = [_port(value) for value in (*model.graph.input, *model.graph.output)]
    if found != expected:
        due = f"from {kind.lower()} {name} (N, 3, {side}, {side}) to float {OUTPUT} (N, {size})"
        raise CheckpointError(f"{path}: the graph does not match the header: expected one {due}. Export it again.")


def _port(value: Any) -> tuple[str, int, list[int]]:
    """Name, type and shape of an input or output, without its first dimension, which must be dynamic."""
    kind = value.type.tensor_type
    batch, *others = kind.shape.dim or [None]
    sides = [dim.dim_value for dim in others]
    return value.name, kind.elem_type, sides if batch is not None and batch.dim_param else []


def _refers_outside(message: Any) -> bool:
    """Whether any tensor of the model is stored in another file."""
    import onnx

    if isinstance(message, onnx.TensorProto):
        return message.data_location == onnx.TensorProto.EXTERNAL or bool(message.external_data)
    for _, value in message.ListFields():
        parts: Iterable[Any] = [value] if hasattr(value, "ListFields") else value
        if not isinstance(value, str | bytes | int | float) and any(
            _refers_outside(part) for part in parts if hasattr(part, "ListFields")
        ):
            return True
    return False


def _runtime_errors() -> tuple[type[Exception], ...]:
    """The errors of onnxruntime, which have no common base class."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("EPFail", "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NotImplemented")
    return tuple(getattr(state, name) for name in (*names, "RuntimeException"))


def _checksum(facts: dict[str, Any], graph: bytes) -> str:
    """Detects damage, not manipulation."""
    return f"{zlib.crc32(graph, zlib.crc32(json.dumps(facts, sort_keys=True).encode())):08x}"


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings and logs of exporters."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
