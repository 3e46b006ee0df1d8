//! The start screen: what was decided, before anything takes long.

use std::fmt;

use engine::{Admission, Prefill, Segments};
use ops::DType;
use ops::residency::EXTENT_FRAMES;
use ops::sparse::DigestSpec;
use sparse::auto;

use super::load::Prepared;
use super::presets::Preset;
use super::settings::{EngineSettings, ModelChoice};
use super::size::Bytes;

/// What was decided, as text for people. [`Screen::log`] has the same for machines.
pub struct Screen<'a> {
    pub model: &'a ModelChoice,
    pub prepared: &'a Prepared,
    pub settings: &'a EngineSettings,
}

impl Screen<'_> {
    /// One log line.
    pub fn log(&self) {
        let Prepared { config, plan, device, dtype, geometry, max_context, .. } = self.prepared;
        tracing::info!(
            model = self.model.name(),
            architecture = config.architecture,
            parameters = ::model::num_parameters(config),
            dtype = dtype.name(),
            memory_limit_bytes = plan.limit.bytes,
            memory_limit_source = %plan.limit.source,
            weights_bytes = plan.weights_bytes,
            activation_bytes = plan.activation_bytes,
            headroom_bytes = plan.headroom_bytes,
            kv_bytes = plan.kv_bytes,
            kv_tokens = plan.kv_tokens,
            kv_token_bytes = geometry.token_bytes(),
            page_tokens = geometry.page_tokens,
            hbm_bytes = plan.hbm_bytes,
            preset = self.settings.ladder.preset.map_or("none", Preset::name),
            offload = self.settings.ladder.offload,
            transfer = self.settings.ladder.transfer.name(),
            link_bytes_per_second = self.settings.ladder.link.map_or(0, |link| link.bytes_per_second),
            link_call_nanos = self.settings.ladder.link.map_or(0, |link| link.call_nanos),
            prefill = self.prefill(),
            admission = self.admission(),
            max_skips = self.settings.ladder.max_skips,
            eviction = self.settings.eviction.name(),
            hbm_smallest_bytes = self.prepared.tier.map_or(0, |tier| tier.smallest_bytes),
            max_context,
            max_num_seqs = self.settings.max_num_seqs,
            max_inject_tokens = self.settings.max_inject_tokens,
            prefix_cache = self.settings.prefix_cache,
            prefix_reuse = if self.settings.reuses_answers { "fast" } else { "exact" },
            policies = self.policies(),
            budget = %self.settings.sparse.budget,
            digest_token_bytes = self.digest_token_bytes(),
            copy_token_bytes = self.copy_token_bytes(),
            device = device.kind,
            isa = device.isa,
            threads = device.threads,
            "decided"
        );
    }
}

impl Screen<'_> {
    /// Names of the policies, the default first.
    fn policies(&self) -> String {
        self.settings.sparse.served.names().collect::<Vec<_>>().join(", ")
    }

    /// How prompts go through the layers.
    fn prefill(&self) -> String {
        match self.prepared.prefill(self.settings) {
            Prefill::Chunked => "chunked prefill".into(),
            Prefill::Segmented(Segments { prompts, .. }) => {
                format!("layer-segmented prefill of up to {prompts} prompts")
            }
        }
    }

    /// Who takes part in a step.
    fn admission(&self) -> String {
        match self.prepared.admission(self.settings) {
            Admission::Slots => "admission by slots".into(),
            Admission::WorkingSet { steps } => format!("admission by working sets of {steps} steps"),
        }
    }

    /// What digests add to the KV of a token.
    fn digest_token_bytes(&self) -> u64 {
        let geometry = &self.prepared.geometry;
        let per_block = self.prepared.digests.iter().map(|d| d.block_bytes(geometry)).sum::<usize>();
        (per_block / geometry.page_tokens) as u64
    }

    /// What copies in the order of clusters add to it.
    fn copy_token_bytes(&self) -> u64 {
        (DigestSpec::copies(&self.prepared.digests) * self.prepared.geometry.token_bytes()) as u64
    }
}

/// `2.19 M`, `8.03 B`.
pub fn parameters(count: u64) -> String {
    match count {
        1_000_000_000.. => format!("{:.2} B", count as f64 / 1e9),
        1_000_000.. => format!("{:.2} M", count as f64 / 1e6),
        _ => count.to_string(),
    }
}

/// `1 thread`, `4 threads`.
pub fn threads(count: usize) -> String {
    if count == 1 { "1 thread".into() } else { format!("{count} threads") }
}

