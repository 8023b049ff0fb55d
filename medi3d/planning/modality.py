"""Choose each channel's modality and normalisation from its name, else from its values."""

import re
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from medi3d.datasets.images.settings import MODALITIES, VolumeSettings
from medi3d.errors import ConfigError
from medi3d.planning.choices import Choice
from medi3d.planning.fingerprint import AIR, Fingerprint

WORDS = {
    "CBCT": r"cbct|cone.?beam",
    "CT": r"ct|ncct|cect|cta|ctp|hu|computed tomography",
    "PET": r"pet|pt|suv\w*|fdg|psma|petct_pet",
    "US": r"us|ultra.?sound|echo|sonograph\w*",
    "XA": r"xa|x.?ray|angiograph\w*|fluoroscopy|dsa",
    "MR": r"mri?|fmri|mra|[tp][12][\w*]*|flair|adc|dwi|swi|pd\w*|dce\w*|cine|lge|bold|dti|fa|mprage|stir",
}
"""Modality -> words that name it or one of its sequences; the first match counts."""

RAW = 1200.0
"""Far above the HU of soft tissue: values from 0 to beyond this are a CT's without its rescale."""

SQUEEZED = 20.0
"""A CT whose values span at most this was rescaled or z-scored."""

CLIPPED = 0.25
"""Percentiles that would clip more of the labelled voxels than this are widened to all values."""


def modality_of(name: str) -> str | None:
    """The modality that a channel's name states; None if it states none."""
    spoken = re.sub(r"[_\W]+", " ", name).strip().lower()
    for modality, words in WORDS.items():
        if re.search(rf"(?<![a-z0-9])(?:{words})(?![a-z0-9])", spoken):
            return modality
    return "other" if spoken == "other" else None


def plan_channels(
    fingerprint: Fingerprint, given: Mapping[str, Any], names: Sequence[str], channels: int
) -> tuple[list[Choice], list[str]]:
    """Choose modality and normalisation: one for all channels if they agree, else one for each.

    Args:
        fingerprint: Of the cohort.
        given: Dotted keys of the config -> values; these keys are not chosen.
        names: Of the channels, from the cohort's list; empty where it names none.
        channels: Their number.

    Returns:
        The choices, and a line about each channel whose values contradict its modality.

    Raises:
        ConfigError: The modality is neither given nor clear from names or values, or is not known.
    """
    if given.get("data.by_channel"):
        first = given["data.by_channel"][0].get("modality", "other")
        return [Choice("data.modality", str(first), "of the first of data.by_channel")], []
    kinds = [_kind(fingerprint, given, names, channel) for channel in range(channels)]
    remarks = [
        f"{_label(names, channel, channels)}: {doubt}"
        for channel, (kind, _) in enumerate(kinds)
        if (doubt := _doubt(fingerprint, channel, kind))
    ]
    hows = [_normalisation(fingerprint, channel, kind) for channel, (kind, _) in enumerate(kinds)]
    if "data.normalisation" in given or all(
        (kind[0], how[0]) == (kinds[0][0], hows[0][0]) for kind, how in zip(kinds, hows, strict=True)
    ):
        why = "; ".join(dict.fromkeys([kinds[0][1], *remarks]))
        return [
            Choice("data.modality", kinds[0][0], why),
            Choice("data.normalisation", hows[0][0], hows[0][1]),
        ], remarks
    each = [
        {"name": _label(names, channel, channels), "modality": kind[0], "normalisation": how[0]}
        for channel, (kind, how) in enumerate(zip(kinds, hows, strict=True))
    ]
    whys = [
        f"{one['name']} is {kind[0]} ({kind[1]}): {how[1]}"
        for one, kind, how in zip(each, kinds, hows, strict=True)
    ]
    return [
        Choice("data.modality", kinds[0][0], "of the first channel; data.by_channel has each"),
        Choice("data.by_channel", each, "; ".join([*whys, *remarks])),
    ], remarks


def _label(names: Sequence[str], channel: int, channels: int) -> str:
    return names[channel] if len(names) == channels else f"channel {channel}"


