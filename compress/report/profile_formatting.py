"""Text of a profile's numbers, for the terminal and the page."""

from __future__ import annotations

from compress.benchmark.profile import MachineLimits, OperatorProfile, ProfileRow
from compress.results.formatting import format_bytes, format_number

_BINDS = {"compute": "arithmetic", "memory": "memory", "overhead": "overhead", None: "not counted"}
_SENTENCES = {
    "compute": "Compute-bound: fewer or cheaper operations make it faster.",
    "memory": "Memory-bound: fewer bytes to move make it faster.",
    "overhead": (
        "Arithmetic and memory each need less than a third of the time. The rest is spent on starting small operators, "
        "waiting for threads, and kernels that are slower than this machine's best."
    ),
    None: "The costs of this model's operators are unknown, so its limit is unknown.",
}


def time_text(milliseconds: float) -> str:
    """Return `1.25 ms` or `83.4 µs`."""
    return f"{format_number(milliseconds)} ms" if milliseconds >= 1 else f"{format_number(milliseconds * 1e3)} µs"


def interval_text(profile: OperatorProfile) -> str:
    """Return the interval of the time of a call."""
    return f"{format_number(profile.low_ms)}\u2013{format_number(profile.high_ms)} ms"


def share_text(share: float | None) -> str:
    """Return `7.4%`, or a dash if nothing is counted."""
    return "\u2013" if share is None else f"{share * 100:.1f}%"


def rate_text(per_second: float, unit: str) -> str:
    """Return `51.7 GFLOP/s`."""
    return f"{format_number(per_second / 1e9)} G{unit}/s"


def giga_text(per_second: float) -> str:
    """Return a rate in giga units as a bare number for a narrow column: `165`, `7.2`, `0.0`."""
    value = per_second / 1e9
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def count_text(value: float) -> str:
    """Return operations in a call: `81.9 M`."""
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{format_number(value / factor)} {letter}"
    return f"{value:.0f}"


def bottleneck_text(row: ProfileRow) -> str:
    """Return the limit that binds a row, in a word."""
    return _BINDS[row.bottleneck]


def verdict_text(profile: OperatorProfile) -> str:
    """Return the limit that binds the whole model, and its meaning."""
    return _SENTENCES[profile.whole.bottleneck]


def call_text(profile: OperatorProfile) -> str:
    """Return the kind of call: `a token after 128`, `a prompt of 128 tokens`, `batches of 1`."""
    match profile.phase:
        case "token":
            return f"a token after {profile.context}"
        case "prompt":
            return f"a prompt of {profile.context} tokens"
        case "batch":
            return f"batches of {profile.batch_size}"


def working_set_text(limits: MachineLimits) -> str:
    """Return the bandwidth that applies, and the reason."""
    size, rate = format_bytes(limits.working_set_bytes), rate_text(limits.working_set_bytes_per_s, "B")
    cache = format_bytes(limits.last_level_cache_bytes or 0)
    match limits.cached:
        case True:
            return f"A call has {size} in use, which the last cache of {cache} holds: at that size, {rate}."
        case False:
            return f"A call has {size} in use, more than the last cache of {cache}: {rate}."
        case None:
            return f"A call has {size} in use; at that size, {rate}."


def limit_facts(limits: MachineLimits) -> list[tuple[str, str]]:
    """Return the machine's limits, by name."""
    return [
        ("Float arithmetic", rate_text(limits.fp32_per_s, "FLOP")),
        ("8-bit arithmetic", rate_text(limits.int8_per_s, "OP")),
        (f"Bandwidth, working set of {format_bytes(limits.working_set_bytes)}",
         rate_text(limits.working_set_bytes_per_s, "B")),
        (f"Bandwidth, memory ({format_bytes(limits.memory_buffer_bytes)})", rate_text(limits.memory_bytes_per_s, "B")),
    ]  # fmt: skip


def method_notes(profile: OperatorProfile) -> list[str]:
    """Return notes on how the profile was measured, followed by its own notes."""
    # Kind and number of the calls in a pass.
    match profile.phase:
        case "token":
            calls = f"{profile.calls} successive tokens after a prompt of {profile.context}"
        case "prompt":
            calls = f"{profile.calls} prompts of {profile.context} tokens"
        case _:
            lengths = profile.lengths
            span = f" of {min(lengths)}\u2013{max(lengths)} tokens" if lengths else ""
            calls = f"{profile.calls} batches of {profile.batch_size}{span}"
    notes = [
        f"{calls}, {profile.passes} passes each without and with profiling, {profile.threads} threads.",
        f"With profiling a call takes {time_text(profile.profiled_ms)}, {profile.profiler_overhead:+.0%}; for "
        f"{time_text(profile.operators_ms)} of it operators run. The values of the whole model are without profiling.",
    ]
    total_ms = sum(row.time_ms for row in profile.rows)
    uncounted = [row for row in profile.by_operator() if row.uncounted_ms > 0]
    if uncounted:
        names = ", ".join(f"{row.name} ({row.time_ms / total_ms:.1%} of the time)" for row in uncounted)
        notes.append(f"Not counted, and in no limit: {names}.")
    above_limit = [row.name for row in profile.rows if (row.share_of_roof or 0.0) > 1]
    if above_limit:
        names = ", ".join(above_limit[:3]) + (", ..." if len(above_limit) > 3 else "")
        notes.append(
            f"{len(above_limit)} operators are faster than the limit, because their bytes lie in a nearer cache or "
            f"this machine was slower when its limits were measured: {names}."
        )
    return [*notes, *profile.notes]
