//! Which pages are resident: from (seat, layer, KV head, page) to a frame, and which frame gives way.
//!
//! Tables of two levels. A small directory has one entry for each run of [`LEAF_PAGES`] pages that a context could have; a
//! leaf, one cache line of frames, exists only where something of the run is resident. Frames come in *extents* of
//! [`EXTENT_FRAMES`], each in one *pool*: that of a (seat, layer), which grows and shrinks with its quota, or, where requests
//! share frames, that of a layer. A victim is found by looking at the stamps of its pool alone ([`EvictionRule`]): histograms
//! of ages say from which age on pages go. Nothing is sorted, and what this step needs, of age 0, is never a victim.
//!
//! All tables are flat arrays of integers, so a device can hold the same ones. Every choice is deterministic: misses take the
//! first free frame of their pool, in order; of equal age, the first frame goes first.
//!
//! * `victims.rs`: the rules, and how their victims are found.

mod victims;

use victims::Stamps;
pub use victims::{EvictionRule, STAMPS};

/// A place among the running sequences: what a device holds for a sequence, it holds by its seat.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeatIndex(pub u32);

impl SeatIndex {
    /// The index as an array position.
    pub const fn at(self) -> usize {
        self.0 as usize
    }
}

/// A page-sized place in HBM that holds a copy of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FrameIndex(pub u32);

impl FrameIndex {
    /// The index as an array position.
    pub const fn at(self) -> usize {
        self.0 as usize
    }
}

/// Pages per leaf: their entries fill a cache line.
pub const LEAF_PAGES: usize = 16;

/// Frames per extent, the unit in which frames change their owner.
pub const EXTENT_FRAMES: usize = 32;

/// No leaf, no frame, no extent: tables start as zeros, so everything else is stored plus one.
const NONE: u32 = 0;

/// What residency tables are made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResidencyShape {
    /// Sequences at once.
    pub seats: usize,
    /// Layers.
    pub layers: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Pages of the longest context.
    pub pages_max: usize,
    /// Extents of frames.
    pub extents: usize,
    /// Which pages give way.
    pub eviction: EvictionRule,
}

impl ResidencyShape {
    const fn owners(&self) -> usize {
        self.seats * self.layers
    }

    const fn pools(&self) -> usize {
        if self.eviction.shares_frames() { self.layers } else { self.owners() }
    }

    const fn directory_entries(&self) -> usize {
        self.owners() * self.kv_heads * self.pages_max.div_ceil(LEAF_PAGES)
    }

    /// Leaves that can be in use at the same time: one per frame, or all there are.
    const fn leaves_max(&self) -> usize {
        let (frames, all) = (self.extents * EXTENT_FRAMES, self.directory_entries());
        if frames < all { frames } else { all }
    }

    /// Bytes of the tables that do not depend on the number of frames.
    pub const fn fixed_bytes(&self) -> u64 {
        (self.directory_entries() * 4 + self.pools() * size_of::<Pool>()) as u64
    }

    /// Bytes of all tables, were all leaves in use; leaves that never are take no memory.
    pub const fn bytes(&self) -> u64 {
        let per_leaf = LEAF_PAGES * 4 + 1 + 4;
        let per_extent = EXTENT_FRAMES * (4 + self.eviction.frame_bytes()) + 4 + 4 + 4;
        self.fixed_bytes() + (self.leaves_max() * per_leaf + self.extents * per_extent) as u64
    }
}

/// Frames that give way to each other.
#[derive(Clone, Copy, Debug, Default)]
struct Pool {
    /// Its first extent, plus one.
    first: u32,
    /// Its extents.
    extents: u32,
    /// Frames in use.
    held: u32,
    /// Its step.
    now: u32,
    /// An extent, plus one, before which no frame is free; none if nobody knows.
    free_from: u32,
}

