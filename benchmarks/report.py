"""Write docs/benchmarks.md from the measurements of the benchmarks.

python -m benchmarks.report 10m.json 124m.json speedrun.json busy.json > docs/benchmarks.md
"""

import argparse
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.busy import format_busy
from benchmarks.common import format_machine, format_verdict
from benchmarks.training_peers import DEFAULTS, FP32, LEAN, OURS

FASTEST_DOCUMENTED, FASTEST, LEANEST = "fastest peer as documented", "fastest peer at its best", "leanest peer"
REQUIRED = {
    ("10m", FASTEST_DOCUMENTED): 1.8,
    ("10m", FASTEST): 1.2,
    ("124m", FASTEST): 1.6,
    ("124m", LEANEST): 0.6,
}
"""(model, peer) -> minimum ratio of our speed to the peer's; for the leanest peer, maximum ratio of memory."""
MIN_SPEEDRUN_RATIO = 10.0

INTRODUCTION = """\
# Benchmarks

`python -m benchmarks.report` writes this page from measurements. The speed of a shared machine varies from hour to
hour, so only ratios within one table are meaningful: all rows of a table were measured alternately.
"""


def main() -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="files written by --json of the benchmarks")
    sections = {"peers": format_peers, "speedrun": format_speedrun, "busy": format_busy}
    print(INTRODUCTION)
    results = [json.loads(path.read_text(encoding="utf-8")) for path in parser.parse_args().files]
    print("\n\n".join(sections[result["benchmark"]](result) for result in results))


