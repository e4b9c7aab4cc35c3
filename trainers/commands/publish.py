"""`proclip publish`: send a checkpoint to the Hub."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import print_facts


if TYPE_CHECKING:
    from hub_cards.publish import PublishReport


@dataclass
class CardFile:
    """The keys of `--card FILE`; see [`~hub_cards.model_card`] and, for `base_model`, [`~hub_cards.adapter_card`]."""

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    base_model: str | None = None
    base_models: dict[str, str] | None = None
    base_licenses: dict[str, str] | None = None
    languages: list[str] | None = None
    datasets: dict[str, str | None] | None = None
    results: list[str] | None = None
    limits: list[str] | None = None
    title: str | None = None


def publish(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Folder of a ProCLIP checkpoint and its processor, or of PEFT adapters."),
    ],
    repo_id: Annotated[str, typer.Argument(metavar="REPO", help="owner/name on the Hub; a name alone is yours.")],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Who sees a new repository. Default: only you.")
    ] = None,
    lean: Annotated[
        bool | None,
        typer.Option("--lean/--full", help="Without the LLM, which is then named, or with it. Default: as DIR is."),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="Branch to send to; created if it does not exist.")
    ] = None,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Split the weights into files of at most this size, such as 2GB.")
    ] = None,
    with_code: Annotated[
        bool,
        typer.Option("--with-code/--no-code", help="Send the code that loads it where this package is not installed."),
    ] = True,
    text_model: Annotated[str | None, typer.Option(help="Hub name of the LLM, if DIR names a local folder.")] = None,
    text_model_revision: Annotated[str | None, typer.Option(help="Revision of that LLM.")] = None,
    card: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="YAML file with content for the card: license, base_licenses, datasets, languages, results, limits.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check, print what would be sent, and send nothing.")
    ] = False,
) -> None:
    """Send a checkpoint to the Hub: weights, processor, the code that loads them anywhere, and the card.

    DIR is checked first. Only a checkpoint's own files are sent, without passwords, tokens and paths of this machine, in one commit; they are
    listed before. After an interruption, give the same command again: large files that the Hub has are not sent twice. The token is that of
    `hf auth login` or HF_TOKEN.
    """
    from hub_cards.publish import MESSAGE
    from hub_cards.publish import publish as run
    from trainers.storage.yaml_files import check_fields, read_yaml

    details = None if card is None else read_yaml(card)
    if card is not None:
        if not isinstance(details, dict):
            raise ValueError(f"{card} holds no keys and values: write lines such as `license: apache-2.0`")
        check_fields(CardFile, details, str(card))
        details = {name: value for name, value in details.items() if value is not None}
    report = run(
        folder,
        repo_id,
        private=private,
        lean=lean,
        revision=revision,
        message=message or MESSAGE,
        max_shard_size=max_shard_size,
        with_code=with_code,
        text_model=text_model,
        text_model_revision=text_model_revision,
        card=details,
        dry_run=dry_run,
        announce=_announce,
    )
    verb = "would send" if dry_run else "sent"
    rows = [(f"{verb} {name}", f"{size:,} bytes") for name, size in sorted(report.files.items())]
    rows.append(("in all", f"{report.num_bytes:,} bytes"))
    if report.text_model_bytes:
        rows.append(("the LLM stays out", f"{report.text_model_bytes:,} bytes"))
    if report.left_out:
        shown = ", ".join(report.left_out[:8]) + (
            f" and {len(report.left_out) - 8} more" if len(report.left_out) > 8 else ""
        )
        rows.append(("not sent", shown))
    rows += [(f"removed {name}", "of an earlier state") for name in report.removed]
    print_facts("lean" if report.lean else "full", report.repo_id, [*rows, *(("note", note) for note in report.notes)])
    typer.echo(
        f"{verb} {report.num_bytes:,} bytes to {report.url or report.repo_id}"
        + (f", commit {report.commit}" if report.commit else "")
    )


def _announce(plan: "PublishReport") -> None:
    typer.echo(f"sending {plan.num_bytes:,} bytes to {plan.repo_id}: {', '.join(sorted(plan.files))}", err=True)