/// What happened to the pages of a seat, since it was last released.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeatCounters {
    /// Pages that were needed and resident.
    pub hits: u64,
    /// Pages that were needed and had to be fetched into a frame.
    pub misses: u64,
    /// Pages that were needed and read through the frames of a wave.
    pub streamed: u64,
    /// Resident pages that gave way to others.
    pub evictions: u64,
    /// Pages that were saved to DRAM.
    pub saved: u64,
    /// Bytes of pages that were copied from DRAM to HBM: of misses, of what was streamed, of a prefix that others computed whose
    /// last pages are local, and of keys that a check of its selection read.
    pub fetched_bytes: u64,
    /// Pages that selections named and that are not local, and as many as the slots selected in them would fill.
    pub selected: u64,
    /// See there.
    pub selected_packed: u64,
    /// Hits by the age of the page: steps since it was last needed, clamped.
    pub hits_by_age: [u64; STAMPS],
}

impl SeatCounters {
    /// Adds what happened to other pages.
    pub fn add(&mut self, other: &SeatCounters) {
        self.hits += other.hits;
        self.misses += other.misses;
        self.streamed += other.streamed;
        self.evictions += other.evictions;
        self.saved += other.saved;
        self.fetched_bytes += other.fetched_bytes;
        self.selected += other.selected;
        self.selected_packed += other.selected_packed;
        self.hits_by_age.iter_mut().zip(other.hits_by_age).for_each(|(sum, n)| *sum += n);
    }

    /// What happened since `before`.
    pub fn since(&self, before: &SeatCounters) -> SeatCounters {
        let mut hits_by_age = self.hits_by_age;
        hits_by_age.iter_mut().zip(before.hits_by_age).for_each(|(n, b)| *n -= b);
        SeatCounters {
            hits: self.hits - before.hits,
            misses: self.misses - before.misses,
            streamed: self.streamed - before.streamed,
            evictions: self.evictions - before.evictions,
            saved: self.saved - before.saved,
            fetched_bytes: self.fetched_bytes - before.fetched_bytes,
            selected: self.selected - before.selected,
            selected_packed: self.selected_packed - before.selected_packed,
            hits_by_age,
        }
    }

    /// Counts a selection of `slots` slots in `pages` pages.
    pub fn select(&mut self, pages: usize, slots: usize, page_tokens: usize) {
        self.selected += pages as u64;
        self.selected_packed += slots.div_ceil(page_tokens) as u64;
    }

    /// Pages that were needed and are not local.
    pub fn needed(&self) -> u64 {
        self.hits + self.misses + self.streamed
    }
}

impl Default for SeatCounters {
    fn default() -> Self {
        SeatCounters {
            hits: 0,
            misses: 0,
            streamed: 0,
            evictions: 0,
            saved: 0,
            fetched_bytes: 0,
            selected: 0,
            selected_packed: 0,
            hits_by_age: [0; STAMPS],
        }
    }
}

/// The residency tables of a device.
#[derive(Clone, Debug)]
pub struct Residency {
    shape: ResidencyShape,
    /// `[seat][layer][head][page / LEAF_PAGES]`: leaf, plus one.
    directory: Vec<u32>,
    /// Frame, plus one.
    leaves: Vec<[u32; LEAF_PAGES]>,
    /// Entries in use.
    leaf_entries: Vec<u8>,
    free_leaves: Vec<u32>,
    /// Leaves that were never used; beyond them memory is untouched.
    leaves_used: usize,
    /// `[frame]`: `page * kv_heads + head`.
    held: Vec<u32>,
    /// `[frame]`: the seat whose page it is; empty where pools say that.
    holders: Vec<u32>,
    stamps: Stamps,
    /// `[extent]`: which of its frames are in use.
    occupied: Vec<u32>,
    /// `[extent]`: the next of its pool, plus one.
    next: Vec<u32>,
    free_extents: Vec<u32>,
    /// `[seat][layer]`, or `[layer]` where requests share frames.
    pools: Vec<Pool>,
    /// `[seat]`: frames that hold its pages.
    seat_frames: Vec<u32>,
    counters: Vec<SeatCounters>,
    /// Of requests that left their seats.
    gone: SeatCounters,
}

