//! The ladder: mechanisms that a server can do without, each with a flag of its own, so that one binary is every baseline of the
//! papers too. [`super::presets`] has flags that go together.

use clap::{Args, ValueEnum};
use engine::{Admission, Prefill, Segments};
use ops::tier::{LinkSpec, Transfer};
use serde::Deserialize;

use super::failure::Failure;
use super::options::switched_on;
use super::presets::Preset;
use super::size::Size;

/// Steps whose selections make a working set, where nobody says.
const WORKING_SET_STEPS: usize = 12;
/// Times that others may be preferred to a request, where nobody says.
const MAX_SKIPS: u32 = 16;
/// Prompts on their way through the layers at a time, where nobody says.
const MAX_PREFILLS: usize = 4;

/// Which mechanisms are at work.
#[derive(Clone, Debug, Default, Deserialize, Args)]
#[serde(default, rename_all = "kebab-case")]
#[command(next_help_heading = "Ladder")]
pub struct LadderOptions {
    /// Defaults of flags that together make a baseline of the papers, or the best there is; other flags win over it
    #[arg(long, value_enum, env = "SPARSESERVE_PRESET")]
    pub preset: Option<Preset>,
    /// false: KV lives in HBM alone, of which --hbm says how much there is, and there is no DRAM tier [default: true]
    #[arg(long, value_name = "BOOL", env = "SPARSESERVE_OFFLOAD", value_parser = switched_on)]
    pub offload: Option<bool>,
    /// In how many calls pages move between the tiers [default: fused]
    #[arg(long, value_enum, env = "SPARSESERVE_TRANSFER")]
    pub transfer: Option<TransferChoice>,
    /// Have transfers between the tiers take what a link would, per direction: 25,4 is 25 GB/s and 4 us a call
    /// [default: what a copy in memory takes]
    #[arg(long, value_name = "GB/s,us", env = "SPARSESERVE_EMULATE_LINK")]
    pub emulate_link: Option<String>,
    /// How prompts go through the layers [default: segmented with an HBM tier, else chunked]
    #[arg(long, value_enum, env = "SPARSESERVE_PREFILL")]
    pub prefill: Option<PrefillChoice>,
    /// Who takes part in a step [default: working-set with an HBM tier, else slots]
    #[arg(long, value_enum, env = "SPARSESERVE_ADMISSION")]
    pub admission: Option<AdmissionChoice>,
    /// Steps whose selections make the working set of a request [default: 12]
    #[arg(long, value_name = "STEPS", env = "SPARSESERVE_WORKING_SET_STEPS")]
    pub working_set_steps: Option<usize>,
    /// A request that others were preferred to this often goes first [default: 16]
    #[arg(long, value_name = "TIMES", env = "SPARSESERVE_MAX_SKIPS")]
    pub max_skips: Option<u32>,
    /// Prompts that segmented prefill has on their way at a time [default: 4]
    #[arg(long, value_name = "PROMPTS", env = "SPARSESERVE_MAX_PREFILLS")]
    pub max_prefills: Option<usize>,
}

impl LadderOptions {
    /// These, completed from the file.
    pub fn or(self, file: Self) -> Self {
        LadderOptions {
            preset: self.preset.or(file.preset),
            offload: self.offload.or(file.offload),
            transfer: self.transfer.or(file.transfer),
            emulate_link: self.emulate_link.or(file.emulate_link),
            prefill: self.prefill.or(file.prefill),
            admission: self.admission.or(file.admission),
            working_set_steps: self.working_set_steps.or(file.working_set_steps),
            max_skips: self.max_skips.or(file.max_skips),
            max_prefills: self.max_prefills.or(file.max_prefills),
        }
    }
}

/// `--transfer`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum TransferChoice {
    /// All that a layer misses in one call, saves off the path of the step
    Fused,
    /// Each page of each head in a call of its own, while the step waits
    PerPage,
}

/// `--prefill`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum PrefillChoice {
    /// Layer after layer, each for the whole prompt
    Segmented,
    /// Chunk after chunk, each through all layers
    Chunked,
}

/// `--admission`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum AdmissionChoice {
    /// As many as HBM has room for, judged by what each selected in its last steps
    WorkingSet,
    /// Whoever has one of the --max-num-seqs seats
    Slots,
}

/// Which mechanisms are at work, as far as that is known before the tiers are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LadderSettings {
    /// What was asked for by name.
    pub preset: Option<Preset>,
    /// Whether KV lives in DRAM too.
    pub offload: bool,
    /// In how many calls pages move.
    pub transfer: Transfer,
    /// What they cost beyond a copy in memory.
    pub link: Option<LinkSpec>,
    /// `None` is what goes with the tiers.
    prefill: Option<PrefillChoice>,
    /// `None` is what goes with the tiers.
    admission: Option<AdmissionChoice>,
    /// Steps whose selections make a working set.
    pub working_set_steps: usize,
    /// Times that others may be preferred to a request.
    pub max_skips: u32,
    max_prefills: usize,
}

