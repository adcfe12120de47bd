"""veritune and its peers on the same rows, one after the other on one device: a table, JSON and a plot.

    python benchmarks/side_by_side.py ROWS.npz --model DIR --groups bf16 nf4 --out DIR [--timeout 120]

ROWS comes from workload.py, DIR from `peers.py make`; for the groups `small` and `losses`, real weights: a folder of
SmolLM2-135M or Qwen2.5-Coder-0.5B and rows of its tokenizer. Every engine runs in its own process; one that fails or
takes too long is a line that says so. What has a result in OUT is not run again, so groups can be run in several calls
(`--only` picks engines). Ratios are of prompt tokens a second, every row counted in full, to the fastest peer of the
group. `losses` prints each engine's losses over the same steps from the same adapter.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
OURS = ["train_speed.py", "{rows}"]
TRL = ["peers.py", "trl", "{rows}", "{model}", "--by-length"]
UNSLOTH = ["peers.py", "unsloth", "{rows}", "{model}", "--by-length"]
SCORE = ["score_speed.py"]


def peers(bits: int, *more: str, batches: tuple[int, ...]) -> list[list[str]]:
    """TRL and Unsloth with each number of rows at once."""
    how = ["--bits", str(bits), "--steps", "9", *more]
    return [[*engine, *how, "--batch", str(batch)] for batch in batches for engine in (TRL, UNSLOTH)]


TIMED = [*OURS, "--steps", "2"]
FROM_ONE = ["{rows}", "--model", "{model}", "--adapter", "{model}/adapter", "--losses", "{log}.json"]
PEER_FROM_ONE = ["{rows}", "{model}", "--adapter", "{model}/adapter", "--losses", "{log}.json", "--steps", "21"]
GROUPS: dict[str, list[list[str]]] = {
    "bf16": [
        TIMED,
        [*TIMED, "--base", "fp8"],
        [*TIMED, "--together", "1"],
        [*TIMED, "--together", "4"],
        *peers(16, batches=(32, 64)),  # not all fit 80 GB
        *peers(16, "--recompute", batches=(64, 32)),
        *peers(16, batches=(8,)),
    ],
    "nf4": [
        [*TIMED, "--base", "nf4", "--unpacked"],
        [*TIMED, "--base", "nf4"],
        *peers(4, batches=(32, 64)),
        *peers(4, "--recompute", batches=(64, 32)),
    ],
    "nf4-40": [
        [*TIMED, "--base", "nf4", "--cap", "40"],
        *peers(4, "--cap", "40", batches=(16,)),
        *peers(4, "--recompute", "--cap", "40", batches=(64, 32)),
    ],
    "nf4-15": [
        [*TIMED, "--base", "nf4", "--cap", "15"],
        *peers(4, "--recompute", "--cap", "15", batches=(8, 16)),
    ],
    "small": [
        [*OURS, "--model", "{model}", "--examples", "64", "--steps", "8", "--graphs"],
        *[[*TRL, "--batch", str(batch), "--steps", "18"] for batch in (32, 16, 64)],
        *[[*UNSLOTH, "--batch", str(batch), "--steps", "18"] for batch in (32, 64)],
    ],
    "losses": [
        ["train_speed.py", *FROM_ONE, "--examples", "16", "--steps", "6"],
        ["train_speed.py", *FROM_ONE, "--examples", "16", "--steps", "6", "--graphs"],
        ["train_speed.py", *FROM_ONE, "--examples", "16", "--steps", "6", "--base", "fp8"],
        ["peers.py", "trl", *PEER_FROM_ONE, "--batch", "16"],
        ["peers.py", "unsloth", *PEER_FROM_ONE, "--batch", "16"],
    ],
    "score": [
        [*SCORE, "veritune", "{rows}"],
        [*SCORE, "vllm", "{rows}", "--model", "{model}"],
        [*SCORE, "transformers", "{rows}", "--model", "{model}"],
    ],
    "score-fp8": [
        [*SCORE, "veritune", "{rows}", "--base", "fp8"],
        [*SCORE, "vllm", "{rows}", "--model", "{model}", "--base", "fp8"],
    ],
}


def run(command: list[str], o: argparse.Namespace, group: str, number: int) -> dict:
    """One engine's result, or why there is none."""
    log = o.out / f"{group}-{number}.log"
    filled = [part.format(rows=o.rows, model=o.model, log=log.with_suffix("")) for part in command]
    if found := result_of(log):
        return found
    env = dict(os.environ)
    if "vllm" not in filled:  # it manages memory itself
        env.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    elif o.vllm_path:
        env["PYTHONPATH"] = f"{o.vllm_path}:{HERE}"
    script, failed = [sys.executable, str(HERE / filled[0]), *filled[1:]], None
    with log.open("w") as out:
        engine = subprocess.Popen(script, stdout=out, stderr=out, env=env, start_new_session=True)
        try:
            if engine.wait(o.timeout):
                tail = log.read_text(errors="replace").strip().splitlines()[-1:]
                failed = f"exit {engine.returncode}: {' '.join(tail)[:200]}"
        except subprocess.TimeoutExpired:
            failed = f"not done after {o.timeout} s"
        finally:  # with what it has started, which would keep the GPU's memory from the next
            with contextlib.suppress(ProcessLookupError):
                os.killpg(engine.pid, signal.SIGKILL)
    if failed:
        return {"engine": " ".join(filled), "failed": failed}
    return result_of(log) or {"engine": " ".join(filled), "failed": "no result"}


