//! Random candidates for [`admit`], compared with a naive model; and whole runs of steps, for what no single step shows.

use ops::Random;

use crate::{Candidate, admit};

/// By sorted lists: who is asked in which order, and how much room it may fill.
fn admit_naively(candidates: &[Candidate], extents: u32, limit: usize, max_skips: u32) -> Vec<bool> {
    let need = |at: &usize| u64::from(candidates[*at].need);
    let all = u64::from(extents);
    let mut picked: Vec<usize> = Vec::new();
    let ask = |at: usize, room: u64, picked: &mut Vec<usize>| {
        let sum: u64 = picked.iter().map(need).sum();
        if picked.is_empty() || (picked.len() < limit && sum.min(all) + need(&at) <= room) {
            picked.push(at);
        }
    };
    let (mut first, rest): (Vec<usize>, Vec<usize>) =
        (0..candidates.len()).partition(|at| candidates[*at].skips >= max_skips);
    first.sort_by_key(|at| (std::cmp::Reverse(candidates[*at].skips), *at));
    let less = all - all.div_ceil(8);
    let room = |at: usize| if candidates[at].ran_last_step { all } else { less };
    first.iter().for_each(|at| ask(*at, room(*at), &mut picked));
    let (ran, others): (Vec<usize>, Vec<usize>) =
        rest.into_iter().partition(|at| candidates[*at].ran_last_step);

    let newcomer = picked.iter().any(|at| !candidates[*at].ran_last_step);
    let together = picked.iter().map(need).sum::<u64>().min(all) + ran.iter().map(need).sum::<u64>();
    let room = if newcomer && together > all { less } else { all };
    ran.iter().for_each(|at| ask(*at, room, &mut picked));
    others.iter().for_each(|at| ask(*at, less, &mut picked));
    (0..candidates.len()).map(|at| picked.contains(&at)).collect()
}

#[test]
fn batches_are_sound() {
    let mut random = Random::new(11);
    let mut picked = Vec::new();
    for round in 0..20_000 {
        let extents = [0, 1, 7, 64, 1000, u32::MAX][random.below(6)];
        let largest =
            [1 + extents as usize / 20, 1 + extents as usize, 1 + 2 * extents as usize][random.below(3)];
        let max_skips = [0, 1, 5, 30][random.below(4)];
        let limit = [1, 2, 5, usize::MAX][random.below(4)];
        let candidate = |random: &mut Random| Candidate {
            need: u32::try_from(random.below(largest)).unwrap_or(u32::MAX),
            ran_last_step: random.below(2) == 0,
            skips: random.below(max_skips as usize + 4) as u32,
        };
        let candidates: Vec<Candidate> = (0..random.below(25)).map(|_| candidate(&mut random)).collect();
        admit(&candidates, extents, limit, max_skips, &mut picked);
        let what = format!("seed 11 round {round}: {extents} extents, {limit}, {max_skips}, {candidates:?}");
        assert_eq!(picked, admit_naively(&candidates, extents, limit, max_skips), "{what}");

        let goes = || candidates.iter().zip(&picked).filter(|(_, picked)| **picked).map(|(c, _)| c);
        let num = goes().count();
        assert!(candidates.is_empty() || num > 0, "{what}: nobody goes");
        assert!(num <= limit, "{what}: {num} go");
        let sum: u64 = goes().map(|c| u64::from(c.need)).sum();
        // Beside one that fills all there may be some that need nothing.
        let needy = goes().filter(|c| c.need > 0).count();
        assert!(sum <= u64::from(extents) || needy == 1, "{what}: {sum} extents");
        for (at, waits) in candidates.iter().enumerate() {
            if picked[at] || waits.skips < max_skips {
                continue;
            }
            // Those that come before it leave no room: nobody else's leaving would help.
            let before = |other: usize| (candidates[other].skips, at) > (waits.skips, other);
            let ahead = (0..candidates.len()).filter(|other| picked[*other] && before(*other));
            let ahead: Vec<u64> = ahead.map(|other| u64::from(candidates[other].need)).collect();
            let room = extents - if waits.ran_last_step { 0 } else { extents.div_ceil(8) };
            let fits = ahead.iter().sum::<u64>() + u64::from(waits.need) <= u64::from(room);
            assert!(
                !ahead.is_empty() && (ahead.len() == limit || !fits),
                "{what}: {at} waits for such as it could replace"
            );
        }
    }
}

