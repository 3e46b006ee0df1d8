//! Which pages give way: the rules, and how their victims are found.
//!
//! A rule says two things. Its *pool* is the frames that give way to each other: those of a (seat, layer), as many as its
//! quota, or all of a layer. And its stamps tell ages, clamped or exactly. The rest is the same: the oldest of a pool go,
//! found by histograms of their ages, a byte at a time, without sorting.

use std::ops::Range;

/// Ages of hits that are counted apart, and those that short stamps tell apart; older pages count as of the last.
pub const STAMPS: usize = 64;

/// Which pages give way to those that a step misses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EvictionRule {
    /// Of a request's own quota in a layer the pages that it needed longest ago, in steps, counted up to 63; of equal age
    /// those in the first frames (SPIN's bucketed LRU).
    #[default]
    Bucketed,
    /// The same with ages that have no bound (LRU).
    Exact,
    /// Of all pages in a layer, whoever's, those that were needed longest ago, in steps of the device: one LRU over all
    /// requests, where nobody has a quota (SparseServe).
    Global,
}

impl EvictionRule {
    /// All of them.
    pub const ALL: [EvictionRule; 3] = [EvictionRule::Bucketed, EvictionRule::Exact, EvictionRule::Global];

    /// As users name it.
    pub const fn name(self) -> &'static str {
        match self {
            EvictionRule::Bucketed => "bucketed",
            EvictionRule::Exact => "exact",
            EvictionRule::Global => "global",
        }
    }

    /// Whether the requests share the frames of a layer, instead of each having its quota.
    pub const fn shares_frames(self) -> bool {
        matches!(self, EvictionRule::Global)
    }

    /// Bytes that a frame needs to be found as a victim: its stamp, and whose page it holds where frames are shared.
    pub(super) const fn frame_bytes(self) -> usize {
        match self {
            EvictionRule::Bucketed => 1,
            EvictionRule::Exact => 4,
            EvictionRule::Global => 4 + 4,
        }
    }
}

/// In which step of its pool the page of each frame was last needed.
#[derive(Clone, Debug)]
pub(super) enum Stamps {
    /// Modulo [`STAMPS`].
    Short(Vec<u8>),
    /// Modulo 2^32, which is more steps than any request takes.
    Exact(Vec<u32>),
}

/// From which age on frames give way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cut {
    /// All that are older go.
    age: u32,
    /// So many of this age, too.
    left: usize,
}

impl Cut {
    /// Whether a frame of `age` goes; asked once of each frame, in order.
    pub(super) fn takes(&mut self, age: u32) -> bool {
        let of_age = age == self.age && self.left > 0;
        self.left -= usize::from(of_age);
        age > self.age || of_age
    }
}

impl Stamps {
    pub(super) fn new(rule: EvictionRule, frames: usize) -> Self {
        match rule {
            EvictionRule::Bucketed => Stamps::Short(vec![0; frames]),
            EvictionRule::Exact | EvictionRule::Global => Stamps::Exact(vec![0; frames]),
        }
    }

    /// The page of `frame` is needed in step `now`.
    pub(super) fn set(&mut self, frame: usize, now: u32) {
        match self {
            Stamps::Short(stamps) => stamps[frame] = (now % STAMPS as u32) as u8,
            Stamps::Exact(stamps) => stamps[frame] = now,
        }
    }

    /// The page of frame `from` moves to frame `to`.
    pub(super) fn copy(&mut self, from: usize, to: usize) {
        match self {
            Stamps::Short(stamps) => stamps[to] = stamps[from],
            Stamps::Exact(stamps) => stamps[to] = stamps[from],
        }
    }

    /// Steps since the page of `frame` was needed, in step `now`.
    pub(super) fn age(&self, frame: usize, now: u32) -> u32 {
        match self {
            Stamps::Short(stamps) => now.wrapping_sub(u32::from(stamps[frame])) % STAMPS as u32,
            Stamps::Exact(stamps) => now.wrapping_sub(stamps[frame]),
        }
    }

    /// Step `now` begins for `frames`: what was stamped so long ago that its stamp comes round again stays at the greatest age.
    pub(super) fn begin(&mut self, frames: Range<usize>, now: u32) {
        if let Stamps::Short(stamps) = self {
            let (now, oldest) = ((now % STAMPS as u32) as u8, (now.wrapping_add(1) % STAMPS as u32) as u8);
            for stamp in &mut stamps[frames] {
                *stamp = if *stamp == now { oldest } else { *stamp };
            }
        }
    }

    /// Where the `count` oldest of `frames` end, in step `now`.
    ///
    /// # Panics
    /// When there are not so many that this step does not need.
    pub(super) fn oldest<I: Iterator<Item = usize>>(
        &self,
        frames: impl Fn() -> I,
        now: u32,
        count: usize,
    ) -> Cut {
        let bytes = match self {
            Stamps::Short(_) => 1,
            Stamps::Exact(_) => 4,
        };
        let mut cut = Cut { age: 0, left: count };
        for shift in (0..bytes).rev().map(|byte| 8 * byte) {
            let mut histogram = [0usize; 256];
            // Those that the higher bytes leave in doubt.
            let ages = frames().map(|frame| self.age(frame, now));
            for age in ages.filter(|age| age >> shift >> 8 == cut.age >> shift >> 8) {
                histogram[(age >> shift & 0xff) as usize] += 1;
            }
            let mut digit = 255;
            while histogram[digit] < cut.left {
                cut.left -= histogram[digit];
                digit = digit.checked_sub(1).expect("no more pages go than there are");
            }
            cut.age |= (digit as u32) << shift;
        }
        assert!(cut.age > 0, "what a step needs is never evicted");
        cut
    }
}
