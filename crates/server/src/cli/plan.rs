//! The memory plan: what is taken from the memory limit before anything is loaded, and what is left for KV.

use ops::KvGeometry;

use super::cgroup::MemoryLimit;
use super::failure::Failure;
use super::size::{Bytes, Size};

/// What a model needs, known from its configuration and the headers of its weight files alone.
#[derive(Clone, Debug)]
pub struct Demand {
    /// Packed weights.
    pub weights_bytes: u64,
    /// Activations and scratch memory of the largest step.
    pub activation_bytes: u64,
    /// Shape of the KV cache.
    pub kv: KvGeometry,
    /// Bytes of digests per block of it.
    pub digest_block_bytes: u64,
    /// The flag that says how large the KV pool shall be.
    pub pool_flag: &'static str,
    /// An HBM tier, which on a CPU is memory like any other.
    pub hbm: Option<Size>,
    /// Tokens of the longest request.
    pub max_context: usize,
    /// Requests that run at once.
    pub max_num_seqs: usize,
    /// Prompt tokens of one step.
    pub max_inject_tokens: usize,
}

impl Demand {
    /// Bytes of a block with its digests.
    fn block_bytes(&self) -> u64 {
        self.kv.block_bytes() as u64 + self.digest_block_bytes
    }

    /// Bytes of the HBM tier beside `kv_bytes` of blocks with their digests.
    fn hbm_bytes(&self, kv_bytes: u64) -> u64 {
        self.hbm.map_or(0, |size| size.of(kv_bytes))
    }

    /// What is left for blocks of `bytes` for them and the HBM tier.
    fn blocks_of(&self, bytes: u64) -> u64 {
        match self.hbm {
            None => bytes,
            Some(Size::Bytes(hbm)) => bytes.saturating_sub(hbm),
            Some(Size::Percent(percent)) => (bytes as f64 / (1.0 + percent / 100.0)) as u64,
        }
    }
}

/// Who gets how much.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// The limit that all of it stays below.
    pub limit: MemoryLimit,
    /// Packed weights.
    pub weights_bytes: u64,
    /// Activations and scratch.
    pub activation_bytes: u64,
    /// Left free for the tokenizer, connections and the system.
    pub headroom_bytes: u64,
    /// The KV pool.
    pub kv_bytes: u64,
    /// Blocks of the KV pool.
    pub num_blocks: usize,
    /// Tokens that the KV pool holds.
    pub kv_tokens: usize,
    /// The HBM tier, digests included; 0 without one.
    pub hbm_bytes: u64,
}

/// A tenth of the limit, within bounds: below, the tokenizer and a few connections must fit; above, more buys nothing.
fn headroom(limit_bytes: u64) -> u64 {
    (limit_bytes / 10).clamp(64 << 20, 2 << 30)
}

/// Somebody who says how much KV there shall be has judged what the rest needs; a quarter of the usual headroom remains
/// for what nobody can judge, or the first long prompt would meet the limit.
fn headroom_beside_chosen_pool(limit_bytes: u64) -> u64 {
    (headroom(limit_bytes) / 4).max(64 << 20)
}

impl MemoryPlan {
    /// Divides `limit`. `pool` is the KV pool that the user wants; the default holds every running request at full
    /// length, or what the limit leaves.
    ///
    /// # Errors
    /// When not even one request of full length fits; with the arithmetic, and the flag that would cure it.
    pub fn new(limit: MemoryLimit, demand: &Demand, pool: Option<Size>) -> Result<Self, Failure> {
        let geometry = &demand.kv;
        let block_bytes = demand.block_bytes();
        let one_request = geometry.blocks(demand.max_context) as u64 * block_bytes;
        let fixed = demand.weights_bytes.saturating_add(demand.activation_bytes);
        let flag = demand.pool_flag;
        let headroom_bytes = match pool {
            Some(_) => headroom_beside_chosen_pool(limit.bytes),
            None => headroom(limit.bytes),
        };
        let left = demand.blocks_of(limit.bytes.saturating_sub(fixed.saturating_add(headroom_bytes)));
        let kv_bytes = match pool {
            Some(size) => size.of(limit.bytes),
            None => left.min(one_request.saturating_mul(demand.max_num_seqs as u64)),
        };
        if kv_bytes > left {
            let shown = sum(demand, headroom_bytes, (flag, kv_bytes), &limit);
            let cure = match left >= one_request {
                true => format!("{flag} {}MiB would fit", left >> 20),
                false if flag == "--dram" => format!("without {flag}, {}", too_small_cure(left, demand)),
                false => too_small_cure(left, demand),
            };
            return Err(Failure::input(format!("the KV pool does not fit: {shown}; {cure}")));
        }
        if kv_bytes < one_request {
            let what = format!("KV of one request of {} tokens", demand.max_context);
            let message = match pool {
                Some(_) => format!(
                    "{flag} is too small: {what} is {}, and {flag} allows {}; {}",
                    Bytes(one_request),
                    Bytes(kv_bytes),
                    too_short_cure(kv_bytes, demand)
                ),
                None => format!(
                    "the model does not fit: {}; {}",
                    sum(demand, headroom_bytes, (&what, one_request), &limit),
                    too_small_cure(left, demand)
                ),
            };
            return Err(Failure::input(message));
        }
        // Block indices are u32, and the last of them is none.
        let num_blocks = (kv_bytes / block_bytes).min(u64::from(u32::MAX) - 1) as usize;
        let kv_bytes = num_blocks as u64 * block_bytes;
        Ok(MemoryPlan {
            limit,
            weights_bytes: demand.weights_bytes,
            activation_bytes: demand.activation_bytes,
            headroom_bytes,
            kv_bytes,
            num_blocks,
            kv_tokens: num_blocks * geometry.page_tokens,
            hbm_bytes: demand.hbm_bytes(kv_bytes),
        })
    }

