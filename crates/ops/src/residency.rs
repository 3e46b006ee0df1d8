//! Which pages are resident: from (seat, layer, KV head, page) to a frame, and which frame gives way.
//!
//! Tables of two levels. A small directory has one entry for each run of [`LEAF_PAGES`] pages that a context could have; a
//! leaf, one cache line of frames, exists only where something of the run is resident. Frames come in *extents* of
//! [`EXTENT_FRAMES`], each owned by one (seat, layer), so a victim is found by looking at the stamps of that owner's extents
//! alone: a histogram over [`STAMPS`] ages and a running sum say from which age on pages go (SPIN's bucketed LRU). Nothing
//! is sorted, and what this step needs, of age 0, is never a victim.
//!
//! All tables are flat arrays of integers, so a device can hold the same ones. Every choice is deterministic: misses take the
//! lowest free frame of their owner, in order; of equal age, the lowest frame goes first.

use std::ops::Range;

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

/// Ages that are told apart, in steps of a sequence; older pages count as of the last.
pub const STAMPS: usize = 64;

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
}

impl ResidencyShape {
    const fn owners(&self) -> usize {
        self.seats * self.layers
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
        (self.directory_entries() * 4 + self.owners() * size_of::<Owner>()) as u64
    }

    /// Bytes of all tables, were all leaves in use; leaves that never are take no memory.
    pub const fn bytes(&self) -> u64 {
        let per_leaf = LEAF_PAGES * 4 + 1 + 4;
        let per_extent = EXTENT_FRAMES * (4 + 1) + 4 + 4 + 4;
        self.fixed_bytes() + (self.leaves_max() * per_leaf + self.extents * per_extent) as u64
    }
}

/// What a (seat, layer) holds.
#[derive(Clone, Copy, Debug, Default)]
struct Owner {
    /// Its first extent, plus one.
    first: u32,
    /// Its extents.
    extents: u32,
    /// Frames in use.
    held: u32,
    /// Its step, modulo [`STAMPS`].
    now: u8,
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
    /// `[frame]`: step of the owner when it was last needed, modulo [`STAMPS`].
    stamps: Vec<u8>,
    /// `[extent]`: which of its frames are in use.
    occupied: Vec<u32>,
    /// `[extent]`: the next of its owner, plus one.
    next: Vec<u32>,
    free_extents: Vec<u32>,
    owners: Vec<Owner>,
    counters: Vec<SeatCounters>,
    /// Of requests that left their seats.
    gone: SeatCounters,
}

