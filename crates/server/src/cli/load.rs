//! From a model's name to a model that runs: plan first, read weights after.

use std::io::IsTerminal;
use std::path::Path;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use engine::{Admission, Config, Handle, Metrics, ModelRunner, Prefill, REPLAY_ROWS, Segments, TierShare};
use indicatif::{ProgressBar, ProgressStyle};
use model::{Checkpoint, DeviceKv, KvSpec, Limits, Model, ModelConfig, Rope, Source, Workspace};
use ops::places::Places;
use ops::sparse::{DigestSpec, Method, SelectionLimits};
use ops::tally::WorkingSetSpec;
use ops::tier::{TierLayout, TierSpec, TooSmall};
use ops::{Backend, DType, DeviceInfo, Gate, KvGeometry};
use ops_cpu::{CpuBackend, CpuOptions};
use prometheus::Registry;
use sparse::GATE_OF_MODEL;
use sparse::trace::Recorder;

use super::cgroup::{self, LimitSource, MemoryLimit};
use super::demo;
use super::failure::Failure;
use super::hub;
use super::plan::{Demand, MemoryPlan};
use super::settings::{ComputeSettings, EngineSettings, ModelChoice};
use super::size::{Bytes, Size};

/// Alternatives per token that log-probabilities may ask for.
pub const MAX_LOGPROBS: u32 = 20;

/// Rows whose logits are computed together. Logits of a large vocabulary take 600 KB a row, so a step that wants more
/// goes in chunks.
const LOGITS_ROWS: usize = 64;

/// The device that this build runs on.
pub type Device = CpuBackend;

impl From<model::Error> for Failure {
    /// Faulty checkpoints are input; what the device refuses is not.
    fn from(error: model::Error) -> Self {
        match error {
            model::Error::Backend(error) => error.into(),
            error => Failure::Input(error.into()),
        }
    }
}

impl From<ops::Error> for Failure {
    fn from(error: ops::Error) -> Self {
        match error {
            ops::Error::Unsupported(_) | ops::Error::TierTooSmall { .. } => Failure::Input(error.into()),
            ops::Error::OutOfMemory { .. } => Failure::Runtime(error.into()),
        }
    }
}

/// The files of `model`, downloaded if need be.
///
/// # Errors
/// When they are not to be had.
pub fn source(model: &ModelChoice) -> Result<Source, Failure> {
    let source = match model {
        ModelChoice::Demo => Source::Embedded(demo::FILES),
        ModelChoice::Directory(path) => Source::Directory(path.clone()),
        ModelChoice::Hub(name) => Source::Directory(hub::fetch(name)?),
    };
    // First, because without it a directory is no model at all, whatever else it lacks.
    ModelConfig::read(&source)?;
    Ok(source)
}

/// The device for `settings`.
///
/// # Errors
/// When it cannot be had.
pub fn device(settings: &ComputeSettings) -> Result<Device, Failure> {
    Ok(CpuBackend::new(CpuOptions { threads: Some(settings.threads), isa: Some(settings.isa) })?)
}

/// An HBM tier as planned.
#[derive(Clone, Copy, Debug)]
pub struct Tier {
    /// What the device is asked for.
    pub spec: TierSpec,
    /// How it divides that.
    pub layout: TierLayout,
    /// Blocks whose digests lie in HBM at a time.
    pub digest_places: usize,
    /// Bytes of those, and of the tables that lead to them.
    pub digest_bytes: u64,
    /// The least that would do for all of it.
    pub smallest_bytes: u64,
}

