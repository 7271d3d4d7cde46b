"""Exported networks: files that other programs run and that describe themselves, and the networks that they hold."""

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
from pydantic import ValidationError
from torch import Tensor, nn

from rkd_cli.errors import CheckpointError, RunError, SettingsError, first_line
from rkd_cli.schemas import Exported, Header

INPUT, OUTPUT = "images", "embeddings"
_KEY = "rkd"


@dataclass(frozen=True)
class ExportedFile:
    """An ONNX file of ours: what it says of itself, the serialized model without that, and a digest of both."""

    facts: Exported
    graph: bytes
    digest: str


class ExportedNet(nn.Module):
    """The network of an ONNX file, on the CPU by onnxruntime; stands where an ``EmbeddingNet`` stands that is not
    trained.

    Args:
        name: of the file, for errors.
        facts: what it says of itself.
        digest: of the file.
        session: of onnxruntime.
    """

    def __init__(self, name: str, facts: Exported, digest: str, session: Any) -> None:
        super().__init__()
        self.name, self.facts, self.digest, self.session = name, facts, digest, session
        self.embedding_size, self.l2normalize = facts.header.embedding_size, facts.header.l2normalize

    def forward(self, images: Tensor) -> Tensor:
        """Embed a batch.

        Args:
            images: (N, 3, S, S) uint8 RGB, S as exported.
        Returns:
            (N, D) float32, on the device of the images.

        Raises:
            TypeError, ValueError: anything else.
            RunError: onnxruntime cannot, as when memory is full.
        """
        side = self.facts.header.image_size
        if images.dtype != torch.uint8:
            raise TypeError(f"{self.name} takes uint8 images, got {images.dtype}")
        if images.shape[1:] != (3, side, side):
            raise ValueError(f"{self.name} takes images (N, 3, {side}, {side}), got {tuple(images.shape)}")
        pixels = np.ascontiguousarray(images.cpu().numpy())  # loaders have the channels last
        try:
            (found,) = self.session.run([OUTPUT], {INPUT: pixels})
        except _runtime_errors() as error:
            raise RunError(f"{self.name}: onnxruntime failed ({first_line(error)})") from None
        if found.shape != (len(images), self.embedding_size):
            raise RunError(f"{self.name}: gave {found.shape} numbers of {len(images)} images: export it again")
        return torch.from_numpy(found).to(images.device)

    def parameter_count(self) -> int:
        """How many numbers training adjusted in the network that was exported."""
        return self.facts.parameters


