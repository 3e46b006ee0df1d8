"""Trains the gate of the policy `seerattention` for the demo model: docs/policies/seerattention.md says what a gate is.

The gate learns from the model's own attention (SeerAttention-R, Gao et al. 2025): for a query, the target of a partition is the
largest weight that dense attention gives to one of its tokens, over the query heads of the group, and targets are normalised over the
candidates: the partitions before that of the query. The loss is their KL divergence from the gate's softmax over the candidates,
weighted by how much attention the candidates get at all: where nearly all of it stays in the query's own partition, which is
always attended, there is nothing to learn. The model itself does not change.

Texts are those on which the demo model was trained (demo-model/training/common.py), facts among filler, with questions and answers
after them; queries are the tokens of questions and answers. Texts held out for the recall have another seed.

    python bench/train_gate.py --out demo-model/gate.safetensors
    python bench/train_gate.py --check demo-model/gate.safetensors

The second tells how much of dense attention a gate finds, and how many partitions pass a threshold.

Needs torch, transformers, tokenizers, safetensors and numpy; no GPU. The result depends on the seed and, in its last digits, on
the machine.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "demo-model/training"))
from common import BOS, NAMES, Gen, load_tok  # noqa: E402


def rotate(x, angles):
    """RoPE of the last dimension, pairs (c, c + half): `angles` [.., half]."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def text(gen, tokens, questions):
    """A text of about `tokens` tokens with questions and answers after it -> ids, [(position, weight)] of the queries."""
    t, mode = gen.t, gen.rng.choice(["easy", "hard", "many", "hop"])
    facts_wanted = min(100, tokens // 24) if mode == "many" else 24
    distractors, hops = 0.0 if mode == "easy" else 0.15, questions if mode == "hop" else 0
    sentences, _, facts, _, links = gen.context(tokens, facts_wanted, 1, distractors, hops)
    ids = [BOS] + [int(x) for s in sentences for x in s] + [t["\n"]]
    asked = []
    if mode == "hop":
        asked = [(gen.hop_question(x, facts[f][1]), [gen.name[facts[f][0]]] + gen.answer(facts[f][2])) for x, f, _ in links]
    else:
        chosen = gen.rng.permutation(len(facts))[:questions]
        asked = [(gen.question(*facts[i][:2]), gen.answer(facts[i][2])) for i in chosen]
    known = {fact[0] for fact in facts}
    missing = [i for i in range(len(NAMES)) if i not in known][: questions // 8]
    asked += [(gen.question(i, facts[0][1]), [t[" unknown"], t["."], 2]) for i in missing]
    queries = []
    for i in gen.rng.permutation(len(asked)):
        question, answer = asked[i]
        queries += [(len(ids) + j, 0.2) for j in range(len(question) - 1)]
        ids += [int(x) for x in question]
        queries += [(len(ids) - 1 + j, 1.0) for j in range(len(answer))]
        ids += [int(x) for x in answer] + [t["\n"]]
    return ids, queries


class Taps:
    """The model's q and k before RoPE, of all layers."""

    def __init__(self, folder):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
        c = self.model.config
        self.layers, self.q_heads, self.kv_heads = c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads
        self.head_dim = c.head_dim
        self.inv_freq = self.model.model.rotary_emb.inv_freq.float()
        self.seen = {}
        for number, layer in enumerate(self.model.model.layers):
            for name in ["q_proj", "k_proj"]:
                hook = lambda _, __, out, key=(number, name): self.seen.__setitem__(key, out[0])
                getattr(layer.self_attn, name).register_forward_hook(hook)

    @torch.no_grad()
    def sample(self, ids, queries, length):
        """What the gate sees and should say -> x [l, h, partitions, 3 d], u [l, h, queries, group d], positions, weights,
        targets and masses [l, h, queries, partitions] (largest weight and sum of weights over the tokens)."""
        self.model(input_ids=torch.tensor([ids]), logits_to_keep=1)
        d, group = self.head_dim, self.q_heads // self.kv_heads
        whole = len(ids) // length
        at = torch.tensor([p for p, _ in queries])
        angles = torch.arange(len(ids)).float()[:, None] * self.inv_freq
        past = torch.arange(len(ids))[None] <= at[:, None]
        x, u, best, mass = [], [], [], []
        for layer in range(self.layers):
            q = self.seen[layer, "q_proj"].view(len(ids), self.q_heads, d)[at].transpose(0, 1)
            k = self.seen[layer, "k_proj"].view(len(ids), self.kv_heads, d).transpose(0, 1)
            pages = k[:, : whole * length].reshape(self.kv_heads, whole, length, d)
            x.append(torch.cat([pages.amax(2), pages.amin(2), pages.mean(2)], dim=-1))
            u.append(q.reshape(self.kv_heads, group, len(at), d).transpose(1, 2).reshape(self.kv_heads, len(at), group * d))
            logits = rotate(q, angles[at]) @ rotate(k, angles).repeat_interleave(group, 0).transpose(1, 2) / d**0.5
            weights = logits.masked_fill(~past, -torch.inf).softmax(-1)[..., : whole * length]
            weights = weights.reshape(self.kv_heads, group, len(at), whole, length)
            best.append(weights.amax(-1).amax(1))
            mass.append(weights.sum(-1).mean(1))
        weight = torch.tensor([w for _, w in queries])
        return [torch.stack(v) for v in (x, u)] + [at, weight] + [torch.stack(v) for v in (best, mass)]


class Gate(torch.nn.Module):
    """Begins as the dot product of the mean query with the mean key, plus noise."""

    def __init__(self, taps, dim, length):
        super().__init__()
        d, group = taps.head_dim, taps.q_heads // taps.kv_heads
        assert d % dim == 0 and dim % 2 == 0, "gate_dim divides head_dim and is even"
        self.length, self.dim, self.inv_freq = length, dim, taps.inv_freq[:: d // dim]
        pick = torch.zeros(dim, d)
        kept = torch.cat([torch.arange(0, d // 2, d // dim), d // 2 + torch.arange(0, d // 2, d // dim)])
        pick[torch.arange(dim), kept] = 1.0
        noise = lambda *shape: 0.02 * torch.randn(taps.layers, taps.kv_heads, dim, *shape)
        self.k = torch.nn.Parameter(noise(3 * d) + torch.cat([0.1 * pick, 0.1 * pick, pick], dim=-1))
        self.q = torch.nn.Parameter(noise(group * d) + torch.cat([pick / group] * group, dim=-1))

    def forward(self, x, u, at):
        starts = torch.arange(x.shape[2]).float() * self.length
        k = rotate(x @ self.k.transpose(-1, -2), starts[:, None] * self.inv_freq)
        q = rotate(u @ self.q.transpose(-1, -2), at.float()[:, None] * self.inv_freq)
        return q @ k.transpose(-1, -2) / self.dim**0.5


def candidates(at, partitions, length):
    return torch.arange(partitions)[None] < (at // length)[:, None]


def loss_of(gate, sample):
    x, u, at, weight, best, _ = sample
    allowed = candidates(at, x.shape[2], gate.length)
    best = best * allowed
    total = best.sum(-1, keepdim=True)
    target = best / total.clamp_min(1e-9)
    said = gate(x, u, at).masked_fill(~allowed, -1e9).log_softmax(-1)
    kl = (target * (target.clamp_min(1e-9).log() - said)).sum(-1)
    weight = weight * (4 * total[..., 0]).clamp(max=1.0)
    return (kl * weight).sum() / weight.sum()


@torch.no_grad()
def recall(scores_of, samples, length, counts):
    """Of the attention that candidates get from answering tokens, the share that the best `counts` of them hold."""
    got, all_ = np.zeros(len(counts)), 0.0
    for sample in samples:
        x, u, at, weight, _, mass = sample
        allowed = candidates(at, x.shape[2], length)
        scores = scores_of(sample).masked_fill(~allowed, -torch.inf)
        answering = (weight == 1.0).float()
        mass = mass * allowed * answering[:, None]
        order = scores.argsort(dim=-1, descending=True)
        cumulative = mass.gather(-1, order).cumsum(-1)
        all_ += float(mass.sum())
        got += [float(cumulative[..., min(c, x.shape[2]) - 1].sum()) for c in counts]
    return got / all_


@torch.no_grad()
def passing(gate, samples, least):
    """Mean number of candidates with a probability of at least `least`, over layers, KV heads and answering tokens."""
    counts = []
    for x, u, at, weight, _, _ in samples:
        allowed = candidates(at, x.shape[2], gate.length)
        said = gate(x, u, at).masked_fill(~allowed, -torch.inf).softmax(-1)
        counts.append((said >= least).sum(-1)[..., weight == 1.0].float().flatten())
    return float(torch.cat(counts).mean())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(ROOT / "demo-model"))
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", help="file to write")
    where.add_argument("--check", help="file to read instead of training")
    parser.add_argument("--partition", type=int, default=32)
    parser.add_argument("--gate-dim", type=int, default=64)
    parser.add_argument("--texts", type=int, default=480)
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16", help="of the file")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(a.seed)
    start = time.time()
    taps = Taps(a.model)
    tokenizer = load_tok(f"{a.model}/tokenizer.json")

    def samples(count, seed, lengths):
        gen = Gen(tokenizer, seed)
        for i in range(count):
            tokens = lengths[i % len(lengths)] - int(gen.rng.integers(0, 256))
            yield taps.sample(*text(gen, tokens, 24), a.partition)

    train = [] if a.check else list(samples(a.texts, a.seed, [1024, 2048, 2048, 4096]))
    held_out = list(samples(6, a.seed + 1000, [8192]))
    queries = sum(len(s[2]) for s in train or held_out)
    print(f"{len(train or held_out)} texts, {queries} queries, {time.time() - start:.0f} s", flush=True)
    tensors = load_file(a.check) if a.check else {}
    gate = Gate(taps, tensors["layers.0.k_gate"].shape[1] if a.check else a.gate_dim, a.partition)
    counts = [2, 4, 8, 16, 32]

    def mean_key(sample):
        x, u, at = sample[:3]
        d = taps.head_dim
        angles = torch.arange(x.shape[2]).float()[:, None] * a.partition * taps.inv_freq
        mean = rotate(x[..., 2 * d :], angles)
        q = rotate(u.reshape(*u.shape[:3], -1, d).mean(3), at.float()[:, None] * taps.inv_freq)
        return q @ mean.transpose(-1, -2)

    def report(what, scores_of):
        shares = recall(scores_of, held_out, a.partition, counts)
        print(what + "  " + "  ".join(f"{c}: {s:.4f}" for c, s in zip(counts, shares)), flush=True)

    report("oracle   ", lambda s: s[5].float())
    report("mean key ", mean_key)
    learned = lambda s: gate(*s[:3])
    report("untrained", learned)
    if a.check:
        for name, weights in [("k_gate", gate.k), ("q_gate", gate.q)]:
            weights.data = torch.stack([tensors[f"layers.{layer}.{name}"].float() for layer in range(taps.layers)])
        report("gate     ", learned)
        for least in [0.001, 0.003, 0.01, 0.03]:
            print(f"threshold {least}: {passing(gate, held_out, least):.1f} partitions on average")
        return
    optimiser = torch.optim.Adam(gate.parameters(), lr=3e-3)
    steps = a.epochs * len(train)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda i: min(1, (i + 1) / 100) * (0.5 + 0.5 * np.cos(np.pi * i / steps)))
    order = np.random.default_rng(a.seed)
    for epoch in range(a.epochs):
        losses = []
        for i in order.permutation(len(train)):
            loss = loss_of(gate, train[i])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1} loss {np.mean(losses):.4f} {time.time() - start:.0f} s", flush=True)
        if epoch % 4 == 3:
            report("gate     ", learned)
    with torch.no_grad():
        for layer in range(taps.layers):
            for name, weights in [("k_gate", gate.k), ("q_gate", gate.q)]:
                tensors[f"layers.{layer}.{name}"] = weights[layer].to(getattr(torch, a.dtype)).contiguous()
                weights[layer] = tensors[f"layers.{layer}.{name}"].float()
    report("as stored", learned)
    save_file(tensors, a.out, metadata={"partition": str(a.partition), "seed": str(a.seed)})


if __name__ == "__main__":
    main()