impl Tier {
    /// Divides the HBM of `plan` between digests and what `spec` says. Digests of all requests that may run at once are there, if half
    /// of it suffices, or `parks` says that none of them can wait; those of the longest request in any case.
    fn new(
        spec: TierSpec,
        geometry: &KvGeometry,
        plan: &MemoryPlan,
        digests: &[DigestSpec],
        parks: bool,
    ) -> Result<Self, Failure> {
        let Err(TooSmall { smallest }) = spec.layout(geometry) else {
            unreachable!("no tier works without a byte")
        };
        let block_bytes: u64 = digests.iter().map(|d| d.block_bytes(geometry) as u64).sum();
        let longest = geometry.blocks(spec.context_max);
        let all = plan.num_blocks.min(longest.saturating_mul(spec.seats));
        let room = plan.hbm_bytes.saturating_sub(smallest).min(plan.hbm_bytes / 2);
        let bytes_of = |places: usize| {
            places as u64 * block_bytes + digests.len() as u64 * Places::bytes(plan.num_blocks, places)
        };
        let digest_places = match room.saturating_sub(bytes_of(0)).checked_div(bytes_of(1) - bytes_of(0)) {
            Some(places) if parks => (places as usize).clamp(longest, all),
            _ => all,
        };
        let digest_bytes = bytes_of(digest_places);
        let smallest_bytes = bytes_of(if parks { longest } else { all }) + smallest;
        let spec = TierSpec { bytes: plan.hbm_bytes.saturating_sub(digest_bytes), ..spec };
        let layout = spec.layout(geometry).map_err(|_| {
            Failure::input(format!(
                "--hbm is too small: digests {} + one wave and the open pages of {} requests {} = {}, and --hbm allows {}; \
                 --hbm {} would do, lower --max-num-seqs or --max-inject-tokens need less",
                Bytes(smallest_bytes - smallest),
                spec.seats,
                Bytes(smallest),
                Bytes(smallest_bytes),
                Bytes(plan.hbm_bytes),
                smallest_bytes,
            ))
        })?;
        Ok(Tier { spec, layout, digest_places, digest_bytes, smallest_bytes })
    }
}

/// A model of which everything is decided and no weight is read.
pub struct Prepared<B: Backend = Device> {
    /// Its configuration.
    pub config: ModelConfig,
    /// Type of weights and KV.
    pub dtype: DType,
    /// Whether that is the type on disk.
    pub dtype_on_disk: DType,
    /// Shape of its KV.
    pub geometry: KvGeometry,
    /// Tokens of the longest request.
    pub max_context: usize,
    /// Who gets how much memory.
    pub plan: MemoryPlan,
    /// Where it runs.
    pub device: DeviceInfo,
    /// Digests that the device keeps.
    pub digests: Vec<DigestSpec>,
    /// The HBM tier, where there is one.
    pub tier: Option<Tier>,
    /// Whether there is none because the tier that was asked for would hold the whole KV cache.
    pub fits_hbm: bool,
    /// What makes digests of a gate.
    gate: Option<Gate>,
    selections: Option<SelectionLimits>,
    working_sets: WorkingSetSpec,
    recorder: Option<Recorder>,
    source: Source,
    backend: B,
    workspace: Workspace<B>,
}

impl Prepared {
    /// Reads configuration and headers of `source`, and plans memory.
    ///
    /// # Errors
    /// A model that is faulty, not supported, or does not fit.
    pub fn new(source: Source, settings: &EngineSettings) -> Result<Self, Failure> {
        Self::on(device(&settings.compute)?, source, settings)
    }
}