impl Residency {
    /// Empty tables.
    ///
    /// # Panics
    /// When an index would not fit in 32 bits.
    pub fn new(shape: ResidencyShape) -> Self {
        let frames = shape.extents * EXTENT_FRAMES;
        assert!(frames < u32::MAX as usize, "frames are u32");
        assert!(shape.pages_max * shape.kv_heads < u32::MAX as usize, "pages of a layer are u32");
        let leaves = shape.leaves_max();
        Residency {
            shape,
            directory: vec![NONE; shape.directory_entries()],
            leaves: vec![[NONE; LEAF_PAGES]; leaves],
            leaf_entries: vec![0; leaves],
            free_leaves: Vec::with_capacity(leaves),
            leaves_used: 0,
            held: vec![0; frames],
            stamps: vec![0; frames],
            occupied: vec![0; shape.extents],
            next: vec![NONE; shape.extents],
            free_extents: (0..shape.extents as u32).rev().collect(),
            owners: vec![Owner::default(); shape.owners()],
            counters: vec![SeatCounters::default(); shape.seats],
            gone: SeatCounters::default(),
        }
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

    /// The extents of an owner, in order.
    fn extents(&self, owner: usize) -> impl Iterator<Item = usize> {
        let first = self.owners[owner].first;
        std::iter::successors((first != NONE).then(|| first as usize - 1), |&extent| {
            let next = self.next[extent];
            (next != NONE).then(|| next as usize - 1)
        })
    }

    /// Frames that (seat, layer) may hold.
    pub fn quota(&self, seat: SeatIndex, layer: usize) -> usize {
        self.owners[self.owner(seat, layer)].extents as usize * EXTENT_FRAMES
    }

    /// Frames that it does hold.
    pub fn held(&self, seat: SeatIndex, layer: usize) -> usize {
        self.owners[self.owner(seat, layer)].held as usize
    }

    /// Extents that nobody owns.
    pub fn free_extents(&self) -> usize {
        self.free_extents.len()
    }

    /// Frames in use, of all.
    pub fn frames_in_use(&self) -> usize {
        self.owners.iter().map(|o| o.held as usize).sum()
    }

    /// Frames that `seat` holds over all layers.
    pub fn frames_of(&self, seat: SeatIndex) -> usize {
        let first = self.owner(seat, 0);
        self.owners[first..first + self.shape.layers].iter().map(|o| o.held as usize).sum()
    }

    /// What happened to the pages of `seat`.
    pub fn counters(&self, seat: SeatIndex) -> &SeatCounters {
        &self.counters[seat.at()]
    }

    /// The same, to add to.
    pub fn counters_mut(&mut self, seat: SeatIndex) -> &mut SeatCounters {
        &mut self.counters[seat.at()]
    }

    // ---- one step of one (seat, layer): begin, need, fit, insert -------------------------------------------------

    /// A new step: every resident page is a step older.
    pub fn begin(&mut self, seat: SeatIndex, layer: usize) {
        let owner = self.owner(seat, layer);
        let now = (self.owners[owner].now + 1) % STAMPS as u8;
        self.owners[owner].now = now;
        // What was stamped so long ago that its stamp comes round again stays at the greatest age.
        let oldest = (now + 1) % STAMPS as u8;
        let mut extent = self.owners[owner].first;
        while extent != NONE {
            let first = (extent as usize - 1) * EXTENT_FRAMES;
            for stamp in &mut self.stamps[first..first + EXTENT_FRAMES] {
                *stamp = if *stamp == now { oldest } else { *stamp };
            }
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
        let now = self.owners[self.owner(seat, layer)].now;
        let age = (now + STAMPS as u8 - self.stamps[frame.at()]) % STAMPS as u8;
        self.stamps[frame.at()] = now;
        let counters = &mut self.counters[seat.at()];
        counters.hits += 1;
        counters.hits_by_age[age as usize] += 1;
        Some(frame)
    }

    /// Evicts the oldest pages of (seat, layer) until `misses` frames are free. Calls `evicted` with each frame.
    ///
    /// # Panics
    /// When there are not so many frames beside those that this step needs.
    pub fn fit(
        &mut self,
        seat: SeatIndex,
        layer: usize,
        misses: usize,
        evicted: &mut impl FnMut(FrameIndex),
    ) {
        let owner = self.owner(seat, layer);
        let Owner { extents, held, .. } = self.owners[owner];
        let spill = (held as usize + misses).saturating_sub(extents as usize * EXTENT_FRAMES);
        self.counters[seat.at()].evictions += spill as u64;
        self.evict(owner, spill, evicted);
    }

    /// Evicts the `count` oldest pages of an owner.
    fn evict(&mut self, owner: usize, count: usize, evicted: &mut impl FnMut(FrameIndex)) {
        if count == 0 {
            return;
        }
        let now = self.owners[owner].now;
        let age = |stamp: u8| ((now + STAMPS as u8 - stamp) % STAMPS as u8) as usize;
        let mut histogram = [0usize; STAMPS];
        for extent in self.extents(owner) {
            for frame in frames_in_use(extent, self.occupied[extent]) {
                histogram[age(self.stamps[frame])] += 1;
            }
        }
        // From this age on all go; of those one step younger, so many.
        let (mut cut, mut sum) = (STAMPS, 0);
        while sum + histogram[cut - 1] < count {
            cut -= 1;
            sum += histogram[cut];
            assert!(cut > 1, "what a step needs is never evicted");
        }
        let mut of_cut = count - sum;
        assert!(cut > 1, "what a step needs is never evicted");
        let mut extent = self.owners[owner].first;
        while extent != NONE {
            let index = extent as usize - 1;
            for frame in frames_in_use(index, self.occupied[index]) {
                let age = age(self.stamps[frame]);
                let goes = age >= cut || (age + 1 == cut && of_cut > 0);
                if goes {
                    of_cut -= usize::from(age < cut);
                    self.drop_frame(owner, frame);
                    evicted(FrameIndex(frame as u32));
                }
            }
            extent = self.next[index];
        }
    }

    /// Gives a page that is not resident the lowest free frame. Counts a miss.
    ///
    /// # Panics
    /// When there is none, or the page is resident.
    pub fn insert(&mut self, seat: SeatIndex, layer: usize, head: usize, page: usize) -> FrameIndex {
        let owner = self.owner(seat, layer);
        self.counters[seat.at()].misses += 1;
        self.place(owner, head, page, self.owners[owner].now)
    }

    /// The lowest free frame of an owner for a page.
    fn place(&mut self, owner: usize, head: usize, page: usize, stamp: u8) -> FrameIndex {
        let known = self.owners[owner].free_from;
        let mut next = if known == NONE { self.owners[owner].first } else { known };
        let extent = loop {
            assert!(next != NONE, "a free frame");
            let extent = next as usize - 1;
            if self.occupied[extent] != u32::MAX {
                break extent;
            }
            next = self.next[extent];
        };
        self.owners[owner].free_from = next;
        let within = self.occupied[extent].trailing_ones() as usize;
        let frame = extent * EXTENT_FRAMES + within;
        self.occupied[extent] |= 1 << within;
        self.owners[owner].held += 1;
        self.stamps[frame] = stamp;
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
    /// taken move to a free frame: `moved(from, to)`, with `to` none for pages that go.
    pub fn shrink(
        &mut self,
        seat: SeatIndex,
        layer: usize,
        extents: usize,
        moved: &mut impl FnMut(FrameIndex, Option<FrameIndex>),
    ) {
        let owner = self.owner(seat, layer);
        if extents >= self.owners[owner].extents as usize {
            return;
        }
        // Between steps nothing is needed: a page of age 0 may go, too.
        self.begin(seat, layer);
        let spill = (self.owners[owner].held as usize).saturating_sub(extents * EXTENT_FRAMES);
        self.counters[seat.at()].evictions += spill as u64;
        self.evict(owner, spill, &mut |frame| moved(frame, None));
        let last = extents.checked_sub(1).and_then(|i| self.extents(owner).nth(i));
        let mut taken = match last {
            None => std::mem::replace(&mut self.owners[owner].first, NONE),
            Some(last) => std::mem::replace(&mut self.next[last], NONE),
        };
        (self.owners[owner].extents, self.owners[owner].free_from) = (extents as u32, NONE);
        while taken != NONE {
            let extent = taken as usize - 1;
            for frame in frames_in_use(extent, self.occupied[extent]) {
                let (page, head) = self.page_of(frame);
                let stamp = self.stamps[frame];
                self.drop_frame(owner, frame);
                let to = self.place(owner, head, page, stamp);
                moved(FrameIndex(frame as u32), Some(to));
            }
            taken = std::mem::replace(&mut self.next[extent], NONE);
            self.free_extents.push(extent as u32);
        }
    }

    /// Gives (seat, layer) free extents until it has `extents`, as far as there are any.
    pub fn grow(&mut self, seat: SeatIndex, layer: usize, extents: usize) {
        let owner = self.owner(seat, layer);
        let mut last = self.extents(owner).last();
        while (self.owners[owner].extents as usize) < extents {
            let Some(extent) = self.free_extents.pop() else { return };
            match last {
                None => self.owners[owner].first = extent + 1,
                Some(last) => self.next[last] = extent + 1,
            }
            last = Some(extent as usize);
            self.owners[owner].extents += 1;
        }
    }

    /// Forgets everything about `seat`. Calls `evicted` with each frame that held a page.
    pub fn release(&mut self, seat: SeatIndex, evicted: &mut impl FnMut(FrameIndex)) {
        // Who leaves gives way to nobody.
        let evictions = self.counters[seat.at()].evictions;
        for layer in 0..self.shape.layers {
            self.shrink(seat, layer, 0, &mut |frame, _| evicted(frame));
        }
        self.counters[seat.at()].evictions = evictions;
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
        self.extents(self.owner(seat, layer)).flat_map(move |extent| {
            frames_in_use(extent, self.occupied[extent]).map(move |frame| {
                let (page, head) = self.page_of(frame);
                (head, page, FrameIndex(frame as u32))
            })
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
    fn drop_frame(&mut self, owner: usize, frame: usize) {
        let (page, head) = self.page_of(frame);
        self.occupied[frame / EXTENT_FRAMES] &= !(1 << (frame % EXTENT_FRAMES));
        self.owners[owner].held -= 1;
        self.owners[owner].free_from = NONE;
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
        let per_frame = 4 + 1;
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
        for owner in 0..self.shape.owners() {
            let Owner { extents, held, .. } = self.owners[owner];
            assert_eq!(self.extents(owner).count(), extents as usize, "extents of owner {owner} are counted");
            let mut in_use = 0;
            for extent in self.extents(owner) {
                assert!(!std::mem::replace(&mut extent_seen[extent], true), "extent {extent} has one owner");
                for frame in frames_in_use(extent, self.occupied[extent]) {
                    in_use += 1;
                    let (page, head) = self.page_of(frame);
                    let leaf = self.directory[self.entry(owner, head, page)];
                    assert_ne!(leaf, NONE, "a resident page has a leaf");
                    let place = self.leaves[leaf as usize - 1][page % LEAF_PAGES];
                    assert_eq!(place, frame as u32 + 1, "the leaf of a page leads to its frame");
                }
            }
            assert_eq!(in_use, held as usize, "frames of owner {owner} are counted");
        }
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
    let within: Range<usize> = 0..EXTENT_FRAMES;
    within.filter(move |i| occupied >> i & 1 == 1).map(move |i| extent * EXTENT_FRAMES + i)
}

#[cfg(test)]
#[path = "residency_tests.rs"]
mod tests;
