use ops::Random;

use super::*;

const SEEDS: u64 = 60;
const RATIOS: usize = 9;

/// Streams that drift over `pages` pages, with steps of changing size.
fn demand(seed: u64, num_streams: usize, num_steps: usize, pages: usize) -> Demand {
    let mut random = Random::new(seed);
    let kv_heads = 1 + random.below(3);
    let mut demand = Demand::new(kv_heads);
    let stay = random.unit();
    let size_max = 1 + random.below(6);
    let mut last = vec![vec![Vec::<u32>::new(); kv_heads]; num_streams];
    for step in 0..num_steps {
        for stream in 0..num_streams {
            // Streams begin and end at different times.
            if step < stream || step + 2 * stream >= num_steps + stream {
                continue;
            }
            for list in &mut last[stream] {
                let size = 1 + random.below(size_max);
                list.retain(|_| random.unit() < stay);
                while list.len() < size {
                    list.push(random.below(pages) as u32);
                }
                list.sort_unstable();
                list.dedup();
            }
            let lists: Vec<&[u32]> = last[stream].iter().map(Vec::as_slice).collect();
            let open = random.below(2 * pages) as u32;
            assert!(demand.push(stream as u64, 7, open, &lists));
        }
    }
    demand
}

/// Pages of a step that count, with whether they are in `resident`.
fn count(stream: &Stream, kv_heads: u32, step: usize, resident: impl Fn(u32) -> bool) -> Hits {
    let mut hits = Hits::default();
    for &page in stream.step(step).iter().filter(|&&p| step > 0 && p / kv_heads != stream.open[step]) {
        hits.add(Hits { asked: 1, hits: u64::from(resident(page)) });
    }
    hits
}

/// The textbook's stack: a use brings a page to the top, the cache is the upper part.
fn stack_hits(demand: &Demand, ratio: usize) -> Hits {
    let mut sum = Hits::default();
    for stream in &demand.streams {
        let mut stack: Vec<u32> = Vec::new();
        for step in 0..stream.num_steps() {
            sum.add(count(stream, demand.kv_heads, step, |page| stack.contains(&page)));
            for &page in stream.step(step) {
                stack.retain(|&p| p != page);
                stack.insert(0, page);
            }
            stack.truncate(stream.step(step).len() * (1 + ratio));
        }
    }
    sum
}

/// The bucketed rule, frame by frame, one victim at a time.
fn bucketed_hits(demand: &Demand, ratio: usize) -> Hits {
    let mut sum = Hits::default();
    for stream in &demand.streams {
        let mut frames: Vec<Option<(u32, usize)>> = Vec::new();
        for step in 0..stream.num_steps() {
            let need = stream.step(step);
            let holds = |frames: &[Option<(u32, usize)>], page| frames.iter().flatten().any(|f| f.0 == page);
            sum.add(count(stream, demand.kv_heads, step, |page| holds(&frames, page)));
            let missing: Vec<u32> = need.iter().copied().filter(|&page| !holds(&frames, page)).collect();
            frames.iter_mut().flatten().filter(|f| need.contains(&f.0)).for_each(|f| f.1 = step);
            while frames.iter().flatten().count() + missing.len() > need.len() * (1 + ratio) {
                let age = |i: usize| frames[i].filter(|f| f.1 < step).map(|f| (step - f.1).min(63));
                let oldest = (0..frames.len()).filter_map(age).max().expect("a page that is not needed");
                let victim = (0..frames.len()).find(|&i| age(i) == Some(oldest)).expect("the first of these");
                frames[victim] = None;
            }
            for page in missing {
                let free = frames.iter().position(Option::is_none).unwrap_or(frames.len());
                frames.resize(frames.len().max(free + 1), None);
                frames[free] = Some((page, step));
            }
        }
    }
    sum
}

/// The most hits that any choice of victims has, of a stream of few pages.
fn best_hits(stream: &Stream, kv_heads: u32, ratio: usize, step: usize, resident: u32) -> u64 {
    if step == stream.num_steps() {
        return 0;
    }
    let own = count(stream, kv_heads, step, |page| resident >> page & 1 == 1).hits;
    let need = stream.step(step).iter().fold(0u32, |bits, page| bits | 1 << page);
    let others = resident & !need;
    let spare = (need.count_ones() as usize) * ratio;
    // Every subset of the others that fits.
    let mut kept = others;
    let mut best = 0;
    loop {
        if kept.count_ones() as usize <= spare {
            best = best.max(best_hits(stream, kv_heads, ratio, step + 1, need | kept));
        }
        if kept == 0 {
            return own + best;
        }
        kept = (kept - 1) & others;
    }
}

#[test]
fn exact_lru_is_the_textbooks_stack() {
    for seed in 0..SEEDS {
        let demand = demand(seed, 2, 60, 30);
        for ratio in 0..RATIOS {
            assert_eq!(
                demand.hits(Rule::Lru, ratio),
                stack_hits(&demand, ratio),
                "seed {seed} ratio {ratio}"
            );
        }
    }
}

