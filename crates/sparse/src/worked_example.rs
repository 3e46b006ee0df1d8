//! A worked example: what a new policy takes, in one file, as `CONTRIBUTING.md` walks through it. Compiled and run by the tests, and
//! offered by no server.
//!
//! `infllm`, after Xiao et al. 2024, InfLLM: blocks of 128 tokens, scored once per layer, with the beginning of the context and a
//! window always attended. InfLLM scores a block by a few representative keys; here it is by the mean of all its keys, for which
//! there is a digest.

use ops::sparse::{Always, DigestKind, DigestSpec, Method, Reduce, Rule, Scope, Score};

use crate::{Error, OptionDoc, Options, Policy, Setup};

/// The line that `POLICIES` would get.
pub const INFLLM: Policy = Policy {
    name: "infllm",
    summary: "blocks of 128 tokens by the mean of their keys, one selection per layer",
    source: "Xiao et al. 2024, InfLLM: Training-Free Long-Context Extrapolation for LLMs with an Efficient Context Memory",
    options: &[
        OptionDoc {
            name: "partition",
            default: "128",
            help: "tokens per block; divides the page or is a multiple of it",
        },
        OptionDoc {
            name: "sinks",
            default: "128",
            help: "first tokens that are always attended, in whole blocks",
        },
        OptionDoc {
            name: "window",
            default: "512",
            help: "latest tokens that are always attended, in whole blocks",
        },
    ],
    build,
};

fn build(options: &mut Options) -> Result<Setup, Error> {
    let partition_tokens = options.number("partition", 128, 1, 1024)?;
    let method = Method {
        dense_layers: 0,
        partition_tokens,
        // `q . mean` with the digests below, the first and only ones that it asks for.
        score: Score::Digest { digests: 0 },
        // InfLLM adds the products of all heads; their mean has the same order.
        reduce: Reduce::Mean,
        softmax: false,
        scope: Scope::Layer,
        always: Always {
            sink_tokens: options.number("sinks", 128, 0, 1 << 20)?,
            // At least 1, so that the block which the token itself is in, and which has no digest yet, is attended.
            recent_tokens: options.number("window", 512, 1, 1 << 20)?,
            generated_tokens: 0,
            outliers: 0,
        },
        open_competes: false,
        take_min: 1,
        rule: Rule::Top,
    };
    Ok(Setup { digest: Some(DigestSpec { kind: DigestKind::Mean, partition_tokens }), method: Some(method) })
}

mod tests {
    use ops::reference::Reference;
    use ops::sparse::{Attention, SelectionLimits};
    use ops::{Backend, Batch, BlockIndex, DType, HeadShape, KvGeometry, Random, SeatIndex, SequenceRows};

    use super::*;

    const HEADS: HeadShape = HeadShape { q_heads: 4, kv_heads: 2, head_dim: 8 };
    const PAGE: usize = 16;
    const CONTEXT: usize = 128 * 11 + 37;
    const BUDGET: u32 = 1200;

    /// Options are checked by name and range, without a line of code here.
    #[test]
    fn its_options_are_those_it_documents() {
        let setup = |text: &str| INFLLM.setup(&Options::parse(text).expect("pairs"));
        let plain = setup("").expect("defaults");
        for option in INFLLM.options {
            let named = setup(&format!("{}={}", option.name, option.default)).expect("its default");
            assert_eq!(named, plain, "{}", option.name);
        }
        assert!(matches!(setup("blocks=3"), Err(Error::NoSuchOption { policy: "infllm", .. })));
        assert!(matches!(setup("window=0"), Err(Error::BadValue { option: "window", .. })));
    }

    /// The same by definition, from keys and a query.
    fn by_definition(keys: &[Vec<f32>], query: &[f32]) -> Vec<usize> {
        let HeadShape { q_heads, head_dim, .. } = HEADS;
        let key = |p: usize, head: usize| &keys[head / HEADS.group()][p * head_dim..][..head_dim];
        // Sinks are block 0; the window of 512 begins in block 7.
        let (first, end) = (1, (CONTEXT - 512) / 128);
        let score = |block: usize| {
            let products = (block * 128..(block + 1) * 128).flat_map(|p| {
                (0..q_heads).map(move |head| {
                    let q = &query[head * head_dim..][..head_dim];
                    q.iter().zip(key(p, head)).map(|(q, k)| f64::from(q * k)).sum::<f64>()
                })
            });
            products.sum::<f64>()
        };
        let mut blocks: Vec<usize> = (first..end).collect();
        blocks.sort_by(|a, b| score(*b).total_cmp(&score(*a)));
        let always = 128 + CONTEXT - end * 128;
        blocks.truncate((BUDGET as usize - always) / 128);
        let attended = |p: &usize| p / 128 < first || p / 128 >= end || blocks.contains(&(p / 128));
        (0..CONTEXT).filter(attended).collect()
    }