impl LadderSettings {
    /// Resolves `options`, beside `--dram` and `--hbm`.
    ///
    /// # Errors
    /// Values that cannot be, flags that contradict each other.
    pub fn resolve(options: LadderOptions, dram: Option<Size>, hbm: Option<Size>) -> Result<Self, Failure> {
        let offload = options.offload.unwrap_or(true);
        let link = options.emulate_link.as_deref();
        match (options.preset, hbm) {
            (Some(preset), None) => {
                let need = "is about an HBM of some size; say with --hbm how much there is, as in --hbm 1GiB";
                return Err(Failure::input(format!("--preset {} {need}", preset.name())));
            }
            (None, None) if !offload => {
                return Err(Failure::input(
                    "--offload false has KV in HBM alone; say with --hbm how much there is, as in --hbm 1GiB",
                ));
            }
            (None, None) if link.is_some() => {
                return Err(Failure::input(
                    "--emulate-link: there is no link without two tiers; give --hbm, as in --hbm 10%",
                ));
            }
            _ => {}
        }
        if !offload && dram.is_some() {
            return Err(Failure::input(
                "--dram: there is no DRAM tier with --offload false, where --hbm is the size of the KV cache; leave one of them out",
            ));
        }
        let steps = options.working_set_steps.unwrap_or(WORKING_SET_STEPS);
        if !(1..=63).contains(&steps) {
            return Err(Failure::input(format!("--working-set-steps {steps} is not a number from 1 to 63")));
        }
        let max_skips = options.max_skips.unwrap_or(MAX_SKIPS);
        let max_prefills = options.max_prefills.unwrap_or(MAX_PREFILLS);
        for (flag, value) in [("max-skips", max_skips as usize), ("max-prefills", max_prefills)] {
            if value == 0 {
                return Err(Failure::input(format!("--{flag} 0: at least 1 is needed")));
            }
        }
        Ok(LadderSettings {
            preset: options.preset,
            offload,
            transfer: match options.transfer {
                None | Some(TransferChoice::Fused) => Transfer::Fused,
                Some(TransferChoice::PerPage) => Transfer::PerPage,
            },
            link: link.filter(|text| !text.is_empty()).map(link_of).transpose()?,
            prefill: options.prefill,
            admission: options.admission,
            working_set_steps: steps,
            max_skips,
            max_prefills,
        })
    }

    /// How prompts go through `layers` layers, where there is an HBM tier or none.
    pub fn prefill(
        &self,
        tiered: bool,
        layers: usize,
        max_context: usize,
        max_inject_tokens: usize,
    ) -> Prefill {
        let usual = if tiered { PrefillChoice::Segmented } else { PrefillChoice::Chunked };
        let prompts = self.max_prefills;
        match self.prefill.unwrap_or(usual) {
            PrefillChoice::Chunked => Prefill::Chunked,
            PrefillChoice::Segmented => Prefill::Segmented(Segments {
                layers,
                prompts,
                // A long prompt, and of each other one what a step may bring.
                hidden_rows: max_context.saturating_add(prompts.saturating_mul(max_inject_tokens)),
            }),
        }
    }

    /// What transfers cost, as the start screen says it.
    pub fn moves(&self) -> String {
        let how = self.transfer.name();
        match self.link {
            None => format!("{how} transfers, as fast as memory"),
            Some(LinkSpec { bytes_per_second, call_nanos }) => format!(
                "{how} transfers, emulated: {} GB/s and {} us a call in each direction",
                bytes_per_second as f64 / 1e9,
                call_nanos as f64 / 1e3
            ),
        }
    }

    /// Who takes part in a step, where there is an HBM tier or none.
    pub fn admission(&self, tiered: bool) -> Admission {
        let usual = if tiered { AdmissionChoice::WorkingSet } else { AdmissionChoice::Slots };
        match self.admission.unwrap_or(usual) {
            AdmissionChoice::Slots => Admission::Slots,
            AdmissionChoice::WorkingSet => Admission::WorkingSet { steps: self.working_set_steps },
        }
    }
}

