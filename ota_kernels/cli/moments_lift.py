"""`ota-merge moments lift`: curvature of full matrices from an adapter's second moments, an estimate."""

from __future__ import annotations

import click


@click.command(short_help="Estimate curvature of full matrices from LoRA's.")
@click.argument("states", type=click.Path(), metavar="ADAPTER_STATES")
@click.argument("out", type=click.Path(), metavar="OUT.safetensors")
@click.option(
    "--model", type=click.Path(), metavar="BASE_DIR", required=True, help="The adapter's base model."
)
@click.option(
    "--adapter",
    type=click.Path(),
    metavar="DIR",
    help="The trained adapter, for the scale.  [default: beside ADAPTER_STATES, if there is one]",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT.")
def lift(states: str, out: str, model: str, adapter: str | None, overwrite: bool) -> None:
    """Estimate rank-1 curvature of the full matrices that a LoRA adapter was trained for.

    ADAPTER_STATES is what `extract` wrote of the adapter, or its checkpoint. Rows are weighed by the second
    moments of lora_B, columns by those of lora_A. OUT is what `preconditioner_path` in a recipe takes for the
    merged adapter; it says that it is an estimate.
    """
    from ..errors import one_line
    from ..moments.lift import lift as run
    from ..sizes import format_bytes

    done = run(states, out, model, adapter, overwrite)
    lines = [
        f"lifted {done.tensors} pairs of LoRA matrices into {out}: an estimate, {format_bytes(done.nbytes)}",
        f"  {done.parameters - done.tensors} other tensors of the base have no curvature: merge with "
        "`missing_curvature: base`",
    ]
    if not done.scaled:
        lines.append(
            "  the scale is that of PEFT's first values with alpha = r: --adapter gives the true one"
        )
    if done.skipped:
        names = list(done.skipped)
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        lines.append(f"  not lifted: {', '.join(names[:5])}{more}")
    for line in lines:
        click.echo(one_line(line))
