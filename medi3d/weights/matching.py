"""Match a file's tensors to a network's where no key map is named.

Names are compared with "." and "_" treated as equal, since timm writes `stages_0` in an encoder where its
classifier has `stages.0`; a name that would then be ambiguous is compared unchanged. A prefix of all names of
the file's network ("model.", "backbone.", "encoder_q.") is found by what follows it. Every tensor of the file
must have a place, belong to the part of the network behind the encoder (its classifier), or lie outside that
prefix; any other tensor is an error.
"""

import inspect
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from medi3d.errors import WeightsError
from medi3d.weights.keymaps import KEYMAPS, KeyMap, get_keymap

HEADS = frozenset(
    (
        "fc",
        "head",
        "heads",
        "head_dist",
        "head_drop",
        "classifier",
        "classif",
        "last_linear",
        "logits",
        "linear",
    )
)
"""First parts of names under which networks keep their classifier."""
_FIRST = (
    "model_ema",
    "ema_model",
    "ema",
    "teacher",
    "encoder_q",
    "base_encoder",
    "online_encoder",
    "student",
)
"""For copies of one network in a file: the one that its authors evaluate: averaged, DINO, MoCo, BYOL."""
_TIMM_FILTERS = ("checkpoint_filter_fn", "_filter_fn", "_filter_torchvision_pretrained")
_NEAR_KEYMAP = 0.5


