"""Files of weights as people have them: read without running code, and taken out of what is wrapped around them."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rkd_cli.errors import WeightsError, first_line

Adapt = Callable[[dict[str, Tensor]], dict[str, Tensor]]  # published names to a network's, its classifier left out

_DEPTH = 4  # of dictionaries in each other
_NAMED = 5  # things that a note names
_WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")  # of torch.compile, FSDP
# of two networks that fit as well: an average of the weights (and DINO's teacher is one) is what is published, but for
# MoCo's, which is a tool of its training
_PREFERRED = re.compile(r"(^|[._ ])ema([._ ]|$)|teacher")
_LAST = re.compile(r"encoder_k|momentum|student")


def load_weights(network: nn.Module, name: str, path: Path, adapt: Adapt) -> str | None:
    """Give a network the weights of a file.

    They may be wrapped: {"state_dict": ...}, {"model": ..., "args": ...}, "module.backbone." before each name, two
    networks of which one is another's moving average (which is taken) or its student.

    Args:
        network: that takes them.
        name: of the network, for errors.
        path: .safetensors, or what torch.save wrote.
        adapt: from published names to the network's; leaves its classifier out.
    Returns:
        What was taken and what was left out, where it is not all.

    Raises:
        WeightsError: the file is absent or damaged, or does not hold all weights of the network.
    """
    expected = network.state_dict()
    state, note = fitting(path, read_weights(path), expected, adapt)
    problem = _problem(state, expected)
    if problem:
        raise WeightsError(f"{path}: not the weights of a {name}: {problem}" + (f" ({note})" if note else ""))
    network.load_state_dict(state, strict=False)  # old files do not count the batches of batch norms
    return f"{path}: {note}" if note else None


def read_weights(path: Path) -> dict[str, Any]:
    """What a .safetensors or pickled file holds; of a pickle only tensors, plain values and the ``Namespace`` of
    argparse are read, its code never runs.

    Raises:
        WeightsError: the file is absent, damaged, or holds anything else.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; weights are imagenet, none, or a .safetensors or .pth file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(path, map_location="cpu", weights_only=True)  # never runs a stranger's pickle
    # a damaged pickle can raise nearly anything from inside torch
    except Exception as error:
        unknown = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        if unknown:
            raise WeightsError(
                f"{path}: cannot be read without running code, for it holds a {unknown[1]}: load it where you trust "
                "it, and save its tensors alone by torch.save(network.state_dict(), FILE)"
            ) from None
        raise WeightsError(f"{path}: weights that cannot be read ({first_line(error)})") from None
    if not isinstance(found, dict) or not next(_dictionaries(found), None):
        raise WeightsError(f"{path}: not a state dict of tensors: save it with torch.save(network.state_dict(), ...)")
    return found


@dataclass(frozen=True)
class _Candidate:
    """Tensors of one dictionary of a file whose names begin alike."""

    path: tuple[str, ...]  # of the dictionary
    prefix: str
    state: dict[str, Tensor]  # adapted
    fits: int

    @property
    def where(self) -> str:
        return " ".join([*self.path, *([f"{self.prefix}*"] if self.prefix else [])])

    @property
    def rank(self) -> int:
        return bool(_PREFERRED.search(self.where)) - bool(_LAST.search(self.where))