def _kind(
    fingerprint: Fingerprint, given: Mapping[str, Any], names: Sequence[str], channel: int
) -> tuple[str, str]:
    """Modality of a channel, and why."""
    facts = fingerprint.of_channel(channel)
    lows = [one["low"] for one in facts] or [0.0]
    seen = f"lowest values are {min(lows):g} to {max(lows):g}"
    if given.get("data.modality"):
        known = str(given["data.modality"])
        if known not in MODALITIES:
            raise ConfigError(f"data.modality is {known!r}: {', '.join(MODALITIES)}")
        return known, seen
    name = names[channel] if channel < len(names) else ""
    if named := modality_of(name):
        return named, f"the cohort's list calls it {name}; {seen}"
    if by_values := fingerprint.modality(channel):
        return by_values, seen
    if name:
        return "other", f"neither {name} nor the values say what it is; {seen}"
    raise ConfigError(
        f"data.modality: not given, and not clear from the images (lowest values {min(lows):g} to "
        f"{max(lows):g}); add data.modality= one of {', '.join(MODALITIES)}"
    )


def _normalisation(fingerprint: Fingerprint, channel: int, kind: str) -> tuple[dict[str, Any], str]:
    if kind == "CT":
        low, high = (round(value) for value in fingerprint.percentiles(0.5, 99.5, channel))
        how = {"method": "window", "window": [float(low), float(max(high, low + 1))]}
        return how, "0.5 and 99.5 percentile of labelled voxels, all cases, HU"
    facts = fingerprint.of_channel(channel)
    how = {"method": "percentile", "background": "ignored"}
    why = f"{kind} has no unit" if kind == "MR" else f"{kind} is not in HU"
    why += ": each case by its own percentiles, without its constant background"
    shares = [one.get("background", 0.0) for one in facts]
    if any(shares):
        having = sum(map(bool, shares))
        why += f" ({having} of {len(shares)} cases have one, up to {max(shares):.1%} of the voxels)"
    clipped = median([one.get("clipped", 0.0) for one in facts] or [0.0])
    if clipped > CLIPPED:
        how["percentiles"] = [0.0, 100.0]
        beyond = f"{clipped:.0%} of the labelled voxels are beyond the 0.5 and 99.5 percentile"
        why += f"; from the lowest to the highest value, for {beyond}"
    return how, why


def _doubt(fingerprint: Fingerprint, channel: int, kind: str) -> str:
    """Why a channel's values do not fit this modality; empty if they do."""
    facts = fingerprint.of_channel(channel)
    if not facts:
        return "has one value all over in every case"
    low, high = (median(one[key] for one in facts) for key in ("low", "high"))
    shown = f"values go from {low:g} to {high:g}"
    if kind == "CT" and low >= 0 and high > RAW:
        return f"{shown}, which are not HU: stored without its rescale (intercept, -1024 as a rule)?"
    if kind == "CT" and high - low <= SQUEEZED:
        return f"{shown}, which are not HU: rescaled already?"
    if kind in ("MR", "PET", "US") and low <= AIR and high > 0:
        return f"{shown}, as a CT's in HU do; is it {kind}?"
    return ""


def beyond_window(fingerprint: Fingerprint, settings: VolumeSettings) -> list[str]:
    """A line about each channel of a case whose values all lie beyond its window, which makes it constant."""
    problems = []
    for case in fingerprint.cases:
        for channel, facts in enumerate(case.intensities):
            window = settings.normalisation_of(channel).window
            if window is None or settings.normalisation_of(channel).method != "window":
                continue
            if facts["low"] < facts["high"] and (facts["high"] <= window[0] or facts["low"] >= window[1]):
                problems.append(
                    f"{case.name}: {settings.name_of(channel)} has values from {facts['low']:g} to "
                    f"{facts['high']:g}, all beyond the window {window[0]:g} to {window[1]:g}: it would be "
                    "constant; give data.by_channel a normalisation for each channel, or another window"
                )
    return problems
