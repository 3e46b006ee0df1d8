//! Who may hold how many cache frames of the HBM tier.
//!
//! A request needs its *mandatory* frames: those of one step's selection. *Buffering* frames keep pages of earlier steps, of
//! which the next selection needs some again; SPIN found that hits flatten at four to five times the mandatory frames. Here
//! each request's own misses say: the frames that it may hold grow by whole multiples of its mandatory ones, *levels*, and
//! what it missed at each level is its miss curve. Spare frames go, level by level, to whom the next one saves most misses;
//! when no level saves anything worth having, the rest is lent in equal parts, until somebody needs it.
//!
//! Invariant: quotas depend on what the requests asked for and missed, and nothing that they change is visible in an answer.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use ops::SeatIndex;
use ops::residency::SeatCounters;

/// Most buffering frames, in multiples of the mandatory ones.
const LEVELS: usize = 8;

/// Steps over which misses are counted before they are believed.
const WINDOW: u32 = 8;

/// Weight of a new window beside what was known of its level.
const NEW: f32 = 0.5;

/// Misses per mandatory page and step that a level must save to be worth its frames.
const WORTH: f32 = 0.005;

/// How the buffering frames of a request are decided.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum QuotaRule {
    /// By its own miss curve.
    #[default]
    Adaptive,
    /// A multiple of its mandatory frames; 0 is what a step needs, rounded up to extents, and no more (SPIN's mandatory-only).
    Fixed(u32),
    /// Nothing is decided: requests share all frames, and each may hold every one.
    Shared,
}

/// What a sequence of the next step asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Want {
    /// Its seat.
    pub seat: SeatIndex,
    /// Extents per layer that hold what one step selects, at most.
    pub mandatory: u32,
    /// Extents per layer that hold its whole context: more is useless.
    pub useful: u32,
}

/// The miss curve of a request.
#[derive(Clone, Copy, Debug)]
struct Curve {
    /// Misses per needed page at each level, as far as known.
    missed: [Option<f32>; LEVELS + 1],
    /// Level at which it ran, and what it needed and missed there so far.
    level: usize,
    steps: u32,
    needed: u64,
    misses: u64,
    /// Counters when the window began.
    seen: (u64, u64),
}

impl Curve {
    const fn new() -> Self {
        Curve { missed: [None; LEVELS + 1], level: 0, steps: 0, needed: 0, misses: 0, seen: (0, 0) }
    }

    /// Misses per needed page at `level`: measured, or what the levels around it suggest.
    fn at(&self, level: usize) -> f32 {
        let known = |level: usize| self.missed.get(level).copied().flatten();
        if let Some(miss) = known(level) {
            return miss;
        }
        // Each level is assumed to save half of what is left, until it is known.
        if let Some((below, miss)) = (0..level).rev().find_map(|l| known(l).map(|miss| (l, miss))) {
            return miss / (1 << (level - below)) as f32;
        }
        match (level..=LEVELS).find_map(|l| known(l).map(|miss| (l, miss))) {
            None => 0.5 / (1 << level) as f32,
            Some((above, miss)) => match known(above + 1) {
                None => miss * (1 << (above - level)) as f32,
                // A curve that is flat further up is flat here, or it would never be tried with less.
                Some(next) => miss + (above - level) as f32 * (miss - next).max(0.0),
            },
        }
    }

    /// What `level` saves beyond the one below it.
    fn saves(&self, level: usize) -> f32 {
        self.at(level - 1) - self.at(level)
    }

    fn observe(&mut self, counters: &SeatCounters) {
        let (needed, misses) = (counters.needed(), counters.misses + counters.streamed);
        self.needed += needed - self.seen.0;
        self.misses += misses - self.seen.1;
        self.seen = (needed, misses);
        self.steps += 1;
        if self.steps < WINDOW || self.needed == 0 {
            return;
        }
        let now = self.misses as f32 / self.needed as f32;
        let known = &mut self.missed[self.level];
        *known = Some(known.map_or(now, |before| before + NEW * (now - before)));
        (self.steps, self.needed, self.misses) = (0, 0, 0);
    }

