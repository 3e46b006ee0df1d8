//! Prompts that go layer by layer: the same bits as in chunks, whatever the tiles, the pieces and the tiers, and nothing is fetched
//! where HBM holds a layer.

use ops::{Segment, Step as Work};

use super::*;

/// Tokens of an answer that are run after the prompt.
const ANSWER: usize = 12;

/// What a prompt has left, cut into pieces by lot, several of them a step. Each is one layer or several, and tokens of these.
fn pieces(
    random: &mut Random,
    layers: usize,
    tokens: usize,
) -> Vec<Vec<(std::ops::Range<usize>, std::ops::Range<usize>)>> {
    let (mut steps, mut layer, mut at) = (vec![Vec::new()], 0, 0);
    while layer < layers {
        if at == 0 && random.below(3) == 0 {
            let end = layer + 1 + random.below(layers - layer);
            steps.last_mut().unwrap().push((layer..end, 0..tokens));
            layer = end;
        } else {
            let end = (at + 1 + random.below(tokens)).min(tokens);
            steps.last_mut().unwrap().push((layer..layer + 1, at..end));
            (layer, at) = if end == tokens { (layer + 1, 0) } else { (layer, end) };
        }
        if random.below(2) == 0 {
            steps.push(Vec::new());
        }
    }
    steps
}

/// Runs what is left of the prompt of `fed` layer by layer, and a token of `beside` in each step; returns how often the steps allocated.
fn run_by_layer(
    device: &mut Device,
    random: &mut Random,
    fed: &mut Fed,
    beside: &mut Fed,
    extents: u32,
) -> u64 {
    let (start, end) = (fed.done, fed.prompt);
    let attention = match (fed.budget, device.method_of[fed.place]) {
        (Some(budget), Some(method)) => Attention::Sparse { method, budget },
        _ => Attention::Dense,
    };
    if start == 0 {
        device.runner.release(fed.seat);
    }
    let tables = [beside.blocks.as_slice(), &fed.blocks].concat();
    let of_fed = beside.blocks.len() as u32..tables.len() as u32;
    let params = SamplingParams { temperature: 1.0, seed: 3, ..Default::default() };
    let sample = |row: usize, position: usize| SampleRow {
        row,
        params: &params,
        prompt: &[],
        generated: &[],
        banned: &[],
        position: position as u64,
        top_logprobs: Some(TOP),
        forced: None,
    };
    let (mut out, mut allocations) = (SampleOutput::default(), 0);
    out.sampled.reserve(2);
    out.top.reserve(2 * TOP as usize);
    for pieces in pieces(random, device.layers, end - start) {
        let segment = |(layers, tokens): (std::ops::Range<usize>, std::ops::Range<usize>)| Segment {
            sequence: SequenceRows {
                rows: 0..tokens.len() as u32,
                first_position: (start + tokens.start) as u32,
                prompt_len: end as u32,
                blocks: of_fed.clone(),
                attention,
                seat: fed.seat,
                quota: device.quota,
            },
            layers: layers.start as u32..layers.end as u32,
            ends: start + tokens.end == end,
            start: start as u32,
            tokens: tokens.start as u32..tokens.end as u32,
            hidden: 5,
            extents,
        };
        let segments: Vec<Segment> = pieces.into_iter().map(segment).collect();
        let position = beside.done;
        let rows = [SequenceRows {
            rows: 0..1,
            first_position: position as u32,
            prompt_len: beside.prompt as u32,
            blocks: 0..beside.blocks.len() as u32,
            attention: Attention::Dense,
            seat: beside.seat,
            quota: device.quota,
        }];
        let batch = Batch {
            tokens: &beside.tokens[position..position + 1],
            positions: &[position as u32],
            sequences: &rows,
            block_tables: &tables,
            methods: &device.methods,
        };
        let step = Work { batch, segments: &segments, prompt_tokens: &fed.tokens[start..end], resting: &[] };
        let mut samples = vec![sample(0, position + 1)];
        if step.completed(device.layers).next().is_some() {
            samples.push(sample(1, end));
        }
        let mut inspections = Inspections::default();
        let info = allocation_counter::measure(|| {
            device.runner.run(&step, &samples, &mut inspections, &mut out);
        });
        allocations += info.count_total;
        beside.done += 1;
        for (fed, sampled) in [&mut *beside, &mut *fed].into_iter().zip(&out.sampled) {
            let top = &out.top[sampled.top.start as usize..sampled.top.end as usize];
            let bits = top.iter().map(|&(token, logprob)| (token, logprob.to_bits())).collect();
            fed.seen.push((sampled.token, sampled.logprob.to_bits(), bits, None));
        }
    }
    fed.done = end;
    allocations
}

