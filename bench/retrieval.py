#!/usr/bin/env python3
"""Accuracy of sparse policies on needle questions: runs `sparseserve eval retrieval`, tells and draws what it wrote.

    python bench/retrieval.py run target/release/sparseserve budgets.json --contexts 25
    python bench/retrieval.py run target/release/sparseserve lengths.json --contexts 10 \\
        --lengths 1024,2048,4096,8192,16384,32768 --budgets 512,12.5%
    python bench/retrieval.py table budgets.json
    python bench/retrieval.py plot docs/img --budgets budgets.json --lengths lengths.json
    python bench/retrieval.py run target/release/sparseserve tiers.json --contexts 25 --hbm 10% --compare dense,quest
    python bench/retrieval.py compare --subset budgets.json tiers.json

`run` hands flags that it does not know to `eval retrieval`. `compare` fails unless both files say the same to the last digit;
they hold no times. With `--subset` the second may lack cells of the first.

Drawing needs matplotlib, the rest nothing but Python.

"Pooled" is over the tasks whose answer lies in the text. `unknown`, which a policy passes by finding nothing, is told apart.
"""

import argparse
import json
import os
import subprocess
import sys

POLICIES = (
    "dense,streaming,random,quest,arkvale:partition=16:sinks=16:window=16,shadowkv,shadowkv:partition=4,seerattention,retroinfer"
)
POOLED = ["easy", "hard", "many", "hop"]
# Of these the depth is that of all that an answer needs.
ONE_FACT = ["easy", "hard", "many"]
STYLES = {
    "streaming": ("#888888", "x"),
    "random": ("#bbbbbb", "+"),
    "quest": ("#1f77b4", "o"),
    "arkvale": ("#d62728", "s"),
    "shadowkv": ("#2ca02c", "^"),
    "seerattention": ("#9467bd", "D"),
    "retroinfer": ("#ff7f0e", "v"),
}
DEPTHS = 5


def key(cell):
    return cell["task"], cell["length"], cell["policy"], cell["budget"]


def read(paths):
    """The cells of all files; one that is in several counts once."""
    cells = {}
    for path in paths:
        with open(path) as file:
            report = json.load(file)
        for cell in report["cells"]:
            if cells.setdefault(key(cell), cell) != cell:
                sys.exit(f"{path} says otherwise than a file before it: {key(cell)}")
    return list(cells.values())


def unique(values):
    return list(dict.fromkeys(values))


def pool(cells, tasks=POOLED, **wanted):
    """Asked and correct, by depth too, and attended tokens at most, of the cells that agree with what is wanted. Dense
    attention has no budget and agrees with any."""
    found = [
        cell
        for cell in cells
        if cell["task"] in tasks
        and all(cell[key] == value or key == "budget" and cell[key] is None for key, value in wanted.items())
    ]
    asked, correct = sum(cell["asked"] for cell in found), sum(cell["correct"] for cell in found)
    depths = [[sum(cell["by_depth"][fifth][i] for cell in found) for i in range(2)] for fifth in range(DEPTHS)]
    attended = max((cell["attended_tokens_per_step"] for cell in found), default=0)
    return {"asked": asked, "correct": correct, "depths": depths, "attended": attended}


def share(pooled):
    return pooled["correct"] / pooled["asked"]


def in_order(budgets):
    """Tokens first, by size, then shares."""
    return sorted(unique(b for b in budgets if b), key=lambda b: (b.endswith("%"), float(b.rstrip("%"))))


def is_raised(budget, length, pooled):
    """A share is one of the prompt, which has no more tokens than the length says."""
    tokens = length * float(budget[:-1]) / 100 if budget.endswith("%") else int(budget)
    return pooled["attended"] > tokens


def label(policy):
    name, *options = policy.split(":")
    return ", ".join([name] + [option.replace("=", " ") for option in options])


def code(policy):
    return " ".join(f"`{part}`" for part in policy.split(":"))


def run(args):
    command = [args.sparseserve, "eval", "retrieval", "--compare", args.compare, "--seed", str(args.seed)]
    command += ["--contexts", str(args.contexts), "--questions", str(args.questions)]
    command += [*args.flags, "--json", args.json]
    print(" ".join(command), file=sys.stderr)
    # Its own table is one per task and length; ours are pooled.
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    args.files, args.tasks = [args.json], False
    table(args)