class ProgramNet(nn.Module):
    """The network of a file that torch.export saved, as an ``nn.Module`` that can be put into evaluation mode."""

    def __init__(self, run: nn.Module) -> None:
        super().__init__()
        self._run = run.forward  # as a child, the module would refuse eval()

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) uint8 RGB to (N, D) float32."""
        found: Tensor = self._run(images.contiguous())
        return found


def is_exported(path: Path) -> bool:
    """Whether a file is one of an exported network, by its suffix."""
    return path.suffix == ".onnx"


def check_installed(what: str, *more: str) -> None:
    """That the packages are there which ONNX takes.

    Args:
        what: takes them, for the error.
        more: packages beside those that run a file.
    Raises:
        SettingsError: one is not.
    """
    for package in ("onnx", "onnxruntime", *more):
        try:
            __import__(package)
        except ImportError:
            raise SettingsError(f"{what}: {package} is not installed: pip install 'rkd-cli[export]'") from None


def packed(graph: bytes, facts: Exported) -> bytes:
    """An ONNX file that describes itself.

    Messages of protobuf that follow each other are read as one, so the metadata can come after the graph, with the
    checksum of its very bytes.

    Args:
        graph: a serialized ModelProto.
        facts: what the file is to say of itself.
    """
    import onnx

    said = json.loads(facts.model_dump_json()) | {"bytes": len(graph)}
    text = json.dumps(said | {"checksum": _checksum(said, graph)})
    said_so = onnx.ModelProto(metadata_props=[{"key": _KEY, "value": text}])
    return graph + bytes(said_so.SerializeToString())


def read_exported(path: Path) -> ExportedFile:
    """Read an ONNX file of ours, every byte looked at; nothing of it is run.

    Raises:
        SettingsError: onnx or onnxruntime is not installed.
        CheckpointError: the file is absent, damaged, not one of ours, or its graph is none that we export.
    """
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
        raise CheckpointError(f"{path}: not an ONNX file, or a damaged one") from None
    if len(texts) != 1:
        raise CheckpointError(
            f"{path}: its metadata do not describe a network of rkd: it is damaged, or made by another program: "
            "`rkd export` makes such files"
        )
    facts, length, checksum = _parsed(path, texts[0])
    graph = data[:length] if isinstance(length, int) else b""
    if checksum != _checksum(facts | {"bytes": length}, graph):
        raise CheckpointError(f"{path}: its checksum is wrong: the file is damaged or was changed, export it again")
    described = _validated(path, facts)
    _check_graph(path, onnx.ModelProto.FromString(graph), described.header)
    return ExportedFile(described, graph, checksum)


def open_exported(path: Path) -> ExportedNet:
    """The network of an ONNX file of ours.

    Raises:
        SettingsError, CheckpointError: as ``read_exported``; or onnxruntime does not take the graph.
    """
    file = read_exported(path)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what is wrong is raised too
    try:
        session = onnxruntime.InferenceSession(file.graph, options, providers=["CPUExecutionProvider"])
    except _runtime_errors() as error:
        raise CheckpointError(f"{path}: onnxruntime cannot run it ({first_line(error)})") from None
    return ExportedNet(str(path), file.facts, file.digest, session)


def packed_program(program: torch.export.ExportedProgram, facts: Exported) -> bytes:
    """A file of ``torch.export.save`` that describes itself, by its extra file ``rkd``."""
    file = io.BytesIO()
    with quiet():
        torch.export.save(program, file, extra_files={_KEY: facts.model_dump_json()})
    return file.getvalue()


def read_program(path: Path) -> tuple[ProgramNet, Exported]:
    """The network of a file that ``packed_program`` made. Parts of it may be pickles: read none from a stranger.

    Raises:
        CheckpointError: the file is absent, damaged, or not one of ours.
    """
    extra = {_KEY: ""}
    try:
        with path.open("rb") as file, quiet():
            network = torch.export.load(file, extra_files=extra).module()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # a damaged archive can raise nearly anything from inside torch
        raise CheckpointError(f"{path}: not a torch.export program, or a damaged one ({first_line(error)})") from None
    if not extra[_KEY]:
        raise CheckpointError(f"{path}: a torch.export program, but none of rkd: it does not describe itself")
    return ProgramNet(network), _validated(path, json.loads(extra[_KEY]))


def _parsed(path: Path, text: str) -> tuple[dict[str, Any], object, str]:
    """What a file says of itself, the length of its graph, and the checksum.

    Raises:
        CheckpointError: it is no JSON object.
    """
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise CheckpointError(f"{path}: its header is damaged: it is no JSON object")
    return facts, facts.pop("bytes", None), str(facts.pop("checksum", None))


def _validated(path: Path, facts: object) -> Exported:
    try:
        return Exported.model_validate_json(json.dumps(facts))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise CheckpointError(f"{path}: its header is damaged or of a newer rkd ({where}: {first['msg']})") from None


def _check_graph(path: Path, model: Any, header: Header) -> None:
    """That a graph takes and gives what its header says, and that all of it is in the file.

    Raises:
        CheckpointError: it does not, or is not.
    """
    import onnx

    if _refers_outside(model):
        raise CheckpointError(f"{path}: keeps weights outside the file, which are not looked at: export it again")
    side, size = header.image_size, header.embedding_size
    expected = [(INPUT, onnx.TensorProto.UINT8, [3, side, side]), (OUTPUT, onnx.TensorProto.FLOAT, [size])]
    found = [_port(value) for value in (*model.graph.input, *model.graph.output)]
    if found != expected:
        due = f"uint8 {INPUT} (N, 3, {side}, {side}) and gives float {OUTPUT} (N, {size})"
        raise CheckpointError(f"{path}: its graph is not as its header says: one is due that takes {due}")


def _port(value: Any) -> tuple[str, int, list[int]]:
    """The name, type and shape of an input or output behind its first dimension, which has to be any number."""
    kind = value.type.tensor_type
    batch, *others = kind.shape.dim or [None]
    sides = [dim.dim_value for dim in others]
    return value.name, kind.elem_type, sides if batch is not None and batch.dim_param else []


def _refers_outside(message: Any) -> bool:
    """Whether a tensor of the model, however deep, keeps its values in another file."""
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
    """What onnxruntime raises; its errors have no common base."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("EPFail", "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NotImplemented")
    return tuple(getattr(state, name) for name in (*names, "RuntimeException"))


def _checksum(facts: dict[str, Any], graph: bytes) -> str:
    """Against damage, not against malice."""
    return f"{zlib.crc32(graph, zlib.crc32(json.dumps(facts, sort_keys=True).encode())):08x}"


@contextmanager
def quiet() -> Iterator[None]:
    """Without what exporters tell of their own work."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
