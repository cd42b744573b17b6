"""Command `compress registry`: registers versions of models, promotes them behind a gate, and rolls back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli.verify import Verified, Verifier

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compress.plugins.registry.registry import Registry
    from compress.plugins.registry.state import State, Version
    from compress.plugins.registry.upkeep import Fault

app = typer.Typer()
_Root = Annotated[
    Path, typer.Option("--registry", envvar="COMPRESS_REGISTRY", help="The registry's folder, which may be shared.")
]
_ROOT = Path("artifacts") / "registry"
_Json = Annotated[bool, typer.Option("--json", help="Write JSON.")]
_Version = Annotated[str, typer.Argument(metavar="NAME@VERSION", help="reviews@12, reviews@champion or reviews@latest")]
_Alias = Annotated[str, typer.Option("--as", help="The alias.")]
_KEY_VARIABLE = "COMPRESS_REGISTRY_KEY"
_Sign = Annotated[
    Path | None,
    typer.Option("--sign", metavar="KEY", envvar=_KEY_VARIABLE, help="Sign the log with this SSH key."),
]
_Why = Annotated[str, typer.Option(help="The reason, which is recorded.")]


def _open(root: Path, key: Path | None = None) -> Registry:
    """Return the registry in a folder, which prints its messages to standard error and signs entries with a key."""
    from compress.plugins.registry.registry import Registry

    return Registry(root, lambda message: typer.echo(message, err=True), key)


def _print(as_json: bool, fields: object, *lines: str) -> None:
    """Print fields as JSON, or lines."""
    if as_json:
        typer.echo(json.dumps(fields, indent=2, ensure_ascii=False))
    from compress.utils.terminal import printable

    for line in () if as_json else lines:
        typer.echo(printable(line))


def _fields(state: State, version: Version) -> dict[str, Any]:
    """Return a version as it appears in JSON."""
    from dataclasses import asdict

    fields = asdict(version)
    aliases = [alias for alias, number in state.aliases(version.name).items() if number == version.number]
    return {"name": fields.pop("name"), "version": fields.pop("number"), "aliases": aliases, **fields}


@app.command(epilog="Example: compress registry register quickstart --name reviews")
def register(
    run: Annotated[Path, typer.Argument(help="A finished run: its folder, or a recipe's name for its latest run.")],
    name: Annotated[str, typer.Option(help="Name of the model, such as reviews.")],
    bundle: Annotated[Path | None, typer.Option(help="Folder of a bundle of this run, to register with it.")] = None,
    note: Annotated[str, typer.Option(help="A note for the list of versions.")] = "",
    sign: _Sign = None,
    registry: _Root = _ROOT,
    json_: _Json = False,
) -> None:
    """Make a run the next version of a model: its files are linked, or copied to another disk, each once."""
    opened = _open(registry, sign)
    version, new = opened.register(run, name, bundle, note)
    fields = {**_fields(opened.state(), version), "new": new}
    _print(json_, fields, f"{version.reference}{'' if new else ' has these files already'}: {version.summary}")


@app.command("list", epilog="Example: compress registry list reviews")
def list_(
    name: Annotated[str | None, typer.Argument(help="Only the versions of this model.")] = None,
    registry: _Root = _ROOT,
    json_: _Json = False,
) -> None:
    """List the versions with their aliases and main metrics."""
    state = _open(registry).state()
    rows = [_fields(state, version) for version in (state.of(name) if name else state.all())]
    if json_:
        _print(True, rows)
        return
    from compress.cli.output import show as show_view
    from compress.utils.responsive_table import ResponsiveTable, TableColumn

    columns = [TableColumn("version"), TableColumn("is"), TableColumn("metrics", right=True)]
    columns += [TableColumn("registered", rank=1), TableColumn("by", rank=2), TableColumn("note", rank=3)]
    table = ResponsiveTable("", columns)
    for row in rows:
        status = ", ".join(row["aliases"]) or ("retired" if row["retired"] else "")
        reference = f"{row['name']}@{row['version']}"
        table.add(reference, status, row["summary"], row["at"][:16].replace("T", " "), row["who"], row["note"])
    show_view(table)


@app.command(epilog="Example: compress registry show reviews@latest")
def show(version: _Version, registry: _Root = _ROOT, json_: _Json = False) -> None:
    """Show the contents of a version, its measurements, and its history."""
    from compress.cli.output import render_rows
    from compress.cli.output import show as show_view
    from compress.plugins.registry.promotion import report_of
    from compress.results.report import FINAL

    opened = _open(registry)
    state = opened.state()
    selected = state.find(version)
    contents = opened.contents(selected)
    report = report_of(opened, contents)
    rows = [row.model_copy(update={"raw": None}) for row in report.measurements if row.model == FINAL]
    actions = [entry.model_dump(mode="json") for entry in state.entries_of(selected.name, selected.number)]
    if json_:
        files = {**contents.model_dump(mode="json"), "size_bytes": contents.size_bytes, "model": contents.model_digest}
        measurements = [row.model_dump(mode="json") for row in rows]
        _print(True, {**_fields(state, selected), "contents": files, "measurements": measurements, "history": actions})
        return
    size = f"{len(contents.files)} files, {contents.size_bytes / 1e6:.2f} MB, model {contents.model_digest}"
    origin = f"recipe {contents.recipe}, run {selected.run}"
    _print(False, None, f"{selected.reference}: {selected.summary}", origin, size)
    show_view(render_rows(rows))
    _print(False, None, *map(_line, actions))


@app.command(epilog="Example: compress registry history reviews")
def history(
    name: Annotated[str | None, typer.Argument(help="Only the actions on this model.")] = None,
    registry: _Root = _ROOT,
    json_: _Json = False,
) -> None:
    """List all actions with author, time and reason, in the order of the log."""
    state = _open(registry).state()
    entries = state.entries if name is None else state.entries_of(state.of(name)[0].name)
    actions = [entry.model_dump(mode="json") for entry in entries]
    _print(json_, actions, *(_line(entry) for entry in actions))


def _line(entry: dict[str, Any]) -> str:
    """Return `2026-11-28T14:00:00+00:00 ada promoted reviews@12 as champion in place of @11: because`."""
    words = [entry["at"], entry["who"], entry["kind"]]
    words += [f"{entry['name']}@{entry['version']}"] if "name" in entry else []
    words += [", ".join(f"{name}@{number}" for name, number in entry["versions"])] if "versions" in entry else []
    words += [f"as {entry['alias']}"] if "alias" in entry else []
    words += [f"in place of @{entry['before']}"] if entry.get("before") else []
    words += ["although it was refused"] if entry.get("forced") else []
    why = entry.get("why") or entry.get("note") or ""
    return " ".join(words) + (f": {why}" if why else "")


@app.command(epilog="Example: compress registry promote reviews@2 --as champion")
def promote(
    version: _Version,
    alias: _Alias = "champion",
    policy: Annotated[
        Path | None,
        typer.Option(help="YAML file with the rules; default: `gate:` of the run's recipe, or else built-in rules."),
    ] = None,
    across_hosts: Annotated[
        bool, typer.Option("--across-hosts", help="Judge times even if the machines differ.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Promote it even if it is worse; needs --why.")] = False,
    why: _Why = "",
    sign: _Sign = None,
    registry: _Root = _ROOT,
    json_: _Json = False,
) -> None:
    """Let an alias refer to a version. Refused (exit code 1) if it is worse than the present one."""
    from compress.plugins.registry.promotion import PromotionRequest
    from compress.plugins.registry.promotion import promote as decide
    from compress.report.compare.formatting import judged_name

    promotion = decide(_open(registry, sign), PromotionRequest(version, alias, policy, across_hosts, force, why))
    promoted, judged, result = promotion.version, promotion.judged, promotion.result
    fields = {"version": promoted.number, "name": promoted.name, "alias": alias, "refused": promotion.refused}
    fields |= {"already": promotion.already, "gate": judged.model_dump(mode="json")}
    inconclusive: list[str] = []
    if result:
        fields["judgements"] = json.loads(result.to_json())["judgements"]
        inconclusive = [f"inconclusive: {judged_name(row)} on {row.target}" for row in result.having("warned")]
    verb = "is already" if promotion.already else "is not made" if promotion.refused else "is now"
    comparison = "" if judged.against is None else f", compared with {promoted.name}@{judged.against}"
    summary = f"{promoted.reference} {verb} the {alias}{comparison}: {judged.status}"
    _print(json_, fields, summary, *judged.failed, *inconclusive)
    if promotion.refused:
        typer.echo(f'to promote it nevertheless: --force --why "..."; {alias} is unchanged', err=True)
        raise typer.Exit(1)


@app.command(epilog="Example: compress registry rollback reviews")
def rollback(
    name: Annotated[str, typer.Argument(help="The model, such as reviews.")],
    alias: _Alias = "champion",
    why: _Why = "",
    sign: _Sign = None,
    registry: _Root = _ROOT,
    json_: _Json = False,
) -> None:
    """Let an alias refer again to the version that it referred to before."""
    entry = _open(registry, sign).rollback(name, alias, why)
    summary = f"{name}@{entry.version} is the {alias} again, in place of @{entry.before}"
    _print(json_, entry.model_dump(mode="json"), summary)


@app.command(epilog="Example: compress registry retire reviews@1")
def retire(
    version: _Version, why: _Why = "", sign: _Sign = None, registry: _Root = _ROOT, json_: _Json = False
) -> None:
    """Retire a version, so that `gc` may remove its files."""
    opened = _open(registry, sign)
    retired = opened.retire(version, why)
    _print(json_, _fields(opened.state(), retired), f"{retired.reference} is retired")


@app.command(epilog="Example: compress registry sign ~/.ssh/id_ed25519")
def sign(
    key: Annotated[Path, typer.Argument(envvar=_KEY_VARIABLE, help="SSH key, as `ssh-keygen` made it.")],
    why: _Why = "",
    registry: _Root = _ROOT,
    json_: _Json = False,
) -> None:
    """Sign the log with its present entries, which `history` shows. Later entries are signed one by one."""
    opened = _open(registry, key)
    new = opened.sign(why)
    lines, signer = opened.log.head.number, opened.signer()
    fields = {"lines": lines, "signer": signer, "new": new}
    _print(json_, fields, f"{lines} lines of the log {'are now' if new else 'were already'} signed by {signer}")


@app.command(epilog="Example: compress registry trust team/allowed_signers --revoked team/revoked.pub")
def trust(
    signers: Annotated[Path, typer.Argument(help="Public keys (KEY.pub), or OpenSSH's allowed_signers.")],
    revoked: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Keys that no longer count: public keys or OpenSSH's list. Default: the list as it is."
        ),
    ] = None,
    registry: _Root = _ROOT,
    json_: _Json = False,
) -> None:
    """Let only these keys sign this registry and its remotes: nothing else is fetched, pulled or added to."""
    from compress.utils.errors import UntrustedError

    opened = _open(registry)
    opened.trust.name(signers, revoked)
    keys = opened.trust.fingerprints()
    fields: dict[str, Any] = {"registry": str(registry), "signers": keys, "problem": None}
    lines = [f"{registry}: only these keys may sign, and no other log is fetched or pulled", *keys]
    try:
        if opened.log.path.is_file():
            opened.signer()
    except UntrustedError as error:
        fields["problem"] = error.what
        lines += [error.what, "look at `compress registry history`, then: compress registry sign KEY"]
    _print(json_, fields, *lines)


@app.command(epilog="Example: compress registry aliases reviews")
def aliases(
    name: Annotated[str | None, typer.Argument(help="Only aliases of this model.")] = None,
    registry: _Root = _ROOT,
    json_: _Json = False,
) -> None:
    """List the version that each alias refers to."""
    state = _open(registry).state()
    names = [state.of(name)[0].name] if name else sorted(state.versions)
    by_model = {model: state.aliases(model) for model in names}
    pairs = [(model, alias, number) for model, numbers in by_model.items() for alias, number in numbers.items()]
    lines = [f"{model}@{alias} = {model}@{number}" for model, alias, number in pairs]
    _print(json_, by_model, *lines)


_Url = Annotated[
    str, typer.Argument(help="s3://bucket/folder, sftp://user@host/folder, or another address that fsspec supports.")
]
_Remote = Annotated[str | None, typer.Option(metavar="URL", help="Remote address to use instead of a local folder.")]


@app.command(epilog="Example: compress registry push s3://bucket/models")
def push(url: _Url, registry: _Root = _ROOT, json_: _Json = False) -> None:
    """Send the files that the copy at an address lacks; each piece is read again. Resumes an interrupted push."""
    from compress.plugins.registry.remote import Remote
    from compress.plugins.registry.remote import push as send
    from compress.report.progress import ConsoleProgress

    remote = Remote(url)
    transfer = send(_open(registry), remote, ConsoleProgress())
    words = f"{transfer.entries} new entries, {transfer.files} files, {transfer.bytes / 1e6:.2f} MB sent"
    _print(json_, transfer.model_dump(), f"{remote.url}: {words}")


@app.command(epilog="Example: compress registry fetch s3://bucket/models")
def fetch(url: _Url, registry: _Root = _ROOT, json_: _Json = False) -> None:
    """Download the files that a registry lacks from its copy at an address, and verify every byte."""
    from compress.plugins.registry.remote import Remote
    from compress.plugins.registry.remote import fetch as bring
    from compress.report.progress import ConsoleProgress

    transfer = bring(_open(registry), Remote(url), ConsoleProgress())
    words = f"{transfer.entries} new entries, {transfer.files} new files, {transfer.bytes / 1e6:.2f} MB received"
    _print(json_, transfer.model_dump(), f"{registry}: {words}")


@app.command(epilog="Example: compress registry verify --remote s3://bucket/models")
def verify(remote: _Remote = None, registry: _Root = _ROOT, json_: _Json = False) -> None:
    """Read every byte and name every damaged, missing or surplus file. Exit code 1: there is one."""
    from compress.plugins.registry.remote import Remote, verify_remote
    from compress.plugins.registry.upkeep import verify as look
    from compress.report.progress import ConsoleProgress

    progress = ConsoleProgress()
    opened = _open(registry)
    faults = look(opened, progress) if remote is None else verify_remote(Remote(remote), progress, opened.trust)
    verified = _verified(faults)
    _print(json_, verified.content, *verified.lines)
    if faults:
        raise typer.Exit(1)


def _verified(faults: Sequence[Fault]) -> Verified:
    """Return the result of a verification from the faults of a registry."""
    lines = []
    for fault in faults:
        lines.append(f"{fault.fault}: {fault.path}" + (f": {fault.why}" if fault.why else ""))
        lines += [f"  {file}" for file in fault.of]
    records = [fault.model_dump(mode="json") for fault in faults]
    content = {"sound": not faults, "faults": records}
    return Verified(content, tuple(lines) or ("every file is as it was written",), not faults)


def _is_registry(path: Path) -> bool:
    from compress.plugins.registry.log import Log

    return Log(path).path.is_file()


def _verify_registry(path: Path, signer: Path | None) -> Verified:
    from compress.plugins.registry.log import LOG
    from compress.plugins.registry.upkeep import verify as look
    from compress.report.progress import ConsoleProgress

    opened = _open(path)
    faults = look(opened, ConsoleProgress())
    # The last line of a damaged log says nothing.
    if any(fault.path == LOG and fault.fault in ("damaged", "untrusted") for fault in faults):
        return _verified(faults)
    head = opened.log.head
    fingerprint = opened.trust.signer(head, str(opened.log.path), signer)
    verified = _verified(faults)
    unsigned = "not signed: whoever changed it could have written its log anew"
    line = f"{head.number} lines of the log are signed by {fingerprint}" if fingerprint else unsigned
    return Verified({**verified.content, "signer": fingerprint}, (*verified.lines, line), verified.sound)


REGISTRY = Verifier("a registry's folder", _is_registry, _verify_registry)


@app.command(epilog="Example: compress registry pull reviews@champion --output model")
def pull(
    version: _Version,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write, with the layout of the run's folder.")
    ],
    replace: Annotated[bool, typer.Option("--replace", help="Replace a folder that was pulled before.")] = False,
    remote: _Remote = None,
    registry: _Root = _ROOT,
    json_: _Json = False,
) -> None:
    """Copy a version's files into a folder; every byte is verified."""
    from compress.plugins.registry.remote import Remote, pull_remote

    opened = _open(registry)
    if remote:
        pulled = pull_remote(Remote(remote), version, output, replace, opened.trust)
    else:
        pulled = opened.pull(version, output, replace)
    fields = {"name": pulled.name, "version": pulled.number, "record": pulled.record, "folder": str(output)}
    _print(json_, fields, f"{output}: {pulled.reference}, verified")


