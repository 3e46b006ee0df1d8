//! Downloads from a hub on this machine, which answers as the real one does.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Output;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use super::process::{LATER, output_within, repository, sparseserve, text};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const MODEL: &str = "owner/demo";

/// What the hub does.
#[derive(Clone, Copy, PartialEq)]
enum Mode {
    Healthy,
    /// Every request gets this status.
    Refusing(u16),
    /// Weights end early, and the connection with them, this many times.
    Interrupted(usize),
}

struct Hub {
    url: String,
    state: Arc<Mutex<State>>,
}

struct State {
    mode: Mode,
    files: HashMap<String, Vec<u8>>,
    /// `path range` of every request.
    requests: Vec<String>,
}

impl Hub {
    /// A hub with the demo model, some files that nobody needs, and weights in two shards if `sharded`.
    fn start(sharded: bool) -> Self {
        let read = |name: &str| std::fs::read(repository("demo-model").join(name)).unwrap();
        let mut files: HashMap<String, Vec<u8>> =
            ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
                .into_iter()
                .map(|name| (name.to_owned(), read(name)))
                .collect();
        for name in ["README.md", "pytorch_model.bin", "onnx/tokenizer.json", "consolidated.safetensors"] {
            files.insert(name.into(), b"not needed".to_vec());
        }
        if sharded {
            for entry in std::fs::read_dir(repository("xtask/golden/models/llama-sharded")).unwrap() {
                let path = entry.unwrap().path();
                let name = path.file_name().unwrap().to_str().unwrap().to_owned();
                files.insert(name, std::fs::read(&path).unwrap());
            }
        } else {
            files.insert("model.safetensors".into(), read("model.safetensors"));
        }
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(Mutex::new(State { mode: Mode::Healthy, files, requests: Vec::new() }));
        let (shared, own) = (Arc::clone(&state), url.clone());
        std::thread::spawn(move || {
            for connection in listener.incoming() {
                // Clients that leave early are what some of the tests are about.
                let _ = answer(connection.unwrap(), &own, &mut shared.lock().unwrap());
            }
        });
        Hub { url, state }
    }

    fn set(&self, mode: Mode) {
        self.state.lock().unwrap().mode = mode;
    }

    /// Requests since the last call.
    fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().unwrap().requests)
    }
}

/// Answers one request and closes the connection.
fn answer(mut stream: TcpStream, own: &str, state: &mut State) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let request = lines.next().transpose()?.unwrap_or_default();
    let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut range = None;
    for line in lines {
        let line = line?.to_ascii_lowercase();
        if line.is_empty() {
            break;
        }
        if let Some(bytes) = line.strip_prefix("range: bytes=") {
            range = Some(bytes.to_owned());
        }
    }
    state.requests.push(format!("{path} {}", range.clone().unwrap_or_default()));
    if let Mode::Refusing(status) = state.mode {
        return reply(&mut stream, &format!("{status} No"), "", b"", 0);
    }
    if path == format!("/api/models/{MODEL}/revision/main") {
        let siblings: Vec<Value> = state.files.keys().map(|name| json!({"rfilename": name})).collect();
        let info = json!({"sha": COMMIT, "siblings": siblings}).to_string();
        return reply(&mut stream, "200 OK", "", info.as_bytes(), info.len());
    }
    let stored = format!("/{MODEL}/resolve/main/");
    let name = path.strip_prefix(&stored).or_else(|| path.strip_prefix("/storage/")).unwrap_or_default();
    let Some(content) = state.files.get(name) else {
        return reply(&mut stream, "404 Not Found", "", b"", 0);
    };
    // Large files are elsewhere.
    if name.ends_with(".safetensors") && path.starts_with(&stored) {
        let headers = format!(
            "Location: {own}/storage/{name}\r\nX-Repo-Commit: {COMMIT}\r\nX-Linked-Etag: \"etag-of-{name}\"\r\n"
        );
        return reply(&mut stream, "302 Found", &headers, b"", 0);
    }
    let (start, end) = match range.as_deref().and_then(|range| range.split_once('-')) {
        Some((start, "")) => (start.parse().unwrap(), content.len()),
        Some((start, last)) => (start.parse().unwrap(), last.parse::<usize>().unwrap() + 1),
        None => (0, content.len()),
    };
    let headers = format!(
        "ETag: \"etag-of-{name}\"\r\nX-Repo-Commit: {COMMIT}\r\nContent-Range: bytes {start}-{}/{}\r\n",
        end - 1,
        content.len()
    );
    let body = &content[start..end];
    if let Mode::Interrupted(times @ 1..) = state.mode
        && path.starts_with("/storage/")
        && body.len() > 1
    {
        state.mode = Mode::Interrupted(times - 1);
        return reply(&mut stream, "206 Partial Content", &headers, &body[..body.len() / 2], body.len());
    }
    reply(&mut stream, "206 Partial Content", &headers, body, body.len())
}

/// Announces `length` bytes and sends `body`.
fn reply(
    stream: &mut TcpStream,
    status: &str,
    headers: &str,
    body: &[u8],
    length: usize,
) -> std::io::Result<()> {
    let head = format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n");
    stream.write_all(head.as_bytes())?;
    stream.write_all(body)
}