    /// Whether the HBM tier that is asked for would hold all of the KV that there is without it: then it is of no use.
    pub fn fits_hbm(limit: &MemoryLimit, demand: &Demand, pool: Option<Size>) -> bool {
        let without = Self::new(limit.clone(), &Demand { hbm: None, ..demand.clone() }, pool);
        let fits = |hbm: Size, kv_bytes| hbm.of(kv_bytes) >= kv_bytes;
        demand.hbm.zip(without.ok()).is_some_and(|(hbm, plan)| fits(hbm, plan.kv_bytes))
    }
}

/// `weights A + activations B + headroom C + KV D = E, the limit is F (source)`
fn sum(demand: &Demand, headroom_bytes: u64, kv: (&str, u64), limit: &MemoryLimit) -> String {
    let mut terms = vec![("weights", demand.weights_bytes), ("activations", demand.activation_bytes), kv];
    if demand.hbm.is_some() {
        terms.push(("--hbm", demand.hbm_bytes(kv.1)));
    }
    if headroom_bytes > 0 {
        terms.push(("headroom", headroom_bytes));
    }
    let total = terms.iter().fold(0, |sum: u64, term| sum.saturating_add(term.1));
    let terms: Vec<String> = terms.iter().map(|(name, bytes)| format!("{name} {}", Bytes(*bytes))).collect();
    format!(
        "{} = {}, the limit is {} ({})",
        terms.join(" + "),
        Bytes(total),
        Bytes(limit.bytes),
        limit.source
    )
}

/// What to do where the model leaves `bytes` for KV: about the largest term, for no other can make up for it.
fn too_small_cure(bytes: u64, demand: &Demand) -> String {
    let one_request = demand.kv.blocks(demand.max_context) as u64 * demand.block_bytes();
    if let Some(Size::Bytes(hbm)) = demand.hbm
        && hbm > demand.weights_bytes.max(one_request).max(demand.activation_bytes)
    {
        return format!("lower --hbm, which is {}", Bytes(hbm));
    }
    if demand.activation_bytes > demand.weights_bytes.max(one_request) {
        // A step has a row for each running request and each prompt token.
        let (flag, value) = match demand.max_num_seqs > demand.max_inject_tokens {
            true => ("--max-num-seqs", demand.max_num_seqs),
            false => ("--max-inject-tokens", demand.max_inject_tokens),
        };
        return format!("lower {flag}, which is {value}");
    }
    too_short_cure(bytes, demand)
}

