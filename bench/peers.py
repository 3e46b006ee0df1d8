#!/usr/bin/env python3
"""Measure SparseServe against other OpenAI-compatible servers, one server alive at a time, in interleaved rounds.

    python bench/peers.py run    --config bench/peers.toml --rows bench/rows.jsonl
    python bench/peers.py report --config bench/peers.toml --rows bench/rows.jsonl --readme bench/README.md

What is measured, the bound and the configuration file are described in bench/README.md. Needs Python 3.11, aiohttp and
tokenizers.

A *round* visits every configured server once; a *visit* starts one server, runs every case on it and stops it. Rows are
appended as they finish. A run that was interrupted is started again with the same command: visits that finished are
skipped; the one that was cut off is measured anew, or its peak memory would miss the cases before the cut.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import struct
import subprocess
import sys
import sysconfig
import time
import tomllib
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30
# A prompt's own first characters are random, so a prefix cache can match a few tokens by accident and no more.
MAX_CACHED_TOKENS = 16


# ---------------------------------------------------------------------------------------------------------------- model


@dataclass(frozen=True)
class Model:
    """What the bound needs to know of a dense decoder, read from config.json and the safetensors headers."""

    layers: int
    q_width: int  # query heads x head_dim
    kv_bytes_per_token: int  # K and V of all layers
    layer_params: int  # parameters of the matrices that every prompt token is multiplied with
    head_params: int  # parameters of the output matrix, needed for one token of a prompt only
    step_weight_bytes: int  # weights that one decode step reads: all but the rows of an untied embedding

    @staticmethod
    def read(directory: Path) -> "Model":
        config = json.loads((directory / "config.json").read_text())
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        kv_heads = config.get("num_key_value_heads") or heads
        tensors = {}
        for file in sorted(directory.glob("*.safetensors")):
            tensors |= safetensors_header(file)
        embedding = next(name for name in tensors if name.endswith("embed_tokens.weight"))
        head = embedding if config.get("tie_word_embeddings") else "lm_head.weight"
        layer_params, step_bytes, kv_item_bytes = 0, 0, 2
        for name, tensor in tensors.items():
            shape, (begin, end) = tensor["shape"], tensor["data_offsets"]
            if name == embedding and head != embedding:
                continue
            step_bytes += end - begin
            if len(shape) == 2 and name != head:
                layer_params += shape[0] * shape[1]
                kv_item_bytes = (end - begin) // (shape[0] * shape[1])
        layers = config["num_hidden_layers"]
        rows, columns = tensors[head]["shape"]
        return Model(
            layers=layers,
            q_width=heads * head_dim,
            kv_bytes_per_token=layers * 2 * kv_heads * head_dim * kv_item_bytes,
            layer_params=layer_params,
            head_params=rows * columns,
            step_weight_bytes=step_bytes,
        )

    def prefill_flops(self, tokens: int) -> int:
        """Matrices for every token, the output matrix for the last one, causal attention over tokens^2 / 2 pairs."""
        attention = 4 * self.q_width * self.layers * tokens * tokens // 2
        return 2 * self.layer_params * tokens + 2 * self.head_params + attention

    def decode_bytes(self, context: float, batch: int = 1) -> float:
        """Bytes that one step must read: the weights once, the KV of every sequence."""
        return self.step_weight_bytes + batch * context * self.kv_bytes_per_token


def safetensors_header(file: Path) -> dict:
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return header


# ---------------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """`requests` prompts of `tokens` tokens sent at the same time."""

    requests: int
    tokens: int

    @staticmethod
    def parse(text: str) -> "Case":
        requests, tokens = text.split("x")
        return Case(int(requests), int(tokens))

    def __str__(self) -> str:
        return f"{self.requests}x{self.tokens}"

    @property
    def prompt_label(self) -> str:
        return f"{self.tokens // 1024}K" if self.tokens % 1024 == 0 else str(self.tokens)


class Prompts:
    """Python source text, cut to an exact number of the model's tokens. The same key gives the same prompt."""

    def __init__(self, model_dir: Path):
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
        self.files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))

    def make(self, tokens: int, key: str) -> str:
        rng = random.Random(key)
        # Random first, so that no two prompts share a prefix and no server's prefix cache has anything to reuse.
        text = f"{rng.getrandbits(128):032x}\n"
        for file in rng.sample(self.files, len(self.files)):
            text += file.read_text(errors="ignore")
            if len(text) < 4 * tokens:
                continue
            offsets = self.tokenizer.encode(text[: 10 * tokens]).offsets
            # Cutting can change how the last word is split, so look for a cut that encodes to the exact count.
            for last in range(tokens - 1, min(tokens + 16, len(offsets))):
                prompt = text[: offsets[last][1]]
                if len(self.tokenizer.encode(prompt).ids) == tokens:
                    return prompt
        raise ValueError(f"found no text of exactly {tokens} tokens for {key}")


