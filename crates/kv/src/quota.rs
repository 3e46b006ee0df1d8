//! Who may hold how many cache frames of the HBM tier.
//!
//! A request needs its *mandatory* frames: those of one step's selection. *Buffering* frames keep pages of earlier steps, of
//! which the next selection needs some again; SPIN found that hits flatten at four to five times the mandatory frames. Here
//! each request's own hits and misses say: the frames that it may hold grow by whole multiples of its mandatory ones, *levels*,
//! and what it would miss at each level is its miss curve, known as far as the frames that it really held. Spare frames go,
//! level by level, to whom the next one saves most misses; when no level saves anything worth having, the rest is lent in equal
//! parts, until somebody needs it.
//!
//! Invariant: quotas depend on what the requests asked for and missed, and nothing that they change is visible in an answer.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use ops::SeatIndex;
use ops::residency::{EXTENT_FRAMES, STAMPS, SeatCounters};

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

/// The miss curve of a request, and what its quota is for.
#[derive(Clone, Copy, Debug)]
struct Curve {
    /// Misses per needed page at each level, as far as known.
    missed: [Option<f32>; LEVELS + 1],
    /// Frames per layer of its mandatory extents: the width of a level.
    unit: f32,
    /// Of its quota: extents per layer that are its own, and lent ones on top.
    own: u32,
    lent: u32,
    /// Steps of the window, its counters when that began, and the fewest frames per layer that it held meanwhile.
    steps: u32,
    start: SeatCounters,
    held: f32,
    /// Frames per layer that it had filled of more, after a window in which nothing had to give way: more than these save nothing
    /// before they are full.
    filled: f32,
}

impl Curve {
    fn new() -> Self {
        Curve {
            missed: [None; LEVELS + 1],
            unit: 0.0,
            own: 0,
            lent: 0,
            steps: 0,
            start: SeatCounters::default(),
            held: f32::INFINITY,
            filled: f32::INFINITY,
        }
    }

    /// Misses per needed page at `level`: measured, or half of those at the level below until it is known.
    fn at(&self, level: usize) -> f32 {
        let first = self.missed[0].unwrap_or(0.5);
        (1..=level).fold(first, |below, level| match self.missed[level] {
            _ if level as f32 * self.unit >= self.filled => below,
            // More frames never miss more: then what was known here is out of date.
            Some(known) => known.min(below),
            None => below / 2.0,
        })
    }

    /// What `level` saves beyond the one below it.
    fn saves(&self, level: usize) -> f32 {
        self.at(level - 1) - self.at(level)
    }

    fn begin_window(&mut self, counters: &SeatCounters) {
        (self.steps, self.start, self.held) = (0, *counters, f32::INFINITY);
    }

    /// Notes a step after which `held` frames per layer hold something; there are `layers` of them.
    ///
    /// Whatever was lent is in use, too: so what is known goes as far as the frames held, not as the level granted, and the ages
    /// of the hits tell what fewer frames would have missed.
    fn observe(&mut self, counters: &SeatCounters, held: f32, layers: usize) {
        self.steps += 1;
        self.held = self.held.min(held);
        if self.steps < WINDOW {
            return;
        }
        let window = counters.since(&self.start);
        if window.needed() > 0 {
            let gave_way = window.evictions + window.streamed > 0;
            self.filled = if gave_way { f32::INFINITY } else { held };
            let steps = (self.steps as usize * layers) as f32;
            for (level, known) in self.missed.iter_mut().enumerate() {
                let frames = (level + 1) as f32 * self.unit;
                if level > 0 && frames > self.held {
                    break;
                }
                let now = missed_with(&window, steps, self.held, frames);
                *known = Some(known.map_or(now, |before| before + NEW * (now - before)));
            }
        }
        self.begin_window(counters);
    }
}