/// What to do where there are `bytes` for KV.
fn too_short_cure(bytes: u64, demand: &Demand) -> String {
    let geometry = &demand.kv;
    let tokens = bytes / demand.block_bytes() * geometry.page_tokens as u64;
    if tokens > 0 {
        return format!("--max-context {tokens} would fit");
    }
    match geometry.dtype {
        ops::DType::F32 => "--dtype bf16 halves it; else take a smaller model or more memory".into(),
        _ => "take a smaller model or more memory".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::cgroup::LimitSource;
    use ops::DType;

    const GIB: u64 = 1 << 30;

    /// Llama-3-8B: 128 KiB of KV per token, 16 GiB at 131,072 tokens.
    fn demand() -> Demand {
        Demand {
            weights_bytes: 15 * GIB,
            activation_bytes: GIB / 2,
            kv: KvGeometry {
                num_layers: 32,
                kv_heads: 8,
                head_dim: 128,
                page_tokens: 16,
                dtype: DType::Bf16,
            },
            digest_block_bytes: 0,
            pool_flag: "--dram",
            hbm: None,
            max_context: 131_072,
            max_num_seqs: 2,
            max_inject_tokens: 512,
        }
    }

    fn plan(limit: u64, demand: &Demand, dram: Option<Size>) -> Result<MemoryPlan, String> {
        let limit = MemoryLimit { bytes: limit, source: LimitSource::Machine };
        MemoryPlan::new(limit, demand, dram).map_err(|failure| failure.line().unwrap_or_default())
    }

    #[test]
    fn default_is_what_requests_can_use_and_no_more() {
        let roomy = plan(256 * GIB, &demand(), None).expect("fits");
        assert_eq!((roomy.kv_bytes, roomy.kv_tokens, roomy.num_blocks), (32 * GIB, 262_144, 16_384));
        let tight = plan(40 * GIB, &demand(), None).expect("fits");
        assert_eq!(tight.headroom_bytes, 2 * GIB);
        assert_eq!(tight.kv_bytes, 45 * GIB / 2, "40 - 15 - 0.5 - 2");
    }

    #[test]
    fn digests_share_the_pool() {
        let geometry = demand().kv;
        // Min and max per page: a sixteenth of its KV.
        let digest_block_bytes = geometry.block_bytes() as u64 / 16;
        let planned = plan(40 * GIB, &Demand { digest_block_bytes, ..demand() }, None).expect("fits");
        assert_eq!(
            planned.num_blocks as u64,
            45 * GIB / 2 / (geometry.block_bytes() as u64 + digest_block_bytes)
        );
        assert!(planned.kv_bytes <= 45 * GIB / 2);
    }

    #[test]
    fn hbm_for_all_of_the_kv_is_no_tier() {
        let fits = |hbm, dram| {
            let limit = MemoryLimit { bytes: 40 * GIB, source: LimitSource::Machine };
            MemoryPlan::fits_hbm(&limit, &Demand { hbm: Some(hbm), ..demand() }, dram)
        };
        // Without a tier 22.5 GiB are left for KV.
        assert!(!fits(Size::Bytes(20 * GIB), None) && fits(Size::Bytes(23 * GIB), None));
        assert!(!fits(Size::Percent(99.0), None) && fits(Size::Percent(100.0), None));
        // Both of them together would not fit.
        let dram = Some(Size::Percent(50.0));
        assert!(!fits(Size::Bytes(19 * GIB), dram) && fits(Size::Bytes(20 * GIB), dram));
    }

    #[test]
    fn what_cannot_fit_is_refused_with_the_arithmetic_and_a_cure() {
        let error = plan(24 * GIB, &demand(), None).expect_err("does not fit");
        for part in
            ["15 GiB", "512 MiB", "131072 tokens 16 GiB", "headroom 2 GiB", "33.50 GiB", "24 GiB (memory"]
        {
            assert!(error.contains(part), "{part}: {error}");
        }
        assert!(error.ends_with("--max-context 53248 would fit"), "{error}");
        let cured = Demand { max_context: 53_248, ..demand() };
        assert!(plan(24 * GIB, &cured, None).is_ok(), "the cure works");
        let error = plan(8 * GIB, &demand(), None).expect_err("does not fit");
        assert!(error.ends_with("take a smaller model or more memory"), "{error}");
    }

    #[test]
    fn the_cure_is_about_the_largest_term() {
        let crowded = Demand { activation_bytes: 900 * GIB, max_num_seqs: 1_000_000, ..demand() };
        let error = plan(64 * GIB, &crowded, None).expect_err("does not fit");
        assert!(error.ends_with("lower --max-num-seqs, which is 1000000"), "{error}");
        let hasty = Demand { activation_bytes: u64::MAX, max_inject_tokens: 1 << 31, ..demand() };
        for dram in [None, Some(Size::Bytes(GIB))] {
            let error = plan(64 * GIB, &hasty, dram).expect_err("does not fit");
            assert!(error.ends_with("lower --max-inject-tokens, which is 2147483648"), "{error}");
        }
    }

    #[test]
    fn a_chosen_pool_is_checked_from_both_sides() {
        assert_eq!(plan(64 * GIB, &demand(), Some(Size::Percent(50.0))).expect("fits").kv_bytes, 32 * GIB);
        let error = plan(64 * GIB, &demand(), Some(Size::Bytes(60 * GIB))).expect_err("too large");
        assert!(error.contains("--dram 60 GiB") && error.ends_with("--dram 49152MiB would fit"), "{error}");
        assert!(plan(64 * GIB, &demand(), Some(Size::Bytes(48 * GIB))).is_ok(), "the cure works");
        let error = plan(64 * GIB, &demand(), Some(Size::Percent(99.0))).expect_err("too large");
        assert!(error.contains("headroom 512 MiB"), "{error}");
        // The demo model in a small machine: weights of 8 MiB leave nearly all of it, and the tokenizer needs some.
        let small = Demand { weights_bytes: 8 << 20, activation_bytes: 8 << 20, max_context: 64, ..demand() };
        let error = plan(GIB, &small, Some(Size::Percent(99.0))).expect_err("too large");
        assert!(error.contains("headroom 64 MiB"), "{error}");
        let error = plan(64 * GIB, &demand(), Some(Size::Bytes(GIB))).expect_err("too small");
        assert!(error.ends_with("--max-context 8192 would fit"), "{error}");
        // Where KV lives in HBM alone, that is what is too small.
        let in_hbm = Demand { pool_flag: "--hbm", ..demand() };
        let error = plan(64 * GIB, &in_hbm, Some(Size::Bytes(GIB))).expect_err("too small");
        assert!(error.starts_with("--hbm is too small") && !error.contains("--dram"), "{error}");
    }
}