def fitting(
    path: Path, tree: Mapping[str, Any], expected: Mapping[str, Tensor], adapt: Adapt = dict
) -> tuple[dict[str, Tensor], str]:
    """Those tensors of a file that fit a network best, by its names.

    Args:
        path: of the file, for errors.
        tree: what it holds.
        expected: the network's tensors.
        adapt: from published names to the network's.
    Returns:
        The tensors, without those of parts that the network does not have; and, where that is not all of the file,
        what was taken and what was left out.

    Raises:
        WeightsError: two networks of the file fit as well, and nothing says which one is meant.
    """
    found: list[_Candidate] = []
    for place, tensors in _dictionaries(tree):
        for prefix in _prefixes(tensors, len(expected)):
            state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            with suppress(Exception):  # it takes what it expects for granted; the names will say what is wrong
                state = adapt(dict(state))
            fits = sum(key in expected and expected[key].shape == value.shape for key, value in state.items())
            found.append(_Candidate(place, prefix, state, fits))
    best, *others = sorted(found, key=lambda one: (-one.fits, -one.rank, len(one.state)))
    for other in others:
        if best.fits and (other.fits, other.rank) == (best.fits, best.rank) and not _same(best.state, other.state):
            raise WeightsError(
                f"{path}: holds two networks that fit, {best.where} and {other.where}: save the one that is meant by "
                "torch.save(network.state_dict(), FILE)"
            )
    parts = {key.partition(".")[0] for key in expected}
    extra = [key for key in best.state if key.partition(".")[0] not in parts] if best.fits else []
    left = list(dict.fromkeys([*_left_out(tree, best), *(_part(best.prefix, key) for key in extra)]))
    state = {key: value for key, value in best.state.items() if key not in extra}
    if not best.where and not left:
        return state, ""
    more = f" and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
    return state, f"took {best.where or 'its tensors'}" + (
        f", left out {', '.join(left[:_NAMED])}{more}" if left else ""
    )


def _dictionaries(
    tree: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Those that hold tensors by their names, each with where it is in the file."""
    tensors = {_WRAPPERS.sub("", k): v for k, v in tree.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if tensors:
        yield path, tensors
    for key, value in tree.items():
        if isinstance(key, str) and isinstance(value, Mapping) and len(path) < _DEPTH:
            yield from _dictionaries(value, (*path, key))


def _prefixes(tensors: Mapping[str, Tensor], count: int) -> list[str]:
    """How many names begin, the empty prefix first: ends of a word that a part of a network stands behind."""
    begin = Counter(key[: dot + 1] for key in tensors for dot, letter in enumerate(key) if letter == ".")
    return ["", *(prefix for prefix, number in begin.items() if 10 * number >= count)]


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def _left_out(tree: Mapping[str, Any], taken: _Candidate) -> list[str]:
    """What stands beside the way to what was taken."""
    found: list[str] = []
    for key in taken.path:
        found += [str(other) for other in tree if other != key]
        tree = tree[key]
    names = [_WRAPPERS.sub("", str(key)) for key in tree]
    return [*found, *(_beside(taken.prefix, name) for name in names if not name.startswith(taken.prefix))]


def _beside(prefix: str, name: str) -> str:
    """The part of a name that parts it from a prefix."""
    shared = ""
    for word in prefix.split(".")[:-1]:
        if not name.startswith(f"{shared}{word}."):
            break
        shared += f"{word}."
    return _part(shared, name.removeprefix(shared))


def _part(prefix: str, key: str) -> str:
    first, dot, _ = key.partition(".")
    return f"{prefix}{first}.*" if dot else f"{prefix}{first}"


def _problem(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Why a network cannot take these tensors; empty where it can."""
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    if len(missing) == sum(not key.endswith("num_batches_tracked") for key in expected):
        other = f", but others, such as {next(iter(state))}" if state else ""
        return f"it has none of its tensors, such as {missing[0]}{other}" if missing else ""
    wrong = [key for key in expected if key in state and state[key].shape != expected[key].shape]
    kinds = [
        key
        for key in expected
        if key in state and expected[key].is_floating_point() and not state[key].is_floating_point()
    ]
    surplus = [key for key in state if key not in expected]
    for keys, what in (
        (missing, "{0} is missing"),
        (wrong, "{0} is of another shape, {1} in the file and {2} in the network"),
        (kinds, "{0} is of {3}, not of floats"),
        (surplus, "{0} is none of its tensors"),
    ):
        if keys:
            there, due = state.get(keys[0]), expected.get(keys[0])
            shapes = [None if one is None else tuple(one.shape) for one in (there, due)]
            more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
            return what.format(keys[0], *shapes, getattr(there, "dtype", None)) + more
    return ""