impl<B: Backend> Prepared<B> {
    /// The same for a device at hand.
    ///
    /// # Errors
    /// As for [`Prepared::new`].
    pub fn on(mut backend: B, source: Source, settings: &EngineSettings) -> Result<Self, Failure> {
        let config = ModelConfig::read(&source)?;
        let checkpoint = Checkpoint::open(&source)?;
        let dtype_on_disk = model::dtype_on_disk(&config, &checkpoint)?;
        let dtype = settings.dtype.unwrap_or(dtype_on_disk);
        let context_limit = config.context_limit();
        let max_context = settings.max_context.unwrap_or(context_limit);
        if max_context > context_limit {
            return Err(Failure::input(format!(
                "a context of {max_context} tokens exceeds the model's limit of {context_limit}; lower --max-context"
            )));
        }
        let rows_max = settings.max_num_seqs.saturating_add(settings.max_inject_tokens);
        let mut limits = Limits {
            rows_max,
            logits_rows_max: rows_max.min(LOGITS_ROWS),
            sequences_max: settings.max_num_seqs,
            context_max: max_context,
            tile_rows: 0,
            hidden_rows: 0,
        };
        let geometry = model::kv_geometry(&config, settings.page_tokens, dtype);
        let served = &settings.sparse.served;
        let gate = served.gate().map(|file| {
            let file = (file != GATE_OF_MODEL).then(|| Path::new(file));
            model::read_gate(&source, &config, file)
        });
        let gate = gate.transpose()?;
        let digests: Vec<_> = served.digests().iter().map(|d| d.with_gate(gate.as_ref())).collect();
        let methods = served.methods();
        let working_sets =
            WorkingSetSpec::new(settings.ladder.working_set_steps, selecting(&config, &methods));
        let selections = (!methods.is_empty()).then(|| {
            let rows = settings.max_num_seqs.saturating_add(REPLAY_ROWS);
            SelectionLimits::new(&methods, config.heads, settings.page_tokens, rows, max_context)
        });
        let tally_bytes = |limits| ops::tally::bytes(&limits, config.num_layers, &working_sets);
        let selection_bytes = selections.map_or(0, |limits| limits.bytes() + tally_bytes(limits));
        let (pool, pool_flag, hbm) = settings.memories();
        let limit = memory_limit(pool, pool_flag)?;
        let mut demand = Demand {
            weights_bytes: model::weight_bytes(&config, &backend, dtype)
                + gate.as_ref().map_or(0, Gate::bytes),
            activation_bytes: limits.activation_bytes(&config) + selection_bytes,
            kv: geometry,
            digest_block_bytes: digests.iter().map(|d| d.dram_block_bytes(&geometry) as u64).sum(),
            pool_flag,
            hbm,
            max_context,
            max_num_seqs: settings.max_num_seqs,
            max_inject_tokens: settings.max_inject_tokens,
        };
        // Where everything fits it is attended to where it lies.
        let fits_hbm = MemoryPlan::fits_hbm(&limit, &demand, pool);
        demand.hbm = hbm.filter(|_| !fits_hbm);
        let prefill = settings.ladder.prefill(
            demand.hbm.is_some(),
            geometry.num_layers,
            max_context,
            settings.max_inject_tokens,
        );
        if let Prefill::Segmented(Segments { hidden_rows, .. }) = prefill {
            (limits.tile_rows, limits.hidden_rows) = (settings.max_inject_tokens, hidden_rows);
        }
        let partitions = digests.iter().map(|d| d.made_together());
        let tier = demand.hbm.map(|_| TierSpec {
            bytes: 0,
            seats: settings.max_num_seqs,
            context_max: max_context,
            inject_tokens_max: settings.max_inject_tokens,
            replay_rows: REPLAY_ROWS,
            partition_tokens_max: partitions.max().unwrap_or(1),
            copies: DigestSpec::copies(&digests),
            eviction: settings.eviction,
            transfer: settings.ladder.transfer,
            link: settings.ladder.link,
            poison: false,
        });
        let step_bytes = selection_bytes + tier.map_or(0, |tier| tier.host_bytes(&geometry));
        demand.activation_bytes = limits.activation_bytes(&config) + step_bytes;
        // Once before anything is allocated, once with what the device needs besides.
        MemoryPlan::new(limit.clone(), &demand, pool)?;
        let workspace = Workspace::new(&mut backend, &config, limits)?;
        demand.activation_bytes = workspace.bytes() + step_bytes;
        let plan = MemoryPlan::new(limit, &demand, pool)?;
        let tier =
            tier.map(|spec| Tier::new(spec, &geometry, &plan, &digests, settings.parks)).transpose()?;
        let device = backend.info();
        let recorder = settings.sparse.recorder(&geometry)?;
        Ok(Prepared {
            config,
            dtype,
            dtype_on_disk,
            geometry,
            max_context,
            plan,
            device,
            digests,
            gate,
            selections,
            working_sets,
            tier,
            fits_hbm,
            recorder,
            source,
            backend,
            workspace,
        })
    }