def table(args):
    cells = read(args.files)
    budgets, lengths = in_order(c["budget"] for c in cells), sorted(unique(c["length"] for c in cells))
    policies = unique(cell["policy"] for cell in sorted(cells, key=lambda c: c["length"]))
    tasks = [task for task in POOLED + ["unknown"] if any(cell["task"] == task for cell in cells)]
    groups = [([t for t in tasks if t in POOLED], "pooled")] + ([([t], t) for t in tasks] if args.tasks else [])

    def rows(title, wanted, columns, group):
        asked = pool(cells, group, policy=policies[0], **wanted, **columns[0][1])["asked"]
        print(f"\n{title}, {asked} questions per cell\n")
        print(f"| policy |{''.join(f' {head} |' for head, _ in columns)}\n|---|{'---|' * len(columns)}")
        for policy in policies:
            line = f"| {code(policy)} |"
            for _, more in columns:
                found = pool(cells, group, policy=policy, **wanted, **more)
                raised = found["asked"] and is_raised({**wanted, **more}["budget"], more["length"], found)
                line += f" {share(found):.4f}{' *' if raised else ''} |" if found["asked"] else " |"
            print(line)

    if len(lengths) == 1:
        for group, name in groups:
            columns = [(b, {"budget": b, "length": lengths[0]}) for b in budgets]
            rows(f"{name}, {lengths[0]} tokens", {}, columns, group)
        needs(cells, policies, [budget for budget in budgets if not budget.endswith("%")])
    else:
        for budget in budgets:
            for group, name in groups:
                columns = [(n, {"length": n}) for n in lengths]
                rows(f"{name}, budget {budget}", {"budget": budget}, columns, group)


def needs(cells, policies, budgets):
    """The smallest budget that keeps a policy within a point of dense, pooled, and in every task."""
    if not any(cell["policy"] == "dense" for cell in cells):
        return
    tasks = unique(cell["task"] for cell in cells)

    def least(policy, groups):
        def is_near(budget):
            return all(
                share(pool(cells, group, policy=policy, budget=budget))
                >= share(pool(cells, group, policy="dense")) - 0.01
                for group in groups
            )

        near = [is_near(budget) for budget in budgets]
        # From there on, not there alone.
        while near and not all(near):
            near = near[1:]
        return budgets[len(budgets) - len(near)] if near else "none"

    print("\nSmallest budget from which on a policy is within one point of dense\n")
    print("| policy | pooled | in every task |\n|---|---|---|")
    for policy in policies:
        if policy != "dense":
            print(f"| {code(policy)} | {least(policy, [POOLED])} | {least(policy, [[task] for task in tasks])} |")


def plot(args):
    import matplotlib

    matplotlib.use("svg")
    # The same bytes for the same input.
    matplotlib.rcParams.update({"svg.hashsalt": "sparseserve", "svg.fonttype": "none", "font.size": 10})
    import matplotlib.pyplot as plt

    def save(figure, name):
        path = os.path.join(args.out, f"{name}.svg")
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
        print(path)

    if args.budgets:
        cells = read(args.budgets)
        budgets = [b for b in in_order(c["budget"] for c in cells) if not b.endswith("%")]
        policies = args.policies.split(",")
        lengths = unique(cell["length"] for cell in cells)
        if len(lengths) != 1:
            sys.exit("--budgets: files of one length only")
        figure, axes = plt.subplots(figsize=(6.4, 5))
        asked = pool(cells, policy=policies[0], budget=budgets[0])["asked"]
        axes.set_title("Right answers by budget", loc="left", fontsize=11, pad=22)
        axes.text(
            0,
            1.03,
            f"built-in model, {lengths[0]} tokens, {asked} questions per point; hollow: the policy raised the budget",
            transform=axes.transAxes,
            fontsize=8,
            color="#555555",
        )
        dense = share(pool(cells, policy="dense"))
        axes.axhline(dense, color="#222222", linestyle="--", linewidth=1, label="dense")
        seen = set()
        for policy in (p for p in policies if p != "dense"):
            name = policy.split(":")[0]
            color, marker = STYLES[name]
            line = ":" if name in seen else "-"
            seen.add(name)
            found = [pool(cells, policy=policy, budget=budget) for budget in budgets]
            xs, ys = [int(budget) for budget in budgets], [share(one) for one in found]
            axes.plot(xs, ys, line, color=color, linewidth=1.4, marker=marker, markersize=5, label=label(policy))
            raised = [i for i, budget in enumerate(budgets) if is_raised(budget, lengths[0], found[i])]
            if marker not in "x+":
                axes.plot(
                    [xs[i] for i in raised],
                    [ys[i] for i in raised],
                    linestyle="none",
                    marker=marker,
                    markersize=5,
                    markerfacecolor="white",
                    markeredgecolor=color,
                    zorder=3,
                )
        axes.set_xscale("log", base=2)
        axes.set_xticks([int(b) for b in budgets], [f"{b}\n{int(b) / lengths[0]:.1%}" for b in budgets])
        axes.set(xlabel="budget: tokens attended, and share of the context", ylabel="right answers", ylim=(-0.02, 1.04))
        axes.grid(alpha=0.3, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.45, -0.2), ncol=3)
        figure.tight_layout()
        save(figure, "retrieval-budget")

    if args.lengths:
        cells = read(args.lengths)
        lengths = sorted(unique(cell["length"] for cell in cells))
        shown = ["dense", args.best, "streaming"]
        figure, all_axes = plt.subplots(1, len(shown), figsize=(9.6, 3.4), sharey=True, layout="constrained")
        fewest = None
        for axes, policy in zip(all_axes, shown):
            grid = []
            for fifth in range(DEPTHS):
                row = []
                for length in lengths:
                    asked, correct = pool(cells, ONE_FACT, policy=policy, budget=args.budget, length=length)["depths"][fifth]
                    fewest = asked if fewest is None else min(fewest, asked)
                    row.append(correct / asked)
                grid.append(row)
            # Rectangles, not a picture in the picture.
            mesh = axes.pcolormesh(grid, cmap="viridis", vmin=0, vmax=1, edgecolors="white", linewidth=1)
            for y, row in enumerate(grid):
                for x, value in enumerate(row):
                    # Never 1.00 where a question went wrong.
                    text = f"{min(value, 0.99) if value < 1 else 1:.2f}"
                    color = "#222222" if value > 0.5 else "white"
                    axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=8, color=color)
            name, _, options = label(policy).partition(", ")
            name += "" if name == "dense" else f", budget {args.budget}"
            axes.set_title(f"{name}\n{options}" if options else name, fontsize=9)
            axes.set_xticks([i + 0.5 for i in range(len(lengths))], [f"{n // 1024}K" for n in lengths])
            axes.set_xlabel("tokens of text")
        step = 100 // DEPTHS
        all_axes[0].set_yticks([i + 0.5 for i in range(DEPTHS)], [f"{i * step}-{(i + 1) * step} %" for i in range(DEPTHS)])
        all_axes[0].set_ylabel("depth of the fact")
        all_axes[0].invert_yaxis()
        figure.colorbar(mesh, ax=all_axes, shrink=0.9, pad=0.01, label="right answers")
        print(f"questions per cell: {fewest} at least")
        save(figure, "retrieval-depth")


