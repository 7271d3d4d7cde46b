"""Exported files: the embeddings of the network, whatever it is; what they say of themselves; damage and strangers."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from torch import Tensor

import rkd_cli
from rkd_cli.embedding.embedder import open_embedder
from rkd_cli.errors import CheckpointError, RkdError, RunError, SettingsError
from rkd_cli.models import EmbeddingNet, build_model
from rkd_cli.models.convert import to_int8, to_onnx, to_program
from rkd_cli.models.embedding_net import header_of
from rkd_cli.models.exported import (
    ExportedNet,
    open_exported,
    packed,
    packed_program,
    read_exported,
    read_program,
)
from rkd_cli.models.sources import read_network
from rkd_cli.schemas import Exported

NAME = "timm:test_resnet"  # small, with batch norms


def trained(name: str, l2normalize: bool, side: int = 32) -> EmbeddingNet:
    """Batch norms have statistics under which images differ in their embeddings."""
    torch.manual_seed(0)
    model = build_model(name, 8, l2normalize).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.3  # MobileNet's own would take hundreds of passes
    for _ in range(15):
        model(images(8, side))
    return model.eval()


def images(count: int, side: int = 32, seed: int = 1) -> Tensor:
    """Smooth ones, so that they differ in more than noise; channels last, as loaders give them."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator) * 255
    return F.interpolate(coarse, (side, side), mode="bilinear").byte().contiguous(memory_format=torch.channels_last)


def facts_of(model: EmbeddingNet, side: int = 32) -> Exported:
    header = header_of(model, NAME, 37, side, "folder", "eval", ("ab12",))
    header = header.model_copy(update={"epoch": 7, "eval_recall": {1: 0.5, 8: 0.75}})
    return Exported(header=header, parameters=model.parameter_count(), weights="float")


@cache
def converted(name: str, l2normalize: bool) -> tuple[EmbeddingNet, bytes]:
    model = trained(name, l2normalize)
    return model, to_onnx(model, 32)


@pytest.fixture(scope="module")
def model() -> EmbeddingNet:
    return converted(NAME, True)[0]


@pytest.fixture(scope="module")
def graph() -> bytes:
    return converted(NAME, True)[1]


@pytest.fixture(scope="module")
def program(model: EmbeddingNet) -> bytes:
    return packed_program(to_program(model, 32), facts_of(model))