    /// Requests of full length that the KV pool holds at once.
    pub fn kv_requests(&self) -> usize {
        self.plan.num_blocks / self.geometry.blocks(self.max_context)
    }

    /// How prompts go through the layers.
    pub fn prefill(&self, settings: &EngineSettings) -> Prefill {
        let (layers, tokens) = (self.geometry.num_layers, settings.max_inject_tokens);
        settings.ladder.prefill(self.tier.is_some(), layers, self.max_context, tokens)
    }

    /// Who takes part in a step.
    pub fn admission(&self, settings: &EngineSettings) -> Admission {
        settings.ladder.admission(self.tier.is_some())
    }

    /// The limits of an engine for this model, of which `max_waiting` requests may wait.
    pub fn engine_config(&self, settings: &EngineSettings, max_waiting: usize) -> Config {
        Config {
            max_num_seqs: settings.max_num_seqs,
            max_inject_tokens: settings.max_inject_tokens,
            max_waiting,
            max_context: self.max_context,
            max_logprobs: MAX_LOGPROBS,
            vocab_size: self.config.vocab_size,
            page_tokens: self.geometry.page_tokens,
            num_blocks: self.plan.num_blocks,
            prefix_cache: settings.prefix_cache,
            tier: self.tier.map(|tier| TierShare {
                extents: tier.layout.extents,
                layers: self.geometry.num_layers,
                kv_heads: self.geometry.kv_heads,
                rule: settings.quota_rule,
                digest_places: tier.digest_places,
            }),
            prefill: self.prefill(settings),
            admission: self.admission(settings),
            max_skips: settings.ladder.max_skips,
            guard: settings
                .sparse
                .guard
                .filter(|_| self.selections.is_some())
                .map(|guard| guard.rule(&self.config.windows, &self.geometry)),
            prefix_limit: Rope::new(&self.config.rope).prefix_limit(),
            shared_together: settings.sparse.served.shared_together(self.geometry.page_tokens),
        }
    }

    /// The same, checked: to be called before anything is shown or loaded.
    ///
    /// # Errors
    /// Limits that cannot work together.
    pub fn check_engine(&self, settings: &EngineSettings, max_waiting: usize) -> Result<Config, Failure> {
        let config = self.engine_config(settings, max_waiting);
        config.check().map_err(|error| Failure::input(in_flags(&error.to_string())))?;
        Ok(config)
    }

    /// Reads and packs the weights and makes the KV pool.
    ///
    /// # Errors
    /// A checkpoint that is faulty, memory that does not suffice.
    pub fn load(self) -> Result<ModelRunner<B>, Failure> {
        self.load_filled(&mut |_, _| ())
    }

    /// The same, with `fill` writing pages of the KV pool before the first step: for benches.
    ///
    /// # Errors
    /// As for [`Prepared::load`].
    pub fn load_filled(
        mut self,
        fill: &mut dyn FnMut(&mut B, &mut DeviceKv<B>),
    ) -> Result<ModelRunner<B>, Failure> {
        let start = Instant::now();
        let bar = progress_bar();
        let model = Model::load(&mut self.backend, &self.source, Some(self.dtype), &mut |done, total| {
            bar.set_length(total);
            bar.set_position(done);
        });
        bar.finish_and_clear();
        let model = model?;
        let backend = &mut self.backend;
        let spec = KvSpec {
            geometry: self.geometry,
            num_blocks: self.plan.num_blocks,
            tier: self.tier.map(|tier| tier.spec),
            digests: self.digests,
            digest_places: self.tier.map(|tier| tier.digest_places),
            gate: self.gate,
            selections: self.selections,
            working_sets: self.working_sets,
        };
        let mut kv = DeviceKv::new(backend, &spec)?;
        fill(backend, &mut kv);
        if let Some(recorder) = self.recorder {
            kv.record(recorder);
        }
        tracing::info!(seconds = start.elapsed().as_secs_f64(), "model loaded");
        Ok(ModelRunner::new(self.backend, model, self.workspace, kv))
    }
}

