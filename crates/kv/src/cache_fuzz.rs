//! Random operations on a [`KvCache`] and on a naive model of it, compared after each.
//!
//! The model keeps whole prefixes in a map instead of a tree of blocks, and finds the next victim by search. A `memory`
//! plays the device: every slot holds a digest of all that precedes it, written through the block table and read back
//! through it, so that a block in two places or with another prompt's content shows.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};

use ops::{Random, SeatIndex};

use crate::prefix::Owner;
use crate::{Counts, KvCache, Sequence};

#[derive(Clone, Copy, Debug)]
enum Op {
    /// A new sequence takes its cached prefix.
    Start { family: usize, num_tokens: usize, salt: u64, shareable_tokens: usize, kind: Option<(u64, usize)> },
    /// Somebody goes on from what a sequence had when it ended.
    Turn { pick: usize, more: usize, same_kind: bool },
    /// A sequence reserves and writes more of its tokens, all but the last `unsaved` of which are in DRAM then.
    Advance { pick: usize, num_tokens: usize, unsaved: usize },
    /// A sequence without a seat takes one.
    Sit { pick: usize },
    /// Somebody asks which seats were left.
    Left,
    /// A sequence ends, and may leave what it has to its kind.
    Free { pick: usize, hands_on: bool },
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
    IgnoresKind,
    ForgetsOwn,
    PublishesUnsaved,
    TakesHighestSeat,
}

/// A published prefix: (salt, who may find each of its runs, its tokens).
type Prefix = (u64, Vec<Owner>, Vec<u32>);

struct Published {
    users: usize,
    /// When its last user let go.
    released: u64,
    /// What the device holds in its last run.
    content: Vec<u64>,
}

#[derive(Clone)]
struct Identity {
    tokens: Vec<u32>,
    salt: u64,
    shareable_tokens: usize,
    owner: u64,
    kind: Option<(u64, usize)>,
}

struct Live {
    id: Identity,
    kv: Sequence,
    /// Who may find its published runs.
    owners: Vec<Owner>,
    /// Runs that it found and everybody may find, where it goes on from others.
    common: usize,
    /// What the device holds at each position.
    content: Vec<u64>,
    num_written: usize,
    num_blocks: usize,
    num_published: usize,
    /// Tokens that are in DRAM; all of them in unified memory.
    num_saved: usize,
}

impl Live {
    /// Its first `runs` runs.
    fn prefix(&self, runs: usize, run_tokens: usize) -> Prefix {
        (self.id.salt, self.owners[..runs].to_vec(), self.id.tokens[..runs * run_tokens].to_vec())
    }

    /// Whose a run is that it computes.
    fn owner_of(&self, run: usize, run_tokens: usize) -> Owner {
        let for_all = run < self.common && (run + 1) * run_tokens <= self.id.shareable_tokens;
        if for_all { Owner::All } else { Owner::One(self.id.owner) }
    }
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
    /// Whether saving takes its time.
    tiered: bool,
    free_seats: BTreeSet<SeatIndex>,
    /// In the order in which they were left.
    left_seats: Vec<SeatIndex>,
    num_seated: usize,
    live: Vec<Live>,
    suspended: Vec<Identity>,
    /// The last ones.
    ended: Vec<Identity>,
    num_owners: u64,
    /// Tokens of their own and of their kind that sequences found.
    num_resumed: usize,
    num_of_kind: usize,
    published: BTreeMap<Prefix, Published>,
    num_evictions: u64,
    now: u64,
    memory: Vec<u64>,
}

impl Fuzz {
    fn new(bug: Bug, random: &mut Random, hash_mask: u64) -> Self {
        let num_blocks = 8 + random.below(60);
        let page_tokens = [1, 4, 8][random.below(3)];
        // A bug shows first in what the canaries expect where runs are single blocks.
        let run_blocks = if bug == Bug::None { [1, 1, 2, 3][random.below(4)] } else { 1 };
        let num_seats = 1 + random.below(8);
        let tiered = random.below(2) == 0;
        let mut real = KvCache::new(num_blocks, page_tokens, run_blocks, num_seats);
        real.weaken_hash(hash_mask);
        Fuzz {
            bug,
            page_tokens,
            run_blocks,
            num_blocks,
            real,
            tiered,
            free_seats: (0..num_seats as u32).map(SeatIndex).collect(),
            left_seats: Vec::new(),
            num_seated: 0,
            live: Vec::new(),
            suspended: Vec::new(),
            ended: Vec::new(),
            num_owners: 0,
            num_resumed: 0,
            num_of_kind: 0,
            published: BTreeMap::new(),
            num_evictions: 0,
            now: 0,
            memory: vec![0; num_blocks * page_tokens],
        }
    }