impl Residency {
    /// Empty tables. Where requests share frames, each layer has its part of them from the start.
    ///
    /// # Panics
    /// When an index would not fit in 32 bits.
    pub fn new(shape: ResidencyShape) -> Self {
        let frames = shape.extents * EXTENT_FRAMES;
        assert!(frames < u32::MAX as usize, "frames are u32");
        assert!(shape.pages_max * shape.kv_heads < u32::MAX as usize, "pages of a layer are u32");
        let leaves = shape.leaves_max();
        let holders = if shape.eviction.shares_frames() { frames } else { 0 };
        let mut tables = Residency {
            shape,
            directory: vec![NONE; shape.directory_entries()],
            leaves: vec![[NONE; LEAF_PAGES]; leaves],
            leaf_entries: vec![0; leaves],
            free_leaves: Vec::with_capacity(leaves),
            leaves_used: 0,
            held: vec![0; frames],
            holders: vec![0; holders],
            stamps: Stamps::new(shape.eviction, frames),
            occupied: vec![0; shape.extents],
            next: vec![NONE; shape.extents],
            free_extents: (0..shape.extents as u32).rev().collect(),
            pools: vec![Pool::default(); shape.pools()],
            seat_frames: vec![0; shape.seats],
            counters: vec![SeatCounters::default(); shape.seats],
            gone: SeatCounters::default(),
        };
        if shape.eviction.shares_frames() {
            (0..shape.layers).for_each(|layer| tables.extend(layer, shape.extents / shape.layers));
        }
        tables
    }

    /// What they were made for.
    pub fn shape(&self) -> &ResidencyShape {
        &self.shape
    }

    fn owner(&self, seat: SeatIndex, layer: usize) -> usize {
        assert!(seat.at() < self.shape.seats && layer < self.shape.layers, "{seat:?}, layer {layer}");
        seat.at() * self.shape.layers + layer
    }

    fn entry(&self, owner: usize, head: usize, page: usize) -> usize {
        assert!(head < self.shape.kv_heads && page < self.shape.pages_max, "head {head}, page {page}");
        (owner * self.shape.kv_heads + head) * self.shape.pages_max.div_ceil(LEAF_PAGES) + page / LEAF_PAGES
    }

    /// The pool in which an owner's pages are.
    fn pool(&self, owner: usize) -> usize {
        if self.shape.eviction.shares_frames() { owner % self.shape.layers } else { owner }
    }

    /// Whose page `frame` of a pool holds.
    fn owner_of(&self, pool: usize, frame: usize) -> usize {
        self.holders.get(frame).map_or(pool, |&seat| seat as usize * self.shape.layers + pool)
    }

    /// Whether pages of `a` may take the frames of `b`: then a step of both is one step of their pool.
    pub fn share_frames(&self, a: SeatIndex, b: SeatIndex) -> bool {
        a == b || self.shape.eviction.shares_frames()
    }

    /// The extents of a pool, in order.
    fn extents(&self, pool: usize) -> impl Iterator<Item = usize> {
        let first = self.pools[pool].first;
        std::iter::successors((first != NONE).then(|| first as usize - 1), |&extent| {
            let next = self.next[extent];
            (next != NONE).then(|| next as usize - 1)
        })
    }

    /// The frames of a pool that hold something, in order.
    fn frames(&self, pool: usize) -> impl Iterator<Item = usize> {
        self.extents(pool).flat_map(|extent| frames_in_use(extent, self.occupied[extent]))
    }

    /// Frames that pages of (seat, layer) may take.
    pub fn quota(&self, seat: SeatIndex, layer: usize) -> usize {
        self.pools[self.pool(self.owner(seat, layer))].extents as usize * EXTENT_FRAMES
    }

    /// Whether one of these is free.
    pub fn has_room(&self, seat: SeatIndex, layer: usize) -> bool {
        let pool = &self.pools[self.pool(self.owner(seat, layer))];
        (pool.held as usize) < pool.extents as usize * EXTENT_FRAMES
    }

