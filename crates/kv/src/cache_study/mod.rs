//! Caches of pages, offline: what a given demand would have hit under an eviction rule and a size.
//!
//! A *stream* is what one request asks for in one layer: a set of pages per step, over all KV heads. It has frames of its
//! own, as many as the step needs times `1 + ratio` (SPIN's mandatory and buffering pages), except under [`Rule::Global`].
//! A step finds some of its pages resident, these are hits; the others are loaded, and where frames do not suffice the rule
//! picks victims among the pages that this step does not need.
//!
//! The first step of a stream is not counted, whatever is resident then is a matter of prefill. The page that is being
//! written is not counted either: it is made in its frame, never loaded.
//!
//! * `rules.rs`: the rules.

mod rules;
#[cfg(test)]
mod tests;

use hashbrown::HashMap;

/// Longest window of [`Demand::overlap`], in steps.
pub const WINDOW_MAX: usize = 16;

/// Which page goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// Nothing stays but what the last step needed, whatever the ratio.
    Mandatory,
    /// The one unused for most steps of its request, counted up to 63; of those the one in the lowest frame. So 64 buckets
    /// do for stamps, and victims are found without sorting (SPIN).
    Bucketed,
    /// The one unused for longest; within a step pages are used in ascending order.
    Lru,
    /// The same, over all streams that have begun and not ended, with all their frames in one pool (SparseServe).
    Global,
    /// The one that is needed again last (Belady 1966): no rule with the same frames per stream has more hits.
    Belady,
}

impl Rule {
    /// All of them.
    pub const ALL: [Rule; 5] = [Rule::Mandatory, Rule::Bucketed, Rule::Lru, Rule::Global, Rule::Belady];

    /// For tables.
    pub fn name(self) -> &'static str {
        match self {
            Rule::Mandatory => "mandatory-only",
            Rule::Bucketed => "bucketed-lru",
            Rule::Lru => "exact-lru",
            Rule::Global => "global-lru",
            Rule::Belady => "belady",
        }
    }
}

/// Pages that were asked for, and those of them that were resident.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hits {
    /// Pages, counted in each step anew.
    pub asked: u64,
    /// Resident ones.
    pub hits: u64,
}

impl Hits {
    /// Hits per page asked for; 1 where none was.
    pub fn rate(self) -> f64 {
        if self.asked == 0 { 1.0 } else { self.hits as f64 / self.asked as f64 }
    }

    fn add(&mut self, other: Hits) {
        self.asked += other.asked;
        self.hits += other.hits;
    }
}

/// What is asked of a cache, step after step.
#[derive(Debug)]
pub struct Demand {
    kv_heads: u32,
    streams: Vec<Stream>,
    /// By request and layer.
    index: HashMap<(u64, u32), u32>,
    /// Stream of each step of any, in the order in which they ran.
    order: Vec<u32>,
}

/// The steps of a request in a layer.
#[derive(Debug, Default)]
struct Stream {
    /// Pages of all steps, ascending in each; page `p` of head `h` is `p * kv_heads + h`.
    pages: Vec<u32>,
    /// Where the pages of each step end.
    ends: Vec<usize>,
    /// The page that each step writes, as an index into the context.
    open: Vec<u32>,
}

impl Stream {
    fn num_steps(&self) -> usize {
        self.ends.len()
    }

    fn step(&self, step: usize) -> &[u32] {
        let start = if step == 0 { 0 } else { self.ends[step - 1] };
        &self.pages[start..self.ends[step]]
    }
}

impl Demand {
    /// Nothing yet, of a model with `kv_heads` KV heads per layer.
    ///
    /// # Panics
    /// When that is 0.
    pub fn new(kv_heads: usize) -> Self {
        assert!(kv_heads > 0, "a layer has KV heads");
        Demand { kv_heads: kv_heads as u32, streams: Vec::new(), index: HashMap::new(), order: Vec::new() }
    }

    /// The next step of `request` in `layer`, which writes page `open` of its context and needs `pages`, one list per KV
    /// head. `false`, and nothing happens, if the context is so long that its pages have no number.
    pub fn push(&mut self, request: u64, layer: u32, open: u32, pages: &[&[u32]]) -> bool {
        let last = pages.iter().flat_map(|head| head.iter()).max().copied().unwrap_or(0);
        if last.checked_add(1).and_then(|end| end.checked_mul(self.kv_heads)).is_none() {
            return false;
        }
        let number = self.streams.len() as u32;
        let number = *self.index.entry((request, layer)).or_insert(number);
        if number as usize == self.streams.len() {
            self.streams.push(Stream::default());
        }
        let stream = &mut self.streams[number as usize];
        let start = stream.pages.len();
        for (head, list) in (0..self.kv_heads).zip(pages) {
            stream.pages.extend(list.iter().map(|page| page * self.kv_heads + head));
        }
        stream.pages[start..].sort_unstable();
        stream.ends.push(stream.pages.len());
        stream.open.push(open);
        self.order.push(number);
        true
    }

    /// Requests times layers.
    pub fn num_streams(&self) -> usize {
        self.streams.len()
    }

    /// Steps of all streams.
    pub fn num_steps(&self) -> usize {
        self.order.len()
    }

    /// Pages that a step of a stream needs, over all KV heads, on average.
    pub fn pages_per_step(&self) -> f64 {
        let pages: usize = self.streams.iter().map(|s| s.pages.len()).sum();
        pages as f64 / self.num_steps().max(1) as f64
    }

    /// Hits under `rule` with frames for `1 + ratio` times the pages of a step.
    pub fn hits(&self, rule: Rule, ratio: usize) -> Hits {
        let ratio = if rule == Rule::Mandatory { 0 } else { ratio };
        let mut sum = Hits::default();
        match rule {
            Rule::Global => sum = rules::global(self, ratio),
            _ => self.streams.iter().for_each(|s| sum.add(rules::private(s, self.kv_heads, rule, ratio))),
        }
        sum
    }

    /// For windows of 1, 2, .. [`WINDOW_MAX`] steps, the share of the pages of a step that the steps of the window before
    /// it needed. At the start of a stream the window is as long as there are steps.
    pub fn overlap(&self) -> [f64; WINDOW_MAX] {
        let (mut within, mut asked) = ([0u64; WINDOW_MAX], 0u64);
        for stream in &self.streams {
            let mut last = HashMap::new();
            for step in 0..stream.num_steps() {
                for &page in stream.step(step) {
                    let before = last.insert(page, step);
                    if step == 0 || page / self.kv_heads == stream.open[step] {
                        continue;
                    }
                    asked += 1;
                    if let Some(age) = before.map(|before| step - before).filter(|&age| age <= WINDOW_MAX) {
                        within[age - 1] += 1;
                    }
                }
            }
        }
        let mut sum = 0;
        within.map(|pages| {
            sum += pages;
            sum as f64 / asked.max(1) as f64
        })
    }
}
