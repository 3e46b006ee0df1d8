//! The trait that a device implements.

use std::ops::Range;

use crate::coverage::Inspections;
use crate::places::DigestState;
use crate::residency::SeatCounters;
use crate::sample::{SampleOutput, SampleRow};
use crate::sparse::{DigestSpec, SelectionLimits};
use crate::tally::{Overlap, RowTally, WorkingSet, WorkingSetSpec};
use crate::tier::{TierSpec, TierState, TooSmall};
use crate::{Batch, BlockIndex, DType, Gate, HeadShape, KvGeometry, SeatIndex};

/// Why a backend refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An allocation did not succeed.
    #[error("out of memory: {what} needs {bytes} bytes")]
    OutOfMemory {
        /// What was to be allocated.
        what: &'static str,
        /// Its size.
        bytes: u64,
    },
    /// The HBM tier cannot hold even one wave.
    #[error("an HBM tier needs at least {smallest} bytes for its frames")]
    TierTooSmall {
        /// The least that would do.
        smallest: u64,
    },
    /// The device cannot do what was asked; says what and what would help.
    #[error("{0}")]
    Unsupported(String),
}

impl From<TooSmall> for Error {
    fn from(TooSmall { smallest }: TooSmall) -> Self {
        Error::TierTooSmall { smallest }
    }
}

/// A weight matrix as it lies on disk: row-major `[rows, cols]`, little-endian. For a linear layer rows are outputs.
#[derive(Clone, Copy, Debug)]
pub struct WeightView<'a> {
    /// Element type.
    pub dtype: DType,
    /// Outputs (1 for a vector).
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    /// `rows * cols` elements.
    pub bytes: &'a [u8],
}

/// What a backend says of itself at start.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    /// `cpu`, later `cuda`.
    pub kind: &'static str,
    /// Instruction set or device name.
    pub isa: String,
    /// Threads that run kernels.
    pub threads: usize,
}

/// An activation matrix on the device: row-major `[rows, cols]`, f32 values.
pub trait Tensor {
    /// Rows in use.
    fn rows(&self) -> usize;
    /// Columns.
    fn cols(&self) -> usize;
    /// Uses the first `rows` rows; their values are unspecified until an op writes them.
    ///
    /// # Panics
    /// When more than were allocated.
    fn set_rows(&mut self, rows: usize);
}

/// A device: memory, weights, KV pages and the operations of one step.
///
/// Conventions. Outputs come first; an output tensor takes the number of rows of its input. Shapes are checked and a
/// mismatch panics, since only a bug can cause it. Activations are f32 values; a backend may round the *inputs* of a
/// matrix product to the type of its weights. Operations are queued in order; memory errors appear when something is
/// allocated, so operations return nothing.
///
/// Invariant: an output row depends only on the rows that the formula names, never on the other rows of the batch,
/// their number, or how a prompt was cut into steps. On the CPU that holds to the bit.
pub trait Backend {
    /// An activation matrix.
    type Tensor: Tensor;
    /// A packed weight matrix with an optional bias.
    type Linear;
    /// A vector of f32 weights.
    type Vector;
    /// The KV pool: pages of all layers.
    type Kv;
    /// Digests of one kind, of all blocks of a pool.
    type Digests;
    /// Scores and selections of the rows of a step, for one layer at a time.
    type Selection;

    /// What the device is.
    fn info(&self) -> DeviceInfo;

    // ---- memory ------------------------------------------------------------------------------------------------

    /// An activation matrix for up to `rows_max` rows.
    fn tensor(&mut self, rows_max: usize, cols: usize) -> Result<Self::Tensor, Error>;

    /// Copies a host matrix (row-major, `tensor.cols()` wide) into `tensor`.
    fn upload(&mut self, tensor: &mut Self::Tensor, values: &[f32]);

    /// Row `row` of `tensor` on the host. Waits for queued work.
    fn row<'a>(&'a mut self, tensor: &'a Self::Tensor, row: usize) -> &'a [f32];

