//! A storm against the real server: dense, then with several policies, an HBM tier and a guard.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ops::Random;
use serde_json::{Value, json};

/// Key of everything random here.
const SEED: u64 = 20;
/// Clients at once.
const CLIENTS: u64 = 16;
/// Different requests; each is asked alone first.
const REQUESTS: usize = 60;
/// Growth of resident memory that a soak may show after its first minute, in parts of what it was then.
const GROWTH_MAX: f64 = 0.1;

/// What a request of the second storm may ask for.
const SPARSE: [&str; 9] = [
    r#"{}"#,
    r#"{"budget": 64}"#,
    r#"{"budget": "20%", "receipt": true}"#,
    r#"{"policy": "quest", "budget": 128, "options": {"group": "max"}}"#,
    r#"{"policy": "quest", "budget": 0}"#,
    r#"{"policy": "shadowkv", "budget": 256, "options": {"outliers": "4", "generated": "16"}}"#,
    r#"{"policy": "retroinfer", "budget": 200}"#,
    r#"{"policy": "retroinfer", "budget": 4096, "receipt": true}"#,
    r#"{"dense": true}"#,
];
/// Memory that is short for the requests.
const DEFAULTS: &str = "--dram 24MiB --max-num-seqs 12";
/// Clusters take as much DRAM again, and their spans a part of HBM for each request.
const TIERED: &str = "--dram 96MiB --max-num-seqs 8 --max-inject-tokens 128 --hbm 20% --policy arkvale \
                      --policies quest,shadowkv,retroinfer --guard-rate 0.01";

/// Storms against a server with its defaults, then against one with policies and tiers, half of `duration` each.
///
/// # Errors
/// A wrong answer, a leak, a server that does not stop.
pub fn run(duration: Duration) -> Result<()> {
    storm("defaults", DEFAULTS, requests(), duration / 2)?;
    let mut requests = requests();
    for (i, request) in requests.iter_mut().enumerate() {
        request["sparse"] = serde_json::from_str(SPARSE[i % SPARSE.len()])?;
    }
    storm("policies and tiers", TIERED, requests, duration / 2)
}

/// Storms for `duration`, then checks that nothing leaked.
fn storm(what: &str, flags: &str, requests: Vec<Value>, duration: Duration) -> Result<()> {
    eprintln!("== soak of {} s, {what}, seed {SEED}", duration.as_secs());
    let mut server = Server::start(flags)?;
    let alone: HashMap<String, String> =
        requests.iter().map(|body| Ok((body.to_string(), server.answer(body)?))).collect::<Result<_>>()?;

    let (answers, left, refused) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let start = Instant::now();
    let warm = std::thread::scope(|scope| -> Result<u64> {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|client| {
                let (server, requests, alone) = (&server, &requests, &alone);
                let (answers, left, refused) = (&answers, &left, &refused);
                scope.spawn(move || -> Result<()> {
                    let mut random = Random::keyed(SEED, client);
                    while start.elapsed() < duration {
                        let body = &requests[random.below(requests.len())];
                        match random.below(10) {
                            0 => {
                                server.leave(body, Duration::from_millis(random.below(30) as u64))?;
                                left.fetch_add(1, Ordering::Relaxed);
                            }
                            1 => {
                                let text = body.to_string();
                                let status = server.post(&text[..random.below(text.len())])?.0;
                                ensure!((400..500).contains(&status), "half a body was answered {status}");
                                refused.fetch_add(1, Ordering::Relaxed);
                            }
                            _ => {
                                let got = server.answer(body)?;
                                let expected = &alone[&body.to_string()];
                                ensure!(&got == expected, "{body}: {got:?}, alone it was {expected:?}");
                                answers.fetch_add(1, Ordering::Relaxed);
                            }
                        }
                    }
                    Ok(())
                })
            })
            .collect();
        std::thread::sleep((duration / 4).min(Duration::from_secs(60)));
        let warm = server.resident_bytes()?;
        for client in clients {
            client.join().map_err(|_| anyhow::anyhow!("a client panicked"))??;
        }
        Ok(warm)
    })?;
    let end = server.resident_bytes()?;
    let growth = end as f64 / warm as f64 - 1.0;
    eprintln!(
        "{} answers as alone, {} clients left, {} bodies refused, {} preemptions; resident {} MiB, then {} MiB",
        answers.into_inner(),
        left.into_inner(),
        refused.into_inner(),
        server.metric("sparseserve_preemptions_total")?,
        warm >> 20,
        end >> 20
    );
    ensure!(growth <= GROWTH_MAX, "resident memory grew by {:.0} %", 100.0 * growth);
    server.wait_for("sparseserve_kv_blocks{state=\"used\"}", 0.0)?;
    server.wait_for("sparseserve_requests_running", 0.0)?;
    server.stop()
}

