//! Which sparse policies a server offers, and how many tokens requests attend to.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use engine::{GuardRule, Sparse};
use ops::KvGeometry;
use sparse::trace::{Header, Player, Recorder, TraceReader};
use sparse::{Budget, Options, Served, auto};

use super::failure::Failure;
use super::options::SparseOptions;
use super::size::Size;

/// Tokens attended to where nobody says how many.
const BUDGET: Budget = Budget::Tokens(1024);

/// The policy that only benches have a use for.
const BENCH_POLICY: &str = "replay";

/// What a guard asks for where nobody says: see `docs/policies`.
const GUARD_MASS: f64 = 0.5;
const GUARD_BYTES: Size = Size::Bytes(1 << 20);

/// What requests may ask for, and what they get if they don't ask.
#[derive(Clone, Debug)]
pub struct SparseSettings {
    /// Policies, the default first.
    pub served: Served,
    /// Budget of requests that name none.
    pub budget: Budget,
    /// When selections are checked; `None` never.
    pub guard: Option<GuardSettings>,
    /// Where selections are recorded.
    pub record: Option<PathBuf>,
}

/// When and how selections are compared with dense attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuardSettings {
    /// Generated tokens that are checked, of a million.
    pub rate_ppm: u32,
    /// Attention mass that suffices, in thousandths.
    pub mass_min_permille: u32,
    /// Bytes of keys that checks may read per generated token.
    pub bytes_per_token: u64,
}

impl GuardSettings {
    /// Resolves what was given; `None` where nothing is to be checked.
    fn resolve(rate: Option<f64>, mass: Option<f64>, bytes: Option<Size>) -> Result<Option<Self>, Failure> {
        let share = |flag: &str, value: f64| match value {
            0.0..=1.0 => Ok(value),
            _ => Err(Failure::input(format!("--{flag} {value} is not a share from 0 to 1"))),
        };
        let rate = share("guard-rate", rate.unwrap_or(0.0))?;
        let mass = share("guard-mass", mass.unwrap_or(GUARD_MASS))?;
        let bytes_per_token = match bytes.unwrap_or(GUARD_BYTES) {
            Size::Bytes(bytes) => bytes,
            Size::Percent(_) => return Err(Failure::input("--guard-bytes is a number of bytes, as in 1MiB")),
        };
        Ok((rate > 0.0).then(|| GuardSettings {
            rate_ppm: ((rate * 1e6).round() as u32).max(1),
            mass_min_permille: (mass * 1e3).round() as u32,
            bytes_per_token,
        }))
    }

    /// As the engine wants it, for a model of which `windows` tells where policies select.
    pub fn rule(&self, windows: &[Option<usize>], geometry: &KvGeometry) -> GuardRule {
        let selects = windows.iter().zip(0..).filter(|(window, _)| window.is_none());
        GuardRule {
            rate_ppm: self.rate_ppm,
            bytes_per_token: self.bytes_per_token,
            mass_min_permille: self.mass_min_permille,
            layers: selects.map(|(_, layer)| layer).collect(),
            key_page_bytes: (geometry.kv_heads * geometry.page_bytes() / 2) as u64,
        }
    }
}

impl SparseSettings {
    /// Resolves `options`.
    ///
    /// # Errors
    /// Policies, options or budgets that there are not.
    pub fn resolve(options: SparseOptions) -> Result<Self, Failure> {
        let SparseOptions { policy, policies, budget, policy_opt, record_selection: record, .. } = options;
        let guard = GuardSettings::resolve(options.guard_rate, options.guard_mass, options.guard_bytes)?;
        let default = policy.unwrap_or_else(|| auto::AUTO.into());
        let usual = if default == auto::AUTO { auto::BUDGET } else { BUDGET };
        let own = Options::parse(&policy_opt.unwrap_or_default().join(",")).map_err(Failure::input)?;
        let others = policies.unwrap_or_default();
        let names = std::iter::once(default.as_str()).chain(others.iter().map(String::as_str));
        let served = Served::new(names, &own).map_err(Failure::input)?;
        let budget = budget.map_or(Ok(usual), |text| text.parse()).map_err(Failure::input)?;
        Ok(SparseSettings { served, budget, guard, record })
    }
}

impl SparseSettings {
    /// Whether all of it is for clients.
    ///
    /// # Errors
    /// A policy that is not.
    pub fn check_clients(&self) -> Result<(), Failure> {
        match self.served.names().any(|name| name == BENCH_POLICY) {
            false => Ok(()),
            true => Err(Failure::input(format!(
                "the policy {BENCH_POLICY} selects by lots, for benches of caches; leave it out of --policy and --policies"
            ))),
        }
    }

    /// What a request with a prompt of `prompt_tokens` gets if it asks for nothing.
    ///
    /// # Errors
    /// None for settings that were resolved.
    pub fn method(&self, prompt_tokens: usize) -> Result<Option<Sparse>, Failure> {
        let choice = self.served.method(None, &Options::default()).map_err(Failure::input)?;
        let (_, method) = choice.for_prompt(prompt_tokens);
        let budget = self.budget.tokens(prompt_tokens);
        Ok(method.map(|method| Sparse { method, budget }))
    }