@dataclass
class Match:
    """Our name for each tensor of a file, or None where none was found."""

    tensors: Mapping[str, Tensor]
    places: dict[str, str | None] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    """Names of the file without a place."""
    unfilled: list[str] = field(default_factory=list)
    """Our names that no tensor fills."""
    misshapen: list[str] = field(default_factory=list)
    """Names of the file whose tensor has another shape than ours."""
    keymap: KeyMap | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every tensor has its place."""
        return not (self.unknown or self.unfilled or self.misshapen)

    @property
    def faults(self) -> int:
        """Number of tensors without one."""
        return len(self.unknown) + len(self.unfilled) + len(self.misshapen)


@dataclass
class Matcher:
    """Finds places in one network.

    Attributes:
        ours: the network's tensors by name.
        fits: whether a tensor can fill ours of that name.
        optional: whether one of our names may stay unfilled.
        whole: returns the full network whose encoder is ours; called only if names are left over.
        inner: the network as timm built it, if ours only extracts its feature maps.
    """

    ours: Mapping[str, Tensor]
    fits: Callable[[str, Tensor], bool]
    optional: Callable[[str], bool]
    whole: Callable[[], nn.Module | None]
    inner: nn.Module | None = None

    def match(self, published: Mapping[str, Tensor]) -> Match:
        """The complete match by names, by a key map or by timm's filter; otherwise the nearest incomplete
        one.

        Raises:
            WeightsError: several key maps fit and differ, or the file has the network several times.
        """
        exact = self._by_exact_names(published)
        if exact.complete:
            return exact
        named = self._by_names(published, prefixed=False)
        if named.complete:
            return named
        mapped = self._by_keymap(published)  # before prefixes: with the same names it may turn the kernels
        if mapped is not None:
            return mapped
        named = self._by_names(published)
        if named.complete:
            return named
        filtered = [m for tensors in self._filtered(published) if (m := self._by_names(tensors))]
        best = min([exact, named, *filtered], key=lambda match: match.faults)
        if best in filtered and best.complete:
            best.notes.insert(0, "timm's own filter for such files converted the names and shapes")
        return best

    def _by_exact_names(self, published: Mapping[str, Tensor]) -> Match:
        match = Match(published, {k: k if k in self.ours else None for k in published})
        match.unknown = [k for k, place in match.places.items() if place is None and not self.optional(k)]
        return self._checked(match)

    def _checked(self, match: Match) -> Match:
        filled = {ours for ours in match.places.values() if ours is not None}
        match.unfilled = [k for k in self.ours if k not in filled and not self.optional(k)]
        match.misshapen = [
            name
            for name, ours in match.places.items()
            if ours is not None and not self.optional(ours) and not self.fits(ours, match.tensors[name])
        ]
        return match

    def _by_keymap(self, published: Mapping[str, Tensor]) -> Match | None:
        """Match by the only key map that has a place for every tensor and fills all of ours."""
        found: dict[str, Match] = {}
        for name in KEYMAPS:
            keymap = get_keymap(name)
            known = (key in keymap.table or keymap.drops(key) for key in published)
            if not all(known):
                continue
            places = {key: keymap.table.get(key) for key in published}
            places = {key: ours if ours in self.ours else None for key, ours in places.items()}
            turned = {
                k: keymap.to_our_layout(o, published[k]) if o else published[k] for k, o in places.items()
            }
            match = self._checked(Match(turned, places, keymap=keymap))
            if match.complete:
                match.tensors, match.notes = published, [f"names and layout by the key map {name}"]
                found[name] = match
        if not found:
            return None
        plain = [match for match in found.values() if match.keymap and match.keymap.keeps_layout]
        first = (plain or list(found.values()))[0]
        turning = [name for name, match in found.items() if not _same_way(first, match)]
        if turning and (first not in plain or any(first.places != found[n].places for n in turning)):
            raise WeightsError(f"several key maps fit the file: {', '.join(found)}; name one (keymap=...)")
        if turning:
            first.notes.append(f"the key maps {', '.join(turning)} have the same names, but turn the kernels")
        return first

    def _by_names(self, published: Mapping[str, Tensor], *, prefixed: bool = True) -> Match:
        index = _index(self.ours)
        prefix, notes = self._prefix(published, index) if prefixed else ("", [])
        match = Match(published, notes=notes)
        outside, behind = [], []
        for name in published:
            rest = name.removeprefix(prefix)
            ours = rest if rest in self.ours else index.get(_joined(rest))
            match.places[name] = ours if name.startswith(prefix) else None
            if not name.startswith(prefix):
                outside.append(name)
            elif ours is None and not self.optional(rest):
                behind.append(name)
        self._refuse_doubles(match)
        match.unknown = self._not_behind(behind, prefix, published)
        dropped = [name for name in behind if name not in match.unknown]
        if prefix:
            match.notes.append(f"the network's names begin with {prefix!r} in the file")
        if dropped:
            match.notes.append(f"left out, behind the encoder: {_counted(dropped, prefix)}")
        if outside:
            match.notes.append(f"left out, other parts of the file: {_counted(outside, '')}")
        return self._checked(match)

    @staticmethod
    def _refuse_doubles(match: Match) -> None:
        """Unmatch names of the file that share one of ours."""
        users = defaultdict(list)
        for name, ours in match.places.items():
            if ours is not None:
                users[ours].append(name)
        for names in users.values():
            for name in names if len(names) > 1 else ():
                match.places[name] = None

    def _prefix(self, published: Mapping[str, Tensor], index: Mapping[str, str]) -> tuple[str, list[str]]:
        """The prefix of the network's names in the file: the one that finds most of our names."""
        found: dict[str, set[str]] = defaultdict(set)
        for name, tensor in published.items():
            parts = name.split(".")
            for start in range(len(parts)):
                ours = index.get(_joined(".".join(parts[start:])))
                if ours is not None and self.fits(ours, tensor):
                    found["".join(f"{part}." for part in parts[:start])].add(ours)
        most = max((len(names) for names in found.values()), default=0)
        best = [prefix for prefix, names in found.items() if len(names) == most]
        if not best or "" in best:
            return "", []
        # Our names may share a first part: a prefix that begins with another one is that one plus this part.
        best = [one for one in best if not any(one != other and one.startswith(other) for other in best)]
        if len(best) == 1:
            return best[0], []
        ranks = {prefix: _rank(prefix) for prefix in best}
        chosen = min(best, key=ranks.__getitem__)
        if list(ranks.values()).count(ranks[chosen]) > 1:
            raise WeightsError(
                f"the file has the network {len(best)} times, under {', '.join(best)}: choose with "
                f"file:PATH#{best[0].rstrip('.')}"
            )
        others = ", ".join(prefix for prefix in best if prefix != chosen)
        return chosen, [
            f"{chosen!r} was taken; the file has the network under {others} too: choose with #NAME"
        ]

    def _not_behind(self, names: list[str], prefix: str, published: Mapping[str, Tensor]) -> list[str]:
        """Those of `names` that belong neither to a classifier nor to the network after the encoder."""
        own = {part for name in self.ours for part in name.split(".")[:1]}
        rests = {name: name.removeprefix(prefix) for name in names}
        left = [n for n in names if not _is_head(rests[n], published[n]) or rests[n].split(".")[0] in own]
        whole = self.whole() if left else None
        if whole is None:
            return left
        known = {_joined(name): tensor.shape for name, tensor in whole.state_dict().items()}
        return [n for n in left if not _same_but_classes(known.get(_joined(rests[n])), published[n].shape)]

    def _filtered(self, published: Mapping[str, Tensor]) -> Iterable[dict[str, Tensor]]:
        """The file's tensors after timm's own filter, with and without their prefix."""
        convert = _timm_filter(self.inner or self.whole())
        if convert is None:
            return
        prefix, _ = self._prefix(published, _index(self.ours))
        shared = _shared_prefix(published)
        for start in dict.fromkeys(("", prefix, shared)):
            state = {k.removeprefix(start): t for k, t in published.items() if k.startswith(start)}
            try:
                result = convert(state)
            except Exception:  # it was written for other files and does not apply to this one
                continue
            if isinstance(result, dict) and all(isinstance(value, Tensor) for value in result.values()):
                yield result

    def hint(self, match: Match) -> str:
        """The closest match of the names that have no place, for the error message."""
        near = []
        for name in match.unknown[:1]:
            near += get_close_matches(name, match.unfilled or list(self.ours), n=1, cutoff=0.3)
        shares = {
            name: sum(key in keymap.table for key in match.tensors) / max(1, len(match.tensors))
            for name in KEYMAPS
            if (keymap := get_keymap(name)).table
        }
        best = max(shares, key=shares.__getitem__)
        text = f"; nearest name: {near[0]}" if near else ""
        if shares[best] >= _NEAR_KEYMAP:
            text += f"; nearest key map: {best}, which has {shares[best]:.0%} of the file's names"
        return text


