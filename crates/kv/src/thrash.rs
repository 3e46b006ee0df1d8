//! How many requests may take part in a step, where their needs were estimated wrong.
//!
//! Working sets are estimates. Where they are too small, a step waits for pages longer than it computes: it *thrashes*. Then fewer
//! requests take part, until there is next to nothing to wait for; from there on their number rises by one at a time. One that
//! turns out to be too many goes again by itself, and the next is tried after twice as long. So at steady load the limit moves by one.

/// Of a new step beside what is known of those before: one part in so many.
const SMOOTHING: i64 = 4;

/// Steps after a change of the limit that say nothing of the new one, for those who come back must fetch what they need first.
const SETTLE: u32 = 8;

/// Steps in a row with little to wait for, after which one more may take part.
const PATIENCE: u32 = 16;

/// The same where one more was too many again and again.
const PATIENCE_MAX: u32 = 256;

/// Watches how long steps wait for pages, and limits how many requests take part in one.
#[derive(Clone, Debug)]
pub struct Thrash {
    limit: usize,
    /// The most that ever took part.
    most: usize,
    /// Smoothed times of a step in nanoseconds, waiting and not; `None` after a change.
    waited: Option<i64>,
    computed: Option<i64>,
    /// Steps since the last change of the limit.
    steps: u32,
    /// Steps in a row with little to wait for.
    calm: u32,
    patience: u32,
    /// The last change let one more in.
    rose: bool,
}

impl Default for Thrash {
    fn default() -> Self {
        Thrash {
            limit: usize::MAX,
            most: 0,
            waited: None,
            computed: None,
            steps: 0,
            calm: 0,
            patience: PATIENCE,
            rose: false,
        }
    }
}

impl Thrash {
    /// How many requests may take part in a step, at least one; `usize::MAX` where nothing is known against any number.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Notes a step in which `num_requests` took part, that waited for the link for `waited_ns` and took `computed_ns` without that.
    pub fn observe(&mut self, waited_ns: u64, computed_ns: u64, num_requests: usize) {
        self.most = self.most.max(num_requests);
        // One alone waits for as long as it must, and that says nothing of several.
        let waited_ns = if num_requests > 1 { waited_ns } else { waited_ns.min(computed_ns) };
        let waited = smooth(&mut self.waited, waited_ns);
        let computed = smooth(&mut self.computed, computed_ns);
        self.steps = self.steps.saturating_add(1);
        if self.steps <= SETTLE {
            return;
        }
        self.calm = if waited < computed / 4 { self.calm + 1 } else { 0 };
        if waited > computed && num_requests > 1 {
            self.lower(num_requests);
        } else if self.limit < usize::MAX && self.calm >= if self.rose { PATIENCE } else { self.patience } {
            self.raise();
        }
    }

    fn lower(&mut self, num_requests: usize) {
        if self.rose && num_requests == self.limit {
            self.patience = (2 * self.patience).min(PATIENCE_MAX);
            self.change(num_requests - 1);
        } else {
            self.patience = PATIENCE;
            self.change((num_requests * 3 / 4).max(1));
        }
        self.rose = false;
    }

    fn raise(&mut self) {
        if self.rose {
            // The one before was not too many.
            self.patience = PATIENCE;
        }
        self.change(if self.limit < self.most { self.limit + 1 } else { usize::MAX });
        self.rose = true;
    }

    fn change(&mut self, limit: usize) {
        self.limit = limit;
        (self.waited, self.computed) = (None, None);
        (self.steps, self.calm) = (0, 0);
    }
}

/// Adds a time to an average, and returns that.
fn smooth(average: &mut Option<i64>, ns: u64) -> i64 {
    let ns = i64::try_from(ns).unwrap_or(i64::MAX);
    let now = average.map_or(ns, |before| before + (ns - before) / SMOOTHING);
    *average = Some(now);
    now
}

#[cfg(test)]
mod tests {
    use ops::Random;

    use super::*;

    const COMPUTED_NS: u64 = 30_000_000;

    /// Requests that fetch next to nothing up to so many, and beyond that `each` per cent of a step for each one more.
    struct Load {
        running: usize,
        knee: usize,
        each: u64,
        /// Times are off by as many per cent, by lot.
        noise: usize,
        random: Random,
    }

