//! `sparseserve bench metadata`: bytes of the tables that lead from pages to frames.
//!
//! The tables are made and filled as a server fills them, for one request and with its share of HBM, and counted; the others
//! would be alike. Pages lie where nothing is known of them: anywhere in the context. Selections that keep together
//! need fewer leaves.

use std::io::Write;

use engine::REPLAY_ROWS;
use ops::places::Places;
use ops::residency::{EXTENT_FRAMES, Residency, ResidencyShape};
use ops::sparse::{DigestKind, DigestSpec};
use ops::tier::{TierSpec, Transfer};
use ops::{DType, KvGeometry, PAGE_TOKENS_ALLOWED, Random, SeatIndex};
use serde_json::{Value, json};

use super::commands::BenchMetadataArgs;
use super::failure::Failure;
use super::size::{Bytes, Size};

/// Bytes of an entry in flat tables: a frame, a stamp, and a host address.
const FLAT_ENTRY_BYTES: usize = 4 + 1 + 8;
/// Tokens of a partition whose digests are counted.
const PARTITION_TOKENS: usize = 32;

/// Bytes for one setting.
struct Row {
    context: usize,
    requests: usize,
    hbm_bytes: u64,
    /// Share of the pages of all contexts that are resident.
    resident: f64,
    /// Directories, leaves and frames that hold something.
    tables: u64,
    /// The same, were every leaf in use.
    tables_max: u64,
    /// Block tables: one entry per block and sequence stands for all its host addresses.
    block_tables: u64,
    /// What leads from a block to its digests in HBM.
    places: u64,
    /// Pages that a step attends to in a layer, were that everything.
    lists: u64,
    digests: u64,
    flat: u64,
}

/// Runs the command.
pub fn run(args: &BenchMetadataArgs) -> Result<(), Failure> {
    let sizes = [(args.layers, 1024), (args.kv_heads, 1024), (args.head_dim, 1024)];
    let counts =
        args.contexts.iter().map(|&n| (n, 1 << 24)).chain(args.requests.iter().map(|&n| (n, 1 << 12)));
    if sizes.into_iter().chain(counts).any(|(n, most)| n == 0 || n > most)
        || !PAGE_TOKENS_ALLOWED.contains(&args.page_tokens)
    {
        return Err(Failure::input(format!(
            "layers, heads and channels must be from 1 to 1024, contexts to {}, requests to {}, and --page-tokens one \
             of {PAGE_TOKENS_ALLOWED:?}",
            1 << 24,
            1 << 12
        )));
    }
    let mut rows = Vec::new();
    for &context in &args.contexts {
        for &requests in &args.requests {
            for &hbm in &args.hbm {
                let Size::Bytes(hbm_bytes) = hbm else {
                    return Err(Failure::input("--hbm is a number of bytes here, as in 24GiB"));
                };
                rows.push(row(args, context, requests, hbm_bytes)?);
            }
        }
    }
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", rows.iter().map(Row::json).collect::<Value>())?;
        return Ok(());
    }
    writeln!(
        out,
        "{} layers, {} KV heads of {} in bf16, pages of {} tokens",
        args.layers, args.kv_heads, args.head_dim, args.page_tokens
    )?;
    writeln!(
        out,
        "{:>8} {:>8} {:>8} {:>9} {:>11} {:>11} {:>12} {:>11} {:>11} {:>11} {:>11} {:>11}",
        "context",
        "requests",
        "HBM",
        "resident",
        "tables",
        "at most",
        "block tables",
        "places",
        "lists",
        "all",
        "flat",
        "digests"
    )?;
    for r in &rows {
        writeln!(
            out,
            "{:>8} {:>8} {:>8} {:>8.1}% {:>11} {:>11} {:>12} {:>11} {:>11} {:>11} {:>11} {:>11}",
            r.context,
            r.requests,
            Bytes(r.hbm_bytes).to_string(),
            100.0 * r.resident,
            Bytes(r.tables).to_string(),
            Bytes(r.tables_max).to_string(),
            Bytes(r.block_tables).to_string(),
            Bytes(r.places).to_string(),
            Bytes(r.lists).to_string(),
            Bytes(r.all()).to_string(),
            Bytes(r.flat).to_string(),
            Bytes(r.digests).to_string(),
        )?;
    }
    Ok(())
}

