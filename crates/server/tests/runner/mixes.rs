//! Models, policies, options, budgets, mixes of rows and sizes of HBM by lot: sequences come, share a prefix, are parked and
//! preempted, and go on, each with the bits that it has alone.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use safetensors::Dtype;
use safetensors::tensor::TensorView;

use super::*;

/// Runs of the test, times [`ops::conformance::seed_factor`]. Together they try all of [`SPECS`].
const RUNS: u64 = 6;

/// Policies with options, in an order that puts different ones side by side.
const SPECS: [&str; 24] = [
    "quest",
    "arkvale:partition=16:sinks=16:window=16",
    "shadowkv:outliers=3:local=16:generated=8",
    "retroinfer:span=64:window=1",
    "seerattention:threshold=0.02",
    "dense",
    "random:partition=4:window=8",
    "quest:digest=fp8",
    "streaming",
    "retroinfer:span=128:window=1:partition=8:estimate=0%",
    "arkvale:digest=fp8:scope=layer:sinks=0:window=16",
    "quest:last=compete:group=max",
    "replay:overlap=0.5:window=8:partition=8",
    "shadowkv:outliers=0:local=8:generated=0:partition=16",
    "seerattention:partition=16:sinks=16",
    "arkvale:window=0:dense-layers=1",
    "quest:partition=32:scope=layer:group=query-mean",
    "streaming:sinks=0",
    "retroinfer:span=64:window=1:partition=16:sinks=0",
    "shadowkv:outliers=40:local=1:generated=64:partition=4",
    "random:partition=32:seed=9:window=0",
    "arkvale:partition=64:sinks=1:window=1",
    "quest:digest=fp8:partition=8:dense-layers=1",
    "seerattention",
];

const FOLDERS: [&str; 5] = [
    "demo-model",
    "xtask/golden/models/llama-rope-dynamic",
    "xtask/golden/models/mistral-window",
    "xtask/golden/models/qwen2-bias",
    "xtask/golden/models/qwen3-window",
];

/// Writes a model with random weights to `folder`.
fn write_model(folder: &Path, random: &mut Random) {
    let (kv_heads, group) = (1 + random.below(3), 1 + random.below(3));
    let (head_dim, layers) = ([32, 48, 64][random.below(3)], 2 + random.below(2));
    let (hidden, intermediate, vocab) = (48 + 16 * random.below(3), 64, 96 + random.below(40));
    let architecture = random.below(3);
    let (qwen2, qwen3) = (1, 2);
    let name = ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"][architecture];
    let theta = [1e4, 1e6][random.below(2)];
    let config = serde_json::json!({
        "architectures": [name], "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": kv_heads * group, "num_key_value_heads": kv_heads, "head_dim": head_dim,
        "vocab_size": vocab, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "tie_word_embeddings": architecture == qwen2, "attention_bias": false, "use_sliding_window": false,
        "rope_theta": theta, "bos_token_id": 1, "eos_token_id": 2,
    });
    std::fs::write(folder.join("config.json"), config.to_string()).expect("a file");
    let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    let mut add = |name: String, shape: &[usize]| {
        // Norms are about 1; the rest keeps activations so, with scores that differ enough to select by.
        let (mean, spread) = match shape {
            [_] if name.ends_with("bias") => (0.0, 0.2),
            [_] => (1.0, 0.1),
            shape => (0.0, 1.5 / (shape[1] as f32).sqrt()),
        };
        let count = shape.iter().product::<usize>();
        let bytes = (0..count).flat_map(|_| (mean + spread * random.normal()).to_le_bytes()).collect();
        tensors.push((name, shape.to_vec(), bytes));
    };
    let (q, kv) = (kv_heads * group * head_dim, kv_heads * head_dim);
    add("model.embed_tokens.weight".into(), &[vocab, hidden]);
    add("model.norm.weight".into(), &[hidden]);
    if architecture != qwen2 {
        add("lm_head.weight".into(), &[vocab, hidden]);
    }
    for layer in 0..layers {
        let mut part = |part: &str, shape: &[usize]| add(format!("model.layers.{layer}.{part}"), shape);
        part("input_layernorm.weight", &[hidden]);
        part("post_attention_layernorm.weight", &[hidden]);
        for (name, rows) in [("q", q), ("k", kv), ("v", kv)] {
            part(&format!("self_attn.{name}_proj.weight"), &[rows, hidden]);
            if architecture == qwen2 {
                part(&format!("self_attn.{name}_proj.bias"), &[rows]);
            }
        }
        part("self_attn.o_proj.weight", &[hidden, q]);
        if architecture == qwen3 {
            part("self_attn.q_norm.weight", &[head_dim]);
            part("self_attn.k_norm.weight", &[head_dim]);
        }
        part("mlp.gate_proj.weight", &[intermediate, hidden]);
        part("mlp.up_proj.weight", &[intermediate, hidden]);
        part("mlp.down_proj.weight", &[hidden, intermediate]);
    }
    let views = tensors.iter().map(|(name, shape, bytes)| {
        (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes).expect("a tensor"))
    });
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).expect("a file");
}