/// The place that is run beside, and those whose prompts go layer by layer.
fn fed(device: &Device, place: usize, budget: Option<u32>) -> Fed {
    Fed::new(place, budget, CONTEXT, device.vocab)
}

#[test]
fn layer_by_layer_gives_the_same_bits() {
    for (folder, dtype) in [
        ("demo-model", DType::Bf16),
        ("xtask/golden/models/llama-rope-dynamic", DType::F32),
        ("xtask/golden/models/mistral-window", DType::Bf16),
        ("xtask/golden/models/qwen3-qknorm", DType::F32),
    ] {
        for budget in [None, Some(64)] {
            let mut random = Random::new(11);
            let mut alone = load(folder, dtype, 1);
            let tiers = [None, Some(0), Some(1 << 18), Some(1 << 30)];
            for (more, place) in tiers.into_iter().flat_map(|more| (1..SEQUENCES).map(move |p| (more, p))) {
                let what = format!(
                    "{folder} in {dtype}, {budget:?}, {more:?} bytes above the least, sequence {place}"
                );
                let mut expected = fed(&alone, place, budget);
                let mut step = Step::default();
                step.run(&mut alone, &mut [&mut expected], &[PROMPT]);
                for _ in 0..ANSWER {
                    step.run(&mut alone, &mut [&mut expected], &[1]);
                }
                let mut other = fed(&alone, 0, None);
                for _ in 0..40 {
                    step.run(&mut alone, &mut [&mut other], &[1]);
                }

                let mut device =
                    load_tiered(folder, dtype, 3, more.map(|more| (more, EvictionRule::Bucketed)));
                let mut beside = fed(&device, 0, None);
                let mut got = fed(&device, place, budget);
                // Some find the beginning of their prompt done.
                let known = if random.below(2) == 0 { 0 } else { 32 };
                if known > 0 {
                    step.run(&mut device, &mut [&mut got], &[known]);
                    got.seen.clear();
                }
                step.run(&mut device, &mut [&mut beside], &[1]);
                let before = device.runner.seat_counters(got.seat).0;
                let extents = device.quota + 2;
                run_by_layer(&mut device, &mut random, &mut got, &mut beside, extents);
                // Clusters are copied to DRAM when they are made, and come back from there.
                let is_clustered = budget.is_some() && POLICIES[place].starts_with("retroinfer");
                if more == Some(1 << 30) && known == 0 && !is_clustered {
                    let pages = device.runner.seat_counters(got.seat).0.since(&before);
                    assert_eq!(pages.fetched_bytes, 0, "{what}: a layer is in HBM");
                    assert!(pages.hits > 0 || folder.contains("window"), "{what}: later tiles find it there");
                }
                for _ in 0..ANSWER {
                    step.run(&mut device, &mut [&mut got], &[1]);
                }
                assert_eq!(got.seen, expected.seen, "{what}");
                let same = beside.seen.len();
                assert_eq!(beside.seen, other.seen[..same], "{what}: who ran beside it");
            }
        }
    }
}

/// However long the prompt: the memory of a step is taken at the start.
#[test]
fn a_warm_step_of_layers_allocates_nothing() {
    for hbm in [None, Some((1 << 18, EvictionRule::Bucketed))] {
        let mut device = load_tiered("demo-model", DType::Bf16, 2, hbm);
        for (round, prompt) in [(0, 600), (1, 600), (2, 80), (3, 601)] {
            let mut random = Random::new(round / 2);
            let (mut beside, mut long) = (fed(&device, 0, None), fed(&device, 1, Some(48)));
            long.prompt = prompt;
            let extents = device.quota + 2;
            let allocations = run_by_layer(&mut device, &mut random, &mut long, &mut beside, extents);
            assert!(
                round == 0 || allocations == 0,
                "{hbm:?}, a prompt of {prompt}: {allocations} allocations"
            );
        }
    }
}