    /// Extents that nobody owns.
    pub fn free_extents(&self) -> usize {
        self.free_extents.len()
    }

    /// Frames in use, of all.
    pub fn frames_in_use(&self) -> usize {
        self.pools.iter().map(|pool| pool.held as usize).sum()
    }

    /// Frames that `seat` holds over all layers.
    pub fn frames_of(&self, seat: SeatIndex) -> usize {
        self.seat_frames[seat.at()] as usize
    }

    /// What happened to the pages of `seat`.
    pub fn counters(&self, seat: SeatIndex) -> &SeatCounters {
        &self.counters[seat.at()]
    }

    /// The same, to add to.
    pub fn counters_mut(&mut self, seat: SeatIndex) -> &mut SeatCounters {
        &mut self.counters[seat.at()]
    }

    // ---- one step of one pool: begin, need, fit, insert ---------- -------------------------------------------------

    /// A new step of the pool of (seat, layer): every page in it is a step older.
    pub fn begin(&mut self, seat: SeatIndex, layer: usize) {
        let pool = self.pool(self.owner(seat, layer));
        self.pools[pool].now = self.pools[pool].now.wrapping_add(1);
        let Pool { now, first: mut extent, .. } = self.pools[pool];
        while extent != NONE {
            let first = (extent as usize - 1) * EXTENT_FRAMES;
            self.stamps.begin(first..first + EXTENT_FRAMES, now);
            extent = self.next[extent as usize - 1];
        }
    }

    /// The frame of a page, if it is resident, without needing it.
    pub fn find(&self, seat: SeatIndex, layer: usize, head: usize, page: usize) -> Option<FrameIndex> {
        let owner = self.owner(seat, layer);
        match self.directory[self.entry(owner, head, page)] {
            NONE => None,
            leaf => match self.leaves[leaf as usize - 1][page % LEAF_PAGES] {
                NONE => None,
                frame => Some(FrameIndex(frame - 1)),
            },
        }
    }

    /// Needs a page: a resident one becomes the youngest. Counts a hit; what is not found counts nothing.
    pub fn need(&mut self, seat: SeatIndex, layer: usize, head: usize, page: usize) -> Option<FrameIndex> {
        let frame = self.find(seat, layer, head, page)?;
        let now = self.pools[self.pool(self.owner(seat, layer))].now;
        let age = self.stamps.age(frame.at(), now) as usize;
        self.stamps.set(frame.at(), now);
        let counters = &mut self.counters[seat.at()];
        counters.hits += 1;
        counters.hits_by_age[age.min(STAMPS - 1)] += 1;
        Some(frame)
    }

    /// Makes room in the pool of (seat, layer) for the `misses` of a step that needs `wanted` pages of it: the oldest that it
    /// does not need go. Calls `evicted` with each frame.
    ///
    /// When more are wanted than the pool holds, all goes that is not needed now.
    ///
    /// # Panics
    /// When more misses are named than pages are wanted beside hits.
    pub fn fit(
        &mut self,
        seat: SeatIndex,
        layer: usize,
        wanted: usize,
        misses: usize,
        evicted: &mut impl FnMut(FrameIndex),
    ) {
        let pool = self.pool(self.owner(seat, layer));
        let Pool { extents, held, now, .. } = self.pools[pool];
        let frames = extents as usize * EXTENT_FRAMES;
        let spill = (held as usize + misses).saturating_sub(frames);
        let spill = match wanted <= frames {
            true => spill,
            false => spill.min(self.frames(pool).filter(|&frame| self.stamps.age(frame, now) > 0).count()),
        };
        self.evict(pool, spill, evicted);
    }