def format_peers(result: dict[str, Any]) -> str:
    """Return the measurements of `benchmarks.peers` as Markdown."""
    sizes, rows = result["sizes"], {}
    n_tokens = sizes["batch"] * sizes["block_size"]
    for entry in result["results"]:
        runs = entry["runs"]
        seconds = [statistics.median(run["step_seconds"][result["warmup"] :]) for run in runs]
        rows[entry["contender"], entry["setting"]] = {
            "rates": [n_tokens / value for value in seconds],
            "rate": n_tokens / statistics.median(seconds),
            "memory": statistics.median(run["peak_bytes"] for run in runs) / 1e9,
            "cpu": statistics.median(statistics.median(run["step_cpu_seconds"][result["warmup"] :]) for run in runs),
            "start": statistics.median(run["step_seconds"][0] for run in runs) - statistics.median(seconds),
            "parameters": runs[0]["parameters"],
        }
    ours = rows[OURS, DEFAULTS]
    lines = [
        f"## Training, {result['model']}",
        "",
        f"{sizes['n_layer']} layers, {sizes['n_head']} heads, n_embd {sizes['n_embd']}, vocabulary "
        f"{sizes['vocab_size']:,}, {sizes['batch']} sequences of {sizes['block_size']:,} per step in one forward pass, "
        "exact GELU, AdamW, clipping, no dropout, random tokens.",
        "",
        format_machine(result),
        "",
        "| trainer | setting | parameters | tokens/s | range | speed of ours | CPU s/step "
        "| first step | peak memory | memory of ours |",
        "| --- | --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (name, setting), row in rows.items():
        span = f"{min(row['rates']):,.0f} to {max(row['rates']):,.0f}, n={len(row['rates'])}"
        lines.append(
            f"| {name} | {setting} | {row['parameters'] / 1e6:.2f}M | {row['rate']:,.0f} | {span} "
            f"| {ours['rate'] / row['rate']:.2f}x | {row['cpu']:.2f} | {row['start']:+.1f} s | {row['memory']:.2f} GB "
            f"| {ours['memory'] / row['memory']:.2f}x |"
        )
    peers = {key: row for key, row in rows.items() if key[0] != OURS}
    lines += ["", *_format_ratios(result["model"], rows, peers)]
    lines += [f"- Left out: {name}, {reason}." for name, reason in result["left_out"].items()]
    return "\n".join(
        [
            *lines,
            "",
            _format_legend(result),
            "",
            *_format_command(f"benchmarks.peers --model {result['model']}", result),
        ]
    )


def format_speedrun(result: dict[str, Any]) -> str:
    """Return the measurements of `benchmarks.speedrun` as Markdown."""
    lines = [
        "## Speedrun",
        "",
        "Complete processes on one text: `gpt train speedrun-char`, which prepares the text, trains, evaluates and "
        "saves, and the CPU command of nanoGPT's README, for which the text is prepared beforehand.",
        "",
        format_machine(result),
        "",
        "| program | seconds | range | CPU seconds | val/loss | on |",
        "| --- | ---: | --- | ---: | ---: | --- |",
    ]
    middle, cpu = {}, {}
    for name, runs in result["results"].items():
        seconds = [run["seconds"] for run in runs]
        middle[name] = statistics.median(seconds)
        cpu[name] = statistics.median(run["cpu_seconds"] for run in runs)
        span = f"{min(seconds):.1f} to {max(seconds):.1f}, n={len(seconds)}"
        loss = statistics.median(run["val_loss"] for run in runs)
        validation = runs[0]["validation"]
        lines.append(f"| {name} | {middle[name]:.1f} | {span} | {cpu[name]:.1f} | {loss:.3f} | {validation} |")
    (ours, theirs), (our_cpu, their_cpu) = middle.values(), cpu.values()
    verdict = format_verdict(theirs / ours, MIN_SPEEDRUN_RATIO, at_least=True)
    lines += ["", f"- {theirs / ours:.1f}x as fast ({verdict}); by CPU seconds {their_cpu / our_cpu:.1f}x."]
    loads = [run["load_average"] for runs in result["results"].values() for run in runs]
    lines += [f"- Load average before the processes: {min(loads):.1f} to {max(loads):.1f}."]
    return "\n".join([*lines, "", *_format_command("benchmarks.speedrun --text tinyshakespeare.txt", result)])


def _format_ratios(
    model: str, rows: dict[tuple[str, str], dict[str, Any]], peers: dict[tuple[str, str], dict[str, Any]]
) -> Iterable[str]:
    documented = {key: row for key, row in peers.items() if key[1] == FP32}
    for setting, title, group, quantity in (
        (DEFAULTS, FASTEST_DOCUMENTED, documented, "rate"),
        (DEFAULTS, FASTEST, peers, "rate"),
        (DEFAULTS, LEANEST, peers, "memory"),
        (LEAN, LEANEST, peers, "memory"),
    ):
        ours = rows.get((OURS, setting))
        if not group or ours is None:
            continue
        faster = quantity == "rate"
        key = (max if faster else min)(group, key=lambda key: group[key][quantity])
        ratio = ours[quantity] / group[key][quantity]
        limit = REQUIRED.get((model, title))
        verdict = f" ({format_verdict(ratio, limit, at_least=faster)})" if limit else ""
        measure = "as fast" if faster else "the memory"
        also = f"by CPU seconds {group[key]['cpu'] / ours['cpu']:.2f}x"
        if not faster:
            also = f"{ours['rate'] / group[key]['rate']:.2f}x as fast"
        name = "Ours" if setting == DEFAULTS else f"Ours with {setting}"
        yield f"- {name} compared with the {title}, {key[0]} ({key[1]}): {ratio:.2f}x {measure}{verdict}; {also}."


def _format_legend(result: dict[str, Any]) -> str:
    runs = [run for entry in result["results"] for run in entry["runs"]]
    versions = {name: version for run in runs for name, version in run["versions"].items() if name != "torch"}
    loads = [run["load_average"] for run in runs]
    steps = len(runs[0]["step_seconds"])
    named = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    return (
        f"{named + '. ' if named else ''}{runs[0]['threads']} threads per process, {steps} steps, the first "
        f"{result['warmup']} not measured. `first step` is its extra time over a later step, mostly compilation. CPU "
        "seconds cover all threads, including busy waiting. Load average before the processes: "
        f"{statistics.median(loads):.1f} ({min(loads):.1f} to {max(loads):.1f})."
    )


def _format_command(name: str, result: dict[str, Any]) -> list[str]:
    return ["```bash", f"python -m {name} --nanogpt nanoGPT {result['flags']} --json FILE", "```"]


if __name__ == "__main__":
    main()