    fn draw(&self, random: &mut Random) -> Op {
        let kind = (random.below(2) == 0).then(|| {
            (random.below(2) as u64, if random.below(3) == 0 { random.below(99) } else { usize::MAX })
        });
        let start = self.live.is_empty() || random.below(8) == 0;
        if start && !self.ended.is_empty() && random.below(2) == 0 {
            let pick = random.below(self.ended.len());
            let same_kind = random.below(4) > 0;
            return Op::Turn { pick, more: random.below(3 * self.page_tokens), same_kind };
        }
        if start {
            return Op::Start {
                family: random.below(4),
                num_tokens: 1 + random.below(self.num_blocks * self.page_tokens / 2),
                salt: u64::from(random.below(8) == 0),
                shareable_tokens: if random.below(2) == 0 { random.below(64) } else { usize::MAX },
                kind,
            };
        }
        let pick = random.below(self.live.len());
        match random.below(31) {
            26..29 => Op::Sit { pick },
            29 => Op::Left,
            // Soon, before others take its blocks.
            30 if !self.suspended.is_empty() => Op::Resume { pick: self.suspended.len() - 1 },
            0..4 => Op::Free { pick, hands_on: random.below(3) > 0 },
            4..6 => Op::Suspend { pick },
            6 => Op::Discard { pick },
            7..9 if !self.suspended.is_empty() => Op::Resume { pick: random.below(self.suspended.len()) },
            _ => Op::Advance {
                pick,
                num_tokens: 1 + random.below(3 * self.page_tokens),
                unsaved: random.below(3) * random.below(1 + self.page_tokens * self.run_blocks),
            },
        }
    }

    fn apply(&mut self, op: Op) {
        match op {
            Op::Start { family, num_tokens, salt, shareable_tokens, kind } => {
                self.num_owners += 1;
                let owner = self.num_owners;
                // Families share long prefixes and differ from a point of their own on.
                let token = |i| {
                    if i < 5 * self.page_tokens { (family % 2) as u32 } else { (family * 7 + i % 3) as u32 }
                };
                let tokens = (0..num_tokens).map(token).collect();
                self.start(Identity { tokens, salt, shareable_tokens, owner, kind });
            }
            Op::Resume { pick } => {
                let id = self.suspended.swap_remove(pick);
                self.start(id);
            }
            Op::Turn { pick, more, same_kind } => {
                self.num_owners += 1;
                let mut id = Identity { owner: self.num_owners, ..self.ended[pick].clone() };
                if !same_kind {
                    id.kind = id.kind.map(|(kind, tokens)| (1 - kind, tokens));
                }
                id.shareable_tokens = id.tokens.len();
                id.tokens.extend((0..1 + more).map(|i| (i % 2) as u32));
                id.tokens.truncate(self.num_blocks * self.page_tokens);
                self.start(id);
            }
            Op::Advance { pick, num_tokens, unsaved } => self.advance(pick, num_tokens, unsaved),
            Op::Sit { pick } => self.sit(pick),
            Op::Left => {
                let left: Vec<SeatIndex> = self.real.left_seats().collect();
                assert_eq!(left, std::mem::take(&mut self.left_seats), "left seats");
            }
            Op::Free { pick, hands_on } => {
                if hands_on {
                    self.hand_on(pick);
                }
                self.free(pick, End::Free);
            }
            Op::Suspend { pick } => self.free(pick, End::Suspend),
            Op::Discard { pick } => self.free(pick, End::Discard),
        }
        self.compare();
    }