/// Misses per needed page of a request that had had `frames` frames per layer, no more than the `held` ones with which it counted
/// `window` in `steps` steps of a layer.
///
/// By the working sets of its references (Denning 1968): the pages of the last `t + 1` steps are those of the last `t`, and those
/// of one more step that were not needed in the `t` after it. What fills the frames exactly is what LRU keeps.
fn missed_with(window: &SeatCounters, steps: f32, held: f32, frames: f32) -> f32 {
    let needed = window.needed() as f32;
    let share = |count: u64| count as f32 / needed;
    let missed = share(window.misses + window.streamed);
    if frames >= held {
        return missed;
    }
    // Not needed within the last steps, and pages needed within them.
    let (mut left, mut set) = (1.0 - share(window.hits_by_age[0]), 0.0);
    // The last age is that of all older pages.
    for &hits in &window.hits_by_age[1..STAMPS - 1] {
        let (hits, more) = (share(hits), needed / steps * left);
        if frames <= set + more {
            return left - hits * (frames - set) / more.max(f32::MIN_POSITIVE);
        }
        (left, set) = (left - hits, set + more);
    }
    left + (missed.min(left) - left) * (frames - set) / (held - set)
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
    layers: usize,
    curves: Vec<Curve>,
    /// Of the last division: extents per layer of each want.
    granted: Vec<u32>,
    /// The same without what is lent.
    own: Vec<u32>,
    levels: Vec<usize>,
    next: BinaryHeap<NextLevel>,
    lent: u32,
    reclaimed: u64,
}

impl Quotas {
    /// Quotas for `seats` seats out of `extents` extents in each of `layers` layers.
    pub fn new(rule: QuotaRule, extents: u32, layers: usize, seats: usize) -> Self {
        Quotas {
            rule,
            extents,
            layers,
            curves: vec![Curve::new(); seats],
            granted: Vec::with_capacity(seats),
            own: Vec::with_capacity(seats),
            levels: Vec::with_capacity(seats),
            next: BinaryHeap::with_capacity(seats),
            lent: 0,
            reclaimed: 0,
        }
    }

    /// Extents per layer beyond what the miss curves ask for, of those who have a seat.
    pub fn lent(&self) -> u32 {
        self.lent
    }

    /// Lent extents per layer that were taken back for somebody else, since the start.
    pub fn reclaimed(&self) -> u64 {
        self.reclaimed
    }

    /// Notes what a step did to the pages of `seat`, which holds `held` cache frames after it, over all layers.
    pub fn observe(&mut self, seat: SeatIndex, counters: &SeatCounters, held: usize) {
        self.curves[seat.at()].observe(counters, held as f32 / self.layers as f32, self.layers);
    }

    /// Notes what a step did that says nothing of an answer's needs: one of its prompt.
    pub fn pass_over(&mut self, seat: SeatIndex, counters: &SeatCounters) {
        self.curves[seat.at()].begin_window(counters);
    }

    /// Forgets a request that left its seat. What it had borrowed is nobody's.
    pub fn release(&mut self, seat: SeatIndex) {
        let curve = std::mem::replace(&mut self.curves[seat.at()], Curve::new());
        self.lent -= curve.lent;
    }

