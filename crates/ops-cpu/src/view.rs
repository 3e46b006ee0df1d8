//! What a unit of attention looks at.

use ops::cluster::OrderedSlots;
use ops::{BlockIndex, SPLIT_TOKENS};

use crate::pages::Layers;
use crate::selection::Selected;
use crate::tier::{Entry, Tier};

/// The pages of one KV head, and the consecutive rows of a sequence that attend to them with all query heads of its
/// group. Row `r` and query head `g` make up line `r * group + g` of everything below.
pub struct HeadView<'a> {
    /// Pages.
    pub kv: &'a Layers,
    /// Layer.
    pub layer: usize,
    /// KV head.
    pub head: usize,
    /// Block table of the sequence.
    pub blocks: &'a [BlockIndex],
    /// Queries of the first row.
    pub queries: *const f32,
    /// Floats to those of the next row.
    pub queries_stride: usize,
    /// Output of the first row.
    pub out: *mut f32,
    /// Floats to that of the next row.
    pub out_stride: usize,
    /// Where the log-sum-exp of the first row goes, if anybody wants it, and floats to that of the next row.
    pub lse: Option<(*mut f32, usize)>,
    /// Query heads.
    pub group: usize,
    /// Channels.
    pub head_dim: usize,
    /// Slots per page.
    pub page_tokens: usize,
    /// Positions that a row attends to, itself included.
    pub window: usize,
    /// Position of the first row.
    pub first_position: usize,
    /// Rows.
    pub num_rows: usize,
    /// What its only row attends to; `None` for all up to its position, within the window.
    pub selected: Option<Selected<'a>>,
    /// Which of them are in the order of clusters.
    pub ordered: OrderedSlots,
    /// Where the pages are, if not in the pool.
    pub frames: Option<Frames<'a>>,
}

/// The pages of an item in the frames of an HBM tier.
#[derive(Clone, Copy)]
pub struct Frames<'a> {
    /// The tier.
    pub tier: &'a Tier,
    /// Its pages in order, of this head.
    pub entries: &'a [Entry],
    /// The first of them, where nothing is selected and they are consecutive.
    pub first_page: usize,
}

impl HeadView<'_> {
    /// Page `page` in the pool.
    #[inline(always)]
    pub(crate) fn page(&self, page: usize) -> *const u8 {
        let copy = self.ordered.of(page * self.page_tokens);
        self.kv.page(self.layer, self.kv.block_in(copy, self.blocks[page]), self.head)
    }

    /// Rows times query heads.
    pub fn height(&self) -> usize {
        self.num_rows * self.group
    }

    /// Slots of `split` that row `row` attends to, relative to its start; may be empty.
    #[inline(always)]
    pub(crate) fn attended(&self, row: usize, split: usize) -> (usize, usize) {
        let start = split * SPLIT_TOKENS;
        let end = self.first_position + row + 1;
        let first = end.saturating_sub(self.window).saturating_sub(start);
        (first.min(SPLIT_TOKENS), end.saturating_sub(start).min(SPLIT_TOKENS))
    }
}