    /// Packs a linear layer: the rows of `parts` one below the other (so `[q; k; v]` is one product), converted to
    /// `dtype`. `biases`, when not empty, has one vector of matching length per part.
    fn linear(
        &mut self,
        parts: &[WeightView],
        biases: &[WeightView],
        dtype: DType,
    ) -> Result<Self::Linear, Error>;

    /// Bytes that [`Backend::linear`] will take for `[rows, cols]`: for the memory plan.
    fn linear_bytes(&self, rows: usize, cols: usize, dtype: DType) -> u64;

    /// A weight vector.
    fn vector(&mut self, view: WeightView) -> Result<Self::Vector, Error>;

    /// A pool of `num_blocks` blocks in DRAM. Memory may be committed lazily, but never more than
    /// `num_blocks * geometry.block_bytes()`, and as much for each of the `copies` in the order of clusters, which
    /// [`Backend::digest`] makes: [`OrderedCopy`](crate::cluster::OrderedCopy) says where they are.
    ///
    /// Without a `tier` attention reads pages where they are: *unified memory*. With one, only the frames of an HBM tier
    /// of that size are read from, and pages move between the two.
    fn kv(
        &mut self,
        geometry: KvGeometry,
        num_blocks: usize,
        copies: usize,
        tier: Option<TierSpec>,
    ) -> Result<Self::Kv, Error>;

    /// Digests for a pool of `num_blocks` blocks of `geometry`: `num_blocks * spec.block_bytes(geometry)` bytes, which
    /// may be committed lazily. Those of a gate need its weights, which are copied.
    ///
    /// Without `places` they are read where they are. With them, HBM has those of so many blocks at a time, which
    /// [`Backend::place_digests`] chooses, and DRAM all of them.
    fn digests(
        &mut self,
        spec: DigestSpec,
        geometry: KvGeometry,
        num_blocks: usize,
        places: Option<usize>,
        gate: Option<&Gate>,
    ) -> Result<Self::Digests, Error>;

    /// Memory for the selections of a step, and its size in bytes.
    fn selection(&mut self, limits: SelectionLimits) -> Result<(Self::Selection, u64), Error>;

    /// Takes the memory to [tally](Backend::tally) selections within `limits`, of seats below its rows, and their working sets as
    /// `sets` says.
    fn tally_within(&mut self, kv: &mut Self::Kv, limits: &SelectionLimits, sets: &WorkingSetSpec);

    /// Bytes of scratch memory that the operations need for steps of up to `rows_max` rows of `heads`, contexts of up
    /// to `context_max` tokens and at most `sequences_max` sequences; reserves them, so that no step allocates.
    fn reserve(
        &mut self,
        heads: HeadShape,
        rows_max: usize,
        sequences_max: usize,
        context_max: usize,
        cols_max: usize,
    ) -> Result<u64, Error>;

    // ---- operations --------------------------------------------------------------------------------------------

    /// `out[i] = table[tokens[i]]`: rows of an embedding that is packed as a linear layer `[vocab, hidden]` (so tied
    /// embeddings are stored once).
    fn embed(&mut self, out: &mut Self::Tensor, table: &Self::Linear, tokens: &[u32]);

    /// `out[i] = x[rows[i]]`.
    fn select_rows(&mut self, out: &mut Self::Tensor, x: &Self::Tensor, rows: &[u32]);

    /// `out[at + i] = x[rows.start + i]`: rows of `out`, whose other rows stay. Both know of all these rows.
    fn copy_rows(&mut self, out: &mut Self::Tensor, at: usize, x: &Self::Tensor, rows: Range<usize>);

    /// `out = x / sqrt(mean(x^2) + eps) * weight`, row by row (Zhang, Sennrich 2019).
    fn rms_norm(&mut self, out: &mut Self::Tensor, x: &Self::Tensor, weight: &Self::Vector, eps: f32);

    /// `out = x W^T + b`. `[rows, in] -> [rows, out]`.
    fn linear_forward(&mut self, out: &mut Self::Tensor, x: &Self::Tensor, w: &Self::Linear);

    /// `out += x W^T + b`: the residual connection.
    fn linear_add(&mut self, out: &mut Self::Tensor, x: &Self::Tensor, w: &Self::Linear);