def _shared_prefix(names: Iterable[str]) -> str:
    """The first parts that all names have in common, each with its dot."""
    parts = [name.split(".")[:-1] for name in names]
    shared = ""
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        shared += f"{column[0]}."
    return shared


def _same_way(one: Match, other: Match) -> bool:
    """Whether two key maps give the same tensors the same places."""
    layouts = [match.keymap.to_our_layout for match in (one, other) if match.keymap]
    return one.places == other.places and layouts[0] == layouts[1]


def _joined(name: str) -> str:
    return name.replace(".", "_")


def _index(names: Iterable[str]) -> dict[str, str]:
    """Our names by their form with "." as "_", with and without a first part that all have in common."""
    names = list(names)
    first = {name.split(".")[0] for name in names}
    shared = f"{first.pop()}." if len(first) == 1 else ""
    found: dict[str, set[str]] = defaultdict(set)
    for name in names:
        found[_joined(name)].add(name)
        found[_joined(name.removeprefix(shared))].add(name)
    return {joined: ours.pop() for joined, ours in found.items() if len(ours) == 1}


def _is_head(name: str, tensor: Tensor) -> bool:
    """Whether a name belongs to a classifier: a linear layer, 1×1 convolution, norm or bias in it."""
    return "." in name and name.split(".")[0] in HEADS and all(size == 1 for size in tensor.shape[2:])


def _same_but_classes(expected: Any, found: Any) -> bool:
    return expected is not None and len(expected) == len(found) and expected[1:] == found[1:]


def _rank(prefix: str) -> int:
    ranks = [_FIRST.index(part) for part in prefix.split(".") if part in _FIRST]
    return min(ranks, default=len(_FIRST))


def _counted(names: list[str], prefix: str) -> str:
    """Beginnings of names, each with its count."""
    counts: dict[str, int] = defaultdict(int)
    for name in names:
        counts[name.removeprefix(prefix).split(".")[0]] += 1
    return ", ".join(f"{part} ({count})" for part, count in counts.items())


def _timm_filter(whole: nn.Module | None) -> Callable[[dict[str, Tensor]], Any] | None:
    """The function with which timm reads published files of this network, if there is one."""
    module = sys.modules.get(type(whole).__module__)
    if module is None or not module.__name__.startswith("timm."):
        return None
    convert = next((vars(module)[name] for name in _TIMM_FILTERS if name in vars(module)), None)
    if convert is None:
        return None
    needed = [p for p in inspect.signature(convert).parameters.values() if p.default is p.empty]
    return (lambda state: convert(state, whole)) if len(needed) > 1 else convert