    /// Evicts the `count` oldest pages of a pool.
    fn evict(&mut self, pool: usize, count: usize, evicted: &mut impl FnMut(FrameIndex)) {
        if count == 0 {
            return;
        }
        let Pool { now, first: mut extent, .. } = self.pools[pool];
        let mut cut = self.stamps.oldest(|| self.frames(pool), now, count);
        while extent != NONE {
            let index = extent as usize - 1;
            for frame in frames_in_use(index, self.occupied[index]) {
                if cut.takes(self.stamps.age(frame, now)) {
                    let seat = self.owner_of(pool, frame) / self.shape.layers;
                    self.counters[seat].evictions += 1;
                    self.drop_frame(pool, frame);
                    evicted(FrameIndex(frame as u32));
                }
            }
            extent = self.next[index];
        }
    }

    /// Gives a page that is not resident the first free frame. Counts a miss.
    ///
    /// # Panics
    /// When there is none, or the page is resident.
    pub fn insert(&mut self, seat: SeatIndex, layer: usize, head: usize, page: usize) -> FrameIndex {
        self.counters[seat.at()].misses += 1;
        self.adopt(seat, layer, head, page)
    }

    /// The same for a page that nobody has missed.
    ///
    /// # Panics
    /// As [`Residency::insert`].
    pub fn adopt(&mut self, seat: SeatIndex, layer: usize, head: usize, page: usize) -> FrameIndex {
        let owner = self.owner(seat, layer);
        let frame = self.place(owner, head, page);
        self.stamps.set(frame.at(), self.pools[self.pool(owner)].now);
        frame
    }

    /// The first free frame of its pool for a page.
    fn place(&mut self, owner: usize, head: usize, page: usize) -> FrameIndex {
        let pool = self.pool(owner);
        let known = self.pools[pool].free_from;
        let mut next = if known == NONE { self.pools[pool].first } else { known };
        let extent = loop {
            assert!(next != NONE, "a free frame");
            let extent = next as usize - 1;
            if self.occupied[extent] != u32::MAX {
                break extent;
            }
            next = self.next[extent];
        };
        self.pools[pool].free_from = next;
        let within = self.occupied[extent].trailing_ones() as usize;
        let frame = extent * EXTENT_FRAMES + within;
        self.occupied[extent] |= 1 << within;
        self.pools[pool].held += 1;
        let seat = owner / self.shape.layers;
        self.seat_frames[seat] += 1;
        if let Some(holder) = self.holders.get_mut(frame) {
            *holder = seat as u32;
        }
        self.held[frame] = (page * self.shape.kv_heads + head) as u32;
        let entry = self.entry(owner, head, page);
        let leaf = self.leaf_of(entry);
        let place = &mut self.leaves[leaf][page % LEAF_PAGES];
        assert_eq!(*place, NONE, "a page has one frame");
        *place = frame as u32 + 1;
        self.leaf_entries[leaf] += 1;
        FrameIndex(frame as u32)
    }

    // ---- between steps -------------------------------------------------------------------------------------------

    /// Takes all but `extents` extents from (seat, layer). The oldest pages go; younger ones that lie in an extent which is
    /// taken move to a free frame: `moved(from, to)`, with `to` none for pages that go. Nothing where frames are shared.
    pub fn shrink(
        &mut self,
        seat: SeatIndex,
        layer: usize,
        extents: usize,
        moved: &mut impl FnMut(FrameIndex, Option<FrameIndex>),
    ) {
        let owner = self.owner(seat, layer);
        if self.shape.eviction.shares_frames() || extents >= self.pools[owner].extents as usize {
            return;
        }
        // Between steps nothing is needed: a page of age 0 may go, too.
        self.begin(seat, layer);
        let spill = (self.pools[owner].held as usize).saturating_sub(extents * EXTENT_FRAMES);
        self.evict(owner, spill, &mut |frame| moved(frame, None));
        let last = extents.checked_sub(1).and_then(|i| self.extents(owner).nth(i));
        let mut taken = match last {
            None => std::mem::replace(&mut self.pools[owner].first, NONE),
            Some(last) => std::mem::replace(&mut self.next[last], NONE),
        };
        (self.pools[owner].extents, self.pools[owner].free_from) = (extents as u32, NONE);
        while taken != NONE {
            let extent = taken as usize - 1;
            for frame in frames_in_use(extent, self.occupied[extent]) {
                let (page, head) = self.page_of(frame);
                self.drop_frame(owner, frame);
                let to = self.place(owner, head, page);
                self.stamps.copy(frame, to.at());
                moved(FrameIndex(frame as u32), Some(to));
            }
            taken = std::mem::replace(&mut self.next[extent], NONE);
            self.free_extents.push(extent as u32);
        }
    }