@pytest.fixture
def file(model: EmbeddingNet, graph: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(packed(graph, facts_of(model)))
    return path


@pytest.mark.parametrize(
    ("name", "l2normalize"),
    [
        (NAME, True),
        (NAME, False),
        ("timm:test_vit", True),  # takes 160 pixels alone, so it resizes
        pytest.param("shufflenet_v2_x0_5", True, marks=pytest.mark.slow),
        pytest.param("resnet18", False, marks=pytest.mark.slow),
        pytest.param("mobilenet_v3_small", False, marks=pytest.mark.slow),
        pytest.param("inception_v1bn", True, marks=pytest.mark.slow),  # blue first, values to 255
    ],
)
def test_the_graph_embeds_as_the_network_does(name: str, l2normalize: bool, tmp_path: Path) -> None:
    model, graph = converted(name, l2normalize)
    (tmp_path / "m.onnx").write_bytes(packed(graph, facts_of(model)))
    (tmp_path / "m.pt2").write_bytes(packed_program(to_program(model, 32), facts_of(model)))
    for form in (open_exported(tmp_path / "m.onnx"), read_program(tmp_path / "m.pt2")[0].eval()):
        for count in (1, 3):
            some = images(count)
            with torch.inference_mode():
                due, found = model(some), form(some)
            assert found.dtype == torch.float32
            assert found.shape == (count, 8)
            torch.testing.assert_close(found, due, rtol=1e-3, atol=1e-4 * float(due.abs().max()))
    lengths = found.norm(dim=1)
    assert bool(((lengths - 1).abs() < 1e-5).all()) is l2normalize
    assert float((found[0] - found[1]).norm() / found[0].norm()) > 0.01  # it looks at the images


def test_resizing_down_is_antialiased_as_in_the_network(tmp_path: Path) -> None:
    model = trained("timm:test_vit", True, 200)
    (tmp_path / "m.onnx").write_bytes(packed(to_onnx(model, 200), facts_of(model, 200)))
    noise = torch.randint(0, 256, (2, 3, 200, 200), dtype=torch.uint8)
    with torch.inference_mode():
        torch.testing.assert_close(open_exported(tmp_path / "m.onnx")(noise), model(noise), rtol=1e-3, atol=1e-4)


def test_exporting_leaves_the_network_as_it_was(model: EmbeddingNet, graph: bytes) -> None:
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_file_says_what_it_holds(file: Path, program: bytes, model: EmbeddingNet, tmp_path: Path) -> None:
    facts = facts_of(model)
    assert read_exported(file).facts == facts
    assert read_network(file)[0] == facts.header
    network = open_exported(file)
    assert (network.embedding_size, network.l2normalize) == (8, True)
    assert network.parameter_count() == sum(p.numel() for p in model.parameters())
    (tmp_path / "m.pt2").write_bytes(program)
    assert read_program(tmp_path / "m.pt2")[1] == facts


def test_a_file_is_onnx_for_everybody(file: Path) -> None:
    onnx.checker.check_model(onnx.load(file), full_check=True)
    (entry,) = onnx.load(file).metadata_props
    assert entry.key == "rkd"


def test_a_file_says_nothing_of_this_machine(file: Path) -> None:
    content = file.read_bytes()
    for told in (str(Path(rkd_cli.__file__).parent), str(Path(torch.__file__).parent), "embedding_net", "aten"):
        assert told.encode() not in content


def test_its_digest_is_of_its_weights(file: Path, graph: bytes, model: EmbeddingNet, tmp_path: Path) -> None:
    other = onnx.ModelProto.FromString(graph)
    tensor = next(tensor for tensor in other.graph.initializer if tensor.name == "linear.bias")
    tensor.raw_data = (1.01 * onnx.numpy_helper.to_array(tensor)).tobytes()
    (tmp_path / "other.onnx").write_bytes(packed(bytes(other.SerializeToString()), facts_of(model)))
    digests = {open_embedder(str(path)).digest for path in (file, file, tmp_path / "other.onnx")}
    assert len(digests) == 2


def test_int8(model: EmbeddingNet, graph: bytes, tmp_path: Path) -> None:
    given = [{"images": images(8, seed=seed).numpy()} for seed in range(4)]
    small = to_int8(graph, given)
    assert small == to_int8(graph, given)
    assert len(small) < len(graph) / 3
    made = onnx.ModelProto.FromString(small)
    tensors = {tensor.name: tensor for tensor in made.graph.initializer}
    weights = [tensor for tensor in tensors.values() if tensor.data_type == TensorProto.INT8 and len(tensor.dims) > 1]
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(weights) == len(layers) > 10
    assert max(abs(onnx.numpy_helper.to_array(tensor).astype(int)).max() for tensor in weights) == 64
    scales = [tensors[node.input[1]] for node in made.graph.node if node.input[0] in {w.name for w in weights}]
    assert all(len(scale.dims) == 1 and scale.dims[0] > 1 for scale in scales)  # one for each channel
    (last,) = (node for node in made.graph.node if node.op_type == "Gemm")
    after = {node.op_type for node in made.graph.node if last.output[0] in node.input}
    assert "QuantizeLinear" not in after  # the embedding itself is float
    facts = facts_of(model).model_copy(update={"weights": "int8"})
    (tmp_path / "m.onnx").write_bytes(packed(small, facts))
    some = images(16, seed=9)
    evaluator: Any = onnx.reference.ReferenceEvaluator(made)
    (as_written,) = evaluator.run(None, {"images": some.contiguous().numpy()})
    with torch.inference_mode():
        found = open_exported(tmp_path / "m.onnx")(some)
        cosines = F.cosine_similarity(model(some), found)
    # kernels of 16-bit sums, which x86 without VNNI has, saturate with weights of 8 bits: 0.75 here
    assert float(F.cosine_similarity(torch.from_numpy(as_written), found).mean()) > 0.9
    assert float(cosines.mean()) > 0.9  # random weights: hardly more than noise to tell images by
    spread = F.cosine_similarity(model(some), model(some.roll(1, 0)))
    assert float(spread.detach().mean()) < 0.8


@pytest.mark.slow
def test_int8_of_a_transformer_leaves_its_residual_stream(tmp_path: Path) -> None:
    made = onnx.ModelProto.FromString(to_int8(converted("timm:test_vit", True)[1], [{"images": images(8).numpy()}]))
    producer = {output: node for node in made.graph.node for output in node.output}
    sums = [node for node in made.graph.node if node.op_type == "Add"]
    assert sums
    assert not [
        n for n in sums for name in n.input if name in producer and producer[name].op_type == "DequantizeLinear"
    ]
    assert [node for node in made.graph.node if node.op_type == "DequantizeLinear"]


@pytest.mark.parametrize(
    ("given", "kind", "says"),
    [
        (torch.rand(2, 3, 32, 32), TypeError, "takes uint8 images, got torch.float32"),
        (torch.zeros(2, 3, 32, 31, dtype=torch.uint8), ValueError, r"\(N, 3, 32, 32\) images, got \(2, 3, 32, 31"),
        (torch.zeros(3, 32, 32, dtype=torch.uint8), ValueError, r"got \(3, 32, 32\)"),
    ],
    ids=["floats", "another side", "no batch"],
)  # fmt: skip
def test_what_is_no_batch_of_its_images(file: Path, given: Tensor, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        open_exported(file)(given)


def test_what_onnxruntime_raises_is_one_line(file: Path) -> None:
    network = open_exported(file)

    class Broken:
        def run(self, *arguments: object) -> None:
            network.session.run(["another"], {"images": np.zeros((1, 3, 32, 32), np.uint8)})

    with pytest.raises(RunError, match=rf"^{file}: onnxruntime failed \(.+\)$"):
        ExportedNet(str(file), network.facts, network.digest, Broken())(images(1))


def foreign(**options: Any) -> bytes:
    """A graph of another program: the sum of an image's pixels."""
    batch = options.get("batch", "N")
    source = helper.make_tensor_value_info("images", TensorProto.UINT8, [batch, 3, 32, 32])
    target = helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, [batch, 8])
    weight = helper.make_tensor("weight", TensorProto.FLOAT, [3072, 8], np.ones((3072, 8), np.float32).ravel())
    if options.get("outside"):
        weight.ClearField("float_data")
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="location", value="../secret.bin")
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["floats"], ["flat"]),
        helper.make_node(options.get("operator", "MatMul"), ["flat", "weight"], ["embeddings"]),
    ]
    initializers = [weight]
    if options.get("outside") == "deep":
        nodes.insert(0, helper.make_node("Constant", [], ["weight"], value=weight))
        initializers = []
    made = helper.make_graph(nodes, "g", [source], [target], initializers)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(model.SerializeToString())


