"""`compress registry`: which version of a model is in use, who decided it and why, and the way back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from compress.plugins.registry.registry import Registry
    from compress.plugins.registry.state import State, Version

app = typer.Typer()
_Root = Annotated[
    Path, typer.Option("--registry", envvar="COMPRESS_REGISTRY", help="The registry's folder, which may be shared.")
]
_ROOT = Path("artifacts") / "registry"
_Json = Annotated[bool, typer.Option("--json", help="Write JSON.")]
_Version = Annotated[str, typer.Argument(metavar="NAME@VERSION", help="reviews@12, reviews@champion or reviews@latest")]
_Alias = Annotated[str, typer.Option("--as", help="The alias.")]
_Why = Annotated[str, typer.Option(help="The reason, which is kept.")]


def _open(root: Path) -> Registry:
    from compress.plugins.registry.registry import Registry

    return Registry(root, lambda message: typer.echo(message, err=True))


def _say(as_json: bool, fields: Any, *lines: str) -> None:
    if as_json:
        typer.echo(json.dumps(fields, indent=2, ensure_ascii=False))
    for line in () if as_json else lines:
        typer.echo(line)


def _fields(state: State, version: Version) -> dict[str, Any]:
    """A version as JSON has it."""
    from dataclasses import asdict

    fields = asdict(version)
    aliases = [alias for alias, number in state.aliases(version.name).items() if number == version.number]
    return {"name": fields.pop("name"), "version": fields.pop("number"), "aliases": aliases, **fields}


@app.command()
def register(
    run: Annotated[Path, typer.Argument(help="A finished run: its folder, or the name of a recipe for its latest.")],
    name: Annotated[str, typer.Option(help="What the model is called, such as reviews.")],
    bundle: Annotated[
        Path | None, typer.Option(help="The folder of a bundle made of this run, to keep with it.")
    ] = None,
    note: Annotated[str, typer.Option(help="A line for whoever reads the list.")] = "",
    registry: _Root = _ROOT,
    json_: _Json = False,
) -> None:
    """Make a run the next version of a model: its files are linked, or copied to another disk, each once."""
    opened = _open(registry)
    version, new = opened.register(run, name, bundle, note)
    fields = {**_fields(opened.state(), version), "new": new}
    _say(json_, fields, f"{version.reference}{'' if new else ' has these files already'}: {version.summary}")


@app.command("list")
def list_(
    name: Annotated[str | None, typer.Argument(help="Only the versions of this model.")] = None,
    registry: _Root = _ROOT,
    json_: _Json = False,
) -> None:
    """List the versions, with what they are called and their main figures."""
    state = _open(registry).state()
    rows = [_fields(state, version) for version in (state.of(name) if name else state.all())]
    if json_:
        _say(True, rows)
        return
    from compress.cli.output import show as show_view
    from compress.utils.responsive_table import ResponsiveTable, TableColumn

    columns = [TableColumn("version"), TableColumn("is"), TableColumn("figures", right=True), TableColumn("registered", rank=1)]
    table = ResponsiveTable("", [*columns, TableColumn("by", rank=2), TableColumn("note", rank=3)])
    for row in rows:
        status = ", ".join(row["aliases"]) or ("retired" if row["retired"] else "")
        reference = f"{row['name']}@{row['version']}"
        table.add(reference, status, row["summary"], row["at"][:16].replace("T", " "), row["who"], row["note"])
    show_view(table)


@app.command()
def show(version: _Version, registry: _Root = _ROOT, json_: _Json = False) -> None:
    """Show what a version holds, what was measured of it, and what was done with it."""
    from compress.cli.output import render_rows
    from compress.cli.output import show as show_view
    from compress.plugins.registry.promotion import report_of
    from compress.results.report import FINAL

    opened = _open(registry)
    state = opened.state()
    found = state.find(version)
    contents = opened.contents(found)
    report = report_of(opened, contents)
    rows = [row.model_copy(update={"raw": None}) for row in report.measurements if row.model == FINAL]
    done = [entry.model_dump(mode="json") for entry in state.entries_of(found.name, found.number)]
    if json_:
        held = {**contents.model_dump(mode="json"), "size_bytes": contents.size_bytes, "model": contents.model_digest}
        measured = [row.model_dump(mode="json") for row in rows]
        _say(True, {**_fields(state, found), "contents": held, "measurements": measured, "history": done})
        return
    _say(False, None, f"{found.reference}: {found.summary}", f"recipe {contents.recipe}, run {found.run}")
    _say(False, None, f"{len(contents.files)} files, {contents.size_bytes / 1e6:.2f} MB, model {contents.model_digest}")
    show_view(render_rows(rows))
    _say(False, None, *(_line(entry) for entry in done))


@app.command()
def history(
    name: Annotated[str | None, typer.Argument(help="Only what was done with this model.")] = None,
    registry: _Root = _ROOT,
    json_: _Json = False,
) -> None:
    """List everything that was done, by whom, when and why, in the order of the log."""
    state = _open(registry).state()
    entries = state.entries if name is None else state.entries_of(state.of(name)[0].name)
    done = [entry.model_dump(mode="json") for entry in entries]
    _say(json_, done, *(_line(entry) for entry in done))


def _line(entry: dict[str, Any]) -> str:
    """`2026-11-28T14:00:00+00:00 ada promoted reviews@12 as champion, before @11 (forced): because`."""
    words = [entry["at"], entry["who"], entry["kind"]]
    words += [f"{entry['name']}@{entry['version']}"] if "name" in entry else []
    words += [", ".join(f"{name}@{number}" for name, number in entry["versions"])] if "versions" in entry else []
    words += [f"as {entry['alias']}"] if "alias" in entry else []
    words += [f"in place of @{entry['before']}"] if entry.get("before") else []
    words += ["although it was refused"] if entry.get("forced") else []
    why = entry.get("why") or entry.get("note") or ""
    return " ".join(words) + (f": {why}" if why else "")


@app.command()
def promote(
    version: _Version,
    alias: _Alias = "champion",
    policy: Annotated[
        Path | None,
        typer.Option(help="A YAML file with the rules; default: `gate:` of its recipe, else built-in rules."),
    ] = None,
    across_hosts: Annotated[
        bool, typer.Option("--across-hosts", help="Judge times even if the machines differ.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Promote it even if it is worse; needs --why.")] = False,
    why: _Why = "",
    registry: _Root = _ROOT,
    json_: _Json = False,
) -> None:
    """Let an alias stand for a version. Refused (exit code 1) where that is worse than the present one."""
    from compress.plugins.registry.promotion import Wish
    from compress.plugins.registry.promotion import promote as decide
    from compress.report.compare.formatting import judged_name

    done = decide(_open(registry), Wish(version, alias, policy, across_hosts, force, why))
    was = "" if done.judged.against is None else f", compared with {done.version.name}@{done.judged.against}"
    said = "is already" if done.already else "is not made" if done.refused else "is now"
    fields = {"version": done.version.number, "name": done.version.name, "alias": alias, "refused": done.refused}
    fields |= {"already": done.already, "gate": done.judged.model_dump(mode="json")}
    fields |= {"judgements": json.loads(done.result.to_json())["judgements"]} if done.result else {}
    unknown = (
        [f"inconclusive: {judged_name(row)} on {row.target}" for row in done.result.having("warned")]
        if done.result
        else []
    )
    what = f"{done.version.reference} {said} the {alias}{was}: {done.judged.status}"
    _say(json_, fields, what, *done.judged.failed, *unknown)
    if done.refused:
        typer.echo(f'to promote it all the same: --force --why "..."; {alias} is what it was', err=True)
        raise typer.Exit(1)


@app.command()
def rollback(
    name: Annotated[str, typer.Argument(help="The model, such as reviews.")],
    alias: _Alias = "champion",
    why: _Why = "",
    registry: _Root = _ROOT,
    json_: _Json = False,
) -> None:
    """Let an alias stand for the version again that it stood for before."""
    done = _open(registry).rollback(name, alias, why)
    _say(json_, done.model_dump(mode="json"), f"{name}@{done.version} is the {alias} again, in place of @{done.before}")


@app.command()
def retire(version: _Version, why: _Why = "", registry: _Root = _ROOT, json_: _Json = False) -> None:
    """Say that a version is no longer wanted, so that `gc` may remove its files."""
    opened = _open(registry)
    done = opened.retire(version, why)
    _say(json_, _fields(opened.state(), done), f"{done.reference} is retired")


@app.command()
def aliases(
    name: Annotated[str | None, typer.Argument(help="Only those of this model.")] = None,
    registry: _Root = _ROOT,
    json_: _Json = False,
) -> None:
    """List what each alias stands for."""
    state = _open(registry).state()
    names = [state.of(name)[0].name] if name else sorted(state.versions)
    found = {each: state.aliases(each) for each in names}
    lines = [f"{each}@{alias} = {each}@{number}" for each, known in found.items() for alias, number in known.items()]
    _say(json_, found, *lines)


_Url = Annotated[str, typer.Argument(help="s3://bucket/folder, sftp://user@host/folder, or what else fsspec opens.")]
_Remote = Annotated[str | None, typer.Option(metavar="URL", help="The copy at this address, in place of a folder.")]


@app.command()
def push(url: _Url, registry: _Root = _ROOT, json_: _Json = False) -> None:
    """Send what the copy at an address lacks; each piece is read again. Given again, it goes on where it broke off."""
    from compress.cli.console_progress import ConsoleProgress
    from compress.plugins.registry.remote import Remote
    from compress.plugins.registry.transfer import push as send

    done = send(_open(registry), Remote(url), ConsoleProgress())
    words = f"{done.entries} new entries, {done.files} files, {done.bytes / 1e6:.2f} MB sent"
    _say(json_, done.model_dump(), f"{url}: {words}")


@app.command()
def fetch(url: _Url, registry: _Root = _ROOT, json_: _Json = False) -> None:
    """Bring what a registry lacks from its copy at an address, or all into a new folder; every byte is verified."""
    from compress.cli.console_progress import ConsoleProgress
    from compress.plugins.registry.remote import Remote
    from compress.plugins.registry.transfer import fetch as bring

    done = bring(_open(registry), Remote(url), ConsoleProgress())
    words = f"{done.entries} new entries, {done.files} new files, {done.bytes / 1e6:.2f} MB brought"
    _say(json_, done.model_dump(), f"{registry}: {words}")


@app.command()
def verify(remote: _Remote = None, registry: _Root = _ROOT, json_: _Json = False) -> None:
    """Read every byte and name every damaged, missing or surplus file. Exit code 1: there is one."""
    from compress.cli.console_progress import ConsoleProgress
    from compress.plugins.registry.remote import Remote
    from compress.plugins.registry.transfer import verify_remote
    from compress.plugins.registry.upkeep import verify as look

    progress = ConsoleProgress()
    faults = look(_open(registry), progress) if remote is None else verify_remote(Remote(remote), progress)
    lines = [
        f"{fault.fault}: {fault.path}{f': {fault.why}' if fault.why else ''}" + "".join(f"\n  {of}" for of in fault.of)
        for fault in faults
    ]
    found = [fault.model_dump(mode="json") for fault in faults]
    _say(json_, {"sound": not faults, "faults": found}, *(lines or ["every file is as it was written"]))
    if faults:
        raise typer.Exit(1)


@app.command()
def pull(
    version: _Version,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write, as the run's was.")],
    replace: Annotated[bool, typer.Option("--replace", help="Take the place of what was pulled there before.")] = False,
    remote: _Remote = None,
    registry: _Root = _ROOT,
    json_: _Json = False,
) -> None:
    """Copy a version's files into a folder; every byte is verified."""
    from compress.plugins.registry.remote import Remote
    from compress.plugins.registry.transfer import pull_remote

    opened = _open(registry)
    done = pull_remote(Remote(remote), version, output, replace) if remote else opened.pull(version, output, replace)
    fields = {"name": done.name, "version": done.number, "record": done.record, "folder": str(output)}
    _say(json_, fields, f"{output}: {done.reference}, verified")


