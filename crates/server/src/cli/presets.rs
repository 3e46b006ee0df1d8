//! `--preset`: flags that together make a server of the papers, or the best there is.
//!
//! A preset is what could stand in a configuration file, and is read like one: it says nothing that a flag, a variable or a file
//! says. `docs/presets.md` has the table.

use clap::ValueEnum;
use ops::residency::EvictionRule;
use serde::Deserialize;

use super::options::{ConfigFile, EngineOptions, EvictionChoice};

/// `--preset`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Preset {
    /// Dense attention, KV in HBM alone
    Vllm,
    /// Sparse attention, KV in HBM alone
    VllmS,
    /// Sparse attention with a naive offload: a copy for every page
    VllmSo,
    /// SparseServe: fused transfers, admission by working sets, segmented prefill
    Sparseserve,
    /// SPIN: bucketed LRU in budgets of their own, fused transfers
    Spin,
    /// Everything that helps
    Best,
}

impl Preset {
    /// As it is typed.
    pub const fn name(self) -> &'static str {
        match self {
            Preset::Vllm => "vllm",
            Preset::VllmS => "vllm-s",
            Preset::VllmSo => "vllm-so",
            Preset::Sparseserve => "sparseserve",
            Preset::Spin => "spin",
            Preset::Best => "best",
        }
    }

    /// The flags that it stands for, as a configuration file.
    const fn flags(self) -> &'static str {
        match self {
            Preset::Vllm => {
                "policy = 'dense'
                 offload = false
                 prefill = 'chunked'
                 admission = 'slots'"
            }
            Preset::VllmS => {
                "policy = 'arkvale'
                 policy-opt = 'partition=32'
                 budget = 2048
                 offload = false
                 prefill = 'chunked'
                 admission = 'slots'"
            }
            Preset::VllmSo => {
                "policy = 'arkvale'
                 policy-opt = 'partition=32'
                 budget = 2048
                 offload = true
                 transfer = 'per-page'
                 eviction = 'global'
                 prefill = 'chunked'
                 admission = 'slots'"
            }
            Preset::Sparseserve => {
                "policy = 'arkvale'
                 policy-opt = 'partition=32'
                 budget = 2048
                 offload = true
                 transfer = 'fused'
                 eviction = 'global'
                 prefill = 'segmented'
                 admission = 'working-set'
                 working-set-steps = 12"
            }
            Preset::Spin => {
                "policy = 'shadowkv'
                 budget = '1.56%'
                 offload = true
                 transfer = 'fused'
                 eviction = 'bucketed'
                 buffering = '4'
                 prefill = 'chunked'
                 admission = 'slots'"
            }
            Preset::Best => {
                "policy = 'auto'
                 offload = true
                 transfer = 'fused'
                 eviction = 'bucketed'
                 buffering = 'auto'
                 prefill = 'segmented'
                 admission = 'working-set'"
            }
        }
    }

    /// The budget that SPIN gives to a policy; `None` is that of the server.
    fn budget_in_spin(policy: &str) -> Option<String> {
        match policy {
            "shadowkv" => Some("1.56%".into()),
            "retroinfer" => Some("1.8%".into()),
            "seerattention" => Some("2048".into()),
            _ => None,
        }
    }

    /// `typed`, completed by the flags that this stands for.
    pub fn complete(self, typed: EngineOptions) -> EngineOptions {
        let mut own = ConfigFile::parse(self.flags()).expect("presets are files that are right").engine;
        // What goes with a choice of the preset goes when another choice is typed.
        if let Some(policy) = typed.sparse.policy.as_deref() {
            let same = own.sparse.policy.as_deref() == Some(policy);
            own.sparse.policy_opt = own.sparse.policy_opt.filter(|_| same);
            if self == Preset::Spin {
                own.sparse.budget = Self::budget_in_spin(policy);
            }
        }
        if typed.eviction.map(EvictionChoice::rule).is_some_and(EvictionRule::shares_frames) {
            own.buffering = None;
        }
        typed.or(own)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::commands::{Cli, Command};
    use crate::cli::settings::EngineSettings;

    const ALL: [Preset; 6] =
        [Preset::Vllm, Preset::VllmS, Preset::VllmSo, Preset::Sparseserve, Preset::Spin, Preset::Best];

    /// What a preset sets, as (flag, value), in the order of its text.
    fn table(preset: Preset) -> Vec<(&'static str, String)> {
        let entry = |line: &'static str| {
            let (flag, value) = line.split_once('=').expect("a key and a value");
            (flag.trim(), value.trim().trim_matches('\'').to_owned())
        };
        preset.flags().lines().map(entry).collect()
    }

    /// The settings of `serve` with these flags.
    fn settings(flags: &[String]) -> EngineSettings {
        let program = ["sparseserve", "serve", "--hbm", "1GiB"].map(str::to_owned);
        let cli = Cli::try_parse_from(program.iter().chain(flags)).expect("flags");
        let Command::Serve(args) = cli.command else { panic!("serve") };
        EngineSettings::resolve(args.engine.complete(EngineOptions::default()), 64).expect("settings")
    }

    /// All but the name of the preset.
    fn shown(settings: EngineSettings) -> String {
        let mut settings = settings;
        settings.ladder.preset = None;
        format!("{settings:?}")
    }

    fn preset(preset: Preset, flags: &[&str]) -> EngineSettings {
        let all = [&["--preset", preset.name()], flags].concat();
        settings(&all.into_iter().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn presets_equal_the_flags_they_stand_for() {
        for preset in ALL {
            let flags: Vec<String> =
                table(preset).iter().flat_map(|(flag, value)| [format!("--{flag}"), value.clone()]).collect();
            let named = settings(&["--preset".into(), preset.name().into()]);
            assert_eq!(named.ladder.preset, Some(preset));
            assert_eq!(shown(named), shown(settings(&flags)), "{preset:?}");
        }
    }

    /// Every flag of every preset, without the others: it changes settings unless it is the default.
    #[test]
    fn each_rung_can_be_set_alone() {
        let mut rungs: Vec<(&str, String)> = ALL.iter().flat_map(|&preset| table(preset)).collect();
        rungs.sort();
        rungs.dedup();
        let plain = shown(settings(&[]));
        let defaults = ["fused", "bucketed", "true", "12", "auto"];
        for (flag, value) in rungs {
            // An option of a policy needs the policy.
            let policy =
                if flag == "policy-opt" { vec!["--policy".into(), "arkvale".into()] } else { vec![] };
            let without = if policy.is_empty() { plain.clone() } else { shown(settings(&policy)) };
            let with = shown(settings(&[policy, vec![format!("--{flag}"), value.clone()]].concat()));
            let usual = defaults.contains(&value.as_str());
            assert_eq!(with == without, usual, "--{flag} {value}");
        }
    }

    #[test]
    fn what_is_typed_wins() {
        let spin = |policy: &str| preset(Preset::Spin, &["--policy", policy]).sparse;
        assert_eq!(Ok(spin("retroinfer").budget), "1.8%".parse());
        assert_eq!(spin("seerattention").budget.tokens(10_000), 2048);
        assert_eq!(spin("quest").budget.tokens(10_000), 1024, "what it is without a preset");
        assert_eq!(preset(Preset::Spin, &["--budget", "9"]).sparse.budget.tokens(10_000), 9);
        // What only goes with a choice that was typed otherwise is not asked for.
        let global = preset(Preset::Spin, &["--eviction", "global"]);
        assert_eq!(global.quota_rule, kv::QuotaRule::Shared);
        let quest = preset(Preset::VllmS, &["--policy", "quest", "--offload", "true"]);
        assert!(quest.ladder.offload && quest.sparse.served.names().next() == Some("quest"));
    }

    #[test]
    fn a_file_wins_over_a_preset() {
        let file = ConfigFile::parse("preset = 'vllm-s'\nbudget = 7\nhbm = '1GiB'").expect("a file");
        let options = EngineOptions::default().complete(file.engine);
        assert_eq!(options.sparse.budget.as_deref(), Some("7"));
        assert_eq!(options.ladder.offload, Some(false), "a file may name a preset");
    }

    #[test]
    fn names_are_those_that_are_typed() {
        for preset in ALL {
            assert_eq!(Preset::from_str(preset.name(), false), Ok(preset));
        }
        assert_eq!(Preset::value_variants(), ALL);
    }

    #[test]
    fn the_page_has_the_table() {
        let page = include_str!("../../../../docs/presets.md");
        let mut flags: Vec<&str> = Vec::new();
        // The one with most of them first.
        for (flag, _) in [Preset::Sparseserve].iter().chain(&ALL).flat_map(|&preset| table(preset)) {
            if !flags.contains(&flag) {
                flags.push(flag);
            }
        }
        let tables = ALL.map(table);
        let cell = |table: &Vec<(&str, String)>, flag: &str| {
            let set = table.iter().find(|(name, _)| *name == flag);
            set.map_or_else(String::new, |(_, value)| format!("`{value}`"))
        };
        let mut expected = vec![format!("| | {} |", ALL.map(|p| format!("`{}`", p.name())).join(" | "))];
        for flag in flags {
            let cells: Vec<String> = tables.iter().map(|table| cell(table, flag)).collect();
            expected.push(format!("| `--{flag}` | {} |", cells.join(" | ")));
        }
        let rows: Vec<&str> =
            page.lines().filter(|line| line.starts_with("| `--") || line.starts_with("| | `vllm`")).collect();
        assert_eq!(rows, expected, "docs/presets.md should have these rows:\n{}\n", expected.join("\n"));
    }
}