impl fmt::Display for Screen<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Prepared { config, plan, device, dtype, geometry, max_context, .. } = self.prepared;
        let heads = config.heads;
        writeln!(f, "SparseServe {}", env!("CARGO_PKG_VERSION"))?;
        writeln!(
            f,
            "  model        {}: {}, {} parameters, {} layers, {} heads over {} KV heads",
            self.model.name(),
            config.architecture,
            parameters(::model::num_parameters(config)),
            config.num_layers,
            heads.q_heads,
            heads.kv_heads,
        )?;
        let origin = if *dtype == self.prepared.dtype_on_disk { "as on disk" } else { "converted" };
        let slow = match dtype {
            DType::F32 if self.prepared.dtype_on_disk == DType::F32 => "; --dtype bf16 takes half the memory",
            _ => "",
        };
        writeln!(f, "  type         {dtype} weights and KV, {origin}{slow}")?;
        writeln!(f, "  device       {}, {}, {}", device.kind, threads(device.threads), device.isa)?;
        writeln!(f, "  memory       {} at most ({})", Bytes(plan.limit.bytes), plan.limit.source)?;
        writeln!(f, "    weights      {}", Bytes(plan.weights_bytes))?;
        writeln!(f, "    activations  {}", Bytes(plan.activation_bytes))?;
        writeln!(
            f,
            "    KV           {} for {} tokens, {} each: {} requests of {max_context} tokens at once",
            Bytes(plan.kv_bytes),
            plan.kv_tokens,
            Bytes(geometry.token_bytes() as u64),
            self.prepared.kv_requests(),
        )?;
        if let Some(tier) = &self.prepared.tier {
            let cache = (tier.layout.extents * EXTENT_FRAMES * geometry.page_bytes()) as u64;
            writeln!(
                f,
                "    HBM          {}: cache {} ({} LRU), digests of {} tokens {}, the rest open pages, waves and tables; at least {}",
                Bytes(plan.hbm_bytes),
                Bytes(cache),
                self.settings.eviction.name(),
                tier.digest_places * geometry.page_tokens,
                Bytes(tier.digest_bytes),
                Bytes(tier.smallest_bytes),
            )?;
        }
        if self.prepared.tier.is_some() {
            writeln!(f, "    link         {}", self.settings.ladder.moves())?;
        }
        if self.prepared.fits_hbm {
            writeln!(f, "    HBM          holds the whole KV cache, which is attended to where it lies")?;
        }
        if !self.settings.ladder.offload {
            writeln!(f, "    HBM          is where all of the KV lies: no offload, no DRAM tier")?;
        }
        let planned = plan.weights_bytes + plan.activation_bytes + plan.kv_bytes + plan.hbm_bytes;
        let left = plan.limit.bytes.saturating_sub(planned);
        writeln!(f, "    left         {}", Bytes(left))?;
        let sparse = &self.settings.sparse;
        if sparse.served.methods().is_empty() {
            writeln!(f, "  attention    dense")?;
        } else {
            writeln!(
                f,
                "  attention    {}{}, budget {} per layer and KV head; digests {} per token{}",
                self.policies(),
                if sparse.served.names().next() == Some(auto::AUTO) {
                    format!(" (auto: dense below {} prompt tokens, else {})", auto::DENSE_BELOW, auto::POLICY)
                } else {
                    String::new()
                },
                sparse.budget,
                Bytes(self.digest_token_bytes()),
                match self.copy_token_bytes() {
                    0 => String::new(),
                    bytes => format!(", KV in the order of clusters {}", Bytes(bytes)),
                },
            )?;
            if let Some(guard) = &sparse.guard {
                writeln!(
                    f,
                    "  guard        {} % of generated tokens checked, {} of keys per token at most; attention mass below {} \
                     widens the budget",
                    f64::from(guard.rate_ppm) / 1e4,
                    Bytes(guard.bytes_per_token),
                    f64::from(guard.mass_min_permille) / 1e3,
                )?;
            }
        }
        let prefix = match (self.settings.prefix_cache, self.settings.reuses_answers) {
            (false, _) => "no prefix cache",
            (true, false) => "prefix cache",
            (true, true) => "prefix cache with sparse answers",
        };
        writeln!(
            f,
            "  steps        up to {} requests and {} prompt tokens; {prefix}, pages of {} tokens",
            self.settings.max_num_seqs, self.settings.max_inject_tokens, geometry.page_tokens
        )?;
        write!(f, "  schedule     {}, {}", self.prefill(), self.admission())?;
        match self.settings.ladder.preset {
            None => Ok(()),
            Some(preset) => write!(f, "\n  preset       {}", preset.name()),
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn parameters_are_counted_in_millions_and_billions() {
        let shown = [999_999, 2_187_520, 8_030_261_248].map(super::parameters);
        assert_eq!(shown, ["999999", "2.19 M", "8.03 B"]);
    }
}