    /// `out = silu(gate) * up` where a row of `gate_up` is `[gate | up]` (Shazeer 2020).
    fn swiglu(&mut self, out: &mut Self::Tensor, gate_up: &Self::Tensor);

    /// Rotation angles: row `i` of `out` (`head_dim` wide) becomes `[cos(a) | sin(a)] * scale` with
    /// `a[c] = positions[i] * inv_freq[sets[i]][c]` in f32, `c < head_dim / 2`; `inv_freq` holds sets of `head_dim / 2`
    /// values. Several sets exist only for dynamic NTK scaling.
    fn rope_angles(
        &mut self,
        out: &mut Self::Tensor,
        positions: &[u32],
        inv_freq: &[f32],
        sets: &[u32],
        scale: f32,
    );

    /// Before the first layer of a step: gives every seat of `batch` its quota, taking frames from those that have too many
    /// first. In unified memory nothing.
    fn balance(&mut self, kv: &mut Self::Kv, batch: &Batch);

    /// Between the operations of a step: (seat, layer) may hold `extents` extents of cache frames from now on, or as many as are free;
    /// what it has too many of it gives back, the pages first that were not needed for longest. For a prompt that goes layer by layer,
    /// which holds much of one layer and little of the others. Nothing where frames are shared, and in unified memory.
    fn grant(&mut self, kv: &mut Self::Kv, seat: SeatIndex, layer: usize, extents: usize);

    /// Before the first layer of a step: brings the digests of the blocks of those that [read
    /// them](Batch::reads_digests) to HBM, where there are places; see [`crate::places`]. Those blocks must not be more than the places.
    fn place_digests(&mut self, digests: &mut Self::Digests, batch: &Batch);

    /// For each row `[q | k | v]` of `qkv`: normalises every head of q and k by `qk_norm` (weights `[head_dim]`, eps)
    /// where given, rotates q and k by `angles` (half-split pairs `(c, c + head_dim / 2)`, Su et al. 2021), both in
    /// place, and writes k and v into the open page at the row's position. The first slot of a page clears the rest of
    /// that page.
    fn append(
        &mut self,
        kv: &mut Self::Kv,
        layer: usize,
        qkv: &mut Self::Tensor,
        heads: HeadShape,
        qk_norm: Option<(&Self::Vector, &Self::Vector, f32)>,
        angles: &Self::Tensor,
        batch: &Batch,
    );

    /// Makes the digests of the partitions that the rows of `batch` complete, from the keys in `kv`; where these are clusters, also
    /// the copy of their spans that is in their order, which is clean at once.
    fn digest(&mut self, digests: &mut Self::Digests, kv: &mut Self::Kv, layer: usize, batch: &Batch);

    /// Saves the pages that the rows of `batch` fill to DRAM: they are *saving* until a copy is complete, which may be after
    /// this returns, and *clean* from then on. Comes after the digests are made. In unified memory nothing.
    ///
    /// Those that several rows of a sequence fill also become resident, page by page, head by head, as long as (seat, layer) has free
    /// cache frames: later rows of a prompt find them there. Nothing gives way for them.
    fn save(&mut self, kv: &mut Self::Kv, layer: usize, batch: &Batch);

    /// From here on in this layer, the pages that the sequences of `batch` have filled count as earlier ones do: [`Backend::resolve`]
    /// looks them up, and they are fetched from DRAM, if they are not local for a row at the end of the context. Comes after their
    /// last wave of attention. In unified memory nothing.
    fn settle(&mut self, kv: &mut Self::Kv, batch: &Batch);

    /// Scores the candidates of every row of [`Batch::sparse_rows`] against the queries in `qkv`, as the row's method
    /// says. Rows that attend to everything in this layer are passed over.
    fn score(
        &mut self,
        selection: &mut Self::Selection,
        digests: &[Self::Digests],
        kv: &Self::Kv,
        layer: usize,
        qkv: &Self::Tensor,
        heads: HeadShape,
        batch: &Batch,
    );

    /// Turns scores into selections: the always-set and the `take` best candidates, ties to the earlier one. Where
    /// partitions are clusters, `digests` say how many slots those have, and the selection also keeps what
    /// [`Backend::attend`] needs of pseudo-tokens.
    fn select(
        &mut self,
        selection: &mut Self::Selection,
        digests: &[Self::Digests],
        layer: usize,
        heads: HeadShape,
        batch: &Batch,
    );