    impl Load {
        fn step(&mut self, thrash: &mut Thrash) {
            let batch = self.running.min(thrash.limit());
            let over = batch.saturating_sub(self.knee) as u64;
            let about = |ns: u64, random: &mut Random| {
                ns * (100 - self.noise + random.below(2 * self.noise + 1)) as u64 / 100
            };
            let waited = about(COMPUTED_NS / 20 + COMPUTED_NS * self.each * over / 100, &mut self.random);
            thrash.observe(waited, about(COMPUTED_NS, &mut self.random), batch);
        }
    }

    #[test]
    fn without_waiting_there_is_no_limit() {
        let mut thrash = Thrash::default();
        let mut load = Load { running: 50, knee: 50, each: 0, noise: 20, random: Random::new(1) };
        (0..1000).for_each(|_| load.step(&mut thrash));
        assert_eq!(thrash.limit(), usize::MAX);
        // One alone may wait as long as it must, and nothing follows from no time at all.
        (0..100).for_each(|_| thrash.observe(u64::MAX, 1, 1));
        (0..100).for_each(|_| thrash.observe(0, 0, 9));
        assert_eq!(thrash.limit(), usize::MAX);
    }

    #[test]
    fn the_limit_settles_at_the_knee() {
        let mut random = Random::new(2);
        for case in 0..300 {
            let knee = 1 + random.below(40);
            let running = knee + 1 + random.below(100);
            let each = 3 + random.below(300) as u64;
            // The largest number that does not thrash, and the smallest that waits too long for one more to come.
            let most = (knee..running).find(|b| 5 + each * (b + 1 - knee) as u64 > 100).unwrap_or(running);
            let least = (knee..running).find(|b| 5 + each * (*b - knee) as u64 >= 25).unwrap_or(running);
            let noise = random.below(6);
            let what = format!("seed 2 case {case}: knee {knee} of {running}, {each} % each, noise {noise}");
            let mut thrash = Thrash::default();
            let mut load = Load { running, knee, each, noise, random: Random::keyed(2, case) };
            let mut seen = Vec::new();
            for step in 0..8000 {
                load.step(&mut thrash);
                if step >= 700 {
                    seen.push(thrash.limit().min(running));
                }
            }
            let (low, high) = (*seen.iter().min().unwrap(), *seen.iter().max().unwrap());
            // Between the two, or where three quarters of too many came to. Noise moves both.
            let slack = 1 + most * noise / 50;
            assert!(low + slack >= least.min(most * 3 / 4), "{what}: {low}..={high} of {least} to {most}");
            assert!(high <= most + slack, "{what}: {low}..={high} of {least} to {most}");
            assert!(high - low <= 2, "{what}: {low}..={high} at steady load");
            let thrashing = seen.iter().filter(|b| **b > most + slack - 1).count();
            assert!(thrashing < seen.len() / 8, "{what}: {thrashing} steps of {} thrash", seen.len());
        }
    }

    #[test]
    fn a_lighter_load_ends_the_limit() {
        let mut random = Random::new(3);
        for case in 0..100 {
            let knee = 1 + random.below(20);
            let what = format!("seed 3 case {case}: knee {knee} of 40");
            let mut thrash = Thrash::default();
            let mut load = Load { running: 40, knee, each: 100, noise: 5, random: Random::keyed(3, case) };
            (0..500 + random.below(3000)).for_each(|_| load.step(&mut thrash));
            let limit = thrash.limit();
            assert!(limit <= knee + 2, "{what}: {limit}");
            // Larger caches, or shorter contexts.
            load.knee = 60;
            let steps = (0..).take_while(|_| {
                load.step(&mut thrash);
                thrash.limit() < usize::MAX
            });
            let bound = (PATIENCE_MAX + (41 - limit as u32) * (PATIENCE + SETTLE) + SETTLE) as usize;
            assert!(steps.take(bound + 1).count() <= bound, "{what}: from {limit}");
            // And a heavier one is seen at once.
            load.knee = knee;
            (0..9 * (SETTLE + 1)).for_each(|_| load.step(&mut thrash));
            assert!(thrash.limit() <= knee + 2, "{what}: {} again", thrash.limit());
        }
    }

    #[test]
    fn never_less_than_one() {
        let mut thrash = Thrash::default();
        let mut limits = Vec::new();
        for _ in 0..10 * (SETTLE + 1) {
            thrash.observe(COMPUTED_NS * 2, COMPUTED_NS, thrash.limit().min(20));
            limits.push(thrash.limit());
        }
        limits.dedup();
        assert_eq!(limits, [usize::MAX, 15, 11, 8, 6, 4, 3, 2, 1]);
    }
}
