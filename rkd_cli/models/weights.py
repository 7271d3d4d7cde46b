"""Read weights files without running code, and unwrap the weights in them."""

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

Adapt = Callable[[dict[str, Tensor]], dict[str, Tensor]]  # renames published weights and drops the classifier

_DEPTH = 4  # of nested dictionaries
_NAMED = 5  # names in a note
_WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")  # of torch.compile, FSDP
# if two networks fit equally well, authors publish the moving average of the weights (DINO's teacher is one), except
# for MoCo, where it only serves training
_PREFERRED = re.compile(r"(^|[._ ])ema([._ ]|$)|teacher")
_LAST = re.compile(r"encoder_k|momentum|student")


def load_weights(network: nn.Module, name: str, path: Path, adapt: Adapt) -> str | None:
    """Load the weights of a .safetensors or torch.save file into a network.

    They may be wrapped: {"state_dict": ...}, {"model": ..., "args": ...}, a prefix such as "module.backbone.", or two
    networks, of which the moving average or teacher is loaded. ``name`` is for errors. Returns a note about what was
    loaded if that is not the whole file.
    """
    expected = network.state_dict()
    state, note = fitting(path, read_weights(path), expected, adapt)
    problem = _problem(state, expected)
    if problem:
        raise WeightsError(f"{path}: not the weights of a {name}: {problem}" + (f" ({note})" if note else ""))
    network.load_state_dict(state, strict=False)  # old files have no num_batches_tracked
    return f"{path}: {note}" if note else None


def read_weights(path: Path) -> dict[str, Any]:
    """The content of a .safetensors or pickled file. Pickles may only contain tensors, plain values and argparse's
    ``Namespace``; their code never runs."""
    if not path.is_file():
        raise WeightsError(f"{path}: no such file. Use imagenet, none, or a .safetensors or .pth file.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(path, map_location="cpu", weights_only=True)  # runs no code
    except Exception as error:  # torch raises any type for damaged pickles
        unknown = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        if unknown:
            raise WeightsError(
                f"{path}: contains a {unknown[1]}, which cannot be read without running code. If you trust the file, "
                "load it and save its tensors with torch.save(network.state_dict(), FILE)."
            ) from None
        raise WeightsError(f"{path}: cannot be read ({first_line(error)})") from None
    if not isinstance(found, dict) or not next(_dictionaries(found), None):
        raise WeightsError(f"{path}: not a state dict. Save it with torch.save(network.state_dict(), FILE).")
    return found


@dataclass(frozen=True)
class _Candidate:
    """Tensors of a dictionary in the file whose names have one prefix."""

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
    """The tensors in a file that fit a network best, under its names, and a note if that is not the whole file.

    ``tree`` is the content of the file, ``expected`` the state dict of the network. Raises a WeightsError if two
    different networks in the file fit equally well.
    """
    found: list[_Candidate] = []
    for place, tensors in _dictionaries(tree):
        for prefix in _prefixes(tensors, len(expected)):
            state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            with suppress(Exception):  # adapt raises for unexpected names, which the caller reports better
                state = adapt(dict(state))
            fits = sum(key in expected and expected[key].shape == value.shape for key, value in state.items())
            found.append(_Candidate(place, prefix, state, fits))
    best, *others = sorted(found, key=lambda one: (-one.fits, -one.rank, len(one.state)))
    for other in others:
        if best.fits and (other.fits, other.rank) == (best.fits, best.rank) and not _same(best.state, other.state):
            raise WeightsError(
                f"{path}: contains two networks that fit, {best.where} and {other.where}. Save one of them with "
                "torch.save(network.state_dict(), FILE)."
            )
    parts = {key.partition(".")[0] for key in expected}
    extra = [key for key in best.state if key.partition(".")[0] not in parts] if best.fits else []
    left = list(dict.fromkeys([*_left_out(tree, best), *(_part(best.prefix, key) for key in extra)]))
    state = {key: value for key, value in best.state.items() if key not in extra}
    if not best.where and not left:
        return state, ""
    more = f" and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
    return state, f"loaded {best.where or 'its tensors'}" + (
        f", ignored {', '.join(left[:_NAMED])}{more}" if left else ""
    )


def _dictionaries(
    tree: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """The dictionaries in a file that contain tensors, each with its path of keys."""
    tensors = {_WRAPPERS.sub("", k): v for k, v in tree.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if tensors:
        yield path, tensors
    for key, value in tree.items():
        if isinstance(key, str) and isinstance(value, Mapping) and len(path) < _DEPTH:
            yield from _dictionaries(value, (*path, key))


def _prefixes(tensors: Mapping[str, Tensor], count: int) -> list[str]:
    """Frequent prefixes of names, ending in a dot, the empty prefix first."""
    begin = Counter(key[: dot + 1] for key in tensors for dot, letter in enumerate(key) if letter == ".")
    return ["", *(prefix for prefix, number in begin.items() if 10 * number >= count)]


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def _left_out(tree: Mapping[str, Any], taken: _Candidate) -> list[str]:
    """The keys of the file that do not lead to the tensors taken."""
    found: list[str] = []
    for key in taken.path:
        found += [str(other) for other in tree if other != key]
        tree = tree[key]
    names = [_WRAPPERS.sub("", str(key)) for key in tree]
    return [*found, *(_differing(taken.prefix, name) for name in names if not name.startswith(taken.prefix))]


def _differing(prefix: str, name: str) -> str:
    """The start of a name up to the first part that differs from a prefix."""
    common = ""
    for word in prefix.split(".")[:-1]:
        if not name.startswith(f"{common}{word}."):
            break
        common += f"{word}."
    return _part(common, name.removeprefix(common))


def _part(prefix: str, key: str) -> str:
    first, dot, _ = key.partition(".")
    return f"{prefix}{first}.*" if dot else f"{prefix}{first}"


def _problem(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Why these tensors do not fit a network; empty if they do."""
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    if len(missing) == sum(not key.endswith("num_batches_tracked") for key in expected):
        other = f", only others, such as {next(iter(state))}" if state else ""
        return f"contains none of its tensors, such as {missing[0]}{other}" if missing else ""
    wrong = [key for key in expected if key in state and state[key].shape != expected[key].shape]
    kinds = [
        key
        for key in expected
        if key in state and expected[key].is_floating_point() and not state[key].is_floating_point()
    ]
    surplus = [key for key in state if key not in expected]
    for keys, what in (
        (missing, "{0} is missing"),
        (wrong, "{0} has shape {1} in the file and {2} in the network"),
        (kinds, "{0} has dtype {3}, not a floating one"),
        (surplus, "{0} is not one of its tensors"),
    ):
        if keys:
            there, due = state.get(keys[0]), expected.get(keys[0])
            shapes = [None if one is None else tuple(one.shape) for one in (there, due)]
            more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
            return what.format(keys[0], *shapes, getattr(there, "dtype", None)) + more
    return ""
