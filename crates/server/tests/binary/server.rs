//! Start and end of a server.

use serde_json::json;

use super::process::{Serving, client};

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
    let mut server = Serving::start(&["--drain-timeout", "60"]);
    let request = client().post(format!("{}/v1/completions", server.url)).json(&endless());
    let mut running = request.send().unwrap();
    std::io::Read::read_exact(&mut running, &mut [0; 64]).unwrap();
    server.signal("-TERM");
    // Two signals that are both pending are one.
    server.wait_for("draining");
    server.signal("-TERM");
    let (_, said) = server.end();
    assert!(said.contains("stopping at once"), "it waited for the request that runs: {said}");
}

#[test]
fn a_refused_batch_is_no_client_that_left() {
    let mut server = Serving::start(&["--max-num-seqs", "1", "--max-waiting", "1"]);
    let path = format!("{}/v1/completions", server.url);
    let mut running = client().post(&path).json(&endless()).send().unwrap();
    std::io::Read::read_exact(&mut running, &mut [0; 64]).unwrap();
    let refused = client().post(&path).json(&json!({"prompt": ["a", "b"]})).send().unwrap();
    assert_eq!(refused.status(), 429);
    drop(running);
    server.wait_for("client left");
    server.signal("-TERM");
    let (_, said) = server.end();
    assert_eq!(said.matches("client left").count(), 1, "{said}");
}

#[test]
fn nobody_need_read_the_log() {
    let server = Serving::start_deaf(&["--log-level", "debug"]);
    // A pipe holds 64 KiB, and each request is a line of a hundred bytes and more.
    for _ in 0..2000 {
        assert_eq!(server.get("/version").status(), 200);
    }
    assert_eq!(server.complete(&json!({"prompt": "a", "max_tokens": 2}))["usage"]["completion_tokens"], 2);
    server.signal("-TERM");
    let (status, said) = server.end();
    assert!(status.success(), "{status}");
    assert!(said.len() < 1 << 20, "lines were lost");
}

#[test]
fn probes_do_not_fill_the_log() {
    let server = Serving::start(&[]);
    for path in ["/health", "/ready", "/metrics", "/version"] {
        server.get(path);
    }
    server.signal("-TERM");
    let (_, said) = server.end();
    let answered: Vec<&str> = said.lines().filter(|line| line.contains("answered")).collect();
    assert!(answered.len() == 1 && answered[0].contains("/version"), "{said}");
}
