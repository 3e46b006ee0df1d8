//! Random operations on a [`KvCache`] and on a naive model of it, compared after each.
//!
//! The model keeps whole prefixes in a map instead of a tree of blocks, and finds the next victim by search. A `memory`
//! plays the device: every slot holds a digest of all that precedes it, written through the block table and read back
//! through it, so that a block in two places or with another prompt's content shows.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use ops::Random;

use crate::{Counts, KvCache, Sequence};

#[derive(Clone, Copy, Debug)]
enum Op {
    /// A new sequence takes its cached prefix.
    Start { family: usize, num_tokens: usize, salt: u64, shareable_tokens: usize },
    /// A sequence reserves and writes more of its tokens.
    Advance { pick: usize, num_tokens: usize },
    /// A sequence ends.
    Free { pick: usize },
    /// A sequence stops, to go on later.
    Suspend { pick: usize },
    /// It goes on.
    Resume { pick: usize },
    /// A sequence ends and its KV is worthless.
    Discard { pick: usize },
}

/// What the model gets wrong on purpose, to show that the comparison notices.
#[derive(Clone, Copy, PartialEq)]
enum Bug {
    None,
    EvictsNewest,
    MatchesWholePrompt,
    IgnoresSalt,
    ForgetsOwn,
}

/// A published prefix: (salt, who may find its last block, its tokens).
type Prefix = (u64, u64, Vec<u32>);

struct Published {
    users: usize,
    /// When its last user let go.
    released: u64,
}

#[derive(Clone)]
struct Identity {
    tokens: Vec<u32>,
    salt: u64,
    shareable_tokens: usize,
    owner: u64,
}

impl Identity {
    /// Who may find run `i`.
    fn owner_of(&self, i: usize, run_tokens: usize) -> u64 {
        if (i + 1) * run_tokens <= self.shareable_tokens { 0 } else { self.owner }
    }

    /// Its first `runs` runs.
    fn prefix(&self, runs: usize, run_tokens: usize) -> Prefix {
        (self.salt, self.owner_of(runs - 1, run_tokens), self.tokens[..runs * run_tokens].to_vec())
    }

    /// What the device holds at `position`.
    fn digest(&self, position: usize, run_tokens: usize) -> u64 {
        let mut hasher = DefaultHasher::new();
        (self.salt, self.owner_of(position / run_tokens, run_tokens)).hash(&mut hasher);
        self.tokens[..=position].hash(&mut hasher);
        hasher.finish()
    }
}

struct Live {
    id: Identity,
    kv: Sequence,
    num_written: usize,
    num_blocks: usize,
    num_published: usize,
}

/// How a sequence lets go of its blocks.
#[derive(Clone, Copy, PartialEq)]
enum End {
    Free,
    Suspend,
    Discard,
}

struct Fuzz {
    bug: Bug,
    page_tokens: usize,
    /// Blocks that are shared together.
    run_blocks: usize,
    num_blocks: usize,
    real: KvCache,
    live: Vec<Live>,
    suspended: Vec<Identity>,
    /// Shareable tokens of every sequence that was started, by owner.
    shareable: Vec<usize>,
    /// Tokens of their own that sequences found again.
    num_resumed: usize,
    published: BTreeMap<Prefix, Published>,
    num_evictions: u64,
    now: u64,
    memory: Vec<u64>,
}

impl Fuzz {
    fn new(bug: Bug, num_blocks: usize, page_tokens: usize, run_blocks: usize, hash_mask: u64) -> Self {
        let mut real = KvCache::new(num_blocks, page_tokens, run_blocks, 8);
        real.weaken_hash(hash_mask);
        Fuzz {
            bug,
            page_tokens,
            run_blocks,
            num_blocks,
            real,
            live: Vec::new(),
            suspended: Vec::new(),
            shareable: Vec::new(),
            num_resumed: 0,
            published: BTreeMap::new(),
            num_evictions: 0,
            now: 0,
            memory: vec![0; num_blocks * page_tokens],
        }
    }

    fn draw(&self, random: &mut Random) -> Op {
        let start = self.live.is_empty() || random.below(8) == 0;
        if start {
            return Op::Start {
                family: random.below(4),
                num_tokens: 1 + random.below(self.num_blocks * self.page_tokens / 2),
                salt: u64::from(random.below(8) == 0),
                shareable_tokens: if random.below(3) == 0 { random.below(64) } else { usize::MAX },
            };
        }
        let pick = random.below(self.live.len());
        match random.below(24) {
            0..2 => Op::Free { pick },
            2..4 => Op::Suspend { pick },
            4 => Op::Discard { pick },
            5..7 if !self.suspended.is_empty() => Op::Resume { pick: random.below(self.suspended.len()) },
            _ => Op::Advance { pick, num_tokens: 1 + random.below(3 * self.page_tokens) },
        }
    }