/// `inspect` of the model, with nothing of the user's own settings.
fn inspect(endpoint: &str, home: &Path, variables: &[(&str, &str)]) -> Output {
    let mut command = sparseserve(&["inspect", "--json", MODEL]);
    for proxy in ["http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"] {
        command.env_remove(proxy);
    }
    command.env("HF_ENDPOINT", endpoint).env("HF_HOME", home).envs(variables.iter().copied());
    output_within(&mut command, LATER)
}

fn succeeds(output: &Output) -> String {
    let said = text(&output.stderr);
    assert!(output.status.success(), "{said}");
    let facts: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(facts["architecture"], "LlamaForCausalLM");
    said
}

fn fails(output: &Output, code: i32, words: &[&str]) {
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{said}");
    let complaint = said.trim_end().lines().last().unwrap_or_default();
    assert_eq!(said.matches("error: ").count(), 1, "{said}");
    for word in words {
        assert!(complaint.starts_with("error: ") && complaint.contains(word), "{word:?} in {said}");
    }
}

#[test]
fn a_model_is_downloaded_once_and_then_found() {
    let (hub, home) = (Hub::start(false), tempfile::tempdir().unwrap());
    let said = succeeds(&inspect(&hub.url, home.path(), &[]));
    assert!(said.contains("downloading model.safetensors, 8.35 MiB"), "{said}");
    let asked = hub.requests().join("\n");
    for name in ["README", "pytorch_model", "onnx", "consolidated"] {
        assert!(!asked.contains(name), "{name} was downloaded:\n{asked}");
    }
    // Where other tools look for it.
    let snapshot = home.path().join("hub/models--owner--demo/snapshots").join(COMMIT);
    let weights = std::fs::read(snapshot.join("model.safetensors")).unwrap();
    assert_eq!(weights, std::fs::read(repository("demo-model/model.safetensors")).unwrap());

    let said = succeeds(&inspect(&hub.url, home.path(), &[]));
    assert!(!said.contains("downloading"), "{said}");
    assert_eq!(hub.requests().len(), 1, "only the list of files is asked for again");

    // Without a hub the copy will do.
    let said = succeeds(&inspect("http://127.0.0.1:1", home.path(), &[]));
    assert!(said.contains("cannot reach http://127.0.0.1:1"), "{said}");
    succeeds(&inspect(&hub.url, home.path(), &[("HF_HUB_OFFLINE", "1")]));
    assert!(hub.requests().is_empty(), "offline means offline");
    // A hub that has forgotten the model is believed.
    hub.set(Mode::Refusing(404));
    fails(&inspect(&hub.url, home.path(), &[]), 2, &[MODEL, "404"]);
}

#[test]
fn the_index_names_the_shards() {
    let (hub, home) = (Hub::start(true), tempfile::tempdir().unwrap());
    let said = succeeds(&inspect(&hub.url, home.path(), &[]));
    assert!(said.matches("downloading model-0000").count() >= 2, "{said}");
    assert!(!hub.requests().join("\n").contains("consolidated"));
}

#[test]
fn refusals_name_what_would_help() {
    let (hub, home) = (Hub::start(false), tempfile::tempdir().unwrap());
    for (status, code, words) in
        [(404, 2, "no such model"), (401, 2, "HF_TOKEN"), (403, 2, "HF_TOKEN"), (503, 1, "503")]
    {
        hub.set(Mode::Refusing(status));
        fails(&inspect(&hub.url, home.path(), &[]), code, &[MODEL, &hub.url, words]);
    }
    fails(&inspect("http://127.0.0.1:1", home.path(), &[]), 1, &[MODEL, "HF_ENDPOINT", "local directory"]);
}

#[test]
fn an_interrupted_download_goes_on() {
    let (hub, home) = (Hub::start(false), tempfile::tempdir().unwrap());
    let whole = std::fs::metadata(repository("demo-model/model.safetensors")).unwrap().len();
    // Once: it is taken up again within the same command.
    hub.set(Mode::Interrupted(1));
    succeeds(&inspect(&hub.url, home.path(), &[]));
    let asked = hub.requests().join("\n");
    assert!(asked.contains(&format!("/model.safetensors {}-", whole / 2)), "{asked}");

    // Too often: what has arrived is kept for the next time, and never taken for the whole.
    let home = tempfile::tempdir().unwrap();
    hub.set(Mode::Interrupted(100));
    fails(&inspect(&hub.url, home.path(), &[]), 1, &[MODEL, "run again"]);
    fails(&inspect(&hub.url, home.path(), &[("HF_HUB_OFFLINE", "1")]), 2, &[MODEL, "HF_HUB_OFFLINE"]);
    hub.set(Mode::Healthy);
    hub.requests();
    succeeds(&inspect(&hub.url, home.path(), &[]));
    let asked = hub.requests().join("\n");
    assert!(!asked.contains("/model.safetensors 0-\n"), "it began from the start:\n{asked}");
    let snapshot = home.path().join("hub/models--owner--demo/snapshots").join(COMMIT);
    let weights = std::fs::read(snapshot.join("model.safetensors")).unwrap();
    assert_eq!(weights, std::fs::read(repository("demo-model/model.safetensors")).unwrap());
}