    /// Divides the extents among `wants`, in order of preference: extents per layer of each, never more than there are without `taken`
    /// ones, which are promised already.
    ///
    /// Whoever comes first gets its mandatory frames first; one for whom they do not suffice gets none by right, for fewer
    /// serve no step whole, but may be lent what is left. Where all is shared, each gets everything.
    pub fn divide(&mut self, wants: &[Want], taken: u32) -> &[u32] {
        self.granted.clear();
        self.levels.clear();
        if self.rule == QuotaRule::Shared {
            self.granted.resize(wants.len(), self.extents);
            return &self.granted;
        }
        let mut spare = self.extents.saturating_sub(taken);
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
                self.own.clear();
                self.own.extend_from_slice(&self.granted);
                self.lend(wants, spare);
                self.note(wants);
            }
            QuotaRule::Shared => {}
        }
        &self.granted
    }

    /// Notes what each of `wants` was granted, and what of the lent extents that it had is another's now.
    fn note(&mut self, wants: &[Want]) {
        for (at, want) in wants.iter().enumerate() {
            let curve = &mut self.curves[want.seat.at()];
            let (own, lent) = (self.own[at], self.granted[at] - self.own[at]);
            // What became its own was not taken, nor what is of no use to it any more.
            let taken = (curve.own + curve.lent).min(want.useful).saturating_sub(self.granted[at]);
            self.reclaimed += u64::from(taken.min(curve.lent));
            self.lent = self.lent - curve.lent + lent;
            (curve.own, curve.lent) = (own, lent);
            curve.unit = (want.mandatory as usize * EXTENT_FRAMES) as f32;
        }
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
    }
}

#[cfg(test)]
mod tests {
    use ops::Random;
    use ops::residency::{EvictionRule, Residency, ResidencyShape};

    use super::*;

    fn want(seat: u32, mandatory: u32, useful: u32) -> Want {
        Want { seat: SeatIndex(seat), mandatory, useful }
    }

    /// Which pages a request needs in a step.
    #[derive(Clone, Copy, Debug)]
    enum Needs {
        /// As many of its first pages, by lot: with frames for a part of these, that part is hit.
        Of { hot: usize, pages: usize },
        /// As many that it never needed before.
        New { pages: usize },
    }

    /// A layer of real tables, so that requests miss what they miss with the frames that they hold.
    struct Cache {
        tables: Residency,
        random: Random,
        step: usize,
    }

    impl Cache {
        fn new(extents: u32) -> Self {
            let shape = ResidencyShape {
                seats: 3,
                layers: 1,
                kv_heads: 1,
                pages_max: 1 << 16,
                extents: extents as usize,
                eviction: EvictionRule::Bucketed,
            };
            Cache { tables: Residency::new(shape), random: Random::new(8), step: 0 }
        }

        /// Steps of requests; returns of each the share of hits over the last half of them.
        fn live(&mut self, quotas: &mut Quotas, wants: &[Want], needs: &[Needs], steps: usize) -> Vec<f32> {
            let mut half = vec![SeatCounters::default(); wants.len()];
            for step in 0..steps {
                let granted = quotas.divide(wants, 0).to_vec();
                let mut to = wants.iter().zip(&granted);
                to.clone().for_each(|(w, g)| self.tables.shrink(w.seat, 0, *g as usize, &mut |_, _| {}));
                to.by_ref().for_each(|(w, g)| self.tables.grow(w.seat, 0, *g as usize));
                for (want, needs) in wants.iter().zip(needs) {
                    self.run(want.seat, needs);
                    let counters = self.tables.counters(want.seat);
                    quotas.observe(want.seat, counters, self.tables.frames_of(want.seat));
                }
                self.step += 1;
                if step == steps / 2 {
                    half = wants.iter().map(|w| *self.tables.counters(w.seat)).collect();
                }
            }
            let of = |(want, half): (&Want, &SeatCounters)| {
                let late = self.tables.counters(want.seat).since(half);
                late.hits as f32 / late.needed() as f32
            };
            wants.iter().zip(&half).map(of).collect()
        }

        fn run(&mut self, seat: SeatIndex, needs: &Needs) {
            let pages: Vec<usize> = match *needs {
                Needs::New { pages } => (0..pages).map(|i| (self.step * pages + i) % (1 << 16)).collect(),
                Needs::Of { hot, pages } => {
                    let mut all: Vec<usize> = (0..hot).collect();
                    (0..pages).map(|_| all.swap_remove(self.random.below(all.len()))).collect()
                }
            };
            let tables = &mut self.tables;
            tables.begin(seat, 0);
            let missed: Vec<_> =
                pages.iter().copied().filter(|&page| tables.need(seat, 0, 0, page).is_none()).collect();
            tables.fit(seat, 0, pages.len(), missed.len(), &mut |_| {});
            for page in missed {
                if tables.has_room(seat, 0) {
                    tables.insert(seat, 0, 0, page);
                } else {
                    tables.counters_mut(seat).streamed += 1;
                }
            }
        }
    }