def test_a_graph_that_is_right_is_taken(model: EmbeddingNet, tmp_path: Path) -> None:
    """So that the refusals below are those of what is wrong with each."""
    (tmp_path / "m.onnx").write_bytes(packed(foreign(), facts_of(model)))
    assert open_exported(tmp_path / "m.onnx")(images(2)).shape == (2, 8)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (lambda facts: b"", "contains no rkd header"),
        (lambda facts: b"hello " * 100, "not an ONNX file, or damaged"),
        (lambda facts: foreign(), "contains no rkd header"),
        (lambda facts: packed(foreign(), facts)[:-1], "not an ONNX file, or damaged"),
        (lambda facts: packed(packed(foreign(), facts), facts), "contains no rkd header"),
        (lambda facts: packed(foreign(), facts).replace(b'"epoch": 7', b'"epoch": 8'), "wrong checksum"),
        (lambda facts: packed(foreign(), facts.model_copy(update={"format": 2})), r"newer rkd \(format"),
        (lambda facts: packed(foreign(), facts.model_copy(update={"parameters": -1})), r"\(parameters"),
        (lambda facts: packed(foreign(outside=True), facts), "stores weights in other files"),
        (lambda facts: packed(foreign(outside="deep"), facts), "stores weights in other files"),
        (lambda facts: packed(foreign(batch=2), facts), "the graph does not match the header"),
        (lambda facts: packed(foreign(operator="Nonsense"), facts), "onnxruntime cannot run it"),
        (lambda facts: packed(b"", facts), "the graph does not match the header"),
    ],
    ids=range(13),
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_bad_files_are_one_line(
    model: EmbeddingNet, tmp_path: Path, content: Callable[[Exported], bytes], says: str
) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content(facts_of(model)))
    with pytest.raises(CheckpointError, match=says) as caught:
        open_exported(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(("update", "size"), [({"image_size": 31}, 8), ({"embedding_size": 9}, 9)])
def test_a_header_of_another_network_is_refused(
    model: EmbeddingNet, graph: bytes, tmp_path: Path, update: dict[str, int], size: int
) -> None:
    facts = facts_of(model)
    facts = facts.model_copy(update={"header": facts.header.model_copy(update=update)})
    (tmp_path / "m.onnx").write_bytes(packed(graph, facts))
    with pytest.raises(CheckpointError, match=rf"expected one from .+ float embeddings \(N, {size}\)"):
        read_exported(tmp_path / "m.onnx")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.onnx", tmp_path):
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_exported(path)


def test_damage_is_noticed_wherever_it_is(file: Path, graph: bytes, tmp_path: Path) -> None:
    whole, path = file.read_bytes(), tmp_path / "damaged.onnx"
    random = np.random.default_rng(0)
    for number in range(200):
        damaged = bytearray(whole)
        first = len(graph) if number % 2 else 0  # half of them where the file describes itself
        if number % 5 == 0:
            del damaged[random.integers(first, len(whole)) :]
        else:
            for _ in range(random.integers(1, 4)):
                damaged[random.integers(first, len(whole))] ^= 1 << int(random.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError) as caught:
            open_exported(path)
        assert len(str(caught.value).splitlines()) == 1, number


def test_damaged_programs_are_one_line(model: EmbeddingNet, tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    torch.export.save(to_program(model, 32), path)
    with pytest.raises(CheckpointError, match="without rkd header"):
        read_program(path)
    whole = path.read_bytes()
    for length in (0, 1, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"not a torch\.export file, or damaged"):
            read_program(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_program(tmp_path / "absent.pt2")


def test_a_program_is_no_model_to_name(tmp_path: Path) -> None:
    (tmp_path / "m.pt2").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="may contain pickles, so they are not read"):
        read_network(tmp_path / "m.pt2")


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_without_the_packages_one_line_says_what_to_install(
    file: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(
        SettingsError, match=rf"^{file}: {package} is not installed. Run `pip install 'rkd-cli\[export\]'`.$"
    ):
        read_network(file)


def test_a_network_that_cannot_be_exported_is_one_line() -> None:
    class Odd(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.mean((2, 3)) if float(images.sum()) > 0 else images.amax((2, 3))

    model = EmbeddingNet(Odd(), 3, None, True)
    for convert in (to_onnx, to_program):
        with pytest.raises(RkdError, match=r"^Odd: this network cannot be exported \(.+\)$") as caught:
            convert(model, 8)
        assert len(str(caught.value).splitlines()) == 1