    /// Counts what the rows of [`Batch::sparse_rows`] select in `layer`, and compares it with what the rows before them did: see
    /// [`crate::tally`]. Comes once per layer, after the selections are made; those that nobody attends to are not counted. Without
    /// [memory](Backend::tally_within) for it nothing.
    fn tally(&mut self, kv: &mut Self::Kv, layer: usize, batch: &Batch, selection: &Self::Selection);

    /// Finds a frame for every page that [`Backend::attend`] will read with the same arguments, and returns in how many
    /// *waves* that has to be done, at least one.
    ///
    /// Pages before the local ones of a seat are looked up, row by row, head by head, page by page in ascending order. If
    /// no more than the quota of (seat, layer) are named, all of them become resident, and the oldest others give way.
    /// Else all that is not named gives way, the first missing ones take the free frames, and the rest passes through the frames
    /// of a wave, whole splits at a time. Where requests share frames ([`EvictionRule::Global`](crate::residency::EvictionRule)),
    /// the batch as a whole is looked up, in the frames of its layer.
    fn resolve(
        &mut self,
        kv: &mut Self::Kv,
        layer: usize,
        heads: HeadShape,
        window: Option<usize>,
        batch: &Batch,
        selection: Option<&Self::Selection>,
    ) -> usize;

    /// Fetches the pages that [`Backend::resolve`] missed and `wave` needs, of all sequences and heads at once.
    fn gather(&mut self, kv: &mut Self::Kv, wave: usize);

    /// Causal attention of the query part of `qkv` over the pages of each sequence, positions `0..=position` of the
    /// row, the last `window` of them where given: `out[h] = softmax(q_h K^T / sqrt(head_dim)) V`, `[rows, q_cols]`.
    /// With a `selection`, made for this batch and layer, the rows of [`Batch::sparse_rows`] attend to exactly the
    /// slots in it, and to its pseudo-tokens, which are merged last; then there is no window.
    ///
    /// Partial results are made per split, the pages that hold [`crate::SPLIT_TOKENS`] slots and follow one another
    /// among those selected, and merged in ascending order, wave after wave. `out` is complete after the last wave, and so is
    /// `lse` where it is asked for: `[rows, q_heads]`, `ln sum exp(q_h K^T / sqrt(head_dim))` over all that was attended to.
    fn attend(
        &mut self,
        out: &mut Self::Tensor,
        lse: Option<&mut Self::Tensor>,
        kv: &Self::Kv,
        layer: usize,
        qkv: &Self::Tensor,
        heads: HeadShape,
        window: Option<usize>,
        batch: &Batch,
        selection: Option<&Self::Selection>,
        wave: usize,
    );

    /// What `selection` covers of dense attention, for those of `inspections` that are asked for in `layer`: added to what was
    /// found. The row is the last one of its sequence in `batch`; one that attends to everything covers everything. Comes after
    /// the last wave of [`Backend::attend`].
    ///
    /// All keys of a context are read. Those that are not in HBM pass through the frames of a wave; nothing becomes resident or
    /// gives way, and no counter of pages changes but that of the bytes fetched. Same bits whatever is resident.
    fn cover(
        &mut self,
        inspections: &mut Inspections,
        kv: &mut Self::Kv,
        layer: usize,
        qkv: &Self::Tensor,
        heads: HeadShape,
        batch: &Batch,
        selection: &Self::Selection,
    );

    /// Draws one token per entry of `rows` from `logits` (`[.., vocab]`), as [`crate::sample::sample`] does; clears
    /// `out` first.
    fn sample(&mut self, out: &mut SampleOutput, logits: &Self::Tensor, rows: &[SampleRow]);

    // ---- the HBM tier, between steps -----------------------------------------------------------------------------

    /// Forgets what HBM holds for `seat`, once everything that it was saving is in DRAM.
    fn release(&mut self, kv: &mut Self::Kv, seat: SeatIndex);