    /// The operations of a device do all the rest: here the reference's, and every other backend conforms to it.
    #[test]
    fn it_selects_what_its_definition_says() {
        let Setup { digest, method } = INFLLM.setup(&Options::default()).expect("defaults");
        let (digest, methods) = (digest.expect("means"), [method.expect("sparse")]);
        for seed in 0..8 {
            println!("seed {seed}");
            let mut random = Random::new(seed);
            let mut normal = |count: usize| (0..count).map(|_| random.normal()).collect::<Vec<f32>>();
            let HeadShape { kv_heads, head_dim, .. } = HEADS;
            let geometry =
                KvGeometry { num_layers: 1, kv_heads, head_dim, page_tokens: PAGE, dtype: DType::F32 };
            let num_blocks = geometry.blocks(CONTEXT);
            let mut backend = Reference::default();
            backend.reserve(HEADS, 1, 1, CONTEXT, HEADS.qkv_cols()).expect("memory");
            let mut kv = backend.kv(geometry, num_blocks, 0, None).expect("memory");
            let table: Vec<BlockIndex> = (0..num_blocks as u32).map(BlockIndex).collect();
            let keys: Vec<Vec<f32>> = (0..kv_heads).map(|_| normal(num_blocks * PAGE * head_dim)).collect();
            for (keys, head) in keys.iter().zip(0..) {
                for (page, &block) in keys.chunks(PAGE * head_dim).zip(&table) {
                    backend.write_page(&mut kv, 0, block, head, page, page);
                }
            }
            let positions: Vec<u32> = (0..CONTEXT as u32).collect();
            let rows = |first: usize, attention| SequenceRows {
                rows: 0..(CONTEXT - first) as u32,
                first_position: first as u32,
                prompt_len: CONTEXT as u32 - 1,
                blocks: 0..num_blocks as u32,
                attention,
                seat: SeatIndex(0),
                quota: 0,
            };
            let mut digests = backend.digests(digest, geometry, num_blocks, None, None).expect("memory");
            let prompt = [rows(0, Attention::Dense)];
            backend.digest(&mut digests, &mut kv, 0, &batch(&positions, &prompt, &table, &methods));
            let mut qkv = backend.tensor(1, HEADS.qkv_cols()).expect("memory");
            let query = normal(HEADS.qkv_cols());
            backend.upload(&mut qkv, &query);
            let limits = SelectionLimits::new(&methods, HEADS, PAGE, 1, CONTEXT);
            let (mut selection, _) = backend.selection(limits).expect("memory");
            let newest = [rows(CONTEXT - 1, Attention::Sparse { method: 0, budget: BUDGET })];
            let step = batch(&positions[CONTEXT - 1..], &newest, &table, &methods);
            let digests = [digests];
            backend.score(&mut selection, &digests, &kv, 0, &qkv, HEADS, &step);
            backend.select(&mut selection, &digests, 0, HEADS, &step);
            let expected = by_definition(&keys, &query);
            for head in 0..kv_heads {
                let bits = backend.read_selection(&selection, 0, head).expect("not everything");
                let selected = (0..CONTEXT).filter(|p| bits[p / 64] >> (p % 64) & 1 == 1);
                assert_eq!(selected.collect::<Vec<_>>(), expected, "KV head {head}");
            }
        }
    }

    /// Whose tokens are of no matter.
    fn batch<'a>(
        positions: &'a [u32],
        sequences: &'a [SequenceRows],
        block_tables: &'a [BlockIndex],
        methods: &'a [Method],
    ) -> Batch<'a> {
        Batch { tokens: positions, positions, sequences, block_tables, methods }
    }
}