/// What happens between and in steps.
#[derive(Clone, Debug)]
enum Event {
    /// A step with so many rows of each sequence.
    Run([usize; SEQUENCES]),
    /// The sequence leaves its seat, keeps its blocks, and goes on in the free seat.
    Park(usize),
    /// The sequence loses all but what it shares, and begins anew.
    Preempt(usize),
    /// The last sequence begins with so many tokens of the first.
    Share(usize),
}

/// A run by lot.
#[derive(Clone, Debug)]
struct Mix {
    folder: PathBuf,
    dtype: DType,
    policies: Vec<String>,
    budgets: [u32; SEQUENCES],
    prompts: [usize; SEQUENCES],
    events: Vec<Event>,
    /// Blocks whose digests a step needs at most.
    places: usize,
}

impl Mix {
    fn new(seed: u64, folder: PathBuf, shared_together: usize, policies: Vec<String>) -> Self {
        let mut random = Random::keyed(seed, 1);
        let dtype = ops::conformance::DTYPES[random.below(3)];
        let budgets = [(); SEQUENCES].map(|()| [0, 16, 48, 100, 160, CONTEXT as u32][random.below(6)]);
        let prompts = [(); SEQUENCES].map(|()| 130 + random.below(120));
        let (first, last) = (0, SEQUENCES - 1);
        // Dynamic NTK rotates the keys of each prompt in its own way.
        let may_share = !folder.ends_with("llama-rope-dynamic");
        let shared = prompts[first].min(prompts[last] - 1) / shared_together * shared_together;
        let (mut done, mut start) = ([0; SEQUENCES], [0; SEQUENCES]);
        let (mut events, mut places) = (Vec::new(), 1);
        while events.len() < 34 {
            let some = random.below(SEQUENCES);
            if may_share && shared > 0 && done[last] == 0 && done[first] >= shared {
                events.push(Event::Share(shared));
                (start[first], start[last], done[last]) = (shared, shared, shared);
            }
            match random.below(12) {
                0 if done[some] > start[some] => events.push(Event::Park(some)),
                1 if done[some] > start[some] && random.below(3) == 0 => {
                    events.push(Event::Preempt(some));
                    done[some] = start[some];
                }
                _ => {}
            }
            let left_out = random.below(SEQUENCES);
            let rows: [usize; SEQUENCES] = std::array::from_fn(|i| {
                let left = prompts[i].saturating_sub(done[i]);
                // The last one waits for what it may share.
                let waits = i == last && may_share && shared > 0 && done[last] == 0;
                match random.below(6) {
                    _ if i == left_out || waits || done[i] > CONTEXT - 100 => 0,
                    0 => 0,
                    1 if left == 0 => 3,
                    1 => 1,
                    _ if left == 0 => 1,
                    _ => (20 + random.below(60)).min(left),
                }
            });
            if rows.iter().all(|&n| n == 0) {
                continue;
            }
            (0..SEQUENCES).for_each(|i| done[i] += rows[i]);
            let needed = (0..SEQUENCES).filter(|&i| rows[i] > 0).map(|i| done[i].div_ceil(PAGE_TOKENS));
            places = places.max(needed.sum());
            events.push(Event::Run(rows));
        }
        Mix { folder, dtype, policies, budgets, prompts, events, places }
    }