    /// The owners of the longest prefix that `id` finds: the best of all places where it could leave what everybody may find.
    fn find(&self, id: &Identity) -> Vec<Owner> {
        let run_tokens = self.run_blocks * self.page_tokens;
        let whole = usize::from(self.bug == Bug::MatchesWholePrompt);
        let salt = if self.bug == Bug::IgnoresSalt { 0 } else { id.salt };
        let kind = id.kind.map(|(kind, _)| Owner::Kind(if self.bug == Bug::IgnoresKind { 0 } else { kind }));
        let own = (self.bug != Bug::ForgetsOwn).then_some(Owner::One(id.owner));
        let mut best = Vec::new();
        for common in 0.. {
            let mut owners: Vec<Owner> = Vec::new();
            while (owners.len() + 1) * run_tokens < id.tokens.len() + whole {
                let end = (owners.len() + 1) * run_tokens;
                let shareable = end <= id.shareable_tokens;
                let last = owners.last().copied().unwrap_or(Owner::All);
                let candidates = match owners.len() < common {
                    true => [shareable.then_some(Owner::All), None],
                    false => [
                        own.filter(|_| last != Owner::All || !shareable),
                        kind.filter(|_| last != Owner::One(id.owner) && shareable),
                    ],
                };
                let is_known = |owner: &Owner| {
                    let path = [owners.as_slice(), &[*owner]].concat();
                    self.published.contains_key(&(salt, path, id.tokens[..end].to_vec()))
                };
                let Some(owner) = candidates.into_iter().flatten().find(is_known) else { break };
                owners.push(owner);
            }
            let taken = owners.iter().filter(|owner| **owner == Owner::All).count();
            if owners.len() >= best.len() && taken == common {
                best = owners;
            }
            if taken < common {
                break;
            }
        }
        best
    }

    fn start(&mut self, id: Identity) {
        let mut kv = Sequence::new(id.salt, id.shareable_tokens, id.owner, self.num_blocks);
        if let Some((kind, kind_tokens)) = id.kind {
            kv = kv.of_kind(kind, kind_tokens);
        }
        let matched = self.real.match_prefix(&mut kv, &id.tokens);

        let run_tokens = self.run_blocks * self.page_tokens;
        let owners = self.find(&id);
        assert_eq!(matched, owners.len() * run_tokens, "matched prefix");
        let count = |is: fn(&Owner) -> bool| run_tokens * owners.iter().filter(|owner| is(owner)).count();
        self.num_resumed += count(|owner| matches!(owner, Owner::One(_)));
        self.num_of_kind += count(|owner| matches!(owner, Owner::Kind(_)));
        let common = owners.iter().position(|owner| *owner != Owner::All).unwrap_or(usize::MAX);
        let num_blocks = owners.len() * self.run_blocks;
        let mut live = Live {
            id,
            kv,
            owners,
            common,
            content: Vec::new(),
            num_written: matched,
            num_blocks,
            num_published: num_blocks,
            num_saved: matched,
        };
        for runs in 1..=live.owners.len() {
            let published = self.published.get_mut(&live.prefix(runs, run_tokens)).expect("it was found");
            published.users += 1;
            live.content.extend(&published.content);
        }
        self.live.push(live);
    }

    fn counts(&self) -> Counts {
        let shared = self.run_blocks * self.published.values().filter(|p| p.users > 0).count();
        let private: usize = self.live.iter().map(|l| l.num_blocks - l.num_published).sum();
        let cached = self.run_blocks * self.published.len() - shared;
        Counts { free: self.num_blocks - shared - private - cached, in_use: shared + private, cached }
    }

    fn sit(&mut self, pick: usize) {
        let kv = &mut self.live[pick].kv;
        if kv.seat().is_some() || self.free_seats.is_empty() {
            return;
        }
        let expected = match self.bug {
            Bug::TakesHighestSeat => self.free_seats.pop_last(),
            _ => self.free_seats.pop_first(),
        };
        assert_eq!(Some(self.real.take_seat(kv)), expected, "the lowest free seat");
        self.num_seated += 1;
    }