def compare(args):
    sides = []
    for path in (args.first, args.second):
        with open(path) as file:
            report = json.load(file)
        sides.append((report, {key(cell): cell for cell in report["cells"]}))
    (first, left), (second, right) = sides
    differences = [
        f"{name}: {first.get(name)!r} and {second.get(name)!r}"
        for name in sorted((first.keys() | second.keys()) - {"cells"})
        if first.get(name) != second.get(name)
    ]
    keys = [at for at in unique([*left, *right]) if not (args.subset and at not in right)]
    for at in keys:
        if at not in left or at not in right:
            differences.append(f"{at}: only in {args.first if at in left else args.second}")
        elif left[at] != right[at]:
            for field in sorted(left[at].keys() | right[at].keys()):
                values = left[at].get(field), right[at].get(field)
                if values[0] != values[1]:
                    differences.append(f"{at} {field}: {values[0]!r} and {values[1]!r}")
    answers = sum(right[at]["asked"] for at in keys if at in right)
    print("\n".join(differences) if differences else f"the same: {len(keys)} cells, {answers} answers")
    sys.exit(1 if differences or not keys else 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("run", help="run `eval retrieval`; flags that are not listed here are handed to it")
    command.add_argument("sparseserve")
    command.add_argument("json", metavar="FILE.json")
    command.add_argument("--compare", default=POLICIES, help=f"policies [default: {POLICIES}]")
    command.add_argument("--contexts", type=int, default=13, help="texts per task and length [default: 13]")
    command.add_argument("--questions", type=int, default=10, help="per text [default: 10]")
    command.add_argument("--seed", type=int, default=1)
    command.set_defaults(run=run)
    command = commands.add_parser("table", help="write tables of files with the same length or the same budgets")
    command.add_argument("files", nargs="+", metavar="FILE.json")
    command.add_argument("--tasks", action="store_true", help="tables of each task too")
    command.set_defaults(run=table)
    command = commands.add_parser("plot", help="draw retrieval-budget.svg and retrieval-depth.svg")
    command.add_argument("out", help="folder for the pictures")
    command.add_argument("--budgets", nargs="+", metavar="FILE.json", help="of one length, for accuracy over budget")
    command.add_argument("--lengths", nargs="+", metavar="FILE.json", help="of many lengths, for accuracy by depth")
    command.add_argument("--policies", default=POLICIES, help="lines over budget")
    best = POLICIES.split(",")[4]
    command.add_argument("--best", default=best, help=f"drawn by depth, beside dense and streaming [default: {best}]")
    command.add_argument("--budget", default="512", help="of the picture by depth [default: 512]")
    command.set_defaults(run=plot)
    command = commands.add_parser("compare", help="fail unless two files say the same")
    command.add_argument("first", metavar="A.json")
    command.add_argument("second", metavar="B.json")
    command.add_argument("--subset", action="store_true", help="B may lack cells of A")
    command.set_defaults(run=compare)
    args, args.flags = parser.parse_known_args()
    if args.flags and args.run is not run:
        parser.error(f"unknown: {' '.join(args.flags)}")
    args.run(args)


if __name__ == "__main__":
    main()