# --------------------------------------------------------------------------------------------------------------- client


async def complete(session, url: str, prompt: str, output_tokens: int) -> dict:
    """One streamed completion, times in seconds of one clock. Raises if the server did other work than asked."""
    body = {
        "model": "m",
        "prompt": prompt,
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    sent, first, last, usage = time.perf_counter(), None, None, None
    async with session.post(url, json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"status {response.status}: {(await response.text())[:300]}")
        async for line in response.content:
            if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
                continue
            chunk = json.loads(line[5:])
            usage = chunk.get("usage") or usage
            choices = chunk.get("choices")
            # A closing chunk carries only the reason why it ended; every other one is a token that became visible.
            if choices and (choices[0].get("text") or not choices[0].get("finish_reason")):
                last = time.perf_counter()
                first = first or last
    if first is None or usage is None:
        raise RuntimeError("the stream ended without text or usage")
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    if cached > MAX_CACHED_TOKENS:
        raise RuntimeError(f"{cached} prompt tokens came from a prefix cache")
    if usage["completion_tokens"] != output_tokens:
        raise RuntimeError(f"{usage['completion_tokens']} tokens generated, {output_tokens} asked")
    return {"sent": sent, "first": first, "last": last, "prompt_tokens": usage["prompt_tokens"]}


async def run_case(url: str, case: Case, prompts: list[str], output_tokens: int, timeout_s: float) -> dict:
    import aiohttp

    # A kept-alive connection that one server closes and another keeps would cost them different amounts.
    async with aiohttp.ClientSession(
        headers={"Connection": "close"},
        connector=aiohttp.TCPConnector(force_close=True),
        timeout=aiohttp.ClientTimeout(total=timeout_s),
        read_bufsize=2**20,
    ) as session:
        done = await asyncio.gather(*(complete(session, url, prompt, output_tokens) for prompt in prompts))
    for answer in done:
        if abs(answer["prompt_tokens"] - case.tokens) > case.tokens // 100:
            raise RuntimeError(f"the server counts {answer['prompt_tokens']} prompt tokens, {case.tokens} were sent")
    wall = max(a["last"] for a in done) - min(a["sent"] for a in done)
    ttft = [a["first"] - a["sent"] for a in done]
    tpot = [(a["last"] - a["first"]) / (output_tokens - 1) for a in done]
    return {
        "prompt_tokens": [a["prompt_tokens"] for a in done],
        "ttft_s": [round(t, 4) for t in ttft],
        "tpot_s": [round(t, 5) for t in tpot],
        "prefill_tok_s": round(statistics.mean(a["prompt_tokens"] / t for a, t in zip(done, ttft)), 2),
        "decode_tok_s": round(1 / statistics.mean(tpot), 3),
        "output_tok_s": round(len(done) * output_tokens / wall, 3),
    }


# -------------------------------------------------------------------------------------------------------------- servers


def expand(value: str, places: dict) -> str:
    """`{name}` in a configured string becomes the path or number of that name."""
    return os.path.expanduser(value.format_map(places))


class Server:
    """A server process and its children, in a session of their own, with the CPU affinity of this script."""

    def __init__(self, entry: dict, places: dict, log: Path, start_timeout_s: float):
        self.base = f"http://127.0.0.1:{places['port']}"
        with contextlib.suppress(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", places["port"]), timeout=2).close()
            raise SystemExit(f"port {places['port']} is in use: another server is alive")
        env = os.environ | {name: expand(value, places) for name, value in entry.get("env", {}).items()}
        with log.open("ab") as stream:
            command = [expand(part, places) for part in entry["command"]]
            self.process = subprocess.Popen(command, env=env, stdout=stream, stderr=stream, start_new_session=True)
        try:
            self._wait_ready(entry.get("ready", "/health"), start_timeout_s, log)
        except BaseException:
            self.stop()
            raise

    def _wait_ready(self, path: str, timeout_s: float, log: Path) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"exited with {self.process.returncode} before it was ready, see {log}")
            with contextlib.suppress(OSError), urllib.request.urlopen(self.base + path, timeout=5) as response:
                if response.status == 200:
                    return
            time.sleep(0.2)
        raise RuntimeError(f"not ready after {timeout_s} s, see {log}")

    def processes(self) -> list[Path]:
        """/proc directories of the server and all its descendants: everything in its session."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                if int(stat.read_text().rpartition(")")[2].split()[3]) == self.process.pid:
                    found.append(stat.parent)
        return found

    def memory(self) -> dict:
        """Sums over the processes, GiB: the largest resident size of each so far, and their proportional size now."""
        peak = pss = 0
        for directory in self.processes():
            with contextlib.suppress(OSError):
                peak += proc_kib(directory / "status", "VmHWM:")
                pss += proc_kib(directory / "smaps_rollup", "Pss:")
        return {"peak_rss_gib": round(peak * 1024 / GIB, 3), "pss_gib": round(pss * 1024 / GIB, 3)}

    def stop(self) -> None:
        for sign in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, sign)
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                self.process.poll()
                if not self.processes():
                    return
                time.sleep(0.2)
        raise SystemExit(f"the server with pid {self.process.pid} does not stop")


def proc_kib(file: Path, field: str) -> int:
    return sum(int(line.split()[1]) for line in file.read_text().splitlines() if line.startswith(field))


# ------------------------------------------------------------------------------------------------------------------ run


class Rows:
    """The measured rows, a file of JSON lines that only grows. `rates` opens a visit, `memory` closes it."""

    def __init__(self, path: Path):
        self.path = path
        self.setup = None
        self.visits: dict[tuple[int, str], list[dict]] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                self._take(json.loads(line))

    def _take(self, row: dict) -> None:
        if row["kind"] == "setup":
            self.setup = row
        elif row["kind"] == "rates":  # a visit that starts again replaces what was left of the one before
            self.visits[row["round"], row["server"]] = [row]
        else:
            self.visits[row["round"], row["server"]].append(row)

    def append(self, row: dict) -> None:
        self._take(row)
        with self.path.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    def finished(self, visit: tuple[int, str]) -> bool:
        rows = self.visits.get(visit, [])
        return any(row["kind"] == "memory" for row in rows) and not any("error" in row for row in rows)

    def rounds(self) -> list[int]:
        return sorted({number for number, _ in self.visits})

    def of(self, number: int, server: str, kind: str) -> list[dict]:
        return [row for row in self.visits.get((number, server), []) if row["kind"] == kind and "error" not in row]


def measure_rates(config: dict, places: dict) -> dict:
    """The machine's rates now, nothing else running: the best that any configured calibration reaches."""
    best = {"bf16_gemm_gflops": 0.0, "read_gb_per_s": 0.0}
    for calibration in config["calibration"]:
        command = [expand(part, places) for part in calibration["command"]]
        printed = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        best = {name: max(value, printed[name]) for name, value in best.items()}
    return best


def busy_cores(cores: list[int], seconds: float = 2) -> float:
    """How many of these cores other programs keep busy, as a mean over the next seconds."""

    def ticks() -> tuple[int, int]:
        lines = (line.split() for line in Path("/proc/stat").read_text().splitlines())
        counts = {fields[0]: list(map(int, fields[1:9])) for fields in lines if fields[0].startswith("cpu")}
        mine = [counts[f"cpu{core}"] for core in cores]
        return sum(map(sum, mine)), sum(count[3] + count[4] for count in mine)  # idle, waiting for a disk

    before = ticks()
    time.sleep(seconds)
    total, idle = (after - earlier for after, earlier in zip(ticks(), before))
    return round(len(cores) * (1 - idle / total), 2)


def wait_until_quiet(args: argparse.Namespace) -> float:
    """Waits while other programs run on the measured cores, but not for ever. Returns the busy cores that are left."""
    deadline = time.monotonic() + args.quiet_wait
    while (busy := busy_cores(args.cores)) > args.max_busy and time.monotonic() < deadline:
        print(f"{busy} cores are busy with other programs, waiting", file=sys.stderr)
        time.sleep(5)
    return busy


def visit(rows: Rows, number: int, entry: dict, config: dict, places: dict, args: argparse.Namespace) -> None:
    key = {"round": number, "server": entry["name"]}
    busy = wait_until_quiet(args)
    rows.append(key | {"kind": "rates", "time": int(time.time()), "busy_cores": busy} | measure_rates(config, places))
    prompts = Prompts(Path(places["model"]))
    log = args.rows.with_suffix("").with_name(f"{args.rows.stem}.{entry['name']}.log")
    started = time.monotonic()
    try:
        server = Server(entry, places, log, args.start_timeout)
    except RuntimeError as error:
        rows.append(key | {"kind": "start", "error": str(error)})
        return
    start_s = round(time.monotonic() - started, 1)
    url = server.base + "/v1/completions"
    try:
        warm = args.cases[0]
        warm_prompt = prompts.make(warm.tokens, f"{args.seed}/{number}/warm-up")
        asyncio.run(run_case(url, Case(1, warm.tokens), [warm_prompt], 8, args.timeout))
        for case in args.cases:
            for repeat in range(args.repeats if case.tokens * case.requests <= args.repeat_below else 1):
                name = f"{args.seed}/{number}/{case}/{repeat}"  # same for every server of the round
                texts = [prompts.make(case.tokens, f"{name}/{i}") for i in range(case.requests)]
                row = key | {"kind": "case", "case": str(case), "repeat": repeat}
                try:
                    row |= asyncio.run(run_case(url, case, texts, args.output_tokens, args.timeout))
                except Exception as error:  # whatever went wrong belongs to this server's row, the others go on
                    row["error"] = repr(error)[:400]
                rows.append(row)
        rows.append(key | {"kind": "memory", "start_s": start_s} | server.memory())
    except Exception as error:
        rows.append(key | {"kind": "start", "error": f"warm-up: {error!r}"[:400]})
    finally:
        server.stop()


def run(args: argparse.Namespace) -> None:
    config, places = load_config(args)
    # Children inherit the affinity, as under `taskset`; the client shares the cores, as a client on one machine would.
    os.sched_setaffinity(0, args.cores)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the living server is stopped on the way out
    rows = Rows(args.rows)
    setup = {
        "kind": "setup",
        "model": Path(places["model"]).name,
        "threads": args.threads,
        "output_tokens": args.output_tokens,
        "cases": [str(case) for case in args.cases],
        "repeats": args.repeats,
        "seed": args.seed,
        "cpu": cpu_name(),
        "servers": [[server["name"], server.get("version", "")] for server in config["server"]],
    }
    if rows.setup is None:
        rows.append(setup)
    elif rows.setup != setup:
        raise SystemExit(f"{args.rows} was measured with another setup; name a new file\n{rows.setup}\n{setup}")
    servers = config["server"]
    for number in range(1, args.rounds + 1):
        turn = (number - 1) % len(servers)
        for entry in servers[turn:] + servers[:turn]:
            if not rows.finished((number, entry["name"])):
                visit(rows, number, entry, config, places, args)
    print(report_text(rows, Model.read(Path(places["model"])), args))


# --------------------------------------------------------------------------------------------------------------- report


@dataclass(frozen=True)
class Rates:
    """What the machine reached in one round."""

    gemm_flops: float  # bf16, per second
    read_bytes: float  # per second


@dataclass(frozen=True)
class Metric:
    """One line of the table."""

    label: str
    value: Callable[[Rows, int, str], float | None]  # of one server in one round
    bound: Callable[[Rates], float] | None  # of any server in a round with these rates
    digits: int
    lower_is_better: bool = False


def case_value(case: Case, field: str) -> Callable[[Rows, int, str], float | None]:
    def value(rows: Rows, number: int, server: str) -> float | None:
        found = [row[field] for row in rows.of(number, server, "case") if row["case"] == str(case)]
        return statistics.median(found) if found else None

    return value


def peak_memory(rows: Rows, number: int, server: str) -> float | None:
    found = rows.of(number, server, "memory")
    return found[-1]["peak_rss_gib"] if found else None


def prefill_bound(model: Model, tokens: int) -> Callable[[Rates], float]:
    return lambda rates: tokens * rates.gemm_flops / model.prefill_flops(tokens)


def decode_bound(model: Model, context: float) -> Callable[[Rates], float]:
    return lambda rates: rates.read_bytes / model.decode_bytes(context)


def output_bound(model: Model, case: Case, context: float, output_tokens: int) -> Callable[[Rates], float]:
    def bound(rates: Rates) -> float:
        prefill_s = case.requests * model.prefill_flops(case.tokens) / rates.gemm_flops
        decode_s = (output_tokens - 1) * model.decode_bytes(context, case.requests) / rates.read_bytes
        return case.requests * output_tokens / (prefill_s + decode_s)

    return bound


def metrics(cases: list[Case], model: Model, output_tokens: int) -> list[Metric]:
    found = []
    for case in cases:
        context = case.tokens + output_tokens / 2  # in the middle of the answer
        prompt = f"{case.prompt_label} prompt"
        if case.requests == 1:
            bound = prefill_bound(model, case.tokens)
            found.append(Metric(f"prefill, {prompt}, tok/s", case_value(case, "prefill_tok_s"), bound, 0))
            bound = decode_bound(model, context)
            found.append(Metric(f"decode after {prompt}, tok/s", case_value(case, "decode_tok_s"), bound, 1))
        else:
            bound = output_bound(model, case, context, output_tokens)
            label = f"{case.requests} at once, {prompt}s, output tok/s"
            found.append(Metric(label, case_value(case, "output_tok_s"), bound, 1))
    found.append(Metric("peak memory, GiB", peak_memory, None, 2, lower_is_better=True))
    return found


def spread(values: list, digits: int) -> str:
    """Median and, in brackets, smallest and largest over the rounds."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    middle = f"{statistics.median(known):.{digits}f}"
    return middle if len(known) == 1 else f"{middle} ({min(known):.{digits}f}-{max(known):.{digits}f})"


def ratios(numerators: list, denominators: list) -> list:
    """Round by round, so that what disturbed one round disturbs both sides."""
    return [a / b for a, b in zip(numerators, denominators) if a is not None and b is not None]


def report_text(rows: Rows, model: Model, args: argparse.Namespace) -> str:
    servers = [name for name, _ in rows.setup["servers"]]
    ours, peers = servers[0], servers[1:]
    rounds = rows.rounds()
    if not rounds:
        return "nothing measured yet"
    visits = [[row for server in servers for row in rows.of(number, server, "rates")] for number in rounds]
    # The best rate of a round bounds every server of that round, also one that was visited in a slow minute.
    gemm = [max(row["bf16_gemm_gflops"] for row in found) for found in visits]
    read = [max(row["read_gb_per_s"] for row in found) for found in visits]
    rates = [Rates(g * 1e9, r * 1e9) for g, r in zip(gemm, read)]
    columns = ["", "bound", *servers, f"{ours} / bound", *(f"{ours} / {peer}" for peer in peers)]
    if len(peers) > 1:
        columns.append(f"{ours} / better peer")
    table = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for metric in metrics([Case.parse(text) for text in rows.setup["cases"]], model, rows.setup["output_tokens"]):
        values = {server: [metric.value(rows, number, server) for number in rounds] for server in servers}
        bounds = [metric.bound(reached) if metric.bound else None for reached in rates]
        pick = min if metric.lower_is_better else max
        # In a round where one peer failed, no other one is called the better.
        best = [None if None in turn else pick(turn) for turn in zip(*(values[peer] for peer in peers))]
        cells = [metric.label, spread(bounds, metric.digits)]
        cells += [spread(values[server], metric.digits) for server in servers]
        cells += [spread(ratios(values[ours], other), 2) for other in (bounds, *(values[peer] for peer in peers))]
        if len(peers) > 1:
            cells.append(spread(ratios(values[ours], best), 2))
        table.append("| " + " | ".join(cells) + " |")
    versions = ", ".join(f"{name} {version}".strip() for name, version in rows.setup["servers"])
    busy = [row["busy_cores"] for found in visits for row in found]
    notes = [
        f"{rows.setup['cpu']}, {rows.setup['threads']} threads; {rows.setup['model']}; {versions}.",
        f"Rounds: {len(rounds)}; median (smallest-largest) over them, ratios paired by round.",
        f"Machine, best of each round: bf16 GEMM {spread(gemm, 0)} GFLOP/s, reading {spread(read, 1)} GB/s;",
        f"other programs kept {min(busy):.1f}-{max(busy):.1f} of the cores busy before the visits.",
    ]
    return "\n".join([" ".join(notes), "", *table, ""])


def report(args: argparse.Namespace) -> None:
    _, places = load_config(args)
    rows = Rows(args.rows)
    if rows.setup is None:
        raise SystemExit(f"{args.rows} holds no rows")
    text = report_text(rows, Model.read(Path(places["model"])), args)
    print(text)
    if args.readme:
        begin, end = "<!-- results -->\n", "<!-- end of results -->"
        page = args.readme.read_text()
        if begin not in page or end not in page:
            raise SystemExit(f"{args.readme} lacks the marks {begin.strip()} and {end}")
        args.readme.write_text(page[: page.index(begin) + len(begin)] + "\n" + text + "\n" + page[page.index(end) :])


# ----------------------------------------------------------------------------------------------------------------- main


def load_config(args: argparse.Namespace) -> tuple[dict, dict]:
    config = tomllib.loads(args.config.read_text())
    places = dict(config["paths"])
    for name, value in places.items():  # a path may be built from those above it
        places[name] = expand(value, places)
    cores = ",".join(str(core) for core in args.cores)
    return config, places | {"port": args.port, "threads": args.threads, "cores": cores}


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown CPU"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("--config", type=Path, default=Path("bench/peers.toml"))
    parser.add_argument("--rows", type=Path, default=Path("bench/rows.jsonl"), help="measured rows, appended")
    parser.add_argument("--readme", type=Path, help="report: write the table between the marks of this page")
    parser.add_argument("--threads", type=int, default=4, help="threads of every server, on as many cores")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", default="1x1024,1x8192,4x1024", help="REQUESTSxPROMPT_TOKENS, with commas")
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3, help="of a case in one visit; its value is their median")
    parser.add_argument("--repeat-below", type=int, default=4096, help="cases of more prompt tokens run once a visit")
    parser.add_argument("--max-busy", type=float, default=0.3, help="cores that others may use before a visit")
    parser.add_argument("--quiet-wait", type=float, default=300, help="seconds to wait for that")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--port", type=int, default=18080)
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one case")
    parser.add_argument("--start-timeout", type=float, default=600, help="seconds for a server to become ready")
    args = parser.parse_args()
    args.cases = [Case.parse(text) for text in args.cases.split(",")]
    args.cores = sorted(os.sched_getaffinity(0))[: args.threads]
    if len(args.cores) < args.threads:
        parser.error(f"{args.threads} threads need as many cores, {len(args.cores)} may be used")
    {"run": run, "report": report}[args.command](args)


if __name__ == "__main__":
    main()
