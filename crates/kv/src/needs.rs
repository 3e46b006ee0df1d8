//! Who takes part in a step: those whose working sets fit the cache frames together.
//!
//! SparseServe's working-set-aware batch size control: a request needs the frames that hold what it selected in its last steps,
//! and a step takes requests, first-fit in order of arrival, as long as their needs fit. Too many, and each step evicts what the
//! next one fetches again. Its rule may pass over a request for ever and change the batch from step to step. Here:
//!
//! * Whoever *rests*, who runs but takes no part in a step, is *skipped*. Who was skipped `max_skips` times goes first, the most
//!   skipped before others, and the first of all goes whatever it needs: what does not fit passes through in waves. So nobody rests
//!   for more than `max_skips` steps and one for each other request.
//! * Who took part in the last step goes on before others come back, and who comes back beside others must leave an eighth of the
//!   frames free. So needs that change by less than that change no batch. Where somebody who was skipped too often puts others out,
//!   those who stay leave as much, or it would be the next one to go.
//!
//! Invariant: somebody takes part. What several need together, there is.

use ops::residency::EXTENT_FRAMES;
use ops::tally::WorkingSet;

/// Of all extents, the part that must stay free when somebody comes back: one in so many.
const FREE: u32 = 8;

/// Extents per layer that hold what a request goes on to need, out of what it selected: `set`, counted over `window` steps.
///
/// `mandatory` extents hold what one step selects, and are all that is known of a request until so many steps were seen; its whole
/// context is in `useful` ones.
pub fn extents_needed(set: WorkingSet, window: u32, mandatory: u32, useful: u32) -> u32 {
    let mut need = mandatory;
    if set.steps >= window && set.layers > 0 {
        let extents = set.pages.div_ceil(u64::from(set.layers) * EXTENT_FRAMES as u64);
        need = need.max(u32::try_from(extents).unwrap_or(u32::MAX));
    }
    need.min(useful)
}

/// A running request that may take part in a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Candidate {
    /// Extents per layer that it needs.
    pub need: u32,
    /// Whether it took part in the last step.
    pub ran_last_step: bool,
    /// Steps that it has rested since it last took part.
    pub skips: u32,
}

/// Chooses who takes part in a step, out of `candidates` in order of arrival: `picked`, made as long, says of each whether it does.
///
/// They share `extents` extents per layer, and are no more than `limit`, which counts as one if it is none. Whatever is asked for, one
/// of them goes, if there is one. Allocates nothing where `picked` has room for them.
pub fn admit(candidates: &[Candidate], extents: u32, limit: usize, max_skips: u32, picked: &mut Vec<bool>) {
    picked.clear();
    picked.resize(candidates.len(), false);
    let mut batch = Batch { picked, num: 0, limit: limit.max(1), used: 0, extents };
    let starves = |c: &Candidate| c.skips >= max_skips;

    let most = extents - extents.div_ceil(FREE);
    let room = |c: &Candidate| if c.ran_last_step { extents } else { most };

    let mut comes_back = false;
    let mut last = None;
    while let Some(at) = next_starving(candidates, max_skips, last) {
        last = Some(at);
        let candidate = &candidates[at];
        comes_back |= batch.take(at, candidate.need, room(candidate)) && !candidate.ran_last_step;
    }

    let stays = |c: &&Candidate| c.ran_last_step && !starves(c);
    let staying: u64 = candidates.iter().filter(stays).map(|c| u64::from(c.need)).sum();
    let puts_out = comes_back && u64::from(batch.used) + staying > u64::from(extents);
    for (at, candidate) in candidates.iter().enumerate().filter(|(_, c)| stays(c)) {
        batch.take(at, candidate.need, if puts_out { most } else { extents });
    }

    for (at, candidate) in candidates.iter().enumerate() {
        if !candidate.ran_last_step && !starves(candidate) {
            batch.take(at, candidate.need, most);
        }
    }
}

/// Of those who were skipped at least `max_skips` times the one after `last`: the most skipped first, of equal ones the senior.
fn next_starving(candidates: &[Candidate], max_skips: u32, last: Option<usize>) -> Option<usize> {
    let starving = candidates.iter().enumerate().filter(|(_, c)| c.skips >= max_skips);
    let after = starving.filter(|&(at, c)| {
        last.is_none_or(|last| {
            let before = candidates[last].skips;
            c.skips < before || c.skips == before && at > last
        })
    });
    // Of equal ones the last is the largest, so they are met from the end.
    after.rev().max_by_key(|(_, c)| c.skips).map(|(at, _)| at)
}

/// Who was picked so far.
struct Batch<'a> {
    picked: &'a mut [bool],
    num: usize,
    limit: usize,
    used: u32,
    extents: u32,
}