@app.command()
def mirror(
    name: Annotated[str, typer.Argument(help="The model, such as reviews.")],
    uri: Annotated[str, typer.Argument(help="MLflow: http://host:5000 or sqlite:///runs.db.")],
    registry: _Root = _ROOT,
    json_: _Json = False,
) -> None:
    """Copy a model's versions, figures and aliases into MLflow's registry, with links back; what is there stays."""
    from compress.plugins.registry.tracked import tracked
    from compress.report.tracking import mirror as write

    known = write(*tracked(_open(registry), name), uri, name)
    _say(json_, known, *(f"{reference} is version {number} there" for reference, number in known.items()))


@app.command()
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    artifacts: Annotated[Path, typer.Option(help="The folder of runs, whose starting models are kept.")] = Path(
        "artifacts"
    ),
    registry: _Root = _ROOT,
    json_: _Json = False,
) -> None:
    """Remove files of retired versions, and what killed writers left; nothing that an alias or a run needs."""
    from compress.plugins.registry.upkeep import collect

    opened = _open(registry)
    planned = collect(opened, artifacts / "runs", dry_run=True)
    plan = [f"{reference} is retired: its own files" for reference in planned.versions]
    plan += [f"{reference} is retired and kept: {why}" for reference, why in planned.kept.items()]
    plan += [f"objects/{digest}" for digest in planned.objects]
    for line in plan:
        typer.echo(line, err=json_)
    done = planned if dry_run else collect(opened, artifacts / "runs", dry_run=False)
    verb = "would be removed" if dry_run else "removed"
    size = f"{done.freed_bytes / 1e6:.2f} MB {'to be ' if dry_run else ''}freed"
    _say(json_, {"dry_run": dry_run, **done.model_dump(mode="json")}, f"{len(done.objects)} files {verb}, {size}")