    fn advance(&mut self, pick: usize, num_tokens: usize, unsaved: usize) {
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
            // KV of a token follows from all before it, and that of what is not everybody's from who computed it.
            let mut hasher = DefaultHasher::new();
            let owner = live.owner_of(
                position / (self.run_blocks * self.page_tokens),
                self.run_blocks * self.page_tokens,
            );
            (live.id.salt, owner, live.content.last(), live.id.tokens[position]).hash(&mut hasher);
            live.content.push(hasher.finish());
            self.memory[slot] = live.content[position];
        }
        live.num_saved = live.num_saved.max(target.saturating_sub(unsaved));
        let saved = if self.tiered { live.num_saved } else { usize::MAX };
        self.real.advance(&mut live.kv, &live.id.tokens[..target], saved);
        live.num_written = target;
        let run_tokens = self.run_blocks * self.page_tokens;
        let saved = if self.bug == Bug::PublishesUnsaved { usize::MAX } else { saved };
        for i in live.num_published / self.run_blocks..target.min(saved) / run_tokens {
            live.owners.push(live.owner_of(i, run_tokens));
            publish(&mut self.published, live, i, run_tokens);
            live.num_published += self.run_blocks;
        }
    }

    fn hand_on(&mut self, pick: usize) {
        let live = &mut self.live[pick];
        self.real.hand_on(&mut live.kv, &live.id.tokens[..live.num_written]);
        let run_tokens = self.run_blocks * self.page_tokens;
        let own = live.owners.iter().filter(|owner| matches!(owner, Owner::One(_))).count();
        let (start, end) = (live.owners.len() - own, live.owners.len());
        let whole = live.prefix(end, run_tokens);
        let Some((kind, kind_tokens)) = live.id.kind.filter(|_| own > 0) else { return };
        if self.published.keys().any(|other| continues(other, &whole)) {
            return;
        }
        for runs in start + 1..=end {
            let gone = self.published.remove(&live.prefix(runs, run_tokens));
            assert_eq!(gone.map(|p| p.users), Some(1), "nobody else used it");
        }
        live.owners.truncate(start);
        for i in start..end.min(kind_tokens / run_tokens) {
            live.owners.push(Owner::Kind(kind));
            publish(&mut self.published, live, i, run_tokens);
        }
        live.num_published = live.owners.len() * self.run_blocks;
    }

    fn free(&mut self, pick: usize, end: End) {
        let mut live = self.live.swap_remove(pick);
        if let Some(seat) = live.kv.seat() {
            self.free_seats.insert(seat);
            if !self.left_seats.contains(&seat) {
                self.left_seats.push(seat);
            }
        }
        match end {
            End::Free => self.real.free(&mut live.kv),
            End::Suspend => self.real.suspend(&mut live.kv),
            End::Discard => self.real.discard(&mut live.kv),
        }
        for i in (0..live.num_published / self.run_blocks).rev() {
            let prefix = live.prefix(i + 1, self.run_blocks * self.page_tokens);
            let is_continued = self.published.keys().any(|other| continues(other, &prefix));
            let published = self.published.get_mut(&prefix).expect("a used prefix is published");
            published.users -= 1;
            if published.users > 0 {
                continue;
            }
            let forget = match end {
                End::Free => matches!(prefix.1[i], Owner::One(_)) && !is_continued,
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
        match end {
            End::Suspend => self.suspended.push(live.id),
            End::Free => {
                let mut id = live.id;
                id.tokens.truncate(live.num_written.max(1));
                self.ended.push(id);
                if self.ended.len() > 4 {
                    self.ended.remove(0);
                }
            }
            End::Discard => {}
        }
    }

    fn compare(&self) {
        self.real.check(self.live.iter().map(|l| &l.kv));
        assert_eq!(self.real.counts(), self.counts());
        assert_eq!(self.real.num_evictions(), self.num_evictions);
        for live in &self.live {
            assert_eq!(live.kv.num_tokens(), live.num_written);
            assert_eq!(live.kv.blocks().len(), live.num_blocks);
            assert_eq!(live.kv.num_published, live.num_published, "published blocks");
            // The digest of a position covers all before it, so the last one of each block is enough.
            let ends = (1..=live.num_written).filter(|n| n % self.page_tokens == 0 || *n == live.num_written);
            for n in ends {
                let block = live.kv.blocks()[(n - 1) / self.page_tokens];
                let slot = block.at() * self.page_tokens + (n - 1) % self.page_tokens;
                assert_eq!(self.memory[slot], live.content[n - 1], "KV of its own tokens");
            }
        }
    }
}

/// Run `i` of `live` becomes known, or gives way to what is known.
fn publish(published: &mut BTreeMap<Prefix, Published>, live: &mut Live, i: usize, run_tokens: usize) {
    let own = &mut live.content[i * run_tokens..][..run_tokens];
    let new = || Published { users: 0, released: 0, content: own.to_vec() };
    let prefix = (live.id.salt, live.owners.clone(), live.id.tokens[..(i + 1) * run_tokens].to_vec());
    let entry = published.entry(prefix).or_insert_with(new);
    entry.users += 1;
    own.copy_from_slice(&entry.content);
}

/// Whether `other` goes on where `prefix` ends.
fn continues(other: &Prefix, prefix: &Prefix) -> bool {
    other.0 == prefix.0
        && other.1.len() > prefix.1.len()
        && other.1.starts_with(&prefix.1)
        && other.2.starts_with(&prefix.2)
}

/// What a run has seen, so that a test can tell an idle fuzz.
#[derive(Debug)]
struct Seen {
    evictions: u64,
    /// Tokens of others, and of their own, that sequences found.
    shared: usize,
    resumed: usize,
    of_kind: usize,
    /// Times that a sequence took a seat.
    seated: usize,
    /// Times that a sequence had sealed blocks which were not saved.
    unsaved: usize,
}

fn fuzz(bug: Bug, seed: u64, num_ops: usize, hash_mask: u64) -> Seen {
    println!("seed {seed}");
    let mut random = Random::new(seed);
    let mut fuzz = Fuzz::new(bug, &mut random, hash_mask);
    let (mut num_shared, mut num_unsaved) = (0, 0);
    for _ in 0..num_ops {
        let op = fuzz.draw(&mut random);
        let before = fuzz.live.len();
        fuzz.apply(op);
        if fuzz.live.len() > before {
            num_shared += fuzz.live[before].num_written;
        }
        let run_tokens = fuzz.run_blocks * fuzz.page_tokens;
        let held_back = |l: &&Live| l.num_published * fuzz.page_tokens + run_tokens <= l.num_written;
        num_unsaved += fuzz.live.iter().filter(held_back).count();
    }
    while !fuzz.live.is_empty() {
        fuzz.apply(Op::Free { pick: 0, hands_on: true });
    }
    assert_eq!(fuzz.real.counts().in_use, 0);
    Seen {
        evictions: fuzz.num_evictions,
        shared: num_shared,
        resumed: fuzz.num_resumed,
        of_kind: fuzz.num_of_kind,
        seated: fuzz.num_seated,
        unsaved: num_unsaved,
    }
}

#[test]
fn agrees_with_the_model() {
    let seen: Vec<_> =
        (0..24 * ops::conformance::seed_factor()).map(|seed| fuzz(Bug::None, seed, 2000, u64::MAX)).collect();
    let sum = |count: fn(&Seen) -> usize| seen.iter().map(count).sum::<usize>();
    assert!(sum(|s| s.evictions as usize) > 1000, "blocks were evicted: {seen:?}");
    assert!(sum(|s| s.shared) > 1000, "prefixes were shared: {seen:?}");
    assert!(sum(|s| s.resumed) > 500, "sequences went on: {seen:?}");
    assert!(sum(|s| s.of_kind) > 500, "sequences went on from their kind: {seen:?}");
    assert!(sum(|s| s.seated) > 1000, "seats were taken: {seen:?}");
    assert!(sum(|s| s.unsaved) > 1000, "blocks waited to be saved: {seen:?}");
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

#[test]
#[should_panic(expected = "matched prefix")]
fn canary_ignored_kind_is_noticed() {
    for seed in 0..24 {
        fuzz(Bug::IgnoresKind, seed, 2000, u64::MAX);
    }
}

#[test]
#[should_panic(expected = "published blocks")]
fn canary_published_before_saved_is_noticed() {
    for seed in 0..24 {
        fuzz(Bug::PublishesUnsaved, seed, 2000, u64::MAX);
    }
}

#[test]
#[should_panic(expected = "the lowest free seat")]
fn canary_wrong_seat_is_noticed() {
    for seed in 0..24 {
        fuzz(Bug::TakesHighestSeat, seed, 2000, u64::MAX);
    }
}