impl Batch<'_> {
    /// Picks the candidate `at`, whose need is `need`, if it fits `room` with those that were picked. The first one always does.
    fn take(&mut self, at: usize, need: u32, room: u32) -> bool {
        let fits = self.used.checked_add(need).is_some_and(|sum| sum <= room);
        if self.num == self.limit || self.num > 0 && !fits {
            return false;
        }
        self.picked[at] = true;
        self.num += 1;
        self.used = self.used.saturating_add(need).min(self.extents);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn needs_follow_the_working_set() {
        let set = |pages, layers, steps| WorkingSet { pages, layers, steps };
        for (set, mandatory, useful, wanted) in [
            // Not known yet, or nothing was selected.
            (set(1 << 20, 4, 11), 3, 100, 3),
            (set(0, 0, 12), 3, 100, 3),
            (set(0, 0, 0), 3, 2, 2),
            // Per layer, rounded up to extents.
            (set(4 * 32 * 5, 4, 12), 3, 100, 5),
            (set(4 * 32 * 5 + 1, 4, 12), 3, 100, 6),
            (set(32, 1, 12), 0, 100, 1),
            // Between one step's selection and everything.
            (set(4 * 32, 4, 12), 3, 100, 3),
            (set(u64::MAX, 1, 12), 3, 100, 100),
        ] {
            assert_eq!(
                extents_needed(set, 12, mandatory, useful),
                wanted,
                "{set:?}, {mandatory} to {useful}"
            );
        }
    }

    const MAX_SKIPS: u32 = 10;

    /// Each candidate as `need`, `+` if it took part in the last step, and how often it was skipped.
    fn check(extents: u32, limit: usize, candidates: &[(u32, bool, u32)], wanted: &[usize]) {
        let of = |&(need, ran_last_step, skips): &(u32, bool, u32)| Candidate { need, ran_last_step, skips };
        let candidates: Vec<Candidate> = candidates.iter().map(of).collect();
        let mut picked = Vec::new();
        admit(&candidates, extents, limit, MAX_SKIPS, &mut picked);
        let picked: Vec<usize> = (0..picked.len()).filter(|&at| picked[at]).collect();
        assert_eq!(picked, wanted, "{extents} extents, {limit} at most: {candidates:?}");
    }

    const ALL: usize = usize::MAX;

    #[test]
    fn first_fit_in_order_of_arrival() {
        check(80, ALL, &[], &[]);
        check(80, ALL, &[(40, true, 0), (50, true, 0), (40, true, 0), (1, true, 0)], &[0, 2]);
        // Nobody but the first fits, and it does not.
        check(80, ALL, &[(90, true, 0), (90, true, 0)], &[0]);
        check(80, ALL, &[(u32::MAX, false, 0), (u32::MAX, false, 0), (0, false, 0)], &[0]);
        check(0, ALL, &[(3, false, 0), (3, true, 0)], &[1]);
    }

    #[test]
    fn who_runs_goes_on_and_who_comes_back_needs_room() {
        check(80, ALL, &[(40, false, 1), (40, true, 0), (40, true, 0)], &[1, 2]);
        check(80, ALL, &[(31, false, 1), (40, true, 0), (30, false, 0)], &[1, 2]);
        // With nobody beside it, none is needed.
        check(80, ALL, &[(75, false, 1), (20, false, 1)], &[0]);
    }

    #[test]
    fn who_was_skipped_too_often_goes_first() {
        // The most skipped one, with whoever fits beside it.
        check(80, ALL, &[(40, true, 0), (60, false, 10), (40, false, 11), (30, false, 10)], &[2, 3]);
        // Of equal ones the senior.
        check(80, ALL, &[(40, true, 0), (60, false, 10), (50, false, 10)], &[1]);
        // Whatever it needs.
        check(80, ALL, &[(40, true, 0), (100, false, 10), (10, false, 9)], &[1]);
        // Where all fit, nobody has to go; else there is to be room.
        check(80, ALL, &[(40, true, 0), (30, true, 0), (10, false, 10)], &[0, 1, 2]);
        check(80, ALL, &[(40, true, 0), (30, true, 0), (8, true, 0), (10, false, 10)], &[0, 2, 3]);
    }

    #[test]
    fn no_more_than_the_limit() {
        let candidates = [(1, true, 0), (1, true, 0), (1, false, 10), (1, false, 3)];
        check(80, 0, &candidates, &[2]);
        check(80, 1, &candidates, &[2]);
        check(80, 2, &candidates, &[0, 2]);
        check(80, 3, &candidates, &[0, 1, 2]);
        check(80, 4, &candidates, &[0, 1, 2, 3]);
    }
}
