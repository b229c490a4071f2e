"""``lightgptq push``: a checkpoint to the hub."""

from __future__ import annotations

from typing import Annotated

import typer

from lightgptq.cli.output import show_fields, show_json


def command(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Its folder.")],
    repo: Annotated[
        str, typer.Argument(metavar="REPO", help="ORGANISATION/NAME; made if it does not exist.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; made if it does not exist.")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Hub name of the original, for the card; default what the report says.")
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="Of the original, for the card, as the hub names it.", metavar="ID")
    ] = None,
    rewrite_card: Annotated[
        bool, typer.Option("--rewrite-card", help="Replace a README.md that is there.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only write the card into the folder.")] = False,
    token: Annotated[
        str | None, typer.Option(help="Default: HF_TOKEN, or the one that `hf auth login` stored.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Upload CHECKPOINT to REPO with a model card. An interrupted upload goes on when started again."""
    from huggingface_hub.utils import disable_progress_bars

    from lightgptq.hub.push import push_to_hub

    if as_json:
        disable_progress_bars()
    result = push_to_hub(
        checkpoint,
        repo,
        private=private,
        revision=revision,
        token=token,
        base_model=base_model,
        license=license,
        rewrite_card=rewrite_card,
        dry_run=dry_run,
    )
    if as_json:
        show_json({"card": str(result.card), "new_card": result.new_card, "url": result.url})
        return
    fields = {"card": f"{result.card} ({'written' if result.new_card else 'kept as it is'})"}
    if result.url is not None:
        fields["commit"] = result.url
    show_fields(fields)