def result_of(log: Path) -> dict | None:
    """What an engine's log has to say; the losses of its steps too where it wrote them."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    found = [json.loads(line.removeprefix("RESULT ")) for line in lines if line.startswith("RESULT ")]
    if found and log.with_suffix(".json").exists():
        found[-1]["losses"] = json.loads(log.with_suffix(".json").read_text())
    return found[-1] if found else None


def table(group: str, results: list[dict]) -> str:
    """Markdown, with each engine's ratio to the fastest peer."""
    worked = [r for r in results if "failed" not in r]
    theirs = [r["prompt tokens/s"] for r in worked if not r["engine"].startswith("veritune")]
    columns = ("engine", "batch", "examples/s", "prompt tokens/s", "to the best peer", "peak GiB", "ready s")
    lines = [f"\n{group}\n", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for r in worked:
        ratio = f"{r['prompt tokens/s'] / max(theirs):.2f}" if theirs else ""
        together = f", {r['together']} a question" if "together" in r else ""
        cells = (f"{r['engine']}{together}", r.get("batch", ""), r["examples/s"], f"{r['prompt tokens/s']:,}", ratio)
        lines.append(f"| {' | '.join(map(str, (*cells, r.get('peak GiB') or '', r.get('ready s', ''))))} |")
    for r in worked:
        if "losses" in r:
            lines.append(f"\nlosses of {r['engine']}: {' '.join(f'{x:.3f}' for x in r['losses'])}")
    lines += [f"\nfailed: {r['engine']}: {r['failed']}" for r in results if "failed" in r]
    return "\n".join(lines)


def plot(groups: dict[str, list[dict]], file: Path) -> None:
    """Bars of prompt tokens a second, a panel a group; nothing without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed")
        return

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(len(groups), 1, figsize=(8, 2.2 * len(groups) + 0.5), squeeze=False)
    for panel, (group, results) in zip(panels[:, 0], groups.items(), strict=True):
        worked = sorted((r for r in results if "failed" not in r), key=lambda r: r["prompt tokens/s"])
        names = [f"{r['engine']} {r.get('batch', r.get('together', ''))}" for r in worked]
        ours = [r["engine"].startswith("veritune") for r in worked]
        speeds = [r["prompt tokens/s"] for r in worked]
        panel.barh(names, speeds, color=["tab:blue" if own else "tab:gray" for own in ours])
        panel.set_title(group)
        panel.set_xlabel("prompt tokens/s")
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--timeout", type=int, default=300, help="seconds an engine may take")
    parser.add_argument("--only", default="", help="commands with this word in them")
    parser.add_argument("--vllm-path", help="the folder vLLM is installed in, if it is one of its own")
    o = parser.parse_args()
    o.out.mkdir(parents=True, exist_ok=True)
    groups: dict[str, list[dict]] = {}
    for group in o.groups:
        groups[group] = []
        for number, command in enumerate(GROUPS[group]):
            if o.only in " ".join(command):
                groups[group].append(run(command, o, group, number))
                print(json.dumps(groups[group][-1]), flush=True)
    (o.out / "side_by_side.json").write_text(json.dumps(groups, indent=1))
    for group, results in groups.items():
        print(table(group, results), flush=True)
    plot(groups, o.out / "side_by_side.png")


if __name__ == "__main__":
    main()
