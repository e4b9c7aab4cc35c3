"""What the Hub checks of a card's metadata, without the Hub."""

import math
import re
from typing import Any

from huggingface_hub import CardData, EvalResult, RepoCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id


# https://huggingface.co/docs/hub/repositories-licenses
LICENSES = frozenset(
    """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0 bigscience-openrail-m bsd
    bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0
    cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0
    cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0
    etalab-2.0 eupl-1.1 gemma gfdl gpl gpl-2.0 gpl-3.0 intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2
    llama3.3 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl
    zlib
    """.split()
)
_MAX_VALUES = 100_000
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*|multilingual|code")


def check_card(card: RepoCard) -> None:
    """Refuse a card whose metadata the Hub would refuse or show wrongly, before anything is sent. ValueError names the field and the remedy."""
    check_metadata(card.data)


def check_metadata(data: CardData) -> None:
    """Check licences, language codes, names of base models and data sets, and that `model-index` holds finite numbers of data sets that the Hub's
    library can tell apart. ValueError names the field and the remedy.
    """
    if _size(data.to_dict(), {}) > _MAX_VALUES:
        raise ValueError(f"with its aliases written out it has more than {_MAX_VALUES:,} values")
    for name in listed(data.get("license")):
        if name not in LICENSES:
            raise ValueError(
                f"license {name!r} is none of the Hub's identifiers (https://huggingface.co/docs/hub/repositories-licenses): take one of them, "
                '"unknown", or "other" with license_name and license_link'
            )
    for code in listed(data.get("language")):
        if not is_language(code):
            raise ValueError(f"language {code!r} is no ISO 639 code of two or three letters, such as 'en'")
    for key in ("base_model", "datasets"):
        for name in listed(data.get(key)):
            try:
                validate_repo_id(name)
            except HFValidationError as error:
                raise ValueError(f"{key} {name!r} is not a name on the Hub: {error}") from error
    names: dict[tuple, str] = {}
    for result in listed(data.get("eval_results")) or _results_of(data):
        value = result.metric_value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"the value of {result.metric_name!r} is {value!r}, which is not a finite number")
        if names.setdefault(result.unique_identifier, result.dataset_name) != result.dataset_name:
            raise ValueError(
                f"the results on {names[result.unique_identifier]!r} and on {result.dataset_name!r} agree in task, type, configuration, split "
                "and revision of their data set, so the Hub's library would merge them: name their configurations differently"
            )


def is_language(code: Any) -> bool:
    """Whether `code` reads as an ISO 639 code of a language, such as "en" or "zh-Hant"."""
    return isinstance(code, str) and _LANGUAGE.fullmatch(code) is not None


def _results_of(data: CardData) -> list[EvalResult]:
    """Check metadata whose class says nothing of models, such as that of any card in a folder."""
    index = data.get("model-index")
    return model_index_to_eval_results(index)[1] if index else []


def _size(value: Any, known: dict[int, int]) -> int:
    """How many values a YAML value has with its aliases, which are the same object, written out."""
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in known:
        known[id(value)] = _MAX_VALUES  # met again within itself, it has no end
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(value)]


def listed(value: Any) -> list[Any]:
    """The values of a field that may hold none, one or several."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