    /// Begins the recording of selections from KV of this shape, if there is to be one.
    ///
    /// # Errors
    /// A file that cannot be written; a server on which nothing is ever selected.
    pub fn recorder(&self, geometry: &KvGeometry) -> Result<Option<Recorder>, Failure> {
        let Some(path) = &self.record else { return Ok(None) };
        let shown = path.display().to_string();
        if self.served.methods().is_empty() {
            return Err(Failure::input(format!(
                "--record-selection {shown}: dense attention selects nothing; --policy names one that does"
            )));
        }
        let header = Header { note: self.served.specs().join(", "), ..trace_header(geometry) };
        let failed = |e| Failure::input(format!("--record-selection {shown}: {e}"));
        let file = File::create(path).map_err(failed)?;
        let complain = {
            let shown = shown.clone();
            move |error: std::io::Error| {
                tracing::error!(
                    "the recording of selections in {shown} ends here, the rest goes on: {error}"
                );
            }
        };
        Ok(Some(Recorder::new(Box::new(file), &header, Box::new(complain)).map_err(failed)?))
    }
}

/// The header of traces of KV of this shape.
fn trace_header(geometry: &KvGeometry) -> Header {
    Header {
        num_layers: geometry.num_layers as u32,
        kv_heads: geometry.kv_heads as u32,
        page_tokens: geometry.page_tokens as u32,
        note: String::new(),
    }
}

/// Selections of the trace at `path`, for requests with prompts of `prompt_tokens` and KV of this shape.
///
/// # Errors
/// A trace that cannot be read, of another model, or of longer prompts.
pub fn player(path: &Path, geometry: &KvGeometry, prompt_tokens: usize) -> Result<Player, Failure> {
    let shown = path.display();
    let failed = |e: &dyn std::fmt::Display| Failure::input(format!("--replay-selection {shown}: {e}"));
    let file = File::open(path).map_err(|e| failed(&e))?;
    let mut trace = TraceReader::new(BufReader::new(file)).map_err(|e| failed(&e))?;
    let player = Player::new(&mut trace, &trace_header(geometry)).map_err(|e| failed(&e))?;
    if player.prompt_tokens() > prompt_tokens {
        return Err(failed(&format!(
            "its prompts have up to {0} tokens; give --context {0}",
            player.prompt_tokens()
        )));
    }
    Ok(player)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(options: SparseOptions) -> Result<SparseSettings, String> {
        SparseSettings::resolve(options).map_err(|failure| failure.line().unwrap_or_default())
    }

    fn texts(list: &[&str]) -> Option<Vec<String>> {
        Some(list.iter().map(|&text| text.to_owned()).collect())
    }

    #[test]
    fn the_default_policy_comes_first() {
        let settings = resolve(SparseOptions::default()).expect("defaults resolve");
        assert_eq!(settings.served.names().collect::<Vec<_>>(), ["auto", "arkvale", "dense"]);
        assert!(settings.method(8191).expect("a choice").is_none());
        let long = settings.method(8192).expect("a choice").expect("long prompts are sparse");
        assert_eq!(long.budget, 1024);
        let settings = resolve(SparseOptions {
            policy: Some("quest".into()),
            policies: texts(&["dense", "quest", "arkvale"]),
            budget: Some("12.5%".into()),
            policy_opt: texts(&["partition=32"]),
            guard_rate: Some(0.25),
            ..Default::default()
        })
        .expect("resolves");
        let guard = GuardSettings { rate_ppm: 250_000, mass_min_permille: 500, bytes_per_token: 1 << 20 };
        assert_eq!(settings.guard, Some(guard));
        assert_eq!(settings.served.names().collect::<Vec<_>>(), ["quest", "dense", "arkvale"]);
        assert_eq!(settings.budget.tokens(800), 100);
    }

    #[test]
    fn what_there_is_not_is_refused() {
        let policy = |name: &str| SparseOptions { policy: Some(name.into()), ..Default::default() };
        let option = |text: &str| SparseOptions { policy_opt: texts(&[text]), ..policy("quest") };
        for (options, part) in [
            (policy("qest"), "there is no policy \"qest\""),
            (option("partition"), "not of the form name=value"),
            (option("partition=0"), "must be a number from 1 to 1024"),
            (SparseOptions { budget: Some("-3".into()), ..Default::default() }, "the budget is \"-3\""),
            (
                SparseOptions { guard_rate: Some(1.5), ..Default::default() },
                "--guard-rate 1.5 is not a share",
            ),
            (SparseOptions { guard_mass: Some(f64::NAN), ..Default::default() }, "--guard-mass NaN"),
            (
                SparseOptions { guard_bytes: Some(Size::Percent(10.0)), ..Default::default() },
                "--guard-bytes is a number",
            ),
        ] {
            let error = resolve(options).expect_err(part);
            assert!(error.contains(part), "{error}");
        }
    }
}