#[test]
fn bucketed_lru_is_what_it_says() {
    for seed in 0..SEEDS {
        // Long enough for ages above 63.
        let demand = demand(seed, 2, 150, 60);
        for ratio in [0, 1, 2, 5, 8] {
            let found = demand.hits(Rule::Bucketed, ratio);
            assert_eq!(found, bucketed_hits(&demand, ratio), "seed {seed} ratio {ratio}");
        }
    }
}

#[test]
fn nothing_beats_belady_with_the_same_frames() {
    for seed in 0..SEEDS {
        let demand = demand(seed, 2, 80, 40);
        for ratio in 0..RATIOS {
            let bound = demand.hits(Rule::Belady, ratio);
            for rule in [Rule::Mandatory, Rule::Bucketed, Rule::Lru] {
                let found = demand.hits(rule, ratio);
                assert_eq!(found.asked, bound.asked, "seed {seed} ratio {ratio} {rule:?}");
                assert!(found.hits <= bound.hits, "seed {seed} ratio {ratio} {rule:?}");
            }
        }
    }
}

#[test]
fn belady_is_the_optimum() {
    for seed in 0..SEEDS {
        let mut random = Random::new(seed);
        let mut demand = Demand::new(1);
        for _ in 0..9 {
            let mut pages: Vec<u32> = (0..1 + random.below(2)).map(|_| random.below(7) as u32).collect();
            pages.sort_unstable();
            pages.dedup();
            assert!(demand.push(0, 0, random.below(9) as u32, &[&pages]));
        }
        for ratio in 0..4 {
            let best = best_hits(&demand.streams[0], 1, ratio, 0, 0);
            assert_eq!(demand.hits(Rule::Belady, ratio).hits, best, "seed {seed} ratio {ratio}");
        }
    }
}

#[test]
fn more_frames_never_hurt_a_stack_algorithm() {
    for seed in 0..SEEDS {
        let demand = demand(seed, 3, 60, 50);
        for rule in [Rule::Lru, Rule::Global, Rule::Belady] {
            let hits: Vec<u64> = (0..RATIOS).map(|ratio| demand.hits(rule, ratio).hits).collect();
            assert!(hits.is_sorted(), "seed {seed} {rule:?}: {hits:?}");
        }
    }
}

#[test]
fn the_ends_are_known() {
    for seed in 0..SEEDS {
        let demand = demand(seed, 3, 40, 30);
        let least = demand.hits(Rule::Mandatory, 0);
        assert_eq!(demand.hits(Rule::Mandatory, 5), least, "seed {seed}: no ratio changes it");
        assert!((least.rate() - demand.overlap()[0]).abs() < 1e-12, "seed {seed}: a window of one step");
        for rule in [Rule::Bucketed, Rule::Lru, Rule::Belady] {
            assert_eq!(demand.hits(rule, 0), least, "seed {seed} {rule:?}: no frame to spare");
        }
        // Frames for everything: only first uses miss, and the open page is none of them.
        let mut first_uses = Hits::default();
        for stream in &demand.streams {
            let seen =
                |step: usize, page| (0..step).any(|before| stream.step(before).binary_search(&page).is_ok());
            for step in 0..stream.num_steps() {
                first_uses.add(count(stream, demand.kv_heads, step, |page| seen(step, page)));
            }
        }
        for rule in [Rule::Bucketed, Rule::Lru, Rule::Global, Rule::Belady] {
            assert_eq!(demand.hits(rule, 1000), first_uses, "seed {seed} {rule:?}");
        }
    }
    let alone = demand(1, 1, 60, 30);
    for ratio in 0..RATIOS {
        assert_eq!(
            alone.hits(Rule::Global, ratio),
            alone.hits(Rule::Lru, ratio),
            "one stream is all streams"
        );
    }
}

#[test]
fn overlap_is_a_union_of_steps() {
    for seed in 0..SEEDS {
        let demand = demand(seed, 2, 40, 25);
        for (window, found) in (1..).zip(demand.overlap()) {
            let mut sum = Hits::default();
            for stream in &demand.streams {
                for step in 0..stream.num_steps() {
                    let known =
                        |page| (step.saturating_sub(window)..step).any(|s| stream.step(s).contains(&page));
                    sum.add(count(stream, demand.kv_heads, step, known));
                }
            }
            assert!((found - sum.rate()).abs() < 1e-12, "seed {seed} window {window}");
        }
    }
}

#[test]
fn contexts_without_page_numbers_are_refused() {
    let mut demand = Demand::new(8);
    assert!(!demand.push(0, 0, 0, &[&[1 << 29]]));
    assert_eq!((demand.num_streams(), demand.num_steps(), demand.pages_per_step()), (0, 0, 0.0));
    assert!(demand.push(3, 1, 9, &[&[1, 2], &[5]]));
    assert_eq!((demand.num_streams(), demand.num_steps(), demand.pages_per_step()), (1, 1, 3.0));
    assert_eq!(demand.hits(Rule::Lru, 1), Hits::default());
    assert_eq!(Hits::default().rate(), 1.0);
}