    fn load(&self, threads: usize, hbm: Option<Hbm>) -> Device {
        load_with(self.folder.clone(), self.dtype, threads, &self.policies, hbm)
    }

    fn fed(&self, place: usize, vocab: usize) -> Fed {
        let (budget, prompt) = (Some(self.budgets[place]), self.prompts[place]);
        let mut fed = Fed { prompt, ..Fed::new(place, budget, CONTEXT, vocab) };
        // The first and the last begin alike.
        if place + 1 == SEQUENCES {
            let first = Fed::new(0, None, CONTEXT, vocab).tokens;
            let alike = self.prompts[0].min(prompt - 1);
            fed.tokens[..alike].copy_from_slice(&first[..alike]);
        }
        fed
    }

    /// What each sequence showed, by the tokens that it then had.
    fn run(&self, device: &mut Device, what: &str) -> BTreeMap<(usize, usize), Seen> {
        let mut all: Vec<Fed> = (0..SEQUENCES).map(|i| self.fed(i, device.vocab)).collect();
        let (mut start, mut free) = ([0; SEQUENCES], SeatIndex(SEQUENCES as u32));
        let mut seen = BTreeMap::new();
        let mut step = Step::default();
        for event in &self.events {
            match *event {
                Event::Park(i) => {
                    device.runner.park(all[i].seat, &all[i].blocks);
                    device.runner.release(all[i].seat);
                    device.runner.release(free);
                    std::mem::swap(&mut all[i].seat, &mut free);
                }
                Event::Preempt(i) => {
                    device.runner.release(all[i].seat);
                    all[i].done = start[i];
                }
                Event::Share(tokens) => {
                    let last = SEQUENCES - 1;
                    let mut patience = 60_000;
                    while device.runner.saved_tokens(all[0].seat) < tokens {
                        std::thread::sleep(Duration::from_millis(1));
                        patience -= 1;
                        assert!(patience > 0, "{what}: {tokens} tokens are not saved after a minute");
                    }
                    let shared: Vec<BlockIndex> = all[0].blocks[..tokens / PAGE_TOKENS].to_vec();
                    all[last].blocks[..shared.len()].copy_from_slice(&shared);
                    device.runner.release(all[last].seat);
                    (all[last].done, start[0], start[last]) = (tokens, tokens, tokens);
                }
                Event::Run(rows) => {
                    let now = |(i, fed)| (rows[i] > 0).then_some((fed, rows[i]));
                    let (mut fed, counts): (Vec<&mut Fed>, Vec<usize>) =
                        all.iter_mut().enumerate().filter_map(now).unzip();
                    step.run(device, &mut fed, &counts);
                    for fed in fed {
                        let new = fed.seen.pop().expect("a sample");
                        let before = seen.insert((fed.place, fed.done), new.clone());
                        let same = before.is_none_or(|before| before == new);
                        assert!(same, "{what}: sequence {} again at {}", fed.place, fed.done);
                    }
                }
            }
        }
        seen
    }