    /// Writes what HBM alone has of the pages of `seat` to their blocks in `table`, those that are open among them: its sequence
    /// keeps its blocks, leaves its seat, and goes on in another one later. In unified memory nothing.
    fn park(&mut self, kv: &mut Self::Kv, seat: SeatIndex, table: &[BlockIndex]);

    /// How much of `digests` is in HBM.
    fn digest_state(&self, digests: &Self::Digests) -> DigestState;

    /// Bytes of `digests` that were copied to HBM for `seat` in the last step that placed any; those of blocks that sequences share
    /// are the first one's.
    fn digest_loads(&self, digests: &Self::Digests, seat: SeatIndex) -> u64;

    /// What was [tallied](Backend::tally) since the start.
    fn overlap(&self, kv: &Self::Kv) -> Overlap;

    /// What the last row of `seat` selected in the last step that it took part in.
    fn row_tally(&self, kv: &Self::Kv, seat: SeatIndex) -> RowTally;

    /// The pages that the last rows of an answer selected in `seat`, since it was last released; nothing where nothing is tallied.
    fn working_set(&self, kv: &Self::Kv, seat: SeatIndex) -> WorkingSet;

    /// Tokens of `seat` whose pages are clean in all layers; everything in unified memory.
    fn saved_tokens(&mut self, kv: &mut Self::Kv, seat: SeatIndex) -> usize;

    /// The state of the HBM tier; `None` in unified memory.
    fn tier_state(&self, kv: &Self::Kv) -> Option<TierState>;

    /// What happened to the pages of `seat` since it was last released, and the cache frames that it holds.
    fn seat_counters(&self, kv: &Self::Kv, seat: SeatIndex) -> (SeatCounters, usize);

    /// Panics unless the tables agree with each other, and every resident page of the sequences of `batch` with its copy in
    /// DRAM. Slow: for tests.
    fn check_tier(&mut self, kv: &Self::Kv, batch: &Batch);

    /// The resident pages of (seat, layer), ascending: `(head, page)`. For tests.
    fn read_resident(&mut self, kv: &Self::Kv, seat: SeatIndex, layer: usize) -> Vec<(usize, usize)>;

    // ---- pages, for tests and benches --------------------------------------------------------------------------

    /// Writes whole pages of K and V, `[page_tokens, head_dim]` each, for one (layer, block, head) in DRAM.
    fn write_page(
        &mut self,
        kv: &mut Self::Kv,
        layer: usize,
        block: BlockIndex,
        head: usize,
        k: &[f32],
        v: &[f32],
    );

    /// Reads them back: `(k, v)`, `[page_tokens, head_dim]` each.
    fn read_page(
        &mut self,
        kv: &Self::Kv,
        layer: usize,
        block: BlockIndex,
        head: usize,
    ) -> (Vec<f32>, Vec<f32>);

    /// The digests of the partitions that end in (layer, block, head), one after the other, without padding.
    fn read_digests(
        &mut self,
        digests: &Self::Digests,
        layer: usize,
        block: BlockIndex,
        head: usize,
    ) -> Vec<f32>;

    /// Scores of partitions `0..scores.len()` for the sparse row at `place`, a KV head and a line: see
    /// [`crate::sparse::Method::lines`]. Only those of candidates mean anything.
    fn read_scores(
        &mut self,
        selection: &Self::Selection,
        place: usize,
        head: usize,
        line: usize,
        scores: &mut [f32],
    );

    /// Puts such scores in the place of those that were computed.
    fn write_scores(
        &mut self,
        selection: &mut Self::Selection,
        place: usize,
        head: usize,
        line: usize,
        scores: &[f32],
    );

    /// The selection of the sparse row at `place` and a KV head, one bit per slot; `None` if the row attends to
    /// everything. The first may be those of a copy in the order of clusters: [`RowPlan::ordered`](crate::sparse::RowPlan).
    fn read_selection(&mut self, selection: &Self::Selection, place: usize, head: usize) -> Option<Vec<u64>>;

    /// Puts such a bitmap in the place of the one that was made, which then attends to no pseudo-tokens.
    fn write_selection(&mut self, selection: &mut Self::Selection, place: usize, head: usize, bits: &[u64]);
}