/// Running requests over many steps.
struct Run {
    candidates: Vec<Candidate>,
    picked: Vec<bool>,
}

impl Run {
    fn new(needs: impl Iterator<Item = u32>) -> Self {
        let of = |need| Candidate { need, ran_last_step: false, skips: 0 };
        Run { candidates: needs.map(of).collect(), picked: Vec::new() }
    }

    fn step(&mut self, extents: u32, limit: usize, max_skips: u32) {
        admit(&self.candidates, extents, limit, max_skips, &mut self.picked);
        for (candidate, &picked) in self.candidates.iter_mut().zip(&self.picked) {
            candidate.ran_last_step = picked;
            candidate.skips = if picked { 0 } else { candidate.skips + 1 };
        }
    }
}

#[test]
fn nobody_rests_for_long() {
    let mut random = Random::new(12);
    for round in 0..300 {
        let extents = 1 + random.below(200) as u32;
        let largest = 1 + random.below(2 * extents as usize);
        let max_skips = random.below(40) as u32;
        let num = 1 + random.below(30);
        let wobbles = random.below(2) == 0;
        let mut run = Run::new((0..num).map(|_| random.below(largest) as u32));
        let bound = max_skips as usize + num;
        for step in 0..400 {
            let limit = if round % 3 == 0 { 1 + random.below(num) } else { usize::MAX };
            run.step(extents, limit, max_skips);
            let what = format!("seed 12 round {round} step {step}");
            let longest = run.candidates.iter().map(|c| c.skips as usize).max().unwrap_or(0);
            assert!(longest <= bound, "{what}: one of {num} rested for {longest} steps, {max_skips} at most");
            if wobbles {
                let at = random.below(run.candidates.len());
                run.candidates[at].need = random.below(largest) as u32;
            }
            if round % 2 == 0 && random.below(10) == 0 {
                // One ends, another one comes.
                let gone = random.below(run.candidates.len());
                run.candidates.remove(gone);
                let need = random.below(largest) as u32;
                run.candidates.push(Candidate { need, ran_last_step: false, skips: 0 });
            }
        }
    }
}

/// Needs that stay within an eighth of each other's: who takes part goes on to, until somebody was skipped too often, and then
/// there is one change at most.
#[test]
fn batches_do_not_flap() {
    let mut random = Random::new(13);
    for round in 0..300 {
        let extents = 64 + random.below(2000) as u32;
        let num = 2 + random.below(30);
        let largest = 8 + random.below(extents as usize / 2);
        let most: Vec<u32> = (0..num).map(|_| 8 + random.below(largest) as u32).collect();
        let max_skips = if round % 2 == 0 { u32::MAX } else { 20 };
        let mut run = Run::new(most.iter().copied());
        let mut before: Vec<bool> = Vec::new();
        let (mut forced, mut changes) = (0, 0);
        for step in 0..300 {
            for (candidate, &most) in run.candidates.iter_mut().zip(&most) {
                candidate.need = most - random.below(most as usize / 8 + 1) as u32;
            }
            let skips: Vec<u32> = run.candidates.iter().map(|c| c.skips).collect();
            run.step(extents, usize::MAX, max_skips);
            forced += usize::from((0..num).any(|at| run.picked[at] && skips[at] >= max_skips));
            let left = |at: &usize| before.get(*at).is_some_and(|ran| *ran) && !run.picked[*at];
            changes += usize::from((0..num).any(|at| left(&at)));
            let what = format!("seed 13 round {round} step {step}");
            assert!(
                changes <= forced,
                "{what}: {changes} times somebody left, and {forced} times one had to come"
            );
            before.clone_from(&run.picked);
        }
    }
}
