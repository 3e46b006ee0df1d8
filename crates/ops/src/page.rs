//! The geometry of the KV cache: blocks, pages and heads.

use crate::DType;

/// Page sizes that a server may be started with, in tokens.
pub const PAGE_TOKENS_ALLOWED: [usize; 4] = [8, 16, 32, 64];

/// Slots per *split*, the unit of attention arithmetic: partial results are made per split of consecutive attended
/// slots and merged in ascending order, whatever the number of threads, the chunking or the batch. That is what
/// keeps bits equal. A multiple of every allowed page size.
pub const SPLIT_TOKENS: usize = 512;

const _: () = {
    let mut i = 0;
    while i < PAGE_TOKENS_ALLOWED.len() {
        assert!(SPLIT_TOKENS.is_multiple_of(PAGE_TOKENS_ALLOWED[i]));
        i += 1;
    }
};

/// Place of a block in the DRAM pool: a logical run of `page_tokens` tokens, over all layers and KV heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockIndex(pub u32);

impl BlockIndex {
    /// The index as an array position.
    pub const fn at(self) -> usize {
        self.0 as usize
    }
}

/// Head layout of attention. `q_heads` is a multiple of `kv_heads`; query head `h` reads KV head
/// `h / (q_heads / kv_heads)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadShape {
    /// Query heads per layer.
    pub q_heads: usize,
    /// KV heads per layer.
    pub kv_heads: usize,
    /// Channels per head; even.
    pub head_dim: usize,
}

impl HeadShape {
    /// Query heads that share one KV head.
    pub const fn group(self) -> usize {
        self.q_heads / self.kv_heads
    }

    /// Width of the query part of a fused QKV row.
    pub const fn q_cols(self) -> usize {
        self.q_heads * self.head_dim
    }

    /// Width of a fused QKV row: `[q | k | v]`.
    pub const fn qkv_cols(self) -> usize {
        (self.q_heads + 2 * self.kv_heads) * self.head_dim
    }
}

/// Shape of the KV pool of one model.
///
/// A *page* holds K, then V, of one block for one (layer, KV head). The pool is laid out by layer, then block, then
/// head, so the address of a page needs no table: `layer_base(layer) + (block * kv_heads + head) * page_bytes`.
/// What the bytes inside a page mean belongs to the backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvGeometry {
    /// Layers that keep KV.
    pub num_layers: usize,
    /// KV heads per layer.
    pub kv_heads: usize,
    /// Channels per head.
    pub head_dim: usize,
    /// Slots per page, one of [`PAGE_TOKENS_ALLOWED`].
    pub page_tokens: usize,
    /// Element type of K and V.
    pub dtype: DType,
}

impl KvGeometry {
    /// Bytes of one page.
    pub const fn page_bytes(&self) -> usize {
        2 * self.page_tokens * self.head_dim * self.dtype.bytes()
    }

    /// Bytes of one block: its pages over all layers and heads.
    pub const fn block_bytes(&self) -> usize {
        self.num_layers * self.kv_heads * self.page_bytes()
    }

    /// Bytes of KV per token.
    pub const fn token_bytes(&self) -> usize {
        self.block_bytes() / self.page_tokens
    }

    /// Blocks that `tokens` tokens occupy.
    pub const fn blocks(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.page_tokens)
    }
}