/// Reads `25,4`: GB/s and microseconds per call.
fn link_of(text: &str) -> Result<LinkSpec, Failure> {
    let numbers = text.split_once(',').and_then(|(rate, call)| {
        let [rate, call] = [rate, call].map(|number| number.trim().parse::<f64>().ok());
        rate.zip(call)
    });
    match numbers {
        Some((rate, call)) if (1e-3..=1e4).contains(&rate) && (0.0..=1e6).contains(&call) => Ok(LinkSpec {
            bytes_per_second: (rate * 1e9).round() as u64,
            call_nanos: (call * 1e3).round() as u64,
        }),
        _ => Err(Failure::input(format!(
            "--emulate-link {text:?} is not GB/s and microseconds per call, as in 25,4: 0.001 to 10000, and 0 to 1000000"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HBM: Option<Size> = Some(Size::Bytes(1 << 30));

    fn resolve(
        options: LadderOptions,
        dram: Option<Size>,
        hbm: Option<Size>,
    ) -> Result<LadderSettings, String> {
        LadderSettings::resolve(options, dram, hbm).map_err(|failure| failure.line().unwrap_or_default())
    }

    #[test]
    fn defaults_follow_the_tiers() {
        let settings = resolve(LadderOptions::default(), None, None).expect("defaults resolve");
        assert!(settings.offload && settings.link.is_none() && settings.transfer == Transfer::Fused);
        assert_eq!(settings.prefill(false, 32, 1000, 10), Prefill::Chunked);
        let segments = Segments { layers: 32, prompts: 4, hidden_rows: 1040 };
        assert_eq!(settings.prefill(true, 32, 1000, 10), Prefill::Segmented(segments));
        assert_eq!(settings.admission(false), Admission::Slots);
        assert_eq!(settings.admission(true), Admission::WorkingSet { steps: 12 });
        assert_eq!(settings.max_skips, 16);
    }

    #[test]
    fn what_is_asked_for_wins_over_what_goes_with_the_tiers() {
        let options = LadderOptions {
            prefill: Some(PrefillChoice::Segmented),
            admission: Some(AdmissionChoice::WorkingSet),
            working_set_steps: Some(63),
            max_skips: Some(1),
            max_prefills: Some(2),
            ..Default::default()
        };
        let settings = resolve(options, None, None).expect("resolves");
        let segments = Segments { layers: 1, prompts: 2, hidden_rows: 120 };
        assert_eq!(settings.prefill(false, 1, 100, 10), Prefill::Segmented(segments));
        assert_eq!(settings.admission(false), Admission::WorkingSet { steps: 63 });
        assert_eq!(settings.max_skips, 1);
        let options = LadderOptions {
            prefill: Some(PrefillChoice::Chunked),
            admission: Some(AdmissionChoice::Slots),
            ..Default::default()
        };
        let settings = resolve(options, None, HBM).expect("resolves");
        assert_eq!(
            (settings.prefill(true, 1, 100, 10), settings.admission(true)),
            (Prefill::Chunked, Admission::Slots)
        );
    }

    #[test]
    fn links_are_read() {
        let link = |text: &str| {
            resolve(LadderOptions { emulate_link: Some(text.into()), ..Default::default() }, None, HBM)
                .map(|settings| settings.link)
        };
        let spec = |bytes_per_second, call_nanos| Ok(Some(LinkSpec { bytes_per_second, call_nanos }));
        assert_eq!(link("25,4"), spec(25_000_000_000, 4_000));
        assert_eq!(link("0.5, 0.25"), spec(500_000_000, 250));
        let options = LadderOptions { emulate_link: Some("0.5,0.25".into()), ..Default::default() };
        assert_eq!(
            resolve(options, None, HBM).expect("resolves").moves(),
            "fused transfers, emulated: 0.5 GB/s and 0.25 us a call in each direction"
        );
        assert_eq!(link(""), Ok(None), "an empty variable is one that is not set");
        for text in ["25", "25,", ",4", "25,4,1", "fast,4", "0,4", "-1,4", "25,-1", "NaN,4", "inf,0"] {
            let error = link(text).expect_err(text);
            assert!(error.contains(text) && error.contains("as in 25,4"), "{error}");
        }
    }

    #[test]
    fn what_cannot_be_is_refused_with_a_cure() {
        let none = LadderOptions::default;
        let cases = [
            (
                LadderOptions { preset: Some(Preset::Spin), ..none() },
                None,
                None,
                "--preset spin is about an HBM",
            ),
            (LadderOptions { offload: Some(false), ..none() }, None, None, "say with --hbm how much"),
            (LadderOptions { offload: Some(false), ..none() }, HBM, HBM, "--dram: there is no DRAM tier"),
            (
                LadderOptions { emulate_link: Some("25,4".into()), ..none() },
                None,
                None,
                "there is no link without",
            ),
            (
                LadderOptions { working_set_steps: Some(0), ..none() },
                None,
                None,
                "--working-set-steps 0 is not",
            ),
            (
                LadderOptions { working_set_steps: Some(64), ..none() },
                None,
                None,
                "--working-set-steps 64 is not",
            ),
            (LadderOptions { max_skips: Some(0), ..none() }, None, None, "--max-skips 0"),
            (LadderOptions { max_prefills: Some(0), ..none() }, None, None, "--max-prefills 0"),
        ];
        for (options, dram, hbm, part) in cases {
            let error = resolve(options, dram, hbm).expect_err(part);
            assert!(error.contains(part), "{error}");
        }
    }
}