fn row(args: &BenchMetadataArgs, context: usize, requests: usize, hbm_bytes: u64) -> Result<Row, Failure> {
    let geometry = KvGeometry {
        num_layers: args.layers,
        kv_heads: args.kv_heads,
        head_dim: args.head_dim,
        page_tokens: args.page_tokens,
        dtype: DType::Bf16,
    };
    let blocks = geometry.blocks(context);
    let pages = blocks as u64 * (args.layers * args.kv_heads) as u64;
    let frames = (hbm_bytes / geometry.page_bytes() as u64).min(pages * requests as u64);
    let extents = (frames / requests as u64) as usize / EXTENT_FRAMES / args.layers * args.layers;
    let shape = ResidencyShape {
        seats: 1,
        layers: args.layers,
        kv_heads: args.kv_heads,
        pages_max: blocks,
        extents,
        eviction: args.eviction.rule(),
    };
    if blocks.saturating_mul(args.kv_heads) >= u32::MAX as usize || shape.bytes() > 8 << 30 {
        return Err(Failure::input("the tables of one request would take more than 8 GiB; ask for less"));
    }
    let mut tables = Residency::new(shape);
    let (seat, mut random) = (SeatIndex(0), Random::new(1));
    for layer in 0..args.layers {
        tables.grow(seat, layer, extents / args.layers);
        let quota = tables.quota(seat, layer);
        tables.begin(seat, layer);
        let all = blocks * args.kv_heads;
        let mut order: Vec<u32> = (0..all as u32).collect();
        for i in 0..quota.min(all) {
            let other = i + random.below(all - i);
            order.swap(i, other);
            tables.insert(seat, layer, order[i] as usize % args.kv_heads, order[i] as usize / args.kv_heads);
        }
    }
    tables.check();
    let tier = TierSpec {
        bytes: hbm_bytes,
        seats: requests,
        context_max: context,
        inject_tokens_max: 0,
        replay_rows: REPLAY_ROWS,
        partition_tokens_max: PARTITION_TOKENS,
        copies: 0,
        eviction: args.eviction.rule(),
        transfer: Transfer::Fused,
        link: None,
        poison: false,
    };
    let digests = DigestSpec { kind: DigestKind::MinMax, partition_tokens: PARTITION_TOKENS };
    let all = requests as u64;
    Ok(Row {
        context,
        requests,
        hbm_bytes,
        resident: tables.frames_in_use() as f64 / pages as f64,
        tables: all * tables.bytes_in_use(),
        tables_max: all * shape.bytes(),
        block_tables: all * blocks as u64 * 4,
        places: Places::bytes(requests * blocks, requests * blocks),
        lists: tier.list_bytes(&geometry),
        digests: all.saturating_mul(blocks as u64 * digests.block_bytes(&geometry) as u64),
        flat: all.saturating_mul(pages * FLAT_ENTRY_BYTES as u64),
    })
}

impl Row {
    /// Bytes of all tables and lists, as they are in use.
    fn all(&self) -> u64 {
        self.tables + self.block_tables + self.places + self.lists
    }

    fn json(&self) -> Value {
        json!({
            "context": self.context, "requests": self.requests, "hbm_bytes": self.hbm_bytes,
            "resident": self.resident, "table_bytes": self.tables, "table_bytes_max": self.tables_max,
            "block_table_bytes": self.block_tables, "place_bytes": self.places, "list_bytes": self.lists,
            "all_bytes": self.all(), "flat_bytes": self.flat, "digest_bytes": self.digests,
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        args: BenchMetadataArgs,
    }

    /// Llama-3.1-70B at 128K tokens and 32 requests: SPIN reports under 2 GB for its own tables, 100 GB for flat lists.
    #[test]
    fn tables_take_less_than_those_of_spin() {
        for rule in ["bucketed", "exact", "global"] {
            let Flags { args } = Flags::parse_from(["metadata", "--eviction", rule]);
            for hbm in [8u64 << 30, 24 << 30, 64 << 30] {
                let row = row(&args, 131_072, 32, hbm).expect("a row");
                assert!(row.all() < 1 << 30 && row.tables <= row.tables_max, "{rule} {hbm}: {}", row.json());
                let page_slots = 131_072 / 16 * 80 * 8 * 32;
                assert_eq!(row.flat, page_slots * FLAT_ENTRY_BYTES as u64);
                assert!(row.places > 0 && row.lists > 0 && row.flat > 2 * row.all(), "{rule} {hbm}");
            }
        }
    }
}
