//! `sparseserve bench cache`: what caches of pages would have hit, for selections that were recorded.

use std::fs::File;
use std::io::{BufReader, Write};

use kv::cache_study::{Demand, Hits, Rule, WINDOW_MAX};
use serde_json::{Value, json};
use sparse::trace::{Header, TraceReader};

use super::commands::BenchCacheArgs;
use super::failure::Failure;

/// Buffering frames per mandatory one at most: SPIN's curve is flat before it.
const RATIO_MAX: usize = 8;

/// Runs the command.
pub fn run(args: &BenchCacheArgs) -> Result<(), Failure> {
    let shown = args.trace.display();
    let failed = |e: &dyn std::fmt::Display| Failure::input(format!("{shown}: {e}"));
    let file = File::open(&args.trace).map_err(|e| failed(&e))?;
    let mut trace = TraceReader::new(BufReader::new(file)).map_err(|e| failed(&e))?;
    let study = Study::of(&mut trace).map_err(|e| failed(&e))?;
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&study.json(&shown.to_string())).map_err(Failure::runtime)?;
        std::fs::write(path, text).map_err(|e| Failure::input(format!("{}: {e}", path.display())))?;
    }
    Ok(study.print(&mut std::io::stdout().lock())?)
}

/// What a trace comes to.
struct Study {
    header: Header,
    requests: u64,
    steps: u64,
    streams: usize,
    pages_per_step: f64,
    /// Smallest and largest of any row.
    budget: (u32, u32),
    context: (u32, u32),
    /// By rule, then by ratio.
    hits: Vec<(Rule, Vec<Hits>)>,
    overlap: [f64; WINDOW_MAX],
}

impl Study {
    fn of(trace: &mut TraceReader<BufReader<File>>) -> Result<Self, String> {
        let header = trace.header().clone();
        let mut demand = Demand::new(header.kv_heads as usize);
        let (mut requests, mut steps, mut last) = (0, 0, None);
        let (mut budget, mut context) = ((u32::MAX, 0), (u32::MAX, 0));
        while let Some(record) = trace.read().map_err(|e| e.to_string())? {
            steps += u64::from(last.replace(record.step) != Some(record.step));
            for row in &record.rows {
                requests = requests.max(row.request.saturating_add(1));
                budget = (budget.0.min(row.budget), budget.1.max(row.budget));
                context = (context.0.min(row.position), context.1.max(row.position));
                let heads: Vec<&[u32]> = row.heads.iter().map(|head| head.pages.as_slice()).collect();
                let open = row.position / header.page_tokens;
                if !demand.push(row.request, record.layer, open, &heads) {
                    return Err(format!("a context of {} tokens is too long to be studied", row.position));
                }
            }
        }
        if demand.num_steps() == 0 {
            return Err(
                "nothing was selected while this was recorded; ask with a budget below the context".into()
            );
        }
        let of_rule = |rule| (rule, (0..=RATIO_MAX).map(|ratio| demand.hits(rule, ratio)).collect());
        Ok(Study {
            requests,
            steps,
            streams: demand.num_streams(),
            pages_per_step: demand.pages_per_step(),
            budget,
            context: (context.0.saturating_add(1), context.1.saturating_add(1)),
            hits: Rule::ALL.into_iter().map(of_rule).collect(),
            overlap: demand.overlap(),
            header,
        })
    }

    fn print(&self, out: &mut dyn Write) -> std::io::Result<()> {
        let Study { header, requests, steps, streams, pages_per_step, .. } = self;
        writeln!(out, "Selections of {}", header.note)?;
        writeln!(
            out,
            "{requests} requests in {steps} steps, {streams} (request, layer) streams; contexts {} to {}, budgets {} to \
             {}; {pages_per_step:.1} pages of {} tokens per step of a stream, over {} KV heads\n",
            self.context.0, self.context.1, self.budget.0, self.budget.1, header.page_tokens, header.kv_heads
        )?;
        let ratios: String = (0..=RATIO_MAX).map(|ratio| format!(" {ratio} |")).collect();
        writeln!(out, "Hit rate by buffering frames per mandatory one\n")?;
        writeln!(out, "| rule |{ratios}\n|---|{}", "---|".repeat(RATIO_MAX + 1))?;
        for (rule, hits) in &self.hits {
            let rates: String = hits.iter().map(|h| format!(" {:.3} |", h.rate())).collect();
            writeln!(out, "| {} |{rates}", rule.name())?;
        }
        let windows: String = (1..=WINDOW_MAX).map(|w| format!(" {w} |")).collect();
        writeln!(out, "\nShare of a step's pages that the last steps selected, by how many steps\n")?;
        writeln!(out, "|{windows}\n|{}", "---|".repeat(WINDOW_MAX))?;
        let shares: String = self.overlap.iter().map(|share| format!(" {share:.3} |")).collect();
        writeln!(out, "|{shares}")
    }

    fn json(&self, trace: &str) -> Value {
        let rates = |hits: &[Hits]| hits.iter().map(|h| h.rate()).collect::<Vec<f64>>();
        let rules: serde_json::Map<String, Value> =
            self.hits.iter().map(|(rule, hits)| (rule.name().to_owned(), json!(rates(hits)))).collect();
        json!({
            "trace": trace, "note": self.header.note, "layers": self.header.num_layers,
            "kv_heads": self.header.kv_heads, "page_tokens": self.header.page_tokens,
            "requests": self.requests, "steps": self.steps, "streams": self.streams,
            "budget": [self.budget.0, self.budget.1], "context": [self.context.0, self.context.1],
            "pages_per_step": self.pages_per_step,
            "asked": self.hits.first().and_then(|(_, hits)| hits.first()).map(|h| h.asked),
            "ratios": (0..=RATIO_MAX).collect::<Vec<_>>(), "hit_rate": rules,
            "windows": (1..=WINDOW_MAX).collect::<Vec<_>>(), "overlap": self.overlap,
        })
    }
}