    /// The same of each sequence alone, computed from its first token on.
    fn alone(
        &self,
        device: &mut Device,
        of: &BTreeMap<(usize, usize), Seen>,
    ) -> BTreeMap<(usize, usize), Seen> {
        let mut seen = BTreeMap::new();
        let mut step = Step::default();
        for place in 0..SEQUENCES {
            let mut fed = self.fed(place, device.vocab);
            for &(_, end) in of.keys().filter(|(of, _)| *of == place) {
                // In pieces that end elsewhere, too.
                while fed.done < end {
                    let count = (end - fed.done).min(70);
                    step.run(device, &mut [&mut fed], &[count]);
                }
                seen.insert((place, end), fed.seen.pop().expect("a sample"));
            }
        }
        seen
    }
}

#[test]
fn whatever_is_mixed_each_sequence_has_the_bits_that_it_has_alone() {
    // What happened, so that a test of nothing shows.
    let (mut loads, mut streamed, mut hits, mut covered) = (0, 0, 0, 0);
    let (mut parks, mut preemptions, mut shares) = (0, 0, 0);
    for seed in 0..RUNS * ops::conformance::seed_factor() {
        let mut random = Random::keyed(seed, 0);
        let written = tempfile::tempdir().expect("a folder");
        let folder = match random.below(2) {
            0 => {
                write_model(written.path(), &mut random);
                written.path().to_owned()
            }
            _ => {
                let folder = FOLDERS[random.below(FOLDERS.len())];
                PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..").join(folder)
            }
        };
        let spec = |i: usize| SPECS[(seed as usize * SEQUENCES + i) % SPECS.len()].to_owned();
        let policies: Vec<String> = (0..SEQUENCES).map(spec).collect();
        let shared_together = Served::variants(&policies).expect("policies").0.shared_together(PAGE_TOKENS);
        let mix = Mix::new(seed, folder, shared_together, policies);
        eprintln!("mix of seed {seed}: {mix:?}");
        let what = format!("seed {seed}");
        let unified = mix.run(&mut mix.load(2, None), &what);
        let alone = mix.alone(&mut mix.load(1, None), &unified);
        for (at, seen) in &unified {
            assert_eq!(&alone[at], seen, "{what}: sequence and tokens {at:?}, alone and in the mix");
        }
        // A budget that holds the context is dense, for every policy.
        let full = Mix { budgets: [CONTEXT as u32; SEQUENCES], ..mix.clone() };
        let dense = Mix { policies: vec!["dense".to_owned(); SEQUENCES], ..mix.clone() };
        let full = full.run(&mut full.load(2, None), &what);
        assert!(full == dense.run(&mut dense.load(2, None), &what), "{what}: budgets that hold the context");
        covered += unified.values().filter(|seen| seen.3.is_some()).count();
        for more in [0, 1 << (13 + random.below(8)), 1 << 30] {
            let rule = EvictionRule::ALL[random.below(EvictionRule::ALL.len())];
            let hbm = Hbm { more, rule, places: mix.places };
            assert!(mix.places < SEQUENCES * CONTEXT.div_ceil(PAGE_TOKENS), "{what}: places for all");
            let mut device = mix.load(3, Some(hbm));
            let what = format!("{what} {hbm:?}");
            let tiered = mix.run(&mut device, &what);
            for (at, seen) in &unified {
                assert_eq!(&tiered[at], seen, "{what}: sequence and tokens {at:?}, with and without tiers");
            }
            let pages = device.runner.tier_state().expect("tiers").pages;
            streamed += pages.streamed;
            hits += pages.hits;
            loads += device.runner.digest_state().loaded_bytes;
        }
        parks += mix.events.iter().filter(|e| matches!(e, Event::Park(_))).count();
        preemptions += mix.events.iter().filter(|e| matches!(e, Event::Preempt(_))).count();
        shares += mix.events.iter().filter(|e| matches!(e, Event::Share(_))).count();
    }
    assert!(loads > 0 && streamed > 0 && hits > 0 && covered > 0, "{loads} {streamed} {hits} {covered}");
    assert!(parks > 0 && preemptions > 0 && shares > 0, "{parks} {preemptions} {shares}");
}