    fn apply(&mut self, op: Op) {
        match op {
            Op::Start { family, num_tokens, salt, shareable_tokens } => {
                self.shareable.push(shareable_tokens);
                let owner = self.shareable.len() as u64;
                // Families share long prefixes and differ from a point of their own on.
                let token = |i| {
                    if i < 5 * self.page_tokens { (family % 2) as u32 } else { (family * 7 + i % 3) as u32 }
                };
                let tokens = (0..num_tokens).map(token).collect();
                self.start(Identity { tokens, salt, shareable_tokens, owner });
            }
            Op::Resume { pick } => {
                let id = self.suspended.swap_remove(pick);
                self.start(id);
            }
            Op::Advance { pick, num_tokens } => self.advance(pick, num_tokens),
            Op::Free { pick } => self.free(pick, End::Free),
            Op::Suspend { pick } => self.free(pick, End::Suspend),
            Op::Discard { pick } => self.free(pick, End::Discard),
        }
        self.compare();
    }

    fn start(&mut self, id: Identity) {
        let Identity { tokens, salt, shareable_tokens, owner } = &id;
        let mut kv = Sequence::new(*salt, *shareable_tokens, *owner, self.num_blocks);
        let matched = self.real.match_prefix(&mut kv, tokens);

        let whole = usize::from(self.bug == Bug::MatchesWholePrompt);
        let limit = tokens.len() - 1 + whole;
        let limit = if self.bug == Bug::ForgetsOwn { limit.min(*shareable_tokens) } else { limit };
        let mut blocks = 0;
        while (blocks + self.run_blocks) * self.page_tokens <= limit {
            let mut prefix = id.prefix(blocks / self.run_blocks + 1, self.run_blocks * self.page_tokens);
            prefix.0 = if self.bug == Bug::IgnoresSalt { 0 } else { prefix.0 };
            let Some(published) = self.published.get_mut(&prefix) else { break };
            published.users += 1;
            blocks += self.run_blocks;
        }
        assert_eq!(matched, blocks * self.page_tokens, "matched prefix");
        self.num_resumed += matched.saturating_sub(*shareable_tokens);
        self.live.push(Live { id, kv, num_written: matched, num_blocks: blocks, num_published: blocks });
    }

    fn counts(&self) -> Counts {
        let shared = self.run_blocks * self.published.values().filter(|p| p.users > 0).count();
        let private: usize = self.live.iter().map(|l| l.num_blocks - l.num_published).sum();
        let cached = self.run_blocks * self.published.len() - shared;
        Counts { free: self.num_blocks - shared - private - cached, in_use: shared + private, cached }
    }

    fn advance(&mut self, pick: usize, num_tokens: usize) {
        let counts = self.counts();
        let live = &mut self.live[pick];
        let target = (live.num_written + num_tokens).min(live.id.tokens.len());
        let wanted = target.div_ceil(self.page_tokens).saturating_sub(live.num_blocks);
        let reserved = self.real.reserve(&mut live.kv, target);
        assert_eq!(reserved.is_ok(), wanted <= counts.free + counts.cached, "{reserved:?}");
        if reserved.is_err() {
            return;
        }
        live.num_blocks += wanted;
        for _ in (counts.free..wanted).step_by(self.run_blocks) {
            let unused = self.published.iter().filter(|(_, p)| p.users == 0);
            let victim = match self.bug {
                Bug::EvictsNewest => unused.max_by_key(|(_, p)| p.released),
                _ => unused.min_by_key(|(_, p)| p.released),
            };
            let victim = victim.expect("the model has as many cached blocks").0.clone();
            self.published.remove(&victim);
            self.num_evictions += self.run_blocks as u64;
        }
        for position in live.num_written..target {
            let block = live.kv.blocks()[position / self.page_tokens];
            let slot = block.at() * self.page_tokens + position % self.page_tokens;
            self.memory[slot] = live.id.digest(position, self.run_blocks * self.page_tokens);
        }
        self.real.advance(&mut live.kv, &live.id.tokens[..target], usize::MAX);
        live.num_written = target;
        let run_tokens = self.run_blocks * self.page_tokens;
        for i in live.num_published / self.run_blocks..target / run_tokens {
            let prefix = live.id.prefix(i + 1, run_tokens);
            self.published.entry(prefix).or_insert(Published { users: 0, released: 0 }).users += 1;
            live.num_published += self.run_blocks;
        }
    }