@app.command(epilog="Example: compress registry mirror reviews sqlite:///runs.db")
def mirror(
    name: Annotated[str, typer.Argument(help="The model, such as reviews.")],
    uri: Annotated[str, typer.Argument(help="MLflow: http://host:5000 or sqlite:///runs.db.")],
    registry: _Root = _ROOT,
    json_: _Json = False,
) -> None:
    """Copy a model's versions, metrics and aliases into MLflow's registry, with links back; existing ones stay."""
    from compress.plugins.registry.promotion import tracked_versions
    from compress.report.tracking import mirror as write

    numbers = write(*tracked_versions(_open(registry), name), uri, name)
    _print(json_, numbers, *(f"{reference} is version {number} there" for reference, number in numbers.items()))


@app.command(epilog="Example: compress registry gc --dry-run")
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the files.")] = False,
    artifacts: Annotated[Path, typer.Option(help="Folder of runs; the input models of these runs are kept.")] = Path(
        "artifacts"
    ),
    sign: _Sign = None,
    registry: _Root = _ROOT,
    json_: _Json = False,
) -> None:
    """Remove files of retired versions and of killed writers, but none that an alias or a run needs."""
    from compress.plugins.registry.upkeep import collect

    opened = _open(registry, sign)
    planned = collect(opened, artifacts / "runs", dry_run=True)
    plan = [f"{reference} is retired: its own files" for reference in planned.versions]
    plan += [f"{reference} is retired and kept: {why}" for reference, why in planned.kept.items()]
    plan += [f"objects/{digest}" for digest in planned.objects]
    for line in plan:
        typer.echo(line, err=json_)
    collection = planned if dry_run else collect(opened, artifacts / "runs", dry_run=False)
    verb = "would be removed" if dry_run else "removed"
    size = f"{collection.freed_bytes / 1e6:.2f} MB {'to be ' if dry_run else ''}freed"
    fields = {"dry_run": dry_run, **collection.model_dump(mode="json")}
    _print(json_, fields, f"{len(collection.objects)} files {verb}, {size}")