/// Needles of several lengths; many share their beginning, some sample.
fn requests() -> Vec<Value> {
    let mut random = Random::new(SEED);
    let filler = ["The old lamp was green. ", "Every sailor found the boat. ", "A quiet road ran north. "];
    (0..REQUESTS)
        .map(|i| {
            let key = 100_000 + random.below(900_000);
            let mut shared = Random::new((i % 5) as u64);
            let lines = [4, 20, 80, 200][random.below(4)];
            let text: String = (0..lines).map(|_| filler[shared.below(filler.len())]).collect();
            let prompt = format!("{text}The key of Barin is {key}.\nWhat is the key of Barin?");
            let temperature = [0.0, 0.8][i % 2];
            json!({"model": "demo", "prompt": prompt, "max_tokens": 8 + random.below(60), "seed": i,
                   "temperature": temperature, "ignore_eos": i % 3 == 0})
        })
        .collect()
}

/// The server under test.
struct Server {
    process: Child,
    address: String,
}

impl Server {
    fn start(flags: &str) -> Result<Self> {
        let mut process = Command::new("target/release/sparseserve")
            .args(["serve", "--port", "0", "--max-context", "4096"])
            .args(flags.split_whitespace())
            .stderr(Stdio::piped())
            .spawn()
            .context("target/release/sparseserve does not start")?;
        let mut lines = BufReader::new(process.stderr.take().context("its standard error")?);
        let mut line = String::new();
        let address = loop {
            line.clear();
            ensure!(lines.read_line(&mut line)? > 0, "the server ended before it listened");
            if let Some(address) = line.trim().strip_prefix("listening on http://") {
                break address.to_string();
            }
        };
        std::thread::spawn(move || std::io::copy(&mut lines, &mut std::io::sink()));
        let server = Server { process, address };
        while server.get("/ready").map(|r| r.0).unwrap_or(0) != 200 {
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(server)
    }

    fn send(&self, head: &str, body: &str) -> Result<TcpStream> {
        let mut stream = TcpStream::connect(&self.address)?;
        let length = body.len();
        let host = &self.address;
        write!(
            stream,
            "{head} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Type: application/json\r\n\
             Content-Length: {length}\r\n\r\n{body}"
        )?;
        Ok(stream)
    }

    /// Status and body.
    fn exchange(&self, head: &str, body: &str) -> Result<(u16, String)> {
        let mut text = String::new();
        self.send(head, body)?.read_to_string(&mut text)?;
        let status = text.split(' ').nth(1).context("a status line")?.parse()?;
        let body = text.split_once("\r\n\r\n").context("a body")?.1;
        Ok((status, body.to_string()))
    }

    fn get(&self, path: &str) -> Result<(u16, String)> {
        self.exchange(&format!("GET {path}"), "")
    }

    fn post(&self, body: &str) -> Result<(u16, String)> {
        self.exchange("POST /v1/completions", body)
    }

    fn answer(&self, body: &Value) -> Result<String> {
        let (status, answer) = self.post(&body.to_string())?;
        ensure!(status == 200, "{body} was answered {status}: {answer}");
        let answer: Value = serde_json::from_str(&answer)?;
        Ok(answer["choices"][0]["text"].as_str().context("a text")?.to_string())
    }

    /// Asks for a stream and hangs up after `patience`.
    fn leave(&self, body: &Value, patience: Duration) -> Result<()> {
        let mut body = body.clone();
        body["stream"] = json!(true);
        let stream = self.send("POST /v1/completions", &body.to_string())?;
        std::thread::sleep(patience);
        drop(stream);
        Ok(())
    }

    fn metric(&self, name: &str) -> Result<f64> {
        let text = self.get("/metrics")?.1;
        let line =
            text.lines().find_map(|l| l.strip_prefix(name)).with_context(|| format!("metric {name}"))?;
        Ok(line.trim().parse()?)
    }

    fn wait_for(&self, metric: &str, value: f64) -> Result<()> {
        for _ in 0..100 {
            if self.metric(metric)? == value {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        bail!("{metric} is {} and should be {value}", self.metric(metric)?)
    }

    fn resident_bytes(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.id()))?;
        let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).context("VmRSS")?;
        let kib: u64 = line.trim().trim_end_matches(" kB").trim().parse()?;
        Ok(kib << 10)
    }

    fn stop(&mut self) -> Result<()> {
        let id = self.process.id().to_string();
        ensure!(Command::new("kill").args(["-TERM", &id]).status()?.success(), "kill");
        let status = self.process.wait()?;
        ensure!(status.success(), "after SIGTERM the server ended with {status}");
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // When it has stopped already there is nothing left to kill.
        let _ = self.process.kill();
    }
}