    /// Gives (seat, layer) free extents until it has `extents`, as far as there are any. Nothing where frames are shared.
    pub fn grow(&mut self, seat: SeatIndex, layer: usize, extents: usize) {
        let owner = self.owner(seat, layer);
        if !self.shape.eviction.shares_frames() {
            self.extend(owner, extents);
        }
    }

    /// Gives a pool free extents until it has `extents`, as far as there are any.
    fn extend(&mut self, pool: usize, extents: usize) {
        let mut last = self.extents(pool).last();
        while (self.pools[pool].extents as usize) < extents {
            let Some(extent) = self.free_extents.pop() else { return };
            match last {
                None => self.pools[pool].first = extent + 1,
                Some(last) => self.next[last] = extent + 1,
            }
            last = Some(extent as usize);
            self.pools[pool].extents += 1;
        }
    }

    /// Forgets everything about `seat`. Calls `evicted` with each frame that held a page.
    pub fn release(&mut self, seat: SeatIndex, evicted: &mut impl FnMut(FrameIndex)) {
        for layer in 0..self.shape.layers {
            let owner = self.owner(seat, layer);
            let pool = self.pool(owner);
            let mut extent = self.pools[pool].first;
            while extent != NONE {
                let index = extent as usize - 1;
                for frame in frames_in_use(index, self.occupied[index]) {
                    if self.owner_of(pool, frame) == owner {
                        self.drop_frame(pool, frame);
                        evicted(FrameIndex(frame as u32));
                    }
                }
                extent = self.next[index];
            }
            self.shrink(seat, layer, 0, &mut |_, _| {});
        }
        let counters = std::mem::take(&mut self.counters[seat.at()]);
        self.gone.add(&counters);
    }

    /// What happened to the pages of all seats, since the start.
    pub fn totals(&self) -> SeatCounters {
        let mut all = self.gone;
        self.counters.iter().for_each(|counters| all.add(counters));
        all
    }

    /// The resident pages of (seat, layer) as `(head, page, frame)`, in no order.
    pub fn resident(
        &self,
        seat: SeatIndex,
        layer: usize,
    ) -> impl Iterator<Item = (usize, usize, FrameIndex)> {
        let owner = self.owner(seat, layer);
        let pool = self.pool(owner);
        self.frames(pool).filter(move |&frame| self.owner_of(pool, frame) == owner).map(move |frame| {
            let (page, head) = self.page_of(frame);
            (head, page, FrameIndex(frame as u32))
        })
    }

    fn page_of(&self, frame: usize) -> (usize, usize) {
        let held = self.held[frame] as usize;
        (held / self.shape.kv_heads, held % self.shape.kv_heads)
    }

    /// The leaf of a directory entry, made if there is none.
    fn leaf_of(&mut self, entry: usize) -> usize {
        if self.directory[entry] == NONE {
            let leaf = self.free_leaves.pop().unwrap_or_else(|| {
                assert!(self.leaves_used < self.leaves.len(), "a leaf for each frame");
                self.leaves_used += 1;
                self.leaves_used as u32 - 1
            });
            self.directory[entry] = leaf + 1;
        }
        self.directory[entry] as usize - 1
    }