    fn move_to(&mut self, level: usize) {
        if level != self.level {
            self.level = level;
            // What a new size brings shows when the frames have filled.
            (self.steps, self.needed, self.misses) = (0, 0, 0);
        }
    }
}

/// The next level of a want, that which saves most on top; of equal ones that of the first want.
#[derive(Clone, Copy, Debug)]
struct NextLevel {
    saves: f32,
    want: usize,
}

impl Ord for NextLevel {
    fn cmp(&self, other: &Self) -> Ordering {
        self.saves.total_cmp(&other.saves).then(other.want.cmp(&self.want))
    }
}

impl PartialOrd for NextLevel {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for NextLevel {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for NextLevel {}

/// The quotas of all seats.
#[derive(Clone, Debug)]
pub struct Quotas {
    rule: QuotaRule,
    /// Extents per layer.
    extents: u32,
    curves: Vec<Curve>,
    /// Of the last division: extents per layer of each want.
    granted: Vec<u32>,
    levels: Vec<usize>,
    next: BinaryHeap<NextLevel>,
    lent: u32,
    reclaimed: u64,
}

impl Quotas {
    /// Quotas for `seats` seats out of `extents` extents per layer.
    pub fn new(rule: QuotaRule, extents: u32, seats: usize) -> Self {
        Quotas {
            rule,
            extents,
            curves: vec![Curve::new(); seats],
            granted: Vec::with_capacity(seats),
            levels: Vec::with_capacity(seats),
            next: BinaryHeap::with_capacity(seats),
            lent: 0,
            reclaimed: 0,
        }
    }

    /// Extents per layer beyond what the miss curves ask for, of the last division.
    pub fn lent(&self) -> u32 {
        self.lent
    }

    /// Lent extents per layer that were taken back, since the start.
    pub fn reclaimed(&self) -> u64 {
        self.reclaimed
    }

    /// Notes what a step did to the pages of `seat`.
    pub fn observe(&mut self, seat: SeatIndex, counters: &SeatCounters) {
        self.curves[seat.at()].observe(counters);
    }

    /// Notes what a step did that says nothing of an answer's needs: one of its prompt.
    pub fn pass_over(&mut self, seat: SeatIndex, counters: &SeatCounters) {
        self.curves[seat.at()].seen = (counters.needed(), counters.misses + counters.streamed);
    }

    /// Forgets a request that left its seat.
    pub fn release(&mut self, seat: SeatIndex) {
        self.curves[seat.at()] = Curve::new();
    }

    /// Divides the extents among `wants`, in order of arrival: extents per layer of each, never more than there are.
    ///
    /// Whoever comes first gets its mandatory frames first; one for whom they do not suffice gets none by right, for fewer
    /// serve no step whole, but may be lent what is left. Where all is shared, each gets everything.
    pub fn divide(&mut self, wants: &[Want]) -> &[u32] {
        self.granted.clear();
        self.levels.clear();
        if self.rule == QuotaRule::Shared {
            self.granted.resize(wants.len(), self.extents);
            return &self.granted;
        }
        let mut spare = self.extents;
        for want in wants {
            let mandatory = want.mandatory.min(want.useful);
            let granted = if mandatory <= spare { mandatory } else { 0 };
            spare -= granted;
            self.granted.push(granted);
            self.levels.push(0);
        }
        match self.rule {
            QuotaRule::Fixed(ratio) => {
                for (want, granted) in wants.iter().zip(&mut self.granted) {
                    let more = granted.saturating_mul(ratio).min(want.useful - *granted).min(spare);
                    *granted += more;
                    spare -= more;
                }
            }
            QuotaRule::Adaptive => {
                let spare = self.raise(wants, spare);
                self.lend(wants, spare);
            }
            QuotaRule::Shared => {}
        }
        for (want, &level) in wants.iter().zip(&self.levels) {
            self.curves[want.seat.at()].move_to(level);
        }
        &self.granted
    }