/// The layers in which rows of answers select: those without a window, as far as no method attends to everything there.
fn selecting(config: &ModelConfig, methods: &[Method]) -> impl Iterator<Item = usize> + Clone {
    let first = methods.iter().map(|method| method.dense_layers).filter(|&layer| layer < config.num_layers);
    (first.max().unwrap_or(0)..config.num_layers).filter(|&layer| config.windows[layer].is_none())
}

/// An engine on its thread.
pub struct EngineThread {
    /// How to reach it.
    pub handle: Handle,
    /// Its metrics.
    pub registry: Registry,
    thread: JoinHandle<Result<(), Failure>>,
}

impl EngineThread {
    /// Starts an engine that loads `prepared` on its own thread; requests may come at once and wait for it.
    ///
    /// # Errors
    /// Limits that cannot work together, a thread that cannot be started.
    pub fn start(prepared: Prepared, settings: &EngineSettings, max_waiting: usize) -> Result<Self, Failure> {
        let config = prepared.check_engine(settings, max_waiting)?;
        let registry = Registry::new();
        let metrics = Metrics::new(&registry).map_err(Failure::runtime)?;
        let plan = &prepared.plan;
        if settings.ladder.offload {
            metrics.set_block_bytes(plan.kv_bytes / plan.num_blocks as u64);
            metrics.set_hbm_bytes(plan.hbm_bytes);
        } else {
            // There is no DRAM tier.
            metrics.set_hbm_bytes(plan.kv_bytes);
        }
        let (handle, thread) =
            engine::spawn(config, metrics, engine::abort_process(), move || prepared.load())
                .map_err(|e| Failure::runtime(format!("cannot start the engine's thread: {e}")))?;
        Ok(EngineThread { handle, registry, thread })
    }

    /// Waits until the model is loaded, or failed to.
    pub fn wait_until_loaded(&self) {
        const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(5);
        while !self.handle.is_ready() && !self.thread.is_finished() {
            std::thread::sleep(LOOK_AGAIN_AFTER);
        }
    }

    /// Lets running requests finish and waits for the end of the thread.
    ///
    /// # Errors
    /// Why loading failed, if it did.
    pub fn finish(self) -> Result<(), Failure> {
        self.handle.drain();
        self.join()
    }

    /// Waits for the end of the thread.
    ///
    /// # Errors
    /// Why loading failed, if it did.
    pub fn join(self) -> Result<(), Failure> {
        self.thread
            .join()
            .unwrap_or_else(|_| Err(Failure::runtime("the engine panicked while it loaded the model")))
    }
}

fn memory_limit(pool: Option<Size>, flag: &str) -> Result<MemoryLimit, Failure> {
    match (cgroup::memory_limit(Path::new("/")), pool) {
        (Some(limit), _) => Ok(limit),
        (None, Some(Size::Bytes(_))) => Ok(MemoryLimit { bytes: u64::MAX, source: LimitSource::Unknown }),
        (None, _) => Err(Failure::input(format!(
            "this system does not say how much memory it has; give {flag} in bytes, as in 4GiB"
        ))),
    }
}

/// What the engine says about its limits, which it calls like the flags but for the dashes.
fn in_flags(text: &str) -> String {
    let fields = ["max_num_seqs", "max_inject_tokens", "max_waiting", "max_context", "page_tokens"];
    fields
        .iter()
        .fold(text.to_owned(), |text, field| text.replace(field, &format!("--{}", field.replace('_', "-"))))
}

/// On a terminal; hidden elsewhere.
fn progress_bar() -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("loading weights [{bar:40}] {bytes} of {total_bytes}") {
        bar.set_style(style.progress_chars("=> "));
    }
    bar
}

#[cfg(test)]
mod tests {
    #[test]
    fn limits_are_called_like_their_flags() {
        let shown = super::in_flags("max_num_seqs times the blocks: 3, and page_tokens");
        assert_eq!(shown, "--max-num-seqs times the blocks: 3, and --page-tokens");
    }
}
