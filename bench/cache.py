#!/usr/bin/env python3
"""Caches of pages under recorded selections: records a trace, and draws what `sparseserve bench cache` makes of it.

    python bench/cache.py record target/release/sparseserve demo.trace --policy arkvale --budget 256
    sparseserve bench cache demo.trace --json demo.json
    python bench/cache.py plot docs/img demo=demo.json replay=replay.json

`record` serves the built-in model and asks it questions about one long text of seeded sentences, all at once; every answer
goes on for a fixed number of tokens. `plot` writes cache-hits-NAME.svg for each NAME=FILE, and working-set.svg for all of
them. Recording needs nothing but Python, drawing needs matplotlib.
"""

import argparse
import json
import random
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

NAMES = ["Barin", "Domo", "Fela", "Gunni", "Kadus", "Lokal", "Misto", "Nebra", "Parin", "Rumo", "Sila", "Tovek"]
NOUNS = ["river", "garden", "sailor", "bridge", "farmer", "lamp", "horse", "baker", "clock", "boat", "tower", "door"]
ADJECTIVES = ["quiet", "old", "green", "small", "heavy", "bright", "cold", "tall", "narrow", "warm"]
VERBS = ["watched", "crossed", "found", "painted", "carried", "opened"]

STYLES = {
    "belady": ("Belady (offline optimum)", "#222222", "--", "none"),
    "exact-lru": ("exact LRU per request and layer", "#1f77b4", "-", "s"),
    "bucketed-lru": ("64 buckets, per request and layer", "#d62728", "-", "o"),
    "global-lru": ("one LRU for all", "#2ca02c", "-", "^"),
    "mandatory-only": ("last step only", "#888888", ":", "none"),
}


def text(sentences, seed):
    """Sentences of which one in ten states the key of somebody."""
    draw = random.Random(seed)
    def noun():
        return f"{draw.choice(ADJECTIVES)} {draw.choice(NOUNS)}"
    lines = [f"The {noun()} {draw.choice(VERBS)} the {noun()}." for _ in range(sentences)]
    for i, name in enumerate(NAMES):
        place = (2 * i + 1) * sentences // (2 * len(NAMES))
        lines[place] = f"The key of {name} is {draw.randrange(100000, 1000000)}."
    return " ".join(lines)


def ask(address, prompt, tokens, answers, place):
    body = {"model": "demo", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        answers[place] = json.load(response)


def wait_until_ready(address):
    for _ in range(600):
        try:
            with urllib.request.urlopen(f"{address}/ready"):
                return
        except urllib.error.HTTPError:
            time.sleep(0.1)
    sys.exit("the server does not get ready")


def record(args):
    command = [args.sparseserve, "serve", "--port", "0", "--policy", args.policy, "--budget", args.budget]
    command += ["--record-selection", args.trace]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        address = None
        for line in server.stderr:
            found = re.search(r"listening on (http://\S+)", line)
            if found:
                address = found.group(1)
                break
        if address is None:
            sys.exit("the server did not start")
        # Nobody else reads its log.
        threading.Thread(target=server.stderr.read, daemon=True).start()
        wait_until_ready(address)
        long_text = text(args.sentences, args.seed)
        prompts = [f"{long_text}\nWhat is the key of {name}?" for name in NAMES[: args.questions]]
        answers = [None] * len(prompts)
        # The first brings the text into the prefix cache.
        ask(address, prompts[0], 1, answers, 0)
        threads = [
            threading.Thread(target=ask, args=(address, prompt, args.tokens, answers, place))
            for place, prompt in enumerate(prompts)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for name, answer in zip(NAMES, answers):
            usage = answer["usage"]
            start = answer["choices"][0]["text"][:12]
            print(f"{name}: {usage['prompt_tokens']} prompt tokens, {usage['completion_tokens']} more: {start!r}")
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


def plot(args):
    import matplotlib

    matplotlib.use("svg")
    # The same bytes for the same input.
    matplotlib.rcParams.update({"svg.hashsalt": "sparseserve", "svg.fonttype": "none", "font.size": 10})
    import matplotlib.pyplot as plt

    def frame(title, subtitle, x, y):
        figure, axes = plt.subplots(figsize=(6.4, 4.2))
        axes.set_title(title, loc="left", fontsize=11, pad=22)
        axes.text(0, 1.03, subtitle, transform=axes.transAxes, fontsize=8, color="#555555")
        axes.set(xlabel=x, ylabel=y)
        axes.grid(alpha=0.3, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        return figure, axes

    def save(figure, name):
        figure.tight_layout()
        path = f"{args.out}/{name}.svg"
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
        print(path)

    studies = []
    for given in args.study:
        name, _, path = given.partition("=")
        with open(path) as file:
            studies.append((name, json.load(file)))

    def selected(study):
        least, most = study["budget"]
        return f"{study['note']}, budget {least}" + (f"-{most}" if most > least else "")

    def described(study):
        contexts = "{}-{}".format(*study["context"])
        return (
            f"{selected(study)}; requests: {study['requests']}, contexts {contexts}, {study['layers']} layers,"
            f" {study['kv_heads']} KV heads"
        )

    for name, study in studies:
        title = f"Pages found resident, trace \"{name}\""
        x = "buffering frames per mandatory frame"
        figure, axes = frame(title, described(study), x, "hit rate")
        lowest = 1.0
        for rule, (label, color, line, marker) in STYLES.items():
            rates = study["hit_rate"][rule]
            lowest = min(lowest, *rates)
            axes.plot(study["ratios"], rates, line, color=color, marker=marker, markersize=4, linewidth=1.4, label=label)
        axes.set_ylim(max(0, lowest - 0.03), 1.0)
        axes.legend(frameon=False, fontsize=8, loc="center right")
        save(figure, f"cache-hits-{name}")

    figure, axes = frame(
        "Pages of a step that the steps before it selected",
        "; ".join(f"trace \"{name}\": {selected(study)}" for name, study in studies),
        "steps looked back",
        "share of the step's pages",
    )
    lowest = 1.0
    for (name, study), marker in zip(studies, "os^vDx"):
        lowest = min(lowest, *study["overlap"])
        axes.plot(study["windows"], study["overlap"], marker=marker, markersize=4, linewidth=1.4, label=name)
    axes.axvline(12, color="#888888", linestyle=":", linewidth=1)
    axes.text(12.1, max(0, lowest - 0.02), "SparseServe: 12", fontsize=8, color="#555555")
    axes.set_ylim(max(0, lowest - 0.03), 1.0)
    axes.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 0.08))
    save(figure, "working-set")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("record", help="serve the built-in model, ask it, and record what it selects")
    command.add_argument("sparseserve")
    command.add_argument("trace")
    command.add_argument("--policy", default="arkvale")
    command.add_argument("--budget", default="256")
    command.add_argument("--sentences", type=int, default=600)
    command.add_argument("--questions", type=int, default=8, help=f"at most {len(NAMES)}")
    command.add_argument("--tokens", type=int, default=128, help="of each answer")
    command.add_argument("--seed", type=int, default=1)
    command.set_defaults(run=record)
    command = commands.add_parser("plot", help="draw results of `sparseserve bench cache --json`")
    command.add_argument("out", help="folder for the pictures")
    command.add_argument("study", nargs="+", metavar="NAME=FILE.json")
    command.set_defaults(run=plot)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
