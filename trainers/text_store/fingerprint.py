"""Whether a text store holds what an encoder would give: fingerprints are compared field by field, and what differs is named."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modeling_proclip.identity import differences

from .layout import ADDED, PROVENANCE, warn_once


def check_same_encoder(
    path: str | Path, settings: Mapping[str, Any], dtype: str, fingerprint: Mapping[str, Any]
) -> None:
    """Raises ValueError if the store at `path` with these `settings` was made by another encoder than the one with this `fingerprint`, or holds another dtype."""
    there = {"dtype": settings["dtype"], **settings["fingerprint"]}
    models = there.get("model"), fingerprint.get("model")
    named = f"its model is {models[0]!r}, and this one {models[1]!r}; " if any(models) else ""
    check_fingerprint(
        f"the text store {path}",
        there,
        {"dtype": dtype, **fingerprint},
        f"{named}build a store of its own for it, in another directory",
    )


def check_fingerprint(name: str, there: Mapping[str, Any], here: Mapping[str, Any], remedy: str) -> None:
    """Compares what the store `name` was made by with what is expected `here`, field by field. ValueError names the fields that differ, with both values and
    the `remedy`. Warns once of what cannot be compared.
    """
    unknown = [field for field in ADDED if field in here and field not in there]
    compared = [field for field in {**there, **here} if field not in (*PROVENANCE, *unknown, "versions")]
    of_store, of_encoder = ({field: side[field] for field in compared if field in side} for side in (there, here))
    changes = list(differences(of_store, of_encoder))
    if changes:
        more = f" (and {len(changes) - 3} more)" if len(changes) > 3 else ""
        raise ValueError(f"{name} was made by another encoder: {'; '.join(changes[:3])}{more}; {remedy}")
    if unknown:
        warn_once(
            f"{name} was written by an earlier release, which did not record {', '.join(unknown)} of the encoder: whether these are the same "
            "cannot be checked. `proclip embed TEXTS --model DIR --verify STORE` embeds some of its texts again and compares"
        )
    elif releases := list(differences(there.get("versions", {}), here.get("versions", {}))):
        warn_once(
            f"{name} was made with other releases of libraries: {'; '.join(releases)}. As a rule that changes nothing; `proclip embed TEXTS "
            "--model DIR --verify STORE` embeds some of its texts again and compares"
        )