    /// Empties a frame.
    fn drop_frame(&mut self, pool: usize, frame: usize) {
        let (page, head) = self.page_of(frame);
        let owner = self.owner_of(pool, frame);
        self.occupied[frame / EXTENT_FRAMES] &= !(1 << (frame % EXTENT_FRAMES));
        self.pools[pool].held -= 1;
        self.pools[pool].free_from = NONE;
        self.seat_frames[owner / self.shape.layers] -= 1;
        let entry = self.entry(owner, head, page);
        let leaf = self.directory[entry] as usize - 1;
        let place = std::mem::replace(&mut self.leaves[leaf][page % LEAF_PAGES], NONE);
        assert_eq!(place, frame as u32 + 1, "a frame holds the page that leads to it");
        self.leaf_entries[leaf] -= 1;
        if self.leaf_entries[leaf] == 0 {
            self.directory[entry] = NONE;
            self.free_leaves.push(leaf as u32);
        }
    }

    /// Bytes of the tables in use: the directory, and leaves and frames that hold something.
    pub fn bytes_in_use(&self) -> u64 {
        let leaves = self.leaves_used - self.free_leaves.len();
        let per_frame = 4 + self.shape.eviction.frame_bytes();
        self.shape.fixed_bytes() + (leaves * (LEAF_PAGES * 4 + 1) + self.frames_in_use() * per_frame) as u64
    }

    /// Panics unless all tables agree with each other. Slow: for tests.
    pub fn check(&self) {
        let mut extent_seen = vec![false; self.shape.extents];
        let mut leaves_seen = vec![false; self.leaves.len()];
        for &extent in &self.free_extents {
            assert!(
                !std::mem::replace(&mut extent_seen[extent as usize], true),
                "extent {extent} is free once"
            );
            assert_eq!(self.occupied[extent as usize], 0, "free extent {extent} holds nothing");
        }
        let mut seat_frames = vec![0; self.shape.seats];
        for (pool, &Pool { extents, held, .. }) in self.pools.iter().enumerate() {
            assert_eq!(self.extents(pool).count(), extents as usize, "extents of pool {pool} are counted");
            for extent in self.extents(pool) {
                assert!(!std::mem::replace(&mut extent_seen[extent], true), "extent {extent} is in one pool");
            }
            for frame in self.frames(pool) {
                let ((page, head), owner) = (self.page_of(frame), self.owner_of(pool, frame));
                let leaf = self.directory[self.entry(owner, head, page)];
                assert_ne!(leaf, NONE, "a resident page has a leaf");
                let place = self.leaves[leaf as usize - 1][page % LEAF_PAGES];
                assert_eq!(place, frame as u32 + 1, "the leaf of a page leads to its frame");
                seat_frames[owner / self.shape.layers] += 1;
            }
            assert_eq!(self.frames(pool).count(), held as usize, "frames of pool {pool} are counted");
        }
        assert_eq!(seat_frames, self.seat_frames, "frames of seats are counted");
        assert!(extent_seen.iter().all(|&seen| seen), "no extent is lost");
        let mut entries = 0;
        for &leaf in self.directory.iter().filter(|&&leaf| leaf != NONE) {
            let leaf = leaf as usize - 1;
            assert!(!std::mem::replace(&mut leaves_seen[leaf], true), "leaf {leaf} has one place");
            let used = self.leaves[leaf].iter().filter(|&&frame| frame != NONE).count();
            assert_eq!(used, usize::from(self.leaf_entries[leaf]), "entries of leaf {leaf} are counted");
            assert!(used > 0, "leaf {leaf} holds something");
            entries += used;
        }
        assert_eq!(entries, self.frames_in_use(), "every entry is a frame");
        for &leaf in &self.free_leaves {
            assert!(!std::mem::replace(&mut leaves_seen[leaf as usize], true), "leaf {leaf} is free once");
        }
        assert_eq!(leaves_seen.iter().filter(|&&seen| seen).count(), self.leaves_used, "no leaf is lost");
    }
}

/// The frames of an extent that `occupied` says are in use, ascending.
fn frames_in_use(extent: usize, occupied: u32) -> impl Iterator<Item = usize> {
    (0..EXTENT_FRAMES).filter(move |i| occupied >> i & 1 == 1).map(move |i| extent * EXTENT_FRAMES + i)
}

#[cfg(test)]
mod tests;