    /// Five times what a step needs hold all of it.
    const LOCAL: Needs = Needs::Of { hot: 160, pages: 32 };
    const NEVER_AGAIN: Needs = Needs::New { pages: 64 };

    /// The more so where frames are lent: what they hit says what fewer would miss.
    #[test]
    fn frames_follow_the_miss_curve() {
        for extents in [9, 16, 64] {
            let (mut quotas, mut cache) =
                (Quotas::new(QuotaRule::Adaptive, extents, 1, 2), Cache::new(extents));
            let wants = [want(0, 1, 500), want(1, 2, 500)];
            let hits = cache.live(&mut quotas, &wants, &[LOCAL, NEVER_AGAIN], 200);
            assert_eq!(
                quotas.own,
                [5, 2],
                "{extents}: where hits flatten, nothing for whom more buys no hit"
            );
            assert_eq!(quotas.lent(), extents - 5 - 2);
            assert_eq!(quotas.granted.iter().sum::<u32>(), extents, "what nobody needs is lent");
            assert!(hits[0] > 0.99 && hits[1] == 0.0, "{extents}: {hits:?}");
        }
    }

    /// A request that had all frames to itself, most of them lent, keeps those that pay.
    #[test]
    fn who_needs_its_frames_keeps_them_when_others_come() {
        let (mut quotas, mut cache) = (Quotas::new(QuotaRule::Adaptive, 16, 1, 3), Cache::new(16));
        let first = want(0, 1, 500);
        let alone = cache.live(&mut quotas, &[first], &[LOCAL], 100);
        assert_eq!((&quotas.own[..], quotas.lent()), (&[5][..], 11), "{alone:?}");
        // Two that need five and six extents, which nothing but lent ones can give.
        let wants = [first, want(1, 5, 500), want(2, 6, 500)];
        let needs = [LOCAL, Needs::New { pages: 160 }, Needs::New { pages: 192 }];
        let hits = cache.live(&mut quotas, &wants, &needs, 3);
        assert!(hits[0] > 0.99, "at once: {hits:?}");
        let hits = cache.live(&mut quotas, &wants, &needs, 100);
        assert!(hits[0] > 0.99, "for good: {hits:?}");
        assert_eq!((&quotas.granted[..], quotas.lent()), (&[5, 5, 6][..], 0));
        assert_eq!(quotas.reclaimed(), 11);
    }

    /// What was measured with all frames says what fewer would have missed: as much as is missed when there are no more.
    #[test]
    fn ages_tell_what_fewer_frames_miss() {
        let measure = |extents: u32| {
            let (mut quotas, mut cache) =
                (Quotas::new(QuotaRule::Adaptive, extents, 1, 1), Cache::new(extents));
            let hits = cache.live(&mut quotas, &[want(0, 2, 500)], &[Needs::Of { hot: 320, pages: 50 }], 400);
            (quotas.curves[0], 1.0 - hits[0])
        };
        let (curve, _) = measure(12);
        for level in 0..5 {
            let (_, missed) = measure(2 * (level as u32 + 1));
            let told = curve.at(level);
            assert!((told - missed).abs() < 0.03, "level {level}: told {told}, missed {missed}");
        }
    }