    /// Spends `spare` extents on levels, that which saves most misses per frame first, as long as they save enough; returns
    /// what is left.
    fn raise(&mut self, wants: &[Want], mut spare: u32) -> u32 {
        self.next.clear();
        for at in 0..wants.len() {
            self.next.extend(self.next_level(wants, at));
        }
        while let Some(NextLevel { want, .. }) = self.next.pop() {
            let more = self.more(wants, want);
            // One that is too large now is too large from now on.
            if more <= spare {
                self.granted[want] += more;
                self.levels[want] += 1;
                spare -= more;
                self.next.extend(self.next_level(wants, want));
            }
        }
        spare
    }

    /// Extents of the next level of a want.
    fn more(&self, wants: &[Want], at: usize) -> u32 {
        wants[at].mandatory.min(wants[at].useful - self.granted[at])
    }

    /// The next level of a want, if it has one that saves enough.
    fn next_level(&self, wants: &[Want], at: usize) -> Option<NextLevel> {
        if self.granted[at] == 0 || self.more(wants, at) == 0 || self.levels[at] == LEVELS {
            return None;
        }
        // Misses are per mandatory page, and so is a level: their quotient is misses per frame.
        let saves = self.curves[wants[at].seat.at()].saves(self.levels[at] + 1);
        (saves >= WORTH).then_some(NextLevel { saves, want: at })
    }

