"""The commands `medi3d weights ...`."""

import typer

from medi3d.cli.options import JsonFile, write_json

weights_app = typer.Typer(no_args_is_help=True, help="The catalogue of pretrained weights.")


@weights_app.command("list")
def weights_list(json_file: JsonFile = None) -> None:
    """List every row: name, network, licence, and whether it is on this machine.

    Example: medi3d weights list
    """
    from medi3d.cli.tables import print_weights
    from medi3d.weights.catalogue import list_weights

    rows = list_weights()
    print_weights(rows)
    write_json(json_file, [row.name for row in rows])


@weights_app.command("show")
def weights_show(name: str, json_file: JsonFile = None) -> None:
    """Show one row: paper, licence, checksum, and what input its network expects.

    Example: medi3d weights show kinetics400/i3d-rgb
    """
    from dataclasses import asdict

    from medi3d.console import print_facts
    from medi3d.weights.catalogue import get_row

    facts = asdict(get_row(name))
    print_facts(name, facts)
    write_json(json_file, facts)


@weights_app.command("fetch")
def weights_fetch(name: str) -> None:
    """Download a row into the cache (MEDI3D_CACHE), with its SHA-256 verified.

    Example: medi3d weights fetch imagenet/efficientnet-lite0
    """
    from medi3d.weights.catalogue import get_row
    from medi3d.weights.fetch import fetch_weights

    typer.echo(f"ready: {fetch_weights(get_row(name), typer.echo)}")