    #[test]
    fn what_is_lent_is_taken_back() {
        let mut quotas = Quotas::new(QuotaRule::Adaptive, 100, 1, 3);
        let first = [want(0, 4, 400)];
        let mut cache = Cache::new(100);
        cache.live(&mut quotas, &first, &[NEVER_AGAIN], 100);
        assert_eq!(quotas.divide(&first, 0), [100]);
        assert_eq!((quotas.lent(), quotas.reclaimed()), (96, 0));
        let both = [want(0, 4, 400), want(2, 50, 60)];
        let granted = quotas.divide(&both, 0).to_vec();
        assert!(granted[1] >= 50, "mandatory frames come before lent ones: {granted:?}");
        let reclaimed = quotas.reclaimed();
        assert_eq!(reclaimed, u64::from(100 - granted[0]));
        // Who ends gives back of itself, and has nothing lent any more.
        quotas.release(SeatIndex(2));
        assert_eq!(quotas.divide(&first, 0), [100]);
        quotas.release(SeatIndex(0));
        assert_eq!((quotas.lent(), quotas.reclaimed()), (0, reclaimed));
    }

    /// Lent frames that turn out to be worth having are the request's own; nobody took them.
    #[test]
    fn what_becomes_its_own_was_not_taken_back() {
        let (mut quotas, mut cache) = (Quotas::new(QuotaRule::Adaptive, 16, 1, 1), Cache::new(16));
        cache.live(&mut quotas, &[want(0, 1, 500)], &[NEVER_AGAIN], 50);
        assert_eq!(quotas.lent(), 15);
        cache.live(&mut quotas, &[want(0, 1, 500)], &[LOCAL], 200);
        assert_eq!((quotas.lent(), quotas.reclaimed()), (11, 0));
    }

    #[test]
    fn who_came_first_is_served_first_and_the_rest_streams() {
        let mut quotas = Quotas::new(QuotaRule::Fixed(0), 10, 1, 3);
        let wants = [want(0, 6, 100), want(1, 6, 100), want(2, 4, 100)];
        assert_eq!(quotas.divide(&wants, 0), [6, 0, 4]);
        let mut fixed = Quotas::new(QuotaRule::Fixed(4), 60, 1, 2);
        assert_eq!(fixed.divide(&[want(0, 6, 20), want(1, 6, 100)], 0), [20, 30]);
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
        let mut shared = Quotas::new(QuotaRule::Shared, 10, 1, 3);
        assert_eq!(shared.divide(&[want(0, 6, 100), want(2, 1, 2)], 0), [10, 10]);
        assert_eq!((shared.lent(), shared.reclaimed()), (0, 0));
    }

    /// Whatever is asked for: as by search, no more than there is, no more than is useful, and everything in use or useless.
    #[test]
    fn divisions_are_sound() {
        let mut random = Random::new(5);
        let mut quotas = Quotas::new(QuotaRule::Adaptive, 64, 1, 4);
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
            let granted = quotas.divide(&wants, 0).to_vec();
            assert_eq!(granted, expected, "seed 5 round {round}: {wants:?}");
            let sum: u32 = granted.iter().sum();
            assert!(sum <= 64, "seed 5 round {round}: {granted:?} of {wants:?}");
            assert!(granted.iter().zip(&wants).all(|(g, w)| *g <= w.useful), "seed 5 round {round}");
            let sated = granted.iter().zip(&wants).all(|(g, w)| *g == w.useful);
            assert!(sum == 64 || sated, "seed 5 round {round}: {granted:?} of {wants:?} leave frames idle");
            let lent: u32 = quotas.curves.iter().map(|curve| curve.lent).sum();
            assert_eq!(quotas.lent(), lent, "seed 5 round {round}: what is lent is counted");
            for want in &wants {
                let c = &mut counters[want.seat.at()];
                c.hits += random.below(100) as u64;
                c.misses += random.below(100) as u64;
                let held = random.below(64 * EXTENT_FRAMES);
                c.hits_by_age[random.below(STAMPS)] += c.hits - c.hits_by_age.iter().sum::<u64>();
                quotas.observe(want.seat, c, held);
            }
            if random.below(20) == 0 {
                counters[1] = SeatCounters::default();
                quotas.release(SeatIndex(1));
            }
        }
    }
}
