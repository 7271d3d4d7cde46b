"""What the processes of a test compute together, and how they are started."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from forked import CONTEXT
from rkd_cli import metrics
from rkd_cli.data import ImageSet
from rkd_cli.data.augment import Augmentation
from rkd_cli.data.loader import EvalLoader
from rkd_cli.embedding.batches import embed
from rkd_cli.embedding.views import VectorReader
from rkd_cli.events import silent
from rkd_cli.models.sync_norm import synchronize
from rkd_cli.runtime import distributed
from rkd_cli.runtime.context import Context
from rkd_cli.runtime.distributed import ALONE, Ranks
from rkd_cli.settings import DistillSettings, TeacherSettings
from rkd_cli.settings.resolve import resolve
from rkd_cli.training.objective import MINERS, View, distill_objective, objectives, teacher_loss
from rkd_cli.training.step import sum_gradients, update_weights

Found = dict[str, list[Tensor]]
TERMS = ("dist", "angle", "relaxed", "pkt", "dark", "match", "csd", "queue", "d3", "at", "fitnet")
LOSSES = ("multi_similarity", "proxy_anchor", "softmax", "arcface", "smooth_ap")
MINED = ("l2_triplet", "l1_triplet", "contrastive")
BATCH = 32
SECONDS = 120  # in which a test's processes are done, or are ended


class Staged(nn.Module):
    """Four stages and an embedding, without batch norm."""

    def __init__(self, seed: int, width: int, size: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.convolutions = nn.ModuleList(nn.Conv2d(n, width, 3, padding=1) for n in (3, width, width, width))
        self.linear = nn.Linear(width, size)
        self.double()

    def forward(self, images: Tensor) -> View:
        maps = [torch.tanh(self.convolutions[0](images))]
        for convolution in self.convolutions[1:]:
            maps.append(torch.tanh(convolution(maps[-1])))
        return View(self.linear(maps[-1].mean(dim=(2, 3))), maps)


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """Two, for what a queue makes of the second."""
    for seed in (5, 6):
        torch.manual_seed(seed)
        yield torch.randn(BATCH, 3, 4, 4, dtype=torch.float64), torch.randint(0, 7, (BATCH,))


def of_terms(ranks: Ranks) -> Found:
    """{name: losses, gradients and buffers} of every term of a distillation and every miner, of 32 images."""
    found = {}
    for term, sample in chain(((term, "all") for term in TERMS), (("triplet", sample) for sample in MINERS)):
        ratios = {"dist_ratio": "0", "angle_ratio": "0"} | {f"{term}_ratio": "1.5"}
        sizes = {"embedding_size": "6", "queue_size": "50", "csd_neighbors": "5"}
        settings = resolve(DistillSettings, {"teacher": "t", "triplet_sample": sample, **sizes, **ratios})
        student, teacher = Staged(1, 4, 6), Staged(2, 5, 9 if term == "match" else 6).requires_grad_(False)
        first = torch.zeros(1, 3, 4, 4, dtype=torch.float64)
        torch.manual_seed(3)  # FitNet's convolutions, the projection of matching
        (objective,) = objectives(settings, student(first), teacher(first), torch.device("cpu"), ranks)
        losses = objective.losses.double()
        found[f"{term} {sample}"] = kept = list[Tensor]()
        for images, labels in batches():
            student.zero_grad()
            losses.zero_grad()
            mine = ranks.own_rows(len(images))
            views = [network(images[mine]) for network in (student, teacher)]
            learned, taught = (View(ranks.gather(view.embeddings), view.stages) for view in views)
            torch.manual_seed(4)  # the miner
            (loss,) = objective(learned, taught, ranks.gather(labels[mine])).values()
            loss.backward()  # type: ignore[no-untyped-call]
            sum_gradients(ranks, student, losses)
            kept += [loss.detach(), *gradients(student, losses), *(buffer.clone() for buffer in losses.buffers())]
    return found


def of_teachers(ranks: Ranks) -> Found:
    """{name: losses and gradients} of every loss of a teacher with every miner, of 32 images."""
    found = {}
    for name, sample in chain(
        ((name, "all") for name in LOSSES), ((name, sample) for name in MINED for sample in MINERS)
    ):
        settings = resolve(TeacherSettings, {"loss": name, "sample": sample, "embedding_size": "6"})
        torch.manual_seed(3)  # proxies
        loss, model = teacher_loss(settings, 7).double(), Staged(1, 4, 6)
        found[f"{name} {sample}"] = kept = list[Tensor]()
        for images, labels in batches():
            model.zero_grad()
            loss.zero_grad()
            mine = ranks.own_rows(len(images))
            embeddings, known = ranks.gather(model(images[mine]).embeddings), ranks.gather(labels[mine])
            torch.manual_seed(4)
            value = loss(embeddings, known)
            value.backward()
            sum_gradients(ranks, model, loss)
            kept += [value.detach(), *gradients(model, loss)]
    return found


def gradients(*modules: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for module in modules for p in module.parameters() if p.grad is not None]


def of_recall(ranks: Ranks) -> Found:
    """Recall@1,2,4,8, R-Precision and MAP@R of 1,003 embeddings, many of them equal, in tiles of 141 queries."""
    torch.manual_seed(7)
    setattr(metrics, "BLOCK_ELEMENTS", 20 * 1003)  # noqa: B010
    x, labels = torch.randn(1003, 5).round(), torch.randint(0, 90, (1003,))
    figures = [*metrics.recall_at_k(x, labels, ranks=ranks).values(), *metrics.at_r(x, labels, ranks)]
    every = torch.arange(len(x))
    protocol = metrics.Protocol(every[::3], every[1:], every % 4)
    figures += metrics.protocol_metrics(x, x, labels, protocol, (1,), ranks)[1:]
    return {"recall": [torch.tensor(figures, dtype=torch.float64)]}


def of_embedding(ranks: Ranks) -> Found:
    """What a network makes of 13 images in batches of 4, and their labels: the fourth rank has a single image."""
    torch.manual_seed(8)
    vectors, network = torch.randn(13, 1, 5), nn.Linear(5, 3)
    images = ImageSet(tuple(Path(f"{n}") for n in range(13)), tuple(range(13)), tuple(f"{n}" for n in range(13)))
    found: Found = {}
    for batch in (4, 20):  # of the larger all but one rank have none
        loader = EvalLoader(images, batch, 1, 1, VectorReader(vectors), ranks=ranks)
        assert len(list(loader)) <= loader.rounds
        context = Context(torch.device("cpu"), "fp32", ranks=ranks)
        found[f"embeddings in batches of {batch}"] = [*embed(network, loader, 13, context, silent, "Embedding")]
    return found


def of_augmentation(ranks: Ranks) -> Found:
    """Colors and blends of a batch, all ranks' shares of it together."""
    torch.manual_seed(9)
    images = torch.randint(0, 256, (BATCH, 6, 5, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    found = {}
    for strength, alpha in ((0.4, 0.0), (0.0, 0.5), (0.4, 0.5)):
        torch.manual_seed(10)
        changed = Augmentation(strength, alpha, ranks)(images[ranks.own_rows(BATCH)])
        found[f"{strength} {alpha}"] = [ranks.gather(changed), torch.rand(1)]
    return found


def of_sync_norm(ranks: Ranks) -> Found:
    """Two steps through batch norms that are far from the origin: gradients, running statistics, and what they make."""
    found = {}
    for momentum in (0.1, None):
        torch.manual_seed(11)
        layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=momentum), nn.Tanh(), nn.Conv2d(4, 2, 2)]
        network = nn.Sequential(*layers, nn.BatchNorm2d(2, affine=momentum is None)).double()
        synchronize(network, "network", ranks, torch.device("cpu"))
        kept = found[f"momentum {momentum}"] = list[Tensor]()
        for images, _ in batches():
            network.zero_grad()
            made = ranks.gather(network(images[ranks.own_rows(len(images))] + 100))
            (made.square().cumsum(0) * made.cos()).sum().backward()  # type: ignore[no-untyped-call]
            sum_gradients(ranks, network, nn.Module())
            kept += [made.detach(), *gradients(network), *(buffer.clone() for buffer in network.buffers())]
        kept.append(network.eval()(images).detach())
    return found


