//! Start and end of a server.

use std::time::{Duration, Instant};

use serde_json::json;

use super::process::Serving;

/// Long enough that it cannot end by itself meanwhile.
fn endless() -> serde_json::Value {
    json!({"model": "demo", "prompt": "The old lamp", "max_tokens": 30000, "ignore_eos": true, "stream": true})
}

#[test]
fn an_idle_server_ends_on_sigterm() {
    let server = Serving::start(&["--threads", "1"]);
    server.signal("-TERM");
    let (status, said) = server.end();
    assert!(status.success(), "{status}: {said}");
}

#[test]
fn a_second_signal_stops_at_once() {
    let server = Serving::start(&["--drain-timeout", "600"]);
    let client = reqwest::blocking::Client::builder().no_proxy().timeout(None).build().unwrap();
    let mut running = client.post(format!("{}/v1/completions", server.url)).json(&endless()).send().unwrap();
    std::io::Read::read_exact(&mut running, &mut [0; 64]).unwrap();
    server.signal("-TERM");
    std::thread::sleep(Duration::from_millis(200));
    let start = Instant::now();
    server.signal("-TERM");
    server.end();
    assert!(start.elapsed() < Duration::from_secs(60), "it waited for the request that runs");
}