    /// Lends `spare` extents in equal parts to those who can use them.
    fn lend(&mut self, wants: &[Want], mut spare: u32) {
        let before = self.lent;
        let total = spare;
        loop {
            let open = wants.iter().zip(&self.granted).filter(|(w, g)| w.useful > **g).count() as u32;
            if open == 0 || spare == 0 {
                break;
            }
            let part = (spare / open).max(1);
            for (want, granted) in wants.iter().zip(&mut self.granted) {
                let more = part.min(want.useful - *granted).min(spare);
                *granted += more;
                spare -= more;
            }
        }
        self.lent = total - spare;
        self.reclaimed += u64::from(before.saturating_sub(self.lent));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn want(seat: u32, mandatory: u32, useful: u32) -> Want {
        Want { seat: SeatIndex(seat), mandatory, useful }
    }

    /// A request whose misses at a level are `curve[level]` per thousand needed pages.
    fn live(quotas: &mut Quotas, wants: &[Want], curves: &[[u64; LEVELS + 1]], steps: usize) {
        let mut counters = vec![SeatCounters::default(); wants.len()];
        for _ in 0..steps {
            quotas.divide(wants);
            let levels = quotas.levels.clone();
            for (i, want) in wants.iter().enumerate() {
                let misses = curves[i][levels[i]];
                counters[i].hits += 1000 - misses;
                counters[i].misses += misses;
                quotas.observe(want.seat, &counters[i]);
            }
        }
    }

    const STEEP: [u64; LEVELS + 1] = [400, 200, 100, 50, 25, 24, 24, 24, 24];
    const FLAT: [u64; LEVELS + 1] = [300; LEVELS + 1];

    #[test]
    fn frames_follow_the_miss_curve() {
        let mut quotas = Quotas::new(QuotaRule::Adaptive, 40, 2);
        let wants = [want(0, 4, 400), want(1, 4, 400)];
        live(&mut quotas, &wants, &[STEEP, FLAT], 400);
        assert_eq!(quotas.levels, [4, 0], "where hits flatten, and nothing for whom more buys no hit");
        assert_eq!(quotas.lent(), 40 - 20 - 4);
        assert_eq!(quotas.divide(&wants).iter().sum::<u32>(), 40, "what nobody needs is lent");
    }

    #[test]
    fn what_is_lent_is_taken_back() {
        let mut quotas = Quotas::new(QuotaRule::Adaptive, 100, 3);
        let first = [want(0, 4, 400)];
        live(&mut quotas, &first, &[FLAT], 100);
        assert_eq!(quotas.divide(&first), [100]);
        let both = [want(0, 4, 400), want(2, 50, 60)];
        let granted = quotas.divide(&both).to_vec();
        assert!(granted[1] >= 50, "mandatory frames come before lent ones: {granted:?}");
        assert!(quotas.reclaimed() > 0);
    }

    #[test]
    fn who_came_first_is_served_first_and_the_rest_streams() {
        let mut quotas = Quotas::new(QuotaRule::Fixed(0), 10, 3);
        let wants = [want(0, 6, 100), want(1, 6, 100), want(2, 4, 100)];
        assert_eq!(quotas.divide(&wants), [6, 0, 4]);
        let mut fixed = Quotas::new(QuotaRule::Fixed(4), 60, 2);
        assert_eq!(fixed.divide(&[want(0, 6, 20), want(1, 6, 100)]), [20, 30]);
    }

    /// By search: in each round the level that saves most of those that fit, of equal ones the first.
    fn divide_naively(quotas: &Quotas, wants: &[Want]) -> Vec<u32> {
        let mut naive = Quotas { next: BinaryHeap::new(), ..quotas.clone() };
        (naive.granted, naive.levels) = (Vec::new(), vec![0; wants.len()]);
        let mut spare = naive.extents;
        for want in wants {
            let mandatory = want.mandatory.min(want.useful);
            naive.granted.push(if mandatory <= spare { mandatory } else { 0 });
            spare -= naive.granted[naive.granted.len() - 1];
        }
        loop {
            let mut best: Option<(usize, u32, f32)> = None;
            for (at, want) in wants.iter().enumerate() {
                let more = want.mandatory.min(want.useful - naive.granted[at]);
                if naive.granted[at] == 0 || more == 0 || more > spare || naive.levels[at] == LEVELS {
                    continue;
                }
                let saves = naive.curves[want.seat.at()].saves(naive.levels[at] + 1);
                if saves >= WORTH && best.is_none_or(|(_, _, most)| saves > most) {
                    best = Some((at, more, saves));
                }
            }
            let Some((at, more, _)) = best else { break };
            naive.granted[at] += more;
            naive.levels[at] += 1;
            spare -= more;
        }
        naive.lend(wants, spare);
        naive.granted
    }

    #[test]
    fn where_all_is_shared_everybody_may_hold_everything() {
        let mut shared = Quotas::new(QuotaRule::Shared, 10, 3);
        assert_eq!(shared.divide(&[want(0, 6, 100), want(2, 1, 2)]), [10, 10]);
        assert_eq!((shared.lent(), shared.reclaimed()), (0, 0));
    }

    /// Whatever is asked for: as by search, no more than there is, no more than is useful, and everything in use or useless.
    #[test]
    fn divisions_are_sound() {
        let mut random = ops::Random::new(5);
        let mut quotas = Quotas::new(QuotaRule::Adaptive, 64, 4);
        let mut counters = [SeatCounters::default(); 4];
        for round in 0..3000 {
            let mut wants = Vec::new();
            for seat in 0..4 {
                if random.below(4) > 0 {
                    let most = [30, 5][random.below(2)];
                    let mandatory = random.below(most) as u32;
                    wants.push(want(seat, mandatory, 1 + random.below(60) as u32));
                }
            }
            let expected = divide_naively(&quotas, &wants);
            let granted = quotas.divide(&wants).to_vec();
            assert_eq!(granted, expected, "seed 5 round {round}: {wants:?}");
            let sum: u32 = granted.iter().sum();
            assert!(sum <= 64, "seed 5 round {round}: {granted:?} of {wants:?}");
            assert!(granted.iter().zip(&wants).all(|(g, w)| *g <= w.useful), "seed 5 round {round}");
            let sated = granted.iter().zip(&wants).all(|(g, w)| *g == w.useful);
            assert!(sum == 64 || sated, "seed 5 round {round}: {granted:?} of {wants:?} leave frames idle");
            for want in &wants {
                let c = &mut counters[want.seat.at()];
                c.hits += random.below(100) as u64;
                c.misses += random.below(100) as u64;
                quotas.observe(want.seat, c);
            }
            if random.below(20) == 0 {
                counters[1] = SeatCounters::default();
                quotas.release(SeatIndex(1));
            }
        }
    }
}
