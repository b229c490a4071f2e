"""``lightgptq generate``: continue a prompt."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from lightgptq.cli.output import show_json


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub name, quantized or not.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How many tokens at most.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the model's own code.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Continue a prompt with MODEL, always taking the most likely token."""
    text = continue_prompt(model, prompt, max_new_tokens, device, revision, trust_remote_code)
    if as_json:
        show_json({"prompt": prompt, "text": text})
    else:
        sys.stdout.write(prompt + text + "\n")


def continue_prompt(
    model: str,
    prompt: str,
    max_new_tokens: int,
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> str:
    """The greedy continuation, without the prompt."""
    import torch

    from lightgptq.checkpoint.reader import CheckpointReader
    from lightgptq.companions import load_tokenizer, local_folder
    from lightgptq.hf import load

    folder = str(local_folder(CheckpointReader.open(model, revision)))
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    loaded: Any = load(model, device=device, revision=revision, trust_remote_code=trust_remote_code)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(loaded.device)
    with torch.no_grad():
        output = loaded.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = output[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True))