def of_training(ranks: Ranks) -> Found:
    """Weights and statistics after eight steps of Adam, with batch norms that are shared."""
    ratios = {"triplet_ratio": "1", "match_ratio": "1", "queue_ratio": "1"}
    settings = resolve(DistillSettings, {"teacher": "t", "embedding_size": "6", **ratios})
    torch.manual_seed(12)
    features = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 2), nn.BatchNorm2d(8)]
    network = nn.Sequential(*features, nn.Flatten(), nn.Linear(8, 6)).double()
    synchronize(network, "network", ranks, torch.device("cpu"))
    teacher = Staged(2, 5, 6).requires_grad_(False)
    objective = distill_objective(settings, 6, 6, ranks)
    losses = objective.losses.double()
    adam = torch.optim.Adam([*network.parameters(), *losses.parameters()], lr=1e-2)
    for step in range(8):
        torch.manual_seed(step)
        images, labels = torch.randn(BATCH, 3, 4, 4, dtype=torch.float64), torch.randint(0, 7, (BATCH,))
        mine = ranks.own_rows(BATCH)
        learned, taught = (ranks.gather(made) for made in (network(images[mine]), teacher(images[mine]).embeddings))
        terms = objective(View(learned, []), View(taught, []), ranks.gather(labels[mine]))
        update_weights(adam, terms, partial(sum_gradients, ranks, network, losses))
    return {"eight steps": [*network.state_dict().values(), *losses.state_dict().values()]}


def of_draws(ranks: Ranks) -> Found:
    """What a miner draws after the networks have drawn."""
    context = Context(torch.device("cpu"), "fp32", seed=3, ranks=ranks)
    context.seed_torch("step", 1, 1)
    with context.own_draws():
        own = torch.rand(1) if ranks.size > 1 else torch.rand(0)  # a network without dropout draws nothing
    drawn = ranks.gather(own)
    assert len(set(drawn.tolist())) == len(drawn), "each rank has draws of its own"
    return {"miner": [torch.rand(3)]}


def everything(ranks: Ranks) -> Found:
    """All of it, by name."""
    setattr(distributed, "_LARGE", 40)  # elements, so that some gradients are  # noqa: B010
    works = (of_terms, of_teachers, of_sync_norm, of_training, of_recall, of_embedding, of_augmentation, of_draws)
    return {f"{work.__name__} {name}": tensors for work in works for name, tensors in work(ranks).items()}


def together(size: int, folder: Path) -> list[Found]:
    """``everything`` of so many processes, from each of them.

    Raises:
        AssertionError: they have not ended well in time.
    """
    if size == 1:
        return [everything(ALONE)]
    processes = [CONTEXT.Process(target=_one, args=(rank, size, str(folder)), daemon=True) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
    ended = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert ended == [0] * size
    return [torch.load(folder / f"{size}-{rank}.pt", weights_only=True) for rank in range(size)]


def _one(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    where = f"file://{folder}/store-{size}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    distributed._World.store = dist.distributed_c10d._get_default_store()
    torch.save(everything(Ranks(rank, size)), f"{folder}/{size}-{rank}.pt")
    dist.destroy_process_group()