    fn free(&mut self, pick: usize, end: End) {
        let mut live = self.live.swap_remove(pick);
        match end {
            End::Free => self.real.free(&mut live.kv),
            End::Suspend => self.real.suspend(&mut live.kv),
            End::Discard => self.real.discard(&mut live.kv),
        }
        for i in (0..live.num_published / self.run_blocks).rev() {
            let prefix = live.id.prefix(i + 1, self.run_blocks * self.page_tokens);
            let longer = |other: &Prefix| other.0 == prefix.0 && other.2.len() > prefix.2.len();
            // A sequence's own blocks follow its shareable ones.
            let passes = |other: &Prefix| match prefix.1 {
                0 => other.1 == 0 || prefix.2.len() <= self.shareable[other.1 as usize - 1],
                owner => other.1 == owner,
            };
            let continues = |other: &Prefix| longer(other) && passes(other) && other.2.starts_with(&prefix.2);
            let is_continued = self.published.keys().any(continues);
            let published = self.published.get_mut(&prefix).expect("a used prefix is published");
            published.users -= 1;
            if published.users > 0 {
                continue;
            }
            let forget = match end {
                End::Free => prefix.1 != 0 && !is_continued,
                End::Suspend => false,
                End::Discard => !is_continued,
            };
            if forget {
                self.published.remove(&prefix);
            } else {
                self.now += 1;
                published.released = self.now;
            }
        }
        if end == End::Suspend {
            self.suspended.push(live.id);
        }
    }

    fn compare(&self) {
        self.real.check(self.live.iter().map(|l| &l.kv));
        assert_eq!(self.real.counts(), self.counts());
        assert_eq!(self.real.num_evictions(), self.num_evictions);
        for live in &self.live {
            assert_eq!(live.kv.num_tokens(), live.num_written);
            assert_eq!(live.kv.blocks().len(), live.num_blocks);
            // The digest of a position covers all before it, so the last one of each block is enough.
            let ends = (1..=live.num_written).filter(|n| n % self.page_tokens == 0 || *n == live.num_written);
            for n in ends {
                let block = live.kv.blocks()[(n - 1) / self.page_tokens];
                let slot = block.at() * self.page_tokens + (n - 1) % self.page_tokens;
                assert_eq!(
                    self.memory[slot],
                    live.id.digest(n - 1, self.run_blocks * self.page_tokens),
                    "KV of its own tokens"
                );
            }
        }
    }
}

/// Returns how many evictions, shared tokens and tokens found again the run has seen, so that a test can tell an idle fuzz.
fn fuzz(bug: Bug, seed: u64, num_ops: usize, hash_mask: u64) -> (u64, usize, usize) {
    println!("seed {seed}");
    let mut random = Random::new(seed);
    let num_blocks = 8 + random.below(60);
    let page_tokens = [1, 4, 8][random.below(3)];
    // A bug shows first in what the canaries expect where runs are single blocks.
    let run_blocks = if bug == Bug::None { [1, 1, 2, 3][random.below(4)] } else { 1 };
    let mut fuzz = Fuzz::new(bug, num_blocks, page_tokens, run_blocks, hash_mask);
    let mut num_shared = 0;
    for _ in 0..num_ops {
        let op = fuzz.draw(&mut random);
        let before = fuzz.live.len();
        fuzz.apply(op);
        if fuzz.live.len() > before {
            num_shared += fuzz.live[before].num_written;
        }
    }
    while !fuzz.live.is_empty() {
        fuzz.apply(Op::Free { pick: 0 });
    }
    assert_eq!(fuzz.real.counts().in_use, 0);
    (fuzz.num_evictions, num_shared, fuzz.num_resumed)
}

#[test]
fn agrees_with_the_model() {
    let seen: Vec<_> =
        (0..24 * ops::conformance::seed_factor()).map(|seed| fuzz(Bug::None, seed, 2000, u64::MAX)).collect();
    assert!(seen.iter().map(|s| s.0).sum::<u64>() > 1000, "blocks were evicted: {seen:?}");
    assert!(seen.iter().map(|s| s.1).sum::<usize>() > 1000, "prefixes were shared: {seen:?}");
    assert!(seen.iter().map(|s| s.2).sum::<usize>() > 500, "sequences went on: {seen:?}");
}

#[test]
fn agrees_with_the_model_when_hashes_collide() {
    for seed in 100..108 {
        fuzz(Bug::None, seed, 1000, 0b11);
    }
}

#[test]
#[should_panic(expected = "matched prefix")]
fn canary_wrong_victim_is_noticed() {
    for seed in 0..24 {
        fuzz(Bug::EvictsNewest, seed, 2000, u64::MAX);
    }
}

#[test]
#[should_panic(expected = "matched prefix")]
fn canary_whole_prompt_match_is_noticed() {
    for seed in 0..24 {
        fuzz(Bug::MatchesWholePrompt, seed, 2000, u64::MAX);
    }
}

#[test]
#[should_panic(expected = "matched prefix")]
fn canary_forgotten_tokens_are_noticed() {
    for seed in 0..24 {
        fuzz(Bug::ForgetsOwn, seed, 2000, u64::MAX);
    }
}

#[test]
#[should_panic(expected = "matched prefix")]
fn canary_ignored_salt_is_noticed() {
    for seed in 0..24 {
        fuzz(Bug::IgnoresSalt, seed, 2000, u64::MAX);
    }
}
