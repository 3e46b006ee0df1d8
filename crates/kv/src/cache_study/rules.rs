//! The rules. Steps are sets, so nothing depends on when within a step a page is loaded.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use hashbrown::HashMap;

use super::{Demand, Hits, Rule, Stream};

/// Stamps of the bucketed rule.
const BUCKETS: u32 = 64;

/// A resident page.
#[derive(Clone, Copy)]
struct Resident {
    frame: u32,
    /// The step that used it last.
    step: u32,
    /// Uses before its last one, of any page.
    uses: u64,
    /// The step that will use it next; `u32::MAX` if none will, or if it will be there anyway.
    next: u32,
}

/// Hits of a stream with frames of its own.
pub(super) fn private(stream: &Stream, kv_heads: u32, rule: Rule, ratio: usize) -> Hits {
    let next_use = if rule == Rule::Belady { next_uses(stream, kv_heads) } else { Vec::new() };
    let mut resident: HashMap<u32, Resident> = HashMap::new();
    let (mut free, mut num_frames) = (BinaryHeap::new(), 0);
    let (mut result, mut uses, mut at) = (Hits::default(), 0, 0);
    let (mut missing, mut others) = (Vec::new(), Vec::new());
    for step in 0..stream.num_steps() {
        let need = stream.step(step);
        missing.clear();
        for &page in need {
            let next = next_use.get(at).copied().unwrap_or(u32::MAX);
            let used = Resident { frame: 0, step: step as u32, uses, next };
            (uses, at) = (uses + 1, at + 1);
            let found = resident.get_mut(&page);
            if step > 0 && page / kv_heads != stream.open[step] {
                result.add(Hits { asked: 1, hits: u64::from(found.is_some()) });
            }
            match found {
                Some(place) => *place = Resident { frame: place.frame, ..used },
                None => missing.push((page, used)),
            }
        }
        let frames = need.len() * (1 + ratio);
        let over = (resident.len() + missing.len()).saturating_sub(frames);
        if over > 0 {
            others.clear();
            let unused = resident.iter().filter(|(_, place)| place.step < step as u32);
            others.extend(unused.map(|(&page, place)| (rank(rule, step as u32, place), page)));
            others.select_nth_unstable(over - 1);
            for (_, page) in &others[..over] {
                free.extend(resident.remove(page).map(|place| Reverse(place.frame)));
            }
        }
        for &(page, used) in &missing {
            let frame = free.pop().map_or(num_frames, |Reverse(frame)| frame);
            num_frames = num_frames.max(frame + 1);
            resident.insert(page, Resident { frame, ..used });
        }
    }
    result
}

/// Lowest goes first.
fn rank(rule: Rule, step: u32, place: &Resident) -> (u64, u32) {
    match rule {
        Rule::Bucketed => (u64::from(BUCKETS - 1 - (step - place.step).min(BUCKETS - 1)), place.frame),
        Rule::Belady => (u64::from(u32::MAX - place.next), 0),
        Rule::Mandatory | Rule::Lru | Rule::Global => (place.uses, 0),
    }
}

/// For each page of each step, the next step that needs it, unless it is written in that step and so need not be kept.
fn next_uses(stream: &Stream, kv_heads: u32) -> Vec<u32> {
    let mut next = vec![u32::MAX; stream.pages.len()];
    let mut coming = HashMap::new();
    let mut end = stream.pages.len();
    for step in (0..stream.num_steps()).rev() {
        let start = end - stream.step(step).len();
        for at in start..end {
            let page = stream.pages[at];
            let written = page / kv_heads == stream.open[step];
            let here = if written { u32::MAX } else { step as u32 };
            next[at] = coming.insert(page, here).unwrap_or(u32::MAX);
        }
        end = start;
    }
    next
}

/// Hits of all streams with one pool of frames, as many as the live ones would have had alone.
pub(super) fn global(demand: &Demand, ratio: usize) -> Hits {
    let mut left: Vec<usize> = demand.streams.iter().map(Stream::num_steps).collect();
    let mut steps = vec![0; demand.streams.len()];
    let mut needs = vec![0; demand.streams.len()];
    // Uses before the last one, by page; and the pages, by that.
    let mut resident: Vec<HashMap<u32, u64>> = vec![HashMap::new(); demand.streams.len()];
    let mut by_use = BTreeMap::new();
    let (mut result, mut uses, mut need_all) = (Hits::default(), 0, 0);
    for &number in &demand.order {
        let at = number as usize;
        let stream = &demand.streams[at];
        let step = steps[at];
        let need = stream.step(step);
        for &page in need {
            let before = resident[at].insert(page, uses);
            if step > 0 && page / demand.kv_heads != stream.open[step] {
                result.add(Hits { asked: 1, hits: u64::from(before.is_some()) });
            }
            before.and_then(|before| by_use.remove(&before));
            by_use.insert(uses, (at, page));
            uses += 1;
        }
        need_all = need_all + need.len() - needs[at];
        needs[at] = need.len();
        while by_use.len() > need_all * (1 + ratio) {
            let Some((_, (owner, page))) = by_use.pop_first() else { break };
            resident[owner].remove(&page);
        }
        (steps[at], left[at]) = (step + 1, left[at] - 1);
        if left[at] == 0 {
            need_all -= needs[at];
            needs[at] = 0;
            for (_, last) in resident[at].drain() {
                by_use.remove(&last);
            }
        }
    }
    result
}
